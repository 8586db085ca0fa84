//! Jinja's tests: what a value `is`.

use std::cmp::Ordering;

use super::{
    arguments::{Arguments, text},
    arithmetic::{Operator, apply},
    bounds::Bounds,
    compare::{contains, equal, order, same},
    error::{Error, Result},
    methods::{is_lower, is_upper},
    names::{FILTERS, TESTS},
    value::{Text, Value},
};

/// Whether a value passes a test.
///
/// # Errors
/// If there is no such test, or it fails on the value.
pub(super) fn check(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<bool> {
    bounds.step()?;
    let takes_one = [
        "divisibleby",
        "sameas",
        "in",
        "eq",
        "equalto",
        "==",
        "ne",
        "!=",
        "lt",
        "lessthan",
        "<",
        "le",
        "<=",
        "gt",
        "greaterthan",
        ">",
        "ge",
        ">=",
    ];
    if takes_one.contains(&name) {
        let [other] = arguments.bind(name, ["other"], 1)?;
        return compared(bounds, name, value, &other.unwrap_or(Value::None));
    }
    if !TESTS.contains(&name) {
        return Err(Error::new(format!("there is no test {name:?}")));
    }
    arguments.none(name)?;
    let remainder = || apply(bounds, Operator::Mod, value, &Value::Int(2));
    Ok(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Str(_)
                | Value::Bytes(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(..)
        ),
        "iterable" => !matches!(
            value,
            Value::None
                | Value::Bool(_)
                | Value::Int(_)
                | Value::Float(_)
                | Value::Namespace(_)
                | Value::Method(_)
                | Value::Object(_)
        ),
        // Whatever is undefined has the means to be called, with which it says that it cannot.
        "callable" => matches!(value, Value::Method(_) | Value::Object(_) | Value::Undefined(_)),
        "escaped" => matches!(value, Value::Str(Text { safe: true, .. })),
        "lower" => is_lower(&value.display(bounds)?),
        "upper" => is_upper(&value.display(bounds)?),
        "odd" => equal(bounds, &remainder()?, &Value::Int(1))?,
        "even" => equal(bounds, &remainder()?, &Value::Int(0))?,
        "filter" => FILTERS.contains(&&*text(name, value)?),
        _ => TESTS.contains(&&*text(name, value)?),
    })
}

fn compared(bounds: &Bounds, name: &str, value: &Value, other: &Value) -> Result<bool> {
    let ordered =
        |sign: &str, fits: fn(Ordering) -> bool| Ok(order(bounds, sign, value, other)?.is_some_and(fits));
    match name {
        "divisibleby" => {
            let rest = apply(bounds, Operator::Mod, value, other)?;
            equal(bounds, &rest, &Value::Int(0))
        }
        "sameas" => Ok(same(value, other)),
        "in" => contains(bounds, other, value),
        "eq" | "equalto" | "==" => equal(bounds, value, other),
        "ne" | "!=" => Ok(!equal(bounds, value, other)?),
        "lt" | "lessthan" | "<" => ordered("<", Ordering::is_lt),
        "le" | "<=" => ordered("<=", Ordering::is_le),
        "gt" | "greaterthan" | ">" => ordered(">", Ordering::is_gt),
        _ => ordered(">=", Ordering::is_ge),
    }
}
