//! The model's own tokenizer, as it came with the weights.

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
};

use strata_proto::{Files, v1::Truncation};
use tokenizers::{
    Encoding, ModelWrapper, PostProcessor, TruncationDirection, TruncationParams, TruncationStrategy,
    utils::truncation::truncate_encodings,
};

use super::{
    chat::{ChatError, ChatTemplate, Message, special_tokens},
    error::TokenizerError,
    estimate::{longest_token, more_than},
    sampling::GenerationDefaults,
};

/// A model's tokenizer.
#[derive(Debug)]
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Its longest token, where that says how many a text has at least.
    longest: Option<usize>,
    defaults: GenerationDefaults,
    /// `bos_token`, `eos_token`, … of tokenizer_config.json.
    special: BTreeMap<String, String>,
    chat: Option<Chat>,
    mask: Option<Mask>,
}

/// What inputs with masks need beside the tokenizer.
#[derive(Debug)]
struct Mask {
    text: String,
    id: u32,
    /// The same tokenizer, to which the mask token is an ordinary one: it alone is read in a text.
    tokenizer: tokenizers::Tokenizer,
}

/// An input of an encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// Its tokens, special ones included.
    pub ids: Vec<u32>,
    /// The segment of each.
    pub segments: Vec<u32>,
    /// Tokens that were cut off.
    pub dropped: u32,
}

/// What chats need beside the tokenizer.
#[derive(Debug)]
struct Chat {
    template: ChatTemplate,
    /// The same tokenizer, which reads control tokens in its text: for the template's own.
    control: tokenizers::Tokenizer,
    /// Text and id of every control token, longest first.
    tokens: Vec<(String, u32)>,
}

impl Tokenizer {
    /// Builds the tokenizer from a model's files.
    ///
    /// # Errors
    /// If a file is missing or broken.
    pub fn new(files: &Files) -> Result<Self, TokenizerError> {
        let json = files.get("tokenizer.json").ok_or(TokenizerError::Missing)?;
        let broken = |file, why: String| TokenizerError::Broken { file, why };
        let mut inner = parse(json)?;
        // Lengths are bounded by admission, out loud; nothing is cut or padded in silence.
        inner.with_truncation(None).map_err(|e| broken("tokenizer.json", e.to_string()))?;
        inner.with_padding(None);
        let chat = ChatTemplate::new(files)?.map(|template| Chat::new(template, &inner));
        // Text of users never becomes a control token.
        inner.set_encode_special_tokens(true);
        let defaults = match files.get("generation_config.json") {
            None => GenerationDefaults::default(),
            Some(json) => {
                serde_json::from_slice(json).map_err(|e| broken("generation_config.json", e.to_string()))?
            }
        };
        let special = special_tokens(files)?;
        let mask = special.get("mask_token").map(|text| Mask::new(text, json)).transpose()?.flatten();
        let longest = longest_token(&inner);
        Ok(Tokenizer { inner, longest, defaults, special, chat, mask })
    }

