//! Values as JSON, as Python's `json.dumps` writes it and transformers' `tojson` passes its options on.

use std::fmt::Write;

use super::{
    arguments::Arguments,
    bounds::Bounds,
    compare::sort,
    error::{Error, Result},
    text::{STAND_INS, float},
    value::{Dict, Value},
};

/// How it is written.
struct Json<'a> {
    bounds: &'a Bounds,
    out: String,
    /// Bytes of the output that are counted already.
    counted: usize,
    ensure_ascii: bool,
    sort_keys: bool,
    /// What a level is indented by; lines are not broken without.
    indent: Option<String>,
    between: String,
    colon: String,
}

/// The filter `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(bounds: &Bounds, value: &Value, arguments: &Arguments) -> Result<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = arguments.bind("tojson", names, 0)?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.text.to_string()),
        Some(width) => {
            let width = super::arguments::count("tojson: indent", &width)?;
            bounds.reserve_text(width)?;
            Some(" ".repeat(width))
        }
    };
    let (between, colon) = match separators {
        None | Some(Value::None) => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(separators) => match &separators.items(bounds)?[..] {
            [Value::Str(between), Value::Str(colon)] => (between.text.to_string(), colon.text.to_string()),
            _ => return Err(Error::new("tojson: separators: expected two texts, as in (',', ': ')")),
        },
    };
    let mut json = Json {
        bounds,
        out: String::new(),
        counted: 0,
        ensure_ascii: super::arguments::flag(&ensure_ascii),
        sort_keys: super::arguments::flag(&sort_keys),
        indent,
        between,
        colon,
    };
    json.value(value, 0)?;
    Value::text(bounds, json.out)
}

impl Json<'_> {
    /// Counts what was written since the last time.
    fn count(&mut self) -> Result<()> {
        let more = self.out.len() - self.counted;
        self.counted = self.out.len();
        if self.counted > super::bounds::MAX_TEXT {
            return self.bounds.reserve_text(self.counted);
        }
        self.bounds.reserve_text(more)
    }

    fn value(&mut self, value: &Value, level: usize) -> Result<()> {
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(b) => self.out.push_str(if *b { "true" } else { "false" }),
            Value::Int(n) => drop(write!(self.out, "{n}")),
            Value::Float(x) => self.out.push_str(&number(*x)),
            Value::Str(text) => self.text(&text.text),
            Value::List(seq) | Value::Tuple(seq) if seq.items.is_empty() => self.out.push_str("[]"),
            Value::List(seq) | Value::Tuple(seq) => {
                self.out.push('[');
                for (i, item) in seq.items.iter().enumerate() {
                    self.next(i, level + 1);
                    self.value(item, level + 1)?;
                }
                self.line(level);
                self.out.push(']');
            }
            Value::Dict(dict) if dict.entries().is_empty() => self.out.push_str("{}"),
            Value::Dict(dict) => self.dict(dict, level)?,
            other => {
                return Err(Error::new(format!("Object of type {} is not JSON serializable", other.kind())));
            }
        }
        self.count()
    }

    fn dict(&mut self, dict: &Dict, level: usize) -> Result<()> {
        self.out.push('{');
        let mut keys: Vec<Value> = dict.keys().cloned().collect();
        if self.sort_keys {
            keys = sort(self.bounds, keys, false, &|key| Ok(key.clone()))?;
        }
        for (i, key) in keys.iter().enumerate() {
            self.next(i, level + 1);
            match key {
                Value::Str(text) => self.text(&text.text),
                Value::None => self.out.push_str("\"null\""),
                Value::Bool(b) => drop(write!(self.out, "\"{b}\"")),
                Value::Int(n) => drop(write!(self.out, "\"{n}\"")),
                Value::Float(x) => drop(write!(self.out, "\"{}\"", number(*x))),
                other => {
                    let kind = other.kind();
                    let why = format!("keys must be str, int, float, bool or None, not {kind}");
                    return Err(Error::new(why));
                }
            }
            self.out.push_str(&self.colon);
            if let Some(value) = dict.get(key)? {
                self.value(value, level + 1)?;
            }
        }
        self.line(level);
        self.out.push('}');
        Ok(())
    }

    /// What is before an item.
    fn next(&mut self, i: usize, level: usize) {
        if i > 0 {
            self.out.push_str(&self.between);
        }
        self.line(level);
    }

    fn line(&mut self, level: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..level).for_each(|_| self.out.push_str(indent));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => drop(write!(self.out, "\\u{:04x}", u32::from(c))),
                '\u{7f}'.. if self.ensure_ascii && !STAND_INS.contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn number(x: f64) -> String {
    match x {
        x if x.is_nan() => "NaN".to_owned(),
        x if x.is_infinite() => if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        x => float(x),
    }
}
