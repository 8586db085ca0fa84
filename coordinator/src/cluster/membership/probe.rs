//! Asking a worker whether it is there.

use std::time::Duration;

use strata_proto::{PROTOCOL, error::words, v1};
use tonic::Code;

use super::Member;

/// How often a worker is asked.
pub(crate) const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How long it may take to answer, before nothing is planned over it.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Unanswered probes in a row after which a worker counts as gone.
pub(crate) const MISSES: u32 = 3;

/// What a worker says of itself, when it is told who claims it; or why it cannot be planned over.
pub(crate) async fn ask(member: &Member, claim: Option<v1::Claim>) -> Result<v1::Described, String> {
    let request = v1::DescribeRequest { claim, ..v1::DescribeRequest::default() };
    match tokio::time::timeout(PROBE_TIMEOUT, member.worker.describe(request)).await {
        Ok(Ok(described)) => Ok(described),
        Ok(Err(status)) if status.code() == Code::Unauthenticated => Err(status.message().to_owned()),
        Ok(Err(status)) if status.code() == Code::Unimplemented => {
            Err("no worker of Strata listens there".to_owned())
        }
        Ok(Err(status)) => Err(format!("it does not answer: {}", words(&status))),
        Err(_) => Err(format!("it has not answered for {PROBE_TIMEOUT:?}")),
    }
}

/// Whether a worker speaks what this coordinator does; why not.
pub(crate) fn speaks(described: &v1::Described) -> Result<(), String> {
    let (least, most) = (described.protocol_min, described.protocol_max);
    match (least..=most).contains(&PROTOCOL) {
        true => Ok(()),
        false => Err(format!(
            "it speaks protocol {least}..={most}, this coordinator {PROTOCOL}: upgrade one of them"
        )),
    }
}
