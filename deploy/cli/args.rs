//! Flags, read raw. Every one has an environment variable and a place in the configuration file.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::bail;
use clap::{Args, Parser, Subcommand, ValueEnum};
use strata_coordinator::{planner::Split, preflight::Check};
use strata_proto::{
    DEFAULT_PORT, DType, LinkKind, Quantization,
    v1::{ChatMessage, Truncation},
};
use strata_worker::{
    device::{self, Compute, DeviceSpec, parse_bytes},
    kernels::cpu::isa::Isa,
};

/// Serves one transformer model across many devices.
#[derive(Debug, Parser)]
#[command(name = "strata", version = crate::VERSION)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, or target=level pairs [default: warn; for run, error]
    #[arg(long, global = true, env = "STRATA_LOG")]
    pub log: Option<String>,
    /// How to log
    #[arg(long, global = true, env = "STRATA_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// TOML file with one table per command, e.g. `[serve]`, whose keys are long flag names
    #[arg(long, global = true, env = "STRATA_CONFIG")]
    pub config: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask a model in this process: one answer, or a chat in the terminal
    Run(RunArgs),
    /// Serve a model: a coordinator and its workers in one process
    Serve(ServeArgs),
    /// Run a coordinator over workers that are processes of their own
    Coordinator(CoordinatorArgs),
    /// Run a worker that a coordinator drives
    Worker(WorkerArgs),
    /// Show how a model would be split, without loading it
    Plan(PlanArgs),
    /// Load a model, check that it and its tokenizer belong together, and report
    Check(CheckArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Score texts by a classifier's classes
    Classify(ClassifyArgs),
    /// Turn texts into vectors
    Embed(EmbedArgs),
    /// Guess the tokens behind the masks of texts
    FillMask(FillMaskArgs),
    /// Turn a text into token ids, as the served model reads it
    Tokenize(TokenizeArgs),
    /// Turn token ids into text
    Detokenize(DetokenizeArgs),
    /// Show what a server is doing
    Status(StatusArgs),
    /// Measure throughput and latency of a running server
    Bench(BenchArgs),
    /// Write a model of a named shape with random weights, to measure with
    RandomModel(RandomModelArgs),
    /// Measure every kernel of a device by itself, at the shapes of a model
    Kernels(KernelsArgs),
    /// Print what makes a shell complete commands and flags
    Completions(CompletionsArgs),
}

/// How a model is deployed, whatever the processes.
#[derive(Debug, Clone, Args)]
pub struct DeploymentArgs {
    /// How to split layers: auto, balanced, balanced_low_0, sequential, layer counts such as 2,2,2, or a device map as JSON
    #[arg(long, env = "STRATA_SPLIT")]
    pub split: Option<Split>,
    /// Format of weights, activations and cache: auto (the checkpoint's), f32, bf16 or f16, or as PyTorch names them
    #[arg(long, env = "STRATA_DTYPE", default_value = "auto", value_parser = parse_dtype)]
    pub dtype: AutoDType,
    /// Turn weights into int8 or int4 when they are loaded, or none
    #[arg(long, env = "STRATA_QUANTIZE", default_value = "none", hide_default_value = true, value_parser = parse_quantization)]
    pub quantize: MaybeQuantized,
    /// Token positions the cache holds [default: 16 x the context, or what fits]
    #[arg(long, env = "STRATA_KV_TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_tokens: Option<u64>,
    /// Size the cache for this many sequences of full context
    #[arg(long, env = "STRATA_MAX_SEQUENCES", conflicts_with = "kv_tokens", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_sequences: Option<u32>,
    /// Longest sequence, prompt and answer together [default: the model's context]
    #[arg(long, env = "STRATA_CONTEXT", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: Option<u32>,
    /// Links between stages: auto (the best that each two can have), loopback, device-copy, nccl or tcp
    #[arg(long, env = "STRATA_LINKS", default_value = "auto", value_parser = parse_links)]
    pub links: AutoLinks,
    /// Most tokens in one step
    #[arg(long, env = "STRATA_MAX_STEP_TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_step_tokens: u32,
    /// Most sequences in one step
    #[arg(long, env = "STRATA_MAX_STEP_ROWS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_step_rows: u32,
    /// Most prompt tokens of one sequence in one step; several stages take smaller ones, so that all of them are busy
    #[arg(long, env = "STRATA_PREFILL_CHUNK", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub prefill_chunk: u32,
    /// Milliseconds that a long prompt may keep others waiting for their next token; 0 is as long as it takes
    #[arg(long, env = "STRATA_INTER_TOKEN_MS", default_value_t = 200)]
    pub inter_token_ms: u64,
    /// Compute every prompt from its beginning, even if an earlier one began alike
    #[arg(long, env = "STRATA_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Serve although this check fails: token-ids, family, special-tokens, chat-template, round-trip or output
    #[arg(long, env = "STRATA_SKIP_CHECK", value_delimiter = ',')]
    pub skip_check: Vec<Check>,
    /// Most requests in progress or waiting; more are refused at once
    #[arg(long, env = "STRATA_MAX_REQUESTS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_requests: u32,
}

