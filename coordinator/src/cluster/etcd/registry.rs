//! A worker's entry in the cluster: made, kept, and taken out again.

use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, EventType, PutOptions, Txn, TxnOp, TxnOpResponse};
use strata_proto::{Worker, v1};
use tokio::{sync::watch, task::JoinHandle};

use super::{
    config::{Etcd, check_name},
    connection::{CALL_TIMEOUT, Retry, call, connect, stopped},
    error::EtcdError,
    lease::Lease,
    record::{DeviceRecord, Resident, WorkerRecord},
    watch::Watcher,
};

/// A worker that wants to be found.
#[derive(Debug)]
pub struct Registrant {
    /// Its name, the same after a restart; no other worker's.
    pub name: String,
    /// Where coordinators reach it: `HOST:PORT`.
    pub address: String,
    /// Of its process, as it answers Describe.
    pub boot_id: String,
    /// Its devices.
    pub devices: Vec<v1::Device>,
    /// What its devices hold, now and whenever that changes.
    pub resident: watch::Receiver<Vec<v1::StageSpec>>,
    /// How long its entry outlives a worker that dies.
    pub ttl: Duration,
}

/// An entry that is kept, whatever etcd does meanwhile, until it is ended.
#[derive(Debug)]
pub struct Registration {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), EtcdError>>,
}

/// Registers a worker that answers calls already, and keeps it registered.
///
/// # Errors
/// If name or address cannot be used. All else is told by [`Registration::refused`].
pub fn register(etcd: &Etcd, worker: Registrant) -> Result<Registration, EtcdError> {
    check_name(&worker.name).map_err(|why| EtcdError::Config(format!("--name {:?}: {why}", worker.name)))?;
    etcd.worker(&worker.address).map_err(|why| EtcdError::Config(format!("--advertise: {why}")))?;
    let (stop, stopped) = watch::channel(false);
    let entry = Entry {
        key: etcd.key(&format!("workers/{}", worker.name)),
        rank_key: etcd.key(&format!("ranks/{}", worker.name)),
        etcd: etcd.clone(),
        worker,
        was_registered: false,
    };
    Ok(Registration { stop, task: tokio::spawn(entry.keep(stopped)) })
}

impl Registration {
    /// Resolves when the worker may not be a part of this cluster: another one has its name or address, or etcd does not
    /// let it in. It never does once the worker has been registered.
    pub async fn refused(&mut self) -> EtcdError {
        match (&mut self.task).await {
            Ok(Err(error)) => error,
            _ => std::future::pending().await,
        }
    }

    /// Takes the entry out, so that nothing more is planned over this worker. If etcd does not answer, the entry ends with
    /// its lease.
    pub async fn end(self) {
        self.stop.send_replace(true);
        // Two calls at most: nothing is connected to once it is to stop.
        let _ = tokio::time::timeout(2 * CALL_TIMEOUT, self.task).await;
    }
}

/// What a try to have the entry came to.
enum Claim {
    /// It is there; so much was changed in etcd when it was written.
    Made { revision: i64 },
    /// Another process has it.
    Held { record: WorkerRecord, modified: i64 },
}

struct Entry {
    etcd: Etcd,
    worker: Registrant,
    key: String,
    rank_key: String,
    was_registered: bool,
}

impl Entry {
    /// Registers, and does so again after whatever ended that, until told to stop.
    async fn keep(mut self, mut stop: watch::Receiver<bool>) -> Result<(), EtcdError> {
        let mut retry = Retry::default();
        loop {
            let mut lease = None;
            let mut client = None;
            let outcome = tokio::select! {
                outcome = self.session(&mut client, &mut lease, &mut retry) => outcome,
                () = stopped(&mut stop) => {
                    if let (Some(mut client), Some(lease)) = (client, lease) {
                        // It ends by itself otherwise.
                        let _: Result<(), EtcdError> = Lease::revoke(lease, &mut client).await;
                    }
                    return Ok(());
                }
            };
            let Err(error) = outcome;
            if error.is_final() && !self.was_registered {
                return Err(error);
            }
            tokio::select! {
                () = retry.failed("this worker is not registered; trying again", &error) => {}
                () = stopped(&mut stop) => return Ok(()),
            }
        }
    }

