//! What a stage knows of a sequence from step to step, and what a row may ask for.

use strata_proto::{
    BLOCK_TOKENS,
    v1::{self, RowOutput},
};

use crate::{
    error::WorkerError,
    model::architecture::{Head, Tower},
    sampler::{Draw, SamplingParams, TokenHistory},
};

/// What a stage knows of one sequence.
pub(crate) struct Sequence {
    pub blocks: Vec<u32>,
    /// Positions that are cached.
    length: u32,
    /// The tokens at the last of them, if these were guessed: the next row may take them back.
    drafts: Vec<u32>,
    rope_set: u32,
    /// Only on the last stage.
    pub sampler: Option<Sampler>,
}

impl Sequence {
    /// What a row with `reset` begins; `samples` on the last stage.
    ///
    /// # Errors
    /// If it does not begin behind whole blocks, or asks for what no sampler can do.
    pub fn begin(row: &v1::Row, samples: bool) -> Result<Self, WorkerError> {
        let known = row.sampling.as_ref().map_or(0, |s| s.history.len());
        if !row.start.is_multiple_of(BLOCK_TOKENS) || known != row.start as usize {
            return Err(WorkerError::BadMessage(format!(
                "sequence {} begins at {} with {known} tokens before it: expected whole blocks and all of them",
                row.sequence, row.start
            )));
        }
        let sampler = row.sampling.as_ref().filter(|_| samples).map(Sampler::new).transpose()?;
        let (blocks, drafts) = (Vec::new(), Vec::new());
        Ok(Sequence { blocks, length: row.start, drafts, rope_set: row.rope_set, sampler })
    }

    /// Takes a row's changes over: drafts of the last row become certain up to where this one starts, and those behind
    /// are taken back. `ids` are its tokens.
    ///
    /// # Errors
    /// If it does not go on where the sequence is, or its blocks do not hold it.
    pub fn go_on(&mut self, row: &v1::Row, ids: &[u32]) -> Result<(), String> {
        let id = row.sequence;
        let certain = self.length - self.drafts.len() as u32;
        if !(certain..=self.length).contains(&row.start) || row.count == 0 {
            return Err(format!(
                "sequence {id} goes on at {} with {} tokens, but {certain} are cached and {} guessed",
                row.start,
                row.count,
                self.drafts.len()
            ));
        }
        if row.rope_set != self.rope_set {
            return Err(format!("sequence {id} changes its rope set without a reset"));
        }
        let (first, blocks) = (row.first_block_index as usize, self.blocks.len());
        let fewest = if self.drafts.is_empty() { blocks } else { row.start.div_ceil(BLOCK_TOKENS) as usize };
        if !(fewest..=blocks).contains(&first) {
            return Err(format!(
                "sequence {id} appends to {first} blocks, but has {blocks} and needs {fewest}"
            ));
        }
        self.blocks.truncate(first);
        self.blocks.extend(&row.new_blocks);
        let room = self.blocks.len() as u64 * u64::from(BLOCK_TOKENS);
        let end = u64::from(row.start) + u64::from(row.count);
        if end > room {
            return Err(format!("sequence {id} has blocks for {room} positions, but goes on to {end}"));
        }
        if let Some(sampler) = &mut self.sampler {
            sampler.observe(&self.drafts[..(row.start - certain) as usize], certain);
        }
        self.drafts.clear();
        self.drafts.extend(&ids[(row.count - row.drafts) as usize..]);
        self.length = row.start + row.count;
        Ok(())
    }
}

/// How the last stage chooses the tokens of one sequence.
pub(crate) struct Sampler {
    params: SamplingParams,
    history: Option<TokenHistory>,
    seed: u64,
    prompt_tokens: u32,
    logprobs: Option<u32>,
}

impl Sampler {
    fn new(row: &v1::RowSampling) -> Result<Self, WorkerError> {
        let mut params = SamplingParams::try_from(&row.sampling.clone().unwrap_or_default())
            .map_err(|e| WorkerError::BadMessage(e.to_string()))?;
        params.withheld =
            (row.ends.iter().copied().collect(), row.prompt_tokens.saturating_add(row.min_tokens));
        let mut sampler = Sampler {
            history: params.needs_history().then(TokenHistory::default),
            params,
            seed: row.seed,
            prompt_tokens: row.prompt_tokens,
            logprobs: row.logprobs,
        };
        sampler.observe(&row.history, 0);
        Ok(sampler)
    }

