//! A gRPC port, a coordinator's or a worker's: who comes to the wrong one, or speaks another protocol, is told. Beside it, a
//! port for [operators](admin).

pub mod admin;
mod bodies;
mod connections;
mod methods;
mod metrics;
mod peer;
mod places;

use std::{future::Future, time::Duration};

use tokio::{net::TcpListener, sync::oneshot};
use tonic::{service::Routes, transport::Server};

pub use self::{bodies::Bodies, peer::Peer};
use self::{bodies::Budget, methods::Explained};
use crate::MAX_HEADER_LIST;

/// How long connections may stay open once no call is in progress any more and the port closes: enough to read the
/// end of an answer. Longer only stays what nobody is waiting for, such as a request that was never sent whole.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one connection that may be open at once.
const MAX_STREAMS: u32 = 1024;

/// What a port has, and what it says to those who want something else.
#[derive(Debug)]
pub struct Served {
    /// Each service of `strata.v1`, with its methods.
    pub methods: &'static [(&'static str, &'static [&'static str])],
    /// Services that are as gRPC defines them.
    pub standard: &'static [&'static str],
    /// One line, with its end, for a client that speaks HTTP/1.
    pub http1: &'static str,
    /// Where there is what somebody may have looked for here.
    pub elsewhere: Option<&'static str>,
}

/// How a port finds out, by HTTP/2 pings, that who is connected went away without a word.
#[derive(Debug, Clone, Copy)]
pub struct Pings {
    /// Time from one to the next.
    pub every: Duration,
    /// How long the answer to one may take.
    pub timeout: Duration,
}

/// What who is connected may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How it finds out that one is gone.
    pub pings: Pings,
    /// Most connections at a time. One by which no call came yet that counts makes room for another one.
    pub connections: usize,
    /// Whether every call of `strata.v1` counts; else those of a peer that is [proved](Peer::prove).
    pub calls_count: bool,
    /// Bounds on the one message that each call has to come; none where a call may have many.
    pub bodies: Option<Bodies>,
}

/// Answers calls until `drained` resolves, which is when none that matters is in progress; connections are closed then,
/// after five seconds even those that do not want to be.
///
/// # Errors
/// If the transport fails.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    served: &'static Served,
    limits: Limits,
    drained: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (idle, is_idle) = oneshot::channel();
    let draining = async move {
        drained.await;
        // Who waits for it may have ended.
        let _ = idle.send(());
    };
    let serving = Server::builder()
        .http2_keepalive_interval(Some(limits.pings.every))
        .http2_keepalive_timeout(Some(limits.pings.timeout))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_max_header_list_size(MAX_HEADER_LIST)
        .serve_with_incoming_shutdown(
            Explained {
                routes: routes.prepare(),
                served,
                calls_count: limits.calls_count,
                bodies: limits.bodies.map(Budget::new),
            },
            connections::accept(listener, served.http1, limits.connections),
            draining,
        );
    let closing = async {
        match is_idle.await {
            Ok(()) => tokio::time::sleep(CLOSING_TIMEOUT).await,
            // The server ended by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = serving => ended,
        () = closing => {
            tracing::debug!("connections are closed on which no call is in progress");
            Ok(())
        }
    }
}
