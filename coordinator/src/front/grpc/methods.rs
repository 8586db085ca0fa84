//! What is served, for those who call something else.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use futures::future::Either;
use strata_proto::{METHODS, error::quoted};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    service::Routes,
};

/// Services that are as gRPC defines them.
pub(super) const STANDARD: [&str; 3] = [
    tonic_health::pb::health_server::SERVICE_NAME,
    tonic_reflection::pb::v1::server_reflection_server::SERVICE_NAME,
    tonic_reflection::pb::v1alpha::server_reflection_server::SERVICE_NAME,
];

/// Routes whose UNIMPLEMENTED says what is served; tonic's says nothing.
#[derive(Clone)]
pub(super) struct Explained(pub Routes);

impl Service<http::Request<Body>> for Explained {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future =
        Either<<Routes as Service<http::Request<Body>>>::Future, Ready<Result<Self::Response, Infallible>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<Body>>::poll_ready(&mut self.0, context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path();
        match is_served(path) {
            true => Either::Left(self.0.call(request)),
            false => Either::Right(ready(Ok(Status::unimplemented(refusal(path)).into_http()))),
        }
    }
}

/// A path is `/SERVICE/METHOD`.
fn is_served(path: &str) -> bool {
    let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
        return false;
    };
    STANDARD.contains(&service)
        || METHODS.iter().any(|(name, methods)| *name == service && methods.contains(&method))
}

fn refusal(path: &str) -> String {
    let ours = METHODS.iter().map(|(service, methods)| format!("{service} has {}; ", methods.join(", ")));
    format!(
        "{} is not served here: {}besides there are {}",
        quoted(path),
        ours.collect::<String>(),
        STANDARD.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_served_is_told_from_what_is() {
        for path in
            ["/strata.v1.Inference/Generate", "/strata.v1.Cluster/Status", "/grpc.health.v1.Health/Check"]
        {
            assert!(is_served(path), "{path}");
        }
        for path in
            ["/", "", "/strata.v1.Inference/", "/strata.v1.Inference/Generat", "/strata.v1.Stage/Load", "x/y"]
        {
            assert!(!is_served(path), "{path}");
        }
        let said = refusal("/strata.v1.Inference/Chat");
        for part in [
            "\"/strata.v1.Inference/Chat\" is not served here: strata.v1.Inference has Generate, Classify, ",
            "strata.v1.Cluster has Status, PreviewPlan; besides there are grpc.health.v1.Health, ",
        ] {
            assert!(said.contains(part), "{said}");
        }
        assert!(refusal(&"x".repeat(1 << 20)).len() < 1000);
    }
}
