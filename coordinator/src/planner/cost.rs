//! What a range of layers costs on a device: bytes, and seconds by a roofline.
//!
//! The time of an operation over m rows is `max(bytes / bandwidth, 2 * macs * m / rate)`: either its weights stream
//! through memory or its arithmetic takes longer.

use std::collections::HashMap;

use strata_proto::{BLOCK_TOKENS, DeviceKind, LayerRange, Module};

use super::{Problem, Split};

/// Rows of the prefill that splits are compared by.
const PREFILL_ROWS: f64 = 512.0;

/// Penalty of a layer that spilled to a CPU: more than any number of layers on a spared device.
const SPILLED: u64 = 1 << 32;

/// Sums over layers `0..n`, and what the ends of the model add.
#[derive(Debug, Clone)]
struct Prefix {
    layers: Vec<f64>,
    embedding: f64,
    head: f64,
}

impl Prefix {
    fn range(&self, range: LayerRange) -> f64 {
        let count = self.layers.len() - 1;
        let mut sum = self.layers[range.end as usize] - self.layers[range.first as usize];
        if range.first == 0 {
            sum += self.embedding;
        }
        if range.end as usize == count {
            sum += self.head;
        }
        sum
    }
}

/// Speeds of one kind of device.
#[derive(Debug, Clone)]
struct Times {
    decode: Prefix,
    prefill: Prefix,
}

/// Costs of every range on every device, by prefix sums.
#[derive(Debug)]
pub(super) struct Costs {
    weights: Vec<u64>,
    embedding: u64,
    head: u64,
    shared: u64,
    kv: Vec<u64>,
    workspace: u64,
    workspace_head: u64,
    /// Per offer.
    budgets: Vec<u64>,
    times: Vec<usize>,
    kinds: Vec<Times>,
    penalties: Vec<u64>,
}

impl Costs {
    pub fn new(problem: &Problem<'_>) -> Self {
        let profile = problem.profile;
        let dtype = problem.dtype;
        let sums = |f: &dyn Fn(&Module) -> u64| {
            let mut total = 0;
            let mut prefix = vec![0];
            prefix.extend(profile.layers.iter().map(|m| {
                total += f(m);
                total
            }));
            prefix
        };
        let last = LayerRange::new(profile.layer_count(), profile.layer_count());
        let workspace = profile.workspace_bytes(LayerRange::new(0, 0), problem.max_step_tokens, 0);
        let with_head = profile.workspace_bytes(last, problem.max_step_tokens, problem.max_step_outputs);

        let mut by_kind: HashMap<DeviceKind, usize> = HashMap::new();
        let mut kinds = Vec::new();
        let mut times = Vec::new();
        for offer in problem.offers {
            let kind = offer.device.kind;
            let index = *by_kind.entry(kind).or_insert_with(|| {
                kinds.push(kind_times(problem, kind));
                kinds.len() - 1
            });
            times.push(index);
        }
        // CPUs that nobody capped are for what fits nowhere else.
        let ranks: Vec<bool> =
            problem.offers.iter().map(|o| o.device.kind != DeviceKind::Cpu || o.device.capped).collect();
        let any = ranks.contains(&true);
        Costs {
            weights: sums(&|m| m.bytes.at(dtype)),
            embedding: profile.embedding.bytes.at(dtype),
            head: profile.head.bytes.at(dtype),
            shared: profile.shared.at(dtype),
            kv: sums(&|m| m.kv_elements_per_token * dtype.size()),
            workspace,
            workspace_head: with_head - workspace,
            budgets: problem.offers.iter().map(|o| o.device.budget_bytes).collect(),
            times,
            kinds,
            penalties: ranks
                .into_iter()
                .enumerate()
                .map(|(offer, ranks)| {
                    match (any && !ranks, *problem.split == Split::BalancedLow0 && offer == 0) {
                        (true, _) => SPILLED,
                        (false, true) => 1,
                        (false, false) => 0,
                    }
                })
                .collect(),
        }
    }

    pub fn layers(&self) -> u32 {
        self.weights.len() as u32 - 1
    }

    pub fn offers(&self) -> usize {
        self.budgets.len()
    }

    pub fn budget(&self, offer: usize) -> u64 {
        self.budgets[offer]
    }

    /// What a layer on this device costs before time is looked at: much if it spilled to a CPU, a little if
    /// `balanced_low_0` spares the device.
    pub fn penalty(&self, offer: usize) -> u64 {
        self.penalties[offer]
    }

    /// Bytes of the cache; saturating, since the number of blocks may be anything that a caller asks for.
    pub fn kv_bytes(&self, range: LayerRange, blocks: u64) -> u64 {
        let per_token = self.kv[range.end as usize] - self.kv[range.first as usize];
        blocks.saturating_mul(u64::from(BLOCK_TOKENS)).saturating_mul(per_token)
    }

    /// Scratch of a stage.
    pub fn workspace_bytes(&self, range: LayerRange) -> u64 {
        self.workspace + if range.end == self.layers() { self.workspace_head } else { 0 }
    }

    /// Every byte of a stage.
    pub fn bytes(&self, range: LayerRange, blocks: u64) -> u64 {
        let (first, last) = (range.first == 0, range.end == self.layers());
        let mut bytes = self.weights[range.end as usize] - self.weights[range.first as usize];
        if first {
            bytes += self.embedding;
        }
        if last {
            bytes += self.head;
        }
        if first && last {
            bytes -= self.shared;
        }
        (bytes + self.workspace_bytes(range)).saturating_add(self.kv_bytes(range, blocks))
    }

    /// One decode step of one row.
    pub fn decode_seconds(&self, offer: usize, range: LayerRange) -> f64 {
        self.kinds[self.times[offer]].decode.range(range)
    }

    /// One prefill step of [`PREFILL_ROWS`] rows.
    pub fn prefill_seconds(&self, offer: usize, range: LayerRange) -> f64 {
        self.kinds[self.times[offer]].prefill.range(range)
    }
}

/// Times on one kind of device. The median of their rates stands for all, so that noise cannot change a split.
fn kind_times(problem: &Problem<'_>, kind: DeviceKind) -> Times {
    let median = |rate: &dyn Fn(&strata_proto::Device) -> f64| {
        let mut rates: Vec<f64> =
            problem.offers.iter().map(|o| &o.device).filter(|d| d.kind == kind).map(rate).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let bandwidth = median(&|d| d.bytes_per_second);
    let rate = median(&|d| d.flops_per_second);
    let profile = problem.profile;
    let element = problem.dtype.size() as f64;
    let op = |m: &Module, rows: f64| {
        (m.bytes.at(problem.dtype) as f64 / bandwidth).max(2.0 * m.macs_per_token as f64 * rows / rate)
    };
    // An embedding is looked up: only its rows are read.
    let lookup = f64::from(profile.hidden_size) * element / bandwidth;
    let half_context = f64::from(profile.context_length) / 2.0;
    let prefix = |f: &dyn Fn(&Module) -> f64, embedding: f64, head: f64| {
        let mut total = 0.0;
        let mut layers = vec![0.0];
        layers.extend(profile.layers.iter().map(|m| {
            total += f(m);
            total
        }));
        Prefix { layers, embedding, head }
    };
    let kv_read = |m: &Module| m.kv_elements_per_token as f64 * element * half_context / bandwidth;
    Times {
        decode: prefix(&|m| op(m, 1.0) + kv_read(m), lookup, op(&profile.head, 1.0)),
        // A prefill needs the head for one row only.
        prefill: prefix(&|m| op(m, PREFILL_ROWS), lookup * PREFILL_ROWS, op(&profile.head, 1.0)),
    }
}
