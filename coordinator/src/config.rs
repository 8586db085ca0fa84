//! What is to be served, over whom, and within which limits: validated values, read by everybody.

use std::{ops::RangeInclusive, time::Duration};

use strata_proto::{DType, LinkKind, ModelProfile, Quantization, Secret, v1::Task};

use crate::{planner::Split, preflight::Check};

/// Most tokens in one step, unless told otherwise.
pub const MAX_STEP_TOKENS: u32 = 512;
/// Most rows with an output in one step, unless told otherwise.
pub const MAX_STEP_ROWS: u32 = 128;
/// Most prompt tokens of one sequence in one step, unless told otherwise.
pub const PREFILL_CHUNK: u32 = 256;
/// Longest that prompts keep those who decode waiting, unless told otherwise.
pub const INTER_TOKEN: Duration = Duration::from_millis(200);
/// Most requests in progress or waiting, unless told otherwise.
pub const MAX_REQUESTS: u32 = 512;
/// How many copies of the model a deployment may ask for.
pub const REPLICAS: RangeInclusive<u32> = 1..=64;
/// How many devices it may keep free.
pub const STANDBYS: RangeInclusive<u32> = 0..=64;
/// For how many full contexts its cache may be.
pub const SEQUENCES: RangeInclusive<u32> = 1..=65536;
/// How long its longest sequence may be.
pub const CONTEXT: RangeInclusive<u32> = 2..=u32::MAX;
/// How large its cache may be, in tokens.
pub const KV_TOKENS: RangeInclusive<u64> = 1..=u64::MAX;
/// How long workers have to join, unless told otherwise.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(120);

/// Silence after which somebody counts as lost, unless told otherwise.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// Most connections of clients at a time, unless told otherwise.
pub const MAX_CONNECTIONS: u32 = 1024;
/// Longest that an answer waits for its client to read on, unless told otherwise.
pub const SLOW_READER: Duration = Duration::from_secs(30);
/// Most bytes of requests that have not come whole, and of answers that were not read.
const MAX_BUFFERED: usize = 256 << 20;
/// How long a request may take to come whole.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything a coordinator needs to know.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// What is served.
    pub deployment: Deployment,
    /// Bounds on requests.
    pub limits: Limits,
    /// Bounds on clients of its port.
    pub clients: ClientLimits,
    /// Workers to wait for before the first plan; none: as many as come, over whom it can be planned.
    pub expected_members: Option<usize>,
    /// How long to wait for them, if so many are expected.
    pub join_timeout: Duration,
    /// Checks whose failure does not keep the deployment from serving.
    pub skip_checks: Vec<Check>,
    /// Names by which clients ask for the model; none: the deployment's. The first is what answers say.
    pub names: Vec<String>,
    /// The program's version, as Status is to say it.
    pub version: String,
    /// What operators' calls have to prove; none: that they come from this machine.
    pub secret: Option<Secret>,
}

impl CoordinatorConfig {
    /// A model as it is, over the first so many workers, with the limits that a server has unless told otherwise.
    pub fn new(model: impl Into<String>, workers: usize) -> Self {
        CoordinatorConfig {
            deployment: Deployment {
                model: model.into(),
                ignore_tensors: Vec::new(),
                weights: None,
                split: Split::Auto,
                dtype: None,
                quantization: None,
                kv_tokens: None,
                max_sequences: None,
                context: None,
                replicas: None,
                standbys: 0,
                links: None,
                max_step_tokens: MAX_STEP_TOKENS,
                max_step_rows: MAX_STEP_ROWS,
                heartbeat_timeout: HEARTBEAT_TIMEOUT,
            },
            limits: Limits::default(),
            clients: ClientLimits::default(),
            expected_members: Some(workers),
            join_timeout: JOIN_TIMEOUT,
            skip_checks: Vec::new(),
            names: Vec::new(),
            version: String::new(),
            secret: None,
        }
    }
}

