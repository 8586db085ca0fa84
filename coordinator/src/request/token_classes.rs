//! Tokenizer classes of transformers that bring tokens and settings of their own: what their constructors assume where a file is
//! silent (`tokenization_*.py` of version 5.24).

use serde_json::{Map, Value};
use strata_proto::Files;

/// A class.
#[derive(Debug, PartialEq)]
pub(super) struct Class {
    /// Its name, less `Fast`.
    name: &'static str,
    /// The tokens that it names.
    pub tokens: &'static [(&'static str, &'static str)],
    /// It sets the switches of a BERT normalizer.
    pub is_bert: bool,
    /// It sets `add_prefix_space` of a byte-level pre-tokenizer.
    pub is_byte_level: bool,
    /// What it puts around texts.
    pub frame: Option<Frame>,
    /// It tells the model which of two texts a token is of (`token_type_ids` among its `model_input_names`).
    pub tells_segments: bool,
}

/// What stands around texts where tokenizer.json says nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// `cls A sep B sep`, the second text another segment.
    Bert,
    /// `cls A sep sep B sep`, all one segment.
    Roberta,
}

const PLAIN: Class =
    Class { name: "", tokens: &[], is_bert: false, is_byte_level: false, frame: None, tells_segments: false };

const ROBERTA_TOKENS: &[(&str, &str)] = &[
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("sep_token", "</s>"),
    ("cls_token", "<s>"),
    ("unk_token", "<unk>"),
    ("pad_token", "<pad>"),
    ("mask_token", "<mask>"),
];

const END_OF_TEXT: &[(&str, &str)] =
    &[("unk_token", "<|endoftext|>"), ("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>")];

