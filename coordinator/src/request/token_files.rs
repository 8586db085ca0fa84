//! What a model's files say of its tokens beside tokenizer.json, made one as transformers 5.24 makes them one
//! (`tokenization_utils_base.py`, `tokenization_utils_tokenizers.py`, and for classes `tokenization_auto.py`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use strata_proto::Files;
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
    processors::{bert::BertProcessing, roberta::RobertaProcessing},
};

use super::{
    error::TokenizerError,
    token_classes::{self, Class, Frame},
};

const CONFIG: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";

/// Roles that every tokenizer may fill, in the order in which transformers adds those that are new.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The files of a tokenizer but tokenizer.json, read.
#[derive(Debug, Default)]
pub(crate) struct TokenFiles {
    /// tokenizer_config.json, with what special_tokens_map.json sets in it.
    config: Map<String, Value>,
    /// Tokens that files list by id.
    listed: BTreeMap<u32, AddedToken>,
    class: Option<&'static Class>,
}

impl TokenFiles {
    /// Reads them.
    ///
    /// # Errors
    /// If one does not parse, or lists what is no token.
    pub fn new(files: &Files) -> Result<Self, TokenizerError> {
        let mut config = object(files, CONFIG)?.unwrap_or_default();
        let model = object(files, "config.json")?.unwrap_or_default();
        let class = token_classes::of(&config, &model, files);
        let mut listed = BTreeMap::new();
        // A configuration that lists the tokens itself is newer than the other two files.
        match config.remove("added_tokens_decoder") {
            Some(Value::Object(tokens)) => {
                for (id, token) in tokens {
                    let field = format!("added_tokens_decoder.{id}");
                    let id = id.parse().map_err(|_| wrong(CONFIG, &field, "a token id for its key"))?;
                    listed.insert(id, full(&token).ok_or_else(|| wrong(CONFIG, &field, A_TOKEN))?);
                }
            }
            Some(_) => return Err(wrong(CONFIG, "added_tokens_decoder", "an object of tokens by id")),
            None => {
                config.extend(object(files, MAP)?.unwrap_or_default());
                let special: Vec<_> =
                    special(&config)?.concat().into_iter().map(|token| token.content).collect();
                for (text, id) in object(files, ADDED)?.unwrap_or_default() {
                    let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                    let id = id.ok_or_else(|| wrong(ADDED, &text, "a token id"))?;
                    let is_special = special.contains(&text);
                    listed.insert(id, AddedToken::from(text, is_special));
                }
            }
        }
        Ok(TokenFiles { config, listed, class })
    }

    /// Whether a model is told which of two texts a token is of: `model_input_names` says it, or else the class. Most do not,
    /// and then all is the first text's, whatever tokenizer.json says.
    pub fn tells_segments(&self) -> bool {
        match self.config.get("model_input_names").and_then(Value::as_array) {
            Some(names) => names.iter().any(|name| name == "token_type_ids"),
            None => self.class.is_some_and(|class| class.tells_segments),
        }
    }

    /// Gives the tokenizer the tokens that only these files have, and what its class sets whatever tokenizer.json says.
    ///
    /// # Errors
    /// If a field is not what it must be, or the tokenizer takes none of it.
    pub fn complete(&self, tokenizer: &mut Tokenizer) -> Result<(), TokenizerError> {
        self.set_up(tokenizer)?;
        let there = tokenizer.get_added_tokens_decoder();
        let [mut named, others] = special(&self.config)?;
        named.extend(self.own(tokenizer).map(|(_, text)| AddedToken::from(text, true)));
        // Ids are not taken from the files: a token that the vocabulary lacks gets the next one.
        let taken = |id: &u32, token: &AddedToken| there.get(id).is_some_and(|t| t.content != token.content);
        let listed = self.listed.iter().filter(|(id, token)| !taken(id, token));
        let mut tokens: Vec<AddedToken> = listed.map(|(_, token)| token.clone()).collect();
        for token in &mut tokens {
            token.special |= named.iter().any(|named| named.content == token.content);
        }
        let known: Vec<_> = there.into_values().chain(tokens.iter().cloned()).map(|t| t.content).collect();
        // Nobody pads here, and a padding token that only training knew may lie behind the last row of the embedding.
        let pad = self.config.get("pad_token").and_then(short).map(|token| token.content);
        let is_needed = |text: &String| pad.as_ref() != Some(text) || tokenizer.token_to_id(text).is_some();
        tokens.extend(
            named.into_iter().chain(others).filter(|t| !known.contains(&t.content) && is_needed(&t.content)),
        );
        let failed = |e: tokenizers::Error| TokenizerError::Broken { file: CONFIG, why: e.to_string() };
        tokenizer.add_tokens(tokens).map_err(failed)?;
        self.put_around(tokenizer);
        Ok(())
    }