    /// Takes note of input tokens from position `start` on.
    pub fn observe(&mut self, ids: &[u32], start: u32) {
        let Some(history) = &mut self.history else { return };
        for (position, id) in (start..).zip(ids) {
            if position < self.prompt_tokens {
                history.push_prompt(*id);
            } else {
                history.push_answer(*id);
            }
        }
    }

    /// What is known of the tokens before each draft's successor, one for each draft; none if it does not matter.
    pub fn histories(&self, drafts: &[u32]) -> Vec<TokenHistory> {
        let Some(mut history) = self.history.clone().filter(|_| !drafts.is_empty()) else {
            return Vec::new();
        };
        let known = |draft: &u32| {
            history.push_answer(*draft);
            history.clone()
        };
        drafts.iter().map(known).collect()
    }

    /// What the token at `position` depends on, and those that follow so many `drafts`, with their `histories`.
    pub fn draws<'a>(
        &'a self,
        position: u32,
        drafts: u32,
        histories: &'a [TokenHistory],
    ) -> impl Iterator<Item = Draw<'a>> {
        (0..=drafts).map(move |draft| Draw {
            params: &self.params,
            history: match draft {
                0 => self.history.as_ref(),
                _ => histories.get(draft as usize - 1),
            },
            seed: self.seed,
            position: position + draft,
            logprobs: self.logprobs,
        })
    }
}

