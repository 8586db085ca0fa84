//! What is served, for those who call something else.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use futures::future::Either;
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    service::Routes,
};

use super::{Served, bodies::Budget, peer::Peer};
use crate::error::quoted;

/// Routes whose UNIMPLEMENTED says what is served; tonic's says nothing.
#[derive(Clone)]
pub(super) struct Explained {
    pub routes: Routes,
    pub served: &'static Served,
    /// Whether who makes a call of ours is no stranger.
    pub calls_count: bool,
    /// Of those that have one message.
    pub bodies: Option<Budget>,
}

impl Explained {
    /// The request, within the bounds of the port.
    fn bounded(&self, request: http::Request<Body>) -> Result<http::Request<Body>, Status> {
        let path = request.uri().path();
        if !self.served.has(path) {
            return Err(Status::unimplemented(self.served.refusal(path)));
        }
        let ours = self.served.is_ours(path);
        let peer = request.extensions().get::<Peer>().filter(|_| ours).cloned();
        if self.calls_count {
            peer.iter().for_each(Peer::prove);
        }
        match (&self.bodies, peer) {
            (Some(bodies), Some(peer)) => {
                let (head, body) = request.into_parts();
                Ok(http::Request::from_parts(head, bodies.hold(body, &peer)?))
            }
            _ => Ok(request),
        }
    }
}

impl Service<http::Request<Body>> for Explained {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future =
        Either<<Routes as Service<http::Request<Body>>>::Future, Ready<Result<Self::Response, Infallible>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<http::Request<Body>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self.bounded(request) {
            Ok(request) => Either::Left(self.routes.call(request)),
            Err(refused) => Either::Right(ready(Ok(refused.into_http()))),
        }
    }
}

impl Served {
    /// Whether there is what a path names, which is `/SERVICE/METHOD`.
    fn has(&self, path: &str) -> bool {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return false;
        };
        self.standard.contains(&service)
            || self.methods.iter().any(|(name, methods)| *name == service && methods.contains(&method))
    }

    /// Whether a path that is served is of `strata.v1`.
    fn is_ours(&self, path: &str) -> bool {
        !self.standard.iter().any(|service| path[1..].starts_with(service))
    }

    fn refusal(&self, path: &str) -> String {
        let ours =
            self.methods.iter().map(|(service, methods)| format!("{service} has {}", methods.join(", ")));
        let mut all: Vec<_> = ours.collect();
        if !self.standard.is_empty() {
            all.push(format!("besides there are {}", self.standard.join(", ")));
        }
        all.extend(self.elsewhere.map(str::to_owned));
        format!("{} is not served here: {}", quoted(path), all.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::METHODS;

    const SERVED: Served = Served {
        methods: METHODS,
        standard: &["grpc.health.v1.Health"],
        http1: "",
        elsewhere: Some("go there"),
    };

    #[test]
    fn what_is_not_served_is_told_from_what_is() {
        for path in
            ["/strata.v1.Inference/Generate", "/strata.v1.Cluster/Status", "/grpc.health.v1.Health/Check"]
        {
            assert!(SERVED.has(path), "{path}");
        }
        for path in
            ["/", "", "/strata.v1.Inference/", "/strata.v1.Inference/Generat", "/strata.v1.Stage/Load", "x/y"]
        {
            assert!(!SERVED.has(path), "{path}");
        }
        let said = SERVED.refusal("/strata.v1.Inference/Chat");
        for part in [
            "\"/strata.v1.Inference/Chat\" is not served here: strata.v1.Inference has Generate, Classify, ",
            "; strata.v1.Cluster has Status, PreviewPlan, Drain, Undrain, Rebalance, Apply; besides there are grpc.health.v1.Health; go there",
        ] {
            assert!(said.contains(part), "{said}");
        }
        assert!(SERVED.refusal(&"x".repeat(1 << 20)).len() < 1000);
    }
}
