//! What a range of layers costs on a device: bytes, and seconds by a roofline.
//!
//! The time of an operation over m rows is `max(bytes / bandwidth, 2 * macs * m / rate)`: either its weights stream
//! through memory or its arithmetic takes longer.

use std::collections::{HashMap, HashSet};

use strata_proto::{
    BLOCK_TOKENS, DeviceKind, Format, LayerRange, LayerState, Module, StateKind, StateRoom, rate_at,
};

use super::{Problem, Split, block_bounds};

/// Rows of the prefill that splits are compared by.
const PREFILL_ROWS: f64 = 512.0;

/// Penalty of a layer that spilled to a CPU: more than any number of layers on a spared device.
pub(super) const SPILLED: u64 = 1 << 32;
/// What comes on top if the CPU's worker has none of the devices that layers spilled from: of two CPUs, the one nearby.
const ELSEWHERE: u64 = 1 << 16;

/// Bytes per second that a system reads mapped weights at: those of an ordinary solid-state disk.
const DISK: f64 = 1e9;

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

/// Rows at which arithmetic rates are compared.
const ROWS: [f64; 4] = [1.0, 8.0, 64.0, 512.0];

/// Starting the kernels of a layer, in seconds: about ten on a GPU, no cost on a CPU.
const LAUNCHES: f64 = 30e-6;

/// How fast one kind of device is with the plan's format.
#[derive(Debug, Clone)]
struct Speeds {
    bytes_per_second: f64,
    /// Rows, and operations per second with them.
    flops: [(f64, f64); 4],
    /// Seconds per layer.
    launches: f64,
}

impl Speeds {
    /// Those of a kind. The median of their rates stands for all, so that noise cannot change a split.
    fn of(problem: &Problem<'_>, kind: DeviceKind) -> Self {
        let median = |rate: &dyn Fn(&strata_proto::Device) -> f64| {
            let mut rates: Vec<f64> =
                problem.offers.iter().map(|o| &o.device).filter(|d| d.kind == kind).map(rate).collect();
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        Speeds {
            bytes_per_second: median(&|d| d.bytes_per_second),
            flops: ROWS.map(|rows| (rows, median(&|d| d.flops(problem.format(), rows)))),
            launches: if kind == DeviceKind::Cuda { LAUNCHES } else { 0.0 },
        }
    }

    /// Seconds of a module over `rows` rows.
    fn op(&self, module: &Module, format: Format, rows: f64) -> f64 {
        let mut bytes = module.bytes.at(format) as f64;
        if let Some(experts) = module.experts {
            // Only the experts that some row chose are read.
            let (count, active) = (f64::from(experts.count), f64::from(experts.active));
            #[expect(
                clippy::disallowed_methods,
                reason = "an estimate: one process makes a plan, and all take it"
            )]
            let idle = count * (1.0 - active / count).powf(rows);
            bytes -= idle * experts.bytes.at(format) as f64;
        }
        let flops = rate_at(&self.flops, rows).unwrap_or(f64::INFINITY);
        (bytes / self.bytes_per_second).max(2.0 * module.macs_per_token as f64 * rows / flops)
    }

    /// Seconds for the states of one sequence at half its context; those that layers share are read by each.
    fn states(&self, module: &Module, problem: &Problem<'_>) -> f64 {
        let profile = problem.profile;
        let bytes = |state: &LayerState| {
            let times = match state.kind {
                StateKind::PagedKv => f64::from(profile.context_length) / 2.0,
                // Read and written.
                StateKind::Recurrent => 2.0,
                StateKind::CrossKv => f64::from(profile.source_positions()) / 2.0,
            };
            (state.elements * problem.dtype.size()) as f64 * times
        };
        module.states.iter().map(bytes).sum::<f64>() / self.bytes_per_second
    }
}

/// Times of ranges on one kind of device.
#[derive(Debug, Clone)]
struct Times {
    decode: Prefix,
    prefill: Prefix,
    speeds: Speeds,
}

/// Costs of every range on every device, by prefix sums.
#[derive(Debug)]
pub(super) struct Costs {
    weights: Vec<u64>,
    embedding: u64,
    head: u64,
    shared: u64,
    /// Bytes of paged states for one position, and of those of a fixed size for all sequences.
    paged: Vec<u64>,
    fixed: Vec<u64>,
    /// Where a stage may end; none if it may everywhere.
    cuts: Option<Vec<bool>>,
    workspace: u64,
    workspace_head: u64,
    /// Smallest and wanted number of KV blocks.
    pub blocks: (u64, u64),
    /// Per offer.
    budgets: Vec<u64>,
    /// Bytes of weights that may stay memory-mapped; none, unless that is the last resort.
    mappable: Vec<u64>,
    /// Whether there are any.
    pub maps: bool,
    times: Vec<usize>,
    kinds: Vec<Times>,
    penalties: Vec<u64>,
}

