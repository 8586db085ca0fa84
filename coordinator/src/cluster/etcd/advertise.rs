//! The address by which a worker is reached, where nobody said which.

use std::net::{IpAddr, SocketAddr};

use super::{config::Etcd, error::EtcdError};

/// The address that a worker which listens at `listen` tells coordinators: that one, or, if it listens on every address of
/// its machine, the one by which this machine reaches etcd.
///
/// # Errors
/// If there is no way to any of etcd's endpoints.
pub async fn advertised(etcd: &Etcd, listen: SocketAddr) -> Result<SocketAddr, EtcdError> {
    if !listen.ip().is_unspecified() {
        return Ok(listen);
    }
    let mut tried = Vec::new();
    for url in &etcd.endpoints {
        let (_, address) = url.split_once("://").unwrap_or_default();
        match route(address).await {
            Ok(from) => return Ok(SocketAddr::new(from, listen.port())),
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    let tried = tried.join(", ");
    Err(EtcdError::Config(format!(
        "no way to etcd ({tried}); give --advertise, the address that coordinators reach"
    )))
}

/// The address of this machine that packets to `address` come from. None is sent.
async fn route(address: &str) -> std::io::Result<IpAddr> {
    let mut last = std::io::Error::other("it has no address");
    for to in tokio::net::lookup_host(address).await? {
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => ([0; 4], 0).into(),
            SocketAddr::V6(_) => ([0u16; 8], 0).into(),
        };
        let socket = tokio::net::UdpSocket::bind(any).await?;
        match socket.connect(to).await {
            Ok(()) => return Ok(socket.local_addr()?.ip()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::etcd::TlsFiles;

    #[tokio::test]
    async fn a_worker_that_listens_everywhere_is_where_etcd_is_reached_from() {
        let etcd = Etcd::new(&["127.0.0.1:1".to_owned()], "default", None, TlsFiles::default()).unwrap();
        let of = async |listen: &str| advertised(&etcd, listen.parse().unwrap()).await.unwrap().to_string();
        assert_eq!(of("0.0.0.0:7801").await, "127.0.0.1:7801");
        assert_eq!(of("10.1.2.3:7801").await, "10.1.2.3:7801");
    }
}
