//! A lease that a task of its own renews.

use std::time::Duration;

use etcd_client::Client;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    connection::{CALL_TIMEOUT, call, call_within},
    error::EtcdError,
};

/// A lease that is renewed three times within its time to live until this is dropped, or until a renewal fails. Then it may
/// still live for a while; whoever goes on gets another one, and puts what is to stay under that.
pub(super) struct Lease {
    id: i64,
    /// When a renewal that succeeded was last asked for: by this clock, the lease lives that much longer than its time.
    renewed: watch::Receiver<Instant>,
    task: JoinHandle<EtcdError>,
}

impl Lease {
    /// A new lease.
    ///
    /// # Errors
    /// If etcd does not grant it in time.
    pub async fn grant(client: &mut Client, ttl: Duration) -> Result<Self, EtcdError> {
        let asked = Instant::now();
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let id = call("granting a lease", client.lease_grant(seconds, None)).await?.id();
        let (renewals, renewed) = watch::channel(asked);
        let task = tokio::spawn(renew(client.clone(), id, ttl, renewals));
        Ok(Lease { id, renewed, task })
    }

    /// Its id.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// When it was last renewed.
    pub fn renewed(&self) -> Instant {
        *self.renewed.borrow()
    }

    /// Resolves when it can be renewed no more, with why.
    pub async fn ended(&mut self) -> EtcdError {
        // The task ends in no other way: nothing in it panics.
        (&mut self.task).await.unwrap_or(EtcdError::LeaseEnded)
    }

    /// Ends it, and deletes what is under it.
    ///
    /// # Errors
    /// If etcd does not do so in time: then it ends by itself.
    pub async fn revoke(self, client: &mut Client) -> Result<(), EtcdError> {
        self.task.abort();
        call("ending a lease", client.lease_revoke(self.id)).await.map(drop)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Renews a lease until that fails.
async fn renew(client: Client, id: i64, ttl: Duration, renewals: watch::Sender<Instant>) -> EtcdError {
    let mut client = client;
    loop {
        let due = *renewals.borrow() + ttl / 3;
        sleep_until(due).await;
        let asked = Instant::now();
        // Each renewal is a call of its own, the first message of a stream and its answer: the crate checks that one alone
        // for a lease that is gone, and a stream that broke would have to be opened anew anyway.
        let renewal = client.lease_keep_alive(id);
        match call_within(CALL_TIMEOUT.min(ttl / 3), "renewing a lease", renewal).await {
            Ok(_) => drop(renewals.send_replace(asked)),
            Err(error) => return error,
        }
    }
}
