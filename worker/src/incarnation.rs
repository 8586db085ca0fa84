//! One incarnation of a stage: checks each step, runs it, and turns logits into results.

mod answer;
mod sequence;

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use strata_proto::{
    DType, Side,
    v1::{self, Fence, RowOutput, step_result},
};

use self::sequence::Sequence;
use crate::{
    engine::{Engine, Input, Loaded, Output, Step},
    error::WorkerError,
    health::{Neighbours, Progress},
    interrupt::Interrupt,
    kernels::ops::BatchRow,
    meter::Meter,
    model::ModelError,
    transport::{Activation, Downstream, LinkError, Payload, Tensors, Upstream, tcp::Pending},
};

/// Called with each step before it is computed; an error poisons the step. For fault injection in tests.
pub type StepHook = Arc<dyn Fn(&v1::StepMeta) -> Result<(), String> + Send + Sync>;

/// Everything that lives and dies with one incarnation of a pipeline.
pub(crate) struct Incarnation {
    pub fence: Fence,
    pub interrupt: Interrupt,
    /// Which of them were missed.
    pub neighbours: Neighbours,
    /// How far the stage is.
    pub progress: Arc<Progress>,
    /// What the device has done.
    pub meter: Arc<Meter>,
    /// Silence after which a neighbour counts as lost.
    pub heartbeat_timeout: Duration,
    pub dtype: DType,
    pub max_step_tokens: usize,
    pub pending: Option<Pending>,
    pub upstream: Option<Box<dyn Upstream>>,
    pub downstream: Option<Box<dyn Downstream>>,
    pub sequences: HashMap<u64, Sequence>,
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
            WorkerError::Neighbour { error: LinkError::Interrupted, .. } => RunEnd::Quiet,
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
        let mut ids = &meta.token_ids[..];
        for row in &meta.rows {
            let bad = |e: String| WorkerError::BadMessage(format!("step {}: {e}", meta.step));
            sequence::check_row(row, tower).map_err(bad)?;
            let (own, others) = ids.split_at(row.count as usize);
            ids = others;
            if !tower.caches {
                continue;
            }
            if row.reset {
                self.sequences.insert(row.sequence, Sequence::begin(row, weights.spec.head)?);
            }
            let Some(sequence) = self.sequences.get_mut(&row.sequence) else {
                return broken(format!("sequence {} is unknown and not reset", row.sequence));
            };
            sequence.go_on(row, own).map_err(bad)?;
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
        let told = Instant::now();
        let hidden = match &mut self.upstream {
            None => Ok(None),
            Some(upstream) => match upstream.receive(meta.step, &expected) {
                Ok(Activation { payload: Payload::Tensors(tensors), .. }) => Ok(Some(tensors)),
                Ok(Activation { payload: Payload::Poisoned(reason), .. }) => Err(reason),
                Err(error) => return Err(self.missed(Side::Upstream, error)),
            },
        };
        self.progress.received(meta.step);
        let begun = Instant::now();
        if self.upstream.is_some() {
            Meter::spend(&self.meter.waiting, begun - told);
            Meter::carry(&self.meter.received, &expected);
        }
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
        Meter::add(&self.meter.steps, 1);
        Meter::add(&self.meter.tokens, meta.token_ids.len() as u64);
        Meter::spend(&self.meter.busy, compute);
        if let Err(reason) = &computed {
            Meter::add(&self.meter.poisoned, 1);
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
            let sending = Instant::now();
            if let Err(error) = downstream.send(Activation { step: meta.step, payload }, &expected) {
                return Err(self.missed(Side::Downstream, error));
            }
            self.progress.sent(meta.step);
            Meter::spend(&self.meter.sending, sending.elapsed());
            Meter::carry(&self.meter.sent, &expected);
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

    /// A link to a neighbour failed.
    fn missed(&self, side: Side, error: LinkError) -> RunEnd {
        self.neighbours.failed(side, error.health());
        WorkerError::Neighbour { side, error }.into()
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
        // Every token is seen exactly once: a sampled one when it comes back as the next row's input, a draft when a
        // later row goes on behind it.
        let mut ids = &meta.token_ids[..];
        let mut guessed = Vec::with_capacity(meta.rows.len());
        for row in &meta.rows {
            let (own, others) = ids.split_at(row.count as usize);
            let (certain, drafts) = own.split_at((row.count - row.drafts) as usize);
            ids = others;
            let sampler = self.sequences.get_mut(&row.sequence).and_then(|s| s.sampler.as_mut());
            guessed.push(sampler.map_or_else(Vec::new, |sampler| {
                sampler.observe(certain, row.start);
                sampler.histories(drafts)
            }));
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
        for (row, histories) in meta.rows.iter().zip(&guessed) {
            let certain = row.count - row.drafts;
            match row.output() {
                _ if !head => {}
                RowOutput::None => {}
                RowOutput::Token | RowOutput::Logits => outputs.extend(at + certain - 1..at + row.count),
                RowOutput::Vector => outputs.push(at + row.pooled_from),
                RowOutput::Masks | RowOutput::Vectors => {
                    outputs.extend(row.positions.iter().map(|position| at + position))
                }
            }
            let sampler = self.sequences.get(&row.sequence).and_then(|s| s.sampler.as_ref());
            if let (RowOutput::Token, Some(sampler)) = (row.output(), sampler) {
                draws.extend(sampler.draws(row.start + certain, row.drafts, histories).map(Some));
            }
            draws.resize(outputs.len(), None);
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
            Output::Values(values) => {
                answer::answer(meta, values, values_width, &draws).map(Computed::Output)
            }
        }
    }
}

/// What a stage computed for a step.
enum Computed {
    Hidden(Tensors),
    Output(step_result::Output),
}

#[cfg(test)]
mod tests;
