//! Two stages of a model that hands on more than the residual stream, over every kind of link.

use std::{ops::ControlFlow, path::Path, sync::Barrier, thread};

use candle_core::{Device, Tensor};
use strata_proto::{LayerRange, WeightDigests, v1::LinkKind};

use super::*;
use crate::{
    engine::{Allocated, Size, StepError, Values},
    kernels::{
        cpu::{Cpu, isa::Isa},
        tensor::candle_dtype,
    },
    model::{LoadedBytes, Model, RangeSpec, architecture::Carried},
    transport::{self, End, Link, loopback::Hub, tcp::Listener},
    weights::Checkpoint,
};

const FENCE: Fence = Fence { term: 1, pipeline: 0, incarnation: 1 };
const TOKEN: [u8; 32] = [7; 32];
/// Steps; the second one is poisoned.
const STEPS: u64 = 5;
/// What the last stage gives for each step, or why it has nothing.
type Results = Vec<Result<Vec<f32>, String>>;

/// Numbers that every format holds, different for each step, tensor and place.
fn numbers(step: u64, tensor: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i + 3 * tensor) % 128) as f32 + step as f32).collect()
}

/// Of three layers; two tensors are carried beside the residual stream, one in its format.
fn model() -> Model {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/shakespeare");
    let mut model = Model::open_dir(&directory).unwrap().1;
    model.tower.carried =
        vec![Carried { columns: 5, dtype: Some(DType::F32) }, Carried { columns: 7, dtype: None }];
    model
}

/// Hands on what its model says, and at the end gives back what came.
struct Fake {
    model: Model,
    spec: RangeSpec,
    digests: WeightDigests,
    /// Tensors that it leaves out.
    missing: usize,
    step: u64,
    values: Vec<f32>,
    order: Vec<u32>,
    cpu: Cpu,
}

impl Fake {
    fn new(head: bool, missing: usize) -> Self {
        let model = model();
        let layers = if head { LayerRange::new(3, 6) } else { LayerRange::new(0, 3) };
        let spec = RangeSpec { layers, embedding: !head, head, dtype: DType::BF16, quantization: None };
        let vocab = model.tower.vocab;
        let cpu = Cpu::on(Isa::detect());
        Fake {
            model,
            spec,
            digests: WeightDigests::default(),
            missing,
            step: 0,
            values: vec![0.0; vocab],
            order: vec![0; vocab],
            cpu,
        }
    }

    fn sent(&self, tokens: usize) -> Vec<Tensor> {
        let specs = self.model.tower.activation(tokens, self.spec.dtype);
        let kept = specs.len() - self.missing;
        let tensors = specs[..kept].iter().enumerate().map(|(i, spec)| {
            let values = numbers(self.step, i, spec.rows * spec.columns);
            let tensor = Tensor::from_vec(values, (spec.rows, spec.columns), &Device::Cpu);
            tensor.unwrap().to_dtype(candle_dtype(spec.dtype)).unwrap()
        });
        tensors.collect()
    }
}

impl Engine for Fake {
    fn load(
        &mut self,
        _: Option<&Path>,
        _: &Checkpoint,
        _: &Model,
        _: &RangeSpec,
        _: &mut dyn FnMut(LoadedBytes) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        Ok(())
    }

    fn unload(&mut self) {}

    fn loaded(&self) -> Option<Loaded<'_>> {
        Some(Loaded { model: &self.model, spec: &self.spec, bytes: 0, digests: &self.digests })
    }

    fn read_weights(&mut self, _: u64, to: &mut [u8]) -> Result<(), StepError> {
        to.fill(0);
        Ok(())
    }

    fn prepare(&mut self, _: Size) -> Result<Allocated, ModelError> {
        Ok(Allocated { kv_bytes: 0, workspace_bytes: 0 })
    }

    fn release(&mut self) {}

    fn forward(&mut self, step: Step<'_>) -> Result<Output<'_>, StepError> {
        match step.input {
            Input::Tokens { ids, .. } => Ok(Output::Hidden(Tensors::Host(self.sent(ids.len())))),
            Input::Hidden(tensors) => {
                self.values.fill(0.0);
                let came = tensors.into_host()?.into_iter().flat_map(|tensor| {
                    let wide = tensor.to_dtype(candle_core::DType::F32).unwrap();
                    wide.flatten_all().unwrap().to_vec1::<f32>().unwrap()
                });
                self.values.iter_mut().zip(came).for_each(|(value, x)| *value = x);
                let Fake { values, order, cpu, .. } = self;
                Ok(Output::Values(Values { values, order, drawn: &[], cpu }))
            }
        }
    }
}

