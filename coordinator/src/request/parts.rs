//! Parts of texts, as transformers' pipelines find them by what a model says of each token: entities that tokens of one class make
//! up, and answers to a question.

use std::ops::Range;

use strata_proto::v1::{self, Aggregation};

/// A token of an input, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which of the input's texts; none for what the tokenizer puts around them.
    pub text: Option<usize>,
    /// Bytes of that text.
    pub bytes: Range<usize>,
    /// Which of its words, as the tokenizer cuts them.
    pub word: Option<u32>,
    /// It goes on with the word of the token before.
    pub continues: bool,
    /// It is the one whose vector stands for an input.
    pub stands_for_all: bool,
}

/// A text whose parts are told in characters.
pub(crate) struct Characters<'a> {
    text: &'a str,
    /// First byte of each character, and the end.
    first: Vec<usize>,
}

impl<'a> Characters<'a> {
    /// Those of a text.
    pub fn of(text: &'a str) -> Self {
        Characters { text, first: text.char_indices().map(|(at, _)| at).chain([text.len()]).collect() }
    }

    /// The character that a byte is a part of; of the end, how many there are.
    fn at(&self, byte: usize) -> usize {
        self.first.partition_point(|first| *first <= byte).saturating_sub(1)
    }

    /// The part that the bytes lie in: as characters, as bytes, and what it says.
    fn part(&self, bytes: &Range<usize>) -> (Range<usize>, Range<usize>, &'a str) {
        let (start, end) = (self.at(bytes.start), self.at(bytes.end).max(self.at(bytes.start)));
        let bytes = self.first[start]..self.first[end];
        (start..end, bytes.clone(), &self.text[bytes])
    }
}

/// What the tokens of a text make up: `logits` has a row of classes, called `labels`, for each of `places`. Entities whose
/// label is one of `ignored` are left out.
pub(crate) fn entities(
    (text, places): (&str, &[Place]),
    logits: &[f32],
    labels: &[String],
    aggregation: Aggregation,
    ignored: &[String],
) -> Vec<v1::Entity> {
    let rows = places.iter().zip(logits.chunks_exact(labels.len().max(1))).enumerate();
    let tokens = rows.filter(|(_, (place, _))| place.text.is_some()).map(|(index, (place, logits))| Found {
        scores: softmax(logits),
        bytes: place.bytes.clone(),
        index: Some(index as u32),
        continues: place.continues,
    });
    let found = match aggregation {
        Aggregation::None | Aggregation::Simple => tokens.collect(),
        Aggregation::First | Aggregation::Average | Aggregation::Max => words(tokens, aggregation),
    };
    let label = |class: usize| labels.get(class).map_or("", String::as_str);
    let named = found.into_iter().map(|found| {
        let (class, score) = best(&found.scores);
        (label(class), score, found.bytes, found.index)
    });
    let whole = match aggregation {
        Aggregation::None => named.collect(),
        _ => grouped(named.map(|(label, score, bytes, _)| (label, score, bytes))),
    };
    let characters = Characters::of(text);
    let kept = whole.into_iter().filter(|(label, ..)| !ignored.iter().any(|name| name == label));
    let entity = |(label, score, bytes, index): (&str, f32, Range<usize>, Option<u32>)| {
        let (within, bytes, text) = characters.part(&bytes);
        v1::Entity {
            label: label.to_owned(),
            score,
            text: text.to_owned(),
            start: within.start as u32,
            end: within.end as u32,
            start_byte: bytes.start as u32,
            end_byte: bytes.end as u32,
            index,
        }
    };
    kept.map(entity).collect()
}

/// A token, or a word, and the scores of its classes.
struct Found {
    scores: Vec<f32>,
    bytes: Range<usize>,
    index: Option<u32>,
    continues: bool,
}

/// Tokens as words.
fn words(tokens: impl Iterator<Item = Found>, aggregation: Aggregation) -> Vec<Found> {
    let mut words: Vec<Vec<Found>> = Vec::new();
    for token in tokens {
        match words.last_mut().filter(|_| token.continues) {
            Some(word) => word.push(token),
            None => words.push(vec![token]),
        }
    }
    let word = |mut tokens: Vec<Found>| {
        let end = tokens.last()?.bytes.end;
        let count = tokens.len() as f32;
        let chosen = match aggregation {
            // Of equals the first.
            Aggregation::Max => tokens.iter().enumerate().fold((0, f32::NEG_INFINITY), |most, (i, token)| {
                let score = best(&token.scores).1;
                if score > most.1 { (i, score) } else { most }
            }),
            _ => (0, 0.0),
        };
        if aggregation == Aggregation::Average {
            let (first, others) = tokens.split_first_mut()?;
            for other in others {
                first.scores.iter_mut().zip(&other.scores).for_each(|(sum, score)| *sum += score);
            }
            first.scores.iter_mut().for_each(|sum| *sum /= count);
        }
        let begin = tokens.first()?.bytes.start;
        let scores = tokens.swap_remove(chosen.0).scores;
        Some(Found { scores, bytes: begin..end, index: None, continues: false })
    };
    words.into_iter().filter_map(word).collect()
}