/// The checkpoint's format, or a chosen one.
#[derive(Debug, Clone, Copy)]
pub struct AutoDType(pub Option<DType>);

/// Weights as they are, or in fewer bits.
#[derive(Debug, Clone, Copy)]
pub struct MaybeQuantized(pub Option<Quantization>);

/// The best links, or one kind of them.
#[derive(Debug, Clone, Copy)]
pub struct AutoLinks(pub Option<LinkKind>);

fn parse_links(s: &str) -> Result<AutoLinks, String> {
    match s {
        "auto" => Ok(AutoLinks(None)),
        kind => kind.parse().map(|kind| AutoLinks(Some(kind))).map_err(|e: String| format!("{e}, or auto")),
    }
}

fn parse_dtype(s: &str) -> Result<AutoDType, String> {
    let name = match s {
        "auto" => return Ok(AutoDType(None)),
        // PyTorch's names.
        "float32" | "float" => "f32",
        "bfloat16" => "bf16",
        "float16" | "half" => "f16",
        name => name,
    };
    name.parse().map(|d| AutoDType(Some(d))).map_err(|e: String| format!("{e}, or auto"))
}

fn parse_quantization(s: &str) -> Result<MaybeQuantized, String> {
    if s == "none" {
        return Ok(MaybeQuantized(None));
    }
    s.parse().map(|q| MaybeQuantized(Some(q))).map_err(|e: String| format!("{e}, or none"))
}

/// So many equal devices.
#[derive(Debug, Clone, PartialEq)]
pub struct ImaginedDevices {
    /// How many.
    pub count: u32,
    /// Bytes of each.
    pub bytes: u64,
    /// Memory bandwidth of each, in bytes per second.
    pub bytes_per_second: f64,
    /// Arithmetic rate of each, in operations per second.
    pub flops_per_second: f64,
}

impl std::str::FromStr for ImaginedDevices {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split('@');
        let size = parts.next().unwrap_or_default();
        let (count, size) = match size.split_once('x') {
            Some((count, size)) => (count.parse().ok().filter(|n| (1..=1024).contains(n)), size),
            None => (Some(1), size),
        };
        let count = count.ok_or_else(|| format!("{s:?}: expected a count from 1 to 1024 before the x"))?;
        // An unnamed rate is that of a recent data-centre GPU, so that splits compare sensibly.
        let mut rate = |unit: &str, default: f64| match parts.next() {
            None => Ok(default),
            Some(text) => {
                let number = text.strip_suffix("/s").unwrap_or(text).replace(unit, "B");
                parse_bytes(&number).map(|n| n as f64)
            }
        };
        let (bytes_per_second, flops_per_second) = (rate("B", 2e12)?, rate("FLOP", 4e14)?);
        match parts.next() {
            None => {
                Ok(ImaginedDevices { count, bytes: parse_bytes(size)?, bytes_per_second, flops_per_second })
            }
            Some(more) => {
                Err(format!("{s:?}: {more:?} is too much: expected [COUNTx]SIZE[@BANDWIDTH[@RATE]]"))
            }
        }
    }
}

