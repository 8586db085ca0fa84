//! A model in GGUF files: where its tensors are, by llama.cpp's names, and what of it four bits hold.

use std::collections::BTreeSet;

use strata_proto::Quantization;

use super::{
    Model,
    architecture::{Names, Site, Slot, Source},
};
use crate::weights::{Checkpoint, gguf::Gguf};

/// The tensors of every architecture; a slot that a model does not have is not looked for.
const SLOTS: &[(Slot, Source)] = &[
    (Slot::Embedding, Source::Rows("token_embd")),
    (Slot::Positions, Source::Rows("position_embd")),
    (Slot::Segments, Source::Rows("token_types")),
    (Slot::InputNorm, Source::Rows("token_embd_norm")),
    (Slot::Qkv, Source::Rows("blk.{}.attn_qkv")),
    (Slot::Value, Source::Rows("blk.{}.attn_v")),
    (Slot::AttentionOut, Source::Rows("blk.{}.attn_output")),
    (Slot::AttentionPostNorm, Source::Rows("blk.{}.post_attention_norm")),
    (Slot::FfnNorm, Source::Rows("blk.{}.ffn_norm")),
    // Of Seed-OSS, which has no norm on what attention yields.
    (Slot::FfnNorm, Source::Rows("blk.{}.post_attention_norm")),
    (Slot::Router, Source::Rows("blk.{}.ffn_gate_inp")),
    (Slot::RouterCorrection, Source::Bare("blk.{}.exp_probs_b.bias")),
    (Slot::SharedRouter, Source::Rows("blk.{}.ffn_gate_inp_shexp")),
    (Slot::SharedGate, Source::Rows("blk.{}.ffn_gate_shexp")),
    (Slot::SharedUp, Source::Rows("blk.{}.ffn_up_shexp")),
    (Slot::SharedDown, Source::Rows("blk.{}.ffn_down_shexp")),
    (Slot::Gate, Source::Experts("blk.{}.ffn_gate_exps.weight")),
    (Slot::Up, Source::Experts("blk.{}.ffn_up_exps.weight")),
    (Slot::Down, Source::Experts("blk.{}.ffn_down_exps.weight")),
    (Slot::Down, Source::Rows("blk.{}.ffn_down")),
    (Slot::FfnPostNorm, Source::Rows("blk.{}.post_ffw_norm")),
    // Of encoders whose norms follow each block.
    (Slot::AttentionNorm, Source::Rows("blk.{}.attn_output_norm")),
    (Slot::FfnNorm, Source::Rows("blk.{}.layer_output_norm")),
    (Slot::FinalNorm, Source::Rows("output_norm")),
];

/// What turns, and where it is.
const TURNING: [(Slot, &str); 4] = [
    (Slot::Query, "blk.{}.attn_q"),
    (Slot::Key, "blk.{}.attn_k"),
    (Slot::QueryNorm, "blk.{}.attn_q_norm"),
    (Slot::KeyNorm, "blk.{}.attn_k_norm"),
];

/// What is left: layers behind the last one, which guess tokens ahead, where the family has some; then what is read with the
/// metadata.
const AHEAD: [&str; 4] =
    ["blk.{}.", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// Where the tensors of a model are that has `names` in Hugging Face layout. llama.cpp's conversion leaves nothing transposed,
/// interleaved by heads, or less by one; what turns by even and odd rows does so here too.
pub(super) fn names(names: &Names, gguf: &Gguf) -> Names {
    let has = |slot: Slot, fits: fn(&Source) -> bool| {
        names.slots.iter().any(|(s, source)| *s == slot && fits(source))
    };
    let mut slots = SLOTS.to_vec();
    for (slot, name) in TURNING {
        let turned = has(slot, |source| matches!(source, Source::EvenOdd(_))) || gguf.turned;
        slots.push((slot, if turned { Source::EvenOdd(name) } else { Source::Rows(name) }));
    }
    // Of Falcons with two norms, the feed-forward block's is the first.
    let (first, second) = (Source::Rows("blk.{}.attn_norm"), Source::Rows("blk.{}.attn_norm_2"));
    match gguf.tensors.contains_key("blk.0.attn_norm_2.weight") {
        true => slots.extend([(Slot::AttentionNorm, second), (Slot::FfnNorm, first)]),
        false => slots.push((Slot::AttentionNorm, first)),
    }
    // Where gate and up are fused, they are called up.
    match has(Slot::Gate, |source| !source.is_of_experts())
        || !has(Slot::GateUp, |source| !source.is_of_experts())
    {
        true => slots.extend([
            (Slot::Gate, Source::Rows("blk.{}.ffn_gate")),
            (Slot::Up, Source::Rows("blk.{}.ffn_up")),
        ]),
        false => slots.push((Slot::GateUp, Source::Rows("blk.{}.ffn_up"))),
    }
    Names {
        bases: &[""],
        slots,
        root: vec![
            (Slot::Head, Source::Rows("output")),
            (Slot::HeadDense, Source::Rows("cls")),
            (Slot::Head, Source::Rows("cls.output")),
        ],
        tied: true,
        aliases: &[],
        ignore: if names.ignore.iter().any(|name| name.contains("{}")) { &AHEAD } else { &AHEAD[1..] },
    }
}

/// In which formats a checkpoint has its weights, where some of them are quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    /// What holds them as they are.
    pub quantization: Quantization,
    /// What four bits hold without losing much: all tensors of these slots have no more.
    four_bits: BTreeSet<(Site, Slot)>,
}

impl Stored {
    /// Those of a model, if most of its products' weights are quantized.
    pub fn of(checkpoint: &Checkpoint, model: &Model) -> Option<Self> {
        let gguf = checkpoint.gguf()?;
        let (mut four_bits, mut quantized, mut all) = (BTreeSet::new(), 0, 0);
        let layers = (0..model.tower.layers.len()).map(Site::Layer);
        for site in layers {
            for (slot, _) in model.tower.slots(site) {
                let bound =
                    (0..model.tower.copies(site, slot)).flat_map(|expert| model.bound(site, (slot, expert)));
                // A tensor of several experts counts once.
                let names: BTreeSet<&str> = bound.map(|bound| bound.weight.as_str()).collect();
                for name in &names {
                    let elements = checkpoint.tensor(name).map_or(0, |tensor| tensor.elements());
                    all += elements;
                    quantized += if gguf.blocks.contains_key(*name) { elements } else { 0 };
                }
                let few =
                    |name: &&str| gguf.blocks.get(*name).is_some_and(|blocks| blocks.are_of_four_bits());
                if names.iter().all(few) {
                    four_bits.insert((site, slot));
                }
            }
        }
        let quantization = if four_bits.is_empty() { Quantization::Int8 } else { Quantization::Int4 };
        (2 * quantized > all).then_some(Stored { quantization, four_bits })
    }

    /// Whether four bits hold a slot.
    pub fn is_four_bits(&self, site: Site, slot: Slot) -> bool {
        self.four_bits.contains(&(site, slot))
    }
}
