//! A request that the engine has.

use std::task::{Context, Poll};

use tokio::sync::mpsc;

use crate::{
    engine::{EngineError, Event, Replies, Reply, Submission},
    scheduler::SequenceId,
};

/// A request that the engine has. Dropped before its last message came, it cancels the request.
#[derive(Debug)]
pub(super) struct Pending {
    replies: Replies,
    engine: mpsc::UnboundedSender<Event>,
    /// What to cancel; nothing before the engine took it and after its last message.
    cancel: Option<SequenceId>,
}

impl Pending {
    /// Hands a request to the engine.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn submit(
        engine: &mpsc::UnboundedSender<Event>,
        submission: Submission,
        replies: Replies,
    ) -> Result<Self, EngineError> {
        engine.send(Event::Submit(Box::new(submission))).map_err(|_| EngineError::ShuttingDown)?;
        Ok(Pending { replies, engine: engine.clone(), cancel: None })
    }

    /// Whether a message waits to be read.
    pub fn is_unread(&self) -> bool {
        self.replies.are_unread()
    }

    /// The next message.
    ///
    /// # Errors
    /// Why the request has no answer.
    pub async fn next(&mut self) -> Result<Reply, EngineError> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Reply, EngineError>> {
        let reply = std::task::ready!(self.replies.poll_recv(context));
        match &reply {
            Some(Reply::Accepted(id)) => self.cancel = Some(*id),
            Some(reply) if !reply.is_last() => {}
            _ => self.cancel = None,
        }
        Poll::Ready(match reply {
            Some(Reply::Failed(error)) => Err(error),
            Some(reply) => Ok(reply),
            None => Err(EngineError::ShuttingDown),
        })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // From here on the engine finds out by itself; before, it may have taken the request, and even answered it.
        self.replies.close();
        while let Some(reply) = self.replies.try_recv() {
            match reply {
                Reply::Accepted(id) => self.cancel = Some(id),
                reply if reply.is_last() => self.cancel = None,
                _ => {}
            }
        }
        if let Some(id) = self.cancel {
            // An engine that is gone has nothing to free.
            let _ = self.engine.send(Event::Cancel(id));
        }
    }
}
