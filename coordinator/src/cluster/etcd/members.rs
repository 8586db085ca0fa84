//! Workers that have registered, as members: who is there is what etcd says, or what answers.

use std::{collections::HashMap, sync::Arc};

use etcd_client::{Client, EventType, GetOptions};
use strata_proto::v1;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    config::Etcd,
    connection::{Retry, call, connect},
    error::EtcdError,
    record::WorkerRecord,
    watch::Watcher,
};
use crate::cluster::{
    leadership::{Followed, Leadership},
    membership::{
        Member, MemberEvent,
        probe::{MISSES, PROBE_EVERY, ask, speaks},
    },
};

/// The registered workers of a cluster, until the receiver is dropped.
///
/// A worker joins when it has registered and answers. It leaves when it does not answer: at once if its entry is gone, too.
/// So an entry that is gone while its worker computes changes nothing, and while etcd is away, the members are those that
/// were known and answer.
pub fn members(etcd: &Etcd) -> mpsc::UnboundedReceiver<MemberEvent> {
    follow(etcd, None)
}

/// The same, where workers are told who leads them, and tell by whom they are led.
pub(super) fn follow(etcd: &Etcd, follower: Option<Follower>) -> mpsc::UnboundedReceiver<MemberEvent> {
    let (events, receiver) = mpsc::unbounded_channel();
    let (etcd, entries, probes) = (etcd.clone(), HashMap::new(), JoinSet::new());
    let mut known = Known { etcd, events, follower, entries, probes };
    tokio::spawn(async move {
        let gone = known.events.clone();
        tokio::select! {
            () = known.follow() => {}
            () = gone.closed() => {}
        }
    });
    receiver
}

/// A coordinator that stands for election, as workers see it.
#[derive(Debug, Clone)]
pub(super) struct Follower {
    /// Its name.
    pub coordinator: String,
    /// Whether it leads.
    pub leadership: watch::Receiver<Leadership>,
    /// Whom workers follow; told when that is a higher term.
    pub followed: watch::Sender<Followed>,
}

impl Follower {
    /// What to tell workers.
    fn claim(&self) -> Option<v1::Claim> {
        let term = self.leadership.borrow().term()?;
        Some(v1::Claim { term, coordinator: self.coordinator.clone(), resigned: false })
    }

    /// A worker said whom it follows.
    fn heard(&self, lead: &v1::Lead) {
        self.followed.send_if_modified(|followed| followed.heard(lead, Instant::now()));
    }
}

/// Every worker that was registered since this coordinator began, each with a probe of its own.
struct Known {
    etcd: Etcd,
    events: mpsc::UnboundedSender<MemberEvent>,
    follower: Option<Follower>,
    /// What etcd says of each; `None` once the entry is gone.
    entries: HashMap<String, watch::Sender<Option<WorkerRecord>>>,
    /// Ended with this.
    probes: JoinSet<()>,
}

impl Known {
    /// Reads and watches, and does so again after whatever ended that.
    async fn follow(&mut self) {
        let mut retry = Retry::default();
        loop {
            let Err(error) = self.session(&mut retry).await;
            retry.failed("workers that register are not seen; those that are known stay", &error).await;
        }
    }

    /// Takes note of what changes for as long as a connection lasts.
    async fn session(&mut self, retry: &mut Retry) -> Result<std::convert::Infallible, EtcdError> {
        let mut client = connect(&self.etcd).await?;
        let prefix = self.etcd.key("workers/");
        let revision = self.list(&mut client, &prefix).await?;
        let mut watcher = Watcher::start(&mut client, prefix.clone(), revision).await?;
        retry.succeeded();
        loop {
            for event in watcher.next().await? {
                let Some(kv) = event.kv() else { continue };
                let key = String::from_utf8_lossy(kv.key());
                match event.event_type() {
                    EventType::Put => self.registered(&key, kv.value()),
                    EventType::Delete => self.unregistered(key.strip_prefix(&prefix).unwrap_or_default()),
                }
            }
        }
    }

