//! Members from a list of URLs.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use strata_proto::{Worker, v1};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    Caller, Member, MemberEvent, Source,
    probe::{MISSES, PROBE_EVERY, PROBE_TIMEOUT, ask, speaks},
};
use crate::cluster::{
    leadership::{Claims, Clock, Leadership, wall_clock},
    records::InMemory,
    remote::RemoteWorker,
};

/// Workers at fixed URLs, each probed until the receiver is dropped. Of the coordinators that have workers in common one
/// leads; `caller` is this one.
///
/// # Errors
/// If a URL is not usable as an address, or two are of one worker.
pub fn fixed(urls: &[String], caller: &Caller) -> Result<(Source, Claimant), String> {
    let (mut names, mut members) = (HashSet::new(), Vec::new());
    for (rank, url) in urls.iter().enumerate() {
        let (worker, name, host) = RemoteWorker::lazy(url)?;
        if !names.insert(name.to_lowercase()) {
            return Err(format!("worker {url} is listed twice: expected each worker once"));
        }
        let worker = Arc::new(worker.with_secret(caller.secret.clone()));
        members.push(Member { name, worker, rank, host });
    }
    Ok(over(members, caller.name.clone(), wall_clock))
}

/// The same over these workers, for a coordinator of this name and by this clock.
pub(crate) fn over(members: Vec<Member>, coordinator: String, clock: Clock) -> (Source, Claimant) {
    let (events, receiver) = mpsc::unbounded_channel();
    let claims = Mutex::new(Claims::new(coordinator, members.len(), clock));
    let why = format!("0 of {} workers are there", members.len());
    let (decided, leadership) = watch::channel(Leadership::StandsBy { why });
    let common = Arc::new(Common { events, claims, boots: Boots::default(), decided });
    let workers = members.iter().map(|member| member.worker.clone()).collect();
    for member in members {
        let common = common.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = common.events.closed() => {}
                () = probe(member, &common) => {}
            }
        });
    }
    let keeper = Arc::new(InMemory::default());
    (Source { events: receiver, leadership, keeper }, Claimant { common, workers })
}

/// What a coordinator claims of its workers, until it resigns.
pub struct Claimant {
    common: Arc<Common>,
    workers: Vec<Arc<dyn Worker>>,
}

impl Claimant {
    /// Takes the claim back, so that another coordinator leads at once. A worker that does not answer keeps it until it
    /// is too old.
    pub async fn resign(self) {
        let Some(claim) = self.common.claims().resign() else { return };
        let told = self.workers.iter().map(|worker| {
            let request =
                v1::DescribeRequest { claim: Some(claim.clone()), ..v1::DescribeRequest::default() };
            tokio::time::timeout(PROBE_TIMEOUT, worker.describe(request))
        });
        futures::future::join_all(told).await;
    }
}

/// Which of the names has a worker, by its boot id: `localhost` and `127.0.0.1` may be one.
#[derive(Default)]
struct Boots(Mutex<HashMap<String, String>>);

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

/// What the probes of all workers have in common.
struct Common {
    events: mpsc::UnboundedSender<MemberEvent>,
    claims: Mutex<Claims>,
    boots: Boots,
    decided: watch::Sender<Leadership>,
}

impl Common {
    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides anew who leads, by what was heard and by the time.
    fn decide(&self) {
        let mut claims = self.claims();
        self.decided.send_if_modified(|decided| {
            let now = claims.decide(Instant::now());
            let changed = *decided != now;
            *decided = now;
            changed
        });
    }

    fn tell(&self, event: MemberEvent) {
        // A receiver that is gone ends the probes.
        let _ = self.events.send(event);
    }
}

/// Reports joins and losses of one worker, for ever.
async fn probe(member: Member, common: &Common) {
    let mut boot: Option<String> = None;
    let mut misses = 0;
    let mut away = String::new();
    loop {
        let claim = common.claims().claim();
        let why = match ask(&member, claim).await {
            Ok(mut described) => {
                misses = 0;
                common.claims().heard(
                    &member.name,
                    described.lead.take().unwrap_or_default(),
                    Instant::now(),
                );
                // Before anybody hears that it is there, and asks who leads.
                common.decide();
                if let Err(why) = speaks(&described) {
                    why
                } else if boot.as_ref() == Some(&described.boot_id) {
                    String::new()
                } else {
                    if let Some(old) = boot.take() {
                        common.boots.leave(&old);
                        common.tell(MemberEvent::Left(member.name.clone()));
                    }
                    match common.boots.take(&described.boot_id, &member.name) {
                        None => {
                            boot = Some(described.boot_id);
                            common.tell(MemberEvent::Joined(member.clone()));
                            away.clear();
                            String::new()
                        }
                        Some(worker) => {
                            let why = format!("it is worker {worker} by another name");
                            if why != away {
                                common.tell(MemberEvent::Twice { worker, again: member.name.clone() });
                            }
                            why
                        }
                    }
                }
            }
            Err(why) => {
                misses += 1;
                if misses >= MISSES {
                    common.claims().gone(&member.name);
                    if let Some(old) = boot.take() {
                        common.boots.leave(&old);
                        common.tell(MemberEvent::Left(member.name.clone()));
                    }
                }
                why
            }
        };
        if why != away {
            if !why.is_empty() {
                tracing::warn!(worker = member.name, "{why}; planning without it");
            }
            common.tell(MemberEvent::Away(member.name.clone(), why.clone()));
            away = why;
        }
        common.decide();
        tokio::time::sleep(PROBE_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_worker_is_listed_once_whatever_its_spelling() {
        let refused = |urls: [&str; 2]| fixed(&urls.map(str::to_owned), &Caller::default()).err().unwrap();
        for other in ["127.0.0.1:7801", "http://127.0.0.1:7801/", "HTTP://127.0.0.1:7801"] {
            let said = refused(["http://127.0.0.1:7801", other]);
            assert_eq!(said, format!("worker {other} is listed twice: expected each worker once"));
        }
        assert!(refused(["a:1", "HTTPS://b:1"]).starts_with("worker HTTPS://b:1: Strata has no TLS yet"));
        assert!(fixed(&["a:1".to_owned(), "a:2".to_owned()], &Caller::default()).is_ok());
    }
}
