//! An answer's text as its tokens come, up to a stop string.

use super::{
    error::TokenizerError,
    stops::{Held, Written},
    tokenizer::Tokenizer,
};

/// Tokens before the newest that are decoded with it, at least: decoders look at their neighbours, and strip the beginning.
const CONTEXT: usize = 8;
/// Longest run of byte tokens that is held back until it is whole.
const MAX_RUN: usize = 1024;

/// Turns an answer's tokens into text as they come; in the end it is what all of them decoded at once are. Holds back what
/// may still change: an incomplete character, a run of byte tokens (which the library takes for text, or for bytes that
/// are none, as a whole), or the beginning of a stop string.
#[derive(Debug)]
pub(crate) struct TextStream {
    /// The newest tokens that are shown.
    window: Vec<u32>,
    /// So many bytes of the window's text are final.
    settled: usize,
    /// So many tokens at its end are bytes of a run.
    run: usize,
    /// Final text that is not out.
    held: Held,
    /// Control tokens since the window's text was last final: where in the rest of it, and what they are.
    controls: Vec<(usize, String)>,
    /// Tokens before which no stop string counts.
    min_tokens: u32,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text that is final.
    pub text: String,
    /// The number of the stop string that appeared; `text` ends before it.
    pub stop: Option<usize>,
}

impl TextStream {
    /// An empty answer with these stop strings, which do not count among its first `min_tokens` tokens.
    pub fn new(stops: Vec<String>, min_tokens: u32, tokenizer: &Tokenizer) -> Self {
        TextStream {
            window: Vec::new(),
            settled: 0,
            run: 0,
            held: Held::new(stops, |text| tokenizer.has_control(text)),
            controls: Vec::new(),
            min_tokens,
        }
    }