    /// Registers, and keeps the entry true, for as long as connection and lease last.
    async fn session(
        &mut self,
        connection: &mut Option<Client>,
        held: &mut Option<Lease>,
        retry: &mut Retry,
    ) -> Result<std::convert::Infallible, EtcdError> {
        self.check_address().await?;
        let client = connection.insert(connect(&self.etcd).await?);
        let rank = self.rank(client).await?;
        let lease = held.insert(Lease::grant(client, self.worker.ttl).await?);
        let mut revision = self.claim(client, rank, lease.id()).await?;
        retry.succeeded();
        if !self.was_registered {
            tracing::info!(name = self.worker.name, address = self.worker.address, rank, "registered");
        }
        self.was_registered = true;
        let mut watcher = Watcher::start(client, self.key.clone(), revision).await?;
        loop {
            tokio::select! {
                error = lease.ended() => return Err(error),
                events = watcher.next() => {
                    let ours = |event: &etcd_client::Event| event.kv().is_some_and(|kv| kv.key() == self.key.as_bytes());
                    let Some(last) = events?.into_iter().rfind(ours) else { continue };
                    let is_ours = last.event_type() == EventType::Put
                        && last.kv().is_some_and(|kv| kv.mod_revision() == revision);
                    if !is_ours {
                        return Err(EtcdError::Gone(self.key.clone()));
                    }
                }
                changed = self.worker.resident.changed() => {
                    if changed.is_err() {
                        // The worker is gone, and this with it in a moment.
                        std::future::pending::<()>().await;
                    }
                    revision = self.write(client, rank, lease.id(), revision).await?;
                }
            }
        }
    }

    /// Whoever answers at the address that is advertised must be this worker.
    async fn check_address(&self) -> Result<(), EtcdError> {
        let Registrant { address, boot_id, .. } = &self.worker;
        match self.boot_at(address).await {
            Some(other) if other != *boot_id => Err(EtcdError::Taken(format!(
                "--advertise {address}: another worker answers there, and not this one; give the address of this one"
            ))),
            Some(_) => Ok(()),
            None => {
                // Not every network lets a machine reach itself by the address that others use.
                tracing::warn!("--advertise {address}: nobody answers there, as seen from this machine");
                Ok(())
            }
        }
    }

    /// This worker's rank: when its name was first seen, by etcd's count. Later ones have higher ranks.
    async fn rank(&self, client: &mut Client) -> Result<u64, EtcdError> {
        let key = self.rank_key.as_str();
        let unless_there = Txn::new()
            .when([Compare::version(key, CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key, "", None)]);
        call("allocating a rank", client.txn(unless_there)).await?;
        let found = call("reading a rank", client.get(key, None)).await?;
        let created = found.kvs().first().map(etcd_client::KeyValue::create_revision);
        created.and_then(|revision| u64::try_from(revision).ok()).ok_or_else(|| EtcdError::Nonsense {
            key: key.to_owned(),
            why: "no rank although it was just written".into(),
        })
    }

