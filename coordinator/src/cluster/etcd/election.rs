//! Which coordinator leads: the one with the oldest key, as in etcd's own elections.
//!
//! A candidate writes a key of its own under a lease that is renewed all the time, and reads all of them. Whose key was
//! created first leads, by a term that is the revision of that creation; the others wait for a change. What only the first
//! one may do is written in `led` before it acts: by that, a leader whose key etcd has dropped knows, when it has a new
//! one, whether another one led in between. If none did, nothing has happened, and its term goes on.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse,
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use super::{
    config::Etcd,
    connection::{CALL_TIMEOUT, Retry, call, connect, stopped},
    error::EtcdError,
    lease::Lease,
    watch::Watcher,
};
use crate::cluster::leadership::Leadership;

/// A coordinator that wants to lead when it is its turn.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// No other process has it.
    pub id: String,
    /// What others call it: where it answers clients.
    pub name: String,
    /// How long others wait for it when it dies.
    pub ttl: Duration,
}

/// A candidacy, until it is resigned.
#[derive(Debug)]
pub struct Election {
    leadership: watch::Receiver<Leadership>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Stands for election, whatever etcd does meanwhile.
pub fn election(etcd: &Etcd, candidate: Candidate) -> Election {
    election_above(etcd, candidate, watch::Sender::new(0).subscribe())
}

/// The same, by terms above those that workers have `seen`: they may have had other leaders than this etcd's.
pub(super) fn election_above(etcd: &Etcd, candidate: Candidate, seen: watch::Receiver<u64>) -> Election {
    let (leadership, decided) =
        watch::channel(Leadership::StandsBy { why: "it is connecting to etcd".into() });
    let (stop, stopped) = watch::channel(false);
    let candidacy = Candidacy {
        key: etcd.key(&format!("leader/{}", candidate.id)),
        prefix: etcd.key("leader/"),
        led_key: etcd.key("led"),
        etcd: etcd.clone(),
        candidate,
        leadership,
        seen,
        renewed: None,
    };
    Election { leadership: decided, stop, task: tokio::spawn(candidacy.stand(stopped)) }
}

impl Election {
    /// Whether this coordinator leads, now and whenever that changes.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Takes the candidacy back, so that the next one leads at once. If etcd does not answer, that is when the lease ends.
    pub async fn resign(self) {
        self.stop.send_replace(true);
        let _ = tokio::time::timeout(2 * CALL_TIMEOUT, self.task).await;
    }
}

/// The last leader, as `led` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Led {
    /// Its id.
    id: String,
    /// Its term.
    term: u64,
}

struct Candidacy {
    etcd: Etcd,
    candidate: Candidate,
    key: String,
    prefix: String,
    led_key: String,
    leadership: watch::Sender<Leadership>,
    /// The highest term that workers have heard of.
    seen: watch::Receiver<u64>,
    /// When the lease was last known to live.
    renewed: Option<Instant>,
}

impl Candidacy {
    /// Stands for election, and does so again after whatever ended that, until told to stop.
    async fn stand(mut self, mut stop: watch::Receiver<bool>) {
        let mut retry = Retry::default();
        loop {
            let (mut client, mut lease) = (None, None);
            let outcome = tokio::select! {
                outcome = self.session(&mut client, &mut lease, &mut retry) => outcome,
                () = stopped(&mut stop) => {
                    if let (Some(mut client), Some(lease)) = (client, lease) {
                        // It ends by itself otherwise.
                        let _: Result<(), EtcdError> = Lease::revoke(lease, &mut client).await;
                    }
                    return self.decide(Leadership::StandsBy { why: "it has resigned".into() });
                }
            };
            let Err(error) = outcome;
            if let Some(lease) = &lease {
                self.renewed = Some(lease.renewed());
            }
            self.cut_off(&error);
            let leads = matches!(*self.leadership.borrow(), Leadership::Leads { .. });
            let what = match leads {
                true => "this coordinator leads on, though etcd does not say so",
                false => "this coordinator stands by",
            };
            tokio::select! {
                () = retry.failed(what, &error) => {}
                () = stopped(&mut stop) => return,
            }
        }
    }

