//! Attributes, items and slices of values, as Jinja's sandbox gives them.

use std::{rc::Rc, sync::Arc};

use super::{
    bounds::Bounds,
    error::{Error, Result},
    value::{Text, Value},
};

/// Methods that change a list or a dict; the sandbox has them and refuses their use.
const CHANGING: [&str; 11] = [
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
];

const OF_TEXTS: [&str; 45] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// Whether Python's type of the value has this method.
fn has_method(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) => OF_TEXTS.contains(&name),
        Value::Bytes(_) => name == "decode",
        Value::List(_) => [
            "count", "index", "copy", "append", "clear", "extend", "insert", "pop", "remove", "reverse",
            "sort",
        ]
        .contains(&name),
        Value::Tuple(_) | Value::Range(..) => ["count", "index"].contains(&name),
        Value::Dict(_) => {
            let changing = ["clear", "pop", "popitem", "setdefault", "update"].contains(&name);
            changing || ["copy", "fromkeys", "get", "items", "keys", "values"].contains(&name)
        }
        Value::Float(_) => name == "is_integer",
        Value::Int(_) | Value::Bool(_) => ["bit_length", "is_integer"].contains(&name),
        _ => false,
    }
}

/// `value.name`: what the type has of that name, else an item.
pub(super) fn attribute(bounds: &Bounds, value: &Value, name: &Arc<str>) -> Result<Value> {
    bounds.step()?;
    if let Some(found) = of_type(value, name)? {
        return Ok(found);
    }
    match value {
        Value::Dict(dict) => Ok(dict.get_str(name).cloned().unwrap_or_else(|| no_attribute(value, name))),
        _ => Ok(no_attribute(value, name)),
    }
}

fn of_type(value: &Value, name: &Arc<str>) -> Result<Option<Value>> {
    match value {
        Value::Undefined(why) => return Err(Error::new(&**why)),
        Value::Namespace(namespace) => return Ok(namespace.get(name)),
        Value::Object(object) => return Ok(object.attribute(name)),
        Value::Tuple(seq) if seq.is_group => match &**name {
            "grouper" => return Ok(Some(seq.items[0].clone())),
            "list" => return Ok(Some(seq.items[1].clone())),
            _ => {}
        },
        _ => {}
    }
    if !has_method(value, name) {
        return Ok(None);
    }
    let is_changing = CHANGING.contains(&&**name) && matches!(value, Value::List(_) | Value::Dict(_));
    Ok(Some(match is_changing {
        true => Value::Undefined(
            format!("access to attribute '{name}' of '{}' object is unsafe.", value.kind()).into(),
        ),
        false => Value::Method(Rc::new((value.clone(), name.clone()))),
    }))
}

fn no_attribute(value: &Value, name: &str) -> Value {
    Value::Undefined(format!("'{} object' has no attribute '{name}'", value.kind()).into())
}

/// `value[index]`: an item, else what the type has of that name.
pub(super) fn item(bounds: &Bounds, value: &Value, index: &Value) -> Result<Value> {
    bounds.step()?;
    if let Value::Undefined(why) = value {
        return Err(Error::new(&**why));
    }
    let found = match value {
        // A key that can be none is none that is there.
        Value::Dict(dict) => dict.get(index).ok().flatten().cloned(),
        _ => index.as_int().and_then(|index| at(bounds, value, index)),
    };
    if let Some(found) = found {
        return Ok(found);
    }
    if let Value::Str(Text { text, .. }) = index
        && let Some(found) = of_type(value, text)?
    {
        return Ok(found);
    }
    let index = index.repr(bounds)?;
    Ok(Value::Undefined(format!("'{} object' has no element {index}", value.kind()).into()))
}

