//! Members in this process.

use std::sync::Arc;

use strata_proto::Worker;
use tokio::sync::mpsc;

use super::{Member, MemberEvent};

/// Workers of this process: they join at once and stay.
pub fn local(workers: Vec<(String, Arc<dyn Worker>)>) -> mpsc::UnboundedReceiver<MemberEvent> {
    let (events, receiver) = mpsc::unbounded_channel();
    for (rank, (name, worker)) in workers.into_iter().enumerate() {
        // The receiver is in hand, so this cannot fail.
        let _ = events.send(MemberEvent::Joined(Member { name, worker, rank, host: "127.0.0.1".into() }));
    }
    // Keeps the stream open for as long as anyone listens.
    let keep = events.clone();
    tokio::spawn(async move { keep.closed().await });
    receiver
}
