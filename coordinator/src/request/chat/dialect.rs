//! The language of templates.

use chrono::{
    DateTime, Local,
    format::{Item, StrftimeItems},
};
use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, from_args},
};
use serde::Serialize;

/// Steps a template may take; a rendering of a long chat takes thousands.
const FUEL: u64 = 10_000_000;
/// Most bytes that a template may write: some times the longest messages.
const MAX_OUTPUT: usize = 4 << 20;
/// The name of the one template.
const NAME: &str = "chat";

/// A chat template, compiled.
#[derive(Debug)]
pub(super) struct Compiled {
    environment: Environment<'static>,
}

impl Compiled {
    /// Compiles a template.
    ///
    /// # Errors
    /// Why it does not compile.
    pub fn new(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(python_method);
        environment.add_function("strftime_now", |format: String| strftime(&format, Local::now()));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let source = without_generation(source);
        environment.add_template_owned(NAME, source).map_err(|e| e.to_string())?;
        Ok(Compiled { environment })
    }

    /// The text that it makes of variables.
    ///
    /// # Errors
    /// If the template raises an exception, fails, works too long, or writes too much.
    pub fn render(&self, variables: serde_json::Map<String, serde_json::Value>) -> Result<String, String> {
        let mut output = Output::default();
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|t| t.render_captured_to(Value::from(Serde(variables)), &mut output));
        match rendered {
            _ if output.is_full => Err(format!("it writes more than {MAX_OUTPUT} bytes for them")),
            Ok(_) => Ok(String::from_utf8_lossy(&output.text).into_owned()),
            Err(e) => Err(e.detail().map_or_else(|| e.to_string(), str::to_owned)),
        }
    }
}

/// What a template writes, up to [`MAX_OUTPUT`] bytes.
#[derive(Debug, Default)]
struct Output {
    text: Vec<u8>,
    is_full: bool,
}

impl std::io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.is_full |= self.text.len() + bytes.len() > MAX_OUTPUT;
        if self.is_full {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Methods of Python's strings and lists: minijinja's, and some more that templates use.
fn python_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let missing = || Error::new(ErrorKind::InvalidOperation, "index: the value is not there");
    match (value.as_str(), method) {
        (Some(text), "removeprefix" | "removesuffix") => {
            let (part,): (&str,) = from_args(args)?;
            let rest = match method {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        (Some(text), "index") => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).ok_or_else(missing)?;
            Ok(Value::from(text[..at].chars().count()))
        }
        (None, "index") => {
            let (wanted,): (Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == wanted);
            Ok(Value::from(at.ok_or_else(missing)?))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `now` as Python's `strftime` writes it.
fn strftime(format: &str, now: DateTime<Local>) -> Result<String, Error> {
    let items: Vec<_> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        let why = format!("strftime_now: {format:?} is no format of a time");
        return Err(Error::new(ErrorKind::InvalidOperation, why));
    }
    Ok(now.format_with_items(items.iter()).to_string())
}

/// The template without transformers' `generation` blocks, which mark the model's part for training and write nothing:
/// blocks that trim the same space around them take their place.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let inside = &rest[begin + 2..];
        let Some(end) = inside.find("%}") else { break };
        let tag = &inside[..end];
        out.push_str(&rest[..begin]);
        let name = tag.trim_matches(['-', '+']).trim();
        let instead = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str("{%");
        out.push_str(&instead.map_or_else(|| tag.to_owned(), |instead| tag.replacen(name, instead, 1)));
        out.push_str("%}");
        rest = &inside[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False)`: spaces after separators, order kept, nothing escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let pad = vec![b' '; width.min(16)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&pad);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSeparators);
            value.serialize(&mut serializer).map_err(failed)?;
        }
    }
    Ok(Value::from(String::from_utf8_lossy(&out).into_owned()))
}

/// `", "` and `": "`.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value as Json, json};

    use super::*;

    fn cases() -> Json {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/chat_templates.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn render(source: &str, mut variables: Json) -> Result<String, String> {
        variables["bos_token"] = "<|bos|>".into();
        variables["eos_token"] = "<|eos|>".into();
        Compiled::new(source).unwrap().render(variables.as_object().unwrap().clone())
    }

    #[test]
    fn renders_what_transformers_renders() {
        let cases = cases();
        let chat = cases["messages"].as_array().unwrap();
        for (name, case) in cases["templates"].as_object().unwrap() {
            let source = case["template"].as_str().unwrap();
            let with = |messages: &[Json], prompt: bool| {
                render(source, json!({"messages": messages, "add_generation_prompt": prompt})).unwrap()
            };
            assert_eq!(with(chat, true), case["with_prompt"].as_str().unwrap(), "{name}");
            assert_eq!(with(&chat[..2], false), case["first_two"].as_str().unwrap(), "{name}");
        }
    }

    #[test]
    fn times_are_written_as_python_writes_them() {
        use chrono::TimeZone;
        let then = Local.with_ymd_and_hms(2026, 3, 7, 9, 5, 0).unwrap();
        assert_eq!(strftime("%d %b %Y, %H:%M", then).unwrap(), "07 Mar 2026, 09:05");
        assert!(strftime("%!", then).is_err());
        assert_eq!(render("{{ strftime_now('%Y') | length }}", json!({})).unwrap(), "4");
        assert!(render("{{ strftime_now('%!') }}", json!({})).is_err());
    }

    #[test]
    fn what_goes_wrong_is_said_and_bounded() {
        for broken in ["{% for %}", "{%}", "{%}%}", "{%"] {
            assert!(Compiled::new(broken).is_err(), "{broken:?}");
        }
        let refused = |source: &str| Compiled::new(source).unwrap().render(Map::new()).unwrap_err();
        assert_eq!(refused("{{ raise_exception('roles must alternate') }}"), "roles must alternate");
        refused("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}");
        let wordy = refused("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}");
        assert!(wordy.contains("more than 4194304 bytes"), "{wordy}");
        refused("{% include '/etc/passwd' %}");
    }
}
