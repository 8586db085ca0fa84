//! The client port: `Inference`, `Cluster`, health and reflection.

mod admin;
mod cluster;
mod inference;
mod read;
mod told;

use std::future::Future;

use strata_proto::{
    CLIENT_PING_EVERY, CLIENT_PING_TIMEOUT, DESCRIPTORS, METHODS,
    port::{self, Bodies, Limits, Pings, Served},
    v1::{cluster_server::ClusterServer, inference_server::InferenceServer},
};
use tokio::net::TcpListener;
use tonic::{codec::CompressionEncoding::Gzip, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{coordinator::Coordinator, request::bounds::MAX_REQUEST_BYTES};

const SERVED: Served = Served {
    methods: METHODS,
    standard: &[
        tonic_health::pb::health_server::SERVICE_NAME,
        tonic_reflection::pb::v1::server_reflection_server::SERVICE_NAME,
        tonic_reflection::pb::v1alpha::server_reflection_server::SERVICE_NAME,
    ],
    http1: "This port speaks gRPC (HTTP/2 without TLS), which this client does not: use a gRPC client, such as \
            `strata status --address http://HOST:PORT` or `grpcurl -plaintext HOST:PORT list`.\n",
    elsewhere: None,
};

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
        let services = METHODS.iter().map(|(service, _)| *service).chain(SERVED.standard.iter().copied());
        services
            .fold(tonic_reflection::server::Builder::configure(), |builder, service| {
                builder.with_service_name(service)
            })
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Answers of Inference are not compressed: single tokens grow by it, and vectors hardly shrink.
    let inference = InferenceServer::new(inference::InferenceService {
        session: coordinator.session().clone(),
        slow_reader: coordinator.config().clients.slow_reader,
    })
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
    let clients = &coordinator.config().clients;
    let limits = Limits {
        pings: Pings { every: CLIENT_PING_EVERY, timeout: CLIENT_PING_TIMEOUT },
        connections: clients.connections,
        calls_count: true,
        bodies: Some(Bodies {
            total: clients.unfinished_bytes,
            // As many as one client may well send at once, and a part of what all may.
            per_connection: clients.unfinished_bytes / 4,
            within: clients.request_timeout,
        }),
    };
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
    };
    Ok(port::serve(listener, routes, &SERVED, limits, draining).await?)
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
