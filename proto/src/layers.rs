//! Which layers of a model: the unit of plans, profiles and states.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeTuple};

use crate::v1;

/// Layers `first..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerRange {
    /// First layer.
    pub first: u32,
    /// One past the last layer.
    pub end: u32,
}

impl LayerRange {
    /// Layers `first..end`.
    pub fn new(first: u32, end: u32) -> Self {
        LayerRange { first, end }
    }

    /// Number of layers.
    pub fn len(self) -> u32 {
        self.end.saturating_sub(self.first)
    }

    /// Whether there is no layer in it.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end)
    }
}

impl Serialize for LayerRange {
    /// As `[first, end]`, half-open.
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut pair = s.serialize_tuple(2)?;
        pair.serialize_element(&self.first)?;
        pair.serialize_element(&self.end)?;
        pair.end()
    }
}

impl From<LayerRange> for v1::LayerRange {
    fn from(r: LayerRange) -> Self {
        v1::LayerRange { first: r.first, end: r.end }
    }
}

impl From<v1::LayerRange> for LayerRange {
    fn from(r: v1::LayerRange) -> Self {
        LayerRange { first: r.first, end: r.end }
    }
}
