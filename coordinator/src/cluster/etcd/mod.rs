//! A cluster by etcd: which workers there are, and which coordinator leads them.
//!
//! Keys, all under `/strata/CLUSTER/`:
//!
//! | key | value | lives |
//! |---|---|---|
//! | `workers/NAME` | a [`WorkerRecord`] | as long as the worker's lease |
//! | `ranks/NAME` | nothing; the revision of its creation is the worker's rank | for ever |
//! | `leader/ID` | the name of a coordinator that leads or waits | as long as the coordinator's lease |
//! | `led` | the last leader and its term | for ever |
//! | `drained/NAME` | why the worker is drained | until it is taken back |
//! | `deployment` | a [`DeploymentRecord`](crate::cluster::records::DeploymentRecord); its version is the revision of its change | for ever |
//!
//! Each part (a registration, the members, an election) has a connection and a task of its own, which begins anew when
//! anything on the connection fails: it connects, gets a lease, reads what is there, and watches from that revision on. So
//! there is one way back from every fault. What etcd forgets, or cannot say, ends nothing by itself: whoever is known
//! stays known until it does not answer either.

mod advertise;
mod config;
mod connection;
mod election;
mod error;
mod keeper;
mod lease;
mod members;
mod record;
mod registry;
mod watch;

use crate::cluster::{leadership::Followed, membership::Source};

pub use advertise::advertised;
pub use config::{Credentials, Etcd, TlsFiles, check_name};
pub use election::{Candidate, Election, election};
pub use error::EtcdError;
pub use keeper::InEtcd;
pub use members::members;
pub use record::{DeviceRecord, Resident, WorkerRecord};
pub use registry::{Registrant, Registration, register};

/// The workers of a cluster for a coordinator that leads them when it is its turn.
pub fn source(etcd: &Etcd, candidate: Candidate) -> (Source, Election) {
    let (followed, follows) = tokio::sync::watch::channel(Followed::default());
    let coordinator = candidate.name.clone();
    let election = election::election_over(etcd, candidate, follows);
    let leadership = election.leadership();
    let follower = members::Follower { coordinator, leadership: leadership.clone(), followed };
    let events = members::follow(etcd, Some(follower));
    (Source { events, leadership, keeper: std::sync::Arc::new(InEtcd::new(etcd)) }, election)
}
