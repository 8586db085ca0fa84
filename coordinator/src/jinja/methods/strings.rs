//! Methods of texts.

use super::{
    super::{
        access::part,
        arguments::{Arguments, count, text},
        bounds::Bounds,
        error::{Error, Result},
        format::braces,
        text::{is_printable, is_space},
        value::Value,
    },
    chars,
    split::{self, Ends, bound},
    text_or,
};

/// Calls a method of a text.
pub(super) fn call(bounds: &Bounds, from: &str, name: &str, arguments: &Arguments) -> Result<Value> {
    if let Some(made) = without_arguments(from, name) {
        arguments.none(name)?;
        return match made {
            Made::Text(text) => Value::text(bounds, text),
            Made::Flag(flag) => Ok(Value::Bool(flag)),
        };
    }
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments.bind(name, ["chars"], 0)?;
            let ends = match name {
                "strip" => Ends::Both,
                "lstrip" => Ends::Left,
                _ => Ends::Right,
            };
            Value::text(bounds, split::strip(from, chars.as_ref(), ends)?)
        }
        "split" | "rsplit" => split::split(bounds, from, arguments, name == "rsplit"),
        "splitlines" => split::lines(bounds, from, arguments),
        "partition" | "rpartition" => split::partition(bounds, from, arguments, name == "rpartition"),
        "find" | "rfind" => {
            let at = split::find(from, arguments, name == "rfind")?;
            Ok(at.map_or(Value::Int(-1), Value::from))
        }
        "index" | "rindex" => {
            let at = split::find(from, arguments, name == "rindex")?;
            at.map(Value::from).ok_or_else(|| Error::new("substring not found"))
        }
        "count" => {
            let [wanted, first, end] = arguments.bind(name, ["sub", "start", "end"], 1)?;
            let wanted = text_or(name, wanted, "")?;
            let Some((_, inside)) = part(from, bound(first)?, bound(end)?) else { return Ok(Value::Int(0)) };
            let found =
                if wanted.is_empty() { inside.chars().count() + 1 } else { inside.matches(&*wanted).count() };
            Ok(Value::from(found))
        }
        "startswith" | "endswith" => {
            let [wanted, first, end] = arguments.bind(name, ["prefix", "start", "end"], 1)?;
            let wanted = match wanted {
                Some(Value::Tuple(several)) => several.items.clone(),
                wanted => wanted.into_iter().collect(),
            };
            let inside = part(from, bound(first)?, bound(end)?);
            let mut found = false;
            for wanted in &wanted {
                let wanted = text(name, wanted)?;
                found |= inside.is_some_and(|(_, inside)| match name {
                    "startswith" => inside.starts_with(&*wanted),
                    _ => inside.ends_with(&*wanted),
                });
            }
            Ok(Value::Bool(found))
        }
        "removeprefix" | "removesuffix" => {
            let [wanted] = arguments.bind(name, ["prefix"], 1)?;
            let wanted = text_or(name, wanted, "")?;
            let rest = match name {
                "removeprefix" => from.strip_prefix(&*wanted),
                _ => from.strip_suffix(&*wanted),
            };
            Value::text(bounds, rest.unwrap_or(from))
        }
        "replace" => {
            let [old, new, most] = arguments.bind(name, ["old", "new", "count"], 2)?;
            replace(bounds, from, &text_or(name, old, "")?, &text_or(name, new, "")?, bound(most)?)
        }
        "join" => {
            let [list] = arguments.bind(name, ["iterable"], 1)?;
            let mut joined = String::new();
            for (i, item) in list.unwrap_or(Value::None).items(bounds)?.iter().enumerate() {
                let Value::Str(item) = item else {
                    let kind = item.kind();
                    return Err(Error::new(format!(
                        "sequence item {i}: expected str instance, {kind} found"
                    )));
                };
                bounds.reserve_text(joined.len().max(item.text.len() + from.len()))?;
                joined.push_str(if i == 0 { "" } else { from });
                joined.push_str(&item.text);
            }
            Value::text(bounds, joined)
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = arguments.bind(name, ["width", "fillchar"], 1)?;
            let width = count(name, &width.unwrap_or(Value::None))?;
            let fill = text_or(name, fill, " ")?;
            let mut fills = fill.chars();
            match (fills.next(), fills.next()) {
                (Some(fill), None) => justify(bounds, from, width, fill, name),
                _ => Err(Error::new("The fill character must be exactly one character long")),
            }
        }
        "zfill" => {
            let [width] = arguments.bind(name, ["width"], 1)?;
            let width = count(name, &width.unwrap_or(Value::None))?;
            bounds.reserve_text(width)?;
            let (sign, digits) = from.split_at(usize::from(from.starts_with(['+', '-'])));
            let zeros = "0".repeat(width.saturating_sub(from.chars().count()));
            Value::text(bounds, format!("{sign}{zeros}{digits}"))
        }
        "expandtabs" => {
            let [size] = arguments.bind(name, ["tabsize"], 0)?;
            let size = count(name, &size.unwrap_or(Value::Int(8)))?;
            expand_tabs(bounds, from, size)
        }
        "encode" => {
            let [encoding, _] = arguments.bind(name, ["encoding", "errors"], 0)?;
            let encoding = text_or(name, encoding, "utf-8")?.to_lowercase().replace('_', "-");
            match encoding.as_str() {
                "utf-8" | "utf8" => {}
                "ascii" if from.is_ascii() => {}
                other => {
                    return Err(Error::new(format!("encode(): {other:?} is not supported: expected utf-8")));
                }
            }
            bounds.reserve_text(from.len())?;
            Ok(Value::Bytes(from.as_bytes().into()))
        }
        "format" => Value::text(bounds, braces(bounds, from, arguments)?),
        "format_map" => {
            let [values] = arguments.bind(name, ["mapping"], 1)?;
            let Some(Value::Dict(dict)) = values else {
                return Err(Error::new("format_map(): expected a dict"));
            };
            let named =
                dict.entries().iter().filter_map(|(key, value)| Some((key.as_str()?.into(), value.clone())));
            let arguments = Arguments { positional: Vec::new(), named: named.collect() };
            Value::text(bounds, braces(bounds, from, &arguments)?)
        }
        other => Err(Error::new(format!("texts have no method {other}()"))),
    }
}

