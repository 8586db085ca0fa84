//! Which coordinator leads: the one that led last, or the one with the oldest key, as in etcd's own elections.
//!
//! A candidate writes a key of its own under a lease that is renewed all the time, and reads all of them. The last leader
//! is written in `led` before it acts. While it has a key it leads on, by the same term, though etcd has dropped its key
//! meanwhile and others are older. When it has none, whose key was created first leads, by a term that is the revision
//! of that creation, once no worker hears the last leader any more: one that etcd has merely lost sight of comes back.

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
use crate::cluster::{
    leadership::{CLAIM_TTL, Followed, Leadership},
    membership::probe::PROBE_EVERY,
};

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
    election_over(etcd, candidate, watch::Sender::new(Followed::default()).subscribe())
}

/// The same, over workers: by terms above those that they have heard of, as they may have had other leaders than this
/// etcd's, and not while they follow the last one.
pub(super) fn election_over(
    etcd: &Etcd,
    candidate: Candidate,
    followed: watch::Receiver<Followed>,
) -> Election {
    // Nothing is known yet, which is nothing to tell.
    let (leadership, decided) = watch::channel(Leadership::StandsBy { why: String::new() });
    let (stop, stopped) = watch::channel(false);
    let candidacy = Candidacy {
        key: etcd.key(&format!("leader/{}", candidate.id)),
        prefix: etcd.key("leader/"),
        led_key: etcd.key("led"),
        etcd: etcd.clone(),
        candidate,
        leadership,
        followed,
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
    /// Whether it leads no more, by its own word.
    #[serde(default)]
    resigned: bool,
}

impl Led {
    fn written(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// What `led` says.
struct Last {
    led: Option<Led>,
    /// When it was written.
    modified: i64,
}

impl Last {
    fn read(kv: Option<&KeyValue>) -> Last {
        let led: Option<Led> = kv.and_then(|kv| serde_json::from_slice(kv.value()).ok());
        Last { led, modified: kv.map_or(0, KeyValue::mod_revision) }
    }

    /// Who led last, unless it has resigned.
    fn leader(&self) -> Option<&Led> {
        self.led.as_ref().filter(|led| !led.resigned)
    }
}

struct Candidacy {
    etcd: Etcd,
    candidate: Candidate,
    key: String,
    prefix: String,
    led_key: String,
    leadership: watch::Sender<Leadership>,
    /// Whom workers follow.
    followed: watch::Receiver<Followed>,
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
                        // Both come to the same by themselves, only later.
                        let _: Result<(), EtcdError> = self.leave(&mut client).await;
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
            let (revision, look_again) = self.look(client).await?;
            retry.succeeded();
            let mut watcher = Watcher::start(client, self.prefix.clone(), revision).await?;
            tokio::select! {
                error = lease.ended() => return Err(error),
                changed = watcher.next() => drop(changed?),
                () = outbid(&mut self.followed, &self.leadership) => {}
                () = tokio::time::sleep(PROBE_EVERY), if look_again => {}
            }
        }
    }

    /// Reads all keys and decides; the revision of which that is, and whether what workers say may change it.
    async fn look(&self, client: &mut Client) -> Result<(i64, bool), EtcdError> {
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
        let Some(ours) = candidates.iter().find(|kv| kv.key() == self.key.as_bytes()) else {
            return Err(EtcdError::Gone(self.key.clone()));
        };
        let last = Last::read(led.first());
        let last_key = last.leader().map(|led| self.key_of(&led.id));
        let key = |kv: &&KeyValue| Some(kv.key()) == last_key.as_ref().map(String::as_bytes);
        let first = candidates.iter().find(key).or(candidates.first()).unwrap_or(ours);
        if first.key() != ours.key() {
            let why = format!("coordinator {} leads", String::from_utf8_lossy(first.value()));
            self.decide(Leadership::StandsBy { why });
            return Ok((revision, false));
        }
        if let Some(led) = last.leader().filter(|led| led.id != self.candidate.id) {
            let followed = self.followed.borrow().clone();
            if followed.leads(led.term, self.candidate.ttl.min(CLAIM_TTL), Instant::now()) {
                let leader = &followed.coordinator;
                let why = format!("coordinator {leader} leads, as workers say, though etcd has forgotten it");
                self.decide(Leadership::StandsBy { why });
                return Ok((revision, true));
            }
        }
        let leads = self.lead(client, ours, &last).await?;
        Ok((revision, !leads))
    }

    /// Leads: by the term that it had if nobody led since, or by a new one, which is written before it is acted upon. Not
    /// if what was read has changed meanwhile.
    async fn lead(&self, client: &mut Client, ours: &KeyValue, last: &Last) -> Result<bool, EtcdError> {
        let created = u64::try_from(ours.create_revision()).unwrap_or(0);
        let seen = self.followed.borrow().term;
        let term = match &last.led {
            Some(led) if led.id == self.candidate.id && led.term >= seen => led.term,
            led => {
                // Where etcd was set up anew, its revisions are lower than the terms that it, or workers, have seen.
                let above = led.as_ref().map_or(0, |led| led.term).max(seen);
                let term = created.max(above.saturating_add(1));
                let now = Led { id: self.candidate.id.clone(), term, resigned: false };
                // Nobody else has taken the lead, and the last leader has not come back.
                let created = ours.create_revision();
                let mut unchanged = vec![
                    Compare::create_revision(self.key.as_str(), CompareOp::Equal, created),
                    Compare::mod_revision(self.led_key.as_str(), CompareOp::Equal, last.modified),
                ];
                if let Some(led) = last.leader().filter(|led| led.id != self.candidate.id) {
                    unchanged.push(Compare::version(self.key_of(&led.id), CompareOp::Equal, 0));
                }
                let put = TxnOp::put(self.led_key.as_str(), now.written(), None);
                let take = Txn::new().when(unchanged).and_then([put]);
                if !call("taking the lead", client.txn(take)).await?.succeeded() {
                    return Ok(false);
                }
                term
            }
        };
        self.decide(Leadership::Leads { term });
        Ok(true)
    }

    /// Leads no more, if it does, so that nobody waits for it to come back.
    async fn leave(&self, client: &mut Client) -> Result<(), EtcdError> {
        let Some(term) = self.leadership.borrow().term() else { return Ok(()) };
        let led = Led { id: self.candidate.id.clone(), term, resigned: false };
        let unchanged = Compare::value(self.led_key.as_str(), CompareOp::Equal, led.written());
        let resigned = Led { resigned: true, ..led }.written();
        let put = TxnOp::put(self.led_key.as_str(), resigned, None);
        call("resigning", client.txn(Txn::new().when([unchanged]).and_then([put]))).await?;
        Ok(())
    }

    /// The key of a candidate.
    fn key_of(&self, id: &str) -> String {
        format!("{}{id}", self.prefix)
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
async fn outbid(followed: &mut watch::Receiver<Followed>, leadership: &watch::Sender<Leadership>) {
    let term = leadership.borrow().term();
    let heard = followed.wait_for(|followed| term.is_some_and(|term| followed.term > term)).await.is_ok();
    if !heard {
        // Nobody listens to workers here.
        std::future::pending::<()>().await;
    }
}
