//! Ending in good order.

use std::{future::Future, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Resolves at the first SIGTERM or SIGINT.
pub async fn terminated() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the default action ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Runs a server that is given a future to stop at; after that it has `grace` to finish.
pub async fn until_terminated<F>(serve: impl FnOnce(watch::Receiver<bool>) -> F, grace: Duration) -> F::Output
where
    F: Future<Output = anyhow::Result<()>>,
{
    let (stop, stopped) = watch::channel(false);
    let running = serve(stopped);
    tokio::pin!(running);
    tokio::select! {
        ended = &mut running => return ended,
        () = terminated() => {}
    }
    tracing::info!(?grace, "asked to stop; finishing what is in progress");
    stop.send_replace(true);
    match tokio::time::timeout(grace, running).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::warn!("answers were still in progress when the grace period ended");
            Ok(())
        }
    }
}

/// Resolves when `stop` turns true.
pub async fn stopping(mut stop: watch::Receiver<bool>) {
    // A sender that is gone means stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
}
