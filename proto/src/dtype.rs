//! Formats: floating-point ones of residual stream, wire and cache, and those that weights are held in.

use std::{fmt, str::FromStr};

use serde::Serialize;

use crate::error::quoted;

/// A floating-point format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE binary16.
    F16,
}

impl DType {
    /// Every format, widest first.
    pub const ALL: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    /// Bytes of one element.
    pub fn size(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::BF16 | DType::F16 => 2,
        }
    }

    /// The name used on the command line and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = String;

    /// By its name, or one of PyTorch's.
    fn from_str(s: &str) -> Result<Self, String> {
        let name = match s {
            "float32" | "float" => "f32",
            "bfloat16" => "bf16",
            "float16" | "half" => "f16",
            name => name,
        };
        DType::ALL
            .into_iter()
            .find(|d| d.name() == name)
            .ok_or_else(|| format!("unknown dtype {}: expected f32, bf16 or f16", quoted(s)))
    }
}

/// A format that weights are turned into when they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// Groups of 32 signed bytes with a factor in f16 (`Q8_0`).
    Int8,
    /// Groups of 32 four-bit values with a factor and an offset in f16 (`Q4_1`); some tensors stay
    /// [`Int8`](Self::Int8).
    Int4,
}

impl Quantization {
    /// Every one.
    pub const ALL: [Quantization; 2] = [Quantization::Int8, Quantization::Int4];

    /// The name used on the command line and on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        }
    }

    /// What a message says: nothing, or a name.
    pub fn from_wire(name: &str) -> Result<Option<Self>, String> {
        if name.is_empty() { Ok(None) } else { name.parse().map(Some) }
    }

    /// What a message is to say.
    pub fn to_wire(this: Option<Self>) -> String {
        this.map_or(String::new(), |q| q.name().to_owned())
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Quantization::ALL
            .into_iter()
            .find(|q| q.name() == s)
            .ok_or_else(|| format!("unknown quantization {}: expected int8 or int4", quoted(s)))
    }
}

/// A format that weights are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Format {
    /// As numbers of their own.
    Float(DType),
    /// In groups.
    Quantized(Quantization),
}

impl Format {
    /// Every one, widest first.
    pub const ALL: [Format; 5] = [
        Format::Float(DType::F32),
        Format::Float(DType::BF16),
        Format::Float(DType::F16),
        Format::Quantized(Quantization::Int8),
        Format::Quantized(Quantization::Int4),
    ];

    /// That of a plan's weights.
    pub fn of(dtype: DType, quantization: Option<Quantization>) -> Self {
        quantization.map_or(Format::Float(dtype), Format::Quantized)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Float(dtype) => dtype.fmt(f),
            Format::Quantized(quantization) => quantization.fmt(f),
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Format::ALL
            .into_iter()
            .find(|f| f.to_string() == s)
            .ok_or_else(|| format!("unknown format {}: expected f32, bf16, f16, int8 or int4", quoted(s)))
    }
}
