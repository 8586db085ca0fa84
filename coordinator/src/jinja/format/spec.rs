//! A value by a format's specification, as `format(value, spec)` in Python.

use super::{
    super::{
        bounds::Bounds,
        error::{Error, Result},
        text::float,
        value::Value,
    },
    bounded,
};

/// `[[fill]align][sign][#][0][width][grouping][.precision][type]`
#[derive(Debug, Default, Clone)]
pub(super) struct Spec {
    pub fill: Option<char>,
    pub align: Option<char>,
    pub sign: Option<char>,
    pub alternate: bool,
    pub width: usize,
    pub grouping: Option<char>,
    pub precision: Option<usize>,
    pub kind: Option<char>,
}

impl Spec {
    pub fn parse(text: &str) -> Result<Self> {
        let chars: Vec<char> = text.chars().collect();
        let mut spec = Spec::default();
        let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
        let mut at = 0;
        if is_align(chars.get(1)) {
            (spec.fill, spec.align, at) = (Some(chars[0]), Some(chars[1]), 2);
        } else if is_align(chars.first()) {
            (spec.align, at) = (Some(chars[0]), 1);
        }
        if let Some(sign) = chars.get(at).filter(|c| "+- ".contains(**c)) {
            (spec.sign, at) = (Some(*sign), at + 1);
        }
        if chars.get(at) == Some(&'#') {
            (spec.alternate, at) = (true, at + 1);
        }
        if chars.get(at) == Some(&'0') {
            if spec.align.is_none() {
                spec.align = Some('=');
            }
            spec.fill = spec.fill.or(Some('0'));
            at += 1;
        }
        let digits = |at: usize| {
            chars[at.min(chars.len())..].iter().take_while(|c| c.is_ascii_digit()).collect::<String>()
        };
        let width = digits(at);
        if !width.is_empty() {
            (spec.width, at) = (bounded(&width)?, at + width.len());
        }
        if let Some(grouping) = chars.get(at).filter(|c| ",_".contains(**c)) {
            (spec.grouping, at) = (Some(*grouping), at + 1);
        }
        if chars.get(at) == Some(&'.') {
            let precision = digits(at + 1);
            if precision.is_empty() {
                return Err(Error::new("Format specifier missing precision"));
            }
            (spec.precision, at) = (Some(bounded(&precision)?), at + 1 + precision.len());
        }
        spec.kind = chars.get(at).copied();
        match chars.len() > at + 1 {
            true => Err(Error::new(format!("Invalid format specifier '{text}'"))),
            false => Ok(spec),
        }
    }

    fn unknown(&self, value: &Value) -> Error {
        let kind = self.kind.unwrap_or(' ');
        Error::new(format!("Unknown format code '{kind}' for object of type '{}'", value.kind()))
    }

    /// The value in this format.
    pub fn apply(&self, bounds: &Bounds, value: &Value) -> Result<String> {
        bounds.reserve_text(self.width)?;
        match value {
            Value::Str(text) => {
                if !matches!(self.kind, None | Some('s')) {
                    return Err(self.unknown(value));
                }
                let cut: String = match self.precision {
                    Some(precision) => text.text.chars().take(precision).collect(),
                    None => text.text.to_string(),
                };
                Ok(self.pad(&cut, '<'))
            }
            Value::Float(x) => self.float(value, *x),
            Value::Int(_) | Value::Bool(_) => {
                let n = value.as_int().unwrap_or_default();
                match self.kind {
                    Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => self.float(value, n as f64),
                    _ => self.int(value, n),
                }
            }
            Value::Undefined(_) => Ok(self.pad("", '<')),
            other => {
                let kind = other.kind();
                Err(Error::new(format!("unsupported format string passed to {kind}.__format__")))
            }
        }
    }

    fn int(&self, value: &Value, n: i128) -> Result<String> {
        if self.precision.is_some() {
            return Err(Error::new("Precision not allowed in integer format specifier"));
        }
        let magnitude = n.unsigned_abs();
        let (prefix, digits, every) = match self.kind {
            None | Some('d' | 'n') => ("", magnitude.to_string(), 3),
            Some('b') => ("0b", format!("{magnitude:b}"), 4),
            Some('o') => ("0o", format!("{magnitude:o}"), 4),
            Some('x') => ("0x", format!("{magnitude:x}"), 4),
            Some('X') => ("0X", format!("{magnitude:X}"), 4),
            Some('c') => {
                let c = u32::try_from(n).ok().and_then(char::from_u32);
                let c = c.ok_or_else(|| Error::new("%c arg not in range(0x110000)"))?;
                return Ok(self.pad(&c.to_string(), '<'));
            }
            Some(_) => return Err(self.unknown(value)),
        };
        let prefix = if self.alternate { prefix } else { "" };
        Ok(self.number(n < 0, prefix, &digits, "", every))
    }

