//! An answer on its way to a client that may not read it.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::Stream;
use strata_proto::{
    error::{Classify, Kind, status},
    v1,
};
use tonic::Status;

use super::told::told;
use crate::front::session::Generation;

/// How often it is looked whether an answer was read on, in times that it has.
const LOOKS: u32 = 10;

/// What a client is told that reads on after all.
#[derive(Debug, thiserror::Error)]
#[error("the answer was not read for {0:?}, and is lost: read faster, or ask for less at a time")]
struct NotRead(Duration);

impl Classify for NotRead {
    fn kind(&self) -> Kind {
        Kind::Deadline
    }
}

/// The events of an answer. One that nobody reads on for `patience` is dropped: a connection polls for what it may send
/// alone, so the stream itself cannot end then, and is empty until the client reads on.
pub(super) struct Read {
    answer: Arc<Mutex<State>>,
}

struct State {
    /// `None` once it was dropped, or has ended.
    generation: Option<Generation>,
    /// Why it was dropped, until that is told.
    not_read: Option<NotRead>,
    /// How often somebody asked for more.
    asked: u64,
}

impl Read {
    pub fn new(generation: Generation, patience: Duration) -> Self {
        let state = State { generation: Some(generation), not_read: None, asked: 0 };
        let answer = Arc::new(Mutex::new(state));
        tokio::spawn(watch(Arc::downgrade(&answer), patience));
        Read { answer }
    }
}

/// Drops an answer that is not read, or returns when it has ended.
async fn watch(answer: Weak<Mutex<State>>, patience: Duration) {
    let mut unread: Option<(u64, Instant)> = None;
    loop {
        tokio::time::sleep(patience / LOOKS).await;
        let Some(answer) = answer.upgrade() else { return };
        let mut state = answer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(generation) = &state.generation else { return };
        unread = match unread.filter(|(asked, _)| *asked == state.asked) {
            _ if !generation.is_unread() => None,
            Some((_, since)) if since.elapsed() >= patience => {
                tracing::info!("an answer was not read for {patience:?}, and is dropped");
                state.not_read = Some(NotRead(patience));
                state.generation = None;
                return;
            }
            Some(unread) => Some(unread),
            None => Some((state.asked, Instant::now())),
        };
    }
}

impl Stream for Read {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        state.asked += 1;
        let Some(generation) = &mut state.generation else {
            return Poll::Ready(state.not_read.take().map(|error| Err(status(&error))));
        };
        let event = std::task::ready!(Pin::new(generation).poll_next(context));
        if event.is_none() {
            state.generation = None;
        }
        Poll::Ready(event.map(|event| match event {
            Ok(event) => Ok(v1::GenerateEvent { event: Some(event) }),
            Err(error) => Err(told(&error)),
        }))
    }
}
