//! What a stage remembers of sequences: keys by blocks, and nothing that it was not told.

use std::collections::BTreeMap;

use strata_proto::{
    BLOCK_TOKENS, LayerRange,
    v1::{self, RowOutput, step_result},
};

use super::{Plant, model};

/// What sequences have left in the stage's memory.
pub struct Cache {
    layers: LayerRange,
    /// By layer, block and position in it.
    keys: Vec<u64>,
    blocks: u32,
    sequences: BTreeMap<u64, Sequence>,
    /// Blocks of a sequence that has ended, where a defective stage still writes.
    late: Vec<u32>,
}

#[derive(Default)]
struct Sequence {
    blocks: Vec<u32>,
    length: u32,
    prompt: u32,
}

impl Cache {
    /// An empty one, of so many blocks.
    pub fn new(layers: LayerRange, blocks: u32) -> Self {
        let keys = vec![0; (layers.len() * blocks * BLOCK_TOKENS) as usize];
        Cache { layers, keys, blocks, sequences: BTreeMap::new(), late: Vec::new() }
    }

    /// Sequences that it knows.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Takes a step's changes over.
    pub fn take(&mut self, meta: &v1::StepMeta, plant: Plant) -> Result<(), String> {
        // A defective stage is late with what it does for a sequence that has ended.
        for block in std::mem::take(&mut self.late) {
            for layer in self.layers.first..self.layers.end {
                let at = self.at(layer, block, 0);
                self.keys[at] = 0;
            }
        }
        for id in &meta.released {
            let gone = self.sequences.remove(id);
            if plant == Plant::LateWrite {
                self.late.extend(gone.into_iter().flat_map(|sequence| sequence.blocks));
            }
        }
        meta.rows.iter().try_for_each(|row| self.accept(row))
    }

    pub fn compute(&mut self, meta: &v1::StepMeta, tokens: &mut [u64], plant: Plant) {
        let mut rest = tokens;
        for row in &meta.rows {
            let (own, others) = rest.split_at_mut(row.count as usize);
            self.forward(row.sequence, row.start, own, plant);
            rest = others;
        }
    }

    fn at(&self, layer: u32, block: u32, offset: u32) -> usize {
        (((layer - self.layers.first) * self.blocks + block) * BLOCK_TOKENS + offset) as usize
    }

    /// Takes a row's changes over.
    fn accept(&mut self, row: &v1::Row) -> Result<(), String> {
        let id = row.sequence;
        if row.reset {
            let prompt = row.sampling.as_ref().map_or(0, |sampling| sampling.prompt_tokens);
            self.sequences.insert(id, Sequence { blocks: Vec::new(), length: row.start, prompt });
        }
        let blocks = self.blocks;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Err(format!("sequence {id} is unknown and not reset"));
        };
        if row.start != sequence.length || row.first_block_index as usize != sequence.blocks.len() {
            return Err(format!("sequence {id} goes on at {}, but has {}", row.start, sequence.length));
        }
        sequence.blocks.extend(&row.new_blocks);
        sequence.length += row.count;
        if sequence.length > sequence.blocks.len() as u32 * BLOCK_TOKENS
            || sequence.blocks.iter().any(|b| *b >= blocks)
        {
            return Err(format!(
                "sequence {id} has blocks {:?} for {} positions",
                sequence.blocks, sequence.length
            ));
        }
        Ok(())
    }

    /// Runs tokens of a sequence, from a position on, through the layers.
    fn forward(&mut self, id: u64, start: u32, tokens: &mut [u64], plant: Plant) {
        let Sequence { blocks, prompt, .. } = &self.sequences[&id];
        let (blocks, prompt) = (blocks.clone(), *prompt);
        let place = |position: u32| (blocks[(position / BLOCK_TOKENS) as usize], position % BLOCK_TOKENS);
        let count = tokens.len();
        for (index, (position, x)) in (start..).zip(tokens).enumerate() {
            for layer in self.layers.first..self.layers.end {
                let (block, offset) = place(position);
                let at = self.at(layer, block, offset);
                // A defective stage has no use for tokens of an answer that come again, save for the last one.
                if plant != Plant::NoReplay || position < prompt || index + 1 == count {
                    self.keys[at] = model::key(*x, layer);
                }
                let attended = (0..=position).fold(0, |attended, position| {
                    let (block, offset) = place(position);
                    model::attend(attended, self.keys[self.at(layer, block, offset)])
                });
                *x = model::layer(*x, attended);
            }
        }
    }
}

/// The residual stream where it begins.
pub fn begin(meta: &v1::StepMeta) -> Vec<u64> {
    let positions = meta.rows.iter().flat_map(|row| row.start..row.start + row.count);
    meta.token_ids.iter().zip(positions).map(|(token, position)| model::embed(*token, position)).collect()
}

/// What the head makes of a step.
pub fn sampled(meta: &v1::StepMeta, tokens: &[u64]) -> step_result::Output {
    let mut end = 0;
    let mut sampled = Vec::new();
    for row in &meta.rows {
        end += row.count as usize;
        if row.output() == RowOutput::Token {
            let token_id = model::choose(tokens[end - 1]);
            sampled.push(v1::SampledToken { sequence: row.sequence, token_id, logprobs: None });
        }
    }
    step_result::Output::Tokens(v1::SampledTokens { tokens: sampled })
}