fn parse_message(s: &str) -> Result<ChatMessage, String> {
    let (role, content) =
        s.split_once('=').ok_or_else(|| format!("{s:?}: expected ROLE=TEXT, as in user=Hello"))?;
    Ok(ChatMessage { role: role.to_owned(), content: content.to_owned() })
}

/// Where clients are answered.
#[derive(Debug, Clone, Args)]
pub struct ListenArgs {
    /// Address to answer clients on
    #[arg(long, env = "STRATA_HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port to answer clients on; 0 picks a free one
    #[arg(long, env = "STRATA_PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,
    /// Seconds that answers in progress may take to finish after SIGTERM
    #[arg(long, env = "STRATA_GRACE", default_value_t = 30)]
    pub grace: u64,
}

/// How this machine's processors compute.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Threads of each CPU device [default: the cores, shared among the devices]
    #[arg(long, env = "STRATA_THREADS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Keep each thread on a core of its own: for machines that do nothing else
    #[arg(long, env = "STRATA_PIN_THREADS")]
    pub pin_threads: bool,
    /// Instruction set of the kernels: portable, avx2 or avx512 [default: the widest there is]
    #[arg(long, env = "STRATA_ISA")]
    pub isa: Option<Isa>,
}

impl ComputeArgs {
    /// What was asked for, for a process with so many CPU devices.
    pub fn resolve(&self, devices: usize) -> Compute {
        let default = Compute::shared_by(devices);
        Compute {
            isa: self.isa.unwrap_or(default.isa),
            threads: self.threads.map_or(default.threads, |n| n as usize),
            pin: self.pin_threads,
        }
    }
}

/// Where weights go that fit into no memory.
#[derive(Debug, Clone, Args)]
pub struct SpillArgs {
    /// Directory on a disk, where weights stay memory-mapped that do not fit into memory; empty: nowhere
    /// [default: /var/tmp]
    #[arg(long, env = "STRATA_SPILL_DIR")]
    pub spill_dir: Option<String>,
}

impl SpillArgs {
    /// The directory, if there is to be one.
    pub fn resolve(&self) -> anyhow::Result<Option<PathBuf>> {
        match self.spill_dir.as_deref() {
            Some("") => Ok(None),
            Some(named) if !Path::new(named).is_dir() => bail!("--spill-dir {named}: no such directory"),
            directory => Ok(Some(directory.unwrap_or("/var/tmp").into())),
        }
    }
}

/// Where compiled kernels are kept.
#[derive(Debug, Clone, Args)]
pub struct KernelCacheArgs {
    /// Directory that keeps the compiled kernels of GPUs for the next start; empty: nowhere [default: strata/kernels in the
    /// user's cache directory, if there is one]
    #[arg(long, env = "STRATA_KERNEL_CACHE")]
    pub kernel_cache: Option<String>,
}

impl KernelCacheArgs {
    /// The directory, if there is to be one.
    pub fn resolve(&self) -> Option<PathBuf> {
        match self.kernel_cache.as_deref() {
            Some("") => None,
            Some(named) => Some(named.into()),
            // A user without a home, as in a container, has no such directory, and need not be told.
            None => {
                user_cache().map(|cache| cache.join("strata/kernels")).filter(|path| device::can_write(path))
            }
        }
    }
}

/// The user's cache directory, by the XDG Base Directory Specification.
fn user_cache() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))
}

