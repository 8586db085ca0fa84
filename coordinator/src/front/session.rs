//! The one way in: every request of every front, and of a program that has the coordinator in its own process.

mod error;
mod generation;
mod outcome;
mod parts;
mod pending;
mod record;
mod series;

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use strata_proto::{
    ModelProfile,
    v1::{self, Task},
};
use tokio::sync::{mpsc, oneshot, watch};

pub use error::SessionError;
pub use generation::Generation;
pub use outcome::Outcome;
pub use record::Counts;

pub(crate) use self::series::Series;
use self::{
    pending::Pending,
    record::{Open, Record},
};
use crate::{
    engine::{Asked, EngineError, Event, Reply, Snapshot, State, Submission, Unread, replies},
    request::{
        AdmissionError, Gate, Limit, Pool, Tokenizer,
        bounds::{self, MAX_IDS},
        encode, generate,
        located::Checked,
        parts::Place,
    },
};

/// How long requests wait for what is served next.
const HELD_TIMEOUT: Duration = Duration::from_secs(30);

/// What a session needs of a model that is served.
#[derive(Debug)]
pub(crate) struct Served {
    pub profile: Arc<ModelProfile>,
    pub tokenizer: Arc<Tokenizer>,
    pub engine: mpsc::UnboundedSender<Event>,
    /// Most tokens of a sequence, whatever the cache holds.
    pub longest: Limit,
    /// Most tokens of an input that is computed in one step.
    pub longest_input: Limit,
    /// Somebody chose how much the cache holds.
    pub is_cache_chosen: bool,
    /// Every name by which clients ask for it.
    pub names: Arc<[String]>,
    /// Dropped with the last request that was let in to it.
    pub _in_use: oneshot::Sender<()>,
}

/// A way to ask the model; cheap to clone. It bounds requests in progress, tokenizes off the async threads, keeps
/// deadlines, counts, and logs a line for each request that ends. A call whose future or stream is dropped is
/// cancelled. Before the model is served, every call fails with what there is to wait for.
#[derive(Debug, Clone)]
pub struct Session {
    shared: Arc<Shared>,
    /// What the coordinator's own questions are for, before it is served. They count nowhere.
    probed: Option<Arc<Served>>,
    /// Which of a tenant's connections its requests come by.
    connection: u64,
}

#[derive(Debug)]
struct Shared {
    names: RwLock<Arc<[String]>>,
    /// While there is a tokenizer and an engine.
    served: RwLock<Option<Arc<Served>>>,
    /// Requests wait for what is served next.
    held: watch::Sender<bool>,
    snapshot: watch::Receiver<Snapshot>,
    /// Requests that were let in, and whose answers are not read to their ends.
    open: watch::Sender<usize>,
    gate: Gate,
    pool: Pool,
    /// Of all answers.
    unread: Arc<Unread>,
    counts: Arc<Counts>,
}

impl Session {
    /// A session for a model that is to be served by these names, of `max_requests` at a time, with so many
    /// bytes of answers that nobody has read yet, and to be measured by `series`.
    pub(crate) fn new(
        names: Arc<[String]>,
        max_requests: usize,
        unread_bytes: usize,
        snapshot: watch::Receiver<Snapshot>,
        series: Series,
    ) -> Self {
        let (gate, served) = (Gate::new(max_requests), RwLock::default());
        let (names, held) = (RwLock::new(names), watch::Sender::default());
        let open = watch::Sender::default();
        let (pool, unread) = (Pool::default(), Arc::new(Unread::new(unread_bytes)));
        let shared = Shared {
            names,
            served,
            held,
            snapshot,
            open,
            gate,
            pool,
            unread,
            counts: Counts::new(series).into(),
        };
        Session { shared: Arc::new(shared), probed: None, connection: 0 }
    }

    /// There is something to ask from now on.
    pub(crate) fn open(&self, served: Arc<Served>) {
        *self.shared.names.write().unwrap_or_else(PoisonError::into_inner) = served.names.clone();
        self.set(Some(served));
    }

    /// There is nothing to ask from now on.
    pub(crate) fn close(&self) {
        self.set(None);
    }

