//! One incarnation of a stage: checks each step, runs it, and turns logits into results.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    BLOCK_TOKENS, DType,
    v1::{self, Fence, RowOutput, step_result},
};

use crate::{
    engine::{Engine, Input, Loaded, Output, Step, Values},
    error::WorkerError,
    interrupt::Interrupt,
    kernels::ops::BatchRow,
    model::{
        ModelError,
        architecture::{Head, Tower},
    },
    sampler::{Draw, SampleError, Sampled, SamplingParams, TokenHistory, likeliest, sample},
    transport::{Activation, Downstream, LinkError, Payload, Tensors, Upstream, tcp::Pending},
};

/// Called with each step before it is computed; an error poisons the step. For fault injection in tests.
pub type StepHook = Arc<dyn Fn(&v1::StepMeta) -> Result<(), String> + Send + Sync>;

/// Everything that lives and dies with one incarnation of a pipeline.
pub(crate) struct Incarnation {
    pub fence: Fence,
    pub interrupt: Interrupt,
    pub dtype: DType,
    pub max_step_tokens: usize,
    pub pending: Option<Pending>,
    pub upstream: Option<Box<dyn Upstream>>,
    pub downstream: Option<Box<dyn Downstream>>,
    pub sequences: HashMap<u64, Sequence>,
}

/// What a stage knows of one sequence.
pub(crate) struct Sequence {
    blocks: Vec<u32>,
    /// Positions that are cached.
    length: u32,
    rope_set: u32,
    /// Only on the last stage.
    sampler: Option<Sampler>,
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
        let params = SamplingParams::try_from(&row.sampling.clone().unwrap_or_default())
            .map_err(|e| WorkerError::BadMessage(e.to_string()))?;
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
    fn observe(&mut self, ids: &[u32], start: u32) {
        let Some(history) = &mut self.history else { return };
        for (position, id) in (start..).zip(ids) {
            if position < self.prompt_tokens {
                history.push_prompt(*id);
            } else {
                history.push_answer(*id);
            }
        }
    }

    /// What the token at `position` depends on.
    fn draw(&self, position: u32) -> Draw<'_> {
        Draw {
            params: &self.params,
            history: self.history.as_ref(),
            seed: self.seed,
            position,
            logprobs: self.logprobs,
        }
    }
}

/// Why a run loop ended.
pub(crate) enum RunEnd {
    /// The coordinator closed the stream, or the incarnation was aborted.
    Quiet,
    /// Something broke; the coordinator is told.
    Broken(WorkerError),
}

impl<E: Into<WorkerError>> From<E> for RunEnd {
    fn from(error: E) -> Self {
        match error.into() {
            WorkerError::Link(LinkError::Interrupted) => RunEnd::Quiet,
            error => RunEnd::Broken(error),
        }
    }
}

impl Incarnation {
    /// Checks a step against the protocol and takes over its changes to sequences. An error ends the incarnation.
    pub fn accept(&mut self, meta: &v1::StepMeta, due: u64, weights: &Loaded<'_>) -> Result<(), WorkerError> {
        let tower = &weights.model.tower;
        let broken = |what: String| Err(WorkerError::BadMessage(format!("step {}: {what}", meta.step)));
        if meta.fence.as_ref() != Some(&self.fence) {
            return broken(format!("its fence is not this incarnation's {}", self.fence));
        }
        if meta.step != due {
            return broken(format!("step {due} was due"));
        }
        let tokens: u64 = meta.rows.iter().map(|r| u64::from(r.count)).sum();
        if tokens != meta.token_ids.len() as u64 || tokens == 0 || tokens > self.max_step_tokens as u64 {
            return broken(format!(
                "its rows count {tokens} tokens, {} came, and 1 to {} fit",
                meta.token_ids.len(),
                self.max_step_tokens
            ));
        }
        for sequence in &meta.released {
            self.sequences.remove(sequence);
        }
        for row in &meta.rows {
            check_row(row, tower).map_err(|e| WorkerError::BadMessage(format!("step {}: {e}", meta.step)))?;
            if !tower.caches {
                continue;
            }
            if row.reset {
                let known = row.sampling.as_ref().map_or(0, |s| s.history.len());
                if row.start % BLOCK_TOKENS != 0 || known != row.start as usize {
                    return broken(format!(
                        "sequence {} begins at {} with {known} tokens before it: expected whole blocks and all of them",
                        row.sequence, row.start
                    ));
                }
                let sampler = match &row.sampling {
                    Some(sampling) if weights.spec.head => Some(Sampler::new(sampling)?),
                    _ => None,
                };
                let (blocks, length) = (Vec::new(), row.start);
                let sequence = Sequence { blocks, length, rope_set: row.rope_set, sampler };
                self.sequences.insert(row.sequence, sequence);
            }
            let Some(sequence) = self.sequences.get_mut(&row.sequence) else {
                return broken(format!("sequence {} is unknown and not reset", row.sequence));
            };
            if row.start != sequence.length || row.count == 0 {
                return broken(format!(
                    "sequence {} goes on at {} with {} tokens, but {} are cached",
                    row.sequence, row.start, row.count, sequence.length
                ));
            }
            if row.rope_set != sequence.rope_set {
                return broken(format!("sequence {} changes its rope set without a reset", row.sequence));
            }
            if row.first_block_index as usize != sequence.blocks.len() {
                return broken(format!("sequence {} has {} blocks", row.sequence, sequence.blocks.len()));
            }
            sequence.blocks.extend(&row.new_blocks);
            let end = row.start.checked_add(row.count);
            let room = sequence.blocks.len() as u64 * u64::from(BLOCK_TOKENS);
            match end {
                Some(end) if u64::from(end) <= room => sequence.length = end,
                _ => return broken(format!("sequence {} has too few blocks", row.sequence)),
            }
        }
        Ok(())
    }

