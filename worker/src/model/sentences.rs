//! What sentence-transformers' files beside a model say: how its vectors are made, how long inputs are, and which prompts
//! there are (sentence-transformers 6.2, `base/modules` and `sentence_transformer/modules`; 2 to 5 are read too).

use strata_proto::v1;

use super::{
    ModelError,
    architecture::{Act, Embedding, Head, Norm, Pool, Refinement, Tower},
    config::{Config, ConfigError},
};
use crate::weights::{Checkpoint, module_prefix};

const MODULES: &str = "modules.json";
const MODULE: &str = "a module's config.json";
const LIMITS: &str = "sentence_bert_config.json";
const FACTS: &str = "config_sentence_transformers.json";
const TOKENIZER: &str = "tokenizer_config.json";
/// Most elements of a vector.
const MAX_WIDTH: usize = 1 << 16;
/// What is no limit for a tokenizer: transformers writes 1e30.
const UNLIMITED: f64 = 8_388_608.0;
/// Most modules, and most prompts.
const MAX_MODULES: usize = 64;
/// torch's `LayerNorm`.
const NORM_EPSILON: f32 = 1e-5;

/// Whether there are files that say how vectors are pooled.
pub(super) fn are_pooled(checkpoint: &Checkpoint) -> Result<bool, ModelError> {
    let Some(modules) = checkpoint.json(MODULES)? else { return Ok(false) };
    let kind = |module: Config| Ok(module.string("type")?.is_some_and(|kind| kind.ends_with("Pooling")));
    let kinds = Config::list(MODULES, modules)?.into_iter().map(kind);
    Ok(kinds.collect::<Result<Vec<_>, ConfigError>>()?.contains(&true))
}

/// The tokens by whose logits a model that continues texts judges inputs, if files say so (`LogitScore`): the one for yes and,
/// unless its logit counts as it is, the one for no.
pub(super) fn judges(checkpoint: &Checkpoint, tower: &Tower) -> Result<Option<Vec<usize>>, ModelError> {
    let Some(modules) = checkpoint.json(MODULES)? else { return Ok(None) };
    let modules = Config::list(MODULES, modules)?;
    let is = |module: &Config, name: &str| {
        Ok::<_, ConfigError>(module.string("type")?.is_some_and(|kind| kind.rsplit('.').next() == Some(name)))
    };
    let Some(last) = modules.last() else { return Ok(None) };
    if !is(last, "LogitScore")? {
        return Ok(None);
    }
    let (2, true, "") =
        (modules.len(), is(&modules[0], "Transformer")?, modules[0].string("path")?.unwrap_or(""))
    else {
        let expected = "a LogitScore that follows a Transformer whose path is \"\", and nothing else";
        return Err(last.error("type", expected).into());
    };
    if tower.head != Head::LM {
        let expected = "a LogitScore behind a model for CausalLM by config.json's architectures, whose logits are neither \
                        scaled nor capped";
        return Err(last.error("type", expected).into());
    }
    let path = last.string("path")?.unwrap_or_default();
    let config = checkpoint.json_in(path, "config.json")?;
    let config = config.ok_or_else(|| last.error("path", "a directory with a config.json"))?;
    let config = Config::new(MODULE, config)?;
    if !matches!(config.string("module_input_name")?, None | Some("causal_logits")) {
        return Err(config.error("module_input_name", "causal_logits").into());
    }
    let yes = config.required("true_token_id", 0..=tower.vocab - 1)?;
    let no = config.integer("false_token_id", 0..=tower.vocab - 1)?;
    Ok(Some([yes].into_iter().chain(no).collect()))
}

/// Most tokens of an input, if the files say so: sentence_bert_config.json's word, else the tokenizer's.
pub(super) fn longest(checkpoint: &Checkpoint) -> Result<Option<usize>, ModelError> {
    if let Some(limits) = checkpoint.json(LIMITS)?
        && let Some(longest) = Config::new(LIMITS, limits)?.integer("max_seq_length", 1..=1 << 23)?
    {
        return Ok(Some(longest));
    }
    let Some(tokenizer) = checkpoint.json(TOKENIZER)? else { return Ok(None) };
    let tokenizer = Config::new(TOKENIZER, tokenizer)?;
    match tokenizer.positive("model_max_length")? {
        Some(longest) if longest > UNLIMITED => Ok(None),
        _ => Ok(tokenizer.integer("model_max_length", 1..=1 << 23)?),
    }
}

