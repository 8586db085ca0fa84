//! How texts are read: what users write never becomes a control token, whatever the tokenizer.

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::{AddedToken, OffsetReferential, OffsetType};

use super::error::TokenizerError;

/// A tokenizer to whom every control token has a name that nobody can guess: 60 random bits, between characters for private
/// use. A control token comes only of its name, so a text has those that were put in by [`Reader::name`].
///
/// Each keeps its id and its flags, so that all else is read as by the tokenizer that it was made of.
#[derive(Debug)]
pub(super) struct Reader {
    tokenizer: tokenizers::Tokenizer,
    /// Finds added tokens as the tokenizer does: the leftmost, of these the longest.
    finder: AhoCorasick,
    /// What it finds.
    tokens: Vec<Token>,
    /// Finds control tokens, even those that overlap.
    control: AhoCorasick,
    /// Some of them are looked for in what the normalizer makes of a text.
    normalized: bool,
}

/// An added token.
#[derive(Debug)]
struct Token {
    text: String,
    /// Of a control token.
    name: Option<String>,
    /// It counts only if no letter, digit or underscore touches it.
    single_word: bool,
}

impl Reader {
    /// Reads texts as `tokenizer` does, which neither cuts nor pads them.
    ///
    /// # Errors
    /// If the tokenizer cannot be made anew.
    pub fn new(tokenizer: &tokenizers::Tokenizer) -> Result<Self, TokenizerError> {
        let secret = uuid::Uuid::new_v4().as_u64_pair().0;
        let mut added: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let normalized = added.iter().any(|(_, token)| token.special && token.normalized);
        let token = |(id, token): &(u32, AddedToken)| Token {
            name: token.special.then(|| format!("\u{f8ff}{secret:020}.{id}\u{f8ff}")),
            text: token.content.clone(),
            single_word: token.single_word,
        };
        let tokens: Vec<_> = added.iter().map(token).collect();
        let failed = |why: String| TokenizerError::Broken { file: "tokenizer.json", why };
        let mut json = serde_json::to_value(tokenizer).map_err(|e| failed(e.to_string()))?;
        for token in &tokens {
            if let Some(name) = &token.name {
                rename(&mut json, &token.text, name);
            }
        }
        keep_merges(&mut json, &tokens);
        let tokenizer =
            tokenizers::Tokenizer::from_bytes(json.to_string()).map_err(|e| failed(e.to_string()))?;
        let kept = |(token, (id, _)): (&Token, &(u32, AddedToken))| {
            tokenizer.token_to_id(token.name.as_ref().unwrap_or(&token.text)) == Some(*id)
        };
        if !tokens.iter().zip(&added).all(kept) {
            return Err(failed("two of its tokens have one id, or one text".into()));
        }
        let mut finder = AhoCorasick::builder();
        let finder = finder.match_kind(MatchKind::LeftmostLongest).build(tokens.iter().map(|t| &t.text));
        let control = AhoCorasick::new(tokens.iter().filter(|t| t.name.is_some()).map(|t| &t.text));
        let (Ok(finder), Ok(control)) = (finder, control) else {
            return Err(failed("its added tokens are too many".into()));
        };
        Ok(Reader { tokenizer, finder, tokens, control, normalized })
    }

    /// The tokenizer, to whom control tokens go by their names.
    pub fn tokenizer(&self) -> &tokenizers::Tokenizer {
        &self.tokenizer
    }

    /// Whether a text is, or holds, a control token.
    pub fn has_control(&self, text: &str) -> bool {
        self.control.is_match(text)
    }

    /// A text with the names of those of its control tokens that `admits`.
    pub fn name(&self, text: &str, admits: impl Fn(&str) -> bool) -> String {
        let mut named = String::with_capacity(text.len());
        let mut end = 0;
        for (at, token) in self.find(text) {
            if let Some(name) = token.name.as_ref().filter(|_| admits(&token.text)) {
                named.push_str(&text[end..at]);
                named.push_str(name);
                end = at + token.text.len();
            }
        }
        named.push_str(&text[end..]);
        if self.normalized { self.without_idle_names(named) } else { named }
    }

    /// A text with names in it, less those in which the tokenizer sees no token: a normalizer may have changed what it looks for.
    fn without_idle_names(&self, named: String) -> String {
        let vocabulary = self.tokenizer.get_added_vocabulary();
        let split = vocabulary.extract_and_normalize(self.tokenizer.get_normalizer(), &named);
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let text = splits.into_iter().map(|(_, (start, end), tokens)| {
            let part = named.get(start..end).unwrap_or_default();
            let names =
                self.tokens.iter().filter_map(|token| Some((token.name.as_deref()?, token.text.as_str())));
            match tokens {
                Some(_) => part.to_owned(),
                None if !part.contains('\u{f8ff}') => part.to_owned(),
                None => names.fold(part.to_owned(), |part, (name, text)| part.replace(name, text)),
            }
        });
        text.collect()
    }

