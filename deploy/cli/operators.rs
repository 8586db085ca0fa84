//! The port on which operators are answered.

use std::{io::ErrorKind, sync::Arc};

use anyhow::Context;
use strata_coordinator::Coordinator;
use strata_proto::port::admin::{self, DEFAULT_ADMIN_PORT};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{args::AdminAddress, report};

/// Opens it, if it is wanted: where it was asked for, or else where it is looked for, unless something is there already.
///
/// # Errors
/// If it cannot be opened where it was asked for.
pub async fn listen(asked: Option<&AdminAddress>) -> anyhow::Result<Option<TcpListener>> {
    match asked {
        Some(AdminAddress::Off) => Ok(None),
        Some(AdminAddress::At(address)) => {
            let listener = TcpListener::bind(address).await;
            Ok(Some(listener.with_context(|| format!("--admin {address}"))?))
        }
        None => match TcpListener::bind(("127.0.0.1", DEFAULT_ADMIN_PORT)).await {
            Ok(listener) => Ok(Some(listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                report::warn(&format!(
                    "--admin: 127.0.0.1:{DEFAULT_ADMIN_PORT} is taken, so operators are not answered: give another HOST:PORT, or off"
                ));
                Ok(None)
            }
            Err(error) => Err(error).context(format!("--admin 127.0.0.1:{DEFAULT_ADMIN_PORT}")),
        },
    }
}

/// Answers operators until it is aborted.
pub fn serve(listener: TcpListener, coordinator: &Coordinator) -> anyhow::Result<JoinHandle<()>> {
    let address = listener.local_addr()?;
    tracing::info!("operators are answered on http://{address}");
    let admin = Arc::new(coordinator.clone());
    Ok(tokio::spawn(async move {
        if let Err(error) = admin::serve(listener, admin).await {
            tracing::error!(%error, "operators are not answered any more");
        }
    }))
}
