//! Sizes and times that a coordinator and its workers must agree on.

use std::time::Duration;

/// Token positions in one block of KV memory.
pub const BLOCK_TOKENS: u32 = 16;

/// Largest message of the internal service, in bytes: a step with its token ids, or one row of logits.
pub const MAX_STAGE_MESSAGE: usize = 64 << 20;

/// Largest list of headers that servers and clients take, in bytes, as HTTP/2 counts them.
pub const MAX_HEADER_LIST: u32 = 64 << 10;

/// Most bytes of all the small files that travel with a model, the tokenizer's above all.
pub const MAX_MODEL_FILES: u64 = 256 << 20;

/// Bytes of the secret that names a link.
pub const LINK_TOKEN_BYTES: usize = 32;

/// Bytes of an NCCL id.
pub const NCCL_ID_BYTES: usize = 128;

/// How often either end of a connection between coordinator and worker asks whether the other is there.
pub const PING_EVERY: Duration = Duration::from_secs(2);
/// How long the answer may take, before the connection counts as broken.
pub const PING_TIMEOUT: Duration = Duration::from_secs(3);