/// Whether a row asks for what this model can do.
pub(crate) fn check_row(row: &v1::Row, tower: &Tower) -> Result<(), String> {
    let sequence = row.sequence;
    if !row.segment_ids.is_empty() && row.segment_ids.len() != row.count as usize {
        return Err(format!(
            "sequence {sequence} has {} segment ids for {} tokens",
            row.segment_ids.len(),
            row.count
        ));
    }
    let fits = matches!(
        (row.output(), &tower.head),
        (RowOutput::None, _)
            | (RowOutput::Token | RowOutput::Logits, Head::Lm { .. })
            | (RowOutput::Vector, Head::Classify { .. } | Head::Embed(_))
            | (RowOutput::Masks, Head::Mlm(..))
            | (RowOutput::Vectors, Head::Tag { .. } | Head::Span { .. })
    );
    if !fits {
        return Err(format!("sequence {sequence} asks for {:?}, which this model cannot give", row.output()));
    }
    let positions = matches!(row.output(), RowOutput::Masks | RowOutput::Vectors);
    let ascending = row.positions.is_sorted_by(|a, b| a < b) && row.positions.iter().all(|p| *p < row.count);
    if positions == row.positions.is_empty() || !ascending {
        return Err(format!("sequence {sequence} needs ascending positions within its tokens"));
    }
    let pools = matches!(tower.head, Head::Embed(_)) && row.output() == RowOutput::Vector;
    if row.pooled_from > 0 && (!pools || row.pooled_from >= row.count) {
        let (from, count) = (row.pooled_from, row.count);
        return Err(format!(
            "sequence {sequence} is pooled from token {from} of {count} on: expected less, in a row of a model that embeds"
        ));
    }
    if row.drafts > 0 && (row.drafts >= row.count || row.output() != RowOutput::Token) {
        let (drafts, count) = (row.drafts, row.count);
        return Err(format!(
            "sequence {sequence} has {drafts} drafts in {count} tokens: expected fewer, behind a token, in a row that samples"
        ));
    }
    if row.state_slot.is_some() {
        return Err(format!(
            "sequence {sequence} has a slot, but no layer of this model has a state of fixed size"
        ));
    }
    let is_whole = row.reset && row.start == 0 && row.count > 0;
    if (tower.whole_input || !tower.caches) && !is_whole {
        return Err(format!("sequence {sequence} is not whole: this model computes an input in one step"));
    }
    if !tower.caches && !row.new_blocks.is_empty() {
        return Err(format!("sequence {sequence} has blocks: this model keeps nothing between steps"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::Model;

    /// A row of `count` tokens from `start` on, of which the last are `drafts`, with the table cut to `first` blocks
    /// and `new` ones appended.
    fn row(start: u32, count: u32, drafts: u32, first: u32, new: &[u32]) -> v1::Row {
        v1::Row {
            start,
            count,
            drafts,
            first_block_index: first,
            new_blocks: new.to_vec(),
            output: RowOutput::Token as i32,
            ..v1::Row::default()
        }
    }

    /// The last stage's view of a sequence after a prompt of 14 tokens and the rows of `then`; ids are positions.
    fn after(then: &[v1::Row]) -> Result<Sequence, String> {
        let sampling = v1::RowSampling {
            sampling: Some(v1::Sampling { presence_penalty: Some(1.0), ..v1::Sampling::default() }),
            prompt_tokens: 14,
            ..v1::RowSampling::default()
        };
        let begin = v1::Row { reset: true, sampling: Some(sampling), ..row(0, 14, 0, 0, &[7]) };
        let mut sequence = Sequence::begin(&begin, true).unwrap();
        for row in [begin].iter().chain(then) {
            let ids: Vec<u32> = (row.start..row.start + row.count).collect();
            sequence.go_on(row, &ids)?;
        }
        Ok(sequence)
    }

    fn seen(sequence: &Sequence) -> Vec<u32> {
        let history = sequence.sampler.as_ref().and_then(|s| s.history.as_ref()).unwrap();
        history.answer_counts.keys().copied().collect()
    }

    #[test]
    fn drafts_are_kept_up_to_where_the_next_row_starts() {
        // Drafts at 15 to 18, over the end of the first block.
        let drafted = row(14, 5, 4, 1, &[3]);
        let kept = |start, first, new: &[u32]| after(&[drafted.clone(), row(start, 1, 0, first, new)]);
        let none = kept(15, 1, &[]).unwrap();
        assert_eq!((none.length, &none.blocks[..], seen(&none)), (16, &[7][..], vec![]));
        let one = kept(16, 1, &[5]).unwrap();
        assert_eq!((one.length, &one.blocks[..], seen(&one)), (17, &[7, 5][..], vec![15]));
        let all = kept(19, 2, &[]).unwrap();
        assert_eq!((all.length, &all.blocks[..], seen(&all)), (20, &[7, 3][..], vec![15, 16, 17, 18]));
    }

    #[test]
    fn rows_that_do_not_go_on_are_refused() {
        let drafted = row(14, 5, 4, 1, &[3]);
        let refused = |then: &[v1::Row]| after(then).err().expect("it was taken");
        let early = refused(&[drafted.clone(), row(14, 1, 0, 1, &[])]);
        assert_eq!(early, "sequence 0 goes on at 14 with 1 tokens, but 15 are cached and 4 guessed");
        assert!(refused(&[drafted.clone(), row(20, 1, 0, 2, &[])]).contains("goes on at 20"));
        assert!(
            refused(&[drafted.clone(), row(15, 1, 0, 2, &[]), row(15, 1, 0, 2, &[])]).contains("0 guessed")
        );
        let lost = refused(&[drafted.clone(), row(18, 1, 0, 1, &[])]);
        assert!(lost.contains("appends to 1 blocks, but has 2 and needs 2"), "what is certain stays: {lost}");
        assert!(refused(&[row(14, 1, 0, 0, &[4])]).contains("needs 1"), "nothing was guessed");
        assert!(refused(&[row(14, 5, 4, 1, &[])]).contains("has blocks for 16 positions, but goes on to 19"));
    }

    #[test]
    fn drafts_follow_a_token_in_a_row_that_samples() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models");
        let (_, model) = Model::open_dir(&models.join("shakespeare")).unwrap();
        let check = |row: &v1::Row| check_row(row, &model.tower);
        assert_eq!(check(&row(0, 3, 2, 0, &[0])), Ok(()));
        assert!(check(&row(0, 3, 3, 0, &[0])).unwrap_err().contains("3 drafts in 3 tokens"));
        let silent = v1::Row { output: RowOutput::None as i32, ..row(0, 3, 2, 0, &[0]) };
        assert!(check(&silent).unwrap_err().contains("in a row that samples"));
        let slot = v1::Row { state_slot: Some(0), ..row(0, 3, 0, 0, &[0]) };
        assert!(check(&slot).unwrap_err().contains("no layer of this model has a state of fixed size"));
    }
}
