//! The files of a tokenizer as they would lie beside a GGUF file, made of its metadata.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use strata_proto::Files;

use super::{
    super::WeightsError,
    metadata::Metadata,
    splitting,
    tokens::{SCORES, SPACE, TOKENS, Tokens, by_text, kind},
    vocabulary,
};

const TEMPLATE: &str = "tokenizer.chat_template";

/// Longest piece of SentencePiece, in bytes, of which it is asked which two others make it up.
const LONGEST_PIECE: usize = 1 << 10;

/// Control tokens that end an answer whatever the metadata say, as in llama.cpp.
const ENDS: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Tokens that end an answer.
pub(super) fn ends(metadata: &Metadata) -> Result<Vec<u32>, WeightsError> {
    let mut ends = Vec::new();
    for key in ["eos", "eot", "eom"].map(|end| format!("tokenizer.ggml.{end}_token_id")) {
        ends.extend(metadata.id(&key)?.filter(|id| !ends.contains(id)));
    }
    if let Some(tokens) = Tokens::of(metadata)? {
        for (id, text) in tokens.of_kind(kind::CONTROL) {
            let id = id as u32;
            if ENDS.contains(&text.as_str()) && !ends.contains(&id) {
                ends.push(id);
            }
        }
    }
    Ok(ends)
}

/// tokenizer.json, tokenizer_config.json and the chat templates.
///
/// # Errors
/// If there are no tokens, or they are of a kind that is not read.
pub(super) fn files(metadata: &Metadata) -> Result<Files, WeightsError> {
    const MODEL: &str = "tokenizer.ggml.model";
    let tokens = Tokens::of(metadata)?.ok_or_else(|| metadata.wrong(TOKENS, "expected a list of tokens"))?;
    let is_word_piece = metadata.text(MODEL)? == Some("bert");
    let plain = if is_word_piece { vocabulary::without_marks(&tokens) } else { Vec::new() };
    let tokens = Tokens { texts: if is_word_piece { &plain } else { tokens.texts }, ..tokens };
    let (mut json, adds_bos) = match metadata.text(MODEL)? {
        Some("gpt2") => byte_level(metadata, &tokens)?,
        Some("llama") => (sentence_piece(metadata, &tokens)?, true),
        Some("t5") => (vocabulary::unigram(metadata, &tokens)?, false),
        Some("bert") => (vocabulary::word_piece(metadata, &tokens)?, true),
        _ => {
            let expected = "expected gpt2, llama, t5 or bert: tokenizers of other kinds are not read";
            return Err(metadata.wrong(MODEL, expected));
        }
    };
    let added = |special: bool, kind: i64| {
        let token = move |(id, text): (usize, &String)| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": special,
            })
        };
        tokens.of_kind(kind).map(token)
    };
    let mut all: Vec<Value> = added(true, kind::CONTROL).chain(added(true, kind::UNKNOWN)).collect();
    all.extend(added(false, kind::USER_DEFINED));
    all.sort_by_key(|token| token["id"].as_u64());
    json.insert("added_tokens".into(), all.into());
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    for (role, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
        ("cls_token", "tokenizer.ggml.cls_token_id"),
        // As ggml spells it.
        ("sep_token", "tokenizer.ggml.seperator_token_id"),
        ("mask_token", "tokenizer.ggml.mask_token_id"),
    ] {
        if let Some(text) = tokens.named(metadata, key)? {
            config.insert(role.into(), text.as_str().into());
        }
    }
    let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let encodes = metadata.own_flag("attention.causal")? == Some(false);
    let add_eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(encodes);
    let twice = metadata.flag("tokenizer.ggml.add_sep_token")?.unwrap_or(false);
    let around = |adds: bool, role: &str| {
        let text = adds.then(|| config.get(role).and_then(Value::as_str)).flatten()?;
        let id = tokens.texts.iter().position(|t| t == text)?;
        Some((text, id))
    };
    let first = |roles: [&'static str; 2], adds| roles.into_iter().find_map(|role| around(adds, role));
    let framed = match encodes {
        true => {
            let (begin, end) =
                (first(["cls_token", "bos_token"], add_bos), first(["sep_token", "eos_token"], add_eos));
            encoder_template(begin, end, twice, is_word_piece)
        }
        false => template(around(add_bos, "bos_token"), around(add_eos, "eos_token")),
    };
    json.insert("post_processor".into(), framed);
    let mut files = chat_templates(metadata)?;
    files.insert("tokenizer.json".into(), Value::Object(json).to_string().into_bytes());
    files.insert("tokenizer_config.json".into(), Value::Object(config).to_string().into_bytes());
    Ok(files)
}