/// A model and devices of this machine.
#[derive(Debug, Clone, Args)]
pub struct HereArgs {
    /// Model directory in Hugging Face layout
    #[arg(env = "STRATA_MODEL_DIR")]
    pub model: PathBuf,
    /// Workers in this process that share 90 % of the free host memory; the split is then balanced
    #[arg(long, env = "STRATA_WORKERS", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Devices of one worker, with optional byte caps: cuda:0,cuda:1=20GiB,cpu. Several stages on one GPU are cuda:0/0,
    /// cuda:0/1. The split is then auto [default: all GPUs, then the CPU]
    #[arg(long, env = "STRATA_DEVICES", value_delimiter = ',')]
    pub devices: Vec<DeviceSpec>,
    /// Byte caps by device, of each worker: cpu=64GiB
    #[arg(long, env = "STRATA_MAX_MEMORY", value_delimiter = ',')]
    pub max_memory: Vec<DeviceSpec>,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub spill: SpillArgs,
    #[command(flatten)]
    pub kernel_cache: KernelCacheArgs,
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    #[command(flatten)]
    pub listen: ListenArgs,
    /// Print the plan and stop
    #[arg(long, env = "STRATA_DRY_RUN")]
    pub dry_run: bool,
    /// With --dry-run: print the plan as JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    /// Plan over GPUs this machine need not have: 2x80GiB@3.3TB/s@900TFLOP/s, where count, bandwidth and rate may be left
    /// out; may be repeated
    #[arg(long = "device", env = "STRATA_DEVICE", conflicts_with_all = ["workers", "devices", "max_memory"])]
    pub imagined: Vec<ImaginedDevices>,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub here: HereArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CoordinatorArgs {
    /// URL of a worker; repeat, or separate by commas
    #[arg(long = "worker", env = "STRATA_WORKER_URLS", value_delimiter = ',', required = true)]
    pub workers: Vec<String>,
    /// Name of the model: a directory under each worker's --models
    #[arg(long, env = "STRATA_MODEL")]
    pub model: String,
    /// Seconds to wait for the workers
    #[arg(long, env = "STRATA_JOIN_TIMEOUT", default_value_t = 120)]
    pub join_timeout: u64,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
    #[command(flatten)]
    pub listen: ListenArgs,
}

#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// Address for the coordinator's calls; port 0 picks a free one
    #[arg(long, env = "STRATA_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Address for activations of other workers; port 0 picks a free one [default: the host of --listen, port 0]
    #[arg(long, env = "STRATA_LINK_LISTEN")]
    pub link_listen: Option<SocketAddr>,
    /// Directory whose subdirectories are models
    #[arg(long, env = "STRATA_MODELS")]
    pub models: PathBuf,
    /// Devices, with optional byte caps: cuda:0,cpu=64GiB [default: all GPUs, then the CPU]
    #[arg(long, env = "STRATA_DEVICES", value_delimiter = ',')]
    pub devices: Vec<DeviceSpec>,
    /// Byte caps by device: cpu=64GiB
    #[arg(long, env = "STRATA_MAX_MEMORY", value_delimiter = ',')]
    pub max_memory: Vec<DeviceSpec>,
    #[command(flatten)]
    pub compute: ComputeArgs,
    #[command(flatten)]
    pub spill: SpillArgs,
    #[command(flatten)]
    pub kernel_cache: KernelCacheArgs,
}

