//! Tokenizers that are a vocabulary and no merges: Unigram, which GGUF files call t5, and WordPiece, which they call bert.

use serde_json::{Map, Value, json};

use super::{
    super::WeightsError,
    metadata::Metadata,
    tokens::{SCORES, SPACE, Tokens, by_text, kind},
};

/// Unigram of SentencePiece: of all ways to cut a text, the one whose pieces have the largest sum of scores.
///
/// # Errors
/// If scores or a token for what no piece has are missing.
pub(super) fn unigram(metadata: &Metadata, tokens: &Tokens<'_>) -> Result<Map<String, Value>, WeightsError> {
    const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
    let count = tokens.texts.len();
    let scores = metadata.numbers(SCORES)?.filter(|scores| scores.len() == count);
    let scores =
        scores.ok_or_else(|| metadata.wrong(SCORES, &format!("expected one for each of {count} tokens")))?;
    let unknown = match metadata.id(UNKNOWN)? {
        Some(id) => Some(id as usize),
        None => tokens.of_kind(kind::UNKNOWN).next().map(|(id, _)| id),
    };
    let unknown = unknown.filter(|id| *id < count);
    let unknown = unknown.ok_or_else(|| metadata.wrong(UNKNOWN, &format!("expected an id below {count}")))?;
    // Pieces that are not used are read as none.
    let score = |(id, score): (usize, &f32)| match tokens.kinds.get(id) {
        Some(&kind::UNUSED) => f64::from(*score).min(LEAST),
        _ => f64::from(*score),
    };
    let pieces: Vec<Value> = scores
        .iter()
        .enumerate()
        .map(score)
        .zip(tokens.texts)
        .map(|(score, text)| json!([text, score]))
        .collect();
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let scheme = if prefix { "always" } else { "never" };
    let spaces = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": true});
    let mut json = Map::new();
    json.insert("version".into(), "1.0".into());
    json.insert("normalizer".into(), normalizer(metadata)?);
    json.insert("pre_tokenizer".into(), spaces.clone());
    json.insert("decoder".into(), spaces);
    json.insert(
        "model".into(),
        json!({"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": false}),
    );
    Ok(json)
}

/// A score at which no piece is chosen.
const LEAST: f64 = -1e4;

/// What is done to a text before: characters by SentencePiece's table, and spaces beside each other made one.
fn normalizer(metadata: &Metadata) -> Result<Value, WeightsError> {
    const TABLE: &str = "tokenizer.ggml.precompiled_charsmap";
    let mut steps = Vec::new();
    if let Some(table) = metadata.integers(TABLE)?.filter(|table| !table.is_empty()) {
        let bytes: Option<Vec<u8>> = table.iter().map(|byte| u8::try_from(*byte).ok()).collect();
        let bytes = bytes.ok_or_else(|| metadata.wrong(TABLE, "expected bytes"))?;
        // How long the first part is, stands before it; what it has to do with the rest, only the table knows.
        let first = bytes.first_chunk().map(|size| u32::from_le_bytes(*size) as usize);
        if first.is_none_or(|first| first > bytes.len() - 4 || !first.is_multiple_of(4)) {
            return Err(metadata.wrong(TABLE, "expected a table as SentencePiece has it"));
        }
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&bytes)}));
    }
    if metadata.flag("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false) {
        steps.push(json!({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""}));
        steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    Ok(if steps.is_empty() { Value::Null } else { json!({"type": "Sequence", "normalizers": steps}) })
}

/// Base64 (RFC 4648), with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |word, i| word << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        let digits = (0..4).map(|i| char::from(DIGITS[(word >> (18 - 6 * i) & 63) as usize]));
        out.extend(digits.take(three.len() + 1));
        out.extend(std::iter::repeat_n('=', 3 - three.len()));
    }
    out
}

/// WordPiece: of a word, again and again the longest beginning that is a token.
///
/// # Errors
/// If there is no token for what no other has.
pub(super) fn word_piece(
    metadata: &Metadata,
    tokens: &Tokens<'_>,
) -> Result<Map<String, Value>, WeightsError> {
    const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
    let unknown = metadata.id(UNKNOWN)?.and_then(|id| tokens.texts.get(id as usize));
    let unknown = unknown
        .ok_or_else(|| metadata.wrong(UNKNOWN, &format!("expected an id below {}", tokens.texts.len())))?;
    let lowercase = metadata.flag("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
    let strips = metadata.flag("tokenizer.ggml.normalizer.strip_accents")?;
    let mut json = Map::new();
    json.insert("version".into(), "1.0".into());
    json.insert(
        "normalizer".into(),
        json!({
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": strips,
            "lowercase": lowercase,
        }),
    );
    json.insert("pre_tokenizer".into(), json!({"type": "BertPreTokenizer"}));
    json.insert("decoder".into(), json!({"type": "WordPiece", "prefix": "##", "cleanup": true}));
    json.insert(
        "model".into(),
        json!({
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": by_text(tokens.texts),
        }),
    );
    Ok(json)
}

/// The tokens of a WordPiece vocabulary as BERT's own files have them. In GGUF files, those that begin a word have a mark, and
/// others have lost theirs.
pub(super) fn without_marks(tokens: &Tokens<'_>) -> Vec<String> {
    let one = |(id, text): (usize, &String)| match (tokens.kinds.get(id), text.strip_prefix(SPACE)) {
        (Some(&(kind::CONTROL | kind::UNKNOWN | kind::UNUSED)), None) => text.clone(),
        (_, Some(begins)) => begins.to_owned(),
        (_, None) => format!("##{text}"),
    };
    tokens.texts.iter().enumerate().map(one).collect()
}
