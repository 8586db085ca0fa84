//! Members from a list of URLs.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use strata_proto::{PROTOCOL, error::words, v1};
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
/// If a URL is not usable as an address, or two are of one worker.
pub fn fixed(urls: &[String]) -> Result<mpsc::UnboundedReceiver<MemberEvent>, String> {
    let (events, receiver) = mpsc::unbounded_channel();
    let mut names = HashSet::new();
    let boots = Boots::default();
    for (rank, url) in urls.iter().enumerate() {
        let (worker, name, host) = RemoteWorker::lazy(url)?;
        if !names.insert(name.to_lowercase()) {
            return Err(format!("worker {url} is listed twice: expected each worker once"));
        }
        let member = Member { name, worker: Arc::new(worker), rank, host };
        let (events, boots) = (events.clone(), boots.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = probe(member, &events, &boots) => {}
                () = events.closed() => {}
            }
        });
    }
    Ok(receiver)
}

/// Which of the names has a worker, by its boot id: `localhost` and `127.0.0.1` may be one.
#[derive(Clone, Default)]
struct Boots(Arc<Mutex<HashMap<String, String>>>);

impl Boots {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a worker for `name`; whose it is, if another one has it.
    fn take(&self, boot: &str, name: &str) -> Option<String> {
        let mut boots = self.lock();
        let owner = boots.entry(boot.to_owned()).or_insert_with(|| name.to_owned());
        (owner != name).then(|| owner.clone())
    }

    fn leave(&self, boot: &str) {
        self.lock().remove(boot);
    }
}

/// Reports joins and losses of one worker, for ever.
async fn probe(member: Member, events: &mpsc::UnboundedSender<MemberEvent>, boots: &Boots) {
    let mut boot: Option<String> = None;
    let mut told = false;
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
                    if let Some(old) = boot.take() {
                        boots.leave(&old);
                        let _ = events.send(MemberEvent::Left(member.name.clone()));
                    }
                    match boots.take(&described.boot_id, &member.name) {
                        None => {
                            boot = Some(described.boot_id);
                            let _ = events.send(MemberEvent::Joined(member.clone()));
                        }
                        Some(worker) if !std::mem::replace(&mut told, true) => {
                            let again = member.name.clone();
                            let _ = events.send(MemberEvent::Twice { worker, again });
                        }
                        Some(_) => {}
                    }
                }
            }
            outcome => {
                if let Ok(Err(status)) = outcome {
                    tracing::debug!(worker = member.name, why = words(&status), "probe failed");
                }
                misses += 1;
                if misses >= MISSES
                    && let Some(old) = boot.take()
                {
                    boots.leave(&old);
                    let _ = events.send(MemberEvent::Left(member.name.clone()));
                }
            }
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_is_listed_once_whatever_its_spelling() {
        let refused = |urls: [&str; 2]| fixed(&urls.map(str::to_owned)).unwrap_err();
        for other in ["127.0.0.1:7801", "http://127.0.0.1:7801/", "HTTP://127.0.0.1:7801"] {
            let said = refused(["http://127.0.0.1:7801", other]);
            assert_eq!(said, format!("worker {other} is listed twice: expected each worker once"));
        }
        assert!(refused(["a:1", "HTTPS://b:1"]).starts_with("worker HTTPS://b:1: Strata has no TLS yet"));
        assert!(fixed(&["a:1".to_owned(), "a:2".to_owned()]).is_ok());
    }
}
