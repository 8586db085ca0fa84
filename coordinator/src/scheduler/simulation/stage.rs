//! A stage of the simulation, which believes nothing that the scheduler says.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use strata_proto::{StateKind, v1};

use crate::scheduler::{Config, Output, SequenceId};

/// What a stage knows of a sequence.
#[derive(Default)]
pub(super) struct Cached {
    pub blocks: Vec<u32>,
    tokens: Vec<u32>,
    /// How many of them are drafts of the last row, which the next one may take back.
    drafts: u32,
    rope_set: u32,
    slot: Option<u32>,
    /// What else its states depend on: the tenant, and with an encoder its input, which no two sequences have in
    /// common.
    source: (u32, u64),
    /// Of all that, the frequencies, and all tokens up to each position.
    hashes: Vec<u64>,
}

impl Cached {
    /// What a state becomes by one more token.
    fn next(&self, state: Option<&u64>, token: u32) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.source, self.rope_set, state, token).hash(&mut hasher);
        hasher.finish()
    }

    fn push(&mut self, token: u32) {
        self.hashes.push(self.next(self.hashes.last(), token));
        self.tokens.push(token);
    }
}

/// A stage that checks every rule of the protocol, and "samples" by hashing everything it has cached.
pub(super) struct FakeStage {
    pub config: Config,
    pub due: u64,
    pub cached: HashMap<u64, Cached>,
    /// What was last written to a position of a block: it depends on all that came before.
    pub memory: HashMap<(u32, u32), u64>,
    /// A running hash per slot, which only knows the tokens it was given.
    pub recurrent: HashMap<u32, u64>,
    pub tenants: HashMap<SequenceId, u32>,
}

/// Ends the input of an encoder, and is in no other place.
pub(super) const LAST: u32 = 99;

pub(super) fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17u32, |h, t| h.wrapping_mul(31).wrapping_add(*t)) % 50
}

impl FakeStage {
    pub fn new(config: Config) -> Self {
        let (cached, memory, recurrent) = (HashMap::new(), HashMap::new(), HashMap::new());
        FakeStage { config, due: 0, cached, memory, recurrent, tenants: HashMap::new() }
    }

    pub fn has(&self, kind: StateKind) -> bool {
        self.config.states.contains(&kind)
    }

