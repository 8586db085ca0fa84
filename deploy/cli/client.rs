//! Reaching a server.

use std::time::Duration;

use anyhow::{Context, bail};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// Connects to a server's URL.
pub async fn connect(address: &str) -> anyhow::Result<Channel> {
    if address.starts_with("https://") {
        bail!(
            "--address {address}: Strata has no TLS yet: reach the server by http://, over a network that nobody else reads"
        );
    }
    let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(url).with_context(|| format!("--address {address:?}"))?;
    let connected = endpoint.connect_timeout(Duration::from_secs(5)).tcp_nodelay(true).connect().await;
    connected.with_context(|| format!("no server answers at {address}; is `strata serve` running?"))
}

/// A server's refusal as a person reads it.
pub fn refusal(status: &Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}
