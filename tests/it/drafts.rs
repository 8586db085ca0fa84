//! Drafts over real stages, by the scheduler that the engine uses: whatever is guessed, the answers are those of plain
//! decoding, to the bits of their log-probabilities.

use std::sync::Arc;

use strata_coordinator::{
    cluster::{
        History,
        discovery::discover,
        pipeline::{Pipeline, PipelineEvent},
    },
    scheduler::{Config, Output, Request, Scheduler, SequenceId, Unplaced, Work},
};
use strata_proto::{
    BLOCK_TOKENS,
    v1::{self, Fence, step_result},
};
use tokio::sync::mpsc;

use crate::cluster::{Options, PATIENCE, expectations, model};

/// Tokens of each answer.
const TOKENS: usize = 40;

/// A scheduler and its pipeline.
struct Driver {
    pipeline: Pipeline,
    events: mpsc::UnboundedReceiver<PipelineEvent>,
    scheduler: Scheduler,
    last: SequenceId,
}

impl Driver {
    async fn start(options: &Options) -> Driver {
        let (members, deployment) = (options.members(), options.deployment());
        let found = discover(&members, &deployment).await.unwrap();
        let plan = found.plan(&deployment).unwrap();
        let (sink, events) = mpsc::unbounded_channel();
        let sink = Arc::new(move |_, event| drop(sink.send(event)));
        let fence = Fence { term: 1, pipeline: 0, incarnation: 1 };
        let up = Pipeline::bring_up(
            &found,
            &plan,
            fence,
            Arc::new(|_| {}),
            sink,
            &deployment,
            &History::default(),
        )
        .await;
        let stages = plan.replicas[0].stages.len() as u32;
        let scheduler = Scheduler::new(Config {
            blocks: plan.replicas[0].kv_capacity_tokens as u32 / BLOCK_TOKENS,
            block_tokens: BLOCK_TOKENS,
            states: found.profile.state_kinds(),
            state_slots: plan.replicas[0].state_slots,
            max_step_tokens: deployment.max_step_tokens,
            max_step_rows: deployment.max_step_rows,
            prefill_chunk: options.prefill_chunk,
            depth: stages + 1,
            stages,
            rope_switch: found.profile.recompute_at,
            prefix_cache: true,
        });
        Driver { pipeline: up.unwrap(), events, scheduler, last: 0 }
    }

    /// The answers to all `requests` at once; `guess` says how the answer of a request goes on, by its index and
    /// length. Also the number of steps.
    async fn answers(
        &mut self,
        requests: &[(Vec<u32>, v1::RowSampling)],
        guess: impl Fn(usize, usize) -> Vec<u32>,
    ) -> (Vec<Vec<v1::SampledToken>>, u64) {
        let first = self.last + 1;
        for (prompt, sampling) in requests {
            self.last += 1;
            let sampling = sampling.clone();
            let work = Work::Generate { max_tokens: TOKENS as u32, ends: vec![], sampling };
            let (prompt, tenant) = (prompt.clone(), "".into());
            let request = Request { prompt, tenant, connection: 0, deadline: None, work };
            let unplaced = Unplaced::new(self.last, request);
            self.scheduler.check(&unplaced).unwrap();
            self.scheduler.adopt(unplaced);
        }
        let mut answers = vec![Vec::new(); requests.len()];
        let (mut steps, mut ended) = (0, 0);
        while ended < requests.len() {
            for (index, answer) in answers.iter().enumerate() {
                self.scheduler.propose(first + index as u64, guess(index, answer.len()));
            }
            while let Some(meta) = self.scheduler.next_step() {
                self.pipeline.issue(meta).unwrap();
                steps += 1;
            }
            let result = self.result().await;
            assert_eq!(result.failure, None);
            let tokens = match result.output {
                Some(step_result::Output::Tokens(tokens)) => tokens.tokens,
                other => panic!("unexpected {other:?}"),
            };
            let outputs: Vec<_> = tokens.iter().map(|t| (t.sequence, Output::Token(t.token_id))).collect();
            for committed in self.scheduler.commit(result.step, &outputs).unwrap() {
                let token = v1::SampledToken { sequence: 0, ..tokens[committed.index].clone() };
                answers[(committed.sequence - first) as usize].push(token);
                ended += usize::from(committed.finished.is_some());
            }
        }
        assert_eq!(self.scheduler.stats().blocks_used, 0, "a block leaked");
        (answers, steps)
    }

    async fn result(&mut self) -> v1::StepResult {
        loop {
            match tokio::time::timeout(PATIENCE, self.events.recv())
                .await
                .expect("a silent pipeline")
                .unwrap()
            {
                PipelineEvent::Result(result) => return result,
                PipelineEvent::Done { .. } | PipelineEvent::Leaving { .. } => {}
                PipelineEvent::Lost { worker, reason, .. } => panic!("lost {worker}: {reason}"),
            }
        }
    }
}

/// Greedy, sampled, and sampled with everything that looks back.
fn samplings(prompt_tokens: u32) -> Vec<v1::RowSampling> {
    let sampled = v1::Sampling { temperature: Some(1.0), top_p: Some(0.9), ..v1::Sampling::default() };
    let penalties = v1::Sampling {
        repetition_penalty: Some(1.3),
        frequency_penalty: Some(0.5),
        presence_penalty: Some(0.4),
        ..sampled.clone()
    };
    [v1::Sampling::default(), sampled, penalties]
        .map(|sampling| v1::RowSampling {
            sampling: Some(sampling),
            seed: 7,
            prompt_tokens,
            logprobs: Some(3),
            history: Vec::new(),
            ..v1::RowSampling::default()
        })
        .into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafts_never_change_an_answer_and_right_ones_save_steps() {
    let expected = expectations(&model("shakespeare"));
    let requests: Vec<_> = expected[..3]
        .iter()
        .flat_map(|e| samplings(e.ids.len() as u32).into_iter().map(|sampling| (e.ids.clone(), sampling)))
        .collect();
    for workers in [1, 2] {
        let mut driver = Driver::start(&Options { workers, ..Options::default() }).await;
        let (plain, plain_steps) = driver.answers(&requests, |_, _| vec![]).await;
        for (e, answers) in expected.iter().zip(plain.chunks(3)) {
            let greedy: Vec<_> = answers[0].iter().map(|t| t.token_id).collect();
            assert_eq!(greedy, e.greedy[..TOKENS]);
        }
        let next = |index: usize, at: usize, count: usize| -> Vec<u32> {
            plain[index].iter().skip(at).take(count).map(|t| t.token_id).collect()
        };
        let wrong = |token: &mut u32| *token = (*token + 1) % 2000;
        let right = driver.answers(&requests, |index, at| next(index, at, 4)).await;
        assert_eq!(right.0, plain, "right drafts, {workers} workers");
        assert!(right.1 * 3 < plain_steps, "{} steps instead of {plain_steps}", right.1);
        let none = driver.answers(&requests, |index, at| {
            let mut drafts = next(index, at, 4);
            drafts.iter_mut().for_each(wrong);
            drafts
        });
        let none = none.await;
        assert_eq!(none.0, plain, "wrong drafts, {workers} workers");
        // One, two or three right ones before a wrong one, more of them than a block has positions, or none at all.
        let some = driver.answers(&requests, |index, at| {
            let mut drafts = next(index, at, [0, 3, 20, 4, 7][(index + at) % 5]);
            drafts.iter_mut().skip(1 + at % 3).step_by(2).for_each(wrong);
            drafts
        });
        assert_eq!(some.await.0, plain, "some of both, {workers} workers");
    }
}