    /// Tokens that the class names and the files do not, with their roles, as far as the tokenizer knows them.
    fn own(&self, tokenizer: &Tokenizer) -> impl Iterator<Item = (&'static str, &'static str)> {
        let named = self.class.map_or(&[][..], |class| class.tokens).iter().copied();
        named.filter(|(role, text)| !self.config.contains_key(*role) && tokenizer.token_to_id(text).is_some())
    }

    /// What the class puts around texts, if tokenizer.json does not say it.
    fn put_around(&self, tokenizer: &mut Tokenizer) {
        let Some(frame) = self.class.and_then(|class| class.frame) else { return };
        if tokenizer.get_post_processor().is_some() {
            return;
        }
        let roles = self.roles(tokenizer);
        let token = |role: &str| {
            let text = roles.get(role)?.clone();
            let id = tokenizer.token_to_id(&text)?;
            Some((text, id))
        };
        let (Some(cls), Some(sep)) = (token("cls_token"), token("sep_token")) else { return };
        match frame {
            Frame::Bert => tokenizer.with_post_processor(Some(BertProcessing::new(sep, cls))),
            Frame::Roberta => tokenizer.with_post_processor(Some(RobertaProcessing::new(sep, cls))),
        };
    }

    /// What a class sets on the normalizer and the pre-tokenizer.
    fn set_up(&self, tokenizer: &mut Tokenizer) -> Result<(), TokenizerError> {
        let Some(class) = self.class else { return Ok(()) };
        let failed = |e: tokenizers::Error| TokenizerError::Broken { file: CONFIG, why: e.to_string() };
        let flag = |name: &str, default: Option<bool>| match self.config.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(wrong(CONFIG, name, "true, false or null")),
        };
        if class.is_bert {
            let lowercase = flag("do_lower_case", Some(true))? == Some(true);
            let chinese = flag("tokenize_chinese_chars", Some(true))? == Some(true);
            let accents = flag("strip_accents", None)?;
            if let Some(NormalizerWrapper::BertNormalizer(normalizer)) = tokenizer.get_normalizer().cloned() {
                let mut normalizer = normalizer;
                normalizer.lowercase = lowercase;
                normalizer.handle_chinese_chars = chinese;
                normalizer.strip_accents = accents;
                tokenizer.with_normalizer(Some(normalizer)).map_err(failed)?;
            }
        }
        if class.is_byte_level {
            let space = flag("add_prefix_space", Some(false))? == Some(true);
            if let Some(mut pre) = tokenizer.get_pre_tokenizer().cloned()
                && set_prefix_space(&mut pre, space)
            {
                tokenizer.with_pre_tokenizer(Some(pre));
            }
        }
        Ok(())
    }

    /// Tokens with a role: `bos_token`, …, and whatever else the files, or else the class, name so, with their texts.
    pub fn roles(&self, tokenizer: &Tokenizer) -> BTreeMap<String, String> {
        let own = self.own(tokenizer).map(|(role, text)| (role.to_owned(), text.to_owned()));
        let named = self.config.iter().filter(|(name, _)| name.ends_with("_token"));
        let more = LISTS.into_iter().filter_map(|list| self.config.get(list)?.as_object()).flatten();
        let text = |(name, value): (&String, &Value)| Some((name.clone(), short(value)?.content));
        own.chain(named.chain(more).filter_map(text)).collect()
    }
}

/// Where special tokens without a role are listed; the second name is that of version 4.
const LISTS: [&str; 2] = ["extra_special_tokens", "additional_special_tokens"];

/// Special tokens by these files: those with a role, and the others.
fn special(config: &Map<String, Value>) -> Result<[Vec<AddedToken>; 2], TokenizerError> {
    let standard = ROLES.iter().filter_map(|role| config.get(*role));
    let is_other =
        |name: &str, value: &Value| name.ends_with("_token") && !ROLES.contains(&name) && value.is_string();
    let other = config.iter().filter(|(name, value)| is_other(name, value)).map(|(_, value)| value);
    let mut named: Vec<_> = standard.chain(other).filter_map(short).collect();
    let is_there = |list: &&str| config.get(*list).is_some_and(|value| !value.is_null());
    let Some(list) = LISTS.into_iter().find(is_there) else { return Ok([named, Vec::new()]) };
    let mut others = Vec::new();
    match &config[list] {
        Value::Object(more) => named.extend(more.values().filter_map(short)),
        Value::Array(values) => {
            let token = |value| short(value).ok_or_else(|| wrong(CONFIG, list, A_TOKEN));
            others = values.iter().map(token).collect::<Result<_, _>>()?;
        }
        _ => return Err(wrong(CONFIG, list, "a list of tokens")),
    }
    Ok([named, others])
}

const A_TOKEN: &str = "a token: its text, or an object with its content";

fn wrong(file: &'static str, field: &str, expected: &str) -> TokenizerError {
    TokenizerError::Broken { file, why: format!("{field}: expected {expected}") }
}

