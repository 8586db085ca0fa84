//! Which values are equal, which come first, and which are in others.

use std::{cmp::Ordering, rc::Rc};

use super::{
    bounds::Bounds,
    error::{Error, Result},
    value::{Value, View},
};

/// Python's `==`.
pub(super) fn equal(bounds: &Bounds, a: &Value, b: &Value) -> Result<bool> {
    bounds.step()?;
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Ok(a == b);
    }
    if let (Some(a), Some(b)) = (a.as_float(), b.as_float()) {
        return Ok(a == b);
    }
    let all = |a: &[Value], b: &[Value]| -> Result<bool> {
        if a.len() != b.len() {
            return Ok(false);
        }
        for (a, b) in a.iter().zip(b) {
            if !equal(bounds, a, b)? {
                return Ok(false);
            }
        }
        Ok(true)
    };
    Ok(match (a, b) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Str(a), Value::Str(b)) => {
            bounds.work(a.text.len().min(b.text.len()))?;
            a.text == b.text
        }
        (Value::Bytes(a), Value::Bytes(b)) => a == b,
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => all(&a.items, &b.items)?,
        (Value::Dict(a), Value::Dict(b)) => {
            if a.entries().len() != b.entries().len() {
                return Ok(false);
            }
            for (key, value) in a.entries() {
                match b.get(key)? {
                    Some(other) if equal(bounds, value, other)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Range(..), Value::Range(..)) => match (a, b) {
            (Value::Range(_, 0, _), Value::Range(_, 0, _)) => true,
            (Value::Range(first, 1, _), Value::Range(other, 1, _)) => first == other,
            (Value::Range(a, b, c), Value::Range(d, e, f)) => (a, b, c) == (d, e, f),
            _ => false,
        },
        (Value::View(_, View::Values), _) => same(a, b),
        (Value::View(_, view), Value::View(_, other)) if *other != View::Values && view == other => {
            let (a, b) = (a.items(bounds)?, b.items(bounds)?);
            a.len() == b.len() && {
                let mut found = true;
                for item in &a {
                    found &= contains(bounds, &Value::list(bounds, b.clone())?, item)?;
                }
                found
            }
        }
        _ => same(a, b),
    })
}

/// Python's `is`, as far as it means something.
pub(super) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::None, Value::None) => true,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Str(a), Value::Str(b)) => a.text == b.text,
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => Rc::ptr_eq(a, b),
        (Value::Iter(a), Value::Iter(b)) => Rc::ptr_eq(a, b),
        (Value::Namespace(a), Value::Namespace(b)) => a.is(b),
        (Value::Object(a), Value::Object(b)) => Rc::ptr_eq(a, b),
        _ => false,
    }
}

/// Which of two values comes first.
///
/// # Errors
/// If they have no order; `sign` says what was to be known.
pub(super) fn order(bounds: &Bounds, sign: &str, a: &Value, b: &Value) -> Result<Option<Ordering>> {
    bounds.step()?;
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (a.as_float(), b.as_float()) {
        return Ok(a.partial_cmp(&b));
    }
    match (a, b) {
        (Value::Str(a), Value::Str(b)) => {
            bounds.work(a.text.len().min(b.text.len()))?;
            Ok(Some(a.text.cmp(&b.text)))
        }
        (Value::Bytes(a), Value::Bytes(b)) => Ok(Some(a.cmp(b))),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            for (a, b) in a.items.iter().zip(&b.items) {
                if !equal(bounds, a, b)? {
                    return order(bounds, sign, a, b);
                }
            }
            Ok(Some(a.items.len().cmp(&b.items.len())))
        }
        (Value::Undefined(why), _) | (_, Value::Undefined(why)) => Err(Error::new(&**why)),
        _ => {
            let (a, b) = (a.kind(), b.kind());
            Err(Error::new(format!("'{sign}' not supported between instances of '{a}' and '{b}'")))
        }
    }
}

/// Python's `item in value`.
pub(super) fn contains(bounds: &Bounds, value: &Value, item: &Value) -> Result<bool> {
    match value {
        Value::Str(text) => match item {
            Value::Str(part) => {
                bounds.work(text.text.len())?;
                Ok(text.text.contains(&*part.text))
            }
            Value::Undefined(why) => Err(Error::new(&**why)),
            other => {
                let kind = other.kind();
                Err(Error::new(format!("'in <string>' requires string as left operand, not {kind}")))
            }
        },
        Value::Dict(dict) | Value::View(dict, View::Keys) => match item {
            // Whatever is undefined has a hash, and is no key.
            Value::Undefined(_) => Ok(false),
            item => Ok(dict.get(item)?.is_some()),
        },
        Value::Range(first, count, step) => Ok(item.as_float().is_some_and(|x| {
            let at = (x - *first as f64) / *step as f64;
            at.fract() == 0.0 && at >= 0.0 && at < *count as f64
        })),
        Value::List(seq) | Value::Tuple(seq) => any_equal(bounds, &seq.items, item),
        Value::Undefined(_) | Value::View(..) | Value::Iter(_) | Value::Bytes(_) => {
            any_equal(bounds, &value.items(bounds)?, item)
        }
        other => Err(Error::new(format!("argument of type '{}' is not iterable", other.kind()))),
    }
}

fn any_equal(bounds: &Bounds, items: &[Value], item: &Value) -> Result<bool> {
    for other in items {
        if equal(bounds, other, item)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Sorted by what each value is compared by; equal ones keep their order.
///
/// # Errors
/// If two of them have no order.
pub(super) fn sort(
    bounds: &Bounds,
    items: Vec<Value>,
    reverse: bool,
    key: &dyn Fn(&Value) -> Result<Value>,
) -> Result<Vec<Value>> {
    let keyed = items.into_iter().map(|item| Ok((key(&item)?, item)));
    let mut keyed: Vec<(Value, Value)> = keyed.collect::<Result<_>>()?;
    let mut failed = None;
    keyed.sort_by(|(a, _), (b, _)| {
        let order = match failed {
            Some(_) => None,
            None => order(bounds, "<", a, b).unwrap_or_else(|error| {
                failed = Some(error);
                None
            }),
        };
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(keyed.into_iter().map(|(_, item)| item).collect()),
    }
}