    /// Reads all entries; the revision of which that is.
    async fn list(&mut self, client: &mut Client, prefix: &str) -> Result<i64, EtcdError> {
        let found =
            call("listing workers", client.get(prefix, Some(GetOptions::new().with_prefix()))).await?;
        let mut missing: Vec<_> = self.entries.keys().cloned().collect();
        for kv in found.kvs() {
            let key = String::from_utf8_lossy(kv.key());
            missing.retain(|name| key.strip_prefix(prefix) != Some(name));
            self.registered(&key, kv.value());
        }
        for name in missing {
            self.unregistered(&name);
        }
        Ok(found.header().map_or(0, etcd_client::ResponseHeader::revision))
    }

    /// An entry was written.
    fn registered(&mut self, key: &str, value: &[u8]) {
        let record = match WorkerRecord::read(key, value) {
            Ok(record) => record,
            Err(error) => return tracing::warn!("a worker is left out: {error}"),
        };
        match self.entries.get(&record.name) {
            Some(entry) => drop(entry.send_replace(Some(record))),
            None => {
                let (entry, changes) = watch::channel(Some(record.clone()));
                self.entries.insert(record.name.clone(), entry);
                let probe = Probe {
                    etcd: self.etcd.clone(),
                    follower: self.follower.clone(),
                    events: self.events.clone(),
                    entry: changes,
                };
                self.probes.spawn(probe.run(record));
            }
        }
    }

    /// An entry is gone.
    fn unregistered(&mut self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            entry.send_replace(None);
        }
    }
}

/// Tells when a worker joins and leaves.
struct Probe {
    etcd: Etcd,
    follower: Option<Follower>,
    events: mpsc::UnboundedSender<MemberEvent>,
    entry: watch::Receiver<Option<WorkerRecord>>,
}

impl Probe {
    /// Asks the worker of a record, and of every one that takes its place, until nobody wants to know.
    async fn run(mut self, mut record: WorkerRecord) {
        let name = record.name.clone();
        let mut member = self.member(&record);
        let mut joined: Option<(String, String)> = None;
        let mut misses = 0;
        let mut away = String::new();
        loop {
            let now = self.entry.borrow_and_update().clone();
            let registered = now.is_some();
            if let Some(now) = now {
                if now.address != record.address {
                    member = self.member(&now);
                }
                record = now;
            }
            let why = match self.answers(&member, &record).await {
                Ok(member) => {
                    misses = 0;
                    let process = (record.boot_id.clone(), record.address.clone());
                    if joined.as_ref() != Some(&process) {
                        if joined.replace(process).is_some() {
                            self.tell(MemberEvent::Left(name.clone()));
                        }
                        self.tell(MemberEvent::Joined(member));
                        away.clear();
                    }
                    String::new()
                }
                Err(why) => {
                    misses += 1;
                    // Both say that it is gone, or it has been silent for long enough.
                    if (!registered || misses >= MISSES) && joined.take().is_some() {
                        self.tell(MemberEvent::Left(name.clone()));
                    }
                    why
                }
            };
            let is_known = registered || joined.is_some();
            let why = if is_known { why } else { String::new() };
            if why != away {
                if !why.is_empty() {
                    tracing::warn!(worker = name, "left out of plans: {why}");
                }
                self.tell(MemberEvent::Away(name.clone(), why.clone()));
                away = why;
            }
            let changed = match is_known {
                true => tokio::time::timeout(PROBE_EVERY, self.entry.changed()).await.unwrap_or(Ok(())),
                false => self.entry.changed().await,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// The member, if it answers and is the one that wrote the record; why not.
    async fn answers(
        &self,
        member: &Result<Member, String>,
        record: &WorkerRecord,
    ) -> Result<Member, String> {
        let member = member.clone()?;
        let described = ask(&member, self.follower.as_ref().and_then(Follower::claim)).await?;
        if described.boot_id != record.boot_id {
            return Err("another worker answers at its address".into());
        }
        if let (Some(follower), Some(lead)) = (&self.follower, &described.lead) {
            follower.heard(lead);
        }
        speaks(&described)?;
        Ok(member)
    }

    fn tell(&self, event: MemberEvent) {
        // A receiver that is gone ends this.
        let _ = self.events.send(event);
    }

    /// A worker at the address of a record.
    fn member(&self, record: &WorkerRecord) -> Result<Member, String> {
        let (worker, host) = self.etcd.worker(&record.address)?;
        let rank = usize::try_from(record.rank).unwrap_or(usize::MAX);
        Ok(Member { name: record.name.clone(), worker: Arc::new(worker), rank, host })
    }
}
