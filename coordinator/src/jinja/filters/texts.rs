//! Filters of texts.

use std::fmt::Write;

use super::{
    super::{
        arguments::{Arguments, count, flag, text},
        bounds::Bounds,
        error::{Error, Result},
        format::percent,
        methods::{Ends, capitalize, justify, replace, split_lines, strip},
        text::{escape_html, is_space},
        value::{Dict, Text, Value},
    },
    no_filter,
};

/// Lines that `pprint` does not break.
const PRINTED_LINE: usize = 80;

/// Applies the filter of this name.
pub(super) fn apply(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    let shown = || value.display(bounds);
    match name {
        "string" | "safe" | "escape" | "e" | "forceescape" | "lower" | "upper" | "title" | "capitalize"
        | "wordcount" | "striptags" | "urlencode" | "pprint" => {
            arguments.none(name)?;
            match name {
                "string" if matches!(value, Value::Str(_)) => Ok(value.clone()),
                "string" => Value::text(bounds, shown()?),
                "safe" => Ok(Value::Str(Text { text: shown()?.into(), safe: true })),
                "escape" | "e" if matches!(value, Value::Str(Text { safe: true, .. })) => Ok(value.clone()),
                "escape" | "e" | "forceescape" => {
                    let escaped = escape_html(&shown()?);
                    bounds.reserve_text(escaped.len())?;
                    Ok(Value::Str(Text { text: escaped.into(), safe: true }))
                }
                "lower" => Value::text(bounds, shown()?.to_lowercase()),
                "upper" => Value::text(bounds, shown()?.to_uppercase()),
                "capitalize" => Value::text(bounds, capitalize(&shown()?)),
                "title" => Value::text(bounds, title(&shown()?)),
                "wordcount" => {
                    let is_word = |c: char| c == '_' || c.is_alphanumeric();
                    Ok(Value::from(shown()?.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count()))
                }
                "striptags" => Value::text(bounds, strip_tags(&shown()?)),
                "urlencode" => url_encode(bounds, value),
                _ => pretty(bounds, value),
            }
        }
        "trim" => {
            let [chars] = arguments.bind(name, ["chars"], 0)?;
            Value::text(bounds, strip(&shown()?, chars.as_ref(), Ends::Both)?)
        }
        "replace" => {
            let [old, new, most] = arguments.bind(name, ["old", "new", "count"], 2)?;
            let shown_or = |value: Option<Value>| value.unwrap_or(Value::None).display(bounds);
            let most = most.as_ref().and_then(Value::as_int);
            replace(bounds, &shown()?, &shown_or(old)?, &shown_or(new)?, most)
        }
        "center" => {
            let [width] = arguments.bind(name, ["width"], 0)?;
            justify(bounds, &shown()?, count(name, &width.unwrap_or(Value::Int(80)))?, ' ', name)
        }
        "format" => {
            let values = match (arguments.positional.is_empty(), arguments.named.is_empty()) {
                (false, false) => {
                    return Err(Error::new("format: expected arguments with names, or without, not both"));
                }
                (_, true) => Value::tuple(bounds, arguments.positional.clone())?,
                (_, false) => {
                    let mut named = Dict::default();
                    for (name, value) in &arguments.named {
                        named.insert(bounds, Value::from(&**name), value.clone())?;
                    }
                    Value::dict(named)
                }
            };
            Value::text(bounds, percent(bounds, &shown()?, &values)?)
        }
        "indent" => indent(bounds, &shown()?, arguments),
        "truncate" => truncate(bounds, &shown()?, arguments),
        "wordwrap" => word_wrap(bounds, &shown()?, arguments),
        other => Err(no_filter(other)),
    }
}

/// Every word's first letter large; words begin behind white space, dashes and opening brackets.
fn title(text: &str) -> String {
    let mut begins = true;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = is_space(c) || "-({[<".contains(c);
    }
    out
}

