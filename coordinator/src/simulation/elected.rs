//! Members and leadership of a coordinator that stands for election, to the contract of `cluster/etcd/`.

use std::time::Duration;

use strata_proto::v1;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    letters::{Answer, Request},
    process::Caller,
};
use crate::cluster::{
    leadership::{CLAIM_TTL, Followed, Leadership},
    membership::{
        Member, MemberEvent, Source,
        probe::{MISSES, PROBE_EVERY, ask},
    },
};

/// How often a lease is renewed, and how long that may take.
const RENEW_EVERY: Duration = Duration::from_millis(500);
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Workers that are known to all, for a coordinator that leads them when it is its turn.
pub fn elected(members: Vec<Member>, store: Caller) -> Source {
    let (events, receiver) = mpsc::unbounded_channel();
    let (decided, leadership) = watch::channel(Leadership::StandsBy { why: "it is connecting".into() });
    let followed = watch::Sender::new(Followed::default());
    tokio::spawn(stand(store, decided, followed.subscribe()));
    for member in members {
        tokio::spawn(probe(member, events.clone(), leadership.clone(), followed.clone()));
    }
    Source {
        events: receiver,
        leadership,
        keeper: std::sync::Arc::new(crate::cluster::records::InMemory::default()),
    }
}

/// Stands for election for ever; who leads and cannot ask leads on.
async fn stand(store: Caller, decided: watch::Sender<Leadership>, followed: watch::Receiver<Followed>) {
    loop {
        let known = followed.borrow().clone();
        let (followed, is_heard) = (known.term, known.leads(known.term, CLAIM_TTL, Instant::now()));
        let asked = store.ask(Request::Stand { followed, is_heard });
        let answer = tokio::time::timeout(CALL_TIMEOUT, asked).await;
        let now = match answer {
            Ok(Ok(Answer::Stands(Some(term)))) => Some(Leadership::Leads { term }),
            Ok(Ok(_)) => Some(Leadership::StandsBy { why: "another coordinator leads".into() }),
            Ok(Err(_)) | Err(_) => None,
        };
        decided.send_if_modified(|decided| match now {
            Some(now) if *decided != now => {
                *decided = now;
                true
            }
            _ => false,
        });
        tokio::time::sleep(RENEW_EVERY).await;
    }
}

/// Tells when a worker joins and leaves, and workers by whom they are led.
async fn probe(
    member: Member,
    events: mpsc::UnboundedSender<MemberEvent>,
    leadership: watch::Receiver<Leadership>,
    followed: watch::Sender<Followed>,
) {
    let mut boot = None;
    let mut misses = 0;
    let mut away = String::new();
    let tell = |event| drop(events.send(event));
    loop {
        let term = leadership.borrow().term();
        let claim = term.map(|term| v1::Claim { term, coordinator: "elected".into(), resigned: false });
        let why = match ask(&member, claim).await {
            Ok(described) => {
                misses = 0;
                let lead = described.lead.unwrap_or_default();
                followed.send_if_modified(|followed| followed.heard(&lead, Instant::now()));
                if boot.as_ref() != Some(&described.boot_id) {
                    if boot.replace(described.boot_id).is_some() {
                        tell(MemberEvent::Left(member.name.clone()));
                    }
                    tell(MemberEvent::Joined(member.clone()));
                    away.clear();
                }
                String::new()
            }
            Err(why) => {
                misses += 1;
                if misses >= MISSES && boot.take().is_some() {
                    tell(MemberEvent::Left(member.name.clone()));
                }
                why
            }
        };
        if why != away {
            tell(MemberEvent::Away(member.name.clone(), why.clone()));
            away = why;
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}
