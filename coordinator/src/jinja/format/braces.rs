//! `str.format`: values in the places of a text's braces.

use std::sync::Arc;

use super::{
    super::{
        access::{attribute, item},
        arguments::Arguments,
        bounds::{Bounds, MAX_TEXT},
        error::{Error, Result},
        value::Value,
    },
    percent::ascii,
    spec::Spec,
};

/// Values, and how those without a name or number are counted.
struct Fields<'a> {
    bounds: &'a Bounds,
    arguments: &'a Arguments,
    next: Option<usize>,
    is_numbered: bool,
}

/// The text `format` with arguments in the places of its braces.
pub(in super::super) fn braces(bounds: &Bounds, format: &str, arguments: &Arguments) -> Result<String> {
    let mut fields = Fields { bounds, arguments, next: Some(0), is_numbered: false };
    fields.text(format, 2)
}

impl Fields<'_> {
    /// A format, whose specifications may be formats themselves, so many levels deep.
    fn text(&mut self, format: &str, levels: usize) -> Result<String> {
        if levels == 0 {
            return Err(Error::new("Max string recursion exceeded"));
        }
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(behind) = rest.strip_prefix(brace) {
                out.push_str(brace);
                rest = behind;
                continue;
            }
            if brace == "}" {
                return Err(Error::new("Single '}' encountered in format string"));
            }
            let mut open = 1;
            let end = rest.char_indices().find(|(_, c)| {
                open += i32::from(*c == '{') - i32::from(*c == '}');
                open == 0
            });
            let Some((end, _)) = end else { return Err(Error::new("expected '}' before end of string")) };
            out.push_str(&self.field(&rest[..end], levels)?);
            rest = &rest[end + 1..];
            if out.len() > MAX_TEXT {
                self.bounds.reserve_text(out.len())?;
            }
        }
        out.push_str(rest);
        Ok(out)
    }

    /// `name!conversion:specification`
    fn field(&mut self, field: &str, levels: usize) -> Result<String> {
        // A colon or an exclamation mark inside brackets belongs to the name.
        let mut inside = false;
        let end = field.find(|c| {
            inside = (inside || c == '[') && c != ']';
            !inside && (c == '!' || c == ':')
        });
        let (name, rest) = field.split_at(end.unwrap_or(field.len()));
        let value = self.value(name)?;
        let (conversion, spec) = match rest.strip_prefix('!') {
            Some(rest) => {
                let mut chars = rest.chars();
                let conversion = chars.next();
                let spec = chars.as_str();
                if !(spec.is_empty() || spec.starts_with(':')) {
                    return Err(Error::new("expected ':' after conversion specifier"));
                }
                (conversion, spec)
            }
            None => (None, rest),
        };
        let spec =
            self.text(spec.strip_prefix(':').unwrap_or(""), levels - 1 + usize::from(spec.is_empty()))?;
        let value = match conversion {
            None => value,
            Some('r') => Value::from(value.repr(self.bounds)?.as_str()),
            Some('s') => Value::from(value.display(self.bounds)?.as_str()),
            Some('a') => Value::from(ascii(&value.repr(self.bounds)?).as_str()),
            Some(other) => return Err(Error::new(format!("Unknown conversion specifier '{other}'"))),
        };
        match spec.as_str() {
            "" => value.display(self.bounds),
            spec => Spec::parse(spec)?.apply(self.bounds, &value),
        }
    }

    /// `first.attribute[item]…`
    fn value(&mut self, name: &str) -> Result<Value> {
        let end = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(end);
        let mixed =
            || Error::new("cannot switch between automatic field numbering and manual field specification");
        let position = match first {
            "" => {
                let next = self.next.filter(|_| !self.is_numbered).ok_or_else(mixed)?;
                self.next = Some(next + 1);
                Some(next)
            }
            digits if digits.bytes().all(|b| b.is_ascii_digit()) => {
                if self.next.is_some_and(|next| next > 0) {
                    return Err(mixed());
                }
                self.is_numbered = true;
                Some(digits.parse().unwrap_or(usize::MAX))
            }
            _ => None,
        };
        let mut value = match position {
            Some(at) => {
                let value = self.arguments.positional.get(at).cloned();
                value.ok_or_else(|| {
                    Error::new(format!("Replacement index {at} out of range for positional args tuple"))
                })?
            }
            None => {
                let named = self.arguments.named.iter().find(|(name, _)| **name == *first);
                let (_, value) =
                    named.ok_or_else(|| Error::new(format!("the format's key '{first}' is not there")))?;
                value.clone()
            }
        };
        while !rest.is_empty() {
            if let Some(behind) = rest.strip_prefix('.') {
                let end = behind.find(['.', '[']).unwrap_or(behind.len());
                let name: Arc<str> = behind[..end].into();
                // Of dicts, items are not taken for attributes here.
                let found = attribute(self.bounds, &value, &name)?;
                if matches!((&value, &found), (Value::Dict(_), found) if !matches!(found, Value::Method(_))) {
                    return Err(Error::new(format!("'dict' object has no attribute '{name}'")));
                }
                value = found;
                rest = &behind[end..];
            } else if let Some((key, behind)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                let key = key.parse::<i128>().map_or_else(|_| Value::from(key), Value::Int);
                value = item(self.bounds, &value, &key)?;
                rest = behind;
            } else {
                return Err(Error::new("Only '.' or '[' may follow ']' in format field specifier"));
            }
        }
        Ok(value)
    }
}