/// Neighbours of one class put together.
fn grouped<'a>(
    named: impl Iterator<Item = (&'a str, f32, Range<usize>)>,
) -> Vec<(&'a str, f32, Range<usize>, Option<u32>)> {
    let mut groups: Vec<(&str, &str, Vec<f32>, Range<usize>)> = Vec::new();
    for (label, score, bytes) in named {
        let begins = label.starts_with("B-");
        let class = label.strip_prefix("B-").or(label.strip_prefix("I-")).unwrap_or(label);
        match groups.last_mut().filter(|(last, ..)| *last == class && !begins) {
            Some((_, _, scores, whole)) => {
                scores.push(score);
                whole.end = bytes.end;
            }
            None => groups.push((class, label, vec![score], bytes)),
        }
    }
    let mean = |scores: &[f32]| scores.iter().sum::<f32>() / scores.len() as f32;
    // Whatever stands before the first hyphen is no part of a group's name.
    let name = |label: &'a str| label.split_once('-').map_or(label, |(_, name)| name);
    groups.into_iter().map(|(_, label, scores, bytes)| (name(label), mean(&scores), bytes, None)).collect()
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut scores: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
    let total: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= total);
    scores
}

/// The highest score and its class; of equals the first.
fn best(scores: &[f32]) -> (usize, f32) {
    let higher = |most: (usize, f32), (class, score): (usize, &f32)| {
        if *score > most.1 { (class, *score) } else { most }
    };
    scores.iter().enumerate().fold((0, f32::NEG_INFINITY), higher)
}

/// Answers to a question from the windows that its context was read in.
pub(crate) struct Answers<'a> {
    context: Characters<'a>,
    top_k: usize,
    max_answer_tokens: usize,
    found: Vec<v1::FoundAnswer>,
    /// The least probability that a window has no answer, and its logits.
    none: Option<v1::FoundAnswer>,
}

impl<'a> Answers<'a> {
    /// None yet. `may_be_none`: that there is no answer is one too.
    pub fn new(context: &'a str, top_k: usize, max_answer_tokens: usize, may_be_none: bool) -> Self {
        let none = may_be_none.then(|| v1::FoundAnswer { score: f32::INFINITY, ..Default::default() });
        let context = Characters::of(context);
        Answers { context, top_k, max_answer_tokens, found: Vec::new(), none }
    }

    /// Looks through a window: `logits` has those of a beginning and an end for each of `places`.
    pub fn add(&mut self, places: &[Place], logits: &[f32]) {
        let column = |which: usize| logits.iter().skip(which).step_by(2).copied();
        let is_open = |place: &Place| place.text == Some(1) || place.stands_for_all;
        let open: Vec<bool> = places.iter().map(is_open).collect();
        // What cannot be a part of an answer has no share of the probability.
        let shut = |(logit, open): (f32, &bool)| if *open { logit } else { -10_000.0 };
        let [mut starts, mut ends] = [0, 1].map(|which| {
            let logits: Vec<f32> = column(which).zip(&open).map(shut).collect();
            softmax(&logits)
        });
        let (Some(start), Some(end)) = (starts.first_mut(), ends.first_mut()) else { return };
        let score = *start * *end;
        (*start, *end) = (0.0, 0.0);
        if let Some(none) = self.none.as_mut().filter(|none| score < none.score) {
            none.score = score;
            (none.start_logit, none.end_logit) = (logits[0], logits[1]);
        }
        for (start, end, score) in self.spans(places, &starts, &ends) {
            let (within, bytes, text) = self.context.part(&whole_words(places, start, end));
            let same = |found: &&mut v1::FoundAnswer| found.text.to_lowercase() == text.to_lowercase();
            match self.found.iter_mut().find(same) {
                Some(found) => found.score += score,
                None => self.found.push(v1::FoundAnswer {
                    text: text.to_owned(),
                    score,
                    start: within.start as u32,
                    end: within.end as u32,
                    start_byte: bytes.start as u32,
                    end_byte: bytes.end as u32,
                    start_logit: logits[2 * start],
                    end_logit: logits[2 * end + 1],
                }),
            }
        }
    }

    /// The likeliest parts of a window, from token to token; more of them than are wanted, for some become the same words.
    fn spans(&self, places: &[Place], starts: &[f32], ends: &[f32]) -> Vec<(usize, usize, f32)> {
        let mut spans = Vec::new();
        let in_context = |at: &usize| places[*at].text == Some(1);
        for start in (0..places.len()).filter(in_context) {
            let last = (start + self.max_answer_tokens).min(places.len());
            for end in (start..last).filter(in_context) {
                spans.push((start, end, starts[start] * ends[end]));
            }
        }
        spans.sort_by(|a, b| b.2.total_cmp(&a.2));
        spans.truncate(2 * self.top_k + 10);
        spans
    }

    /// The best, first.
    pub fn best(self) -> Vec<v1::FoundAnswer> {
        let mut found = self.found;
        found.extend(self.none);
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(self.top_k);
        found
    }
}

/// Bytes from the beginning of the first token's word to the end of the last one's, as far as the window holds them.
fn whole_words(places: &[Place], start: usize, end: usize) -> Range<usize> {
    let own = places[start].bytes.start..places[end].bytes.end;
    let (Some(first), Some(last)) = (places[start].word, places[end].word) else { return own };
    let of = |word| places.iter().filter(move |p| p.text == Some(1) && p.word == Some(word));
    let begin = of(first).map(|p| p.bytes.start).next().unwrap_or(own.start);
    begin..of(last).map(|p| p.bytes.end).next_back().unwrap_or(own.end)
}
