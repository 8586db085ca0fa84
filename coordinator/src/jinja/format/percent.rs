//! `format % values`, as Python's texts do it.

use super::{
    super::{
        bounds::Bounds,
        error::{Error, Result},
        text::{STAND_INS, escape, is_printable},
        value::Value,
    },
    bounded,
    spec::Spec,
};

/// The values of a format: one after the other, or by name.
struct Values<'a> {
    list: Vec<Value>,
    next: usize,
    named: Option<&'a Value>,
}

impl Values<'_> {
    fn next(&mut self) -> Result<Value> {
        let value = self.list.get(self.next).cloned();
        self.next += 1;
        value.ok_or_else(|| Error::new("not enough arguments for format string"))
    }
}

/// The text `format` with `values` in the places of its `%…`.
pub(in super::super) fn percent(bounds: &Bounds, format: &str, values: &Value) -> Result<String> {
    let mut left = Values {
        list: match values {
            Value::Tuple(seq) => seq.items.clone(),
            other => vec![other.clone()],
        },
        next: 0,
        named: matches!(values, Value::Dict(_)).then_some(values),
    };
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut value = None;
        if chars.next_if_eq(&'(').is_some() {
            let mut name = String::new();
            let mut open = 1;
            for c in chars.by_ref() {
                open += i32::from(c == '(') - i32::from(c == ')');
                if open == 0 {
                    break;
                }
                name.push(c);
            }
            let Some(Value::Dict(dict)) = left.named else {
                return Err(Error::new("format requires a mapping"));
            };
            let found = dict.get_str(&name).cloned();
            value = Some(found.ok_or_else(|| Error::new(format!("the format's key '{name}' is not there")))?);
        }
        let mut flags = String::new();
        while let Some(flag) = chars.next_if(|c| "#0- +".contains(*c)) {
            flags.push(flag);
        }
        let number = |chars: &mut std::iter::Peekable<std::str::Chars<'_>>, left: &mut Values<'_>| {
            if chars.next_if_eq(&'*').is_some() {
                return left.next()?.as_int().map(Some).ok_or_else(|| Error::new("* wants int"));
            }
            let mut digits = String::new();
            while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            if digits.is_empty() { Ok(None) } else { bounded(&digits).map(|width| Some(width as i128)) }
        };
        let width = number(&mut chars, &mut left)?.unwrap_or(0);
        let precision = match chars.next_if_eq(&'.') {
            Some(_) => Some(number(&mut chars, &mut left)?.unwrap_or(0)),
            None => None,
        };
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let Some(kind) = chars.next() else { return Err(Error::new("incomplete format")) };
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match value {
            Some(value) => value,
            None => left.next()?,
        };
        let is_left = flags.contains('-') || width < 0;
        let width = bounded(&width.unsigned_abs().to_string())?;
        let precision = precision.map(|n| bounded(&n.max(0).to_string())).transpose()?;
        bounds.reserve_text(width)?;
        let spec = Spec {
            width,
            sign: ['+', ' '].into_iter().find(|sign| flags.contains(*sign)),
            alternate: flags.contains('#'),
            align: Some(if is_left {
                '<'
            } else if flags.contains('0') {
                '='
            } else {
                '>'
            }),
            fill: (flags.contains('0') && !is_left).then_some('0'),
            precision,
            ..Spec::default()
        };
        out.push_str(&one(bounds, spec, kind, &value)?);
        if out.len() > super::super::bounds::MAX_TEXT {
            bounds.reserve_text(out.len())?;
        }
    }
    let is_rest = left.next < left.list.len();
    if is_rest && !matches!(values, Value::Dict(_)) {
        return Err(Error::new("not all arguments converted during string formatting"));
    }
    Ok(out)
}

fn one(bounds: &Bounds, spec: Spec, kind: char, value: &Value) -> Result<String> {
    let needs = |what: &str| Error::new(format!("%{kind} format: {what} is required, not {}", value.kind()));
    let text = |text: String, spec: &Spec| {
        let plain =
            Spec { align: spec.align.filter(|a| *a == '<').or(Some('>')), fill: None, ..spec.clone() };
        Spec { kind: None, ..plain }.apply(bounds, &Value::from(text.as_str()))
    };
    match kind {
        's' => text(value.display(bounds)?, &spec),
        'r' => text(value.repr(bounds)?, &spec),
        'a' => text(ascii(&value.repr(bounds)?), &spec),
        'c' => match value {
            Value::Str(one) if one.text.chars().count() == 1 => text(one.text.to_string(), &spec),
            other => {
                let c = other.as_int().and_then(|n| u32::try_from(n).ok()).and_then(char::from_u32);
                text(c.ok_or_else(|| needs("an int or a single character"))?.to_string(), &spec)
            }
        },
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let n = match value {
                Value::Float(x) if "diu".contains(kind) && x.is_finite() => x.trunc() as i128,
                other => other.as_int().ok_or_else(|| needs("a number"))?,
            };
            let kind = if "diu".contains(kind) { 'd' } else { kind };
            let least = spec.precision.unwrap_or(0);
            let spec = Spec { kind: Some(kind), precision: None, ..spec };
            if least == 0 {
                return spec.apply(bounds, &Value::Int(n));
            }
            // A precision asks for so many digits.
            let zeros = Spec {
                width: least + usize::from(n < 0),
                align: Some('='),
                fill: Some('0'),
                ..Spec::default()
            };
            let digits = Spec { kind: Some(kind), sign: spec.sign, ..zeros }.apply(bounds, &Value::Int(n))?;
            text(digits, &Spec { precision: None, ..spec })
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let x = value
                .as_float()
                .ok_or_else(|| Error::new(format!("must be real number, not {}", value.kind())))?;
            Spec { kind: Some(kind), ..spec }.apply(bounds, &Value::Float(x))
        }
        other => Err(Error::new(format!("unsupported format character '{other}'"))),
    }
}

/// The text with what is not ASCII written by its number.
pub(super) fn ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match (c.is_ascii() && (is_printable(c) || c == '\n')) || STAND_INS.contains(&c) {
            true => out.push(c),
            false => escape(c, &mut out),
        }
    }
    out
}