/// How vectors of a model whose stream is `width` wide are made. Without files, sentence-transformers takes the mean.
pub(super) fn embedding(checkpoint: &Checkpoint, width: usize) -> Result<Embedding, ModelError> {
    let mut embedding = Embedding::mean(width);
    if let Some(modules) = checkpoint.json(MODULES)? {
        embedding.pools.clear();
        let modules = Config::list(MODULES, modules)?;
        for (number, module) in modules.iter().take(MAX_MODULES).enumerate() {
            add(&mut embedding, checkpoint, module, (number, width))?;
        }
        if let (true, Some(last)) = (embedding.pools.is_empty(), modules.last()) {
            return Err(last.error("type", "a Pooling module in the list").into());
        }
    }
    embedding.dimensions = embedding.widths(width).last().copied().unwrap_or(width);
    if let Some(facts) = facts(checkpoint)?
        && let Some(dimensions) = facts.integer("truncate_dim", 1..=MAX_WIDTH)?
    {
        embedding.dimensions = dimensions.min(embedding.dimensions);
    }
    Ok(embedding)
}

/// What a module of modules.json, the one of this number, does to vectors.
fn add(
    embedding: &mut Embedding,
    checkpoint: &Checkpoint,
    module: &Config,
    (number, width): (usize, usize),
) -> Result<(), ModelError> {
    let path = module.string("path")?.unwrap_or_default();
    let config = || -> Result<Config, ModelError> {
        let config = checkpoint.json_in(path, "config.json")?;
        let missing = || module.error("path", "a directory with a config.json");
        Ok(Config::new(MODULE, config.ok_or_else(missing)?)?)
    };
    let weights = || {
        let prefix = module_prefix(number);
        let expected = "a directory with a model.safetensors (a pytorch_model.bin may hold programs and is not read: load \
                        the model by sentence-transformers and save it anew)";
        let is_there = checkpoint.tensors().keys().any(|name| name.starts_with(&prefix));
        if is_there { Ok(()) } else { Err(module.error("path", expected)) }
    };
    let last = embedding.widths(width).last().copied().unwrap_or(width);
    let kind = module.string("type")?.unwrap_or_default();
    match (kind.rsplit('.').next().unwrap_or_default(), number) {
        ("Transformer", 0) if path.is_empty() => {}
        ("Transformer", 0) => {
            let expected = "the directory of modules.json itself (\"\"): give Strata the directory of the Transformer, or \
                            save the model anew by sentence-transformers";
            return Err(module.error("path", expected).into());
        }
        // They do nothing once a model is trained.
        ("Dropout", 1..) => {}
        ("Pooling", 1) => embedding.pools = pools(&config()?)?,
        ("Normalize", 2..) => {
            if let Some(config) = checkpoint.json_in(path, "config.json")? {
                of_sentences(&Config::new(MODULE, config)?)?;
            }
            embedding.refinements.push(Refinement::Normalize);
        }
        ("Dense", 2..) => {
            weights()?;
            embedding.refinements.push(dense(&config()?, last, number)?);
        }
        ("LayerNorm", 2..) => {
            weights()?;
            config()?.required("dimension", last..=last)?;
            embedding.refinements.push(Refinement::Norm { norm: Norm::Layer(NORM_EPSILON), module: number });
        }
        _ => {
            let expected = "a Transformer, then Pooling, then any of Dense, LayerNorm, Dropout and Normalize; others are not \
                            served";
            return Err(module.error("type", expected).into());
        }
    }
    Ok(())
}

fn dense(config: &Config, from: usize, module: usize) -> Result<Refinement, ModelError> {
    of_sentences(config)?;
    if config.flag("use_residual", false)? {
        return Err(config.error("use_residual", "false").into());
    }
    config.required("in_features", from..=from)?;
    let name = config.string("activation_function")?.unwrap_or("torch.nn.modules.activation.Tanh");
    let act = match name.rsplit('.').next().unwrap_or_default() {
        "Identity" => None,
        "Tanh" => Some(Act::Tanh),
        "ReLU" => Some(Act::Relu),
        "GELU" => Some(Act::Gelu),
        "SiLU" => Some(Act::Silu),
        _ => {
            let expected = "torch's Identity, Tanh, ReLU, GELU or SiLU";
            return Err(config.error("activation_function", expected).into());
        }
    };
    Ok(Refinement::Dense { width: config.required("out_features", 1..=MAX_WIDTH)?, act, module })
}

