//! Who is there: workers as a stream of events. A fixed list today; etcd will produce the same events.

use std::{fmt, sync::Arc, time::Duration};

use strata_proto::{PROTOCOL, Worker, v1};
use tokio::sync::mpsc;

use crate::remote::RemoteWorker;

/// How often a listed worker is asked whether it is there.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
/// Unanswered probes in a row after which a worker counts as gone.
const MISSES: u32 = 3;

/// A worker that can be planned over.
#[derive(Clone)]
pub struct Member {
    /// Name in plans; unique.
    pub name: String,
    /// Its calls.
    pub worker: Arc<dyn Worker>,
    /// Place in the list; plans keep this order.
    pub rank: usize,
    /// Host that activations for this worker are sent to when it listens on every address.
    pub host: String,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A change of the membership.
#[derive(Debug)]
pub enum MemberEvent {
    /// A worker is there, or is there again under a new boot id.
    Joined(Member),
    /// The named worker is gone.
    Left(String),
}

/// Keeps the list of members, in order of rank.
pub(crate) fn note(members: &mut Vec<Member>, event: &MemberEvent) {
    match event {
        MemberEvent::Joined(member) => {
            members.retain(|m| m.name != member.name);
            members.push(member.clone());
        }
        MemberEvent::Left(name) => members.retain(|m| m.name != *name),
    }
    members.sort_by_key(|m| m.rank);
}

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

/// Workers at fixed URLs, each probed until the receiver is dropped.
///
/// # Errors
/// If a URL is not usable as an address.
pub fn fixed(urls: &[String]) -> Result<mpsc::UnboundedReceiver<MemberEvent>, String> {
    let (events, receiver) = mpsc::unbounded_channel();
    for (rank, url) in urls.iter().enumerate() {
        let (worker, name, host) = RemoteWorker::lazy(url)?;
        let member = Member { name, worker: Arc::new(worker), rank, host };
        let events = events.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = probe(member, &events) => {}
                () = events.closed() => {}
            }
        });
    }
    Ok(receiver)
}

/// Reports joins and losses of one worker, for ever.
async fn probe(member: Member, events: &mpsc::UnboundedSender<MemberEvent>) {
    let mut boot: Option<String> = None;
    let mut misses = 0;
    loop {
        let described = member.worker.describe(v1::DescribeRequest::default());
        match tokio::time::timeout(PROBE_PATIENCE, described).await {
            Ok(Ok(described)) => {
                misses = 0;
                let speaks = described.protocol_min <= PROTOCOL && PROTOCOL <= described.protocol_max;
                if !speaks {
                    tracing::error!(
                        worker = member.name,
                        "speaks protocol {}..={}, this coordinator {PROTOCOL}: upgrade one of them",
                        described.protocol_min,
                        described.protocol_max
                    );
                } else if boot.as_ref() != Some(&described.boot_id) {
                    if boot.replace(described.boot_id).is_some() {
                        let _ = events.send(MemberEvent::Left(member.name.clone()));
                    }
                    let _ = events.send(MemberEvent::Joined(member.clone()));
                }
            }
            outcome => {
                if let Ok(Err(status)) = outcome {
                    tracing::debug!(worker = member.name, %status, "probe failed");
                }
                misses += 1;
                if misses >= MISSES && boot.take().is_some() {
                    let _ = events.send(MemberEvent::Left(member.name.clone()));
                }
            }
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}
