//! Rows whose step is under way, and which of its outputs are theirs.

use std::{collections::HashMap, ops::Range};

use super::{Output, SequenceId};

/// A row in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub sequence: SequenceId,
    pub epoch: u32,
    /// The position after its last one.
    pub end: u32,
    pub yields: bool,
    /// It is the one token that was sampled last.
    pub decodes: bool,
    /// Guesses of those that follow, which are in the row too.
    pub drafts: Vec<u32>,
}

impl Flight {
    /// Whether the row may yield these: some of its drafts, and one more token.
    pub fn may_yield(&self, outputs: &[(SequenceId, Output)]) -> bool {
        let Some((_, accepted)) = outputs.split_last() else { return false };
        let mut drafts = self.drafts.iter();
        accepted.iter().all(|(_, output)| drafts.next().is_some_and(|draft| *output == Output::Token(*draft)))
    }
}

/// Where the outputs of each sequence are. Of those that are not in one piece, the last piece.
pub(super) fn bursts(outputs: &[(SequenceId, Output)]) -> HashMap<SequenceId, Range<usize>> {
    let mut bursts: HashMap<SequenceId, Range<usize>> = HashMap::with_capacity(outputs.len());
    for (at, (sequence, _)) in outputs.iter().enumerate() {
        let burst = bursts.entry(*sequence).or_insert(at..at);
        *burst = if burst.end == at { burst.start..at + 1 } else { at..at + 1 };
    }
    bursts
}