/// Checks that a module works on the vectors of sentences, not on something beside them.
fn of_sentences(config: &Config) -> Result<(), ConfigError> {
    for field in ["module_input_name", "module_output_name"] {
        if !matches!(config.string(field)?, None | Some("sentence_embedding")) {
            return Err(config.error(field, "sentence_embedding"));
        }
    }
    Ok(())
}

/// The modes of pooling, in the order in which old files' vectors lie side by side.
const POOLS: [(&str, &str, Pool); 6] = [
    ("pooling_mode_cls_token", "cls", Pool::First),
    ("pooling_mode_max_tokens", "max", Pool::Max),
    ("pooling_mode_mean_tokens", "mean", Pool::Mean),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", Pool::MeanSqrtLen),
    ("pooling_mode_weightedmean_tokens", "weightedmean", Pool::WeightedMean),
    ("pooling_mode_lasttoken", "lasttoken", Pool::Last),
];

fn pools(config: &Config) -> Result<Vec<Pool>, ConfigError> {
    let names = match config.get("pooling_mode") {
        Some(serde_json::Value::String(name)) => Some(vec![name.clone()]),
        Some(_) => config.strings("pooling_mode")?,
        None => None,
    };
    if let Some(names) = names {
        let pool = |name: &String| POOLS.iter().find(|(_, n, _)| n == name).map(|(.., pool)| *pool);
        let pools = names.iter().map(pool).collect::<Option<Vec<_>>>();
        return pools.filter(|pools| (1..=POOLS.len()).contains(&pools.len())).ok_or_else(|| {
            let known: Vec<_> = POOLS.iter().map(|(_, name, _)| *name).collect();
            config.error("pooling_mode", format!("one or several of {}", known.join(", ")))
        });
    }
    let mut pools = Vec::new();
    for (field, _, pool) in POOLS {
        if config.flag(field, false)? {
            pools.push(pool);
        }
    }
    Ok(if pools.is_empty() { vec![Pool::Mean] } else { pools })
}

/// What clients and the coordinator need to know of a model that gives out vectors of so many elements; 0 for
/// another. `judges`: it judges inputs by the logits of tokens.
pub(super) fn read(
    checkpoint: &Checkpoint,
    dimensions: usize,
    judges: bool,
) -> Result<v1::Sentences, ModelError> {
    let mut told = v1::Sentences { dimensions: dimensions as u32, ..v1::Sentences::default() };
    if let Some(limits) = checkpoint.json(LIMITS)? {
        let limits = Config::new(LIMITS, limits)?;
        told.lowercase = limits.flag("do_lower_case", false)?;
        for field in ["query_length", "document_length", "query_expansion"] {
            if limits.get(field).is_some() {
                return Err(limits.error(field, "none: models of a vector per token are not served").into());
            }
        }
        told.chat = if dimensions == 0 { chat(&limits, judges)? } else { None };
    } else if judges {
        told.chat = Some(v1::InputChat::default());
    }
    for module in
        checkpoint.json(MODULES)?.map(|m| Config::list(MODULES, m)).transpose()?.into_iter().flatten()
    {
        if module.string("type")?.is_some_and(|kind| kind.ends_with(".Pooling")) {
            let path = module.string("path")?.unwrap_or_default();
            if let Some(config) = checkpoint.json_in(path, "config.json")? {
                told.excludes_prompt = !Config::new(MODULE, config)?.flag("include_prompt", true)?;
            }
        }
    }
    let Some(facts) = facts(checkpoint)? else { return Ok(told) };
    if let Some(kind @ ("SparseEncoder" | "MultiVectorEncoder")) = facts.string("model_type")? {
        let expected = format!("SentenceTransformer or CrossEncoder: a {kind} is not served");
        return Err(facts.error("model_type", expected).into());
    }
    if let Some(prompts) = facts.object("prompts")? {
        if prompts.count() > MAX_MODULES {
            return Err(facts.error("prompts", format!("at most {MAX_MODULES} prompts")).into());
        }
        for name in prompts.names() {
            let text = prompts.string(name)?.unwrap_or_default().to_owned();
            told.prompts.push(v1::Prompt { name: name.clone(), text });
        }
    }
    // There as a rule, without a text of their own.
    for name in ["query", "document"] {
        if !told.prompts.iter().any(|prompt| prompt.name == name) {
            told.prompts.push(v1::Prompt { name: name.to_owned(), text: String::new() });
        }
    }
    if let Some(name) = facts.string("default_prompt_name")? {
        if !told.prompts.iter().any(|prompt| prompt.name == name) {
            return Err(facts.error("default_prompt_name", "the name of one of prompts").into());
        }
        told.default_prompt = name.to_owned();
    }
    told.similarity = match facts.string("similarity_fn_name")? {
        None => String::new(),
        Some(name @ ("cosine" | "dot" | "euclidean" | "manhattan")) => name.to_owned(),
        Some(_) => {
            let expected = "cosine, dot, euclidean or manhattan";
            return Err(facts.error("similarity_fn_name", expected).into());
        }
    };
    Ok(told)
}

