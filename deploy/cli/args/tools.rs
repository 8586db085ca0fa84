//! Flags of what measures, writes models to measure with, and helps shells.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use strata_proto::Quantization;
use strata_worker::device::DeviceSpec;

use super::{AutoDType, ComputeArgs, KernelCacheArgs, deployment::parse_dtype};

/// Shapes of models that many know.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shape {
    /// Width 64, 4 layers: for tests
    #[value(name = "llama-1m")]
    Llama1m,
    /// Width 768, 12 layers
    #[value(name = "llama-160m")]
    Llama160m,
    /// Width 2048, 22 layers, as TinyLlama
    #[value(name = "llama-1.1b")]
    Llama1_1b,
    /// Width 3072, 28 layers, as Llama 3.2 3B
    #[value(name = "llama-3b")]
    Llama3b,
    /// Width 4096, 32 layers, as Llama 3 8B
    #[value(name = "llama-8b")]
    Llama8b,
}

#[derive(Debug, Args)]
pub struct RandomModelArgs {
    /// What to write
    #[arg(env = "STRATA_SHAPE", value_enum)]
    pub shape: Shape,
    /// Directory to make
    #[arg(env = "STRATA_DIRECTORY")]
    pub directory: PathBuf,
    /// Seed of the weights
    #[arg(long, env = "STRATA_SEED", default_value_t = 0)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct PullArgs {
    /// OWNER/NAME of a model on the hub, or OWNER/NAME@REVISION: a branch, a tag or a commit
    #[arg(env = "STRATA_MODEL_DIR")]
    pub model: String,
    /// A GGUF file of it, instead of safetensors; of one in parts, any
    #[arg(long, env = "STRATA_FILE", value_name = "NAME.gguf")]
    pub file: Option<String>,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Model directory in Hugging Face layout, or OWNER/NAME, OWNER/NAME@REVISION in the hub's cache
    #[arg(env = "STRATA_MODEL_DIR")]
    pub model: PathBuf,
    /// Another copy, or a file of what --json printed: what differs is named, and the exit code is 1
    #[arg(long, env = "STRATA_AGAINST")]
    pub against: Option<PathBuf>,
    /// Names of tensors that may be in the files though the model has no use for them, with * for any text; again for others
    #[arg(long, env = "STRATA_IGNORE_TENSORS", value_name = "GLOB", value_delimiter = ',')]
    pub ignore_tensors: Vec<String>,
    /// Print JSON: every tensor's digest too
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Whose shapes: a model directory, of which only config.json is read, or a name that `strata random-model` knows
    #[arg(env = "STRATA_MODEL_DIR")]
    pub model: String,
    /// A GPU or the CPU [default: the first GPU, if there is one]
    #[arg(long, env = "STRATA_DEVICE")]
    pub device: Option<DeviceSpec>,
    /// Format of activations and cache: auto (the model's), f32, bf16 or f16
    #[arg(long, env = "STRATA_DTYPE", default_value = "auto", value_parser = parse_dtype)]
    pub dtype: AutoDType,
    /// Formats of weights besides that: int8, int4 [default: both]
    #[arg(long, env = "STRATA_QUANTIZE", value_delimiter = ',')]
    pub quantize: Vec<Quantization>,
    /// Rows of products, measured in this order [default: 1, 32, 2048, then others up to 2048]
    #[arg(long, env = "STRATA_ROWS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub rows: Vec<u32>,
    /// Seconds for measuring, from when the device is open and its kernels are compiled; the first kernel is measured
    /// however long it takes, and others that would take longer are left out
    #[arg(long, env = "STRATA_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Print one JSON object per line
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub kernel_cache: KernelCacheArgs,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Whose
    #[arg(env = "STRATA_SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}