enum Made {
    Text(String),
    Flag(bool),
}

fn without_arguments(from: &str, name: &str) -> Option<Made> {
    let all = |is: fn(char) -> bool| Made::Flag(!from.is_empty() && from.chars().all(is));
    Some(match name {
        "lower" => Made::Text(from.to_lowercase()),
        "upper" => Made::Text(from.to_uppercase()),
        "title" => Made::Text(chars::title(from)),
        "capitalize" => Made::Text(chars::capitalize(from)),
        "swapcase" => Made::Text(chars::swap_case(from)),
        "casefold" => Made::Text(chars::fold(from)),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isdecimal" => all(chars::is_decimal),
        "isdigit" => all(chars::is_digit),
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isascii" => Made::Flag(from.is_ascii()),
        "isprintable" => Made::Flag(from.chars().all(is_printable)),
        "islower" => Made::Flag(chars::is_lower(from)),
        "isupper" => Made::Flag(chars::is_upper(from)),
        "istitle" => Made::Flag(chars::is_title(from)),
        "isidentifier" => Made::Flag(
            from.starts_with(|c: char| c == '_' || c.is_alphabetic())
                && from.chars().all(|c| c == '_' || c.is_alphanumeric()),
        ),
        _ => return None,
    })
}

/// The text with one text in the place of another, so many times at most.
pub(in super::super) fn replace(
    bounds: &Bounds,
    from: &str,
    old: &str,
    new: &str,
    most: Option<i128>,
) -> Result<Value> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let found = if old.is_empty() { from.chars().count() + 1 } else { from.matches(old).count() };
    bounds.reserve_text(from.len().saturating_add(new.len().saturating_mul(found.min(most))))?;
    Value::text(bounds, from.replacen(old, new, most))
}

/// The text in a field of this width: `center`, `ljust` or `rjust`.
pub(in super::super) fn justify(
    bounds: &Bounds,
    from: &str,
    width: usize,
    fill: char,
    how: &str,
) -> Result<Value> {
    bounds.reserve_text(width.saturating_mul(fill.len_utf8()))?;
    let missing = width.saturating_sub(from.chars().count());
    let left = match how {
        "ljust" => 0,
        "rjust" => missing,
        // Of an odd number, the field's own parity says which side gets one more.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |count: usize| fill.to_string().repeat(count);
    Value::text(bounds, format!("{}{from}{}", fill(left), fill(missing - left)))
}

fn expand_tabs(bounds: &Bounds, from: &str, size: usize) -> Result<Value> {
    let tabs = from.matches('\t').count();
    bounds.reserve_text(from.len().saturating_add(tabs.saturating_mul(size)))?;
    let mut out = String::new();
    let mut column = 0;
    for c in from.chars() {
        match c {
            '\t' if size > 0 => {
                let missing = size - column % size;
                out.extend(std::iter::repeat_n(' ', missing));
                column += missing;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if c == '\n' || c == '\r' { 0 } else { column + 1 };
            }
        }
    }
    Value::text(bounds, out)
}
