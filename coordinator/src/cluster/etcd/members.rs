//! Workers that have registered, as members: who is there is what etcd says, or what answers.

use std::{collections::HashMap, sync::Arc, time::Duration};

use etcd_client::{Client, EventType, GetOptions};
use strata_proto::{PROTOCOL, v1};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    config::Etcd,
    connection::{Retry, call, connect},
    error::EtcdError,
    record::WorkerRecord,
    watch::Watcher,
};
use crate::cluster::{
    membership::{Member, MemberEvent},
    remote::RemoteWorker,
};

/// How often a worker is asked whether it is there.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Unanswered probes in a row after which a worker counts as gone that etcd still lists.
const MISSES: u32 = 3;

/// The registered workers of a cluster, until the receiver is dropped.
///
/// A worker joins when it has registered and answers. It leaves when it does not answer: at once if its entry is gone, too.
/// So an entry that is gone while its worker computes changes nothing, and while etcd is away, the members are those that
/// were known and answer.
pub fn members(etcd: &Etcd) -> mpsc::UnboundedReceiver<MemberEvent> {
    let (events, receiver) = mpsc::unbounded_channel();
    let mut known = Known { events, entries: HashMap::new(), probes: JoinSet::new() };
    let etcd = etcd.clone();
    tokio::spawn(async move {
        let gone = known.events.clone();
        tokio::select! {
            () = known.follow(&etcd) => {}
            () = gone.closed() => {}
        }
    });
    receiver
}

/// Every worker that was registered since this coordinator began, each with a probe of its own.
struct Known {
    events: mpsc::UnboundedSender<MemberEvent>,
    /// What etcd says of each; `None` once the entry is gone.
    entries: HashMap<String, watch::Sender<Option<WorkerRecord>>>,
    /// Ended with this.
    probes: JoinSet<()>,
}

impl Known {
    /// Reads and watches, and does so again after whatever ended that.
    async fn follow(&mut self, etcd: &Etcd) {
        let mut retry = Retry::default();
        loop {
            let Err(error) = self.session(etcd, &mut retry).await;
            retry.failed("workers that register are not seen; those that are known stay", &error).await;
        }
    }

    /// Takes note of what changes for as long as a connection lasts.
    async fn session(
        &mut self,
        etcd: &Etcd,
        retry: &mut Retry,
    ) -> Result<std::convert::Infallible, EtcdError> {
        let mut client = connect(etcd).await?;
        let prefix = etcd.key("workers/");
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
                self.probes.spawn(probe(record, changes, self.events.clone()));
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
async fn probe(
    mut record: WorkerRecord,
    mut entry: watch::Receiver<Option<WorkerRecord>>,
    events: mpsc::UnboundedSender<MemberEvent>,
) {
    let name = record.name.clone();
    let left = || drop(events.send(MemberEvent::Left(name.clone())));
    let mut member = member(&record);
    let mut joined: Option<(String, String)> = None;
    let mut misses = 0;
    let mut said = String::new();
    loop {
        let now = entry.borrow_and_update().clone();
        let registered = now.is_some();
        if let Some(now) = now {
            if now.address != record.address {
                member = self::member(&now);
            }
            record = now;
        }
        let why = match described(&member, &record).await {
            Ok(member) => {
                misses = 0;
                let process = (record.boot_id.clone(), record.address.clone());
                if joined.as_ref() != Some(&process) {
                    if joined.replace(process).is_some() {
                        left();
                    }
                    drop(events.send(MemberEvent::Joined(member)));
                }
                String::new()
            }
            Err(why) => {
                misses += 1;
                // Both say that it is gone, or it has been silent for long enough.
                if (!registered || misses >= MISSES) && joined.take().is_some() {
                    left();
                }
                why
            }
        };
        if registered && why != said {
            tracing::debug!(worker = name, "probe: {why}");
            said = why;
        }
        let changed = match registered || joined.is_some() {
            true => tokio::time::timeout(PROBE_EVERY, entry.changed()).await.unwrap_or(Ok(())),
            false => entry.changed().await,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// A worker at the address of a record.
fn member(record: &WorkerRecord) -> Result<Member, String> {
    let (worker, _, host) = RemoteWorker::lazy(&record.address)?;
    let rank = usize::try_from(record.rank).unwrap_or(usize::MAX);
    Ok(Member { name: record.name.clone(), worker: Arc::new(worker), rank, host })
}

/// The member, if it answers and is the one that wrote the record.
async fn described(member: &Result<Member, String>, record: &WorkerRecord) -> Result<Member, String> {
    let member = member.clone()?;
    let answer =
        tokio::time::timeout(PROBE_TIMEOUT, member.worker.describe(v1::DescribeRequest::default())).await;
    let described = answer
        .map_err(|_| format!("it has not answered for {PROBE_TIMEOUT:?}"))?
        .map_err(|status| format!("it does not answer: {}", status.message()))?;
    if !(described.protocol_min..=described.protocol_max).contains(&PROTOCOL) {
        return Err(format!(
            "it speaks protocol {}..={}, this coordinator {PROTOCOL}: upgrade one of them",
            described.protocol_min, described.protocol_max
        ));
    }
    match described.boot_id == record.boot_id {
        true => Ok(member),
        false => Err("another worker answers at its address".into()),
    }
}
