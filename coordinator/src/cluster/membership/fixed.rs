//! Members from a list of URLs.

use std::{sync::Arc, time::Duration};

use strata_proto::{PROTOCOL, v1};
use tokio::sync::mpsc;

use super::{Member, MemberEvent};
use crate::cluster::remote::RemoteWorker;

/// How often a listed worker is asked whether it is there.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Unanswered probes in a row after which a worker counts as gone.
const MISSES: u32 = 3;

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
        match tokio::time::timeout(PROBE_TIMEOUT, described).await {
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
