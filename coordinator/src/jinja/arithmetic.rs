//! What the operators of arithmetic do, to numbers and to texts and lists.

use super::{
    bounds::Bounds,
    error::{Error, Result},
    text::escape_html,
    value::{Text, Value},
};

/// An operator of two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

impl Operator {
    /// The operator that is written so.
    pub fn of(sign: &str) -> Option<Self> {
        Some(match sign {
            "+" => Operator::Add,
            "-" => Operator::Sub,
            "*" => Operator::Mul,
            "/" => Operator::Div,
            "//" => Operator::FloorDiv,
            "%" => Operator::Mod,
            "**" => Operator::Pow,
            _ => return None,
        })
    }

    fn sign(self) -> &'static str {
        match self {
            Operator::Add => "+",
            Operator::Sub => "-",
            Operator::Mul => "*",
            Operator::Div => "/",
            Operator::FloorDiv => "//",
            Operator::Mod => "%",
            Operator::Pow => "** or pow()",
        }
    }
}

/// `a` and `b` put together; texts as formats are the caller's.
pub(super) fn apply(bounds: &Bounds, operator: Operator, a: &Value, b: &Value) -> Result<Value> {
    if let Value::Undefined(why) = a {
        return Err(Error::new(&**why));
    }
    if let Value::Undefined(why) = b {
        return Err(Error::new(&**why));
    }
    if let (Some(a), Some(b)) = (a.as_int(), b.as_int()) {
        return integers(operator, a, b);
    }
    if let (Some(a), Some(b)) = (a.as_float(), b.as_float()) {
        return floats(operator, a, b).map(Value::Float);
    }
    match (operator, a, b) {
        (Operator::Add, Value::Str(a), Value::Str(b)) => add_texts(bounds, a, b),
        (Operator::Add, Value::List(a), Value::List(b)) => {
            bounds.reserve((a.items.len() + b.items.len()) * size_of::<Value>())?;
            Value::list(bounds, [&a.items[..], &b.items].concat())
        }
        (Operator::Add, Value::Tuple(a), Value::Tuple(b)) => {
            bounds.reserve((a.items.len() + b.items.len()) * size_of::<Value>())?;
            Value::tuple(bounds, [&a.items[..], &b.items].concat())
        }
        (Operator::Mul, value @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)), n)
        | (Operator::Mul, n, value @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)))
            if n.as_int().is_some() =>
        {
            repeat(bounds, value, n.as_int().unwrap_or_default())
        }
        _ => {
            let (sign, a, b) = (operator.sign(), a.kind(), b.kind());
            Err(Error::new(format!("unsupported operand type(s) for {sign}: '{a}' and '{b}'")))
        }
    }
}

fn add_texts(bounds: &Bounds, a: &Text, b: &Text) -> Result<Value> {
    bounds.reserve_text(a.text.len() + b.text.len())?;
    let text = match (a.safe, b.safe) {
        (true, false) => format!("{}{}", a.text, escape_html(&b.text)),
        (false, true) => format!("{}{}", escape_html(&a.text), b.text),
        _ => format!("{}{}", a.text, b.text),
    };
    bounds.reserve_text(text.len())?;
    Ok(Value::Str(Text { text: text.into(), safe: a.safe || b.safe }))
}

fn repeat(bounds: &Bounds, value: &Value, times: i128) -> Result<Value> {
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    match value {
        Value::Str(text) => {
            bounds.reserve_text(text.text.len().saturating_mul(times))?;
            Ok(Value::Str(Text { text: text.text.repeat(times).into(), safe: text.safe }))
        }
        Value::List(seq) | Value::Tuple(seq) => {
            bounds.reserve(size_of_val(seq.items.as_slice()).saturating_mul(times))?;
            let times = if seq.items.is_empty() { 0 } else { times };
            let items = std::iter::repeat_n(&seq.items, times).flatten().cloned().collect();
            if matches!(value, Value::List(_)) {
                Value::list(bounds, items)
            } else {
                Value::tuple(bounds, items)
            }
        }
        other => Ok(other.clone()),
    }
}

fn too_large() -> Error {
    Error::new("an integer is too large: expected at most 38 digits")
}

fn integers(operator: Operator, a: i128, b: i128) -> Result<Value> {
    let whole = match operator {
        Operator::Add => a.checked_add(b),
        Operator::Sub => a.checked_sub(b),
        Operator::Mul => a.checked_mul(b),
        Operator::Div | Operator::FloorDiv | Operator::Mod if b == 0 => {
            return Err(Error::new(if operator == Operator::Mod {
                "integer modulo by zero"
            } else {
                "division by zero"
            }));
        }
        Operator::Div => return Ok(Value::Float(a as f64 / b as f64)),
        Operator::FloorDiv => a.checked_div_euclid(b).map(|q| {
            // Euclid's quotient leaves a remainder that is positive; Python's has the sign of the divisor.
            if b < 0 && a.rem_euclid(b) != 0 { q - 1 } else { q }
        }),
        Operator::Mod => a.checked_rem_euclid(b).map(|r| if b < 0 && r != 0 { r + b } else { r }),
        Operator::Pow if b < 0 => return floats(operator, a as f64, b as f64).map(Value::Float),
        Operator::Pow => match (a, u32::try_from(b)) {
            (0 | 1, _) => Some(if b == 0 { 1 } else { a }),
            (-1, _) => Some(if b % 2 == 0 { 1 } else { -1 }),
            (_, Ok(b)) => a.checked_pow(b),
            _ => None,
        },
    };
    whole.map(Value::Int).ok_or_else(too_large)
}

fn floats(operator: Operator, a: f64, b: f64) -> Result<f64> {
    Ok(match operator {
        Operator::Add => a + b,
        Operator::Sub => a - b,
        Operator::Mul => a * b,
        Operator::Div | Operator::FloorDiv | Operator::Mod if b == 0.0 => {
            return Err(Error::new("float division by zero"));
        }
        Operator::Div => a / b,
        Operator::FloorDiv => ((a - modulo(a, b)) / b).round(),
        Operator::Mod => modulo(a, b),
        Operator::Pow if a == 0.0 && b < 0.0 => {
            return Err(Error::new("0.0 cannot be raised to a negative power"));
        }
        Operator::Pow => {
            let power = a.powf(b);
            if power.is_nan() && !a.is_nan() && !b.is_nan() {
                return Err(Error::new("a root of a negative number is no number here"));
            }
            power
        }
    })
}

/// The remainder, which has the sign of the divisor.
fn modulo(a: f64, b: f64) -> f64 {
    let rest = a % b;
    if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
        rest + b
    } else if rest == 0.0 {
        rest.abs().copysign(b)
    } else {
        rest
    }
}

/// `-value`, or `+value`.
pub(super) fn sign(value: &Value, negative: bool) -> Result<Value> {
    match value {
        Value::Float(x) => Ok(Value::Float(if negative { -x } else { *x })),
        Value::Undefined(why) => Err(Error::new(&**why)),
        other => match other.as_int() {
            Some(n) if negative => n.checked_neg().map(Value::Int).ok_or_else(too_large),
            Some(n) => Ok(Value::Int(n)),
            None => {
                let (sign, kind) = (if negative { '-' } else { '+' }, other.kind());
                Err(Error::new(format!("bad operand type for unary {sign}: '{kind}'")))
            }
        },
    }
}
