//! Flags of a cluster by etcd.

use std::path::PathBuf;

use clap::Args;

/// Where etcd is, and which cluster in it is meant.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cluster by etcd")]
pub struct EtcdArgs {
    /// URLs of etcd's members, any of which will do: workers are found there, and coordinators take turns; the password
    /// of --etcd-user may be in STRATA_ETCD_PASSWORD
    #[arg(long, env = "STRATA_ETCD", value_name = "URL", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// Name of the cluster: its workers and coordinators all give the same
    #[arg(long, env = "STRATA_CLUSTER", default_value = "default", requires = "etcd")]
    pub cluster: String,
    /// User of etcd
    #[arg(long, env = "STRATA_ETCD_USER", requires = "etcd")]
    pub etcd_user: Option<String>,
    /// File whose first line is that user's password
    #[arg(long, env = "STRATA_ETCD_PASSWORD_FILE", value_name = "FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
    /// Certificate (PEM) of who vouches for etcd, with URLs of https://
    #[arg(long, env = "STRATA_ETCD_CA", value_name = "FILE", requires = "etcd")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate (PEM) to show to etcd
    #[arg(long, env = "STRATA_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Key (PEM) of that certificate
    #[arg(long, env = "STRATA_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
}