    /// Writes the key, and decides anew whenever one changes, for as long as connection and lease last.
    async fn session(
        &mut self,
        connection: &mut Option<Client>,
        held: &mut Option<Lease>,
        retry: &mut Retry,
    ) -> Result<std::convert::Infallible, EtcdError> {
        let client = connection.insert(connect(&self.etcd).await?);
        let lease = held.insert(Lease::grant(client, self.candidate.ttl).await?);
        // Over an older key of this process it keeps the revision of that one's creation, and so its place.
        let options = PutOptions::new().with_lease(lease.id());
        call(
            "standing for election",
            client.put(self.key.as_str(), self.candidate.name.as_str(), Some(options)),
        )
        .await?;
        loop {
            let revision = self.look(client).await?;
            retry.succeeded();
            let mut watcher = Watcher::start(client, self.prefix.clone(), revision).await?;
            tokio::select! {
                error = lease.ended() => return Err(error),
                changed = watcher.next() => drop(changed?),
                () = outbid(&mut self.seen, &self.leadership) => {}
            }
        }
    }

    /// Reads all keys and decides; the revision of which that is.
    async fn look(&self, client: &mut Client) -> Result<i64, EtcdError> {
        let all = GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
        let look = Txn::new()
            .and_then([TxnOp::get(self.prefix.as_str(), Some(all)), TxnOp::get(self.led_key.as_str(), None)]);
        let answer = call("reading who leads", client.txn(look)).await?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        let mut found = answer.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs(),
            _ => Vec::new(),
        });
        let (candidates, led) = (found.next().unwrap_or_default(), found.next().unwrap_or_default());
        if !candidates.iter().any(|kv| kv.key() == self.key.as_bytes()) {
            return Err(EtcdError::Gone(self.key.clone()));
        }
        let first = candidates.first().filter(|kv| kv.key() == self.key.as_bytes());
        match first {
            Some(ours) => self.lead(client, ours, led.first()).await?,
            None => {
                let name = candidates.first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
                let why = format!("coordinator {} leads", name.unwrap_or_default());
                self.decide(Leadership::StandsBy { why });
            }
        }
        Ok(revision)
    }

    /// Leads: by the term that it had if nobody led since, or by a new one, which is written before it is acted upon.
    async fn lead(
        &self,
        client: &mut Client,
        ours: &KeyValue,
        led: Option<&KeyValue>,
    ) -> Result<(), EtcdError> {
        let created = u64::try_from(ours.create_revision()).unwrap_or(0);
        let last: Option<Led> = led.and_then(|kv| serde_json::from_slice(kv.value()).ok());
        let seen = *self.seen.borrow();
        let term = match last {
            Some(last) if last.id == self.candidate.id && last.term >= seen => last.term,
            last => {
                // Where etcd was set up anew, its revisions are lower than the terms that it, or workers, have seen.
                let above = last.map_or(0, |last| last.term).max(seen);
                let term = created.max(above.saturating_add(1));
                let led =
                    serde_json::to_vec(&Led { id: self.candidate.id.clone(), term }).unwrap_or_default();
                let still_first =
                    Compare::create_revision(self.key.as_str(), CompareOp::Equal, ours.create_revision());
                let put = TxnOp::put(self.led_key.as_str(), led, None);
                let answer =
                    call("taking the lead", client.txn(Txn::new().when([still_first]).and_then([put])))
                        .await?;
                if !answer.succeeded() {
                    return Err(EtcdError::Gone(self.key.clone()));
                }
                term
            }
        };
        self.decide(Leadership::Leads { term });
        Ok(())
    }

    /// Etcd cannot be asked. Who leads goes on, since nobody else can be elected, or, if that is wrong, workers refuse it.
    fn cut_off(&self, error: &EtcdError) {
        if matches!(*self.leadership.borrow(), Leadership::StandsBy { .. }) {
            return self.decide(Leadership::StandsBy { why: error.to_string() });
        }
        let ttl = self.candidate.ttl;
        if self.renewed.is_some_and(|renewed| renewed.elapsed() > ttl) {
            tracing::warn!(
                "the lease of this leader is over after {ttl:?}: another coordinator may lead by now"
            );
        }
    }

    fn decide(&self, now: Leadership) {
        self.leadership.send_if_modified(|leadership| {
            let changed = *leadership != now;
            if changed {
                match &now {
                    Leadership::Leads { term } => tracing::info!(term, "this coordinator leads"),
                    Leadership::StandsBy { why } => tracing::info!("this coordinator stands by: {why}"),
                }
                *leadership = now;
            }
            changed
        });
    }
}

/// Resolves when a worker has heard of a higher term than that of this leader, whoever had it.
async fn outbid(seen: &mut watch::Receiver<u64>, leadership: &watch::Sender<Leadership>) {
    let term = leadership.borrow().term();
    let heard = seen.wait_for(|seen| term.is_some_and(|term| *seen > term)).await.is_ok();
    if !heard {
        // Nobody listens to workers here.
        std::future::pending::<()>().await;
    }
}