fn indent(bounds: &Bounds, from: &str, arguments: &Arguments) -> Result<Value> {
    let [width, first, blank] = arguments.bind("indent", ["width", "first", "blank"], 0)?;
    let by = match width.unwrap_or(Value::Int(4)) {
        Value::Str(text) => text.text.to_string(),
        width => {
            let width = count("indent", &width)?;
            bounds.reserve_text(width)?;
            " ".repeat(width)
        }
    };
    // As if the text ended with one line break more than it does.
    let with_end = format!("{from}\n");
    let lines = split_lines(&with_end, false);
    bounds.reserve_text(from.len().saturating_add(lines.len().saturating_mul(by.len() + 1)))?;
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        out.push_str(if i > 0 { "\n" } else { "" });
        let is_indented = if i == 0 { flag(&first) } else { flag(&blank) || !line.is_empty() };
        out.push_str(if is_indented { &by } else { "" });
        out.push_str(line);
    }
    Value::text(bounds, out)
}

fn truncate(bounds: &Bounds, from: &str, arguments: &Arguments) -> Result<Value> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill_words, end, leeway] = arguments.bind("truncate", names, 0)?;
    let length = count("truncate", &length.unwrap_or(Value::Int(255)))?;
    let end = end.map_or(Ok("...".into()), |end| text("truncate", &end))?;
    let leeway = match leeway {
        None | Some(Value::None) => 5,
        Some(leeway) => count("truncate", &leeway)?,
    };
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(Error::new(format!("expected length >= {}, got {length}", end.chars().count())));
    };
    if from.chars().count() <= length.saturating_add(leeway) {
        return Value::text(bounds, from);
    }
    let cut: String = from.chars().take(kept).collect();
    let cut = match flag(&kill_words) {
        true => &cut,
        false => cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before),
    };
    Value::text(bounds, format!("{cut}{end}"))
}

fn word_wrap(bounds: &Bounds, from: &str, arguments: &Arguments) -> Result<Value> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, break_words, between, hyphens] = arguments.bind("wordwrap", names, 0)?;
    let width = count("wordwrap", &width.unwrap_or(Value::Int(79)))?;
    if width == 0 {
        return Err(Error::new("wordwrap: expected a width of at least 1"));
    }
    let between = match between {
        None | Some(Value::None) => "\n".into(),
        Some(between) => text("wordwrap", &between)?,
    };
    let is_set = |value: Option<Value>| value.is_none_or(|value| value.is_true());
    let (break_words, hyphens) = (is_set(break_words), is_set(hyphens));
    let mut lines: Vec<String> = Vec::new();
    for line in split_lines(from, false) {
        let wrapped = wrap(line, width, break_words, hyphens);
        // A blank line stays one.
        lines.extend(if wrapped.is_empty() { vec![String::new()] } else { wrapped });
    }
    bounds.reserve_text(from.len().saturating_add(lines.len().saturating_mul(between.len())))?;
    Value::text(bounds, lines.join(&between))
}

/// A line in lines of at most so many characters, broken at white space and behind hyphens.
fn wrap(line: &str, width: usize, break_words: bool, hyphens: bool) -> Vec<String> {
    let mut chunks: std::collections::VecDeque<Vec<char>> = chunks(line, hyphens).into();
    let is_blank = |chunk: &[char]| chunk.iter().all(|c| is_space(*c));
    let mut lines: Vec<String> = Vec::new();
    while !chunks.is_empty() {
        // A line but the first does not begin with white space.
        if !lines.is_empty() && chunks.front().is_some_and(|chunk| is_blank(chunk)) {
            chunks.pop_front();
        }
        let mut taken: Vec<Vec<char>> = Vec::new();
        let mut length = 0;
        while let Some(chunk) = chunks.pop_front_if(|chunk| length + chunk.len() <= width) {
            length += chunk.len();
            taken.push(chunk);
        }
        if let Some(long) = chunks.front_mut().filter(|chunk| chunk.len() > width) {
            if break_words {
                let rest = long.split_off((width - length).min(long.len()));
                taken.push(std::mem::replace(long, rest));
            } else if taken.is_empty() {
                taken.extend(chunks.pop_front());
            }
        }
        if taken.last().is_some_and(|chunk| is_blank(chunk)) {
            taken.pop();
        }
        if !taken.is_empty() {
            lines.push(taken.into_iter().flatten().collect());
        }
    }
    lines
}

