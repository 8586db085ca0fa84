//! Filters of numbers.

use super::{
    super::{
        arguments::{Arguments, flag, int},
        arithmetic::sign,
        bounds::Bounds,
        error::{Error, Result},
        format::fixed,
        text::is_space,
        value::Value,
    },
    no_filter,
};

/// Applies the filter of this name.
pub(super) fn apply(bounds: &Bounds, name: &str, value: &Value, arguments: &Arguments) -> Result<Value> {
    match name {
        "abs" => {
            arguments.none(name)?;
            let is_negative = value.as_float().is_some_and(|x| x.is_sign_negative());
            sign(value, is_negative)
        }
        "float" => {
            let [default] = arguments.bind(name, ["default"], 0)?;
            Ok(float_of(value)?.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "int" => {
            let [default, base] = arguments.bind(name, ["default", "base"], 0)?;
            let base = base.map_or(Ok(10), |base| int(name, &base))?;
            let whole = |x: f64| (x.is_finite() && x.abs() < 1e38).then(|| Value::Int(x.trunc() as i128));
            let found = match value {
                Value::Str(text) => match parse_int(&text.text, base) {
                    Some(n) => Some(Value::Int(n)),
                    None => float_of(value)?.and_then(whole),
                },
                Value::Float(x) if x.is_infinite() => {
                    return Err(Error::new("cannot convert float infinity to integer"));
                }
                Value::Float(x) => whole(*x),
                Value::Undefined(why) => return Err(Error::new(&**why)),
                other => other.as_int().map(Value::Int),
            };
            Ok(found.or(default).unwrap_or(Value::Int(0)))
        }
        "round" => {
            let [precision, method] = arguments.bind(name, ["precision", "method"], 0)?;
            let precision = precision.map_or(Ok(0), |precision| int(name, &precision))?;
            let method = match &method {
                None => "common",
                Some(method) => method.as_str().unwrap_or("nothing"),
            };
            round(value, precision, method)
        }
        "filesizeformat" => {
            let [binary] = arguments.bind(name, ["binary"], 0)?;
            let bytes = float_of(value)?;
            let bytes = bytes.ok_or_else(|| Error::new("filesizeformat: expected a number"))?;
            Value::text(bounds, file_size(bytes, flag(&binary)))
        }
        other => Err(no_filter(other)),
    }
}

/// What `float` makes of a value, if anything.
fn float_of(value: &Value) -> Result<Option<f64>> {
    match value {
        Value::Str(text) => Ok(parse_float(&text.text)),
        Value::Undefined(why) => Err(Error::new(&**why)),
        other => Ok(other.as_float()),
    }
}

fn without_underscores(text: &str) -> Option<String> {
    let text = text.trim_matches(is_space);
    let is_between = |at: usize| {
        let digit = |at: Option<usize>| {
            at.and_then(|at| text.as_bytes().get(at)).is_some_and(u8::is_ascii_alphanumeric)
        };
        digit(at.checked_sub(1)) && digit(Some(at + 1))
    };
    let fine = text.match_indices('_').all(|(at, _)| is_between(at));
    fine.then(|| text.replace('_', ""))
}

fn parse_float(text: &str) -> Option<f64> {
    let text = without_underscores(text)?;
    let is_number = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    let is_name =
        ["inf", "infinity", "nan"].contains(&text.trim_start_matches(['+', '-']).to_lowercase().as_str());
    if is_number || is_name { text.parse().ok() } else { None }
}

fn parse_int(text: &str, base: i128) -> Option<i128> {
    let text = without_underscores(text)?.to_lowercase();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefixes = [(2, "0b"), (8, "0o"), (16, "0x")];
    let prefix =
        prefixes.into_iter().find(|(of, prefix)| (base == *of || base == 0) && digits.starts_with(prefix));
    let (base, digits) = match prefix {
        Some((base, prefix)) => (base, &digits[prefix.len()..]),
        None if base == 0 => (10, digits),
        None => (base, digits),
    };
    if digits.starts_with(['+', '-']) || !(2..=36).contains(&base) {
        return None;
    }
    let n = i128::from_str_radix(digits, base as u32).ok()?;
    Some(if negative { -n } else { n })
}

fn round(value: &Value, precision: i128, method: &str) -> Result<Value> {
    let places = usize::try_from(precision).ok();
    if precision.abs() > 300 {
        return Err(Error::new("round: expected a precision of at most 300"));
    }
    let power = 10f64.powi(precision as i32);
    match (method, value) {
        ("common", Value::Float(x)) => match places {
            _ if !x.is_finite() => Ok(value.clone()),
            // Digits are cut exactly, and ties go to the even one, as in Python.
            Some(places) => Ok(Value::Float(fixed(*x, places).parse().unwrap_or(*x))),
            None => {
                let power = 10f64.powi(-precision as i32);
                Ok(Value::Float((x / power).round_ties_even() * power))
            }
        },
        ("common", other) => match other.as_int() {
            Some(n) if precision >= 0 => Ok(Value::Int(n)),
            Some(n) => {
                let power = 10i128.checked_pow(precision.unsigned_abs() as u32);
                let Some(power) = power else { return Ok(Value::Int(0)) };
                let (down, rest) = (n.div_euclid(power), n.rem_euclid(power));
                let up = rest * 2 > power || (rest * 2 == power && down % 2 != 0);
                Ok(Value::Int((down + i128::from(up)) * power))
            }
            None => Err(Error::new(format!("type {} doesn't define __round__ method", other.kind()))),
        },
        ("ceil" | "floor", other) => {
            let x = other.as_float();
            let x = x.ok_or_else(|| Error::new(format!("round: expected a number, not {}", other.kind())))?;
            let scaled = x * power;
            Ok(Value::Float(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / power))
        }
        _ => Err(Error::new("method must be common, ceil or floor")),
    }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let (base, prefixes) = match binary {
        true => (1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]),
        false => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
    };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let mut unit = base;
    let mut prefixes = prefixes.into_iter().peekable();
    loop {
        unit *= base;
        match prefixes.next() {
            Some(prefix) if bytes < unit || prefixes.peek().is_none() => {
                return format!("{:.1} {prefix}", base * bytes / unit);
            }
            Some(_) => {}
            None => return format!("{bytes:.1}"),
        }
    }
}
