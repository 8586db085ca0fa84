//! An answer as it comes.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::Stream;
use strata_proto::v1::{self, generate_event::Event};

use super::{SessionError, outcome::Outcome, pending::Pending, record::Record};
use crate::engine::{EngineError, Reply};

/// An answer as it comes: one `Started`, any number of `Tokens`, one `Finished`; or an error, which is the last item.
/// Dropped before its end, it cancels the request.
#[derive(Debug)]
pub struct Generation {
    pub(super) started: Option<v1::Started>,
    /// None once the answer has ended.
    pub(super) running: Option<(Pending, Record)>,
}

impl Generation {
    /// Whether something of it waits to be read.
    pub(crate) fn is_unread(&self) -> bool {
        self.started.is_some() || self.running.as_ref().is_some_and(|(pending, _)| pending.is_unread())
    }
}

impl Stream for Generation {
    type Item = Result<Event, SessionError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(started) = self.started.take() {
            return Poll::Ready(Some(Ok(Event::Started(started))));
        }
        loop {
            let Some((pending, record)) = &mut self.running else { return Poll::Ready(None) };
            let event = match ready!(pending.poll_next(context)) {
                Ok(Reply::Begun(at)) => {
                    record.begun = Some(at);
                    continue;
                }
                Ok(Reply::Event(event)) => Ok(event),
                Ok(_) => Err(EngineError::Internal),
                Err(error) => Err(error),
            };
            let outcome = match &event {
                Ok(Event::Tokens(tokens)) => {
                    record.came(tokens.token_ids.len());
                    None
                }
                Ok(Event::Finished(finished)) => Some(Outcome::finished(finished.reason())),
                Ok(Event::Started(_)) => None,
                Err(error) => {
                    record.failed(error);
                    Some(record.outcome)
                }
            };
            if let Some(outcome) = outcome {
                record.outcome = outcome;
                // Its place is free before the caller can ask again.
                self.running = None;
            }
            return Poll::Ready(Some(event.map_err(SessionError::from)));
        }
    }
}