    /// Text to ids; `special` adds what the tokenizer puts around a text (BOS).
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(guarded(|| self.inner.encode_fast(text, special))?.get_ids().to_vec())
    }

    /// The same for a text, with what the tokenizer puts around it, of at most so many tokens; what has far more is
    /// refused without being read whole.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode), or [`TokenizerError::TooLong`].
    pub fn encode_at_most(&self, text: &str, most: usize) -> Result<Vec<u32>, TokenizerError> {
        self.check_length(&self.inner, text, most)?;
        self.encode(text, true)
    }

    /// Tokens that an input of an encoder has at least, if these are more than `most`; as little of it is read as that
    /// takes.
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn input_exceeds(&self, text: &str, most: usize) -> Result<Option<usize>, TokenizerError> {
        let tokenizer = self.mask.as_ref().map_or(&self.inner, |mask| &mask.tokenizer);
        more_than(text, most, self.longest, |part| Ok(guarded(|| tokenizer.encode_fast(part, false))?.len()))
    }

    fn check_length(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        most: usize,
    ) -> Result<(), TokenizerError> {
        let count = |part: &str| -> Result<usize, TokenizerError> {
            Ok(guarded(|| tokenizer.encode_fast(part, false))?.len())
        };
        match more_than(text, most, self.longest, count)? {
            Some(least) => Err(TokenizerError::TooLong { least }),
            None => Ok(()),
        }
    }

    /// A text, or a pair of texts, as an encoder reads it, special tokens included. The mask token, if the tokenizer
    /// has one, is the only one that a text may contain. `longest` cuts what is longer, of a pair the longer text
    /// first.
    ///
    /// # Errors
    /// If the tokenizer fails on this text, or `longest` leaves no room for a text.
    pub fn encode_input(
        &self,
        text: &str,
        pair: Option<&str>,
        longest: Option<(u32, Truncation)>,
    ) -> Result<Encoded, TokenizerError> {
        let tokenizer = self.mask.as_ref().map_or(&self.inner, |mask| &mask.tokenizer);
        let mut first = guarded(|| tokenizer.encode(text, false))?;
        let mut second = pair.map(|pair| guarded(|| tokenizer.encode(pair, false))).transpose()?;
        let count = |a: &Encoding, b: &Option<Encoding>| a.len() + b.as_ref().map_or(0, Encoding::len);
        let before = count(&first, &second);
        if let Some((longest, keep)) = longest {
            let around = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(pair.is_some()));
            let room =
                (longest as usize).checked_sub(around).filter(|room| *room > usize::from(pair.is_some()));
            let room = room.ok_or_else(|| {
                TokenizerError::Failed(format!("{longest} tokens leave no room beside {around} special ones"))
            })?;
            let params = TruncationParams {
                max_length: room,
                strategy: TruncationStrategy::LongestFirst,
                stride: 0,
                direction: match keep {
                    Truncation::KeepTail => TruncationDirection::Left,
                    _ => TruncationDirection::Right,
                },
            };
            (first, second) = guarded(|| truncate_encodings(first, second, &params))?;
        }
        let dropped = (before - count(&first, &second)) as u32;
        // The second text's segment is the post-processor's to set; without one, it is 1.
        let encoding = guarded(|| tokenizer.post_process(first, second, true))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), segments: encoding.get_type_ids().to_vec(), dropped })
    }

    /// Tokens that stand before a text which follows `prompt`: those of the prompt, special ones in front included.
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<usize, TokenizerError> {
        let ids = self.encode_input(prompt, None, None)?.ids;
        let is_special =
            |id: &&u32| self.inner.get_added_tokens_decoder().get(*id).is_some_and(|token| token.special);
        // As sentence-transformers counts: what the tokenizer puts behind a text is one token at most.
        Ok(ids.len() - usize::from(ids.last().filter(is_special).is_some()))
    }

    /// Text and id of the mask token.
    pub fn mask(&self) -> Option<(&str, u32)> {
        self.mask.as_ref().map(|mask| (mask.text.as_str(), mask.id))
    }

    /// A chat to ids, by the model's own template, up to the beginning of the model's answer.
    ///
    /// # Errors
    /// If the model has no template, it refuses these messages, or they have far more than `most` tokens.
    pub fn encode_chat(&self, messages: &[Message], most: usize) -> Result<Vec<u32>, TokenizerError> {
        let chat = self.chat.as_ref().ok_or(ChatError::NoTemplate)?;
        let said = |text: &str| chat.tokens.iter().any(|(token, _)| text.contains(token.as_str()));
        if messages.iter().any(|m| said(&m.content) || said(&m.role)) {
            return self.encode_masked(chat, messages, most);
        }
        let text = chat.template.render(messages, true)?;
        self.check_length(&chat.control, &text, most)?;
        Ok(guarded(|| chat.control.encode_fast(text.as_str(), false))?.get_ids().to_vec())
    }

    /// As [`encode_chat`](Self::encode_chat) for messages that contain the text of control tokens: they are masked
    /// while the template is rendered, so that only the template's own become control tokens.
    fn encode_masked(
        &self,
        chat: &Chat,
        messages: &[Message],
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let used = |c: char| messages.iter().any(|m| m.content.contains(c) || m.role.contains(c));
        // A private-use character that nobody uses; filters such as `trim` and `upper` leave it and digits alone.
        let fence = ('\u{e000}'..='\u{f8ff}').find(|c| !used(*c));
        let fence =
            fence.ok_or_else(|| TokenizerError::Failed("the messages use every private character".into()))?;
        let mask = |text: &str| {
            let masked = chat.tokens.iter().enumerate();
            masked.fold(text.to_owned(), |text, (i, (token, _))| {
                text.replace(token, &format!("{fence}{i}{fence}"))
            })
        };
        let unmask = |text: &str| {
            let masks = chat.tokens.iter().enumerate();
            masks.fold(text.to_owned(), |text, (i, (token, _))| {
                text.replace(&format!("{fence}{i}{fence}"), token)
            })
        };
        let masked: Vec<Message> =
            messages.iter().map(|m| Message { role: mask(&m.role), content: mask(&m.content) }).collect();
        let text = chat.template.render(&masked, true)?;
        self.check_length(&chat.control, &unmask(&text), most)?;
        let mut ids = Vec::new();
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let first =
                chat.tokens.iter().filter_map(|(token, id)| Some((rest.find(token.as_str())?, token, *id)));
            // `min_by_key` keeps the first of equals, which is the longest.
            let (before, control) = match first.min_by_key(|(at, ..)| *at) {
                Some((at, token, id)) => (at, Some((token, id))),
                None => (rest.len(), None),
            };
            if before > 0 {
                ids.extend(self.encode(&unmask(&rest[..before]), false)?);
            }
            rest = &rest[before..];
            if let Some((token, id)) = control {
                ids.push(id);
                rest = &rest[token.len()..];
            }
        }
        Ok(ids)
    }

    /// Ids to text.
    ///
    /// # Errors
    /// If the tokenizer fails on these ids.
    pub fn decode(&self, ids: &[u32], keep_special: bool) -> Result<String, TokenizerError> {
        guarded(|| self.inner.decode(ids, !keep_special))
    }

    /// Whether it can read chats.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// What kind it is, as `model.type` of tokenizer.json names it.
    pub fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
            ModelWrapper::Unigram(_) => "Unigram",
        }
    }

    /// Number of tokens.
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The highest token id.
    pub fn highest_id(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().unwrap_or(0)
    }

    /// The text of `bos_token`, `eos_token`, …, if tokenizer_config.json names it.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special.get(name).map(String::as_str)
    }

    /// The id of a token by its text.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// What the model's makers suggest.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }
}