/// The object at the top of a file, if the file is there.
fn object(files: &Files, name: &'static str) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(json) = files.get(name) else { return Ok(None) };
    serde_json::from_slice(json).map(Some).map_err(|e| TokenizerError::misread(name, &e))
}

/// A token as an object.
#[derive(Debug, Deserialize)]
struct Token {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

/// A token of a list that says all of it.
fn full(value: &Value) -> Option<AddedToken> {
    let token = Token::deserialize(value).ok()?;
    let normalized = token.normalized.unwrap_or(!token.special);
    let added = AddedToken::from(token.content, token.special);
    Some(
        added.lstrip(token.lstrip).rstrip(token.rstrip).single_word(token.single_word).normalized(normalized),
    )
}

/// A special token, by its text or as an object.
fn short(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(text) => Some(AddedToken::from(text.clone(), true)),
        Value::Object(_) => full(value).map(|token| token.special(true)),
        _ => None,
    }
}

/// Sets whether a space goes in front of a text; `false` if it is so already.
fn set_prefix_space(pre: &mut PreTokenizerWrapper, space: bool) -> bool {
    match pre {
        PreTokenizerWrapper::ByteLevel(bytes) if bytes.add_prefix_space != space => {
            bytes.add_prefix_space = space;
            true
        }
        PreTokenizerWrapper::Sequence(sequence) => {
            let parts: &mut [PreTokenizerWrapper] = sequence.as_mut();
            parts.iter_mut().filter_map(|part| set_prefix_space(part, space).then_some(())).count() > 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{chat::Conversation, tokenizer::Tokenizer};

    fn fixture() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/token_files.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    /// What transformers 5.24 gives for a pair (`AutoTokenizer` of these files, whose tokenizer.json has segments).
    #[test]
    fn only_some_classes_tell_a_model_of_segments() {
        for (family, config, tells) in [
            ("bert", "{}", true),
            ("bert", r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#, false),
            ("bert", r#"{"tokenizer_class": "TokenizersBackend"}"#, false),
            ("bert", r#"{"tokenizer_class": "DistilBertTokenizer"}"#, false),
            ("bert", r#"{"tokenizer_class": "BertTokenizerFast"}"#, true),
            ("electra", r#"{"tokenizer_class": "ElectraTokenizerFast"}"#, true),
            ("nomic_bert", r#"{"tokenizer_class": "BertTokenizer"}"#, true),
            ("gte", r#"{"tokenizer_class": "BertTokenizer"}"#, true),
            ("roberta", "{}", false),
            ("modernbert", r#"{"tokenizer_class": "BertTokenizer"}"#, false),
            ("deberta-v2", "{}", true),
            ("bert", r#"{"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids"]}"#, false),
            ("bert", r#"{"tokenizer_class": "X", "model_input_names": ["token_type_ids"]}"#, true),
        ] {
            let model = format!(r#"{{"model_type": "{family}"}}"#);
            let files = [(CONFIG, config), ("config.json", &model)];
            let files = Files::from(files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
            assert_eq!(TokenFiles::new(&files).unwrap().tells_segments(), tells, "{family} {config}");
        }
    }

    #[test]
    fn files_mean_what_they_mean_to_transformers() {
        let fixture = fixture();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let messages = fixture["messages"].as_array().unwrap().iter();
        let messages = messages.map(|m| m.as_object().unwrap().clone()).collect();
        let messages = Conversation { messages, ..Conversation::default() };
        let mut wrong = Vec::new();
        for (name, case) in fixture["cases"].as_object().unwrap() {
            let mut json = fixture["bases"][case["base"].as_str().unwrap()].clone();
            json["added_tokens"] = case["added_tokens"].clone();
            let mut files: Files = case["files"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, json)| (name.clone(), json.to_string().into_bytes()))
                .collect();
            files.insert("tokenizer.json".into(), json.to_string().into_bytes());
            files.insert("chat_template.jinja".into(), text(&fixture["template"]).into_bytes());
            let tokenizer = Tokenizer::new(&files).unwrap();
            let chat = tokenizer.encode_chat(&messages, usize::MAX).unwrap();
            if chat != ids(&case["chat"]) {
                wrong.push(format!("{name}: chat {chat:?}, not {}", case["chat"]));
            }
            for (said, expected) in
                fixture["texts"].as_array().unwrap().iter().zip(case["texts"].as_array().unwrap())
            {
                let got = tokenizer.encode(said.as_str().unwrap(), true).unwrap();
                if got != ids(expected) {
                    wrong.push(format!("{name}: {said} {got:?}, not {expected}"));
                }
            }
            let decoded = tokenizer.decode(&chat, false).unwrap();
            if decoded != case["decoded"].as_str().unwrap() {
                wrong.push(format!("{name}: {decoded:?}, not {}", case["decoded"]));
            }
            for (role, token) in case["roles"].as_object().unwrap() {
                let got = tokenizer.role(role).map(|(text, _)| text);
                if got != token.as_str() {
                    wrong.push(format!("{name}: {role} {got:?}, not {token}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
