//! Flags of the clients.

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value};
use strata_proto::{
    DEFAULT_PORT,
    v1::{Aggregation, ChatMessage, GenerateRequest, Sampling, Truncation},
};

use super::{DeploymentArgs, HereArgs};
use crate::{prompt, report};

/// Where a server is, and how long it may take.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct AddressArgs {
    /// URL of the server
    #[arg(long, env = "STRATA_ADDRESS", default_value_t = format!("http://127.0.0.1:{DEFAULT_PORT}"))]
    pub address: String,
    /// Seconds to wait for a connection, and for each further piece of an answer [default: 10 for a connection, then
    /// for as long as the server shows that it is there]
    #[arg(long, env = "STRATA_TIMEOUT", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub timeout: Option<u64>,
}

/// Which model is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ModelArgs {
    /// Name of the model, one of those that the server answers for [default: whichever it serves]
    #[arg(
        long = "model",
        env = "STRATA_ASK_MODEL",
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    /// Show it again whenever it changes, until Ctrl-C; the server may come and go meanwhile
    #[arg(long, env = "STRATA_WATCH")]
    pub watch: bool,
    #[command(flatten)]
    pub address: AddressArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
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
    #[arg(long, env = "STRATA_TEMPERATURE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Keep only this many most likely tokens; 0 is all
    #[arg(long, env = "STRATA_TOP_K", default_value_t = 0)]
    pub top_k: u32,
    /// Keep the smallest set of tokens of this probability
    #[arg(long, env = "STRATA_TOP_P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Seed of the prompts, and of the sampler
    #[arg(long, env = "STRATA_SEED", default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object per measurement
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

/// How an answer is drawn, and where it ends.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Answer")]
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
    #[arg(long, env = "STRATA_STOP", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// End with this token; may be repeated, or separated by commas
    #[arg(long, env = "STRATA_STOP_TOKEN_IDS", value_delimiter = ',')]
    pub stop_token_ids: Vec<u32>,
    /// So many tokens come before the answer may end by itself
    #[arg(long, env = "STRATA_MIN_TOKENS", default_value_t = 0)]
    pub min_tokens: u32,
    /// Add this to the logit of a token, as ID=VALUE, such as 13=-2.5; may be repeated, or separated by commas
    #[arg(long, env = "STRATA_LOGIT_BIAS", value_delimiter = ',', value_parser = parse_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Go on after an end-of-sequence token
    #[arg(long, env = "STRATA_IGNORE_EOS")]
    pub ignore_eos: bool,
    /// Use the sampling settings the model's makers suggest
    #[arg(long, env = "STRATA_MODEL_DEFAULTS")]
    pub model_defaults: bool,
}

impl AnswerArgs {
    /// The sampling that is asked for.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            logit_bias: self.logit_bias.iter().copied().collect(),
        }
    }

    /// Warns of flags that choose nothing, as the likeliest token is taken anyway.
    pub fn warn_of_idle_flags(&self) {
        let greedy = self.temperature.map_or(!self.model_defaults, |temperature| temperature == 0.0);
        let given = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        let idle: Vec<_> =
            given.into_iter().filter(|(_, given)| greedy && *given).map(|(flag, _)| flag).collect();
        if !idle.is_empty() {
            let idle = idle.join(", ");
            report::warn(&format!(
                "{idle}: without --temperature (or --model-defaults) the likeliest token is always taken"
            ));
        }
    }
}

/// What a chat may have beside messages as texts.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Chat")]
pub struct ChatArgs {
    /// Messages that the chat begins with, before any --message: a JSON list of objects with role, content, tool_calls, …;
    /// @FILE is a file, - is standard input
    #[arg(long, env = "STRATA_MESSAGES", value_name = "JSON")]
    messages: Option<String>,
    /// Tools that the model may call, a JSON list of objects; @FILE is a file
    #[arg(long, env = "STRATA_TOOLS", value_name = "JSON")]
    tools: Option<String>,
    /// Documents that the model may refer to, a JSON list of objects; @FILE is a file
    #[arg(long, env = "STRATA_DOCUMENTS", value_name = "JSON")]
    documents: Option<String>,
    /// A variable of the chat template, such as enable_thinking=false; may be repeated
    #[arg(long, env = "STRATA_TEMPLATE_ARGUMENT", value_name = "KEY=JSON", value_parser = parse_argument)]
    template_argument: Vec<(String, Value)>,
    /// Name of the chat template, where the model has several [default: tool_use with tools, else default]
    #[arg(long, env = "STRATA_CHAT_TEMPLATE", value_name = "NAME")]
    chat_template: Option<String>,
}

