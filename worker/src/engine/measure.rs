//! Measures every kernel of a device by itself, at the shapes of a model: a GPU by its own clock, a CPU by the host's.
//!
//! No weights are needed: matrices of the right shape are made on the device, of random numbers on a GPU, whose clock
//! depends on them. Each run takes the next one of several that together are larger than the caches, as the layers of a
//! model are.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::Serialize;
use strata_proto::{DType, Format, Quantization, v1};

use crate::{
    device::{Compute, DeviceSpec},
    error::WorkerError,
    kernels::{
        measure::Random,
        ops::{Act, AttentionMask, held_format},
    },
    model::{
        Model,
        architecture::{Ffn, Head, Layer, Tower},
    },
    sampler::SamplingParams,
};

/// Rows of products, most valuable first: one stream, many, a prompt, and what lies between.
pub const ROWS: [u32; 10] = [1, 32, 2048, 8, 128, 16, 64, 512, 2, 4];
/// The head is computed for the last token of each sequence only.
const MOST_OUTPUTS: u32 = 128;
/// Sequences and positions before the token that each of them decodes.
const DECODES: [(u32, u32); 6] = [(1, 2048), (32, 2048), (1, 8192), (1, 512), (32, 512), (128, 512)];
/// Tokens of a prompt, and positions before them.
const PREFILLS: [(u32, u32); 4] = [(2048, 0), (512, 0), (512, 1536), (512, 7680)];
/// Rows of everything else.
const OTHERS: [u32; 3] = [1, 32, 2048];
/// Sides of the square products that arithmetic rates are taken from: larger ones as long as they are quick, and all of
/// them take no more than a share of the budget.
const SIDES: [usize; 5] = [512, 1024, 2048, 4096, 8192];
const QUICK: f64 = 0.02;
const LIMITS_SHARE: u32 = 4;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where.
    pub device: DeviceSpec,
    /// How the CPU computes.
    pub compute: Compute,
    /// Where a GPU's compiled kernels are kept.
    pub kernels: Option<PathBuf>,
    /// Whose shapes.
    pub model: Model,
    /// Format of rows and cache.
    pub dtype: DType,
    /// Formats of weights.
    pub formats: Vec<Format>,
    /// Rows of products, in the order in which they are measured.
    pub rows: Vec<u32>,
    /// For measuring, from when the device is open and its kernels are compiled. Nothing is begun that would take
    /// longer, but the most valuable kernel.
    pub budget: Duration,
}

/// How fast a device is at what bounds its kernels, as far as was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// Of memory: by a large copy, which reads and writes, on a GPU; by reading weights on a CPU.
    pub bytes_per_second: f64,
    /// Of arithmetic, by format of weights: by the best large square product. A format that there was no time for has
    /// none.
    pub flops_per_second: BTreeMap<String, f64>,
}

impl Limits {
    /// Takes what was just seen into account if it is faster.
    fn raise(&mut self, format: &str, rates: (f64, f64)) {
        self.bytes_per_second = self.bytes_per_second.max(rates.0);
        if let Some(flops_per_second) = self.flops_per_second.get_mut(format) {
            *flops_per_second = flops_per_second.max(rates.1);
        }
    }
}

/// A kernel's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What it does.
    pub kernel: String,
    /// Format of its weights, or of rows and cache if it has none.
    pub format: String,
    /// Outputs and inputs of a product, heads and their width in attention, else the width of a row.
    pub shape: String,
    /// Rows, or sequences in attention while decoding.
    pub rows: u32,
    /// Positions before a row, where it matters.
    pub context: Option<u32>,
    /// Of one run, the median of several rounds.
    pub microseconds: f64,
    /// Bytes that it has to read and write, per nanosecond.
    pub gigabytes_per_second: f64,
    /// Operations per picosecond.
    pub teraflops_per_second: f64,
    /// What bounds it on this device: `memory` or `arithmetic`; none if that is not known, as of what lies in caches.
    pub bound: Option<&'static str>,
    /// The time it would take at the best speed that was seen of that bound, as a share of the time it takes.
    pub share: Option<f64>,
}

/// What a report consists of.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Report {
    /// First.
    Limits(Limits),
    /// Then one of these per kernel.
    Line(Line),
    /// In the end, what there are no figures of.
    Left {
        /// How many kernels the time or the device's memory did not suffice for.
        not_measured: usize,
        /// What this model computes and is never measured.
        never_measured: &'static [&'static str],
    },
}