/// Runs of white space and words, and parts of words that end with a hyphen between letters.
fn chunks(line: &str, hyphens: bool) -> Vec<Vec<char>> {
    let chars: Vec<char> = line.chars().collect();
    let mut chunks: Vec<Vec<char>> = Vec::new();
    for (at, c) in chars.iter().enumerate() {
        let begins = match at.checked_sub(1).map(|before| chars[before]) {
            None => true,
            Some(before) if is_space(before) != is_space(*c) => true,
            Some('-') if hyphens => {
                let letter =
                    |at: Option<usize>| at.and_then(|at| chars.get(at)).is_some_and(|c| c.is_alphabetic());
                at >= 2 && letter(Some(at - 2)) && letter(Some(at)) && letter(Some(at + 1))
            }
            Some(_) => false,
        };
        match chunks.last_mut() {
            Some(chunk) if !begins => chunk.push(*c),
            _ => chunks.push(vec![*c]),
        }
    }
    chunks
}

/// The text without comments and tags, and with single spaces for white space.
fn strip_tags(from: &str) -> String {
    let without = |from: &str, open: &str, close: &str| {
        let mut out = String::new();
        let mut rest = from;
        while let Some((before, behind)) = rest.split_once(open) {
            let Some((_, behind)) = behind.split_once(close) else { break };
            out.push_str(before);
            rest = behind;
        }
        out + rest
    };
    let text = without(&without(from, "<!--", "-->"), "<", ">");
    let words: Vec<_> = text.split(is_space).filter(|word| !word.is_empty()).collect();
    let entities = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", "\u{a0}"),
        ("&amp;", "&"),
    ];
    entities.into_iter().fold(words.join(" "), |text, (entity, c)| text.replace(entity, c))
}

fn url_encode(bounds: &Bounds, value: &Value) -> Result<Value> {
    let quoted = |value: &Value, in_query: bool| -> Result<String> {
        let mut out = String::new();
        for byte in value.display(bounds)?.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(char::from(byte))
                }
                b'/' if !in_query => out.push('/'),
                b' ' if in_query => out.push('+'),
                byte => drop(write!(out, "%{byte:02X}")),
            }
        }
        bounds.reserve_text(out.len())?;
        Ok(out)
    };
    let pairs = match value {
        Value::Dict(dict) => dict.entries().to_vec(),
        Value::List(_) | Value::Tuple(_) | Value::Iter(_) | Value::View(..) => {
            let pair = |pair: Value| match &pair.items(bounds)?[..] {
                [key, value] => Ok((key.clone(), value.clone())),
                _ => Err(Error::new("urlencode: expected pairs")),
            };
            value.items(bounds)?.into_iter().map(pair).collect::<Result<_>>()?
        }
        other => return Value::text(bounds, quoted(other, false)?),
    };
    let parts =
        pairs.iter().map(|(key, value)| Ok(format!("{}={}", quoted(key, true)?, quoted(value, true)?)));
    Value::text(bounds, parts.collect::<Result<Vec<_>>>()?.join("&"))
}

/// `pprint`, of what fits a line: as `repr`, with the keys of dicts in order.
fn pretty(bounds: &Bounds, value: &Value) -> Result<Value> {
    let printed = sorted(bounds, value)?.repr(bounds)?;
    match printed.chars().count() > PRINTED_LINE {
        true => Err(Error::new(format!(
            "pprint: lines of more than {PRINTED_LINE} characters are not supported here"
        ))),
        false => Value::text(bounds, printed),
    }
}

fn sorted(bounds: &Bounds, value: &Value) -> Result<Value> {
    let all = |items: &[Value]| items.iter().map(|item| sorted(bounds, item)).collect::<Result<Vec<_>>>();
    match value {
        Value::List(seq) => Value::list(bounds, all(&seq.items)?),
        Value::Tuple(seq) => Value::tuple(bounds, all(&seq.items)?),
        Value::Dict(dict) => {
            let keys = dict.keys().cloned().collect();
            let mut out = Dict::default();
            for key in super::super::compare::sort(bounds, keys, false, &|key| Ok(key.clone()))? {
                let value = dict.get(&key)?.cloned().unwrap_or(Value::None);
                out.insert(bounds, key, sorted(bounds, &value)?)?;
            }
            Ok(Value::dict(out))
        }
        other => Ok(other.clone()),
    }
}
