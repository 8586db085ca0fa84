//! The port on which operators are answered.

use std::{io::ErrorKind, sync::Arc};

use anyhow::Context;
use strata_proto::port::admin::{self, Admin, DEFAULT_ADMIN_PORT};
use tokio::net::TcpListener;

use crate::{VERSION, args::AdminAddress, report};

/// Opens it where it was asked for; if nobody said where, at its usual place, unless something is there already.
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

/// Answers operators until the process ends.
pub fn serve(listener: TcpListener, admin: Arc<dyn Admin>) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    tracing::info!("operators are answered on http://{address}");
    tokio::spawn(async move {
        if let Err(error) = admin::serve(listener, admin, VERSION).await {
            tracing::error!(%error, "operators are not answered any more");
        }
    });
    Ok(())
}