fn incarnation() -> Incarnation {
    Incarnation {
        fence: FENCE,
        interrupt: Interrupt::default(),
        neighbours: Neighbours::default(),
        progress: Arc::default(),
        meter: Arc::default(),
        heartbeat_timeout: Duration::from_secs(2),
        dtype: DType::BF16,
        max_step_tokens: 4,
        pending: None,
        upstream: None,
        downstream: None,
        sequences: HashMap::new(),
    }
}

fn step(step: u64) -> v1::StepMeta {
    let row = v1::Row { sequence: 1, count: 3, output: RowOutput::Logits as i32, ..v1::Row::default() };
    v1::StepMeta { fence: Some(FENCE), step, rows: vec![row], token_ids: vec![1, 2, 3], released: vec![] }
}

/// What the last of two stages makes of the first one's steps, which leaves out so many tensors.
fn run(kind: LinkKind, missing: usize) -> Results {
    let nccl_id = if kind == LinkKind::Nccl { transport::nccl::mint_id().unwrap().to_vec() } else { vec![] };
    let (listener, hub) = (Listener::bind("127.0.0.1:0").unwrap(), Arc::new(Hub::default()));
    let pending = listener.expect(TOKEN);
    let link =
        || Link { kind, token: TOKEN, address: listener.address().to_string(), nccl_id: nccl_id.clone() };
    let end = |incarnation: &Incarnation, ordinal, pending| End {
        fence: FENCE,
        interrupt: incarnation.interrupt.clone(),
        hub: hub.clone(),
        pending,
        ordinal,
        longest: model().tower.activation(incarnation.max_step_tokens, DType::BF16),
        neighbours: incarnation.neighbours.clone(),
        timeout: incarnation.heartbeat_timeout,
    };
    let hook: StepHook = Arc::new(|meta| if meta.step == 1 { Err("step 1 fails".into()) } else { Ok(()) });
    // Both ends are up before a step runs, and stay until the last stage has all that it gets, as in a pipeline.
    let (connected, done) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        let first = scope.spawn(|| {
            let (mut first, mut engine) = (incarnation(), Fake::new(false, missing));
            let down = transport::open(kind).unwrap().downstream(link(), end(&first, 0, None));
            first.downstream = Some(down.unwrap());
            connected.wait();
            let broke = (0..STEPS).find(|number| {
                engine.step = *number;
                first.execute(&step(*number), &mut engine, Some(&hook)).is_err()
            });
            if broke.is_some() {
                // As a stage does whose run broke.
                first.interrupt.trip();
                drop(first.downstream.take());
            }
            done.wait();
            broke
        });
        let (mut last, mut engine) = (incarnation(), Fake::new(true, 0));
        let up = transport::open(kind).unwrap().upstream(link(), end(&last, 1, Some(pending)));
        last.upstream = Some(up.unwrap());
        connected.wait();
        let mut results = Results::new();
        for number in 0..STEPS {
            let Ok((Some(result), _)) = last.execute(&step(number), &mut engine, None) else { break };
            results.push(match (result.output, result.failure) {
                (Some(step_result::Output::Vectors(mut vectors)), None) => {
                    Ok(vectors.vectors.remove(0).values)
                }
                (_, failure) => Err(failure.unwrap_or_default()),
            });
        }
        done.wait();
        // What has too few tensors is not sent.
        assert_eq!(first.join().unwrap(), (missing > 0).then_some(0), "{kind:?}");
        results
    })
}

#[test]
fn every_link_carries_all_tensors_of_an_activation_and_no_fewer() {
    let mut kinds = vec![LinkKind::Loopback, LinkKind::DeviceCopy, LinkKind::Tcp];
    if cfg!(feature = "cuda") {
        kinds.push(LinkKind::Nccl);
    }
    #[cfg(feature = "cuda")]
    crate::kernels::cuda::tests::emulator();
    for kind in kinds {
        let results = run(kind, 0);
        assert_eq!(results.len() as u64, STEPS, "{kind:?}");
        for (number, result) in (0..).zip(results) {
            if number == 1 {
                assert_eq!(result, Err("step 1 fails".into()), "{kind:?}");
                continue;
            }
            let mut sent = [192, 5, 7].iter().enumerate().map(|(i, columns)| numbers(number, i, 3 * columns));
            let (got, sent) = (result.unwrap(), [(); 3].map(|()| sent.next().unwrap()).concat());
            assert_eq!(got[..sent.len()], sent, "{kind:?} step {number}");
            assert!(got[sent.len()..].iter().all(|x| *x == 0.0), "{kind:?} brought more");
        }
        assert_eq!(run(kind, 1), [], "{kind:?} carried too few");
    }
}
