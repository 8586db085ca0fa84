//! Where an answer's text ends: the first of its stop strings, and what is held back because it may be the beginning of one.

use std::ops::Range;

/// A stop string.
#[derive(Debug)]
struct Stop {
    text: String,
    /// It is, or holds, a control token, which answers do not show: it is looked for where they are written out.
    controls: bool,
}

/// Text with control tokens written out, and where these are.
#[derive(Debug, Clone, Default)]
pub(super) struct Written {
    text: String,
    controls: Vec<Range<usize>>,
}

impl Written {
    /// Adds text that answers show.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Adds a control token.
    pub fn push_control(&mut self, text: &str) {
        let at = self.text.len();
        self.text.push_str(text);
        self.controls.push(at..self.text.len());
    }

    fn extend(&mut self, other: &Written) {
        let at = self.text.len();
        self.text.push_str(&other.text);
        self.controls.extend(other.controls.iter().map(|c| c.start + at..c.end + at));
    }

    /// What answers show of its first `end` bytes.
    fn shown(&self, end: usize) -> String {
        let mut shown = String::with_capacity(end);
        let mut from = 0;
        for control in self.controls.iter().take_while(|c| c.start < end) {
            shown.push_str(&self.text[from..control.start]);
            from = control.end.min(end);
        }
        shown.push_str(&self.text[from..end]);
        shown
    }

    /// Where byte `at` of what is shown is.
    fn place(&self, at: usize) -> usize {
        let mut place = at;
        for control in &self.controls {
            if control.start > place {
                break;
            }
            place += control.len();
        }
        place
    }

    /// Takes the first `end` bytes away, and gives what answers show of them.
    fn take(&mut self, end: usize) -> String {
        let shown = self.shown(end);
        self.text.drain(..end);
        self.controls.retain(|c| c.end > end);
        for control in &mut self.controls {
            *control = control.start.saturating_sub(end)..control.end - end;
        }
        shown
    }
}

/// Text of an answer that has not been given out yet.
#[derive(Debug, Default)]
pub(super) struct Held {
    written: Written,
    stops: Vec<Stop>,
}

impl Held {
    /// Nothing yet. `has_control` says whether a text is, or holds, a control token.
    pub fn new(stops: Vec<String>, has_control: impl Fn(&str) -> bool) -> Self {
        let stop = |text: String| Stop { controls: has_control(&text), text };
        Held { written: Written::default(), stops: stops.into_iter().map(stop).collect() }
    }

    /// Whether there is anything to look for.
    pub fn has_stops(&self) -> bool {
        !self.stops.is_empty()
    }

    /// Whether control tokens matter.
    pub fn looks_for_controls(&self) -> bool {
        self.stops.iter().any(|stop| stop.controls)
    }

    /// Adds text.
    pub fn extend(&mut self, written: &Written) {
        self.written.extend(written);
    }

    /// The text before the first stop string, and its number, if one appears once `tail` follows.
    pub fn stopped(&self, tail: &Written) -> Option<(String, usize)> {
        if self.stops.is_empty() {
            return None;
        }
        let mut whole = self.written.clone();
        whole.extend(tail);
        let shown = whole.shown(whole.text.len());
        let place = |(number, stop): (usize, &Stop)| match stop.controls {
            true => Some((whole.text.find(&stop.text)?, number)),
            false => Some((whole.place(shown.find(&stop.text)?), number)),
        };
        let (at, number) = self.stops.iter().enumerate().filter_map(place).min()?;
        Some((whole.shown(at), number))
    }

    /// Takes what cannot be the beginning of a stop string.
    pub fn free(&mut self) -> String {
        let all = self.written.text.len();
        let shown = self.written.shown(all);
        let begins = |stop: &Stop| match stop.controls {
            true => beginning(&self.written.text, &stop.text),
            false => beginning(&shown, &stop.text).map(|at| self.written.place(at)),
        };
        let free = self.stops.iter().filter_map(begins).min().unwrap_or(all);
        self.written.take(free)
    }

    /// Takes all of it.
    pub fn all(&mut self) -> String {
        self.written.take(self.written.text.len())
    }

    /// All of it, and what follows.
    pub fn rest(mut self, tail: &Written) -> String {
        self.written.extend(tail);
        self.written.shown(self.written.text.len())
    }
}

/// Where the longest end of `text` begins that is a beginning of `stop`.
fn beginning(text: &str, stop: &str) -> Option<usize> {
    let first = text.len().saturating_sub(stop.len().saturating_sub(1));
    let starts = text.char_indices().map(|(at, _)| at).filter(|at| *at >= first);
    starts.into_iter().find(|at| stop.starts_with(&text[*at..]))
}