    /// Adds a token.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> Result<Piece, TokenizerError> {
        let counts = self.min_tokens == 0;
        self.min_tokens = self.min_tokens.saturating_sub(1);
        if let Some(control) = tokenizer.control(id) {
            if counts && self.held.looks_for_controls() {
                let at = self.text(tokenizer)?.len() - self.settled;
                self.controls.push((at, control));
            }
        } else {
            self.window.push(id);
            self.run = if tokenizer.is_byte(id) && self.run < MAX_RUN { self.run + 1 } else { 0 };
            if self.run > 0 && !self.held.has_stops() {
                return Ok(Piece { text: String::new(), stop: None });
            }
        }
        let tail = self.settle(tokenizer)?;
        if counts && let Some((text, stop)) = self.held.stopped(&tail) {
            // What comes behind it is nobody's.
            (self.window, self.settled, self.held) = (Vec::new(), 0, Held::default());
            return Ok(Piece { text, stop: Some(stop) });
        }
        let text = if counts { self.held.free() } else { self.held.all() };
        Ok(Piece { text, stop: None })
    }

    /// Whatever is still held back, once no more tokens come.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let text = self.text(tokenizer)?;
        let tail = self.written(text.get(self.settled..).unwrap_or(""));
        Ok(self.held.rest(&tail))
    }

    /// The window's text.
    fn text(&self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        if self.window.is_empty() { Ok(String::new()) } else { tokenizer.decode(&self.window, true) }
    }

    /// Holds what became final, and gives the rest of the window's text.
    fn settle(&mut self, tokenizer: &Tokenizer) -> Result<Written, TokenizerError> {
        let text = self.text(tokenizer)?;
        let before = self.window.len() - self.run;
        let end = match before {
            0 => 0,
            _ if self.run == 0 => text.len(),
            _ => tokenizer.decode(&self.window[..before], true)?.len(),
        };
        // An incomplete character shows as one wrong one at the end.
        let whole = text.get(..end).unwrap_or_default();
        let end = whole.strip_suffix('\u{fffd}').unwrap_or(whole).len();
        if let Some(new) = text.get(self.settled..end) {
            self.held.extend(&self.written(new));
            self.controls.retain(|(at, _)| *at > new.len());
            self.controls.iter_mut().for_each(|(at, _)| *at -= new.len());
            self.settled = end;
        }
        let rest = text.get(self.settled..).unwrap_or_default();
        self.shorten(rest, tokenizer)?;
        Ok(self.written(rest))
    }

    /// Some text behind what is held, with the control tokens in it.
    fn written(&self, text: &str) -> Written {
        let mut written = Written::default();
        let mut from = 0;
        for (at, control) in &self.controls {
            let Some(part) = text.get(from..*at) else { break };
            written.push(part);
            written.push_control(control);
            from = *at;
        }
        written.push(&text[from..]);
        written
    }

    /// Forgets tokens that the newest do not need: `rest` of the window's text is not final.
    fn shorten(&mut self, rest: &str, tokenizer: &Tokenizer) -> Result<(), TokenizerError> {
        let needed = CONTEXT + self.run;
        if self.window.len() < needed + CONTEXT {
            return Ok(());
        }
        let newest = &self.window[self.window.len() - needed..];
        let text = tokenizer.decode(newest, true)?;
        if text.ends_with(rest) {
            self.settled = text.len() - rest.len();
            self.window = newest.to_vec();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tokenizer::tests::demo;

    fn stream(text: &str, stops: &[&str]) -> (Vec<Piece>, String) {
        let tokenizer = demo();
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut stream = TextStream::new(stops, 0, &tokenizer);
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text, false).unwrap() {
            pieces.push(stream.push(id, &tokenizer).unwrap());
            if pieces.last().unwrap().stop.is_some() {
                break;
            }
        }
        let rest = stream.finish(&tokenizer).unwrap();
        (pieces, rest)
    }

    #[test]
    fn pieces_add_up_and_hold_no_half_characters() {
        for text in ["ROMEO:\nO, then, I'll be so.", "héllo wörld 🎭 漢字", "  two  spaces ", ""] {
            let (pieces, rest) = stream(text, &[]);
            assert!(pieces.iter().all(|p| !p.text.contains('\u{fffd}')), "{pieces:?}");
            let whole: String = pieces.into_iter().map(|p| p.text).collect();
            assert_eq!(whole + &rest, text);
        }
    }

    #[test]
    fn an_unfinished_character_comes_out_at_the_end() {
        let tokenizer = demo();
        let ids = tokenizer.encode("a🎭", false).unwrap();
        let mut stream = TextStream::new(vec![], 0, &tokenizer);
        let cut = &ids[..ids.len() - 1];
        let text: String = cut.iter().map(|id| stream.push(*id, &tokenizer).unwrap().text).collect();
        assert_eq!(text + &stream.finish(&tokenizer).unwrap(), tokenizer.decode(cut, false).unwrap());
    }

    #[test]
    fn endless_control_tokens_or_broken_characters_do_not_slow_it_down() {
        let tokenizer = demo();
        // Half of a character, again and again; then a token without text.
        let half = tokenizer.encode("🎭", false).unwrap()[0];
        for id in [half, 1] {
            let mut stream = TextStream::new(vec![], 0, &tokenizer);
            for _ in 0..20_000 {
                stream.push(id, &tokenizer).unwrap();
                assert!(stream.window.len() <= 2 * CONTEXT, "the window grows");
            }
        }
    }

    #[test]
    fn stops_before_a_stop_string_however_it_is_cut_into_tokens() {
        let (pieces, rest) = stream("Hark! who goes there? Speak", &["there?", "nothing"]);
        assert_eq!(pieces.last().unwrap().stop, Some(0));
        let whole: String = pieces.into_iter().map(|p| p.text).collect();
        assert_eq!((whole.as_str(), rest.as_str()), ("Hark! who goes ", ""));
        let (pieces, rest) = stream("Hark! who goes the", &["there?"]);
        let whole: String = pieces.iter().map(|p| p.text.as_str()).collect();
        assert_eq!(
            (whole.as_str(), rest.as_str()),
            ("Hark! who goes ", "the"),
            "a possible stop was let out"
        );
    }

    /// Tokenizers of every kind, with decoders that change texts at their ends or join tokens.
    fn kinds() -> Vec<(String, Tokenizer)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tokenizers.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let decoders = serde_json::json!({
            "BPE with byte fallback": [{"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}],
            "Unigram": [{"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": true}],
            "WordPiece": [{"type": "BPEDecoder", "suffix": "</w>"}, {"type": "CTC", "pad_token": "[PAD]", "word_delimiter_token": "a",
                "cleanup": true}, null]
        });
        let mut kinds = Vec::new();
        for (kind, entry) in json.as_object().unwrap() {
            let own = entry["tokenizer"]["decoder"].clone();
            let others = decoders[kind].as_array().cloned().unwrap_or_default();
            for decoder in [own].into_iter().chain(others) {
                let mut json = entry["tokenizer"].clone();
                let name = format!("{kind}, {}", decoder["type"]);
                if decoder["type"] == "BPEDecoder" {
                    // Its tokens say where words end.
                    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
                    let ends = |(text, id): (String, serde_json::Value)| match id.as_u64().unwrap() {
                        id if id > 9 && id % 3 == 0 => (text + "</w>", id.into()),
                        id => (text, id.into()),
                    };
                    *vocab = std::mem::take(vocab).into_iter().map(ends).collect();
                }
                json["decoder"] = decoder;
                let file = ("tokenizer.json".to_owned(), json.to_string().into_bytes());
                kinds.push((name, Tokenizer::new(&strata_proto::Files::from([file])).unwrap()));
            }
        }
        kinds
    }

    proptest::proptest! {
        #[test]
        fn a_stream_is_what_all_its_ids_at_once_are(picks in proptest::collection::vec((0..8u32, 0..400u32), 0..60)) {
            for (kind, tokenizer) in kinds_once() {
                let size = tokenizer.size() as u32;
                let bytes: Vec<u32> = (0..size).filter(|id| tokenizer.is_byte(*id)).collect();
                // Any token; often a control token; a byte, if there are such, more often one of a character's.
                let id = |(kind, pick): &(u32, u32)| match kind {
                    0 | 1 => pick % 4,
                    2 | 3 if !bytes.is_empty() => bytes[[0xe2, 0x82, 0xac, 0x0a, 0x41][*pick as usize % 5]],
                    4 if !bytes.is_empty() => bytes[*pick as usize % bytes.len()],
                    _ => pick % size,
                };
                let ids: Vec<u32> = picks.iter().map(id).collect();
                let mut stream = TextStream::new(vec!["never said".to_owned(), "n<s>".to_owned()], 0, tokenizer);
                let mut text = String::new();
                for id in &ids {
                    let piece = stream.push(*id, tokenizer).unwrap();
                    text += &piece.text;
                    if piece.stop.is_some() {
                        return Ok(());
                    }
                }
                text += &stream.finish(tokenizer).unwrap();
                let shown: Vec<u32> = ids.iter().copied().filter(|id| tokenizer.control(*id).is_none()).collect();
                let whole = if shown.is_empty() { String::new() } else { tokenizer.decode(&ids, false).unwrap() };
                proptest::prop_assert_eq!(text, whole, "{}: {:?}", kind, ids);
            }
        }
    }

    fn kinds_once() -> &'static [(String, Tokenizer)] {
        static KINDS: std::sync::OnceLock<Vec<(String, Tokenizer)>> = std::sync::OnceLock::new();
        KINDS.get_or_init(kinds)
    }

    #[test]
    fn stop_strings_may_be_or_hold_control_tokens() {
        let tokenizer = demo();
        let say = |text: &str| tokenizer.encode(text, false).unwrap();
        let ids = [say("Good night"), vec![1], say(", good"), vec![0], say(" night")].concat();
        let run = |stops: &[&str], min_tokens| {
            let stops = stops.iter().map(|s| (*s).to_owned()).collect();
            let mut stream = TextStream::new(stops, min_tokens, &tokenizer);
            let mut text = String::new();
            for (at, id) in ids.iter().enumerate() {
                let piece = stream.push(*id, &tokenizer).unwrap();
                text += &piece.text;
                if let Some(stop) = piece.stop {
                    return (text, Some((stop, at)));
                }
            }
            (text + &stream.finish(&tokenizer).unwrap(), None)
        };
        let at = |id: u32| ids.iter().position(|i| *i == id).unwrap();
        assert_eq!(run(&["no", "<|eos|>"], 0), ("Good night".into(), Some((1, at(1)))));
        assert_eq!(run(&["ght<|eos|>"], 0), ("Good ni".into(), Some((0, at(1)))));
        assert_eq!(run(&["good<|bos|> n"], 0).0, "Good night, ");
        // What is not shown does not part what is.
        assert_eq!(run(&["ht, g"], 0).0, "Good nig");
        assert_eq!(run(&["<|eos|><|bos|>"], 0), ("Good night, good night".into(), None));
        // Stop strings do not count before so many tokens.
        assert_eq!(run(&["night"], at(1) as u32).0, "Good night, good ");
        assert_eq!(run(&["<|eos|>"], at(1) as u32 + 1), ("Good night, good night".into(), None));
    }
}
