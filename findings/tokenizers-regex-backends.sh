#!/usr/bin/env bash
# The crate tokenizers has two engines for the patterns of a tokenizer.json: `onig`, which Python's wheel is built with, and
# `fancy-regex`, for builds without C. They do not split alike, and nothing is reported:
# - fancy-regex gives up behind a million steps back, which the crate takes for the end of the matches: what follows is one piece.
#   Llama 3's and GPT-2's patterns get there with a run of white space of that length.
# - `[[:punct:]]`, `[[:alpha:]]` and `[[:space:]]` are Unicode in onig, and ASCII in fancy-regex.
# - `^` and `$` are ends of lines in onig, and of the whole text in fancy-regex.
# - `\w` has U+00B2 and U+00BD in onig, and U+200D in fancy-regex.
# For all code points the patterns of GPT-2, Llama 3, GPT-4o, DeepSeek V3, BLOOM and Kimi K2 split alike; what differs is these.
#
# Guess before it was run: the same pieces, or an error where a pattern is not supported.
# Seen: tokenizers 0.23.2, built once with each feature, as said.
#
# Needs a Rust toolchain, a C compiler and the crates' registry. Fails if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat >"$folder/Cargo.toml" <<'TOML'
[package]
name = "split"
version = "0.0.0"
edition = "2021"
[features]
onig = ["tokenizers/onig"]
fancy-regex = ["tokenizers/fancy-regex"]
[dependencies]
tokenizers = { version = "=0.23.2", default-features = false }
[workspace]
TOML
cat >"$folder/src/main.rs" <<'RUST'
use tokenizers::{
    pre_tokenizers::split::{Split, SplitPattern},
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
};

const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|",
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
);

fn main() {
    let long = |spaces| format!("a{}b c d", " ".repeat(spaces));
    let cases = [
        ("Llama 3, 900,000 spaces", LLAMA_3, long(900_000)),
        ("Llama 3, 1,100,000 spaces", LLAMA_3, long(1_100_000)),
        ("[[:punct:]]", "[[:punct:]]", "a\u{3001}b".into()),
        ("[[:alpha:]]+", "[[:alpha:]]+", "1\u{e9}2".into()),
        ("[[:space:]]", "[[:space:]]", "a\u{3000}b".into()),
        ("^b", "^b", "a\nb".into()),
        (r"\w+", r"\w+", "a\u{b2}".into()),
    ];
    for (name, pattern, text) in cases {
        let pattern = SplitPattern::Regex(pattern.into());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
        let mut pieces = PreTokenizedString::from(text.as_str());
        split.pre_tokenize(&mut pieces).unwrap();
        println!("{name}: {}", pieces.get_splits(OffsetReferential::Original, OffsetType::Byte).len());
    }
}
RUST
for engine in onig fancy-regex; do
    CARGO_TARGET_DIR="$folder/target" cargo run --quiet --release --manifest-path "$folder/Cargo.toml" --features "$engine" \
        >"$folder/$engine"
done
echo "tokenizers 0.23.2: pieces by onig, by fancy-regex"
paste -d' ' "$folder/onig" <(sed 's/.*: //' "$folder/fancy-regex") | tee "$folder/both"
diff "$folder/both" - <<'SEEN'
Llama 3, 900,000 spaces: 5 5
Llama 3, 1,100,000 spaces: 5 2
[[:punct:]]: 3 1
[[:alpha:]]+: 3 1
[[:space:]]: 3 1
^b: 2 1
\w+: 1 2
SEEN