    /// Gets the entry, from whoever has it but is there no more; the revision by which it was written.
    async fn claim(&self, client: &mut Client, rank: u64, lease: i64) -> Result<i64, EtcdError> {
        let mut waited = Duration::ZERO;
        loop {
            let (other, modified) = match self.try_claim(client, rank, lease).await? {
                Claim::Made { revision } => return Ok(revision),
                Claim::Held { record, modified } => (record, modified),
            };
            let Registrant { name, boot_id, address, ttl, .. } = &self.worker;
            let taken = |what: &str| {
                let other = &other.address;
                Err(EtcdError::Taken(format!(
                    "worker {name} is registered already, at {other}, {what}: give another --name"
                )))
            };
            match self.boot_at(&other.address).await {
                // Where it was, there is this worker now.
                Some(boot) if boot == *boot_id => return self.write(client, rank, lease, modified).await,
                Some(boot) if boot == other.boot_id => return taken("and answers there"),
                _ if other.address == *address => return self.write(client, rank, lease, modified).await,
                // It may be that it cannot be reached from here. Then it goes on renewing its lease.
                _ if waited >= 2 * *ttl => {
                    return taken("and renews its entry, though it cannot be reached from here");
                }
                _ => {}
            }
            let begun = tokio::time::Instant::now();
            let mut watcher = Watcher::start(client, self.key.clone(), modified).await?;
            // Its deletion is what is waited for; who has the entry then is seen above.
            let _ = tokio::time::timeout(2 * *ttl, watcher.next()).await;
            waited += begun.elapsed();
        }
    }

    /// Writes the entry if nobody else has it.
    async fn try_claim(&self, client: &mut Client, rank: u64, lease: i64) -> Result<Claim, EtcdError> {
        let key = self.key.as_str();
        let put = TxnOp::put(key, self.record(rank).written(), Some(PutOptions::new().with_lease(lease)));
        let unless_there = Txn::new()
            .when([Compare::version(key, CompareOp::Equal, 0)])
            .and_then([put])
            .or_else([TxnOp::get(key, None)]);
        let answer = call("registering", client.txn(unless_there)).await?;
        if answer.succeeded() {
            return Ok(Claim::Made { revision: revision(answer.header()) });
        }
        for response in answer.op_responses() {
            let TxnOpResponse::Get(found) = response else { continue };
            if let Some(kv) = found.kvs().first() {
                let modified = kv.mod_revision();
                let record = WorkerRecord::read(key, kv.value())?;
                // This process wrote it, under a lease before.
                if record.boot_id == self.worker.boot_id {
                    let revision = self.write(client, rank, lease, modified).await?;
                    return Ok(Claim::Made { revision });
                }
                return Ok(Claim::Held { record, modified });
            }
        }
        Err(EtcdError::Nonsense { key: key.to_owned(), why: "nothing although it is there".into() })
    }

    /// Writes the entry over what was last modified at `revision`; the new revision.
    async fn write(
        &self,
        client: &mut Client,
        rank: u64,
        lease: i64,
        modified: i64,
    ) -> Result<i64, EtcdError> {
        let key = self.key.as_str();
        let put = TxnOp::put(key, self.record(rank).written(), Some(PutOptions::new().with_lease(lease)));
        let if_unchanged =
            Txn::new().when([Compare::mod_revision(key, CompareOp::Equal, modified)]).and_then([put]);
        let answer = call("registering", client.txn(if_unchanged)).await?;
        match answer.succeeded() {
            true => Ok(revision(answer.header())),
            // Somebody else wrote it, or it is gone: from the beginning.
            false => Err(EtcdError::Gone(self.key.clone())),
        }
    }

    /// The boot id of the worker that answers at an address, if one does.
    async fn boot_at(&self, address: &str) -> Option<String> {
        let (worker, _) = self.etcd.worker(address).ok()?;
        let described = tokio::time::timeout(CALL_TIMEOUT, worker.describe(v1::DescribeRequest::default()));
        Some(described.await.ok()?.ok()?.boot_id)
    }

    fn record(&self, rank: u64) -> WorkerRecord {
        let Registrant { name, address, boot_id, devices, resident, .. } = &self.worker;
        WorkerRecord {
            name: name.clone(),
            address: address.clone(),
            boot_id: boot_id.clone(),
            rank,
            devices: devices.iter().map(DeviceRecord::from).collect(),
            resident: resident.borrow().iter().map(Resident::from).collect(),
        }
    }
}

fn revision(header: Option<&etcd_client::ResponseHeader>) -> i64 {
    header.map_or(0, etcd_client::ResponseHeader::revision)
}