const CLASSES: &[Class] = &[
    Class {
        name: "BertTokenizer",
        tokens: &[
            ("unk_token", "[UNK]"),
            ("sep_token", "[SEP]"),
            ("pad_token", "[PAD]"),
            ("cls_token", "[CLS]"),
            ("mask_token", "[MASK]"),
        ],
        is_bert: true,
        frame: Some(Frame::Bert),
        tells_segments: true,
        ..PLAIN
    },
    Class { name: "CamembertTokenizer", tokens: ROBERTA_TOKENS, frame: Some(Frame::Roberta), ..PLAIN },
    Class {
        name: "CohereTokenizer",
        tokens: &[
            ("unk_token", "<UNK>"),
            ("bos_token", "<BOS_TOKEN>"),
            ("eos_token", "<|END_OF_TURN_TOKEN|>"),
            ("pad_token", "<PAD>"),
            ("cls_token", "<CLS>"),
            ("sep_token", "<SEP>"),
            ("mask_token", "<MASK_TOKEN>"),
        ],
        is_byte_level: true,
        ..PLAIN
    },
    Class {
        name: "DebertaV2Tokenizer",
        tokens: &[
            ("bos_token", "[CLS]"),
            ("eos_token", "[SEP]"),
            ("unk_token", "[UNK]"),
            ("sep_token", "[SEP]"),
            ("pad_token", "[PAD]"),
            ("cls_token", "[CLS]"),
            ("mask_token", "[MASK]"),
        ],
        frame: Some(Frame::Bert),
        tells_segments: true,
        ..PLAIN
    },
    Class { name: "GPT2Tokenizer", tokens: END_OF_TEXT, is_byte_level: true, ..PLAIN },
    Class {
        name: "GPTNeoXTokenizer",
        tokens: &[
            ("unk_token", "<|endoftext|>"),
            ("bos_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|padding|>"),
        ],
        is_byte_level: true,
        ..PLAIN
    },
    Class {
        name: "GemmaTokenizer",
        tokens: &[
            ("unk_token", "<unk>"),
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        ..PLAIN
    },
    Class {
        name: "LlamaTokenizer",
        tokens: &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
        ..PLAIN
    },
    Class {
        name: "MPNetTokenizer",
        tokens: &[
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("sep_token", "</s>"),
            ("cls_token", "<s>"),
            ("unk_token", "[UNK]"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        is_bert: true,
        frame: Some(Frame::Roberta),
        ..PLAIN
    },
    Class {
        name: "Qwen2Tokenizer",
        tokens: &[
            ("unk_token", "<|endoftext|>"),
            ("eos_token", "<|endoftext|>"),
            ("pad_token", "<|endoftext|>"),
        ],
        is_byte_level: true,
        ..PLAIN
    },
    Class {
        name: "RobertaTokenizer",
        tokens: ROBERTA_TOKENS,
        is_byte_level: true,
        frame: Some(Frame::Roberta),
        ..PLAIN
    },
    Class { name: "XLMRobertaTokenizer", tokens: ROBERTA_TOKENS, frame: Some(Frame::Roberta), ..PLAIN },
];

/// The class that is registered for a family. Some families have none: there any class may be named.
fn registered(model_type: &str) -> Option<&'static str> {
    Some(match model_type {
        "bert" | "distilbert" | "electra" | "nomic_bert" => "BertTokenizer",
        "camembert" => "CamembertTokenizer",
        "cohere" | "cohere2" => "CohereTokenizer",
        "deberta-v2" => "DebertaV2Tokenizer",
        "gemma2" | "gemma3" | "gemma3_text" => "GemmaTokenizer",
        "gpt2" | "phi" | "starcoder2" => "GPT2Tokenizer",
        "gpt_neox" | "mpt" | "olmo" | "olmoe" => "GPTNeoXTokenizer",
        "mpnet" => "MPNetTokenizer",
        "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe" | "qwen2_5_vl" | "qwen3_vl" => "Qwen2Tokenizer",
        "roberta" => "RobertaTokenizer",
        "xlm-roberta" | "jina_embeddings_v3" => "XLMRobertaTokenizer",
        "glm" | "glm4" | "glm4_moe" | "granite" | "granitemoe" | "ministral" | "ministral3" | "mistral"
        | "mistral3" | "mixtral" | "modernbert" | "nemotron" | "olmo2" | "olmo3" | "phi3" | "stablelm" => {
            BACKEND
        }
        _ => return None,
    })
}

/// The class without a constructor of its own: tokenizer.json is all there is.
const BACKEND: &str = "TokenizersBackend";

/// Families whose published files name a class that is not theirs.
const MISNAMED: &[&str] = &["llava", "modernbert", "nemotron", "phi3", "qwen2", "smolvlm"];

/// The class that transformers makes of a model's files, if it is one that matters.
pub(super) fn of(
    config: &Map<String, Value>,
    model: &Map<String, Value>,
    files: &Files,
) -> Option<&'static Class> {
    let text =
        |object: &Map<String, Value>, field| object.get(field).and_then(Value::as_str).map(str::to_owned);
    let named = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
    let named = named.map(|name| match name.strip_suffix("Fast").unwrap_or(&name) {
        // Another name of the same class.
        "ElectraTokenizer" => "BertTokenizer".to_owned(),
        name => name.to_owned(),
    });
    let family = text(model, "model_type").unwrap_or_default();
    let name = match (registered(&family), named) {
        (Some(registered), None) => registered.to_owned(),
        (Some(registered), Some(named)) if registered == named => named,
        (Some(registered), Some(_)) if registered == BACKEND || MISNAMED.contains(&family.as_str()) => {
            registered.to_owned()
        }
        (_, named) => named?,
    };
    // Llama's is for SentencePiece; files of byte-level tokenizers name it as well.
    if name == "LlamaTokenizer" && is_byte_level(files) {
        return None;
    }
    CLASSES.iter().find(|class| class.name == name)
}

/// Whether the tokenizer splits texts into bytes.
fn is_byte_level(files: &Files) -> bool {
    let needle = b"\"ByteLevel\"";
    files.get("tokenizer.json").is_some_and(|json| json.windows(needle.len()).any(|bytes| bytes == needle))
}
