//! Answers on their way to whoever asked: they come whether or not they are read, and are counted until they are.

use std::{
    mem::size_of,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use strata_proto::v1::{
    self,
    generate_event::{self, Event},
};
use tokio::{sync::mpsc, time::Instant};

use super::error::EngineError;
use crate::{request::Permit, scheduler::SequenceId};

/// So many answers share what may be unread: whoever has less than such a part is not at fault for there being too much.
const SHARES: usize = 256;

/// One message of an answer. What is unread of one is bounded by the context length, so a client that does not read
/// cannot hold up the engine.
#[derive(Debug)]
pub(crate) enum Reply {
    /// The request is in; cancel it by this id.
    Accepted(SequenceId),
    /// Its first tokens went to a pipeline at this time.
    Begun(Instant),
    /// Something to send on.
    Event(generate_event::Event),
    /// What the model's head yields of an input: a vector, or the logits of classes. The last message.
    Vector(Vec<f32>),
    /// Candidates for each mask of an input. The last message.
    Guesses(Vec<Vec<v1::Alternative>>),
    /// The answer is over without a finish.
    Failed(EngineError),
}

impl Reply {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        match self {
            Reply::Accepted(_) | Reply::Begun(_) => false,
            Reply::Event(event) => matches!(event, generate_event::Event::Finished(_)),
            Reply::Vector(_) | Reply::Guesses(_) | Reply::Failed(_) => true,
        }
    }
}

/// Bytes of answers that were not read.
#[derive(Debug)]
pub(crate) struct Unread {
    bytes: AtomicUsize,
    most: usize,
}

impl Unread {
    /// At most so many.
    pub fn new(most: usize) -> Self {
        Unread { bytes: AtomicUsize::new(0), most }
    }

    /// The most, if there are more.
    pub fn exceeded(&self) -> Option<usize> {
        (self.bytes.load(Ordering::Relaxed) > self.most).then_some(self.most)
    }
}

/// Why a reply was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Undelivered {
    /// Nobody waits for it.
    Gone,
    /// Too much is unread, and much of it is this answer's.
    Unread,
}

/// Makes the two ends of an answer, which has a place among the requests in progress until its last message.
pub(crate) fn replies(all: Arc<Unread>, place: Option<Arc<Permit>>) -> (ReplySender, Replies) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let own = Arc::new(AtomicUsize::new(0));
    (
        ReplySender { sender, own: own.clone(), all: all.clone(), _place: place },
        Replies { receiver, own, all },
    )
}

/// Where an answer goes.
#[derive(Debug)]
pub(crate) struct ReplySender {
    sender: mpsc::UnboundedSender<(Reply, usize)>,
    own: Arc<AtomicUsize>,
    all: Arc<Unread>,
    _place: Option<Arc<Permit>>,
}

impl ReplySender {
    /// Sends a message after which there are others.
    ///
    /// # Errors
    /// If the answer is to end here.
    pub fn send(&self, reply: Reply) -> Result<(), Undelivered> {
        if self.own.load(Ordering::Relaxed) > self.all.most / SHARES && self.all.exceeded().is_some() {
            return Err(Undelivered::Unread);
        }
        self.push(reply)
    }

    /// Sends the last message. The place is free before it can be read.
    pub fn end(mut self, reply: Reply) {
        self._place = None;
        // A receiver that is gone needs no telling.
        let _ = self.push(reply);
    }

    fn push(&self, reply: Reply) -> Result<(), Undelivered> {
        let bytes = reply.bytes();
        self.own.fetch_add(bytes, Ordering::Relaxed);
        self.all.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.sender.send((reply, bytes)).map_err(|_| {
            self.own.fetch_sub(bytes, Ordering::Relaxed);
            self.all.bytes.fetch_sub(bytes, Ordering::Relaxed);
            Undelivered::Gone
        })
    }
}

/// Where an answer comes from.
#[derive(Debug)]
pub(crate) struct Replies {
    receiver: mpsc::UnboundedReceiver<(Reply, usize)>,
    own: Arc<AtomicUsize>,
    all: Arc<Unread>,
}

impl Replies {
    /// Whether something waits to be read.
    pub fn are_unread(&self) -> bool {
        !self.receiver.is_empty()
    }

    /// The next message; `None` after the last one.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Reply>> {
        self.receiver.poll_recv(context).map(|received| received.map(|received| self.read(received)))
    }

    /// A message that is there already.
    pub fn try_recv(&mut self) -> Option<Reply> {
        self.receiver.try_recv().ok().map(|received| self.read(received))
    }

    /// Takes no more messages.
    pub fn close(&mut self) {
        self.receiver.close();
    }

    fn read(&self, (reply, bytes): (Reply, usize)) -> Reply {
        self.own.fetch_sub(bytes, Ordering::Relaxed);
        self.all.bytes.fetch_sub(bytes, Ordering::Relaxed);
        reply
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.close();
        while self.try_recv().is_some() {}
    }
}

impl Reply {
    /// Memory that it takes, in bytes.
    fn bytes(&self) -> usize {
        let alternatives = |top: &Vec<v1::Alternative>| top.len() * size_of::<v1::Alternative>();
        let beside = match self {
            Reply::Event(Event::Tokens(tokens)) => {
                let logprobs = tokens.logprobs.iter();
                let logprobs = logprobs.map(|l| size_of::<v1::TokenLogprobs>() + alternatives(&l.top));
                tokens.text.len() + tokens.token_ids.len() * size_of::<u32>() + logprobs.sum::<usize>()
            }
            Reply::Event(Event::Finished(finished)) => finished.text.len(),
            Reply::Vector(values) => values.len() * size_of::<f32>(),
            Reply::Guesses(masks) => masks.iter().map(alternatives).sum(),
            _ => 0,
        };
        size_of::<Self>() + beside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(bytes: usize) -> Reply {
        Reply::Event(Event::Tokens(v1::Tokens { text: "x".repeat(bytes), ..v1::Tokens::default() }))
    }

    #[test]
    fn what_is_not_read_is_counted_and_who_reads_is_not_cut() {
        let all = Arc::new(Unread::new(SHARES << 10));
        let (slow, mut unread) = replies(all.clone(), None);
        let (quick, mut read) = replies(all.clone(), None);
        while slow.send(tokens(100)).is_ok() {
            quick.send(tokens(100)).unwrap();
            assert!(read.try_recv().is_some());
        }
        assert_eq!(slow.send(tokens(100)), Err(Undelivered::Unread));
        assert!(all.exceeded() == Some(SHARES << 10) && unread.are_unread() && !read.are_unread());
        quick.send(tokens(100)).unwrap();
        assert!(unread.try_recv().is_some() && read.try_recv().is_some());
        slow.end(tokens(1));
        drop(unread);
        assert_eq!(all.bytes.load(Ordering::Relaxed), 0);
        drop(read);
        assert_eq!(quick.send(tokens(100)), Err(Undelivered::Gone));
        assert_eq!(all.bytes.load(Ordering::Relaxed), 0);
    }
}