/// A `tokenizer.json`.
fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(|error| match error {
        TokenizerError::Failed(why) => {
            let cut =
                if why.contains("EOF while parsing") { ": it was cut off; download it again" } else { "" };
            TokenizerError::Broken { file: "tokenizer.json", why: why + cut }
        }
        error => error,
    })
}

/// What the library makes of something. Where a tokenizer is damaged, it panics now and then.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let damaged = || TokenizerError::Failed("tokenizer.json is damaged: download it again".to_owned());
    let done = panic::catch_unwind(AssertUnwindSafe(call)).map_err(|_| damaged())?;
    done.map_err(|e| TokenizerError::Failed(e.to_string()))
}

impl Mask {
    /// `None` if the tokenizer does not know the token.
    fn new(text: &str, json: &[u8]) -> Result<Option<Self>, TokenizerError> {
        let broken = |why: String| TokenizerError::Broken { file: "tokenizer.json", why };
        let mut value: serde_json::Value = serde_json::from_slice(json).map_err(|e| broken(e.to_string()))?;
        let tokens = value.get_mut("added_tokens").and_then(|t| t.as_array_mut());
        for token in tokens.into_iter().flatten().filter(|t| t["content"] == text) {
            token["special"] = false.into();
        }
        let mut tokenizer = parse(value.to_string().as_bytes())?;
        tokenizer.with_truncation(None).map_err(|e| broken(e.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);
        let id = tokenizer.token_to_id(text);
        Ok(id.map(|id| Mask { text: text.to_owned(), id, tokenizer }))
    }
}

impl Chat {
    fn new(template: ChatTemplate, tokenizer: &tokenizers::Tokenizer) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let mut tokens: Vec<(String, u32)> =
            added.into_iter().filter(|(_, t)| t.special).map(|(id, t)| (t.content, id)).collect();
        tokens.sort_by_key(|(text, id)| (std::cmp::Reverse(text.len()), *id));
        Chat { template, control: tokenizer.clone(), tokens }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::request) fn demo() -> Tokenizer {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/shakespeare");
        let read = |name: &str| (name.to_owned(), std::fs::read(format!("{directory}/{name}")).unwrap());
        let files = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"].map(read);
        Tokenizer::new(&Files::from(files)).unwrap()
    }

