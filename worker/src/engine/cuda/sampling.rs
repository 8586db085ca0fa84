//! Tokens that a GPU draws from the rows of logits in its memory (`sample.cu`), so that no row leaves it. What a draw
//! depends on is sent once per step; the kernels are started one by one behind the step, which has long begun, and only
//! those that a draw of the step needs.

use strata_proto::limits::MAX_LOGPROBS;

use crate::{
    kernels::cuda::{
        CudaError, Gpu,
        launch::{Kernels, RawSample, SAMPLE_THREADS, SLICE, launch},
        memory::{self, Memory, Pinned, Ptr},
    },
    sampler::{Draw, Raw, SampleError, Sampled},
};

/// Words of `Draw` and `Drawn` in `sample.cu`.
const DRAW_WORDS: usize = 16;
const DRAWN_WORDS: usize = 18 + 2 * MAX_LOGPROBS as usize;
/// `ALL` of `sample.cu`: no token.
const NONE: u32 = u32::MAX;

/// What `sample_mass` weighs, and what `sample_bins` and `sample_ties` select.
const MASS_RAW: i32 = 0;
const MASS_TOTAL: i32 = 1;
const MASS_DRAW: i32 = 2;
const SELECT_ALTERNATIVES: i32 = 0;
const SELECT_TOP_K: i32 = 1;
const SELECT_TOP_P: i32 = 2;

/// Memory for the draws of a step, here and there.
pub(super) struct Sampling {
    vocab: usize,
    /// Most entries (biases, and tokens of histories) of all draws.
    entries: usize,
    /// Draws, then entries, sent together.
    words: Pinned,
    found: Pinned,
    /// The draws of the step whose tokens are on their way: output, and whether log-probabilities are wanted.
    asked: Vec<(usize, bool)>,
    needs: Needs,
    entries_at: Ptr,
    drawn: Vec<Option<Result<Sampled, SampleError>>>,
    inputs: Memory,
    results: Memory,
    bins: Memory,
    partial: Memory,
}

impl Sampling {
    /// Room for so many draws from `vocab` logits, and for so many entries of all draws of a step.
    pub fn new(gpu: &Gpu, capacity: usize, vocab: usize, entries: usize) -> Result<Self, CudaError> {
        // Without the head, nothing is drawn.
        let entries = if capacity > 0 { entries } else { 0 };
        let words = DRAW_WORDS * capacity + 2 * entries;
        let memory = |words: usize| Memory::new(&gpu.context, 4 * words as u64);
        Ok(Sampling {
            vocab,
            entries,
            words: Pinned::new(&gpu.context, 4 * words)?,
            found: Pinned::new(&gpu.context, 4 * DRAWN_WORDS * capacity)?,
            asked: Vec::new(),
            needs: Needs::default(),
            entries_at: Ptr::NULL,
            drawn: Vec::new(),
            inputs: memory(words)?,
            results: memory(DRAWN_WORDS * capacity)?,
            bins: memory(2 * 256 * capacity)?,
            partial: memory(2 * vocab.div_ceil(SLICE) * capacity)?,
        })
    }

    /// Sends what the tokens of a step are drawn by; a draw whose entries have no room is left to the host.
    pub fn ask(&mut self, gpu: &Gpu, draws: &[Option<Draw<'_>>]) -> Result<(), CudaError> {
        self.asked.clear();
        self.drawn.clear();
        self.drawn.resize_with(draws.len(), || None);
        let most = DRAW_WORDS * draws.iter().flatten().count();
        let (all, entries) = self.words.as_mut::<u32>().split_at_mut(most);
        let (entries, mut used) = (&mut entries.as_chunks_mut::<2>().0[..self.entries], 0);
        let mut needs = Needs::default();
        for (row, draw) in draws.iter().enumerate().filter_map(|(row, draw)| Some((row, draw.as_ref()?))) {
            let Some(counts) = fill(&mut entries[used..], draw) else { continue };
            let to = &mut all.as_chunks_mut::<DRAW_WORDS>().0[self.asked.len()];
            *to = words_of(draw, row, used, counts);
            used += counts.iter().sum::<usize>();
            needs.add(draw, counts, self.vocab);
            self.asked.push((row, draw.logprobs.is_some()));
        }
        (self.needs, self.entries_at) = (needs, self.inputs.ptr().offset(4 * most as u64));
        if self.asked.is_empty() {
            return Ok(());
        }
        let words = &self.words.as_mut::<u32>()[..most + 2 * used];
        memory::upload(&gpu.stream, self.inputs.ptr(), words)
    }

    /// Draws the tokens from `logits` (outputs, vocab).
    pub fn start(&self, gpu: &Gpu, kernels: &Kernels, logits: Ptr) -> Result<(), CudaError> {
        let grid = (self.vocab.div_ceil(SLICE) as u32, self.asked.len() as u32, 1);
        if grid.1 == 0 {
            return Ok(());
        }
        let call = RawSample {
            draws: self.inputs.ptr(),
            drawn: self.results.ptr(),
            bins: self.bins.ptr(),
            partial: self.partial.ptr(),
            entries: self.entries_at,
            logits,
            vocab: self.vocab as i32,
        };
        start(gpu, kernels, call, grid, self.needs)
    }

    /// Asks for the tokens.
    pub fn fetch(&mut self, gpu: &Gpu) -> Result<(), CudaError> {
        if self.asked.is_empty() {
            return Ok(());
        }
        let found = &mut self.found.as_mut::<u32>()[..DRAWN_WORDS * self.asked.len()];
        memory::download(&gpu.stream, found, self.results.ptr())
    }

    /// Whether the token of an output of this step is drawn here.
    pub fn draws(&self, output: usize) -> bool {
        self.asked.iter().any(|(row, _)| *row == output)
    }

    /// Reads the tokens that have come.
    pub fn read(&mut self) {
        let found = self.found.as_mut::<u32>().as_chunks::<DRAWN_WORDS>().0;
        for ((row, logprobs), words) in self.asked.iter().zip(found) {
            self.drawn[*row] = Some(result_of(words, *logprobs));
        }
    }

    /// Per output its token, if it was drawn here.
    pub fn drawn(&self) -> &[Option<Result<Sampled, SampleError>>] {
        &self.drawn
    }
}

/// Kernels that some draw of a step needs.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    logprobs: bool,
    alternatives: bool,
    changes: bool,
    top_k: bool,
    top_p: bool,
    chance: bool,
}

