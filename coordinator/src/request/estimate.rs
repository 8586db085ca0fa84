//! Texts that have too many tokens, found out by less than tokenizing all of them.

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

/// Bytes of text for each token that is allowed: where a text has more, a part of it is looked at first.
const BYTES_PER_TOKEN: usize = 8;
/// Shortest part that is looked at, in bytes.
const LEAST_PART: usize = 1 << 10;

/// The longest token of a tokenizer, in bytes of the text that it stands for; `None` where a part of a text may stand in
/// no token, or in a token of any length.
pub(super) fn longest_token(tokenizer: &Tokenizer) -> Option<usize> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    let json = |part: Result<Value, serde_json::Error>| part.ok();
    // Bytes that a byte of the text is, at least: composing characters makes up to three bytes one.
    let composed = match json(serde_json::to_value(tokenizer.get_normalizer()))? {
        Value::Null => 1,
        normalizer => shrinks_by(&normalizer)?,
    };
    let splits = json(serde_json::to_value(tokenizer.get_pre_tokenizer()))?;
    if !splits.is_null() && !keeps_all(&splits) {
        return None;
    }
    let vocab = tokenizer.get_vocab(false);
    let of_bytes = has_type(&splits, "ByteLevel");
    let has_all_bytes = match of_bytes {
        true => tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
            .iter()
            .all(|c| vocab.contains_key(c.encode_utf8(&mut [0; 4]) as &str)),
        false => model.byte_fallback && (0..=255).all(|b| vocab.contains_key(&format!("<0x{b:02X}>"))),
    };
    if !has_all_bytes {
        // What is in no token is skipped, or many of it are one.
        return None;
    }
    let added = tokenizer.get_added_tokens_decoder();
    if added.values().any(|token| token.lstrip || token.rstrip) {
        // They take any number of spaces.
        return None;
    }
    let of_model = vocab.keys().map(|token| if of_bytes { token.chars().count() } else { token.len() });
    let longest = of_model.chain(added.values().map(|token| token.content.len())).max()?;
    Some(longest * composed)
}

/// How many times shorter a text may become by a normalizer; `None` if there is no telling.
fn shrinks_by(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str()? {
        "NFC" => Some(3),
        "Prepend" => Some(1),
        "Replace" => {
            let pattern = normalizer["pattern"]["String"].as_str()?;
            (pattern.len() <= normalizer["content"].as_str()?.len()).then_some(1)
        }
        "Sequence" => normalizer["normalizers"].as_array()?.iter().map(shrinks_by).product(),
        _ => None,
    }
}

/// Whether every byte of a text is in one of the pieces that a pre-tokenizer makes of it.
fn keeps_all(pre_tokenizer: &Value) -> bool {
    match pre_tokenizer["type"].as_str() {
        Some("ByteLevel" | "Digits" | "Metaspace") => true,
        Some("Split" | "Punctuation") => pre_tokenizer["behavior"] != "Removed",
        Some("Sequence") => {
            pre_tokenizer["pretokenizers"].as_array().is_some_and(|all| all.iter().all(keeps_all))
        }
        _ => false,
    }
}

fn has_type(pre_tokenizer: &Value, name: &str) -> bool {
    let all = pre_tokenizer["pretokenizers"].as_array();
    pre_tokenizer["type"] == name || all.is_some_and(|all| all.iter().any(|one| has_type(one, name)))
}

/// Where the first part of a text ends whose tokens are the text's own, whatever comes behind it: before a space, at most
/// `at` bytes from its beginning. `None` if there is no such place.
pub(super) fn part(text: &str, at: usize) -> Option<&str> {
    let text = &text[..text.floor_char_boundary(at)];
    let mut spaces = text.rmatch_indices(' ').map(|(at, _)| &text[..at]);
    spaces.find(|part| part.chars().next_back().is_some_and(|c| !c.is_whitespace()))
}

/// Tokens that a text has at least, if these are more than `most`. `longest` is that of [`longest_token`], and `count`
/// counts the tokens of a part.
pub(super) fn more_than<E>(
    text: &str,
    most: usize,
    longest: Option<usize>,
    count: impl Fn(&str) -> Result<usize, E>,
) -> Result<Option<usize>, E> {
    let least = longest.map_or(0, |longest| text.len().div_ceil(longest.max(1)));
    if least > most {
        return Ok(Some(least));
    }
    let mut bytes = most.saturating_mul(BYTES_PER_TOKEN).max(LEAST_PART);
    while bytes < text.len() / 2 {
        if let Some(part) = part(text, bytes) {
            let tokens = count(part)?;
            if tokens > most {
                return Ok(Some(tokens));
            }
        }
        bytes = bytes.saturating_mul(4);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What texts of these tests are made of.
    const PIECES: [&str; 10] = [
        "a",
        " ",
        "  \n",
        "word ",
        " it's",
        "e\u{301}",
        "\u{1f469}\u{200d}\u{1f680}",
        "日本語",
        "\u{0}",
        "123.",
    ];

    /// Every kind of tokenizer, by name.
    fn all() -> Vec<(String, Tokenizer)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tokenizers.json");
        let cases: serde_json::Map<String, Value> =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let read = |entry: &Value| {
            let mut tokenizer = Tokenizer::from_bytes(entry["tokenizer"].to_string()).unwrap();
            tokenizer.with_truncation(None).unwrap().set_encode_special_tokens(true);
            tokenizer
        };
        cases.into_iter().map(|(kind, entry)| (kind, read(&entry))).collect()
    }

    fn tokens(tokenizer: &Tokenizer, text: &str) -> usize {
        tokenizer.encode_fast(text, false).unwrap().len()
    }

    #[test]
    fn of_a_text_that_is_far_too_long_little_is_read() {
        for (kind, tokenizer) in all() {
            // Blanks alone have no place that is safe to cut at.
            for piece in PIECES.into_iter().filter(|piece| !piece.trim().is_empty()) {
                let text = format!("{piece} ").repeat((1 << 20) / (piece.len() + 1));
                let read = std::cell::Cell::new(0);
                let count = |part: &str| {
                    read.set(read.get() + part.len());
                    Ok::<_, ()>(tokens(&tokenizer, part))
                };
                let Some(least) = more_than(&text, 256, longest_token(&tokenizer), count).unwrap() else {
                    // What a normalizer takes away is no token.
                    assert!(tokens(&tokenizer, &text) <= 256, "{kind}: {piece:?}");
                    continue;
                };
                assert!(least > 256 && read.get() <= 64 << 10, "{kind}: {piece:?}: {} bytes", read.get());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn no_text_is_refused_that_has_no_more_tokens_than_it_may(
            pieces in prop::collection::vec((0..PIECES.len(), 1usize..300), 1..40),
        ) {
            let text: String = pieces.iter().map(|(piece, times)| PIECES[*piece].repeat(*times)).collect();
            for (kind, tokenizer) in all() {
                let whole = tokens(&tokenizer, &text);
                let count = |part: &str| Ok::<_, ()>(tokens(&tokenizer, part));
                let least = more_than(&text, whole, longest_token(&tokenizer), count).unwrap();
                prop_assert_eq!(least, None, "{}: {} tokens, {} bytes", kind, whole, text.len());
            }
        }
    }
}