    #[test]
    fn chats_become_transformers_ids_and_only_the_template_says_control_tokens() {
        let tokenizer = demo();
        let say = |content: &str| [Message { role: "user".into(), content: content.into() }];
        let ids = tokenizer.encode_chat(&say("What say you, good sir?"), usize::MAX).unwrap();
        let expected = [
            0, 390, 445, 28, 201, 469, 517, 291, 14, 451, 498, 33, 201, 201, 35, 53, 53, 613, 54, 644, 54,
            28, 201,
        ];
        assert_eq!(ids, expected);
        let ids = tokenizer.encode_chat(&say(" <|eos|>a<|bos|><|eos|> "), usize::MAX).unwrap();
        assert!(ids[0] == 0 && ids[1..].iter().all(|id| *id > 2), "{ids:?}");
        let text = tokenizer.decode(&ids, true).unwrap();
        assert_eq!(text, "<|bos|>USER:\n<|eos|>a<|bos|><|eos|>\n\nASSISTANT:\n");
        let none = Tokenizer { chat: None, ..demo() };
        assert!(
            none.encode_chat(&say("x"), usize::MAX).unwrap_err().to_string().contains("no chat template")
        );
    }

    /// Python's tokenizers has Oniguruma; the crate's other engine differs here, and ends early in long white space.
    #[test]
    fn patterns_split_as_oniguruma_does() {
        use tokenizers::{
            OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
            pre_tokenizers::split::{Split, SplitPattern},
        };
        let pieces = |pattern: &str, text: &str| {
            let pattern = SplitPattern::Regex(pattern.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
            let mut pieces = PreTokenizedString::from(text);
            split.pre_tokenize(&mut pieces).unwrap();
            pieces.get_splits(OffsetReferential::Original, OffsetType::Byte).len()
        };
        assert_eq!(pieces("[[:punct:]]", "a\u{3001}b"), 3);
        assert_eq!(pieces("^b", "a\nb"), 2);
        assert_eq!(pieces(r"\w+", "a\u{b2}"), 1);
        let long = format!("a{}b c", " ".repeat(1_100_000));
        assert_eq!(pieces(r" ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+", &long), 4);
    }

    #[test]
    fn a_file_that_was_cut_off_is_refused_even_where_the_library_panics() {
        let json = serde_json::to_string(&demo().inner).unwrap();
        let decoder = json.find(r#""decoder":"#).unwrap();
        for end in [0, decoder, decoder + 12, json.len() - 1] {
            let file = ("tokenizer.json".to_owned(), json.as_bytes()[..end].to_vec());
            let error = Tokenizer::new(&Files::from([file])).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json"), "{error}");
        }
    }

    #[test]
    fn a_tokenizer_that_names_a_token_which_it_does_not_have_fails_without_a_panic() {
        let mut json = serde_json::to_value(&demo().inner).unwrap();
        let token = serde_json::json!({"SpecialToken": {"id": "<|none|>", "type_id": 0}});
        json["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "single": [token], "pair": [token], "special_tokens": {}
        });
        let files = Files::from([("tokenizer.json".to_owned(), json.to_string().into_bytes())]);
        let error =
            Tokenizer::new(&files).and_then(|t| t.encode_input("a", None, None)).unwrap_err().to_string();
        assert!(error.contains("damaged") && error.contains("download"), "{error}");
    }

    #[test]
    fn text_of_users_never_becomes_a_control_token() {
        let tokenizer = demo();
        let ids = tokenizer.encode("a<|eos|>b", true).unwrap();
        assert_eq!(ids[0], 0, "BOS is put in front");
        assert!(ids[1..].iter().all(|id| *id > 2), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "a<|eos|>b");
    }

    #[test]
    fn every_kind_of_tokenizer_gives_transformers_ids_for_hard_strings() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tokenizers.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let ids = |v: &serde_json::Value| -> Vec<u32> {
            v.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        for (kind, entry) in json.as_object().unwrap() {
            let file =
                |name: &str, value: &serde_json::Value| (name.to_owned(), value.to_string().into_bytes());
            let files = [
                file("tokenizer.json", &entry["tokenizer"]),
                file("tokenizer_config.json", &entry["config"]),
            ];
            let tokenizer = Tokenizer::new(&Files::from(files)).unwrap();
            assert!(kind.ends_with(tokenizer.kind()) || kind.starts_with(tokenizer.kind()));
            for case in entry["cases"].as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{kind}: {text:?}");
                let input = tokenizer.encode_input(text, None, None).unwrap();
                assert_eq!(input.ids, ids(&case["ids"]), "{kind}, as an input: {text:?}");
            }
            for case in entry["pairs"].as_array().unwrap() {
                let (text, pair) = (case["text"].as_str().unwrap(), case["pair"].as_str().unwrap());
                let both = tokenizer.encode_input(text, Some(pair), None).unwrap();
                assert_eq!(both.ids, ids(&case["ids"]), "{kind}: {text:?}, {pair:?}");
                assert_eq!(both.segments, ids(&case["segments"]), "{kind}: {text:?}, {pair:?}");
            }
        }
    }
}