/// What is put around a text.
fn template(bos: Option<(&str, usize)>, eos: Option<(&str, usize)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |(text, _): (&str, usize)| json!({"SpecialToken": {"id": text, "type_id": 0}});
    let part = |id: &str, kind: u8| {
        let text = json!({"Sequence": {"id": id, "type_id": kind}});
        bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = bos
        .into_iter()
        .chain(eos)
        .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [part("A", 0), part("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    })
}

/// What is put around the texts of an encoder: between two, an end, or two of them; those of BERT are told apart.
fn encoder_template(
    begin: Option<(&str, usize)>,
    end: Option<(&str, usize)>,
    twice: bool,
    apart: bool,
) -> Value {
    let special = |(text, _): (&str, usize), kind: u8| json!({"SpecialToken": {"id": text, "type_id": kind}});
    let text = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    let end_of = |kind: u8| end.map(|end| special(end, kind)).into_iter();
    let second = u8::from(apart);
    let single: Vec<_> =
        begin.map(|begin| special(begin, 0)).into_iter().chain([text("A", 0)]).chain(end_of(0)).collect();
    let between = end_of(0).filter(|_| twice);
    let pair: Vec<_> =
        single.iter().cloned().chain(between).chain([text("B", second)]).chain(end_of(second)).collect();
    let tokens: Map<String, Value> = begin
        .into_iter()
        .chain(end)
        .map(|(text, id)| (text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

fn chat_templates(metadata: &Metadata) -> Result<Files, WeightsError> {
    let mut files = Files::new();
    if let Some(template) = metadata.text(TEMPLATE)? {
        files.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
    }
    for key in metadata.entries.keys() {
        let name = key.strip_prefix(TEMPLATE).and_then(|rest| rest.strip_prefix('.'));
        // A name that is no word would be a path.
        let is_word = |name: &&str| name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        let Some(name) = name.filter(is_word) else { continue };
        let text = metadata.text(key)?.unwrap_or_default();
        files.insert(format!("additional_chat_templates/{name}.jinja"), text.as_bytes().to_vec());
    }
    Ok(files)
}

/// Byte-level BPE, and whether a text begins with a BOS where the file does not say it.
fn byte_level(metadata: &Metadata, tokens: &Tokens<'_>) -> Result<(Map<String, Value>, bool), WeightsError> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let merges =
        metadata.texts(MERGES)?.ok_or_else(|| metadata.wrong(MERGES, "expected a list of merges"))?;
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let pair = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty());
        let (a, b) =
            pair.ok_or_else(|| metadata.wrong(MERGES, "expected two tokens with a space between"))?;
        pairs.push(json!([a, b]));
    }
    let way = splitting::of(metadata)?;
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let mut steps = way.steps();
    steps.push(byte_level(way.plain));
    let mut json = Map::new();
    json.insert("version".into(), "1.0".into());
    json.insert("normalizer".into(), if way.composes { json!({"type": "NFC"}) } else { Value::Null });
    json.insert("pre_tokenizer".into(), json!({"type": "Sequence", "pretokenizers": steps}));
    json.insert("decoder".into(), byte_level(true));
    json.insert(
        "model".into(),
        json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": way.whole_words,
            "vocab": by_text(tokens.texts), "merges": pairs,
        }),
    );
    Ok((json, way.begins))
}

/// SentencePiece's BPE: pieces are merged by their scores, and what no piece has becomes bytes.
fn sentence_piece(metadata: &Metadata, tokens: &Tokens<'_>) -> Result<Map<String, Value>, WeightsError> {
    let scores = metadata.numbers(SCORES)?.filter(|scores| scores.len() == tokens.texts.len());
    let expected =
        || metadata.wrong(SCORES, &format!("expected one for each of {} tokens", tokens.texts.len()));
    let merges = merges(tokens, scores.ok_or_else(expected)?);
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = match prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}),
        false => spaces,
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = tokens.of_kind(kind::UNKNOWN).next().map(|(_, text)| text);
    let mut json = Map::new();
    json.insert("version".into(), "1.0".into());
    json.insert("normalizer".into(), normalizer);
    json.insert("pre_tokenizer".into(), Value::Null);
    json.insert("decoder".into(), json!({"type": "Sequence", "decoders": decoders}));
    json.insert(
        "model".into(),
        json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": by_text(tokens.texts), "merges": merges,
        }),
    );
    Ok(json)
}

/// Every two pieces that make up a third, in the order in which they are merged: by its score, as transformers makes a list of
/// merges of a SentencePiece model (`convert_slow_tokenizer.py`).
fn merges(tokens: &Tokens<'_>, scores: &[f32]) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> =
        tokens.texts.iter().enumerate().rev().map(|(id, text)| (text.as_str(), id)).collect();
    let mut found: Vec<(f32, [&str; 2])> = Vec::new();
    for (text, score) in tokens.texts.iter().zip(scores).filter(|(text, _)| text.len() <= LONGEST_PIECE) {
        let pairs = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let known = |(a, b)| Some(([*ids.get(a)?, *ids.get(b)?], [a, b]));
        let mut pairs: Vec<_> = pairs.filter_map(known).collect();
        pairs.sort_by_key(|(ids, _)| *ids);
        // Adding 0 makes 0 of -0, which is the same score.
        found.extend(pairs.into_iter().map(|(_, pair)| (*score + 0.0, pair)));
    }
    // Of equal scores, the longer first.
    let length = |pair: &[&str; 2]| pair.map(|piece| piece.chars().count());
    found
        .sort_by(|(a, pair_a), (b, pair_b)| b.total_cmp(a).then_with(|| length(pair_b).cmp(&length(pair_a))));
    found.into_iter().map(|(_, pair)| pair.map(str::to_owned)).collect()
}