/// How texts become chats, if they do: models that continue texts are put all inputs as chats, unless files say otherwise.
fn chat(limits: &Config, judges: bool) -> Result<Option<v1::InputChat>, ConfigError> {
    let kinds = limits.object("modality_config")?;
    let message = kinds.as_ref().map(|kinds| kinds.object("message")).transpose()?.flatten();
    if message.is_none() && (kinds.is_some() || !judges) {
        return Ok(None);
    }
    let mut chat = v1::InputChat::default();
    if let Some(message) = message {
        chat.in_parts = match message.string("format")? {
            None | Some("auto") => None,
            Some("flat") => Some(false),
            Some("structured") => Some(true),
            Some(_) => return Err(message.error("format", "flat, structured or auto")),
        };
    }
    let Some(settings) = limits.object("processing_kwargs")? else { return Ok(Some(chat)) };
    for name in settings.names().filter(|name| *name != "chat_template") {
        if settings.object(name)?.is_some_and(|kind| kind.count() > 0) {
            return Err(settings.error(name, "none: of these, chat_template alone is served"));
        }
    }
    let Some(arguments) = settings.object("chat_template")? else { return Ok(Some(chat)) };
    for name in ["padding", "truncation", "max_length", "return_tensors"] {
        if arguments.get(name).is_some() {
            return Err(arguments.error(name, "none: max_seq_length says how long inputs may be"));
        }
    }
    chat.add_generation_prompt = arguments.flag("add_generation_prompt", false)?;
    // What is left is the template's own.
    let own = |name: &&String| !["add_generation_prompt", "restore_suffix"].contains(&name.as_str());
    let own =
        arguments.names().filter(own).filter_map(|name| Some((name.clone(), arguments.get(name)?.clone())));
    chat.arguments = serde_json::Value::Object(own.collect()).to_string();
    Ok(Some(chat))
}

/// What becomes of the logit of a classifier of one class where it ranks: what a cross-encoder was saved with.
pub(super) fn ranking(checkpoint: &Checkpoint, config: &Config) -> Result<v1::Scoring, ModelError> {
    let old = config.object("sentence_transformers")?;
    let facts = facts(checkpoint)?;
    let named = [
        (facts.as_ref(), "activation_fn"),
        (old.as_ref(), "activation_fn"),
        (Some(config), "sbert_ce_default_activation_function"),
    ];
    for (from, field) in named.into_iter().filter_map(|(from, field)| Some((from?, field))) {
        // What is not torch's own is a program, in whose place sentence-transformers takes the usual.
        match from.string(field)?.filter(|name| name.starts_with("torch.")) {
            None => {}
            Some(name) if name.ends_with(".Sigmoid") => return Ok(v1::Scoring::Sigmoid),
            Some(name) if name.ends_with(".Identity") => return Ok(v1::Scoring::None),
            Some(_) => return Err(from.error(field, "torch's Sigmoid or Identity").into()),
        }
    }
    Ok(v1::Scoring::Sigmoid)
}

/// config_sentence_transformers.json.
fn facts(checkpoint: &Checkpoint) -> Result<Option<Config>, ModelError> {
    Ok(checkpoint.json(FACTS)?.map(|facts| Config::new(FACTS, facts)).transpose()?)
}
