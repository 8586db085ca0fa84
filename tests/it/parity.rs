//! Any split, same answer: every model, every split, both links, every chunking, alone and batched — transformers'
//! tokens, its logits within 1e-3, and the same bits every time.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use strata_coordinator::{
    cluster::{
        History,
        discovery::discover,
        pipeline::{Pipeline, PipelineEvent},
    },
    planner::Split,
};
use strata_proto::{
    BLOCK_TOKENS, LinkKind,
    v1::{self, Fence, RowOutput, step_result},
};
use tokio::sync::mpsc;

use crate::cluster::{
    Expected, Options, PATIENCE, encoder_expectations, expectations, models_with_expectations,
};

/// A pipeline that a test drives step by step, with a block allocator that never frees.
pub struct Driver {
    pipeline: Pipeline,
    events: mpsc::UnboundedReceiver<PipelineEvent>,
    step: u64,
    /// Sequences longer than this turn by other frequencies.
    switch: usize,
    next_block: u32,
    next_sequence: u64,
}

/// A sequence of the driver.
pub struct Request {
    pub ids: Vec<u32>,
    pub prompt: usize,
    pub chunk: usize,
    /// Step of this run in which it arrives, so that batches are mixed.
    pub arrives: usize,
    pub want: usize,
    pub output: RowOutput,
    pub sequence: u64,
    pub cached: usize,
    pub blocks: usize,
    pub sampled: Vec<v1::SampledToken>,
    pub logits: Vec<f32>,
    /// Alternatives that are asked for with each token; without them, a GPU may keep the logits to itself.
    pub logprobs: Option<u32>,
}

impl Request {
    pub fn new(ids: &[u32], chunk: usize, want: usize, output: RowOutput) -> Self {
        Request {
            ids: ids.to_vec(),
            prompt: ids.len(),
            chunk,
            arrives: 0,
            want,
            output,
            sequence: 0,
            cached: 0,
            blocks: 0,
            sampled: Vec::new(),
            logits: Vec::new(),
            logprobs: Some(20),
        }
    }

    fn done(&self) -> bool {
        match self.output {
            RowOutput::Logits => !self.logits.is_empty(),
            _ => self.ids.len() - self.prompt == self.want,
        }
    }
}

impl Driver {
    pub async fn start(options: &Options) -> Driver {
        let members = options.members();
        let deployment = options.deployment();
        let found = discover(&members, &deployment).await.unwrap();
        let plan = found.plan(&deployment).unwrap();
        let (sink, events) = mpsc::unbounded_channel();
        let fence = Fence { term: 1, pipeline: 0, incarnation: 1 };
        let sink = Arc::new(move |_, event| {
            let _ = sink.send(event);
        });
        let switch = found.profile.recompute_at.map_or(usize::MAX, |n| n as usize);
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
        Driver { pipeline: up.unwrap(), events, step: 0, switch, next_block: 0, next_sequence: 0 }
    }

