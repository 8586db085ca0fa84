//! A model whose every token depends on the whole sequence before it, by way of what is in the cache, and which computes the
//! same however it is split.

use strata_proto::{
    BLOCK_TOKENS, DType, Device, DeviceKind, Files, Format, LayerRange, ModelProfile, StateRoom, v1,
};

use super::random::mix;
use crate::planner::tests::{device, profile};

pub const MODEL: &str = "m";
pub const LAYERS: usize = 6;
pub const VOCABULARY: u32 = 64;
/// Ends an answer.
pub const EOS: u32 = 0;
/// Most positions of a sequence.
pub const CONTEXT: u32 = 96;
/// Positions of a cache: few, so that sequences preempt each other.
pub const CACHE: u64 = 160;
pub const STEP_TOKENS: u32 = 32;
pub const STEP_ROWS: u32 = 8;
/// Bytes of a layer.
const LAYER_BYTES: u64 = 1000;

pub fn described() -> ModelProfile {
    ModelProfile {
        vocab_size: VOCABULARY,
        context_length: CONTEXT,
        eos_token_ids: vec![EOS],
        tokenizers: vec!["WordLevel".into()],
        ..profile(&[(LAYER_BYTES, 1); LAYERS], 16, false)
    }
}

/// A device with room for so many layers and what they need beside their weights.
pub fn offered(layers: u64) -> Device {
    let budget = layers * (LAYER_BYTES + 4 * 4 * CACHE) + 1000;
    device(DeviceKind::Cuda, "d", budget, true).device
}

/// A tokenizer of as many words as the model knows.
pub fn tokenizer() -> Files {
    let words: Vec<_> = (0..VOCABULARY).map(|id| format!("\"w{id}\":{id}")).collect();
    let model = format!(r#"{{"type":"WordLevel","unk_token":"w1","vocab":{{{}}}}}"#, words.join(","));
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{{"type":"WhitespaceSplit"}},"post_processor":null,"decoder":null,"model":{model}}}"#
    );
    Files::from([("tokenizer.json".to_owned(), json.into_bytes())])
}

pub fn layers_of(spec: &v1::StageSpec) -> LayerRange {
    spec.layers.unwrap_or_default().into()
}

/// What a stage says when it has loaded.
pub fn loaded(spec: &v1::StageSpec) -> v1::LoadProgress {
    let layers = layers_of(spec);
    let digest = |module: u32| vec![module as u8; strata_proto::Digest::BYTES].into();
    let digests = v1::WeightDigests {
        embedding: spec.embedding.then(|| digest(100)),
        layers: (layers.first..layers.end).map(digest).collect(),
        head: spec.head.then(|| digest(101)),
    };
    let resident_bytes = Some(described().weight_bytes(layers, Format::Float(DType::F32)));
    v1::LoadProgress { resident_bytes, digests: Some(digests), ..v1::LoadProgress::default() }
}

/// What a stage says when it is prepared.
pub fn prepared(request: &v1::PrepareRequest, link_address: String) -> v1::Prepared {
    let layers = layers_of(&request.spec.clone().unwrap_or_default());
    let (profile, positions) = (described(), u64::from(request.kv_blocks) * u64::from(BLOCK_TOKENS));
    let room = StateRoom { positions, slots: request.state_slots };
    v1::Prepared {
        states: Some(profile.state_bytes(layers, DType::F32, room).into()),
        workspace_bytes: profile.workspace_bytes(layers, request.max_step_tokens, request.max_step_rows),
        link_address,
        ..v1::Prepared::default()
    }
}

/// The residual stream of a token where it begins.
pub fn embed(token: u32, position: u32) -> u64 {
    mix(u64::from(token) + 1, u64::from(position))
}

/// What a layer keeps of a position.
pub fn key(x: u64, layer: u32) -> u64 {
    mix(x, u64::from(layer))
}

/// What attention makes of one key more.
pub fn attend(so_far: u64, key: u64) -> u64 {
    mix(so_far, key)
}

/// The residual stream behind a layer.
pub fn layer(x: u64, attended: u64) -> u64 {
    mix(attended, x)
}

/// The token that the head chooses.
pub fn choose(x: u64) -> u32 {
    (x % u64::from(VOCABULARY)) as u32
}

/// The same computed at once, without any cache: what follows each token of a sequence.
#[derive(Debug, Clone, Default)]
pub struct Oracle {
    attended: [u64; LAYERS],
    positions: u32,
    next: u32,
}

impl Oracle {
    pub fn push(&mut self, token: u32) {
        let mut x = embed(token, self.positions);
        for (at, attended) in self.attended.iter_mut().enumerate() {
            *attended = attend(*attended, key(x, at as u32));
            x = layer(x, *attended);
        }
        self.positions += 1;
        self.next = choose(x);
    }

    /// What follows.
    pub fn next(&self) -> u32 {
        self.next
    }
}
