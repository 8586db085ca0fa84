//! The model's own tokenizer, as it came with the weights.

mod locate;

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{self, AssertUnwindSafe},
};

use strata_proto::{Files, ModelProfile, v1::Truncation};
use tokenizers::{
    DecoderWrapper, Encoding, ModelWrapper, PostProcessor, TruncationDirection, TruncationParams,
    TruncationStrategy, utils::truncation::truncate_encodings,
};

use super::{
    chat::{ChatError, ChatTemplate, Conversation},
    error::TokenizerError,
    estimate::{longest_token, more_than},
    parts::Place,
    reader::Reader,
    sampling::GenerationDefaults,
    token_files::TokenFiles,
};

/// A model's tokenizer.
#[derive(Debug)]
pub(crate) struct Tokenizer {
    /// What turns ids into text, and counts the tokens of rendered chats.
    inner: tokenizers::Tokenizer,
    /// What turns texts into ids.
    reader: Reader,
    /// Its longest token, where that says how many a text has at least.
    longest: Option<usize>,
    defaults: GenerationDefaults,
    /// Ids of byte tokens that the decoder takes together.
    bytes: BTreeSet<u32>,
    /// Models are told which of two texts a token is of.
    tells_segments: bool,
    /// `bos_token`, `eos_token`, …
    roles: BTreeMap<String, String>,
    chat: Option<ChatTemplate>,
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

/// An input of which each token counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Located {
    /// As in [`Encoded`].
    pub ids: Vec<u32>,
    /// As in [`Encoded`].
    pub segments: Vec<u32>,
    /// Where each token comes from.
    pub places: Vec<Place>,
    /// As in [`Encoded`].
    pub dropped: u32,
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
        let said = TokenFiles::new(files)?;
        said.complete(&mut inner)?;
        let roles = said.roles(&inner);
        let chat = ChatTemplate::new(files, &roles)?;
        let reader = Reader::new(&inner)?;
        let longest = longest_token(&inner);
        let defaults = GenerationDefaults::new(files)?;
        let bytes = byte_tokens(&inner);
        let tells_segments = said.tells_segments();
        Ok(Tokenizer { inner, reader, longest, defaults, bytes, tells_segments, roles, chat })
    }

    /// Text to ids; `special` adds what the tokenizer puts around a text (BOS).
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        Ok(guarded(|| self.reader.tokenizer().encode_fast(text, special))?.get_ids().to_vec())
    }

    /// The same for a text, with what the tokenizer puts around it, of at most so many tokens; what has far more is
    /// refused without being read whole.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode), or [`TokenizerError::TooLong`].
    pub fn encode_at_most(&self, text: &str, most: usize) -> Result<Vec<u32>, TokenizerError> {
        self.check_length(self.reader.tokenizer(), text, most)?;
        self.encode(text, true)
    }

    /// Tokens that an input of an encoder has at least, if these are more than `most`; as little of it is read as that
    /// takes.
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn input_exceeds(&self, text: &str, most: usize) -> Result<Option<usize>, TokenizerError> {
        more_than(text, most, self.longest, |part| {
            Ok(guarded(|| self.reader.tokenizer().encode_fast(part, false))?.len())
        })
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
        let mask = self.mask().map(|(mask, _)| mask);
        let (first, second, dropped) = self.read((text, pair), longest, |token| Some(token) == mask)?;
        // The second text's segment is the post-processor's to set; without one, it is 1.
        let encoding = guarded(|| self.reader.tokenizer().post_process(first, second, true))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), segments: encoding.get_type_ids().to_vec(), dropped })
    }

    /// Tokens that the tokenizer puts around a text, or a pair of them.
    fn around(&self, pair: bool) -> usize {
        self.reader.tokenizer().get_post_processor().map_or(0, |p| p.added_tokens(pair))
    }

    /// The texts by themselves, and how many tokens were cut off. Of control tokens, a text may contain those that `admits`.
    fn read(
        &self,
        (text, pair): (&str, Option<&str>),
        longest: Option<(u32, Truncation)>,
        admits: impl Fn(&str) -> bool,
    ) -> Result<(Encoding, Option<Encoding>, u32), TokenizerError> {
        let tokenizer = self.reader.tokenizer();
        let read = |text: &str| {
            let text = self.reader.name(text, &admits);
            guarded(|| tokenizer.encode(text, false))
        };
        let mut first = read(text)?;
        let mut second = pair.map(read).transpose()?;
        let count = |a: &Encoding, b: &Option<Encoding>| a.len() + b.as_ref().map_or(0, Encoding::len);
        let before = count(&first, &second);
        if let Some((longest, keep)) = longest {
            let around = self.around(pair.is_some());
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
        Ok((first, second, dropped))
    }

    /// Tokens that stand before a text which follows `prompt`: those of the prompt, special ones in front included.
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn prompt_tokens(&self, prompt: &str) -> Result<usize, TokenizerError> {
        let ids = self.encode_input(prompt, None, None)?.ids;
        let is_special = |id: &&u32| self.control(**id).is_some();
        // As sentence-transformers counts: what the tokenizer puts behind a text is one token at most.
        Ok(ids.len() - usize::from(ids.last().filter(is_special).is_some()))
    }

    /// Whether a model of `profile` is told which of two texts a token is of.
    pub fn tells_segments(&self, profile: &ModelProfile) -> bool {
        self.tells_segments && profile.segments > 1
    }

    /// Text and id of the mask token.
    pub fn mask(&self) -> Option<(&str, u32)> {
        self.role("mask_token")
    }

    /// A chat to ids, by the model's own template, up to the beginning of the model's answer. Control tokens are the
    /// template's own alone; what users quote of them changes nothing else.
    ///
    /// # Errors
    /// If the model has no template, it refuses these messages, or they have far more than `most` tokens.
    pub fn encode_chat(&self, chat: &Conversation, most: usize) -> Result<Vec<u32>, TokenizerError> {
        let template = self.chat.as_ref().ok_or(ChatError::NoTemplate)?;
        let texts = chat.texts();
        let quotes = self.reader.quotes(texts.iter().copied())?;
        let masked = chat.map_texts(&|text| quotes.mask(text));
        let text = template.render(&masked).map_err(|error| match error {
            ChatError::Refused(why) => ChatError::Refused(quotes.unmask(&why)),
            error => error,
        })?;
        self.check_length(&self.inner, &quotes.unmask(&text), most)?;
        let text = quotes.unmask(&self.reader.name(&text, |_| true));
        Ok(guarded(|| self.reader.tokenizer().encode_fast(text, false))?.get_ids().to_vec())
    }

    /// The text of a chat, by the model's own template.
    ///
    /// # Errors
    /// If the model has no template, or it refuses these messages.
    pub fn render_chat(&self, chat: &Conversation) -> Result<String, TokenizerError> {
        Ok(self.chat.as_ref().ok_or(ChatError::NoTemplate)?.render(chat)?)
    }

    /// Whether the model's template reads what is said as a list of parts.
    pub fn reads_parts(&self) -> bool {
        self.chat.as_ref().is_some_and(ChatTemplate::reads_parts)
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

    /// A text of up to twenty letters that it has tokens for, some again and again.
    pub fn letters(&self) -> String {
        let mut letters: Vec<char> = self
            .inner
            .get_vocab(false)
            .into_keys()
            .filter_map(|token| {
                let mut chars = token.chars();
                chars.next().filter(|c| c.is_alphanumeric() && chars.next().is_none())
            })
            .collect();
        letters.sort_unstable();
        letters.truncate(20);
        letters.iter().chain(letters.iter().rev()).collect()
    }

    /// Number of tokens.
    pub fn size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token of the highest id, and that.
    pub fn highest(&self) -> (String, u32) {
        self.inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id).unwrap_or_default()
    }

    /// Text and id of `bos_token`, `eos_token`, …, if the model's files, or transformers' class of tokenizer, name it.
    pub fn role(&self, name: &str) -> Option<(&str, u32)> {
        let text = self.roles.get(name)?;
        Some((text, self.inner.token_to_id(text)?))
    }

    /// The text of a control token, which answers do not show.
    pub fn control(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).filter(|token| token.special).map(|token| token.content.clone())
    }

    /// Whether a text is, or holds, a control token.
    pub fn has_control(&self, text: &str) -> bool {
        self.reader.has_control(text)
    }

    /// Whether the id is a byte's of which several make a character, or none.
    pub fn is_byte(&self, id: u32) -> bool {
        self.bytes.contains(&id)
    }

    /// Ids that end an answer: those of the model's configuration, and the tokenizer's own.
    pub fn eos(&self, profile: &ModelProfile) -> Vec<u32> {
        let own = self.role("eos_token").map(|(_, id)| id).filter(|id| *id < profile.vocab_size);
        let mut ids = profile.eos_token_ids.clone();
        ids.extend(own.filter(|id| !ids.contains(id)));
        ids
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

/// Ids of the byte tokens of a decoder that falls back to bytes.
fn byte_tokens(tokenizer: &tokenizers::Tokenizer) -> BTreeSet<u32> {
    fn falls_back(decoder: &DecoderWrapper) -> bool {
        match decoder {
            DecoderWrapper::ByteFallback(_) => true,
            DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(falls_back),
            _ => false,
        }
    }
    let bytes = tokenizer.get_decoder().is_some_and(falls_back).then_some(0..=255u8);
    bytes.into_iter().flatten().filter_map(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>"))).collect()
}

/// What the library makes of something. Where a tokenizer is damaged, it panics now and then.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let damaged = || TokenizerError::Failed("tokenizer.json is damaged: download it again".to_owned());
    let done = panic::catch_unwind(AssertUnwindSafe(call)).map_err(|_| damaged())?;
    done.map_err(|e| TokenizerError::Failed(e.to_string()))
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
        let say = Conversation::says;
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

    /// The tokenizers of tokenizers.json, with a chat template, and with flags on their control tokens.
    fn kinds() -> Vec<(String, Tokenizer)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tokenizers.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let template =
            "{% for m in messages %}<|{{ m.role }}|>\n {{ m.content }} {{ eos_token }}\n{% endfor %}<|end|> ";
        let mut kinds = Vec::new();
        for (kind, entry) in json.as_object().unwrap() {
            for flags in ["", "lstrip", "rstrip", "single_word", "normalized"] {
                let mut json = entry["tokenizer"].clone();
                for token in json["added_tokens"].as_array_mut().unwrap() {
                    if !flags.is_empty() {
                        token[flags] = true.into();
                    }
                }
                let mut config = entry["config"].clone();
                config["extra_special_tokens"] = serde_json::json!(["<|user|>", "<|end|>"]);
                config["eos_token"] = json["added_tokens"][1]["content"].clone();
                let files = [("tokenizer.json", json), ("tokenizer_config.json", config)];
                let mut files =
                    Files::from(files.map(|(name, json)| (name.to_owned(), json.to_string().into_bytes())));
                files.insert("chat_template.jinja".to_owned(), template.into());
                kinds.push((format!("{kind} {flags}"), Tokenizer::new(&files).unwrap()));
            }
        }
        kinds
    }

    #[test]
    fn quoted_control_tokens_change_nothing_outside_the_quote() {
        for (kind, tokenizer) in kinds() {
            let chat = |quote: &str| {
                let quoted = format!("b {quote} c");
                let said = [("user", "a stage"), ("user", quoted.as_str()), ("user", "the next")];
                tokenizer.encode_chat(&Conversation::of(&said), usize::MAX).unwrap()
            };
            let controls = |ids: &[u32]| {
                ids.iter()
                    .filter(|id| tokenizer.control(**id).is_some_and(|t| t != "<unk>" && t != "[UNK]"))
                    .count()
            };
            let plain = chat("d");
            let before = tokenizer.encode_chat(&Conversation::says("a stage"), usize::MAX);
            let before = before.unwrap().len() - 1;
            for quote in
                ["<|user|>", "<|end|>", "<s>", "</s> <mask>", "[SEP][CLS]", "<|user|><|user|>", "<|<|end|>|>"]
            {
                let ids = chat(quote);
                assert_eq!(ids[..before], plain[..before], "{kind}: {quote}");
                let same = ids.iter().rev().zip(plain.iter().rev()).take_while(|(a, b)| a == b).count();
                assert!(
                    same >= plain.len() - before - 8,
                    "{kind}: {quote}: {ids:?} ends otherwise than {plain:?}"
                );
                assert_eq!(controls(&ids), controls(&plain), "{kind}: {quote}: {ids:?}");
            }
        }
    }

    #[test]
    fn errors_of_templates_say_what_was_written() {
        let mut tokenizer = demo();
        let file = (
            "chat_template.jinja".to_owned(),
            b"{{ raise_exception('not ' ~ messages[0].content) }}".to_vec(),
        );
        tokenizer.chat = ChatTemplate::new(&Files::from([file]), &BTreeMap::new()).unwrap();
        let error =
            tokenizer.encode_chat(&Conversation::says("a <|bos|> b"), usize::MAX).unwrap_err().to_string();
        assert!(error.ends_with("not a <|bos|> b"), "{error}");
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
                if kind == "Unigram" && tokenizer.has_control(text) {
                    // There the library takes control tokens for pieces of text, whatever it is told.
                    let own = tokenizer.encode(text, false).unwrap();
                    assert!(
                        own.iter().all(|id| tokenizer.control(*id).is_none_or(|t| t == "<unk>")),
                        "{own:?}"
                    );
                    continue;
                }
                assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&case["ids"]), "{kind}: {text:?}");
                let input = tokenizer.encode_input(text, None, None).unwrap();
                assert_eq!(input.ids, ids(&case["ids"]), "{kind}, as an input: {text:?}");
            }
            for case in entry["pairs"].as_array().unwrap() {
                let (text, pair) = (case["text"].as_str().unwrap(), case["pair"].as_str().unwrap());
                if kind == "Unigram" && (tokenizer.has_control(text) || tokenizer.has_control(pair)) {
                    continue;
                }
                let both = tokenizer.encode_input(text, Some(pair), None).unwrap();
                assert_eq!(both.ids, ids(&case["ids"]), "{kind}: {text:?}, {pair:?}");
                assert_eq!(both.segments, ids(&case["segments"]), "{kind}: {text:?}, {pair:?}");
            }
        }
    }
}