/// What is to be served, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// Model name.
    pub model: String,
    /// Patterns of names of tensors that it may have without a use: `*` stands for any text, `?` for a character.
    pub ignore_tensors: Vec<String>,
    /// Digest that its weights must have, in hexadecimal; `None` is that of what is loaded first.
    pub weights: Option<String>,
    /// How layers are split.
    pub split: Split,
    /// Format; `None` is the checkpoint's.
    pub dtype: Option<DType>,
    /// What weights are turned into when they are loaded; `None` leaves them as the checkpoint has them, or, with a `dtype`, makes
    /// numbers of them.
    pub quantization: Option<Quantization>,
    /// Size of the cache, in tokens; `None` is 16 contexts, or what fits.
    pub kv_tokens: Option<u64>,
    /// Size of the cache in full contexts, where `kv_tokens` is not set.
    pub max_sequences: Option<u32>,
    /// Longest sequence, if shorter than the model's context.
    pub context: Option<u32>,
    /// Most copies of the model; `None` is as many as `auto` finds room for.
    pub replicas: Option<u32>,
    /// Devices to keep free of stages, each of which holds the weights of one and takes it over when it is lost.
    pub standbys: u32,
    /// Forced link kind; `None` is the best that each two stages can have.
    pub links: Option<LinkKind>,
    /// Most tokens in one step.
    pub max_step_tokens: u32,
    /// Most rows in one step, each counted by its outputs: one, or as many as it has masks, and one more for each
    /// draft.
    pub max_step_rows: u32,
    /// Silence after which a stage counts as lost, and a stage's neighbour or coordinator to the stage. Of whole
    /// milliseconds.
    pub heartbeat_timeout: Duration,
}

impl Deployment {
    /// The format of what is computed, and what weights are quantized to: a checkpoint that is quantized stays so unless the
    /// deployment names a format.
    pub fn formats(&self, profile: &ModelProfile) -> (DType, Option<Quantization>) {
        let stored = profile.quantization.filter(|_| self.dtype.is_none());
        (self.dtype.unwrap_or(profile.dtype), self.quantization.or(stored))
    }

    /// The heartbeat timeout as calls carry it.
    pub(crate) fn heartbeat_timeout_ms(&self) -> u32 {
        u32::try_from(self.heartbeat_timeout.as_millis()).unwrap_or(u32::MAX)
    }

    /// Most outputs in one step: as many as tokens, of a model that says something of each.
    pub(crate) fn step_rows(&self, profile: &ModelProfile) -> u32 {
        match profile.task {
            Task::ClassifyTokens | Task::Answer => self.max_step_tokens,
            _ => self.max_step_rows,
        }
    }

    /// The longest sequence that is served.
    pub(crate) fn context_of(&self, profile: &ModelProfile) -> u32 {
        self.context.map_or(profile.context_length, |c| c.min(profile.context_length))
    }
}

/// Limits of the scheduler that are not part of the plan.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most prompt tokens of one sequence in one step.
    pub prefill_chunk: u32,
    /// Longest that those who decode are to wait for a token because of others' prompts; zero is as long as it takes.
    pub inter_token: Duration,
    /// Prompts that begin alike are computed once, within a tenant.
    pub prefix_cache: bool,
    /// Most requests in progress or waiting.
    pub max_requests: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            prefill_chunk: PREFILL_CHUNK,
            inter_token: INTER_TOKEN,
            prefix_cache: true,
            max_requests: MAX_REQUESTS as usize,
        }
    }
}

/// Bounds on what clients of the port may hold.
#[derive(Debug, Clone)]
pub struct ClientLimits {
    /// Most connections at a time.
    pub connections: usize,
    /// Most bytes of requests that have not come whole; a quarter of them for one connection.
    pub unfinished_bytes: usize,
    /// How long a request may take to come whole.
    pub request_timeout: Duration,
    /// Most bytes of answers that were not read.
    pub unread_bytes: usize,
    /// Longest that an answer waits for its client to read on.
    pub slow_reader: Duration,
}

impl Default for ClientLimits {
    fn default() -> Self {
        ClientLimits {
            connections: MAX_CONNECTIONS as usize,
            unfinished_bytes: MAX_BUFFERED,
            request_timeout: REQUEST_TIMEOUT,
            unread_bytes: MAX_BUFFERED,
            slow_reader: SLOW_READER,
        }
    }
}
