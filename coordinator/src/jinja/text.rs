//! Values as text: what Python's `str` and `repr` write.

use std::fmt::Write;

use super::{
    bounds::Bounds,
    error::Result,
    value::{Text, Value, View},
};

/// Private characters, which nobody but us is likely to use.
pub(super) const STAND_INS: std::ops::RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';

/// White space to Python, which counts four separators that Unicode does not.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

impl Value {
    /// As `str` writes it.
    pub fn display(&self, bounds: &Bounds) -> Result<String> {
        let mut out = String::new();
        match self {
            Value::Str(text) => {
                bounds.reserve_text(text.text.len())?;
                out.push_str(&text.text);
            }
            Value::Undefined(_) => {}
            other => other.write_repr(bounds, &mut out)?,
        }
        Ok(out)
    }

    /// As `repr` writes it.
    pub fn repr(&self, bounds: &Bounds) -> Result<String> {
        let mut out = String::new();
        self.write_repr(bounds, &mut out)?;
        Ok(out)
    }

    fn write_repr(&self, bounds: &Bounds, out: &mut String) -> Result<()> {
        let before = out.len();
        // A namespace may be inside itself.
        let _level = bounds.deeper()?;
        match self {
            Value::Undefined(_) => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
            Value::Int(n) => drop(write!(out, "{n}")),
            Value::Float(x) => out.push_str(&float(*x)),
            Value::Str(Text { text, safe: false }) => quote(text, out),
            Value::Str(Text { text, .. }) => {
                out.push_str("Markup(");
                quote(text, out);
                out.push(')');
            }
            Value::Bytes(bytes) => quote_bytes(bytes, out),
            Value::List(seq) => list(bounds, out, "[", &seq.items, "]")?,
            Value::Tuple(seq) => {
                list(bounds, out, "(", &seq.items, if seq.items.len() == 1 { ",)" } else { ")" })?;
            }
            Value::Dict(dict) => {
                out.push('{');
                for (i, (key, value)) in dict.entries().iter().enumerate() {
                    out.push_str(if i == 0 { "" } else { ", " });
                    key.write_repr(bounds, out)?;
                    out.push_str(": ");
                    value.write_repr(bounds, out)?;
                }
                out.push('}');
            }
            Value::View(_, view) => {
                let name = match view {
                    View::Keys => "dict_keys([",
                    View::Values => "dict_values([",
                    View::Items => "dict_items([",
                };
                list(bounds, out, name, &self.items(bounds)?, "])")?;
            }
            Value::Range(first, count, step) => {
                let stop = first + *count as i128 * step;
                let _ = match step {
                    1 => write!(out, "range({first}, {stop})"),
                    _ => write!(out, "range({first}, {stop}, {step})"),
                };
            }
            Value::Iter(_) => out.push_str("<generator object>"),
            Value::Namespace(namespace) => {
                let dict = namespace.dict();
                out.push_str("<Namespace {");
                for (i, (key, value)) in dict.entries().iter().enumerate() {
                    out.push_str(if i == 0 { "" } else { ", " });
                    key.write_repr(bounds, out)?;
                    out.push_str(": ");
                    value.write_repr(bounds, out)?;
                }
                out.push_str("}>");
            }
            Value::Method(method) => {
                let _ = write!(out, "<built-in method {} of {} object>", method.1, method.0.kind());
            }
            Value::Object(object) => out.push_str(&object.name()),
        }
        // What is inside has counted itself; texts are counted here.
        match self {
            Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::View(..) => bounds.step(),
            _ => bounds.reserve_text(out.len() - before),
        }
    }
}

fn list(bounds: &Bounds, out: &mut String, open: &str, items: &[Value], close: &str) -> Result<()> {
    out.push_str(open);
    for (i, item) in items.iter().enumerate() {
        out.push_str(if i == 0 { "" } else { ", " });
        item.write_repr(bounds, out)?;
    }
    out.push_str(close);
    Ok(())
}

/// A float as Python writes it: the fewest digits that mean it, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match exponent {
        -4..=15 => {
            let plain = x.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
        _ => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

/// Whether a character is printed as it is: if Python does so, or if it stands for one of a control token that a user quotes,
/// which must not be known here (request/reader.rs).
pub(super) fn is_printable(c: char) -> bool {
    if STAND_INS.contains(&c) {
        return true;
    }
    // The first character of a text is shown otherwise if it combines with what stands before it.
    c == ' '
        || ['\'', '"', '\\'].contains(&c)
        || ['a', c].iter().collect::<String>().escape_debug().nth(1) == Some(c)
}

fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if is_printable(c) => out.push(c),
            c => escape(c, out),
        }
    }
    out.push(quote);
}

/// A character by its number, as Python writes what it does not print.
pub(super) fn escape(c: char, out: &mut String) {
    let code = u32::from(c);
    let _ = match code {
        0..=0xff => write!(out, "\\x{code:02x}"),
        0x100..=0xffff => write!(out, "\\u{code:04x}"),
        _ => write!(out, "\\U{code:08x}"),
    };
}

fn quote_bytes(bytes: &[u8], out: &mut String) {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    out.push('b');
    out.push(quote);
    for byte in bytes {
        match byte {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b if char::from(*b) == quote => out.extend(['\\', quote]),
            b' '..=b'~' => out.push(char::from(*byte)),
            _ => drop(write!(out, "\\x{byte:02x}")),
        }
    }
    out.push(quote);
}

/// The text with what has a meaning in HTML written as entities.
pub(super) fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}
