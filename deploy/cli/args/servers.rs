//! Flags of the servers, and of what is shown or checked before serving.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use strata_coordinator::{ClientLimits, config};
use strata_proto::DEFAULT_PORT;
use strata_worker::device::DeviceSpec;

use super::{ComputeArgs, DeploymentArgs, EtcdArgs, HereArgs, ImaginedDevices, KernelCacheArgs, SpillArgs};

/// Where clients are answered.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Clients")]
pub struct ListenArgs {
    /// Name by which clients ask for the model; more of them, repeated or separated by commas, are aliases [default:
    /// the directory's]
    #[arg(long, env = "STRATA_NAME", value_delimiter = ',', value_parser = parse_name)]
    pub name: Vec<String>,
    /// Address to answer clients on
    #[arg(long, env = "STRATA_HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to answer clients on; 0 picks a free one
    #[arg(long, env = "STRATA_PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,
    /// HOST:PORT where operators are answered by HTTP (/metrics, /livez, /readyz, /startupz, /version, /status, /plan); port 0
    /// picks a free one, `off` answers nobody [default: 127.0.0.1:7718, if it is free]
    #[arg(long, env = "STRATA_ADMIN", value_name = "HOST:PORT", value_parser = parse_admin)]
    pub admin: Option<AdminAddress>,
    /// Seconds that answers in progress may take to finish after SIGTERM
    #[arg(long, env = "STRATA_GRACE", default_value_t = 30)]
    pub grace: u64,
    /// Most connections of clients at a time; more are closed at once
    #[arg(long, env = "STRATA_MAX_CONNECTIONS", default_value_t = config::MAX_CONNECTIONS, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_connections: u32,
    /// Seconds that an answer waits for a client that does not read on
    #[arg(long, env = "STRATA_SLOW_READER_S", default_value_t = config::SLOW_READER.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub slow_reader_s: u64,
}

impl ListenArgs {
    /// What clients may hold.
    pub fn limits(&self) -> ClientLimits {
        ClientLimits {
            connections: self.max_connections as usize,
            slow_reader: Duration::from_secs(self.slow_reader_s),
            ..ClientLimits::default()
        }
    }
}

/// Longest name of a model, in characters.
const MAX_NAME: usize = 200;

fn parse_name(s: &str) -> Result<String, String> {
    match s.chars().count() {
        _ if s.trim() != s || s.is_empty() => Err("expected a name without blanks around it".into()),
        length if length > MAX_NAME => Err(format!("{length} characters are too many: at most {MAX_NAME}")),
        _ => Ok(s.to_owned()),
    }
}

/// A plan in the place of a server.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Dry run")]
pub struct DryRunArgs {
    /// Print the plan and stop: nothing is loaded
    #[arg(long, env = "STRATA_DRY_RUN")]
    pub dry_run: bool,
    /// With --dry-run: print the plan as JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    #[command(flatten)]
    pub listen: ListenArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Plan over GPUs this machine need not have: 2x80GiB@3.3TB/s@900TFLOP/s, where count, bandwidth and rate may be
    /// left out; may be repeated
    #[arg(long = "device", env = "STRATA_DEVICE", conflicts_with_all = ["workers", "devices", "max_memory"])]
    pub imagined: Vec<ImaginedDevices>,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
}

