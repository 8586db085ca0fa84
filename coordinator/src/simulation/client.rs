//! Clients: what they ask, and whether they are told what they must be.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use strata_proto::{
    error::{Classify, Kind},
    v1::{self, FinishReason, generate_event::Event},
};

use super::{
    model::{self, Oracle},
    random::Random,
    world::{SECOND, Time, lock},
};
use crate::front::session::Session;

/// Pause before a client asks again.
const ASK_AGAIN: Time = SECOND / 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// To ask at this time.
    Waits(Time),
    /// Its request is in progress.
    Asks,
    /// It has its answer, or wants none any more.
    Done,
}

/// Who asks until it has a whole answer: each time for what is missing.
struct Client {
    tokens: Vec<u32>,
    prompt: usize,
    most: usize,
    oracle: Oracle,
    /// Goes away after so many tokens.
    leaves_after: Option<usize>,
    deadline_ms: Option<u64>,
    state: State,
    fails: u32,
}

/// All of them.
pub struct Ledger {
    clients: Vec<Client>,
    pub now: Time,
    /// What happened, for the trace.
    pub told: Vec<String>,
    pub violation: Option<String>,
    pub answered: usize,
}

impl Ledger {
    /// Clients that ask within the first `time`.
    pub fn new(count: usize, time: Time, random: &mut Random) -> Self {
        let clients = (0..count).map(|_| {
            // Few ways to begin, so that beginnings are shared.
            let (kind, prompt) = (random.within(0..3) as u32, random.within(1..40) as usize);
            let tokens: Vec<u32> =
                (0..prompt as u32).map(|at| (at * 7 + kind) % (model::VOCABULARY - 1) + 1).collect();
            let mut oracle = Oracle::default();
            tokens.iter().for_each(|token| oracle.push(*token));
            let most = random.within(1..40) as usize;
            Client {
                tokens,
                prompt,
                most,
                oracle,
                leaves_after: random.percent(15).then(|| random.index(most)),
                deadline_ms: random.percent(10).then(|| random.within(100..5000)),
                state: State::Waits(random.within(0..time)),
                fails: 0,
            }
        });
        let clients = clients.collect();
        Ledger { clients, now: 0, told: Vec::new(), violation: None, answered: 0 }
    }

    /// Those who are to ask now.
    pub fn due(&self) -> Vec<usize> {
        let waits = |state: State| matches!(state, State::Waits(at) if at <= self.now);
        (0..self.clients.len()).filter(|client| waits(self.clients[*client].state)).collect()
    }

    /// Those who have no answer yet.
    pub fn open(&self) -> usize {
        self.clients.iter().filter(|client| client.state != State::Done).count()
    }

    /// It is to ask again, unless it has all that it wanted and was not told so.
    pub fn put_off(&mut self, client: usize) {
        let again = State::Waits(self.now + ASK_AGAIN);
        let client = &mut self.clients[client];
        let received = client.tokens.len() - client.prompt;
        let is_over = received == client.most || received > 0 && client.tokens.last() == Some(&model::EOS);
        client.state = if is_over { State::Done } else { again };
    }

    fn begin(&mut self, client: usize) -> v1::GenerateRequest {
        let client = &mut self.clients[client];
        let received = client.tokens.len() - client.prompt;
        client.state = State::Asks;
        v1::GenerateRequest {
            token_ids: client.tokens.clone(),
            max_tokens: Some((client.most - received) as u32),
            deadline_ms: client.deadline_ms,
            ..v1::GenerateRequest::default()
        }
    }

    fn violated(&mut self, client: usize, what: &str) {
        self.violation.get_or_insert(format!("client {client}: {what}"));
    }

    /// Part of an answer; whether it goes on to listen.
    fn take(&mut self, id: usize, begun: usize, tokens: &v1::Tokens) -> bool {
        let client = &mut self.clients[id];
        for token in &tokens.token_ids {
            let (at, expected) = (client.tokens.len() - begun, client.oracle.next());
            if tokens.index as usize != at {
                let what = format!("token {at} of an answer has index {}", tokens.index);
                return {
                    self.violated(id, &what);
                    false
                };
            }
            if *token != expected {
                let position = client.tokens.len();
                let what = format!("position {position} is {token}, and {expected} without any fault");
                return {
                    self.violated(id, &what);
                    false
                };
            }
            client.tokens.push(*token);
            client.oracle.push(*token);
        }
        client.leaves_after.is_none_or(|most| client.tokens.len() - client.prompt < most)
    }

    fn finish(&mut self, id: usize, finished: &v1::Finished) {
        let client = &mut self.clients[id];
        let received = client.tokens.len() - client.prompt;
        let is_eos = received > 0 && client.tokens.last() == Some(&model::EOS);
        let expected = if is_eos { FinishReason::Eos } else { FinishReason::Length };
        client.state = State::Done;
        self.told.push(format!("client {id} has its answer of {received} tokens"));
        self.answered += 1;
        if finished.reason() != expected || (!is_eos && received != self.clients[id].most) {
            let what = format!("the answer ends by {:?} after {received} tokens", finished.reason());
            self.violated(id, &what);
        }
    }

    fn fail(&mut self, id: usize, error: &impl Classify) {
        // It is told so again and again while nobody serves.
        if self.clients[id].fails < 3 {
            self.told.push(format!("client {id} fails: {error}"));
            self.clients[id].fails += 1;
        }
        self.put_off(id);
        let client = &mut self.clients[id];
        match error.kind() {
            Kind::NoCapacity | Kind::Overload { .. } => {}
            // It has waited long enough.
            Kind::Deadline if client.deadline_ms.is_some() => client.state = State::Done,
            kind => self.violated(id, &format!("{kind:?}: {error}")),
        }
    }
}

/// Whoever is not told anything any more asks again.
struct Cut<'a> {
    ledger: &'a Mutex<Ledger>,
    client: usize,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        let mut ledger = lock(self.ledger);
        if ledger.clients[self.client].state == State::Asks {
            ledger.told.push(format!("client {} is cut off", self.client));
            ledger.put_off(self.client);
        }
    }
}

/// Asks once.
pub async fn ask(session: Session, ledger: Arc<Mutex<Ledger>>, client: usize) {
    let request = lock(&ledger).begin(client);
    let begun = request.token_ids.len();
    let _cut = Cut { ledger: &ledger, client };
    let mut answer = match session.generate(request).await {
        Ok(answer) => answer,
        Err(error) => return lock(&ledger).fail(client, &error),
    };
    while let Some(event) = answer.next().await {
        let mut ledger = lock(&ledger);
        match event {
            Ok(Event::Started(_)) => {}
            Ok(Event::Tokens(tokens)) => {
                if !ledger.take(client, begun, &tokens) {
                    ledger.told.push(format!("client {client} goes away"));
                    ledger.clients[client].state = State::Done;
                    return;
                }
            }
            Ok(Event::Finished(finished)) => return ledger.finish(client, &finished),
            Err(error) => return ledger.fail(client, &error),
        }
    }
    lock(&ledger).violated(client, "an answer ends without an end");
}
