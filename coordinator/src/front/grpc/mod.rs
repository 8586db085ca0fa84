//! The client port: `Inference`, `Cluster`, health and reflection.

mod cluster;
mod connections;
mod inference;
mod methods;

use std::{future::Future, time::Duration};

use strata_proto::{
    DESCRIPTORS, MAX_HEADER_LIST, METHODS,
    v1::{cluster_server::ClusterServer, inference_server::InferenceServer},
};
use tokio::{net::TcpListener, sync::oneshot};
use tonic::{codec::CompressionEncoding::Gzip, service::Routes, transport::Server};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{coordinator::Coordinator, request::bounds::MAX_REQUEST_BYTES};

/// HTTP/2 pings find clients that went away without a word.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long connections may stay open once no request is in progress any more and the port closes: enough to read
/// the end of an answer. Longer only stays what nobody is waiting for, such as a request that was never sent whole.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one connection that may be open at once.
const MAX_STREAMS: u32 = 1024;

const SERVICES: [&str; 3] = ["", "strata.v1.Inference", "strata.v1.Cluster"];

/// Answers from the coordinator's first moment on, until `shutdown` resolves and what is in progress then has ended;
/// meanwhile status and health are still answered, and new requests are refused.
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
        let services = METHODS.iter().map(|(service, _)| *service).chain(methods::STANDARD);
        services
            .fold(tonic_reflection::server::Builder::configure(), |builder, service| {
                builder.with_service_name(service)
            })
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Answers of Inference are not compressed: single tokens grow by it, and vectors hardly shrink.
    let inference = InferenceServer::new(inference::InferenceService(coordinator.session().clone()))
        .accept_compressed(Gzip)
        .max_decoding_message_size(MAX_REQUEST_BYTES);
    let cluster = ClusterServer::new(cluster::ClusterService::new(coordinator.clone()))
        .accept_compressed(Gzip)
        .send_compressed(Gzip);
    let routes = Routes::new(health)
        .add_service(descriptors().build_v1()?)
        .add_service(descriptors().build_v1alpha()?)
        .add_service(inference)
        .add_service(cluster);
    let (idle, is_idle) = oneshot::channel();
    let draining = async move {
        shutdown.await;
        coordinator.drain().await;
        watching.abort();
        let mut reporter = reporter;
        for service in SERVICES {
            reporter.set_service_status(service, ServingStatus::NotServing).await;
            // Whoever watches would keep the port open.
            reporter.clear_service_status(service).await;
        }
        // Who waits for it may have ended.
        let _ = idle.send(());
    };
    let serving = Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_max_header_list_size(MAX_HEADER_LIST)
        .serve_with_incoming_shutdown(
            methods::Explained(routes.prepare()),
            connections::accept(listener),
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
        ended = serving => ended?,
        () = closing => tracing::debug!("connections are closed on which no request is in progress"),
    }
    Ok(())
}

/// Health: `Inference` serves while requests are computed, `Cluster` always.
async fn report(coordinator: &Coordinator, reporter: &HealthReporter) {
    let ready = coordinator.watch().borrow().ready();
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    for service in ["", "strata.v1.Inference"] {
        reporter.set_service_status(service, status).await;
    }
    reporter.set_service_status("strata.v1.Cluster", ServingStatus::Serving).await;
}

async fn watch_health(coordinator: Coordinator, reporter: HealthReporter) {
    let mut snapshot = coordinator.watch();
    let mut was = snapshot.borrow().ready();
    while snapshot.wait_for(|s| s.ready() != was).await.is_ok() {
        was = !was;
        report(&coordinator, &reporter).await;
    }
}