/// A product of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Qkv,
    AttentionOut,
    Up(Act),
    GateUp(Act),
    Down,
    Head,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Qkv => "qkv",
            Role::AttentionOut => "attention out",
            Role::Up(_) => "up",
            Role::GateUp(_) => "gate and up",
            Role::Down => "down",
            Role::Head => "head",
        }
    }
}

/// One kernel, or what a step always does together.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernel {
    Product {
        role: Role,
        /// Outputs and inputs.
        shape: (usize, usize),
        format: Format,
        rows: u32,
    },
    /// Attention of one token of each of some sequences.
    Decode {
        sequences: u32,
        context: u32,
    },
    /// Attention of several tokens of one sequence.
    Prefill {
        tokens: u32,
        context: u32,
    },
    Norm {
        rows: u32,
    },
    /// Queries and keys turn, keys and values go into the cache.
    Place {
        rows: u32,
    },
    /// The likeliest token of rows of logits, or one that is drawn from the likeliest ones.
    Choose {
        rows: u32,
        top_p: bool,
    },
}

/// A device whose kernels can be measured.
pub(crate) trait Bench {
    /// Bytes per second of [`Limits`].
    fn bytes_per_second(&mut self) -> Result<f64, WorkerError>;

    /// Seconds of one run; `None` if the device has no memory for it. What takes longer than `patience` is run once.
    fn seconds(&mut self, kernel: Kernel, patience: Duration) -> Result<Option<f64>, WorkerError>;
}

/// Measures the kernels of a device, most valuable first, and reports each as soon as it is known.
///
/// # Errors
/// If the device cannot be used, or nothing was measured.
pub fn measure(
    request: &Request,
    report: &mut dyn FnMut(Report) -> Result<(), WorkerError>,
) -> Result<(), WorkerError> {
    let mut bench = super::bench(request)?;
    let begun = Instant::now();
    let mut limits = limits(request, &mut *bench, begun)?;
    report(Report::Limits(limits.clone()))?;
    let kernels = kernels(request);
    let (all, mut measured) = (kernels.len(), 0);
    // How many times as long as at its bound a run took last, by what it was.
    let mut slowness = BTreeMap::new();
    for (index, kernel) in kernels.into_iter().enumerate() {
        let work = Work::of(kernel, request);
        let key = (work.kernel.clone(), work.format.clone());
        let least = work.least_seconds(&limits);
        let rest = request.budget.saturating_sub(begun.elapsed());
        let expected = least * slowness.get(&key).copied().unwrap_or(1.0);
        let is_begun = measured == 0 || expected < rest.as_secs_f64();
        let patience = rest / (all - index) as u32;
        let seconds = if is_begun { bench.seconds(kernel, patience)? } else { None };
        let Some(seconds) = seconds else { continue };
        measured += 1;
        slowness.insert(key, seconds / least);
        report(Report::Line(work.line(seconds, &mut limits)))?;
    }
    let never_measured: &[_] = if request.model.tower.caches { &[] } else { &["attention of an encoder"] };
    report(Report::Left { not_measured: all - measured, never_measured })?;
    match measured {
        0 => Err(WorkerError::WrongState(format!(
            "device {}: nothing was measured: it has no memory for any of {all} kernels of this model; free some, or name a \
             smaller model",
            request.device.id
        ))),
        _ => Ok(()),
    }
}

/// What is taken for the device's full speed at first.
fn limits(request: &Request, bench: &mut dyn Bench, begun: Instant) -> Result<Limits, WorkerError> {
    let bytes_per_second = bench.bytes_per_second()?;
    let mut flops_per_second = BTreeMap::new();
    let rest = || (request.budget / LIMITS_SHARE).saturating_sub(begun.elapsed());
    let formats =
        unique([Format::Float(request.dtype)].into_iter().chain(all_products(request).map(|p| p.2)));
    for format in formats {
        let mut best = 0f64;
        for side in SIDES {
            if rest().is_zero() {
                break;
            }
            let kernel = Kernel::Product { role: Role::Qkv, shape: (side, side), format, rows: side as u32 };
            let Some(seconds) = bench.seconds(kernel, rest())? else { break };
            best = best.max(2.0 * (side as f64).powi(3) / seconds);
            if seconds > QUICK {
                break;
            }
        }
        if best > 0.0 {
            flops_per_second.insert(format.to_string(), best);
        }
    }
    Ok(Limits { bytes_per_second, flops_per_second })
}

/// The products of a model in all formats, each in the one that its weights are held in.
fn all_products(request: &Request) -> impl Iterator<Item = (Role, (usize, usize), Format)> {
    let all = request.formats.iter().flat_map(|format| {
        let roles = products(&request.model.tower).into_iter();
        roles.map(|(role, shape)| (role, shape, held_format(shape.1, *format)))
    });
    unique(all).into_iter()
}

