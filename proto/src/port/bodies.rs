//! Bodies of requests that have not come whole yet: so many bytes of them, and each within a time.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::{Status, body::Body};

use super::peer::Peer;
use crate::error::{Classify, Kind, status};

/// What a request takes before its first byte came, in bytes.
const OVERHEAD: usize = 4 << 10;
/// When a client may try again that was refused: about the time that the requests of others take to come.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Bounds on bodies that have not come whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bodies {
    /// Most bytes of all connections together.
    pub total: usize,
    /// Most bytes of one connection.
    pub per_connection: usize,
    /// How long each may take.
    pub within: Duration,
}

/// Why a body is not read to its end.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(
        "{held} bytes of requests that have not come whole are held for {whose}, at most {most} are: send fewer at a time"
    )]
    TooMuch { held: usize, whose: &'static str, most: usize },
    #[error("the request did not come whole within {0:?}: send it faster, or in parts")]
    TooSlow(Duration),
}

impl Classify for Refused {
    fn kind(&self) -> Kind {
        match self {
            Refused::TooMuch { .. } => Kind::Overload { retry_after: RETRY_AFTER },
            Refused::TooSlow(_) => Kind::Deadline,
        }
    }
}

/// The bodies of a port.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    bounds: Bodies,
    held: Arc<AtomicUsize>,
}

impl Budget {
    pub fn new(bounds: Bodies) -> Self {
        Budget { bounds, held: Arc::default() }
    }

    /// The same body, within the bounds. What it takes is given back when it is dropped: its message is decoded then, or
    /// the call is over.
    ///
    /// # Errors
    /// If too much is held already.
    pub fn hold(&self, body: Body, peer: &Peer) -> Result<Body, Status> {
        let late = Box::pin(tokio::time::sleep(self.bounds.within));
        let mut held = Held { body, budget: self.clone(), of_connection: peer.held.clone(), taken: 0, late };
        held.take(OVERHEAD)?;
        Ok(Body::new(held))
    }
}

struct Held {
    body: Body,
    budget: Budget,
    of_connection: Arc<AtomicUsize>,
    taken: usize,
    late: Pin<Box<Sleep>>,
}

impl Held {
    /// Takes so many bytes more. Who is refused has nothing any more, from that moment on: of many that come at once,
    /// no more are refused than must be.
    fn take(&mut self, bytes: usize) -> Result<(), Status> {
        let taken = self.taken;
        let add = |counter: &AtomicUsize, whose, most| {
            let within = |held| held + bytes <= most;
            let next = |held| Some(if within(held) { held + bytes } else { held - taken });
            match counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
                Ok(held) if !within(held) => Err(Refused::TooMuch { held: held + bytes, whose, most }),
                _ => Ok(()),
            }
        };
        let Bodies { total, per_connection, .. } = self.budget.bounds;
        let (all, connection) = (&self.budget.held, &self.of_connection);
        let refused = match add(connection, "this connection", per_connection) {
            Err(refused) => {
                all.fetch_sub(taken, Ordering::Relaxed);
                refused
            }
            Ok(()) => match add(all, "all connections", total) {
                Ok(()) => {
                    self.taken += bytes;
                    return Ok(());
                }
                Err(refused) => {
                    connection.fetch_sub(taken + bytes, Ordering::Relaxed);
                    refused
                }
            },
        };
        self.taken = 0;
        Err(status(&refused))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for counter in [&self.budget.held, &self.of_connection] {
            counter.fetch_sub(self.taken, Ordering::Relaxed);
        }
    }
}

impl http_body::Body for Held {
    type Data = <Body as http_body::Body>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let frame = match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Pending => {
                ready!(self.late.as_mut().poll(context));
                let refused = Refused::TooSlow(self.budget.bounds.within);
                return Poll::Ready(Some(Err(status(&refused))));
            }
            Poll::Ready(frame) => frame,
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, |data| data.len());
                Some(self.take(bytes).map(|()| frame))
            }
            Some(Err(error)) => Some(Err(error)),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        http_body::Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> SizeHint {
        http_body::Body::size_hint(&self.body)
    }
}
