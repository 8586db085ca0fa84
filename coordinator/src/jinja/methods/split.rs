//! Texts in parts: what is around them taken off, and split.

use super::{
    super::{
        access::part,
        arguments::{Arguments, flag, text},
        bounds::Bounds,
        error::{Error, Result},
        text::is_space,
        value::Value,
    },
    text_or,
};

/// Which ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Ends {
    Both,
    Left,
    Right,
}

/// The text without these characters at its ends, or without white space.
pub(in super::super) fn strip<'a>(text: &'a str, chars: Option<&Value>, ends: Ends) -> Result<&'a str> {
    let chars = match chars {
        None | Some(Value::None) => None,
        Some(chars) => Some(super::text("strip()", chars)?),
    };
    let is_taken = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(match ends {
        Ends::Both => text.trim_matches(is_taken),
        Ends::Left => text.trim_start_matches(is_taken),
        Ends::Right => text.trim_end_matches(is_taken),
    })
}

/// `split(sep=None, maxsplit=-1)`, or from the right.
pub(super) fn split(bounds: &Bounds, from: &str, arguments: &Arguments, from_right: bool) -> Result<Value> {
    let [separator, most] = arguments.bind("split()", ["sep", "maxsplit"], 0)?;
    let most = match most {
        None => None,
        Some(most) => usize::try_from(super::super::arguments::int("split()", &most)?).ok(),
    };
    let parts: Vec<&str> = match separator {
        None | Some(Value::None) => words(from, most, from_right),
        Some(separator) => {
            let separator = text("split()", &separator)?;
            if separator.is_empty() {
                return Err(Error::new("empty separator"));
            }
            let limit = most.map_or(usize::MAX, |most| most.saturating_add(1));
            match from_right {
                false => from.splitn(limit, &*separator).collect(),
                true => {
                    let mut parts: Vec<_> = from.rsplitn(limit, &*separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
    };
    texts(bounds, parts)
}

/// A list of texts.
fn texts(bounds: &Bounds, parts: Vec<&str>) -> Result<Value> {
    let parts = parts.into_iter().map(|part| Value::text(bounds, part));
    Value::list(bounds, parts.collect::<Result<_>>()?)
}

/// Words, split at white space so many times at most; the last part keeps its inner white space.
fn words(from: &str, most: Option<usize>, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = from;
    loop {
        rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
        if rest.is_empty() {
            break;
        }
        if most.is_some_and(|most| parts.len() >= most) {
            // What is left keeps the white space at its other end.
            parts.push(rest);
            break;
        }
        let at = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        match (at, from_right) {
            (None, _) => {
                parts.push(rest);
                break;
            }
            (Some(at), false) => {
                parts.push(&rest[..at]);
                rest = &rest[at..];
            }
            (Some(at), true) => {
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(&rest[at + width..]);
                rest = &rest[..at + width];
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// Lines, without their ends.
pub(in super::super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let width = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..at + if keep_ends { width } else { 0 }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

pub(super) fn lines(bounds: &Bounds, from: &str, arguments: &Arguments) -> Result<Value> {
    let [keep_ends] = arguments.bind("splitlines()", ["keepends"], 0)?;
    texts(bounds, split_lines(from, flag(&keep_ends)))
}

/// `partition` and `rpartition`: what is before a separator, it, and what is behind.
pub(super) fn partition(
    bounds: &Bounds,
    from: &str,
    arguments: &Arguments,
    from_right: bool,
) -> Result<Value> {
    let [separator] = arguments.bind("partition()", ["sep"], 1)?;
    let separator = text_or("partition()", separator, "")?;
    if separator.is_empty() {
        return Err(Error::new("empty separator"));
    }
    let found = if from_right { from.rsplit_once(&*separator) } else { from.split_once(&*separator) };
    let parts = match found {
        Some((before, behind)) => [before, &separator, behind],
        None if from_right => ["", "", from],
        None => [from, "", ""],
    };
    Value::tuple(bounds, parts.map(Value::from).into())
}

/// Where a text is in a part of another, in characters, from the left or the right.
pub(super) fn find(from: &str, arguments: &Arguments, from_right: bool) -> Result<Option<usize>> {
    let [wanted, first, end] = arguments.bind("find()", ["sub", "start", "end"], 1)?;
    let wanted = text_or("find()", wanted, "")?;
    let Some((before, inside)) = part(from, bound(first)?, bound(end)?) else { return Ok(None) };
    let at = if from_right { inside.rfind(&*wanted) } else { inside.find(&*wanted) };
    Ok(at.map(|at| before + inside[..at].chars().count()))
}

/// A bound of a part of a text; None is none.
pub(super) fn bound(value: Option<Value>) -> Result<Option<i128>> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(value) => super::super::arguments::int("a bound", &value).map(Some),
    }
}