    /// Requests that come wait, or do so no more.
    pub(crate) fn hold(&self, held: bool) {
        self.shared.held.send_replace(held);
    }

    fn set(&self, served: Option<Arc<Served>>) {
        *self.shared.served.write().unwrap_or_else(PoisonError::into_inner) = served;
    }

    fn get(&self) -> Option<Arc<Served>> {
        let served = || self.shared.served.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.probed.clone().or_else(served)
    }

    /// The engine, while there is one.
    pub(crate) fn engine(&self) -> Option<mpsc::UnboundedSender<Event>> {
        self.get().map(|served| served.engine.clone())
    }

    /// Waits until no request is in progress.
    pub(crate) async fn idle(&self) {
        // The sender is in hand, so this cannot fail.
        let _ = self.shared.open.subscribe().wait_for(|open| *open == 0).await;
    }

    /// The same for the coordinator's own questions, about what is to be served.
    pub(crate) fn probing(&self, probed: Arc<Served>) -> Self {
        Session { probed: Some(probed), ..self.clone() }
    }

    /// The same for requests that come by a connection of this number, whatever it stands for: the connections of a
    /// tenant take turns, and share its places.
    pub fn over(&self, connection: u64) -> Self {
        Session { connection, ..self.clone() }
    }

    /// Name of the model that answers.
    pub fn model(&self) -> String {
        self.names().first().cloned().unwrap_or_default()
    }

