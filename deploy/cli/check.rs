//! `strata check`: whether a model and its tokenizer belong together, as serving would find out.

use std::{
    io::Write,
    sync::{Arc, Mutex, PoisonError},
};

use strata_coordinator::{
    Coordinator, StartError,
    engine::{Notice, Observer},
    preflight::Finding,
};

use crate::{args::CheckArgs, loading::Loading, local};

/// `strata check`
pub async fn check(args: CheckArgs) -> anyhow::Result<()> {
    let (config, members) = local::here(&args.here, &args.deployment)?;
    let findings = Arc::<Mutex<Vec<Finding>>>::default();
    let loading = Arc::new(Loading::default());
    let observer: Observer = {
        let (findings, loading) = (findings.clone(), loading.clone());
        Arc::new(move |notice| match notice {
            Notice::Checked(found) => *findings.lock().unwrap_or_else(PoisonError::into_inner) = found,
            notice => loading.show(notice),
        })
    };
    let started = Coordinator::new(config).start(members, observer).await;
    loading.finish();
    let findings = findings.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut out = std::io::stdout().lock();
    if args.json {
        let ok = started.is_ok();
        writeln!(out, "{}", serde_json::json!({"ok": ok, "checks": findings}))?;
    } else {
        for finding in &findings {
            writeln!(out, "{finding}")?;
        }
    }
    match started {
        Ok(_) => Ok(()),
        // The report above has the details.
        Err(StartError::Preflight(_)) => Err(anyhow::anyhow!("the model must not be served as it is")),
        Err(error) => Err(error.into()),
    }
}
