//! Texts to tokens that say where they come from.

use strata_proto::v1::Truncation;
use tokenizers::{Encoding, ModelWrapper, TruncationDirection};

use super::{Located, Tokenizer, guarded};
use crate::request::{error::TokenizerError, parts::Place};

impl Tokenizer {
    /// A text, with what the tokenizer puts around it. None of it becomes a control token. `longest` cuts what is longer.
    ///
    /// # Errors
    /// If the tokenizer fails on this text, or `longest` leaves no room for a text.
    pub fn locate(&self, text: &str, longest: Option<(u32, Truncation)>) -> Result<Located, TokenizerError> {
        let (first, _, dropped) = self.read((text, None), longest, |_| false)?;
        Ok(Located { dropped, ..self.located([(text, first), ("", Encoding::default())])? })
    }

    /// A question with each window of its context: at most `longest` tokens in all, of which each window but the first has
    /// `stride` of the context in common with the one before.
    ///
    /// # Errors
    /// If the tokenizer fails on a text, or the question leaves no room for more of the context than the stride.
    pub fn windows(
        &self,
        question: &str,
        context: &str,
        longest: u32,
        stride: u32,
    ) -> Result<Vec<Located>, TokenizerError> {
        let (first, second, _) = self.read((question, Some(context)), None, |_| false)?;
        let mut second = second.unwrap_or_default();
        let around = first.len() + self.around(true);
        let room = (longest as usize).checked_sub(around).filter(|room| *room > stride as usize);
        let room = room.ok_or_else(|| {
            TokenizerError::Failed(format!(
                "a window of {longest} tokens leaves no room beside {around} of the question and {stride} that windows share"
            ))
        })?;
        second.truncate(room, stride as usize, TruncationDirection::Right);
        let others = second.take_overflowing();
        let window = |window: Encoding| self.located([(question, first.clone()), (context, window)]);
        [second].into_iter().chain(others).map(window).collect()
    }

    /// What texts are with what the tokenizer puts around them; the second may be empty.
    fn located(&self, texts: [(&str, Encoding); 2]) -> Result<Located, TokenizerError> {
        // Who puts something around texts moves offsets, and did so when it read them: they are taken from there.
        let mut offsets = texts.each_ref().map(|(_, e)| e.get_offsets().to_vec().into_iter());
        let [(first, one), (second, two)] = texts;
        let (texts, two) = ([first, second], (!two.is_empty()).then_some(two));
        let encoding = guarded(|| self.reader.tokenizer().post_process(one, two, true))?;
        let (unknown, stands) = (self.role("unk_token"), self.role("cls_token"));
        let is = |role: Option<(&str, u32)>, id: u32| role.is_some_and(|(_, own)| own == id);
        let marks_words = match self.inner.get_model() {
            ModelWrapper::WordPiece(model) => !model.continuing_subword_prefix.is_empty(),
            ModelWrapper::BPE(model) => {
                model.continuing_subword_prefix.as_ref().is_some_and(|prefix| !prefix.is_empty())
            }
            _ => false,
        };
        let special = encoding.get_special_tokens_mask();
        let sequences = encoding.get_sequence_ids();
        let (words, tokens) = (encoding.get_word_ids(), encoding.get_tokens());
        let mut place = |(at, id): (usize, &u32)| {
            let sequence = sequences.get(at).copied().flatten().filter(|_| special.get(at) == Some(&0));
            let own = sequence.and_then(|s| offsets.get_mut(s)?.next());
            let (start, end) = own.unwrap_or_default();
            let text = texts.get(sequence.unwrap_or(0)).copied().unwrap_or_default();
            // As transformers' pipelines tell it: where continuations are marked, by the mark; else by spaces.
            let continues = match text.get(start..end) {
                Some(own) if marks_words => {
                    tokens.get(at).is_some_and(|token| token.chars().count() != own.chars().count())
                }
                _ => {
                    let before = text.get(..start).and_then(|text| text.chars().next_back());
                    let first = text.get(start..).and_then(|text| text.chars().next());
                    before.is_some_and(|before| before != ' ' && first != Some(' '))
                }
            };
            Place {
                text: sequence,
                bytes: start..end,
                word: words.get(at).copied().flatten(),
                continues: continues && !is(unknown, *id),
                stands_for_all: is(stands, *id),
            }
        };
        let places = encoding.get_ids().iter().enumerate().map(&mut place).collect();
        Ok(Located {
            ids: encoding.get_ids().to_vec(),
            segments: if self.tells_segments { encoding.get_type_ids().to_vec() } else { Vec::new() },
            places,
            dropped: 0,
        })
    }
}