/// Where a server is.
#[derive(Debug, Clone, Args)]
pub struct AddressArgs {
    /// URL of the server
    #[arg(long, env = "STRATA_ADDRESS", default_value_t = format!("http://127.0.0.1:{DEFAULT_PORT}"))]
    pub address: String,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// Requests at once; several, separated by commas, are measured one after the other
    #[arg(long, env = "STRATA_CONCURRENCY", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub concurrency: Vec<u32>,
    /// Requests of each measurement [default: 4 x the concurrency]
    #[arg(long, env = "STRATA_REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: Option<u32>,
    /// Tokens of each prompt, drawn at random
    #[arg(long, env = "STRATA_PROMPT_TOKENS", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    /// Tokens at the beginning of each prompt that are the same in all of them
    #[arg(long, env = "STRATA_SHARED_PREFIX", default_value_t = 0)]
    pub shared_prefix: u32,
    /// Tokens of each answer
    #[arg(long, env = "STRATA_MAX_TOKENS", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// 0 is greedy
    #[arg(long, env = "STRATA_TEMPERATURE", default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep only this many most likely tokens; 0 is all
    #[arg(long, env = "STRATA_TOP_K", default_value_t = 0)]
    pub top_k: u32,
    /// Keep the smallest set of tokens of this probability
    #[arg(long, env = "STRATA_TOP_P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of the prompts, and of the sampler
    #[arg(long, env = "STRATA_SEED", default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object per measurement
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

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
    /// Seconds for measuring, from when the device is open and its kernels are compiled; the first kernel is measured however
    /// long it takes, and others that would take longer are left out
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

/// How an answer is drawn, and where it ends.
#[derive(Debug, Clone, Args)]
pub struct AnswerArgs {
    /// Most new tokens [default: the rest of the context]
    #[arg(long, env = "STRATA_MAX_TOKENS")]
    pub max_tokens: Option<u32>,
    /// 0 is greedy [default: 0]
    #[arg(long, env = "STRATA_TEMPERATURE", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep only this many most likely tokens; 0 is all
    #[arg(long, env = "STRATA_TOP_K")]
    pub top_k: Option<u32>,
    /// Keep the smallest set of tokens of this probability
    #[arg(long, env = "STRATA_TOP_P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, env = "STRATA_MIN_P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens seen before by this
    #[arg(long, env = "STRATA_REPETITION_PENALTY", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract this from a token's logit for each time it was generated
    #[arg(long, env = "STRATA_FREQUENCY_PENALTY", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Subtract this from the logits of all tokens that were generated
    #[arg(long, env = "STRATA_PRESENCE_PENALTY", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Seed of the sampler [default: drawn by the server, and shown]
    #[arg(long, env = "STRATA_SEED")]
    pub seed: Option<u64>,
    /// End before this text appears; may be repeated
    #[arg(long, env = "STRATA_STOP")]
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token
    #[arg(long, env = "STRATA_IGNORE_EOS")]
    pub ignore_eos: bool,
    /// Use the sampling settings the model's makers suggest
    #[arg(long, env = "STRATA_MODEL_DEFAULTS")]
    pub model_defaults: bool,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub here: HereArgs,
    /// What to ask: a message of a chat if the model has a chat template, a text to continue if not; - is standard input,
    /// @FILE a file, and @@ an @. Without one, every line of standard input is asked
    #[arg(env = "STRATA_PROMPT", value_name = "PROMPT")]
    pub text: Option<String>,
    /// The same
    #[arg(long, env = "STRATA_PROMPT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Continue the prompt as it is, although the model has a chat template
    #[arg(long, env = "STRATA_COMPLETE")]
    pub complete: bool,
    /// A message that the chat begins with, as ROLE=TEXT; may be repeated
    #[arg(long, env = "STRATA_MESSAGE", value_parser = parse_message, conflicts_with = "complete")]
    pub message: Vec<ChatMessage>,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// Text to continue; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_PROMPT", value_name = "PROMPT", required_unless_present_any = ["prompt", "token_ids", "message"])]
    pub text: Option<String>,
    /// The same
    #[arg(long, env = "STRATA_PROMPT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Token ids to continue, taken as they are
    #[arg(long, env = "STRATA_TOKEN_IDS", value_delimiter = ',', conflicts_with_all = ["text", "prompt"])]
    pub token_ids: Vec<u32>,
    /// A message of a chat, as ROLE=TEXT; may be repeated
    #[arg(long, env = "STRATA_MESSAGE", value_parser = parse_message, conflicts_with_all = ["text", "prompt", "token_ids"])]
    pub message: Vec<ChatMessage>,
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Report log-probabilities, and this many alternatives
    #[arg(long, env = "STRATA_LOGPROBS")]
    pub logprobs: Option<u32>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Whose request it is: prompts that begin alike are computed once within a tenant
    #[arg(long, env = "STRATA_TENANT", default_value = "")]
    pub tenant: String,
    /// Print one JSON object per event, and a last one with the whole answer
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// The text; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_TEXT")]
    pub text: String,
    /// Leave out what the tokenizer puts around a text
    #[arg(long, env = "STRATA_PLAIN")]
    pub plain: bool,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DetokenizeArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// The ids, separated by commas
    #[arg(env = "STRATA_TOKEN_IDS", value_delimiter = ',', required = true)]
    pub token_ids: Vec<u32>,
    /// Write special tokens out
    #[arg(long, env = "STRATA_KEEP_SPECIAL")]
    pub keep_special: bool,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Whose
    #[arg(env = "STRATA_SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

/// Which part of a long input is kept.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Keep {
    Head,
    Tail,
}

impl From<Keep> for Truncation {
    fn from(keep: Keep) -> Self {
        match keep {
            Keep::Head => Truncation::KeepHead,
            Keep::Tail => Truncation::KeepTail,
        }
    }
}

/// Inputs of an encoder.
#[derive(Debug, Args)]
pub struct InputArgs {
    #[command(flatten)]
    pub address: AddressArgs,
    /// A text; may be repeated
    #[arg(long, env = "STRATA_TEXT", required_unless_present = "token_ids")]
    pub text: Vec<String>,
    /// The second text of a pair: the first --pair goes with the first --text, and so on
    #[arg(long, env = "STRATA_PAIR", requires = "text")]
    pub pair: Vec<String>,
    /// Token ids, taken as they are
    #[arg(long, env = "STRATA_TOKEN_IDS", value_delimiter = ',', conflicts_with = "text")]
    pub token_ids: Vec<u32>,
    /// Keep this end of an input that is too long, instead of refusing it
    #[arg(long, env = "STRATA_TRUNCATE", value_enum)]
    pub truncate: Option<Keep>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Print one JSON object per input
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ClassifyArgs {
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub struct FillMaskArgs {
    #[command(flatten)]
    pub input: InputArgs,
    /// Candidates for each mask [default: 5]
    #[arg(long, env = "STRATA_TOP_K")]
    pub top_k: Option<u32>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use strata_proto::{DType, Quantization};

    use super::{Cli, ImaginedDevices, parse_dtype, parse_quantization};

    #[test]
    fn formats_have_the_names_that_others_give_them() {
        let read = |s: &str| parse_dtype(s).unwrap().0;
        for (name, dtype) in [
            ("auto", None),
            ("bf16", Some(DType::BF16)),
            ("bfloat16", Some(DType::BF16)),
            ("float16", Some(DType::F16)),
            ("half", Some(DType::F16)),
            ("float32", Some(DType::F32)),
        ] {
            assert_eq!(read(name), dtype, "{name}");
        }
        assert!(parse_dtype("fp8").unwrap_err().contains("expected f32, bf16 or f16, or auto"));
        assert_eq!(parse_quantization("none").unwrap().0, None);
        assert_eq!(parse_quantization("int4").unwrap().0, Some(Quantization::Int4));
        assert!(parse_quantization("nf4").unwrap_err().contains("expected int8 or int4, or none"));
    }

    #[test]
    fn reads_imagined_devices() {
        let read = |s: &str| s.parse::<ImaginedDevices>();
        let two = read("2x80GiB@3.3TB/s@900TFLOP/s").unwrap();
        assert_eq!((two.count, two.bytes), (2, 80 << 30));
        assert_eq!((two.bytes_per_second, two.flops_per_second), (3.3e12, 9e14));
        assert_eq!(read("24GiB").unwrap().count, 1);
        for bad in ["0x8GiB", "x8GiB", "2x", "8GiB@fast", "8GiB@1TB/s@1TFLOP/s@1", ""] {
            assert!(read(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_command_line_is_sound_and_every_flag_has_a_variable() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        let subcommands = command.get_subcommands().filter(|c| c.get_name() != "help");
        for argument in subcommands.flat_map(clap::Command::get_arguments) {
            let standard = ["help", "version"].contains(&argument.get_id().as_str());
            assert!(
                standard || argument.get_env().is_some(),
                "{} has no environment variable",
                argument.get_id()
            );
        }
    }
}
