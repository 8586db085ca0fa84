//! The cluster's secret, from a file or from the environment: never from the command line, which every user of a machine
//! sees.

use std::{fs::File, io::Read, net::IpAddr};

use anyhow::Context;
use strata_proto::Secret;

use crate::{
    args::SecretArgs,
    report::{self, misused},
};

/// The secret itself, where no file is to hold it.
const VARIABLE: &str = "STRATA_SECRET";
/// Most bytes that are read of a file: more than a secret has.
const MAX_FILE: u64 = 64 << 10;

/// The secret that was given, if one was.
///
/// # Errors
/// If it cannot be read, is none, or was given twice.
pub fn read(args: &SecretArgs) -> anyhow::Result<Option<Secret>> {
    let variable = std::env::var(VARIABLE).ok().filter(|value| !value.is_empty());
    let (text, from) = match (&args.secret_file, variable) {
        (Some(_), Some(_)) => return Err(misused(format!("give --secret-file or {VARIABLE}, not both"))),
        (None, None) => return Ok(None),
        (None, Some(text)) => (text, VARIABLE.to_owned()),
        (Some(path), None) => {
            let from = format!("--secret-file {}", path.display());
            let mut text = String::new();
            let file = File::open(path).with_context(|| from.clone())?;
            file.take(MAX_FILE).read_to_string(&mut text).with_context(|| from.clone())?;
            (text, from)
        }
    };
    Secret::new(&text).map(Some).map_err(|why| misused(format!("{from}: {why}")))
}

/// Says what a worker without a secret is open to.
pub fn warn_of_none(secret: Option<&Secret>, listens: IpAddr) {
    if secret.is_none() && !listens.is_loopback() {
        report::warn(
            "no --secret-file is given: whoever reaches this worker's port can load models here and end what it computes",
        );
    }
}