/// Everything that is measured, most valuable first.
fn kernels(request: &Request) -> Vec<Kernel> {
    let tower = &request.model.tower;
    let context = tower.context as u32;
    let mut all = Vec::new();
    let products = |rows: u32, all: &mut Vec<Kernel>| {
        let products = all_products(request).filter(|(role, ..)| *role != Role::Head || rows <= MOST_OUTPUTS);
        all.extend(products.map(|(role, shape, format)| Kernel::Product { role, shape, format, rows }));
    };
    // As much of them as the model's context allows, and nothing twice.
    let decodes = DECODES.map(|(sequences, before)| (sequences, before.min(context)));
    let prefills = PREFILLS.map(|(tokens, before)| (tokens.min(context), before));
    let prefills = prefills.into_iter().filter(|(tokens, before)| tokens + before <= context);
    let mut rows = request.rows.iter();
    rows.by_ref().take(3).for_each(|rows| products(*rows, &mut all));
    if tower.caches {
        let decodes = unique(decodes).into_iter();
        all.extend(decodes.map(|(sequences, context)| Kernel::Decode { sequences, context }));
        let prefills = unique(prefills).into_iter();
        all.extend(prefills.map(|(tokens, context)| Kernel::Prefill { tokens, context }));
    }
    for rows in unique(OTHERS.map(|rows| rows.min(context))) {
        all.push(Kernel::Norm { rows });
        if tower.caches {
            all.push(Kernel::Place { rows });
        }
        if matches!(tower.head, Head::Lm { .. }) && rows <= MOST_OUTPUTS {
            all.extend([false, true].map(|top_p| Kernel::Choose { rows, top_p }));
        }
    }
    rows.for_each(|rows| products(*rows, &mut all));
    all
}

/// What tokens are chosen by, and logits of some rows that they are chosen from.
pub(crate) fn choice(top_p: bool, logits: usize) -> Result<(SamplingParams, Vec<f32>), WorkerError> {
    let (temperature, top_p) = if top_p { (1.0, 0.9) } else { (0.0, 1.0) };
    let sampling =
        v1::Sampling { temperature: Some(temperature), top_p: Some(top_p), ..v1::Sampling::default() };
    let params = SamplingParams::try_from(&sampling).map_err(|e| WorkerError::BadMessage(e.to_string()))?;
    let mut random = Random::default();
    // As far apart as a model's.
    Ok((params, (0..logits).map(|_| 10.0 * random.next()).collect()))
}

/// Each once, in the order of their first coming.
fn unique<T: PartialEq>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    all.into_iter().fold(Vec::new(), |mut seen, one| {
        if !seen.contains(&one) {
            seen.push(one);
        }
        seen
    })
}

/// The products of a model, by a layer in its middle; of a mixture of experts, those of one expert.
pub(crate) fn products(tower: &Tower) -> Vec<(Role, (usize, usize))> {
    let (width, layer) = (tower.width, middle(tower));
    let Layer { attention, ffn, .. } = layer;
    let (inner, act) = (ffn.mlp().inner, ffn.mlp().act);
    let up = if matches!(ffn, Ffn::Plain(_)) { Role::Up(act) } else { Role::GateUp(act) };
    let mut all = vec![
        (Role::Qkv, (attention.qkv_width(), width)),
        (Role::AttentionOut, (width, attention.q_width())),
        (up, (ffn.up_width(), width)),
        (Role::Down, (width, inner)),
    ];
    if matches!(tower.head, Head::Lm { .. } | Head::Mlm(..)) {
        all.push((Role::Head, (tower.vocab, width)));
    }
    all
}

/// The layer whose shapes stand for all.
pub(crate) fn middle(tower: &Tower) -> &Layer {
    &tower.layers[tower.layers.len() / 2]
}

/// What a kernel has to do.
struct Work {
    kernel: String,
    format: String,
    shape: String,
    rows: u32,
    context: Option<u32>,
    bytes: f64,
    flops: f64,
    /// Whether it reads more than caches hold, as the layers of a model do one after the other.
    is_from_memory: bool,
}

