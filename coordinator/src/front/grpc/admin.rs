//! Who may change what is served: whoever proves the cluster's secret, or, where there is none, is on this machine.

use strata_proto::{Secret, port::Peer};
use tonic::{Request, Status};

/// The message of an operator's call.
///
/// # Errors
/// UNAUTHENTICATED or PERMISSION_DENIED, with what is missing.
pub(super) fn admit<T: strata_proto::Message>(
    request: Request<T>,
    secret: Option<&Secret>,
    method: &'static str,
) -> Result<T, Status> {
    let is_local = || request.extensions().get::<Peer>().is_some_and(|peer| peer.is_local);
    match secret {
        Some(secret) => secret.check(request.metadata(), method, request.get_ref())?,
        None if is_local() => {}
        None => {
            return Err(Status::permission_denied(format!(
                "{method}: this coordinator has no --secret-file, so it takes this call from its own machine only; call it \
                 there, by 127.0.0.1, or give the coordinator and yourself a secret"
            )));
        }
    }
    Ok(request.into_inner())
}