/// What coordinators and workers of a cluster have in common.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cluster")]
pub struct SecretArgs {
    /// File with the cluster's secret, at least 16 bytes of text that nobody guesses: workers refuse calls without it
    #[arg(long, env = "STRATA_SECRET_FILE", value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// URL of a worker; repeat, or separate by commas. Or give --etcd
    #[arg(long = "worker", env = "STRATA_WORKER_URLS", value_delimiter = ',', conflicts_with = "etcd")]
    pub workers: Vec<String>,
    /// Name of the model: a directory under each worker's --models, or OWNER/NAME (OWNER/NAME@REVISION) in the hub's cache
    #[arg(long, env = "STRATA_MODEL", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub model: String,
    /// Seconds to wait for the workers; with --etcd it is waited for as long as it takes
    #[arg(long, env = "STRATA_JOIN_TIMEOUT", default_value_t = config::JOIN_TIMEOUT.as_secs(), conflicts_with = "etcd")]
    pub join_timeout: u64,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Seconds after which another coordinator takes over from one that is silent
    #[arg(long, env = "STRATA_LEADER_TTL", default_value_t = 5, requires = "etcd", value_parser = clap::value_parser!(u64).range(2..=3600), help_heading = "Cluster by etcd")]
    pub leader_ttl: u64,
    #[command(flatten)]
    pub secret: SecretArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    #[command(flatten)]
    pub listen: ListenArgs,
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

#[derive(Debug, Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    pub secret: SecretArgs,
    /// Address for the coordinator's calls; port 0 picks a free one
    #[arg(long, env = "STRATA_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Address for activations of other workers; port 0 picks a free one [default: the host of --listen, port 0]
    #[arg(long, env = "STRATA_LINK_LISTEN")]
    pub link_listen: Option<SocketAddr>,
    /// HOST:PORT where other workers reach --link-listen, if it is another address for them, as behind NAT [default: the
    /// address itself]
    #[arg(long, env = "STRATA_LINK_ADVERTISE", requires = "link_listen", value_parser = parse_host_port)]
    pub link_advertise: Option<String>,
    /// Directory whose subdirectories are models, or the hub's cache
    #[arg(long, env = "STRATA_MODELS")]
    pub models: PathBuf,
    /// Devices, with optional byte caps: cuda:0,cpu=64GiB [default: all GPUs, then the CPU]
    #[arg(long, env = "STRATA_DEVICES", value_delimiter = ',')]
    pub devices: Vec<DeviceSpec>,
    /// Byte caps by device: cpu=64GiB
    #[arg(long, env = "STRATA_MAX_MEMORY", value_delimiter = ',')]
    pub max_memory: Vec<DeviceSpec>,
    /// Seconds in which all weights of a running stage are compared once with what was loaded, again and again: memory
    /// may fail [default: never]
    #[arg(long, env = "STRATA_VERIFY_EVERY", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub verify_every: Option<u64>,
    /// HOST:PORT where operators are answered by HTTP (/metrics, /livez, /readyz, /startupz, /version, /status); port 0 picks a
    /// free one [default: off]
    #[arg(long, env = "STRATA_ADMIN", value_name = "HOST:PORT", value_parser = parse_admin)]
    pub admin: Option<AdminAddress>,
    /// Seconds that its coordinator may take to plan without this worker, after SIGTERM
    #[arg(long, env = "STRATA_GRACE", default_value_t = 30)]
    pub grace: u64,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub spill: SpillArgs,
    #[command(flatten)]
    pub kernel_cache: KernelCacheArgs,
    #[command(flatten)]
    pub etcd: EtcdArgs,
    #[command(flatten)]
    pub member: MemberArgs,
}

/// What a worker says of itself in etcd.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cluster by etcd")]
pub struct MemberArgs {
    /// Where coordinators and other workers reach this one: HOST:PORT [default: --listen, or, if that is every address,
    /// the one by which this machine reaches etcd]
    #[arg(long, env = "STRATA_ADVERTISE", value_name = "HOST:PORT", requires = "etcd")]
    pub advertise: Option<String>,
    /// This worker's name in plans, the same after a restart [default: where it is reached]
    #[arg(long, env = "STRATA_WORKER_NAME", requires = "etcd")]
    pub name: Option<String>,
    /// Seconds after which etcd forgets a worker that is silent
    #[arg(long, env = "STRATA_LEASE_TTL", default_value_t = 5, requires = "etcd", value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub lease_ttl: u64,
}

/// Where operators are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminAddress {
    /// Nowhere.
    Off,
    /// `HOST:PORT`.
    At(String),
}

fn parse_admin(s: &str) -> Result<AdminAddress, String> {
    let port = s.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match (s, port) {
        ("off", _) => Ok(AdminAddress::Off),
        (_, Some(Ok(_))) => Ok(AdminAddress::At(s.to_owned())),
        _ => Err("expected HOST:PORT, as in 0.0.0.0:7718, or off".into()),
    }
}

fn parse_host_port(s: &str) -> Result<String, String> {
    let parts = s.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    match parts.and_then(|(_, port)| port.parse::<u16>().ok()) {
        None | Some(0) => Err("expected HOST:PORT, as in 203.0.113.7:7802".into()),
        Some(_) => Ok(s.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_are_answered_on_a_port_or_not_at_all() {
        assert_eq!(parse_admin("off"), Ok(AdminAddress::Off));
        for good in ["127.0.0.1:0", "[::]:7718", "localhost:7718"] {
            assert_eq!(parse_admin(good), Ok(AdminAddress::At(good.into())));
        }
        for bad in ["", "7718", ":7718", "host:", "host:65536", "on"] {
            assert!(parse_admin(bad).unwrap_err().contains("HOST:PORT"), "{bad:?}");
        }
    }

    #[test]
    fn an_advertised_address_has_a_host_and_a_port() {
        for good in ["203.0.113.7:7802", "node-3:1", "[2001:db8::1]:65535"] {
            assert_eq!(parse_host_port(good).as_deref(), Ok(good));
        }
        for bad in ["", ":7802", "node-3", "node-3:", "node-3:0", "node-3:65536", "http://node-3:x"] {
            assert!(parse_host_port(bad).unwrap_err().contains("HOST:PORT"), "{bad:?}");
        }
    }

    #[test]
    fn a_name_is_short_and_not_blank() {
        assert_eq!(parse_name("llama 8b").as_deref(), Ok("llama 8b"));
        assert!(parse_name(&"ä".repeat(MAX_NAME)).is_ok());
        assert!(parse_name(&"a".repeat(MAX_NAME + 1)).unwrap_err().contains("at most 200"));
        for blank in ["", " ", "\t", " llama"] {
            assert!(parse_name(blank).is_err(), "{blank:?} was taken");
        }
    }
}
