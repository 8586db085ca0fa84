//! Ending in good order.

use std::{future::Future, time::Duration};

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

/// Runs a server that is given a future to stop at; after that it has `grace` to finish, or until it is asked again.
pub async fn until_terminated<F>(
    serve: impl FnOnce(watch::Receiver<bool>) -> F,
    grace: Duration,
    mut signals: Signals,
) -> F::Output
where
    F: Future<Output = anyhow::Result<()>>,
{
    let (stop, stopped) = watch::channel(false);
    let running = serve(stopped);
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => return ended,
        () = signals.next() => {}
    }
    tracing::info!(?grace, "asked to stop; finishing what is in progress");
    stop.send_replace(true);
    tokio::select! {
        ended = running => ended,
        () = signals.next() => anyhow::bail!("asked again to stop: what was in progress is lost"),
        () = tokio::time::sleep(grace) => {
            tracing::warn!(?grace, "not all was finished within the grace period");
            Ok(())
        }
    }
}

/// Resolves when `stop` turns true.
pub async fn stopping(mut stop: watch::Receiver<bool>) {
    // A sender that is gone means stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
}