impl Costs {
    pub fn new(problem: &Problem<'_>) -> Self {
        let profile = problem.profile;
        let format = problem.format();
        let sums = |f: &dyn Fn(&Module) -> u64| {
            let mut total = 0;
            let mut prefix = vec![0];
            prefix.extend(profile.layers.iter().map(|m| {
                total += f(m);
                total
            }));
            prefix
        };
        // Saturating, since the numbers of positions and sequences may be anything that a caller asks for.
        let states = |room: StateRoom| {
            let layer = |i: u32| profile.state_bytes(LayerRange::new(i, i + 1), problem.dtype, room).total();
            let mut total = 0u64;
            let mut prefix = vec![0];
            prefix.extend((0..profile.layer_count()).map(|i| {
                total = total.saturating_add(layer(i));
                total
            }));
            prefix
        };
        let cuts = profile.cuts();
        let last = LayerRange::new(profile.layer_count(), profile.layer_count());
        let workspace = profile.workspace_bytes(LayerRange::new(0, 0), problem.max_step_tokens, 0);
        let with_head = profile.workspace_bytes(last, problem.max_step_tokens, problem.max_step_rows);

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
        let spillable = any && ranks.contains(&false);
        let ranking = problem.offers.iter().zip(&ranks).filter(|(_, ranks)| spillable && **ranks);
        let near: HashSet<&str> = ranking.map(|(offer, _)| &*offer.worker).collect();
        Costs {
            weights: sums(&|m| m.bytes.at(format)),
            embedding: profile.embedding.bytes.at(format),
            head: profile.head.bytes.at(format),
            shared: profile.shared.at(format),
            paged: states(StateRoom { positions: 1, slots: 0 }),
            fixed: states(StateRoom { positions: 0, slots: problem.state_slots }),
            cuts: cuts.contains(&false).then_some(cuts),
            workspace,
            workspace_head: with_head - workspace,
            blocks: block_bounds(problem),
            budgets: problem.offers.iter().map(|o| o.device.budget_bytes).collect(),
            mappable: vec![0; problem.offers.len()],
            maps: false,
            times,
            kinds,
            penalties: ranks
                .into_iter()
                .enumerate()
                .map(|(offer, ranks)| {
                    match (any && !ranks, *problem.split == Split::BalancedLow0 && offer == 0) {
                        (true, _) if near.contains(&*problem.offers[offer].worker) => SPILLED,
                        (true, _) => SPILLED + ELSEWHERE,
                        (false, true) => 1,
                        (false, false) => 0,
                    }
                })
                .collect(),
        }
    }