impl ChatArgs {
    /// A request for what these say; of everything else it says nothing. Reads files.
    pub fn request(&self) -> anyhow::Result<GenerateRequest> {
        let read = |flag: &str, given: &Option<String>| {
            given.clone().map(|given| prompt::read(given).with_context(|| format!("--{flag}"))).transpose()
        };
        let arguments: Map<String, Value> = self.template_argument.iter().cloned().collect();
        let messages: Vec<Map<String, Value>> = match read("messages", &self.messages)? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|e| report::misused(format!("--messages: {e}; expected a JSON list of objects")))?,
            None => Vec::new(),
        };
        let whole = |message: Map<String, Value>| ChatMessage {
            fields: Value::Object(message).to_string(),
            ..ChatMessage::default()
        };
        Ok(GenerateRequest {
            messages: messages.into_iter().map(whole).collect(),
            tools: read("tools", &self.tools)?,
            documents: read("documents", &self.documents)?,
            template_arguments: (!arguments.is_empty()).then(|| Value::Object(arguments).to_string()),
            chat_template: self.chat_template.clone(),
            ..GenerateRequest::default()
        })
    }
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub here: HereArgs,
    /// What to ask: a message of a chat if the model has a chat template, a text to continue if not; - is standard
    /// input, @FILE a file, and @@ an @. Without one, every line of standard input is asked
    #[arg(env = "STRATA_PROMPT", value_name = "PROMPT", help_heading = None)]
    pub text: Option<String>,
    /// The same as PROMPT; here it may begin with -
    #[arg(long, help_heading = "Answer", env = "STRATA_PROMPT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Continue the prompt as it is, although the model has a chat template
    #[arg(long, help_heading = "Answer", env = "STRATA_COMPLETE")]
    pub complete: bool,
    /// A message that the chat begins with, as ROLE=TEXT; may be repeated
    #[arg(long, help_heading = "Answer", env = "STRATA_MESSAGE", value_parser = parse_message, allow_hyphen_values = true, conflicts_with = "complete")]
    pub message: Vec<ChatMessage>,
    #[command(flatten)]
    pub chat: ChatArgs,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub deployment: DeploymentArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Text to continue; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_PROMPT", value_name = "PROMPT")]
    pub text: Option<String>,
    /// The same as PROMPT; here it may begin with -
    #[arg(long, env = "STRATA_PROMPT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Token ids to continue, taken as they are
    #[arg(long, env = "STRATA_TOKEN_IDS", value_delimiter = ',', conflicts_with_all = ["text", "prompt"])]
    pub token_ids: Vec<u32>,
    /// A message of a chat, as ROLE=TEXT; may be repeated
    #[arg(long, env = "STRATA_MESSAGE", value_parser = parse_message, allow_hyphen_values = true, conflicts_with_all = ["text", "prompt", "token_ids"])]
    pub message: Vec<ChatMessage>,
    /// Go on with what the last message says, as if the model had begun its answer with it; or with another FIELD of it,
    /// such as reasoning_content
    #[arg(long, help_heading = "Chat", env = "STRATA_CONTINUE_FINAL_MESSAGE", value_name = "FIELD", num_args = 0..=1, require_equals = true, default_missing_value = "content", default_value = "", hide_default_value = true)]
    pub continue_final_message: String,
    #[command(flatten)]
    pub chat: ChatArgs,
    /// With --json: report log-probabilities, and this many alternatives
    #[arg(long, env = "STRATA_LOGPROBS")]
    pub logprobs: Option<u32>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Whose request it is: prompts that begin alike are computed once within a tenant
    #[arg(long, env = "STRATA_TENANT", default_value = "", allow_hyphen_values = true)]
    pub tenant: String,
    /// Print one JSON object per event, and a last one with the whole answer
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
    #[command(flatten)]
    pub answer: AnswerArgs,
}

#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// The text; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_TEXT")]
    pub text: String,
    /// Leave out what the tokenizer puts around a text
    #[arg(long, env = "STRATA_PLAIN")]
    pub plain: bool,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

