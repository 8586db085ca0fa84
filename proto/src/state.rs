//! What a layer keeps of a sequence between steps, by kind, and the bytes it takes.

use serde::Serialize;

use crate::{LayerRange, v1};

/// Kinds of state that a sequence can have in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateKind {
    /// Keys and values of each position, in blocks.
    PagedKv,
    /// Something of a fixed size that every step replaces.
    Recurrent,
    /// Keys and values of the encoder's positions, which stay as they are once they are computed.
    CrossKv,
}

impl StateKind {
    /// All of them.
    pub const ALL: [StateKind; 3] = [StateKind::PagedKv, StateKind::Recurrent, StateKind::CrossKv];
}

/// One state of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerState {
    /// What it is.
    pub kind: StateKind,
    /// Elements, in the format of the cache: per position of the sequence (`PagedKv`), per sequence (`Recurrent`), or
    /// per position of the encoder's input (`CrossKv`).
    pub elements: u64,
    /// The earlier layer whose state this is. Then it takes no bytes of its own, and both layers are in one stage.
    pub shares: Option<u32>,
}

impl LayerState {
    /// The state of a layer that has its own.
    pub fn own(kind: StateKind, elements: u64) -> Self {
        LayerState { kind, elements, shares: None }
    }

    /// Elements that it takes beside the state it shares.
    pub fn own_elements(&self) -> u64 {
        if self.shares.is_some() { 0 } else { self.elements }
    }
}

/// For how much state there is room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateRoom {
    /// Token positions of paged keys and values.
    pub positions: u64,
    /// Sequences with a state of fixed size at once.
    pub slots: u32,
}

/// Bytes of the states of some layers, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StateBytes {
    /// Of paged keys and values.
    #[serde(rename = "kv_bytes")]
    pub paged_kv: u64,
    /// Of recurrent states.
    #[serde(rename = "recurrent_bytes")]
    pub recurrent: u64,
    /// Of keys and values of the encoder's input.
    #[serde(rename = "cross_kv_bytes")]
    pub cross_kv: u64,
}

impl StateBytes {
    /// All of them together.
    pub fn total(&self) -> u64 {
        self.paged_kv.saturating_add(self.recurrent).saturating_add(self.cross_kv)
    }

    /// Bytes of one kind.
    pub fn of(&mut self, kind: StateKind) -> &mut u64 {
        match kind {
            StateKind::PagedKv => &mut self.paged_kv,
            StateKind::Recurrent => &mut self.recurrent,
            StateKind::CrossKv => &mut self.cross_kv,
        }
    }
}

/// Layers that one input goes through: those of a decoder, or of an encoder. A model has one or several, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stack {
    /// Which layers.
    pub layers: LayerRange,
    /// Its input is computed whole, in one step: each position sees those behind it too.
    pub whole_input: bool,
    /// Most positions of its input.
    pub positions: u32,
}

impl From<StateKind> for v1::StateKind {
    fn from(kind: StateKind) -> Self {
        match kind {
            StateKind::PagedKv => v1::StateKind::PagedKv,
            StateKind::Recurrent => v1::StateKind::Recurrent,
            StateKind::CrossKv => v1::StateKind::CrossKv,
        }
    }
}

impl From<LayerState> for v1::LayerState {
    fn from(s: LayerState) -> Self {
        v1::LayerState { kind: v1::StateKind::from(s.kind) as i32, elements: s.elements, shares: s.shares }
    }
}

impl TryFrom<v1::LayerState> for LayerState {
    type Error = String;

    fn try_from(s: v1::LayerState) -> Result<Self, String> {
        let kind = match s.kind() {
            v1::StateKind::PagedKv => StateKind::PagedKv,
            v1::StateKind::Recurrent => StateKind::Recurrent,
            v1::StateKind::CrossKv => StateKind::CrossKv,
            v1::StateKind::Unspecified => {
                return Err(format!("a state of kind {} is unknown to this build: upgrade it", s.kind));
            }
        };
        Ok(LayerState { kind, elements: s.elements, shares: s.shares })
    }
}

impl From<StateBytes> for v1::StateBytes {
    fn from(b: StateBytes) -> Self {
        v1::StateBytes { paged_kv: b.paged_kv, recurrent: b.recurrent, cross_kv: b.cross_kv }
    }
}

impl From<v1::StateBytes> for StateBytes {
    fn from(b: v1::StateBytes) -> Self {
        StateBytes { paged_kv: b.paged_kv, recurrent: b.recurrent, cross_kv: b.cross_kv }
    }
}

impl From<Stack> for v1::Stack {
    fn from(s: Stack) -> Self {
        v1::Stack { layers: Some(s.layers.into()), whole_input: s.whole_input, positions: s.positions }
    }
}

impl TryFrom<v1::Stack> for Stack {
    type Error = String;

    fn try_from(s: v1::Stack) -> Result<Self, String> {
        let layers = s.layers.ok_or("a stack has no layers")?.into();
        Ok(Stack { layers, whole_input: s.whole_input, positions: s.positions })
    }
}
