//! A port for operators over HTTP: metrics, probes, and what the process is doing. Nothing that it answers depends on who asks.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use futures::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::metrics;

/// Port of a coordinator's operators unless another one is asked for.
pub const DEFAULT_ADMIN_PORT: u16 = 7718;
/// Most connections at a time; more wait.
const MAX_CONNECTIONS: usize = 256;

/// What a process says of itself to its operators.
pub trait Admin: Send + Sync + 'static {
    /// Every metric, as OpenMetrics has them in text.
    ///
    /// # Errors
    /// If one cannot be written.
    fn metrics(&self) -> Result<String, fmt::Error>;

    /// Whether it makes progress: one that does not is to be ended and started anew.
    ///
    /// # Errors
    /// What stands still.
    fn live(&self) -> Result<(), String>;

    /// Whether it has finished to start.
    ///
    /// # Errors
    /// What there is to wait for.
    fn started(&self) -> Result<(), String>;

    /// Whether it takes work.
    ///
    /// # Errors
    /// Why it does not.
    fn ready(&self) -> Result<(), String>;

    /// What it is doing, in JSON.
    fn status(&self) -> BoxFuture<'_, String>;

    /// The plan that it runs by, in JSON; none while there is none, or if it has none.
    fn plan(&self) -> Option<String>;
}

/// Answers operators of a process of this `version`.
///
/// # Errors
/// If the transport fails.
pub async fn serve(listener: TcpListener, admin: Arc<dyn Admin>, version: &str) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    axum::serve(Places { listener, places }, routes(admin, version)).await
}

type Shown = State<Arc<dyn Admin>>;

fn routes(admin: Arc<dyn Admin>, version: &str) -> Router {
    let version = format!("{version}\n");
    let probe = |State(admin): Shown, asked: fn(&dyn Admin) -> Result<(), String>| async move {
        match asked(&*admin) {
            Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
        }
    };
    Router::new()
        .route("/metrics", get(scraped))
        .route("/livez", get(move |admin: Shown| probe(admin, |a| a.live())))
        .route("/readyz", get(move |admin: Shown| probe(admin, |a| a.ready())))
        .route("/startupz", get(move |admin: Shown| probe(admin, |a| a.started())))
        .route("/version", get(async move || version.clone()))
        .route("/status", get(|State(admin): Shown| async move { json(admin.status().await) }))
        .route(
            "/plan",
            get(|State(admin): Shown| async move {
                match admin.plan() {
                    Some(plan) => json(plan),
                    None => (StatusCode::NOT_FOUND, "there is no plan yet\n").into_response(),
                }
            }),
        )
        .fallback(async || {
            let paths = "/metrics, /livez, /readyz, /startupz, /version, /status, /plan";
            (StatusCode::NOT_FOUND, format!("there is no such page; this is a port for operators: {paths}\n"))
        })
        .with_state(admin)
}

async fn scraped(State(admin): Shown, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    match admin.metrics() {
        Ok(text) => {
            let (kind, text) = metrics::answer(accept, text);
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            (StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written; the log has the reason\n")
                .into_response()
        }
    }
}

fn json(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response()
}

/// A listener that takes no more connections than there are places.
struct Places {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Listener for Places {
    type Io = Placed;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Placed, SocketAddr) {
        // Nobody closes it.
        let place = self.places.clone().acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Placed { stream, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection, and the place that it takes.
struct Placed {
    stream: TcpStream,
    _place: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Placed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
