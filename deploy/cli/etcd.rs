//! A cluster by etcd, as its flags say.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::Context;
use strata_coordinator::cluster::{
    etcd::{self, Candidate, Credentials, Election, Etcd, EtcdError, Registrant, Registration, TlsFiles},
    membership::Source,
};
use strata_proto::{Secret, Worker, v1::DescribeRequest};
use strata_worker::LocalWorker;
use uuid::Uuid;

use crate::{
    args::{EtcdArgs, MemberArgs},
    report::misused,
};

/// Where a password is that no file has: not a flag, as whoever lists processes would see it.
const PASSWORD: &str = "STRATA_ETCD_PASSWORD";

/// The etcd that is meant, if one is.
///
/// # Errors
/// If flags do not fit each other, a file cannot be read, or there is no `secret`: whoever registers is called.
pub fn of(args: &EtcdArgs, secret: Option<&Secret>) -> anyhow::Result<Option<Etcd>> {
    if args.etcd.is_empty() {
        return Ok(None);
    }
    if secret.is_none() {
        let why =
            "--etcd: give --secret-file, with a secret that all workers and coordinators of the cluster have";
        return Err(misused(why));
    }
    let read =
        |flag: &str, path: &Path| std::fs::read(path).with_context(|| format!("{flag} {}", path.display()));
    let credentials = match &args.etcd_user {
        Some(user) => Some(Credentials { user: user.clone(), password: password(args)? }),
        None => None,
    };
    let ca = args.etcd_ca.as_deref().map(|path| read("--etcd-ca", path)).transpose()?;
    let identity = match (&args.etcd_cert, &args.etcd_key) {
        (Some(cert), Some(key)) => Some((read("--etcd-cert", cert)?, read("--etcd-key", key)?)),
        (None, None) => None,
        _ => return Err(misused("--etcd-cert, --etcd-key: expected both of them, or neither")),
    };
    let etcd = Etcd::new(&args.etcd, &args.cluster, credentials, TlsFiles { ca, identity });
    Ok(Some(etcd.map_err(|error| misused(error.to_string()))?.with_secret(secret.cloned())))
}

/// The workers of a cluster for a coordinator of this name, and its candidacy for the lead of them.
pub fn stand(etcd: &Etcd, name: String, ttl: u64) -> (Source, Election) {
    let id = Uuid::new_v4().simple().to_string();
    etcd::source(etcd, Candidate { id, name, ttl: Duration::from_secs(ttl) })
}

fn password(args: &EtcdArgs) -> anyhow::Result<String> {
    if let Some(path) = &args.etcd_password_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--etcd-password-file {}", path.display()))?;
        return Ok(text.lines().next().unwrap_or_default().to_owned());
    }
    match std::env::var(PASSWORD) {
        Ok(password) => Ok(password),
        Err(_) => {
            Err(misused(format!("--etcd-user: give its password by --etcd-password-file, or in {PASSWORD}")))
        }
    }
}

/// A worker's entry in etcd, if it has one.
pub struct Entry(Option<Registration>);

impl Entry {
    /// Resolves when the worker may not be a part of the cluster.
    pub async fn refused(&mut self) -> EtcdError {
        match &mut self.0 {
            Some(registration) => registration.refused().await,
            None => std::future::pending().await,
        }
    }

    /// Takes it out.
    pub async fn end(self) {
        if let Some(registration) = self.0 {
            registration.end().await;
        }
    }
}

/// Registers a worker that answers at `listen`, if there is an etcd.
pub async fn register(
    etcd: Option<&Etcd>,
    worker: &LocalWorker,
    listen: SocketAddr,
    args: &MemberArgs,
) -> anyhow::Result<Entry> {
    let Some(etcd) = etcd else { return Ok(Entry(None)) };
    let address = match &args.advertise {
        Some(address) => address.clone(),
        None => {
            let address = etcd::advertised(etcd, listen).await?;
            if address.ip().is_loopback() && !listen.ip().is_loopback() {
                tracing::warn!(
                    "other machines do not reach {address}: give --advertise HOST:PORT, unless there are none"
                );
            }
            address.to_string()
        }
    };
    let described = worker.describe(DescribeRequest::default()).await?;
    let registrant = Registrant {
        name: args.name.clone().unwrap_or_else(|| address.clone()),
        address,
        boot_id: described.boot_id,
        devices: described.devices,
        resident: worker.resident(),
        ttl: Duration::from_secs(args.lease_ttl),
    };
    let registration = etcd::register(etcd, registrant).map_err(|error| misused(error.to_string()))?;
    Ok(Entry(Some(registration)))
}