    /// The same where weights may stay memory-mapped; `None` if no device allows it. Then the cache is as small as it
    /// may be: what it grew by would be read from a disk instead.
    pub fn mapped(mut self, problem: &Problem<'_>) -> Option<Self> {
        let mappable = problem.offers.iter().map(|offer| match &offer.device {
            device if device.kind == DeviceKind::Cpu && !device.capped => device.spill_bytes,
            _ => 0,
        });
        self.mappable = mappable.collect();
        self.maps = self.mappable.iter().any(|bytes| *bytes > 0);
        self.blocks.1 = self.blocks.0;
        self.maps.then_some(self)
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

    /// Whether a stage may end behind so many layers.
    #[inline]
    pub fn may_cut(&self, end: u32) -> bool {
        self.cuts.as_ref().is_none_or(|cuts| cuts[end as usize])
    }

    /// Bytes of the states of sequences; saturating, since the number of blocks may be anything that a caller asks for.
    pub fn state_bytes(&self, range: LayerRange, blocks: u64) -> u64 {
        let of = |prefix: &[u64]| prefix[range.end as usize] - prefix[range.first as usize];
        blocks
            .saturating_mul(u64::from(BLOCK_TOKENS))
            .saturating_mul(of(&self.paged))
            .saturating_add(of(&self.fixed))
    }

    /// Scratch of a stage.
    pub fn workspace_bytes(&self, range: LayerRange) -> u64 {
        self.workspace + if range.end == self.layers() { self.workspace_head } else { 0 }
    }

    /// Every byte of a stage.
    #[inline]
    pub fn bytes(&self, range: LayerRange, blocks: u64) -> u64 {
        self.weight_bytes(range).saturating_add(self.unmappable_bytes(range, blocks))
    }

    /// What a stage holds in memory in any case.
    fn unmappable_bytes(&self, range: LayerRange, blocks: u64) -> u64 {
        self.workspace_bytes(range).saturating_add(self.state_bytes(range, blocks))
    }

    fn weight_bytes(&self, range: LayerRange) -> u64 {
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
        bytes
    }

    /// Whether a device can hold a stage.
    pub fn fits(&self, offer: usize, range: LayerRange, blocks: u64) -> bool {
        self.bytes(range, blocks) <= self.budget(offer)
            || (self.maps && self.fits_mapped(offer, range, blocks))
    }

    // Apart, so that the paths that are taken a million times stay short.
    #[cold]
    fn fits_mapped(&self, offer: usize, range: LayerRange, blocks: u64) -> bool {
        self.weight_bytes(range) <= self.mappable[offer]
            && self.unmappable_bytes(range, blocks) <= self.budget(offer)
    }

    /// Time in which a disk yields what of a mapped stage does not stay in memory.
    #[cold]
    fn disk_seconds(&self, offer: usize, range: LayerRange) -> f64 {
        if self.mappable[offer] == 0 {
            return 0.0;
        }
        self.bytes(range, self.blocks.0).saturating_sub(self.budget(offer)) as f64 / DISK
    }

    /// One decode step of one row.
    #[inline]
    pub fn decode_seconds(&self, offer: usize, range: LayerRange) -> f64 {
        let seconds = self.kinds[self.times[offer]].decode.range(range);
        if self.maps { seconds + self.disk_seconds(offer, range) } else { seconds }
    }

    /// One step of `rows` rows, each of a sequence of its own at half its context.
    pub fn step_seconds(&self, problem: &Problem<'_>, offer: usize, range: LayerRange, rows: f64) -> f64 {
        let (profile, speeds) = (problem.profile, &self.kinds[self.times[offer]].speeds);
        let layers = &profile.layers[range.first as usize..range.end as usize];
        let layer = |m: &Module| {
            speeds.op(m, problem.format(), rows) + rows * speeds.states(m, problem) + speeds.launches
        };
        let mut seconds = self.disk_seconds(offer, range) + layers.iter().map(layer).sum::<f64>();
        if range.first == 0 {
            seconds += rows * lookup(problem, speeds);
        }
        if range.end == self.layers() {
            // Of an input that is computed whole, the head sees few rows.
            let outputs = if profile.caches() { rows } else { 1.0 };
            seconds += speeds.op(&profile.head, problem.format(), outputs);
        }
        seconds
    }

    /// One prefill step of [`PREFILL_ROWS`] rows.
    pub fn prefill_seconds(&self, offer: usize, range: LayerRange) -> f64 {
        let seconds = self.kinds[self.times[offer]].prefill.range(range);
        if self.maps { seconds + self.disk_seconds(offer, range) } else { seconds }
    }
}

/// Times on one kind of device.
fn kind_times(problem: &Problem<'_>, kind: DeviceKind) -> Times {
    let speeds = Speeds::of(problem, kind);
    let (profile, format) = (problem.profile, problem.format());
    let prefix = |f: &dyn Fn(&Module) -> f64, embedding: f64, head: f64| {
        let mut total = 0.0;
        let mut layers = vec![0.0];
        layers.extend(profile.layers.iter().map(|m| {
            total += f(m);
            total
        }));
        Prefix { layers, embedding, head }
    };
    let op = |m: &Module, rows: f64| speeds.op(m, format, rows);
    let lookup = lookup(problem, &speeds);
    Times {
        decode: prefix(
            &|m| op(m, 1.0) + speeds.states(m, problem) + speeds.launches,
            lookup,
            op(&profile.head, 1.0),
        ),
        // A prefill needs the head for one row only.
        prefill: prefix(
            &|m| op(m, PREFILL_ROWS) + speeds.launches,
            lookup * PREFILL_ROWS,
            op(&profile.head, 1.0),
        ),
        speeds,
    }
}

/// Seconds to look one token up: of an embedding, only its row is read.
fn lookup(problem: &Problem<'_>, speeds: &Speeds) -> f64 {
    f64::from(problem.profile.hidden_size) * problem.dtype.size() as f64 / speeds.bytes_per_second
}
