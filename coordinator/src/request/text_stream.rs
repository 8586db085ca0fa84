//! An answer's text as its tokens come, up to a stop string.

use super::{error::TokenizerError, tokenizer::Tokenizer};

/// Tokens after which an incomplete character is taken for a wrong one.
const MAX_PENDING: usize = 8;

/// Turns an answer's tokens into text as they come. Holds back what may still change: an incomplete character,
/// or the beginning of a stop string.
#[derive(Debug)]
pub(crate) struct TextStream {
    ids: Vec<u32>,
    /// Decoding starts here, so that the tokenizer sees enough context for spaces.
    prefix: usize,
    /// Text of ids before this is out (or held).
    read: usize,
    held: String,
    stops: Vec<String>,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Text that is final.
    pub text: String,
    /// A stop string appeared; `text` ends before it.
    pub stopped: bool,
}

impl TextStream {
    /// An empty answer with these stop strings.
    pub fn new(stops: Vec<String>) -> Self {
        TextStream { ids: Vec::new(), prefix: 0, read: 0, held: String::new(), stops }
    }

    /// Adds a token.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> Result<Piece, TokenizerError> {
        self.ids.push(id);
        let before = tokenizer.decode(&self.ids[self.prefix..self.read], false)?;
        let after = tokenizer.decode(&self.ids[self.prefix..], false)?;
        // A character has at most four bytes: an end that stays broken for longer is broken for good.
        let incomplete = after.ends_with('\u{fffd}') && self.ids.len() - self.read <= MAX_PENDING;
        if !incomplete && let Some(new) = after.get(before.len()..) {
            self.held.push_str(new);
            self.prefix = self.read;
            self.read = self.ids.len();
        }
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Ok(Piece { text: std::mem::take(&mut self.held), stopped: true });
        }
        let free = self.held.len() - self.possible_stop();
        let rest = self.held.split_off(free);
        Ok(Piece { text: std::mem::replace(&mut self.held, rest), stopped: false })
    }

    /// Whatever is still held back, once no more tokens come.
    ///
    /// # Errors
    /// If the tokenizer cannot decode it.
    pub fn finish(mut self, tokenizer: &Tokenizer) -> Result<String, TokenizerError> {
        let before = tokenizer.decode(&self.ids[self.prefix..self.read], false)?;
        let after = tokenizer.decode(&self.ids[self.prefix..], false)?;
        self.held.push_str(after.get(before.len()..).unwrap_or(""));
        Ok(self.held)
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn possible_stop(&self) -> usize {
        let mut longest = 0;
        for stop in &self.stops {
            for (at, _) in self.held.char_indices() {
                let tail = &self.held[at..];
                if stop.starts_with(tail) {
                    longest = longest.max(tail.len());
                    break;
                }
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tokenizer::tests::demo;

    fn stream(text: &str, stops: &[&str]) -> (Vec<Piece>, String) {
        let tokenizer = demo();
        let mut stream = TextStream::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text, false).unwrap() {
            pieces.push(stream.push(id, &tokenizer).unwrap());
            if pieces.last().unwrap().stopped {
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
        let mut stream = TextStream::new(vec![]);
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
            let mut stream = TextStream::new(vec![]);
            for _ in 0..20_000 {
                stream.push(id, &tokenizer).unwrap();
                assert!(stream.ids.len() - stream.prefix <= 2 * MAX_PENDING + 2, "the window grows");
            }
        }
    }

    #[test]
    fn stops_before_a_stop_string_however_it_is_cut_into_tokens() {
        let (pieces, rest) = stream("Hark! who goes there? Speak", &["there?", "nothing"]);
        assert!(pieces.last().unwrap().stopped);
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
}