    pub fn run(&mut self, meta: &v1::StepMeta) -> Vec<(u64, Output)> {
        assert_eq!(meta.step, self.due, "steps are numbered without gaps");
        self.due += 1;
        let total: u32 = meta.rows.iter().map(|r| r.count).sum();
        assert_eq!(total as usize, meta.token_ids.len());
        assert!(total > 0 && total <= self.config.max_step_tokens);
        assert!(meta.rows.len() as u32 <= self.config.max_step_rows);
        let outputs: usize = meta.rows.iter().map(|r| r.positions.len().max(1) + r.drafts as usize).sum();
        assert!(outputs as u32 <= self.config.max_step_rows, "more outputs than a stage is prepared for");
        let distinct: HashSet<_> = meta.rows.iter().map(|r| r.sequence).collect();
        assert_eq!(distinct.len(), meta.rows.len(), "a sequence is twice in one step");
        for id in &meta.released {
            self.cached.remove(id);
        }
        let mut sampled = Vec::new();
        let mut at = 0;
        for row in &meta.rows {
            let ids = &meta.token_ids[at..at + row.count as usize];
            at += row.count as usize;
            if matches!(row.output(), v1::RowOutput::Vector | v1::RowOutput::Masks) {
                assert!(
                    row.reset && row.start == 0 && row.new_blocks.is_empty() && row.state_slot.is_none(),
                    "an encoder's row is whole"
                );
                assert_eq!(ids.last(), Some(&LAST), "and has its end in this step");
                sampled.push((row.sequence, Output::Whole));
                continue;
            }
            assert_eq!(row.reset, row.sampling.is_some(), "sampling travels with reset");
            let [paged, recurrent, cross] = StateKind::ALL.map(|kind| self.has(kind));
            if row.reset {
                let source = (self.tenants[&row.sequence], if cross { row.sequence } else { 0 });
                let (rope_set, slot) = (row.rope_set, row.state_slot);
                let mut begun = Cached { rope_set, slot, source, ..Cached::default() };
                let history = &row.sampling.as_ref().expect("checked above").history;
                assert_eq!(row.start % self.config.block_tokens, 0, "whole blocks are shared");
                history.iter().for_each(|id| begun.push(*id));
                assert_eq!(slot.is_some(), recurrent || cross, "a slot for states of fixed size");
                if let Some(slot) = slot {
                    assert!(slot < self.config.state_slots);
                    self.recurrent.remove(&slot);
                }
                self.cached.insert(row.sequence, begun);
            }
            let cached = self.cached.get_mut(&row.sequence).expect("unknown and not reset");
            if !row.reset {
                assert_eq!(row.state_slot, None, "a slot travels with reset");
            }
            let length = cached.tokens.len() as u32;
            let contiguous = (length - cached.drafts..=length).contains(&row.start);
            assert!(contiguous, "positions are contiguous, but for drafts that are taken back");
            cached.tokens.truncate(row.start as usize);
            cached.hashes.truncate(row.start as usize);
            let kept = row.first_block_index as usize;
            assert!(kept == cached.blocks.len() || cached.drafts > 0 && kept < cached.blocks.len());
            cached.blocks.truncate(kept);
            assert!(
                row.drafts == 0 || row.drafts < row.count && !recurrent,
                "these states cannot be taken back"
            );
            assert!(row.drafts == 0 || row.output() == v1::RowOutput::Token);
            cached.drafts = row.drafts;
            assert_eq!(row.rope_set, cached.rope_set, "one cache, one set of frequencies");
            cached.blocks.extend(&row.new_blocks);
            ids.iter().for_each(|id| cached.push(*id));
            if let Some(slot) = cached.slot.filter(|_| recurrent) {
                let state = ids
                    .iter()
                    .fold(self.recurrent.remove(&slot), |state, id| Some(cached.next(state.as_ref(), *id)));
                self.recurrent.extend(state.map(|state| (slot, state)));
                assert_eq!(
                    state.as_ref(),
                    cached.hashes.last(),
                    "it has seen something else than the sequence"
                );
            }
            let covered = (cached.tokens.len() as u32).div_ceil(self.config.block_tokens);
            assert_eq!(cached.blocks.len() as u32, if paged { covered } else { 0 });
            let positions = if paged { ids.len() } else { 0 };
            for i in 0..positions {
                let position = row.start + i as u32;
                let block = cached.blocks[(position / self.config.block_tokens) as usize];
                let hash = cached.hashes[position as usize];
                self.memory.insert((block, position % self.config.block_tokens), hash);
            }
            // Everything the sequence reads must be what its own tokens make of it.
            for (position, hash) in cached.hashes.iter().enumerate().filter(|_| paged) {
                let position = position as u32;
                let block = cached.blocks[(position / self.config.block_tokens) as usize];
                let found = self.memory.get(&(block, position % self.config.block_tokens));
                assert_eq!(found, Some(hash), "a block does not hold what the sequence relies on");
            }
            if row.output() == v1::RowOutput::Token {
                for known in cached.tokens.len() - row.drafts as usize..=cached.tokens.len() {
                    let long = self.config.rope_switch.is_some_and(|switch| known as u32 > switch);
                    assert_eq!(
                        row.rope_set,
                        u32::from(long),
                        "the length of a sequence chooses its frequencies"
                    );
                    let token = next_token(&cached.tokens[..known]);
                    sampled.push((row.sequence, Output::Token(token)));
                    if cached.tokens.get(known).is_some_and(|draft| *draft != token) {
                        break;
                    }
                }
            }
        }
        sampled
    }
}