/// The item at an index, which counts from the end if it is negative.
fn at(bounds: &Bounds, value: &Value, index: i128) -> Option<Value> {
    let place = |length: usize| {
        let index = if index < 0 { index + length as i128 } else { index };
        usize::try_from(index).ok().filter(|index| *index < length)
    };
    match value {
        Value::List(seq) | Value::Tuple(seq) => seq.items.get(place(seq.items.len())?).cloned(),
        Value::Str(text) => {
            bounds.work(text.text.len()).ok()?;
            let at = place(text.text.chars().count())?;
            let c = text.text.chars().nth(at)?;
            Some(Value::from(c.encode_utf8(&mut [0; 4]) as &str))
        }
        Value::Bytes(bytes) => bytes.get(place(bytes.len())?).map(|byte| Value::Int(i128::from(*byte))),
        Value::Range(first, count, step) => Some(Value::Int(first + place(*count)? as i128 * step)),
        _ => None,
    }
}

/// `value[first:end:step]`.
pub(super) fn slice(bounds: &Bounds, value: &Value, parts: [Option<Value>; 3]) -> Result<Value> {
    if let Value::Undefined(why) = value {
        return Err(Error::new(&**why));
    }
    let nothing = |why: &str| Ok(Value::Undefined(format!("'{} object' {why}", value.kind()).into()));
    if !matches!(value, Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Bytes(_) | Value::Range(..))
    {
        return nothing("has no slices");
    }
    let mut numbers = [None; 3];
    for (number, part) in numbers.iter_mut().zip(parts) {
        *number = match part {
            None | Some(Value::None) => None,
            Some(part) => match part.as_int() {
                Some(n) => Some(n),
                None => return nothing("has no slice with bounds that are no integers"),
            },
        };
    }
    let length = value.len()?;
    let (first, count, step) = places(numbers, length)?;
    let index = |i: usize| (first + i as i128 * step) as usize;
    Ok(match value {
        Value::Str(text) => {
            bounds.reserve_text(text.text.len())?;
            let chars: Vec<char> = text.text.chars().collect();
            let cut: String = (0..count).map(|i| chars[index(i)]).collect();
            Value::Str(Text { text: cut.into(), safe: text.safe })
        }
        Value::Bytes(bytes) => Value::Bytes((0..count).map(|i| bytes[index(i)]).collect()),
        Value::List(seq) => Value::list(bounds, (0..count).map(|i| seq.items[index(i)].clone()).collect())?,
        Value::Tuple(seq) => Value::tuple(bounds, (0..count).map(|i| seq.items[index(i)].clone()).collect())?,
        Value::Range(begin, _, by) => Value::Range(begin + first * by, count, by * step),
        other => other.clone(),
    })
}

/// The first index, how many there are, and the step, as Python counts them.
fn places([first, end, step]: [Option<i128>; 3], length: usize) -> Result<(i128, usize, i128)> {
    let length = length as i128;
    // Nothing is longer than this, so a larger step takes one item, too.
    let step = step.unwrap_or(1).clamp(-length - 1, length + 1);
    if step == 0 {
        return Err(Error::new("slice step cannot be zero"));
    }
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let place = |bound: Option<i128>, otherwise: i128| match bound {
        None => otherwise,
        Some(n) if n < 0 => n.saturating_add(length).clamp(lowest, highest),
        Some(n) => n.clamp(lowest, highest),
    };
    let (begin, stop) = if step > 0 { (0, length) } else { (length - 1, -1) };
    let (first, end) = (place(first, begin), place(end, stop));
    let distance = if step > 0 { end - first } else { first - end };
    let count = if distance <= 0 { 0 } else { (distance - 1) / step.abs() + 1 };
    Ok((first, count as usize, step))
}

/// Bounds of a part of a text, as `find` and `startswith` take them: characters, counted from the end if negative.
pub(super) fn part(text: &str, first: Option<i128>, end: Option<i128>) -> Option<(usize, &str)> {
    if first.is_none() && end.is_none() {
        return Some((0, text));
    }
    let length = text.chars().count() as i128;
    let place = |n: i128| if n < 0 { n.saturating_add(length).max(0) } else { n };
    let (first, end) = (place(first.unwrap_or(0)), place(end.unwrap_or(length)).min(length));
    if first > end {
        return None;
    }
    let byte = |n: i128| text.char_indices().nth(n as usize).map_or(text.len(), |(at, _)| at);
    Some((first as usize, &text[byte(first)..byte(end)]))
}
