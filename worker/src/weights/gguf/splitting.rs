//! How byte-level BPE cuts a text into words before it merges, by the names that GGUF files have for it.
//!
//! llama.cpp knows the pre-tokenizer of a model by a name; the expressions are those of the models' own tokenizer.json.

use serde_json::{Value, json};

use super::{super::WeightsError, metadata::Metadata};

/// A way to cut a text.
pub(super) struct Way {
    /// What it is cut by, one after the other.
    cuts: &'static [Cut],
    /// Whether the last step is GPT-2's own expression.
    pub plain: bool,
    /// Whether a word that is a token stays whole.
    pub whole_words: bool,
    /// Whether a text begins with a BOS where nothing is said.
    pub begins: bool,
    /// Whether characters are composed first (NFC).
    pub composes: bool,
}

enum Cut {
    /// Around what an expression finds.
    Regex(&'static str),
    /// Around every digit.
    Digits,
}

const fn plain(cuts: &'static [Cut]) -> Way {
    Way { cuts, plain: true, whole_words: false, begins: false, composes: false }
}

const fn own(cuts: &'static [Cut]) -> Way {
    Way { plain: false, ..plain(cuts) }
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_3: &[Cut] = &[
    Cut::Regex(r"\p{N}{1,3}"),
    Cut::Regex("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
    Cut::Regex(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
    ),
];

/// Every way, by its names.
const WAYS: &[(&[&str], Way)] = &[
    (
        &["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"],
        Way { whole_words: true, begins: true, ..own(&[Cut::Regex(LLAMA_3)]) },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], own(&[Cut::Regex(LLAMA_3)])),
    (&["qwen2", "deepseek-r1-qwen", "megrez"], Way { composes: true, ..own(&[Cut::Regex(QWEN_2)]) }),
    (&["stablelm2", "hunyuan", "seed-coder"], own(&[Cut::Regex(QWEN_2)])),
    (&["gpt-2", "phi-2", "olmo", "mpt", "jais", "gpt-neox"], plain(&[])),
    (
        &["starcoder", "refact", "smollm", "codeshell", "exaone", "exaone4", "minerva-7b"],
        plain(&[Cut::Digits]),
    ),
    (&["command-r"], Way { composes: true, ..plain(&[Cut::Digits]) }),
    (&["tekken"], Way { whole_words: true, begins: true, ..own(&[Cut::Regex(TEKKEN)]) }),
    (&["gpt-4o", "llama4", "kanana2"], own(&[Cut::Regex(GPT_4O)])),
    (&["deepseek-v3", "hunyuan-dense"], own(DEEPSEEK_3)),
    (&["falcon"], plain(&[Cut::Regex(r"[\p{P}\$\+<=>\^~\|`]+"), Cut::Regex("[0-9][0-9][0-9]")])),
];

impl Way {
    /// The steps of a pre-tokenizer before bytes become characters.
    pub fn steps(&self) -> Vec<Value> {
        let step = |cut: &Cut| match cut {
            Cut::Regex(regex) => {
                json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
            }
            Cut::Digits => json!({"type": "Digits", "individual_digits": true}),
        };
        self.cuts.iter().map(step).collect()
    }
}

/// How the texts of a model are cut.
///
/// # Errors
/// If the file does not say it by a name that is known.
pub(super) fn of(metadata: &Metadata) -> Result<&'static Way, WeightsError> {
    const PRE: &str = "tokenizer.ggml.pre";
    let name = metadata.text(PRE)?;
    let way = WAYS.iter().find(|(names, _)| name.is_some_and(|name| names.contains(&name)));
    way.map(|(_, way)| way).ok_or_else(|| {
        let names: Vec<_> = WAYS.iter().flat_map(|(names, _)| *names).copied().collect();
        let found = name.map_or("it is absent".to_owned(), |name| format!("{name} is not known"));
        metadata.wrong(PRE, &format!("{found}: expected one of {}", names.join(", ")))
    })
}