    /// Runs one step: receive, compute, send on or sample. The result is the last stage's.
    pub fn execute(
        &mut self,
        meta: &v1::StepMeta,
        engine: &mut dyn Engine,
        hook: Option<&StepHook>,
    ) -> Result<(Option<v1::StepResult>, Duration), RunEnd> {
        let loaded = engine.loaded().ok_or_else(|| WorkerError::from(ModelError::NotLoaded))?;
        let expected = loaded.model.tower.activation(meta.token_ids.len(), self.dtype);
        let hidden = match &mut self.upstream {
            None => Ok(None),
            Some(upstream) => match upstream.receive(meta.step, &expected)?.payload {
                Payload::Tensors(tensors) => Ok(Some(tensors)),
                Payload::Poisoned(reason) => Err(reason),
            },
        };
        let begun = Instant::now();
        let computed = hidden.and_then(|hidden| {
            // A defect met by one batch must not take the worker and everyone's cache with it.
            catch_unwind(AssertUnwindSafe(|| self.compute(meta, engine, hook, hidden))).unwrap_or_else(
                |panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                    Err(format!("panic in the forward pass: {text}"))
                },
            )
        });
        let compute = begun.elapsed();
        if let Err(reason) = &computed {
            tracing::warn!(step = meta.step, reason, "poisoned step");
        }
        if let Some(downstream) = &mut self.downstream {
            let payload = match computed {
                Ok(Computed::Hidden(hidden)) => Payload::Tensors(hidden),
                Ok(Computed::Output(_)) => {
                    return Err(WorkerError::Internal("a head before the last stage".into()).into());
                }
                Err(reason) => Payload::Poisoned(reason),
            };
            downstream.send(Activation { step: meta.step, payload }, &expected)?;
            return Ok((None, compute));
        }
        let (output, failure) = match computed {
            Ok(Computed::Output(output)) => (Some(output), None),
            Ok(Computed::Hidden(_)) => {
                return Err(WorkerError::Internal("the last stage has no head".into()).into());
            }
            Err(reason) => (None, Some(reason)),
        };
        Ok((Some(v1::StepResult { step: meta.step, failure, output }), compute))
    }

    fn compute(
        &mut self,
        meta: &v1::StepMeta,
        engine: &mut dyn Engine,
        hook: Option<&StepHook>,
        hidden: Option<Tensors>,
    ) -> Result<Computed, String> {
        if let Some(hook) = hook {
            hook(meta)?;
        }
        // Every token is seen exactly once: a sampled one when it comes back as the next row's input.
        let mut at = 0;
        for row in &meta.rows {
            let ids = &meta.token_ids[at..at + row.count as usize];
            at += row.count as usize;
            if let Some(sampler) = self.sequences.get_mut(&row.sequence).and_then(|s| s.sampler.as_mut()) {
                sampler.observe(ids, row.start);
            }
        }
        let rows: Vec<BatchRow<'_>> = meta
            .rows
            .iter()
            .map(|row| BatchRow {
                start: row.start,
                count: row.count,
                blocks: self.sequences.get(&row.sequence).map_or(&[], |s| &s.blocks),
                rope_set: row.rope_set,
            })
            .collect();
        let loaded = engine.loaded().ok_or("no weights are loaded")?;
        let (head, values_width) = (loaded.spec.head, loaded.model.tower.outputs());
        let (mut outputs, mut draws, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for row in &meta.rows {
            match row.output() {
                _ if !head => {}
                RowOutput::None => {}
                RowOutput::Token | RowOutput::Logits => outputs.push(at + row.count - 1),
                RowOutput::Vector => outputs.push(at),
                RowOutput::Masks => outputs.extend(row.masked.iter().map(|position| at + position)),
            }
            let sampler = self.sequences.get(&row.sequence).and_then(|s| s.sampler.as_ref());
            let draw = match row.output() {
                RowOutput::Token => sampler.map(|s| s.draw(row.start + row.count)),
                _ => None,
            };
            draws.resize(outputs.len(), draw);
            segments.extend(&row.segment_ids);
            at += row.count;
            if !segments.is_empty() {
                segments.resize(at as usize, 0);
            }
        }
        let input = match hidden {
            None => Input::Tokens { ids: &meta.token_ids, segments: &segments },
            Some(hidden) => Input::Hidden(hidden),
        };
        let step = Step { rows: &rows, input, outputs: &outputs, draws: &draws };
        match engine.forward(step).map_err(|e| e.to_string())? {
            Output::Hidden(hidden) => Ok(Computed::Hidden(hidden)),
            Output::Values(values) => answer(meta, values, values_width, &draws).map(Computed::Output),
        }
    }
}

