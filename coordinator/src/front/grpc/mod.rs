//! The client port: `Inference`, `Cluster`, health and reflection.

mod cluster;
mod inference;

use std::{future::Future, time::Duration};

use strata_proto::{
    DESCRIPTORS,
    v1::{cluster_server::ClusterServer, inference_server::InferenceServer},
};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::TcpListenerStream};
use tonic::transport::Server;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::coordinator::Coordinator;

/// Largest request: the longest text that is tokenized, or as many ids, and some air.
const MAX_REQUEST: usize = 8 << 20;
/// HTTP/2 pings find clients that went away without a word.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one connection that may be open at once.
const MAX_STREAMS: u32 = 1024;

const SERVICES: [&str; 3] = ["", "strata.v1.Inference", "strata.v1.Cluster"];

/// Serves until `shutdown` resolves and the streams that are open then have ended.
///
/// # Errors
/// If the transport fails.
pub async fn serve(
    coordinator: Coordinator,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (reporter, health) = tonic_health::server::health_reporter();
    report(&coordinator, &reporter).await;
    let watching = tokio::spawn(watch_health(coordinator.clone(), reporter.clone()));
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let inference = InferenceServer::new(inference::InferenceService(coordinator.session().clone()))
        .max_decoding_message_size(MAX_REQUEST);
    let cluster = ClusterServer::new(cluster::ClusterService::new(coordinator));
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        // tonic's own setting does not reach sockets it did not accept itself.
        stream.and_then(|s| s.set_nodelay(true).map(|()| s))
    });
    let draining = async move {
        shutdown.await;
        watching.abort();
        for service in SERVICES {
            reporter.set_service_status(service, ServingStatus::NotServing).await;
        }
    };
    Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .add_service(health)
        .add_service(descriptors().build_v1()?)
        .add_service(descriptors().build_v1alpha()?)
        .add_service(inference)
        .add_service(cluster)
        .serve_with_incoming_shutdown(incoming, draining)
        .await?;
    Ok(())
}

/// Health as the engine sees it: `Inference` serves while a pipeline is up, `Cluster` always.
async fn report(coordinator: &Coordinator, reporter: &HealthReporter) {
    let ready = coordinator.engine.snapshot.borrow().ready;
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", "strata.v1.Inference"] {
        reporter.set_service_status(service, status).await;
    }
    reporter.set_service_status("strata.v1.Cluster", ServingStatus::Serving).await;
}

async fn watch_health(coordinator: Coordinator, reporter: HealthReporter) {
    let mut snapshot = coordinator.engine.snapshot.clone();
    let mut was = snapshot.borrow().ready;
    while snapshot.wait_for(|s| s.ready != was).await.is_ok() {
        was = !was;
        report(&coordinator, &reporter).await;
    }
    // The engine is gone.
    for service in SERVICES {
        reporter.set_service_status(service, ServingStatus::NotServing).await;
    }
}
