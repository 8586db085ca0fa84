//! Who is at the other end of a connection.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};
use tonic::transport::server::Connected;

use super::places::{Place, Standing};

/// A connection, as a call that came by it knows it: one of the extensions of a request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Names the connection for as long as the process lives; never 0.
    pub connection: u64,
    /// Whether it comes from this machine.
    pub is_local: bool,
    /// Bytes of its requests that have not come whole.
    pub(super) held: Arc<AtomicUsize>,
    standing: Standing,
}

impl Peer {
    /// Says that a call that came by it is one that the port is there for: until then, the connection makes room for
    /// others when there are too many.
    pub fn prove(&self) {
        self.standing.prove();
    }
}

/// Number of the connection that was accepted last, by whichever port.
static LAST: AtomicU64 = AtomicU64::new(0);

/// A connection that was accepted. Reading fails if it has to make room for another one, or does not begin in time: what
/// every HTTP/2 connection begins with comes from its client alone, and before that nothing asks whether it is still there.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    peer: Peer,
    /// Among the connections of the port.
    place: Place,
    /// Until it has begun.
    beginning: Option<Beginning>,
}

#[derive(Debug)]
struct Beginning {
    /// Bytes to come yet.
    left: usize,
    late: Pin<Box<Sleep>>,
}

impl Connection {
    /// A connection whose client has `within` to say its first `opening` bytes.
    pub fn new(stream: TcpStream, place: Place, opening: usize, within: Duration) -> Self {
        let connection = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        let beginning = Beginning { left: opening, late: Box::pin(tokio::time::sleep(within)) };
        let is_local = stream.peer_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback());
        let peer = Peer { connection, is_local, held: Arc::default(), standing: place.standing.clone() };
        Connection { stream, peer, place, beginning: Some(beginning) }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.place.poll_left(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some(beginning) = &mut self.beginning {
            beginning.left = beginning.left.saturating_sub(buffer.filled().len() - before);
            if beginning.left == 0 {
                self.beginning = None;
            } else if read.is_pending() && beginning.late.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }
}
