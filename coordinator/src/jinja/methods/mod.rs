//! Methods of Python's types.

mod chars;
mod split;
mod strings;

use super::{
    arguments::{Arguments, text},
    bounds::Bounds,
    compare::equal,
    error::{Error, Result},
    value::{Dict, Text, Value, View},
};

pub(super) use chars::{capitalize, is_lower, is_upper};
pub(super) use split::{Ends, split_lines, strip};
pub(super) use strings::{justify, replace};

/// Calls a method that the value's type has.
pub(super) fn call(bounds: &Bounds, value: &Value, name: &str, arguments: &Arguments) -> Result<Value> {
    match value {
        Value::Str(Text { text, safe }) => {
            bounds.work(text.len())?;
            let made = strings::call(bounds, text, name, arguments)?;
            Ok(match made {
                // What is made of a text that was marked is marked, too.
                Value::Str(made) if *safe => Value::Str(Text { text: made.text, safe: true }),
                made => made,
            })
        }
        Value::Bytes(bytes) => {
            arguments.bind("decode()", ["encoding", "errors"], 0)?;
            let decoded = std::str::from_utf8(bytes);
            decoded.map(Value::from).map_err(|e| Error::new(format!("'utf-8' codec can't decode bytes: {e}")))
        }
        Value::List(_) | Value::Tuple(_) | Value::Range(..) => of_list(bounds, value, name, arguments),
        Value::Dict(dict) => of_dict(bounds, dict, name, arguments),
        Value::Float(x) => {
            arguments.none("is_integer()")?;
            Ok(Value::Bool(x.fract() == 0.0))
        }
        other => {
            arguments.none(name)?;
            let n = other.as_int().unwrap_or_default();
            let bits = i128::BITS - n.unsigned_abs().leading_zeros();
            Ok(if name == "bit_length" { Value::Int(bits.into()) } else { Value::Bool(true) })
        }
    }
}

fn of_list(bounds: &Bounds, value: &Value, name: &str, arguments: &Arguments) -> Result<Value> {
    let items = value.items(bounds)?;
    match name {
        "copy" => {
            arguments.none("copy()")?;
            Ok(value.clone())
        }
        "count" => {
            let [wanted] = arguments.bind("count()", ["value"], 1)?;
            let mut count = 0;
            for item in &items {
                count += usize::from(equal(bounds, item, &wanted.clone().unwrap_or(Value::None))?);
            }
            Ok(Value::from(count))
        }
        _ => {
            let [wanted, first, end] = arguments.bind("index()", ["value", "start", "stop"], 1)?;
            let wanted = wanted.unwrap_or(Value::None);
            let place = |bound: &Option<Value>, otherwise: usize| match bound.as_ref().and_then(Value::as_int)
            {
                None => otherwise,
                Some(n) if n < 0 => usize::try_from(n + items.len() as i128).unwrap_or(0),
                Some(n) => usize::try_from(n).unwrap_or(usize::MAX).min(items.len()),
            };
            let (first, end) = (place(&first, 0), place(&end, items.len()));
            for (at, item) in items.iter().enumerate().take(end).skip(first) {
                if equal(bounds, item, &wanted)? {
                    return Ok(Value::from(at));
                }
            }
            Err(Error::new(format!("{} is not in {}", wanted.repr(bounds)?, value.kind())))
        }
    }
}

fn of_dict(bounds: &Bounds, dict: &std::rc::Rc<Dict>, name: &str, arguments: &Arguments) -> Result<Value> {
    let view = match name {
        "keys" => Some(View::Keys),
        "values" => Some(View::Values),
        "items" => Some(View::Items),
        _ => None,
    };
    if let Some(view) = view {
        arguments.none(name)?;
        return Ok(Value::View(dict.clone(), view));
    }
    match name {
        "copy" => {
            arguments.none("copy()")?;
            Ok(Value::Dict(dict.clone()))
        }
        "get" => {
            let [key, default] = arguments.bind("get()", ["key", "default"], 1)?;
            let found = match key {
                Some(key) if !key.is_undefined() => dict.get(&key)?.cloned(),
                _ => None,
            };
            Ok(found.or(default).unwrap_or(Value::None))
        }
        _ => from_keys(bounds, arguments),
    }
}

/// `dict.fromkeys(keys, value=None)`.
pub(super) fn from_keys(bounds: &Bounds, arguments: &Arguments) -> Result<Value> {
    let [keys, value] = arguments.bind("fromkeys()", ["iterable", "value"], 1)?;
    let mut dict = Dict::default();
    for key in keys.unwrap_or(Value::None).items(bounds)? {
        dict.insert(bounds, key, value.clone().unwrap_or(Value::None))?;
    }
    Ok(Value::dict(dict))
}

/// The argument as a text, for what takes no other.
fn text_or(function: &str, value: Option<Value>, otherwise: &str) -> Result<std::sync::Arc<str>> {
    match value {
        None => Ok(otherwise.into()),
        Some(value) => text(function, &value),
    }
}