    /// Where added tokens are in a text.
    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, &'a Token)> {
        self.finder.find_iter(text).filter_map(|found| {
            let token = &self.tokens[found.pattern().as_usize()];
            let in_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            let touched = in_word(text[..found.start()].chars().next_back())
                || in_word(text[found.end()..].chars().next());
            (!token.single_word || !touched).then_some((found.start(), token))
        })
    }

    /// A way to quote the control tokens that are somewhere in `texts`.
    ///
    /// # Errors
    /// If the texts have every character for private use.
    pub fn quotes<'a>(
        &'a self,
        texts: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Quotes<'a>, TokenizerError> {
        let mut free = ('\u{f0000}'..='\u{ffffd}').filter(|c| !texts.clone().any(|text| text.contains(*c)));
        let mut stand_ins: Vec<(char, char)> = Vec::new();
        for first in texts.clone().flat_map(|text| self.firsts(text)).map(|(_, c)| c) {
            if !stand_ins.iter().any(|(c, _)| *c == first) {
                let all = || TokenizerError::Failed("the messages have every private character".into());
                stand_ins.push((first, free.next().ok_or_else(all)?));
            }
        }
        Ok(Quotes { reader: self, stand_ins })
    }

    /// Where control tokens begin in a text, and with which character.
    fn firsts<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, char)> {
        let found = self.control.find_overlapping_iter(text);
        found.filter_map(|found| Some((found.start(), text[found.start()..].chars().next()?)))
    }
}

/// Control tokens that users wrote, kept out of sight while a chat template runs: another character, which nobody wrote, stands
/// for the first of each. Lengths stay, and so does whatever templates cut, trim, or write in capitals.
#[derive(Debug)]
pub(super) struct Quotes<'a> {
    reader: &'a Reader,
    stand_ins: Vec<(char, char)>,
}

impl Quotes<'_> {
    /// Nothing is to be quoted.
    pub fn is_empty(&self) -> bool {
        self.stand_ins.is_empty()
    }

    /// A text of a user without control tokens.
    pub fn mask(&self, text: &str) -> String {
        let mut firsts: Vec<usize> = self.reader.firsts(text).map(|(at, _)| at).collect();
        if firsts.is_empty() {
            return text.to_owned();
        }
        firsts.sort_unstable();
        let stand_in = |c: char| self.stand_ins.iter().find(|(first, _)| *first == c).map_or(c, |(_, s)| *s);
        let masked = text.char_indices();
        masked.map(|(at, c)| if firsts.binary_search(&at).is_ok() { stand_in(c) } else { c }).collect()
    }

    /// What was written.
    pub fn unmask(&self, text: &str) -> String {
        let written = |c: char| self.stand_ins.iter().find(|(_, s)| *s == c).map_or(c, |(first, _)| *first);
        if self.is_empty() { text.to_owned() } else { text.chars().map(written).collect() }
    }
}

/// Renames a token wherever a tokenizer's JSON has it.
fn rename(json: &mut Value, text: &str, name: &str) {
    for token in json["added_tokens"].as_array_mut().into_iter().flatten() {
        if token["content"] == text {
            token["content"] = name.into();
        }
    }
    let model = &mut json["model"];
    match &mut model["vocab"] {
        Value::Object(vocab) => {
            if let Some(id) = vocab.swap_remove(text) {
                vocab.insert(name.to_owned(), id);
            }
        }
        Value::Array(pieces) => {
            for piece in pieces.iter_mut().filter(|piece| piece[0] == text) {
                piece[0] = name.into();
            }
        }
        _ => {}
    }
    if model["unk_token"] == text {
        model["unk_token"] = name.into();
    }
}

/// Leaves the old text too where merges make it, or make something of it: they may name only what there is.
fn keep_merges(json: &mut Value, tokens: &[Token]) {
    let model = &mut json["model"];
    let texts: Vec<_> = tokens.iter().filter_map(|t| Some((t.text.as_str(), t.name.as_deref()?))).collect();
    let mut kept = Vec::new();
    for merge in model["merges"].as_array().into_iter().flatten() {
        let pair = merge.as_str().and_then(|merge| merge.split_once(' '));
        let Some((a, b)) = pair.or_else(|| Some((merge[0].as_str()?, merge[1].as_str()?))) else { continue };
        let is_part = |text: &str| text == a || text == b || text.strip_prefix(a) == Some(b);
        kept.extend(texts.iter().filter(|(text, _)| is_part(text)));
    }
    if let Value::Object(vocab) = &mut model["vocab"] {
        for (text, name) in kept {
            if let Some(id) = vocab.get(name).cloned() {
                vocab.insert(text.to_owned(), id);
            }
        }
    }
}