impl Needs {
    fn add(&mut self, draw: &Draw<'_>, counts: [usize; 2], vocab: usize) {
        let chance = draw.params.temperature != 0.0;
        self.logprobs |= draw.logprobs.is_some();
        self.alternatives |= draw.logprobs.is_some_and(|count| count > 0);
        self.changes |= counts != [0, 0];
        self.top_k |= chance && (1..vocab).contains(&draw.params.top_k);
        self.top_p |= chance && draw.top_p().is_some();
        self.chance |= chance;
    }
}

/// Writes the entries of a draw, biases first, and counts them; `None` if they have no room.
fn fill(to: &mut [[u32; 2]], draw: &Draw<'_>) -> Option<[usize; 2]> {
    let history = draw.history.filter(|_| draw.params.needs_history()).map(|h| &h.answer_counts);
    let counts = [draw.biases().count(), history.map_or(0, |h| h.len())];
    let to = to.get_mut(..counts.iter().sum())?;
    let history = history.into_iter().flatten().map(|(token, count)| [*token, *count]);
    let biases = draw.biases().map(|(token, bias)| [token, bias.to_bits()]);
    to.iter_mut().zip(biases.chain(history)).for_each(|(to, entry)| *to = entry);
    Some(counts)
}

/// `Draw` of `sample.cu`.
fn words_of(draw: &Draw<'_>, row: usize, first: usize, [biases, history]: [usize; 2]) -> [u32; DRAW_WORDS] {
    let params = draw.params;
    let (random, top_p) = (draw.random(), draw.top_p().map_or(0, |p| p.max(1)));
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let ([r0, r1], [p0, p1]) = (halves(random), halves(top_p));
    [
        r0,
        r1,
        p0,
        p1,
        params.temperature.to_bits(),
        params.min_p.to_bits(),
        params.repetition_penalty.to_bits(),
        params.frequency_penalty.to_bits(),
        params.presence_penalty.to_bits(),
        u32::try_from(params.top_k).unwrap_or(0),
        row as u32,
        first as u32,
        biases as u32,
        history as u32,
        draw.logprobs.map_or(0, |count| 1 + count.min(MAX_LOGPROBS)),
        0,
    ]
}

/// What `Drawn` of `sample.cu` says.
fn result_of(words: &[u32; DRAWN_WORDS], logprobs: bool) -> Result<Sampled, SampleError> {
    let sum = u64::from(words[1]) << 32 | u64::from(words[0]);
    let [token, logit, broken, value, max, ..] = words[6..].as_chunks::<5>().0[0];
    if broken != NONE {
        return Err(SampleError::NotFinite { token: broken, value: f32::from_bits(value) });
    }
    let top = |found: usize| {
        let pairs = words[18..].as_chunks::<2>().0.iter().take(found);
        pairs.map(|[token, logit]| (*token, f32::from_bits(*logit))).collect()
    };
    let raw = || Raw { max: f32::from_bits(max), sum, top: top(words[16] as usize) };
    let logprobs = logprobs.then(|| raw().logprobs(f32::from_bits(logit)));
    Ok(Sampled { token, logprobs })
}

/// Starts the kernels, in the order of `sampler.rs`.
fn start(
    gpu: &Gpu,
    kernels: &Kernels,
    call: RawSample,
    grid: (u32, u32, u32),
    needs: Needs,
) -> Result<(), CudaError> {
    let mass = |what: i32| launch!(gpu, kernels.sample_mass, grid, SAMPLE_THREADS as u32, 0; call, what);
    let select = |what: i32| {
        for shift in [24i32, 16, 8, 0] {
            launch!(gpu, kernels.sample_bins, grid, SAMPLE_THREADS as u32, 0; call, what, shift)?;
        }
        launch!(gpu, kernels.sample_ties, grid, SAMPLE_THREADS as u32, 0; call, what)
    };
    launch!(gpu, kernels.sample_scan, grid, SAMPLE_THREADS as u32, 0; call, 0i32)?;
    if needs.logprobs {
        mass(MASS_RAW)?;
    }
    if needs.alternatives {
        select(SELECT_ALTERNATIVES)?;
        launch!(gpu, kernels.sample_alternatives, grid, SAMPLE_THREADS as u32, 0; call)?;
    }
    if needs.changes {
        launch!(gpu, kernels.sample_adjust, (grid.1, 1, 1), SAMPLE_THREADS as u32, 0; call)?;
        launch!(gpu, kernels.sample_scan, grid, SAMPLE_THREADS as u32, 0; call, 1i32)?;
    }
    if needs.top_k {
        select(SELECT_TOP_K)?;
    }
    if needs.top_p {
        mass(MASS_TOTAL)?;
        select(SELECT_TOP_P)?;
    }
    if needs.chance {
        mass(MASS_DRAW)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
