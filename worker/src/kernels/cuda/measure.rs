//! Times of kernels, by the GPU's own clock, and what products are measured on.

use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::{bf16, f16};
use strata_proto::{DType, Format, Quantization};

use super::{
    CudaError, Doing, Gemm, Gpu,
    gate::{self, Handle},
    launch::{Bytes, Kernels, RawNorm},
    memory::{self, Memory, Pinned, Ptr},
    product::{Epilogue, Linear, Matrix, RowBytes, Rows},
};
use crate::kernels::{measure::Random, ops::held_format};

/// What a round takes at least, so that its beginning and end do not count; but for runs that are too many for one
/// graph.
const ROUND: Duration = Duration::from_millis(2);
const MOST_RUNS: usize = 256;
const ROUNDS: usize = 5;
/// Of what takes longer, one run is enough.
const SLOW: Duration = Duration::from_millis(20);

/// Seconds that one run of something takes: the median of some rounds of many runs, each round one graph, as a step is.
/// `run` is told which run it is.
pub(crate) fn seconds<E: From<CudaError>>(
    gpu: &Gpu,
    run: impl FnMut(usize) -> Result<(), E>,
) -> Result<f64, E> {
    seconds_within(gpu, Duration::MAX, run)
}

/// The same, but what takes longer than `patience` is run once.
pub(crate) fn seconds_within<E: From<CudaError>>(
    gpu: &Gpu,
    patience: Duration,
    mut run: impl FnMut(usize) -> Result<(), E>,
) -> Result<f64, E> {
    let mut time = |turn| {
        let begun = Instant::now();
        run(turn)?;
        gpu.wait()?;
        Ok::<_, E>(begun.elapsed())
    };
    // The first one also loads what is loaded lazily.
    let first = time(0)?;
    if first > patience.max(SLOW) {
        return Ok(first.as_secs_f64());
    }
    let once = time(1)?;
    if once > SLOW {
        return Ok(once.as_secs_f64());
    }
    let runs = (ROUND.as_secs_f64() / once.as_secs_f64().max(1e-6)).ceil() as usize;
    // What is waited for from the host looks several times as long as it is.
    let runs = (4 * runs).clamp(1, MOST_RUNS);
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let turn = gate::recording();
    gpu.stream.begin_capture(mode).doing("recording a measurement")?;
    let asked = (0..runs).try_for_each(&mut run);
    let graph = gpu.stream.end_capture(CUgraphInstantiate_flags(0)).doing("recording a measurement");
    drop(turn);
    // A graph that is of no use comes to its end in turn, too.
    let graph = graph.and_then(|graph| graph.map(|graph| Handle::new(|| Ok(graph))).transpose());
    asked?;
    let Some(graph) = graph? else { return Ok(once.as_secs_f64()) };
    let event = || Handle::new(|| gpu.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)));
    let event = || event().doing("making an event");
    let (begin, end) = (event()?, event()?);
    graph.launch().doing("measuring")?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        begin.record(&gpu.stream).doing("measuring")?;
        graph.launch().doing("measuring")?;
        end.record(&gpu.stream).doing("measuring")?;
        times.push(f64::from(begin.elapsed_ms(&end).doing("measuring")?) / 1e3 / runs as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2].max(1e-9))
}

/// Memory full of random weights. Matrices lie in it behind one another, so that caches never hold the next one.
pub(crate) struct Pool {
    values: Memory,
    factors: Memory,
    pattern: Pinned,
}

/// Bytes of random numbers that are repeated.
const PATTERN: usize = 4 << 20;

impl Pool {
    /// Of so many bytes at least.
    pub fn new(gpu: &Gpu, bytes: u64) -> Result<Self, CudaError> {
        let bytes = bytes.next_multiple_of(PATTERN as u64);
        Ok(Pool {
            values: Memory::new(&gpu.context, bytes)?,
            // A factor and an offset, 4 bytes, for 16 bytes of int4.
            factors: Memory::new(&gpu.context, bytes / 4)?,
            pattern: Pinned::new(&gpu.context, PATTERN)?,
        })
    }

    /// Puts weights of a format there.
    pub fn fill(&mut self, gpu: &Gpu, format: Format) -> Result<(), CudaError> {
        let mut random = Random::default();
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let values = |pattern: &mut [u8]| match format {
            Format::Float(DType::F32) => {
                pattern.as_chunks_mut().0.iter_mut().for_each(|x| *x = (0.02 * random.next()).to_le_bytes());
            }
            Format::Float(DType::BF16) => {
                let value = |x: f32| bf16::from_f32(x).to_le_bytes();
                pattern.as_chunks_mut().0.iter_mut().for_each(|x| *x = value(0.02 * random.next()));
            }
            Format::Float(DType::F16) => {
                pattern.as_chunks_mut().0.iter_mut().for_each(|x| *x = half(0.02 * random.next()));
            }
            Format::Quantized(_) => {
                pattern.iter_mut().for_each(|x| *x = (127.0 * random.next()) as i8 as u8);
            }
        };
        spread(gpu, &mut self.pattern, &self.values, values)?;
        let factors = |pattern: &mut [u8]| pattern.as_chunks_mut().0.iter_mut().for_each(|x| *x = half(1e-3));
        spread(gpu, &mut self.pattern, &self.factors, factors)
    }

    /// Whether a matrix of a shape has room in any format.
    pub fn holds(&self, (n, k): (usize, usize)) -> bool {
        (4 * n * k) as u64 <= self.values.bytes()
    }