#[derive(Debug, Args)]
pub struct DetokenizeArgs {
    /// The ids, separated by commas or spaces; - is standard input, and @FILE a file
    #[arg(env = "STRATA_TOKEN_IDS", required = true)]
    pub token_ids: Vec<String>,
    /// Write special tokens out
    #[arg(long, env = "STRATA_KEEP_SPECIAL")]
    pub keep_special: bool,
    /// Print JSON
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
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
    /// A text; - is standard input, @FILE a file, and @@ an @; may be repeated
    #[arg(long, env = "STRATA_TEXT", allow_hyphen_values = true)]
    pub text: Vec<String>,
    /// The second text of a pair: the first --pair goes with the first --text, and so on
    #[arg(long, env = "STRATA_PAIR", allow_hyphen_values = true)]
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
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

#[derive(Debug, Args)]
pub struct ClassifyArgs {
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub struct RerankArgs {
    /// A query, and behind it the documents that are to answer it; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_TEXTS", value_name = "QUERY DOCUMENT", required = true)]
    pub texts: Vec<String>,
    /// Print the best so many only
    #[arg(long, env = "STRATA_TOP_N")]
    pub top_n: Option<u32>,
    /// Put the model's prompt of this name before the query; "" for none [default: the model's own choice]
    #[arg(long, env = "STRATA_PROMPT_NAME")]
    pub prompt_name: Option<String>,
    /// Keep this end of a pair that is too long, instead of refusing it
    #[arg(long, env = "STRATA_TRUNCATE", value_enum)]
    pub truncate: Option<Keep>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Print one JSON object per document
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

#[derive(Debug, Args)]
pub struct TagArgs {
    /// The texts; - is standard input, @FILE a file, and @@ an @
    #[arg(env = "STRATA_TEXTS", value_name = "TEXT", required = true)]
    pub texts: Vec<String>,
    /// How tokens become entities: each by itself, neighbours of one class together, or likewise of whole words, each with the class
    /// of its first token, of the mean of its tokens, or of the token with the highest score
    #[arg(long, env = "STRATA_AGGREGATION", value_enum, default_value_t = Aggregate::None)]
    pub aggregation: Aggregate,
    /// Leave entities of this label out; "" to leave none out; may be repeated [default: O]
    #[arg(long = "ignore-label", env = "STRATA_IGNORE_LABEL", value_name = "LABEL")]
    pub ignore_labels: Vec<String>,
    /// Keep this end of a text that is too long, instead of refusing it
    #[arg(long, env = "STRATA_TRUNCATE", value_enum)]
    pub truncate: Option<Keep>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Print one JSON object per text
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

/// How tokens become entities.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Aggregate {
    None,
    Simple,
    First,
    Average,
    Max,
}

impl From<Aggregate> for Aggregation {
    fn from(aggregate: Aggregate) -> Self {
        match aggregate {
            Aggregate::None => Aggregation::None,
            Aggregate::Simple => Aggregation::Simple,
            Aggregate::First => Aggregation::First,
            Aggregate::Average => Aggregation::Average,
            Aggregate::Max => Aggregation::Max,
        }
    }
}

#[derive(Debug, Args)]
pub struct QuestionArgs {
    /// What to look for; - is standard input, @FILE a file, and @@ an @
    #[arg(long, env = "STRATA_QUESTION", allow_hyphen_values = true)]
    pub question: String,
    /// The text to look for it in, likewise; if it is long, it is read in windows that overlap
    #[arg(long, env = "STRATA_CONTEXT_TEXT", allow_hyphen_values = true)]
    pub context: String,
    /// Answers to print [default: 1]
    #[arg(long, env = "STRATA_TOP_K")]
    pub top_k: Option<u32>,
    /// Most tokens of an answer [default: 15]
    #[arg(long, env = "STRATA_MAX_ANSWER_TOKENS")]
    pub max_answer_tokens: Option<u32>,
    /// Take it for an answer, an empty one, that there is none
    #[arg(long, env = "STRATA_HANDLE_IMPOSSIBLE_ANSWER")]
    pub handle_impossible_answer: bool,
    /// Most tokens of a window, question included [default: 384, or what the model takes]
    #[arg(long, env = "STRATA_MAX_WINDOW_TOKENS")]
    pub max_window_tokens: Option<u32>,
    /// Tokens that a window has in common with the one before [default: 128, or half of a window]
    #[arg(long, env = "STRATA_STRIDE")]
    pub stride: Option<u32>,
    /// Give up after this many milliseconds
    #[arg(long, env = "STRATA_DEADLINE_MS")]
    pub deadline_ms: Option<u64>,
    /// Print one JSON object per answer
    #[arg(long, env = "STRATA_JSON")]
    pub json: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub address: AddressArgs,
}

#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// Put the model's prompt of this name before every text; "" for none [default: the model's own choice]
    #[arg(long, env = "STRATA_PROMPT_NAME")]
    pub prompt_name: Option<String>,
    #[command(flatten)]
    pub input: InputArgs,
}

#[derive(Debug, Args)]
pub struct FillMaskArgs {
    /// Candidates for each mask [default: 5]
    #[arg(long, env = "STRATA_TOP_K")]
    pub top_k: Option<u32>,
    #[command(flatten)]
    pub input: InputArgs,
}

fn parse_bias(s: &str) -> Result<(u32, f32), String> {
    let read = || {
        let (id, value) = s.split_once('=')?;
        Some((id.trim().parse().ok()?, value.trim().parse().ok()?))
    };
    read().ok_or_else(|| format!("{s:?}: expected ID=VALUE, as in 13=-2.5"))
}

fn parse_message(s: &str) -> Result<ChatMessage, String> {
    let (role, content) =
        s.split_once('=').ok_or_else(|| format!("{s:?}: expected ROLE=TEXT, as in user=Hello"))?;
    Ok(ChatMessage { role: role.to_owned(), content: content.to_owned(), ..ChatMessage::default() })
}

fn parse_argument(s: &str) -> Result<(String, Value), String> {
    let (key, json) =
        s.split_once('=').ok_or_else(|| format!("{s:?}: expected KEY=JSON, as in enable_thinking=false"))?;
    let value = serde_json::from_str(json).map_err(|e| {
        format!("{json:?} is no JSON ({e}); a text is written in quotes, as in style='\"short\"'")
    })?;
    Ok((key.to_owned(), value))
}
