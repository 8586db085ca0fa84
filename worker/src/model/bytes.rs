//! Bytes of a stage, counted without loading anything: of its weights, and of what it keeps between steps. Every engine
//! allocates as many.

use strata_proto::{DType, Format, Quantization};

use super::{
    Model, RangeSpec,
    architecture::{Shape, Site, Slot},
    range::parts,
    widths,
};
use crate::kernels::{
    buffer::Buffer,
    cpu::packed::{PackedMatrix, Table},
    ops::BLOCK_TOKENS,
};

/// Bytes that all weights of `site` occupy.
pub(super) fn of_site(model: &Model, site: Site, format: Format) -> u64 {
    of_parts(model, site, format, |_| true)
}

/// Bytes of one expert among them.
pub(super) fn of_expert(model: &Model, site: Site, format: Format) -> u64 {
    of_parts(model, site, format, |key| [(Slot::GateUp, 0), (Slot::Down, 0)].contains(&key))
}

fn of_parts(model: &Model, site: Site, format: Format, which: impl Fn((Slot, usize)) -> bool) -> u64 {
    let parts = parts(model, site).filter(|(key, _)| which(*key));
    parts
        .map(|(key, shape)| part_bytes(shape, model.has_bias(site, key), held(model, site, key.0, format)))
        .sum()
}

/// Bytes of the weights of a stage.
pub(crate) fn of_weights(model: &Model, spec: &RangeSpec) -> u64 {
    let of = |site| {
        let part = move |(key, shape): ((Slot, usize), Shape)| {
            part_bytes(shape, model.has_bias(site, key), held(model, site, key.0, spec.format()))
        };
        spec.parts(model, site).map(part).sum::<u64>()
    };
    spec.sites(model).map(of).sum()
}

/// Bytes of cache and scratch of a stage with `kv_blocks` blocks, for steps of at most `tokens` tokens and, with the
/// head, `outputs` output rows.
pub(crate) fn of_state(model: &Model, spec: &RangeSpec, kv_blocks: u32, tokens: u32, outputs: u32) -> u64 {
    let layers = spec.layers.first as usize..spec.layers.end as usize;
    let states = layers.flat_map(|layer| model.tower.states(layer));
    let elements: u64 = states.map(|state| state.own_elements()).sum();
    let outputs = if spec.head { u64::from(outputs) } else { 0 };
    u64::from(kv_blocks) * BLOCK_TOKENS as u64 * elements * spec.dtype.size()
        + widths::bytes_per_token(&model.tower) * widths::padded(tokens) as u64
        + widths::bytes_per_output(&model.tower) * outputs
}

/// Bytes that what fills a slot occupies.
pub(crate) fn part_bytes(shape: Shape, biased: bool, format: Format) -> u64 {
    let bias = |n| if biased { Buffer::<f32>::bytes_for(n) } else { 0 };
    match shape {
        Shape::Norm(n) => Buffer::<f32>::bytes_for(n) + bias(n),
        Shape::Table(n, k) => Table::bytes_for(n, k, format),
        Shape::Product(n, k) => PackedMatrix::bytes_for(n, k, format) + bias(n),
    }
}

/// The format that a slot of `site` is held in where `format` is asked for.
///
/// Routers decide, so theirs is f32; so are what is added to scores. The head, and the embedding that may be the same tensor, keep eight bits: their
/// errors go straight into what is given out. So does the first layer, whose errors go through all others (measured in
/// tests/bench/README.md). Small tables are not worth rounding. Of a checkpoint that is quantized, what has more than four bits
/// keeps eight, and what has four, whichever layer's, is held in four.
pub(crate) fn held(model: &Model, site: Site, slot: Slot, format: Format) -> Format {
    let int8 = Format::Quantized(Quantization::Int8);
    match (site, slot, format) {
        (_, Slot::Router | Slot::SharedRouter | Slot::PositionBias | Slot::Distances, _) => {
            Format::Float(DType::F32)
        }
        (
            _,
            Slot::Head | Slot::Embedding | Slot::InputProjection | Slot::Refinement(_),
            Format::Quantized(_),
        ) => int8,
        (_, Slot::Positions | Slot::Segments, Format::Quantized(_)) => Format::Float(DType::BF16),
        (_, _, Format::Quantized(Quantization::Int4)) if model.stored.is_some() => {
            let four_bits = model.stored.as_ref().is_some_and(|stored| stored.is_four_bits(site, slot));
            if four_bits { format } else { int8 }
        }
        (Site::Layer(0), _, Format::Quantized(_)) => int8,
        _ => format,
    }
}