    /// The `turn`th matrix of a shape that it [holds](Self::holds); after the last one comes the first again.
    pub fn matrix(&self, format: Format, (n, k): (usize, usize), turn: usize) -> Matrix {
        let format = held_format(k, format);
        let (bytes, factors) = match format {
            Format::Float(dtype) => ((n * k) as u64 * dtype.size(), 0),
            Format::Quantized(Quantization::Int8) => ((n * k) as u64, (n * k / 16) as u64),
            Format::Quantized(Quantization::Int4) => ((n * k / 2) as u64, (n * k / 8) as u64),
        };
        // On whole lines.
        let (bytes, factors) = (bytes.next_multiple_of(256), factors.next_multiple_of(256));
        let copies = (self.values.bytes() / bytes).min(self.factors.bytes() / factors.max(1));
        let turn = turn as u64 % copies.max(1);
        Matrix {
            format,
            n,
            k,
            values: self.values.ptr().offset(turn * bytes),
            factors: self.factors.ptr().offset(turn * factors),
        }
    }

    /// Bytes per second that a copy of one half to the other reads and writes.
    pub fn copy(&self, gpu: &Gpu) -> Result<f64, CudaError> {
        let half = self.values.bytes() / 2;
        let seconds = seconds(gpu, |_| {
            memory::copy(&gpu.stream, self.values.ptr().offset(half), self.values.ptr(), half)
        })?;
        Ok(2.0 * half as f64 / seconds)
    }
}

/// Fills memory with what `write` makes, again and again.
fn spread(
    gpu: &Gpu,
    pattern: &mut Pinned,
    memory: &Memory,
    write: impl FnOnce(&mut [u8]),
) -> Result<(), CudaError> {
    write(pattern.as_mut::<u8>());
    let first = memory.bytes().min(PATTERN as u64);
    memory::upload(&gpu.stream, memory.ptr(), &pattern.as_mut::<u8>()[..first as usize])?;
    let mut done = first;
    while done < memory.bytes() {
        let more = done.min(memory.bytes() - done);
        memory::copy(&gpu.stream, memory.ptr().offset(done), memory.ptr(), more)?;
        done += more;
    }
    gpu.wait()
}

/// Where rows are on their way through a product.
pub(crate) struct Room {
    memory: Memory,
    /// What is not rows.
    elsewhere: Memory,
    bytes: u64,
    x_bytes: u64,
}

impl Room {
    /// What [`new`](Self::new) takes, about.
    pub fn bytes(input: usize, output: usize) -> u64 {
        RowBytes::ELSEWHERE + 6 * input as u64 + 4 * output as u64
    }

    /// For rows of `input` elements in all, and `output` ones, of 4 bytes at most.
    pub fn new(gpu: &Gpu, input: usize, output: usize) -> Result<Self, CudaError> {
        let (x_bytes, bytes) =
            ((4 * input as u64).next_multiple_of(256), (input as u64).next_multiple_of(1024));
        let memory = Memory::new(&gpu.context, x_bytes + bytes + bytes / 2 + 4 * output as u64)?;
        Ok(Room { memory, elsewhere: Memory::new(&gpu.context, RowBytes::ELSEWHERE)?, bytes, x_bytes })
    }

    pub fn x(&self) -> Ptr {
        self.memory.ptr()
    }

    fn row_bytes(&self) -> RowBytes {
        let values = self.memory.ptr().offset(self.x_bytes);
        let factors = values.offset(self.bytes);
        let room = Bytes { values, factors, sums: factors.offset(self.bytes / 4) };
        RowBytes::new(room, self.elsewhere.ptr())
    }

    fn out(&self) -> Ptr {
        self.memory.ptr().offset(self.x_bytes + self.bytes + self.bytes / 2)
    }
}

/// A product to be measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub format: Format,
    pub shape: (usize, usize),
    pub rows: usize,
    pub epilogue: Epilogue,
    /// Whether turning rows into bytes is a part of it: a norm before it does so by the way.
    pub makes_bytes: bool,
    /// That of [`seconds_within`].
    pub patience: Duration,
}

/// Seconds of a product, in the way that a stage computes it.
pub(crate) fn product(
    gpu: &Gpu,
    kernels: &Kernels,
    (pool, room): (&Pool, &Room),
    product: Product,
) -> Result<f64, CudaError> {
    let Product { format, shape: (n, k), rows, epilogue, makes_bytes, patience } = product;
    let bytes = room.row_bytes();
    let same = Rows::new(room.x(), k);
    seconds_within(gpu, patience, |turn| {
        gpu.linear(
            kernels,
            &Linear {
                weight: &pool.matrix(format, (n, k), turn),
                bias: Ptr::NULL,
                x: if makes_bytes { Rows::new(room.x(), k) } else { same },
                norm: RawNorm::default(),
                rows,
                out: room.out(),
                out_stride: n,
                epilogue,
                grouped: None,
                bytes: &bytes,
            },
        )
    })
}

/// Seconds of cuBLAS's product of rows with weights of the same format.
pub(crate) fn gemm(
    gpu: &Gpu,
    element: DType,
    (pool, room): (&Pool, &Room),
    ((n, k), rows): ((usize, usize), usize),
) -> Result<f64, CudaError> {
    seconds(gpu, |turn| {
        gpu.gemm(Gemm {
            element,
            out_element: element,
            weight: pool.matrix(Format::Float(element), (n, k), turn).values,
            x: room.x(),
            out: room.out(),
            n,
            k,
            rows,
            x_stride: k,
            out_stride: n,
            add: false,
        })
    })
}