impl Work {
    fn of(kernel: Kernel, request: &Request) -> Work {
        let (tower, dtype) = (&request.model.tower, request.dtype);
        let (attention, size) = (&middle(tower).attention, dtype.size() as f64);
        let (q, kv) = (attention.q_width() as f64, attention.kv_width() as f64);
        let heads = format!("{}/{}x{}", attention.heads, attention.kv_heads, attention.head_dim);
        // Rows of queries and of what comes out, keys and values of the positions that are seen, and pairs of the two.
        let attend = |tokens: f64, positions: f64, pairs: f64| {
            (size * (2.0 * tokens * q + 2.0 * positions * kv), 4.0 * pairs * q)
        };
        let seen = |positions: u32| match attention.mask {
            AttentionMask::Window(window) => f64::from(positions).min(window as f64),
            _ => f64::from(positions),
        };
        let named = |name: &str, shape: &dyn fmt::Display, rows, (bytes, flops)| Work {
            kernel: name.into(),
            format: dtype.to_string(),
            shape: shape.to_string(),
            rows,
            context: None,
            bytes,
            flops,
            is_from_memory: false,
        };
        match kernel {
            Kernel::Product { role, shape: (n, k), format, rows } => {
                let (each, n, k) = (f64::from(rows), n as f64, k as f64);
                let out = match role {
                    Role::GateUp(_) => n / 2.0 * size,
                    // Read, too.
                    Role::AttentionOut | Role::Down => 2.0 * n * size,
                    Role::Head => n * 4.0,
                    Role::Qkv | Role::Up(_) => n * size,
                };
                let weights = n * k * bits(format) / 8.0;
                let work = (weights + each * (k * size + out), 2.0 * each * n * k);
                let name = format!("product {}", role.name());
                let work = named(&name, &format!("{n}x{k}"), rows, work);
                Work { format: format.to_string(), is_from_memory: true, ..work }
            }
            Kernel::Decode { sequences, context } => {
                let positions = f64::from(sequences) * seen(context);
                let work = attend(f64::from(sequences), positions, positions);
                let work = named("attention decode", &heads, sequences, work);
                Work { context: Some(context), is_from_memory: true, ..work }
            }
            Kernel::Prefill { tokens, context } => {
                let pairs = (context + 1..=context + tokens).map(seen).sum();
                let work = attend(f64::from(tokens), seen(context + tokens), pairs);
                let work = named("attention prefill", &heads, tokens, work);
                Work { context: Some(context), is_from_memory: true, ..work }
            }
            Kernel::Norm { rows } => {
                let elements = f64::from(rows) * tower.width as f64;
                named("norm", &tower.width, rows, (2.0 * elements * size, 4.0 * elements))
            }
            Kernel::Place { rows } => {
                let elements = f64::from(rows) * attention.qkv_width() as f64;
                named("rope and store", &heads, rows, (2.0 * elements * size, 3.0 * elements))
            }
            Kernel::Choose { rows, top_p } => {
                let elements = f64::from(rows) * tower.vocab as f64;
                let name = if top_p { "top-p draw" } else { "likeliest token" };
                named(name, &tower.vocab, rows, (4.0 * elements, elements))
            }
        }
    }

    /// What memory and arithmetic would take at the device's full speed, the latter if that is known.
    fn bounds(&self, limits: &Limits) -> (f64, Option<f64>) {
        let flops_per_second = limits.flops_per_second.get(&self.format);
        (self.bytes / limits.bytes_per_second, flops_per_second.map(|rate| self.flops / rate))
    }

    fn least_seconds(&self, limits: &Limits) -> f64 {
        let (memory, arithmetic) = self.bounds(limits);
        memory.max(arithmetic.unwrap_or(0.0))
    }

    fn line(self, seconds: f64, limits: &mut Limits) -> Line {
        let (bytes_per_second, flops_per_second) = (self.bytes / seconds, self.flops / seconds);
        if self.is_from_memory {
            limits.raise(&self.format, (bytes_per_second, flops_per_second));
        }
        let (memory, arithmetic) = self.bounds(limits);
        let bound = arithmetic.filter(|_| self.is_from_memory);
        let bound = bound.map(|arithmetic| match memory >= arithmetic {
            true => ("memory", memory),
            false => ("arithmetic", arithmetic),
        });
        Line {
            bound: bound.map(|(name, _)| name),
            share: bound.map(|(_, least)| (least / seconds).min(1.0)),
            microseconds: seconds * 1e6,
            gigabytes_per_second: bytes_per_second / 1e9,
            teraflops_per_second: flops_per_second / 1e12,
            kernel: self.kernel,
            format: self.format,
            shape: self.shape,
            rows: self.rows,
            context: self.context,
        }
    }
}

/// Bits of a weight, with its part of what its group has in common.
fn bits(format: Format) -> f64 {
    match format {
        Format::Float(dtype) => 8.0 * dtype.size() as f64,
        Format::Quantized(Quantization::Int8) => 8.5,
        Format::Quantized(Quantization::Int4) => 5.0,
    }
}