    /// Runs requests to their end, all that have arrived in every step.
    pub async fn run(&mut self, mut requests: Vec<Request>) -> Vec<Request> {
        for request in &mut requests {
            self.next_sequence += 1;
            request.sequence = self.next_sequence;
        }
        for turn in 0.. {
            if requests.iter().all(Request::done) {
                return requests;
            }
            let mut meta = v1::StepMeta { step: self.step, ..Default::default() };
            for request in requests.iter_mut().filter(|r| r.arrives <= turn && !r.done()) {
                let row = self.row(request);
                meta.token_ids.extend(&request.ids[request.cached..request.cached + row.count as usize]);
                request.cached += row.count as usize;
                meta.rows.push(row);
            }
            if meta.rows.is_empty() {
                continue;
            }
            self.pipeline.issue(meta).unwrap();
            self.step += 1;
            let result = self.result().await;
            assert_eq!(result.failure, None);
            match result.output {
                Some(step_result::Output::Tokens(tokens)) => {
                    for token in tokens.tokens {
                        let request = requests.iter_mut().find(|r| r.sequence == token.sequence).unwrap();
                        request.ids.push(token.token_id);
                        if request.ids.len() - 1 == self.switch {
                            // All that is cached has turned by the wrong angles.
                            (request.cached, request.blocks) = (0, 0);
                        }
                        request.sampled.push(v1::SampledToken { sequence: 0, ..token });
                    }
                }
                Some(step_result::Output::Vectors(vectors)) => {
                    for vector in vectors.vectors {
                        let request = requests.iter_mut().find(|r| r.sequence == vector.sequence).unwrap();
                        request.logits = vector.values;
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        unreachable!()
    }

    fn row(&mut self, request: &mut Request) -> v1::Row {
        let left = request.ids.len() - request.cached;
        let count = left.min(request.chunk);
        let needed = (request.cached + count).div_ceil(BLOCK_TOKENS as usize);
        let first_block_index = request.blocks as u32;
        let new_blocks: Vec<u32> = (request.blocks..needed).map(|_| self.block()).collect();
        request.blocks = needed;
        let reset = request.cached == 0;
        let sampling = v1::RowSampling {
            prompt_tokens: request.prompt as u32,
            logprobs: request.logprobs,
            ..v1::RowSampling::default()
        };
        v1::Row {
            sequence: request.sequence,
            start: request.cached as u32,
            count: count as u32,
            reset,
            first_block_index,
            new_blocks,
            output: if count == left { request.output } else { RowOutput::None } as i32,
            sampling: reset.then_some(sampling),
            rope_set: u32::from(request.ids.len() > self.switch),
            ..v1::Row::default()
        }
    }

    fn block(&mut self) -> u32 {
        self.next_block += 1;
        self.next_block - 1
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

/// Every way to cut `layers` into stages.
fn every_split(layers: u32) -> Vec<Vec<u32>> {
    let cuts = layers - 1;
    let split = |mask: u32| {
        let mut counts = vec![1];
        for cut in 0..cuts {
            match mask >> cut & 1 {
                1 => counts.push(1),
                _ => *counts.last_mut().unwrap() += 1,
            }
        }
        counts
    };
    (0..1u32 << cuts).map(split).collect()
}

/// What one pipeline answers: logits of every prompt under every chunking, and sampled tokens with the bits of their
/// log-probabilities, alone and in a batch of 32.
async fn observe(options: &Options, expected: &[Expected]) -> (Vec<Vec<u32>>, Vec<Vec<v1::SampledToken>>) {
    let mut driver = Driver::start(options).await;
    let chunks = [1, 7, 16, usize::MAX];
    let logits =
        chunks.iter().flat_map(|c| expected.iter().map(|e| Request::new(&e.ids, *c, 0, RowOutput::Logits)));
    let logits = driver.run(logits.collect()).await;
    let bits = logits.iter().map(|r| r.logits.iter().map(|x| x.to_bits()).collect()).collect();

    let mut sampled = Vec::new();
    for e in expected {
        let alone = Request::new(&e.ids, usize::MAX, e.greedy.len(), RowOutput::Token);
        sampled.extend(driver.run(vec![alone]).await);
    }
    let batch = (0..32).map(|i| {
        let e = &expected[i % expected.len()];
        // Different chunks for one prompt, different prompts in one step, arrivals spread over the run.
        let request = Request::new(&e.ids, chunks[i / expected.len() % 4], e.greedy.len(), RowOutput::Token);
        Request { arrives: i * 5 % 13, ..request }
    });
    sampled.extend(driver.run(batch.collect()).await);
    for (i, request) in sampled.iter().enumerate() {
        let want = &expected[if i < expected.len() { i } else { (i - expected.len()) % expected.len() }];
        let got: Vec<u32> = request.sampled.iter().map(|t| t.token_id).collect();
        assert_eq!(got, want.greedy, "greedy ids of prompt {:?}", want.ids);
    }
    (bits, sampled.into_iter().map(|r| r.sampled).collect())
}

async fn check_every_split(directory: &Path) {
    let expected = expectations(directory);
    let layers = strata_worker::model::describe(directory, "m").unwrap().layer_count();
    let mut reference = None;
    let mut seen = BTreeMap::new();
    for counts in every_split(layers) {
        for links in [LinkKind::Loopback, LinkKind::Tcp] {
            if counts.len() == 1 && links == LinkKind::Tcp {
                continue;
            }
            let options = Options {
                model: directory.to_owned(),
                workers: counts.len(),
                split: Split::Counts(counts.clone()),
                links: Some(links),
                kv_tokens: Some(16 * 1024),
                max_step_tokens: 4096,
                ..Options::default()
            };
            let got = observe(&options, &expected).await;
            let (bits, sampled) = reference.get_or_insert_with(|| got.clone());
            assert!(*bits == got.0, "{} split {counts:?} over {links}: other logits", directory.display());
            assert!(*sampled == got.1, "{} split {counts:?} over {links}: other tokens", directory.display());
            *seen.entry(counts.len()).or_insert(0) += 1;
        }
    }
    let (bits, _) = reference.unwrap();
    for (i, row) in bits.iter().enumerate() {
        let want = &expected[i % expected.len()].last_row;
        assert_eq!(row.len(), want.len());
        let worst = row.iter().zip(want).map(|(a, b)| (f32::from_bits(*a) - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-3, "{}: logits differ from transformers' by {worst}", directory.display());
    }
    assert_eq!(seen.len() as u32, layers, "a number of stages was left out");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_model_answers_the_same_for_every_split_link_chunk_and_batch() {
    check_every_split(&crate::cluster::model("shakespeare")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fixtures_answer_the_same_for_every_split_link_chunk_and_batch() {
    let decoder = |d: &&PathBuf| encoder_expectations(d).is_none() && !d.ends_with("shakespeare");
    for directory in models_with_expectations().iter().filter(decoder) {
        check_every_split(directory).await;
    }
}

#[test]
fn every_split_is_every_split() {
    let splits = every_split(4);
    assert_eq!(splits.len(), 8);
    assert!(splits.iter().all(|s| s.iter().sum::<u32>() == 4));
    assert!(
        splits.contains(&vec![4]) && splits.contains(&vec![1, 2, 1]) && splits.contains(&vec![1, 1, 1, 1])
    );
}
