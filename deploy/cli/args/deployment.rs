//! Flags of a deployment: how a model is split and served, whatever the processes.

use std::ops::RangeInclusive;

use clap::Args;
use strata_coordinator::{config, planner::Split, preflight::Check};
use strata_proto::{DType, LinkKind, Quantization};

/// How a model is deployed, whatever the processes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Deployment")]
pub struct DeploymentArgs {
    /// How to split layers: auto, balanced, balanced_low_0, sequential, layer counts such as 2,2,2, or a device map as
    /// JSON
    #[arg(long, env = "STRATA_SPLIT")]
    pub split: Option<Split>,
    /// Format of weights, activations and cache: auto (the checkpoint's), f32, bf16 or f16, or as PyTorch names them
    #[arg(long, env = "STRATA_DTYPE", default_value = "auto", value_parser = parse_dtype)]
    pub dtype: AutoDType,
    /// Turn weights into int8 or int4 when they are loaded, or none
    #[arg(long, env = "STRATA_QUANTIZE", default_value = "none", hide_default_value = true, value_parser = parse_quantization)]
    pub quantize: MaybeQuantized,
    /// Names of tensors that may be in the files though the model has no use for them, with * for any text; again for others
    #[arg(long, env = "STRATA_IGNORE_TENSORS", value_name = "GLOB", value_delimiter = ',')]
    pub ignore_tensors: Vec<String>,
    /// Token positions the cache holds [default: 16 x the context, or what fits]
    #[arg(long, env = "STRATA_KV_TOKENS", value_parser = clap::value_parser!(u64).range(config::KV_TOKENS))]
    pub kv_tokens: Option<u64>,
    /// Size the cache for this many sequences of full context
    #[arg(long, env = "STRATA_MAX_SEQUENCES", conflicts_with = "kv_tokens", value_parser = clap::value_parser!(u32).range(within(config::SEQUENCES)))]
    pub max_sequences: Option<u32>,
    /// Longest sequence, prompt and answer together [default: the model's context]
    #[arg(long, env = "STRATA_CONTEXT", value_parser = clap::value_parser!(u32).range(within(config::CONTEXT)))]
    pub context: Option<u32>,
    /// Most copies of the model that --split auto makes [default: as many as there is room for]
    #[arg(long, env = "STRATA_REPLICAS", value_parser = clap::value_parser!(u32).range(within(config::REPLICAS)))]
    pub replicas: Option<u32>,
    /// Devices to keep free, each with the weights of a stage that it takes over when the stage is lost
    #[arg(long, env = "STRATA_STANDBYS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(within(config::STANDBYS)))]
    pub standbys: u32,
    /// Links between stages: auto (the best that each two can have), loopback, device-copy, nccl or tcp
    #[arg(long, env = "STRATA_LINKS", default_value = "auto", value_parser = parse_links)]
    pub links: AutoLinks,
    /// Most tokens in one step
    #[arg(long, env = "STRATA_MAX_STEP_TOKENS", default_value_t = config::MAX_STEP_TOKENS, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_step_tokens: u32,
    /// Most sequences in one step
    #[arg(long, env = "STRATA_MAX_STEP_ROWS", default_value_t = config::MAX_STEP_ROWS, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_step_rows: u32,
    /// Most prompt tokens of one sequence in one step; several stages take smaller ones, so that all of them are busy
    #[arg(long, env = "STRATA_PREFILL_CHUNK", default_value_t = config::PREFILL_CHUNK, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub prefill_chunk: u32,
    /// Milliseconds that a long prompt may keep others waiting for their next token; 0 is as long as it takes
    #[arg(long, env = "STRATA_INTER_TOKEN_MS", default_value_t = config::INTER_TOKEN.as_millis() as u64)]
    pub inter_token_ms: u64,
    /// Seconds of silence after which a worker counts as lost, and a worker's neighbour or coordinator to the worker
    #[arg(long, env = "STRATA_HEARTBEAT_TIMEOUT", default_value_t = config::HEARTBEAT_TIMEOUT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=5))]
    pub heartbeat_timeout: u64,
    /// Compute every prompt from its beginning, even if an earlier one began alike
    #[arg(long, env = "STRATA_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Serve although this check fails: token-ids, family, special-tokens, chat-template, round-trip or output
    #[arg(long, env = "STRATA_SKIP_CHECK", value_delimiter = ',')]
    pub skip_check: Vec<Check>,
    /// Most requests in progress or waiting; more are refused at once
    #[arg(long, env = "STRATA_MAX_REQUESTS", default_value_t = config::MAX_REQUESTS, value_parser = clap::value_parser!(u32).range(1..=65536))]
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

/// A range as clap takes it.
fn within(range: RangeInclusive<u32>) -> RangeInclusive<i64> {
    i64::from(*range.start())..=i64::from(*range.end())
}

fn parse_links(s: &str) -> Result<AutoLinks, String> {
    match s {
        "auto" => Ok(AutoLinks(None)),
        kind => kind.parse().map(|kind| AutoLinks(Some(kind))).map_err(|e: String| format!("{e}, or auto")),
    }
}

pub(super) fn parse_dtype(s: &str) -> Result<AutoDType, String> {
    match s {
        "auto" => Ok(AutoDType(None)),
        name => name.parse().map(|d| AutoDType(Some(d))).map_err(|e: String| format!("{e}, or auto")),
    }
}

fn parse_quantization(s: &str) -> Result<MaybeQuantized, String> {
    if s == "none" {
        return Ok(MaybeQuantized(None));
    }
    s.parse().map(|q| MaybeQuantized(Some(q))).map_err(|e: String| format!("{e}, or none"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
