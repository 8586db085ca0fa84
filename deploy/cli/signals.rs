//! Ending in good order.

use std::{future::Future, time::Duration};

use anyhow::bail;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// SIGTERM and SIGINT, none of which is lost from the beginning of this on.
pub struct Signals(Option<[Signal; 2]>);

impl Signals {
    /// From now on they do not end the process by themselves.
    pub fn new() -> Self {
        let both = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        // Without handlers the default action ends the process.
        let [Ok(term), Ok(int)] = both else { return Signals(None) };
        Signals(Some([term, int]))
    }

    /// Resolves at the next one.
    pub async fn next(&mut self) {
        let Some([term, int]) = &mut self.0 else { return std::future::pending().await };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    }
}

/// Waits for a server that was told to stop: for `grace` seconds, or until it is told again. Says what it waits for,
/// which `left` names, and whether that is lost.
///
/// # Errors
/// If the server fails, or something is left when it is told again.
pub async fn finish(
    running: impl Future<Output = anyhow::Result<()>>,
    signals: &mut Signals,
    grace: u64,
    left: impl Fn() -> Option<String>,
) -> anyhow::Result<()> {
    if let Some(left) = left() {
        tracing::warn!("waiting for {left} to end, {grace} s at most; a second signal ends at once");
    }
    tokio::select! {
        ended = running => ended,
        () = signals.next() => match left() {
            // Connections alone are left, on which nobody waits for an answer.
            None => Ok(()),
            Some(left) => bail!("ended at once, as asked, before {left} did"),
        },
        () = tokio::time::sleep(Duration::from_secs(grace)) => {
            if let Some(left) = left() {
                tracing::warn!("the {grace} s of --grace are over; ended before {left} did");
            }
            Ok(())
        }
    }
}

/// Resolves when `stop` turns true.
pub async fn stopping(mut stop: watch::Receiver<bool>) {
    // A sender that is gone means stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
}