    /// Every name by which it may be asked for, that one first.
    pub fn names(&self) -> Arc<[String]> {
        match &self.probed {
            Some(served) => served.names.clone(),
            None => self.shared.names.read().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Requests so far.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Requests so far and in progress, as Status shows them.
    pub(crate) fn requests(&self) -> v1::Requests {
        self.shared.counts.shown(self.in_progress())
    }

    /// Requests in progress.
    pub fn in_progress(&self) -> usize {
        *self.shared.open.borrow()
    }

    /// Whether the model is known, and has a template for chats.
    pub fn has_chat_template(&self) -> bool {
        self.get().is_some_and(|served| served.tokenizer.has_chat_template())
    }

    /// The commit that the model is, if it lies in the hub's cache.
    pub fn commit(&self) -> Option<String> {
        Some(self.get()?.profile.commit.clone())
    }

    /// What the vectors of the model are like, if it embeds, and which prompts it has.
    pub fn sentences(&self) -> Option<v1::Sentences> {
        let served = self.get()?;
        (served.profile.task == Task::Embed).then(|| served.profile.sentences.clone())
    }

    /// The token that stands for a guess, if the model's tokenizer has one.
    pub(crate) fn mask_token(&self) -> Option<u32> {
        self.get()?.tokenizer.mask().map(|(_, id)| id)
    }

    /// Continues a prompt: the answer as it comes.
    ///
    /// # Errors
    /// If a field is out of its bounds, or there is no room. What goes wrong later is the stream's last item.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Generation, SessionError> {
        let mut record = self.arrived("Generate");
        match self.begin(request, &mut record).await {
            Ok((started, pending)) => {
                Ok(Generation { started: Some(started), running: Some((pending, record)) })
            }
            Err(error) => record.end(Err(error)),
        }
    }

    /// Scores of a classifier's classes for each input.
    ///
    /// # Errors
    /// If an input is out of its bounds, there is no room, or one has no answer; the first such error.
    pub async fn classify(&self, request: v1::ClassifyRequest) -> Result<v1::ClassifyResponse, SessionError> {
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::Classify,
            inputs: request.inputs,
            candidates: None,
            ranks: false,
            prompt_name: None,
            deadline_ms: request.deadline_ms,
        };
        let results = self.encode(asked, "Classify", |served, input, reply| {
            let Reply::Vector(logits) = reply else { return None };
            let classes = encode::classification(&served.profile, &logits);
            Some(v1::Classification { classes, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        Ok(v1::ClassifyResponse { results: results.await?, model: self.model() })
    }

    /// Documents by how well they answer a query, best first.
    ///
    /// # Errors
    /// As for [`classify`](Self::classify), and if the model has other than one class.
    pub async fn rerank(&self, request: v1::RerankRequest) -> Result<v1::RerankResponse, SessionError> {
        let pair = |document: String| v1::Input {
            text: Some(request.query.clone()),
            pair: Some(document),
            ..v1::Input::default()
        };
        let asked = encode::Request {
            truncation: request.truncation(),
            task: Task::Classify,
            inputs: request.documents.iter().cloned().map(pair).collect(),
            model: request.model,
            candidates: None,
            ranks: true,
            prompt_name: request.prompt_name,
            deadline_ms: request.deadline_ms,
        };
        let top_n = request.top_n.map_or(usize::MAX, |n| n as usize);
        if top_n == 0 {
            let error = AdmissionError::Field { field: "top_n", why: "0: expected at least 1".to_owned() };
            return self.arrived("Rerank").end(Err(error.into()));
        }
        let mut index = 0;
        let ranked = self.encode(asked, "Rerank", |served, input, reply| {
            let Reply::Vector(logits) = reply else { return None };
            let logit = encode::rank(&logits)?;
            index += 1;
            Some(v1::RankedDocument {
                index: index - 1,
                score: encode::single_score(served.profile.ranking, logit),
                logit,
                tokens: input.tokens,
                dropped_tokens: input.dropped,
            })
        });
        let mut results = ranked.await?;
        // The sort is stable: of equals, the first is the one that was given first.
        results.sort_by(|a, b| b.logit.total_cmp(&a.logit));
        results.truncate(top_n);
        Ok(v1::RerankResponse { results, model: self.model() })
    }

    /// A vector for each input.
    ///
    /// # Errors
    /// As for [`classify`](Self::classify).
    pub async fn embed(&self, request: v1::EmbedRequest) -> Result<v1::EmbedResponse, SessionError> {
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::Embed,
            inputs: request.inputs,
            candidates: None,
            ranks: false,
            prompt_name: request.prompt_name,
            deadline_ms: request.deadline_ms,
        };
        let results = self.encode(asked, "Embed", |_, input, reply| {
            let Reply::Vector(values) = reply else { return None };
            Some(v1::Embedding { values, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        Ok(v1::EmbedResponse { results: results.await?, model: self.model() })
    }

    /// The likeliest tokens for each mask of each input.
    ///
    /// # Errors
    /// As for [`classify`](Self::classify).
    pub async fn fill_masks(
        &self,
        request: v1::FillMaskRequest,
    ) -> Result<v1::FillMaskResponse, SessionError> {
        let asked = encode::Request {
            truncation: request.truncation(),
            model: request.model,
            task: Task::FillMask,
            inputs: request.inputs,
            candidates: Some(request.top_k.unwrap_or(bounds::DEFAULT_CANDIDATES)),
            ranks: false,
            prompt_name: None,
            deadline_ms: request.deadline_ms,
        };
        let results = self.encode(asked, "FillMask", |served, input, reply| {
            let Reply::Guesses(guesses) = reply else { return None };
            let candidate = |c: v1::Alternative| v1::Candidate {
                token_id: c.token_id,
                // An id without a text is shown as none.
                text: served.tokenizer.decode(&[c.token_id], true).unwrap_or_default(),
                score: c.logprob.exp(),
            };
            let masks = input.positions.iter().zip(guesses).map(|(position, top)| v1::FilledMask {
                position: *position,
                candidates: top.into_iter().map(candidate).collect(),
            });
            let masks = masks.collect();
            Some(v1::FilledMasks { masks, tokens: input.tokens, dropped_tokens: input.dropped })
        });
        Ok(v1::FillMaskResponse { results: results.await?, model: self.model() })
    }

    /// The ids of a text, as Generate would read it.
    ///
    /// # Errors
    /// If the text is too long, or there is no room.
    pub async fn tokenize(&self, request: v1::TokenizeRequest) -> Result<v1::TokenizeResponse, SessionError> {
        let mut record = self.arrived("Tokenize");
        let names = self.names();
        let token_ids = self.let_in(&mut record, request.text.len(), move |served| {
            bounds::check_model(&request.model, &names)?;
            bounds::check_text("text", &request.text)?;
            Ok(served.tokenizer.encode(&request.text, !request.plain)?)
        });
        let token_ids = token_ids.await.map(|(_, ids)| ids);
        record.prompt_tokens = token_ids.as_ref().map_or(0, |ids| ids.len() as u32);
        record.end(token_ids.map(|token_ids| v1::TokenizeResponse { token_ids }))
    }

    /// The text of ids.
    ///
    /// # Errors
    /// If there are too many ids, one is no token, or there is no room.
    pub async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, SessionError> {
        let mut record = self.arrived("Detokenize");
        record.prompt_tokens = request.token_ids.len() as u32;
        let names = self.names();
        let bytes = size_of_val(request.token_ids.as_slice());
        let text = self.let_in(&mut record, bytes, move |served| {
            bounds::check_model(&request.model, &names)?;
            let field = |why| AdmissionError::Field { field: "token_ids", why };
            if request.token_ids.len() > MAX_IDS {
                let count = request.token_ids.len();
                return Err(field(format!("{count} ids are too many: at most {MAX_IDS}")));
            }
            let rows = served.profile.vocab_size;
            if let Some(id) = request.token_ids.iter().find(|id| **id >= rows) {
                return Err(field(format!("id {id} is unknown: expected less than {rows}")));
            }
            Ok(served.tokenizer.decode(&request.token_ids, request.keep_special)?)
        });
        let text = text.await;
        record.end(text.map(|(_, text)| v1::DetokenizeResponse { text }))
    }

    fn arrived(&self, call: &'static str) -> Record {
        let counts = self.probed.is_none().then(|| self.shared.counts.clone());
        Record::begin(counts, call, self.model().into())
    }

    /// Takes a place, which costs nothing, and then runs work on `bytes` of a request, which costs memory and time, off
    /// the async threads.
    async fn let_in<T: Send + 'static>(
        &self,
        record: &mut Record,
        bytes: usize,
        work: impl FnOnce(&Served) -> Result<T, AdmissionError> + Send + 'static,
    ) -> Result<(Arc<Served>, T), SessionError> {
        let mut held = self.shared.held.subscribe();
        let waits = *held.borrow_and_update() && self.probed.is_none();
        if !waits {
            self.served()?;
        }
        if let Some(most) = self.shared.unread.exceeded() {
            return Err(AdmissionError::Unread { most }.into());
        }
        record.permit = Some(Arc::new(self.shared.gate.enter(&record.tenant, self.connection)?));
        record.open = Some(Open::new(&self.shared.open));
        if waits {
            // If it takes longer, it is as if nothing were served.
            let _ = tokio::time::timeout(HELD_TIMEOUT, held.wait_for(|held| !held)).await;
        }
        let served = self.served()?;
        let at_work = served.clone();
        let done = self.shared.pool.run(bytes, move || work(&at_work)).await?;
        Ok((served, done))
    }

    /// What is served, if requests are taken.
    fn served(&self) -> Result<Arc<Served>, SessionError> {
        let snapshot = self.shared.snapshot.borrow();
        match (snapshot.state, self.get()) {
            (State::Serving, Some(served)) => Ok(served),
            (State::Starting, Some(served)) if self.probed.is_some() => Ok(served),
            (State::Draining, _) => Err(SessionError::Draining),
            _ => Err(SessionError::NotYet(snapshot.reason())),
        }
    }

    /// Lets a generation in and hands it to the engine, which takes it.
    async fn begin(
        &self,
        request: v1::GenerateRequest,
        record: &mut Record,
    ) -> Result<(v1::Started, Pending), SessionError> {
        bounds::check_model(&request.model, &self.names())?;
        bounds::check_tenant(&request.tenant)?;
        record.tenant = request.tenant.as_str().into();
        // While no pipeline is up its capacity is unknown; the scheduler checks again when there is one.
        let snapshot = self.shared.snapshot.clone();
        let checking = self.let_in(record, generate::bytes(&request), move |served| {
            let capacity = match snapshot.borrow().capacity {
                0 => u64::MAX,
                capacity => capacity,
            };
            let limit = served.longest.within_cache(capacity, served.is_cache_chosen);
            generate::check(request, &served.tokenizer, &served.profile, limit)
        });
        let (served, checked) = checking.await?;
        record.prompt_tokens = checked.prompt.len() as u32;
        record.most_tokens = Some(checked.max_tokens);
        let started = v1::Started {
            request_id: record.id.to_string(),
            model: self.model(),
            prompt_token_ids: checked.prompt.clone(),
            seed: checked.seed,
        };
        let asked = Asked::Generate(Box::new(checked));
        let mut pending = self.submit(&served, asked, record)?;
        record.permit = None;
        match pending.next().await? {
            Reply::Accepted(_) => Ok((started, pending)),
            _ => Err(EngineError::Internal.into()),
        }
    }

    fn submit(&self, served: &Served, request: Asked, record: &Record) -> Result<Pending, EngineError> {
        let (connection, arrived) = (self.connection, record.arrived);
        // The place is free when the engine is done, however long it takes to read the answer.
        let (reply, replies) = replies(self.shared.unread.clone(), record.permit.clone());
        Pending::submit(&served.engine, Submission { request, connection, arrived, reply }, replies)
    }

    /// Has every input computed, and makes an answer of each with `answer`.
    async fn encode<T>(
        &self,
        asked: encode::Request,
        call: &'static str,
        answer: impl FnMut(&Served, Sent, Reply) -> Option<T>,
    ) -> Result<Vec<T>, SessionError> {
        let (model, bytes) = (asked.model.clone(), encode::bytes(&asked));
        let check = move |served: &Served| {
            encode::check(asked, &served.tokenizer, &served.profile, served.longest_input)
        };
        self.compute((call, &model, bytes), check, answer).await
    }

    /// The same of inputs that `check` makes of a call's so many bytes.
    async fn compute<T>(
        &self,
        (call, model, bytes): (&'static str, &str, usize),
        check: impl FnOnce(&Served) -> Result<Checked, AdmissionError> + Send + 'static,
        answer: impl FnMut(&Served, Sent, Reply) -> Option<T>,
    ) -> Result<Vec<T>, SessionError> {
        let mut record = self.arrived(call);
        let answers = match bounds::check_model(model, &self.names()) {
            Ok(()) => self.compute_all(bytes, &mut record, check, answer).await,
            Err(error) => Err(error.into()),
        };
        record.end(answers)
    }

    async fn compute_all<T>(
        &self,
        bytes: usize,
        record: &mut Record,
        check: impl FnOnce(&Served) -> Result<Checked, AdmissionError> + Send + 'static,
        mut answer: impl FnMut(&Served, Sent, Reply) -> Option<T>,
    ) -> Result<Vec<T>, SessionError> {
        let (served, (inputs, deadline)) = self.let_in(record, bytes, check).await?;
        let mut waiting = Vec::with_capacity(inputs.len());
        for mut input in inputs {
            let sent = Sent {
                places: std::mem::take(&mut input.places),
                tokens: input.ids.len() as u32,
                dropped: input.dropped,
                positions: input.encode.positions.clone(),
            };
            record.prompt_tokens += sent.tokens;
            let asked = Asked::Encode(input, deadline);
            waiting.push((sent, self.submit(&served, asked, record)?));
        }
        record.permit = None;
        let mut answers = Vec::with_capacity(waiting.len());
        for (sent, mut pending) in waiting {
            let reply = loop {
                match pending.next().await? {
                    Reply::Accepted(_) => {}
                    Reply::Begun(at) => drop(record.begun.get_or_insert(at)),
                    reply => break reply,
                }
            };
            answers.push(answer(&served, sent, reply).ok_or(EngineError::Internal)?);
        }
        Ok(answers)
    }
}

/// What is remembered of an input until its answer comes.
struct Sent {
    tokens: u32,
    dropped: u32,
    positions: Vec<u32>,
    places: Vec<Place>,
}
