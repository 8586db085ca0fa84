//! What fits a terminal.

use std::os::fd::AsFd;

/// Columns of a terminal; none of a file or pipe, where nothing has to fit.
pub fn width(of: impl AsFd) -> Option<usize> {
    terminal_size::terminal_size_of(of).map(|(width, _)| usize::from(width.0)).filter(|width| *width > 0)
}

/// A text of at most `width` characters (1 at least): what is in its middle becomes `…`.
pub fn clipped(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let head = text.chars().take(kept.div_ceil(2));
    let tail = text.chars().skip(length - kept / 2);
    head.chain(['…']).chain(tail).collect()
}

/// A sentence in lines of at most `width` characters, where its words allow it.
pub fn wrapped(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(clipped("worker-0/cpu:0", 14), "worker-0/cpu:0");
        assert_eq!(clipped("worker-0/cpu:0", 9), "work…pu:0");
        assert_eq!(clipped("wörkör-0", 4), "wö…0");
        assert_eq!(clipped("worker", 1), "…");
    }

    #[test]
    fn sentences_break_between_words() {
        assert_eq!(wrapped("one two three", Some(7)), "one two\nthree");
        assert_eq!(wrapped("one extraordinary", Some(5)), "one\nextraordinary");
        assert_eq!(wrapped("one two three", None), "one two three");
    }
}