    fn float(&self, value: &Value, x: f64) -> Result<String> {
        let magnitude = x.abs();
        let precision = self.precision.unwrap_or(6);
        let text = match self.kind {
            _ if !x.is_finite() => float(magnitude),
            None => match self.precision {
                None => float(magnitude),
                // As `g`, but with a digit behind the point.
                Some(precision) => general(magnitude, precision, false, true),
            },
            Some('f' | 'F') => fixed(magnitude, precision),
            Some('e' | 'E') => exponential(magnitude, precision),
            Some('g' | 'G' | 'n') => general(magnitude, precision, self.alternate, false),
            Some('%') => fixed(magnitude * 100.0, precision) + "%",
            Some(_) => return Err(self.unknown(value)),
        };
        let text = if matches!(self.kind, Some('E' | 'F' | 'G')) { text.to_uppercase() } else { text };
        let whole = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let negative = x.is_sign_negative() && !x.is_nan();
        Ok(self.number(negative, "", &text[..whole], &text[whole..], 3))
    }

    /// A number of its parts, grouped and padded.
    fn number(&self, negative: bool, prefix: &str, digits: &str, rest: &str, every: usize) -> String {
        let sign = match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        };
        let mut digits = digits.to_owned();
        if self.align == Some('=') && self.fill == Some('0') {
            // Zeros are grouped like other digits.
            let taken = sign.len() + prefix.len() + rest.chars().count();
            let grouped =
                |digits: usize| digits + if self.grouping.is_some() { (digits - 1) / every } else { 0 };
            while !digits.is_empty() && grouped(digits.len()) + taken < self.width {
                digits.insert(0, '0');
            }
        }
        if let Some(mark) = self.grouping {
            let mut grouped = String::new();
            for (i, digit) in digits.chars().enumerate() {
                if i > 0 && (digits.len() - i).is_multiple_of(every) {
                    grouped.push(mark);
                }
                grouped.push(digit);
            }
            digits = grouped;
        }
        let body = format!("{digits}{rest}");
        if self.align == Some('=') {
            let length = sign.len() + prefix.len() + body.chars().count();
            let fill = self.fill.unwrap_or(' ').to_string().repeat(self.width.saturating_sub(length));
            return format!("{sign}{prefix}{fill}{body}");
        }
        self.pad(&format!("{sign}{prefix}{body}"), '>')
    }

    /// A text in the field, on this side unless another is asked for.
    fn pad(&self, text: &str, side: char) -> String {
        let missing = self.width.saturating_sub(text.chars().count());
        let fill = |count: usize| self.fill.unwrap_or(' ').to_string().repeat(count);
        match self.align.unwrap_or(side) {
            '>' => format!("{}{text}", fill(missing)),
            '^' => format!("{}{text}{}", fill(missing / 2), fill(missing - missing / 2)),
            _ => format!("{text}{}", fill(missing)),
        }
    }
}

/// With so many digits behind the point.
pub(in super::super) fn fixed(x: f64, precision: usize) -> String {
    if x.is_finite() { format!("{x:.precision$}") } else { float(x) }
}

/// With one digit before the point, and an exponent.
fn exponential(x: f64, precision: usize) -> String {
    let text = format!("{x:.precision$e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) =
                exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// With so many digits, and an exponent only where one is shorter; zeros at the end are left out unless `keep`.
fn general(x: f64, precision: usize, keep: bool, needs_point: bool) -> String {
    let precision = precision.max(1);
    let scientific = exponential(x, precision - 1);
    let exponent: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    // Without a type, what has no digit behind the point has an exponent instead.
    let most = precision as i32 - i32::from(needs_point);
    let strip = |digits: &str| match digits.contains('.') && !keep {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= most {
        return match scientific.split_once('e') {
            Some((digits, exponent)) => format!("{}e{exponent}", strip(digits)),
            None => scientific,
        };
    }
    let plain = strip(&fixed(x, usize::try_from(precision as i32 - 1 - exponent).unwrap_or(0)));
    if needs_point && !plain.contains('.') { plain + ".0" } else { plain }
}