/// What a stage computed for a step.
enum Computed {
    Hidden(Tensors),
    Output(step_result::Output),
}

/// Whether a row asks for what this model can do.
fn check_row(row: &v1::Row, tower: &Tower) -> Result<(), String> {
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
            | (RowOutput::Vector, Head::Classify { .. } | Head::Embed { .. })
            | (RowOutput::Masks, Head::Mlm(..))
    );
    if !fits {
        return Err(format!("sequence {sequence} asks for {:?}, which this model cannot give", row.output()));
    }
    let masked = row.output() == RowOutput::Masks;
    let ascending = row.masked.is_sorted_by(|a, b| a < b) && row.masked.iter().all(|p| *p < row.count);
    if masked == row.masked.is_empty() || !ascending {
        return Err(format!("sequence {sequence} needs ascending positions of masks within its tokens"));
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

/// A token to be drawn, or drawn.
struct Choice<'a> {
    sequence: u64,
    logits: &'a mut [f32],
    order: &'a mut [u32],
    draw: Draw<'a>,
    chosen: Option<Result<Sampled, SampleError>>,
}

/// Turns the values `(outputs, width)` of a step into its result.
fn answer(
    meta: &v1::StepMeta,
    Values { values, order, drawn, cpu }: Values<'_>,
    width: usize,
    draws: &[Option<Draw<'_>>],
) -> Result<step_result::Output, String> {
    let drawn = drawn.iter().cloned().chain(std::iter::repeat(None));
    let values = values.chunks_exact_mut(width).zip(order.chunks_exact_mut(width));
    let mut values = values.zip(draws.iter().zip(drawn));
    let mut next = || values.next().ok_or("a row has no values");
    let (mut choices, mut vectors, mut guesses) = (Vec::new(), Vec::new(), Vec::new());
    for row in &meta.rows {
        let sequence = row.sequence;
        match row.output() {
            RowOutput::None => {}
            RowOutput::Logits | RowOutput::Vector => {
                vectors.push(v1::Vector { sequence, values: next()?.0.0.to_vec() });
            }
            RowOutput::Token => {
                let ((logits, order), (draw, chosen)) = next()?;
                let draw = draw.ok_or("a row that samples came without sampling parameters")?;
                choices.push(Choice { sequence, logits, order, draw, chosen });
            }
            RowOutput::Masks => {
                for _ in &row.masked {
                    let top = likeliest(cpu, next()?.0.0, row.candidates).map_err(|e| e.to_string())?;
                    guesses.push(v1::Guess { sequence, top });
                }
            }
        }
    }
    cpu.each(&mut choices, |c| {
        c.chosen.get_or_insert_with(|| sample(cpu, c.logits, c.order, &c.draw));
    });
    let tokens =
        choices.into_iter().filter_map(|c| Some((c.sequence, c.chosen?))).map(|(sequence, chosen)| {
            let Sampled { token, logprobs } = chosen.map_err(|e| e.to_string())?;
            Ok(v1::SampledToken { sequence, token_id: token, logprobs })
        });
    let tokens = tokens.collect::<Result<Vec<_>, String>>()?;
    match (tokens.is_empty(), vectors.is_empty(), guesses.is_empty()) {
        (_, true, true) => Ok(step_result::Output::Tokens(v1::SampledTokens { tokens })),
        (true, false, true) => Ok(step_result::Output::Vectors(v1::Vectors { vectors })),
        (true, true, false) => Ok(step_result::Output::Guesses(v1::Guesses { guesses })),
        _ => Err("a step yields one kind of output".into()),
    }
}

#[cfg(test)]
mod tests;
