//! Chat templates: messages to the text a model was trained to continue, as transformers renders them.
//!
//! A template comes only from the model's own directory, runs without a loader and with a bound on its work, and its
//! own text alone may become control tokens.

use std::collections::BTreeMap;

use chrono::{
    DateTime, Local,
    format::{Item, StrftimeItems},
};
use minijinja::{
    Environment, Error, ErrorKind, State, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, from_args},
};
use serde::{Deserialize, Serialize};
use strata_proto::Files;

/// Steps a template may take; a rendering of a long chat takes thousands.
const FUEL: u64 = 10_000_000;
/// Most bytes that a template may write: some times the longest messages.
const MAX_OUTPUT: usize = 4 << 20;
/// The name of the one template.
const NAME: &str = "chat";

/// Why a chat cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The model has none.
    #[error(
        "the model has no chat template (chat_template.jinja, or in tokenizer_config.json); send a prompt instead"
    )]
    NoTemplate,
    /// The template does not compile.
    #[error("the model's chat template does not compile: {0}")]
    Syntax(String),
    /// The template refuses these messages, or fails on them.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// A configuration file that does not parse.
    #[error("tokenizer_config.json: {0}")]
    Config(String),
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    /// Who says it: `user`, `assistant`, `system`, or what the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What of `tokenizer_config.json` matters to templates.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<TemplateEntry>,
}

impl TokenizerConfig {
    fn read(files: &Files) -> Result<Self, ChatError> {
        match files.get("tokenizer_config.json") {
            Some(json) => serde_json::from_slice(json).map_err(|e| ChatError::Config(e.to_string())),
            None => Ok(TokenizerConfig::default()),
        }
    }
}

/// transformers 4 keeps a text, or a list of named ones.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TemplateEntry {
    Text(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A model's chat template, compiled.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, …, as templates name them.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template among a model's files, to which `roles` are `bos_token`, `eos_token`, …; `None` if there is none.
    ///
    /// # Errors
    /// If it does not compile, or the configuration does not parse.
    pub fn new(files: &Files, roles: &BTreeMap<String, String>) -> Result<Option<Self>, ChatError> {
        let config = TokenizerConfig::read(files)?;
        let source = match (files.get("chat_template.jinja"), config.chat_template) {
            (Some(text), _) => String::from_utf8_lossy(text).into_owned(),
            (None, Some(TemplateEntry::Text(text))) => text,
            (None, Some(TemplateEntry::Named(list))) => {
                match list.into_iter().find(|t| t.name == "default") {
                    Some(named) => named.template,
                    None => return Ok(None),
                }
            }
            (None, None) => return Ok(None),
        };
        Self::compile(source, roles.clone()).map(Some)
    }

    fn compile(source: String, special_tokens: BTreeMap<String, String>) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| ChatError::Syntax(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(python_method);
        environment.add_function("strftime_now", |format: String| strftime(&format, Local::now()));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let source = without_generation(&source);
        environment.add_template_owned(NAME, source).map_err(|e| ChatError::Syntax(e.to_string()))?;
        Ok(ChatTemplate { environment, special_tokens })
    }

    /// The text of a chat, with the beginning of the model's answer if `prompt`.
    ///
    /// # Errors
    /// If the template raises an exception, fails, works too long, or writes too much.
    pub fn render(&self, messages: &[Message], prompt: bool) -> Result<String, ChatError> {
        let variables = context! {
            messages => Serde(messages),
            add_generation_prompt => prompt,
            ..Value::from(Serde(&self.special_tokens))
        };
        let mut output = Output::default();
        let rendered =
            self.environment.get_template(NAME).and_then(|t| t.render_captured_to(variables, &mut output));
        match rendered {
            _ if output.is_full => {
                Err(ChatError::Refused(format!("it writes more than {MAX_OUTPUT} bytes for them")))
            }
            Ok(_) => Ok(String::from_utf8_lossy(&output.text).into_owned()),
            Err(e) => Err(ChatError::Refused(e.detail().map_or_else(|| e.to_string(), str::to_owned))),
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
    use serde_json::Value as Json;

    use super::*;

    fn models() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models")
    }

    fn json(path: &str) -> Json {
        serde_json::from_slice(&std::fs::read(models().join(path)).unwrap()).unwrap()
    }

    fn messages(list: &Json) -> Vec<Message> {
        let text = |m: &Json, key: &str| m[key].as_str().unwrap().to_owned();
        let list = list.as_array().unwrap().iter();
        list.map(|m| Message { role: text(m, "role"), content: text(m, "content") }).collect()
    }

    fn compile(source: &str) -> Result<ChatTemplate, ChatError> {
        let tokens = [("bos_token", "<|bos|>"), ("eos_token", "<|eos|>")];
        let tokens = tokens.map(|(k, v)| (k.to_owned(), v.to_owned()));
        ChatTemplate::compile(source.to_owned(), tokens.into())
    }

    #[test]
    fn renders_what_transformers_renders() {
        let cases = json("chat_templates.json");
        let chat = messages(&cases["messages"]);
        for (name, case) in cases["templates"].as_object().unwrap() {
            let template = compile(case["template"].as_str().unwrap()).unwrap();
            assert_eq!(
                template.render(&chat, true).unwrap(),
                case["with_prompt"].as_str().unwrap(),
                "{name}"
            );
            assert_eq!(
                template.render(&chat[..2], false).unwrap(),
                case["first_two"].as_str().unwrap(),
                "{name}"
            );
        }
    }

    #[test]
    fn finds_the_template_in_either_place() {
        let read = |name: &str| std::fs::read(models().join("shakespeare").join(name)).unwrap();
        let file = |name: &str, data: Vec<u8>| (name.to_owned(), data);
        let roles = |bos: &str| BTreeMap::from([("bos_token".to_owned(), bos.to_owned())]);
        let config = read("tokenizer_config.json");
        let new = Files::from([
            file("tokenizer_config.json", config),
            file("chat_template.jinja", read("chat_template.jinja")),
        ]);
        let expected = json("shakespeare/expected.json");
        let chat = messages(&expected["chat"]["messages"]);
        let text = ChatTemplate::new(&new, &roles("<|bos|>")).unwrap().unwrap().render(&chat, true).unwrap();
        assert_eq!(text, expected["chat"]["text"].as_str().unwrap());

        let old = r#"{"bos_token": {"content": "<s>"}, "chat_template": [
            {"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}!"}]}"#;
        let old = Files::from([file("tokenizer_config.json", old.into())]);
        assert_eq!(
            ChatTemplate::new(&old, &roles("<s>")).unwrap().unwrap().render(&chat, true).unwrap(),
            "<s>!"
        );
        assert!(ChatTemplate::new(&Files::new(), &roles("<s>")).unwrap().is_none());
    }

    #[test]
    fn times_are_written_as_python_writes_them() {
        use chrono::TimeZone;
        let then = Local.with_ymd_and_hms(2026, 3, 7, 9, 5, 0).unwrap();
        assert_eq!(strftime("%d %b %Y, %H:%M", then).unwrap(), "07 Mar 2026, 09:05");
        assert!(strftime("%!", then).is_err());
        let today = compile("{{ strftime_now('%Y') | length }}").unwrap();
        assert_eq!(today.render(&[], true).unwrap(), "4");
        let bad = compile("{{ strftime_now('%!') }}").unwrap();
        assert!(matches!(bad.render(&[], true), Err(ChatError::Refused(_))));
    }

    #[test]
    fn what_goes_wrong_is_said_and_bounded() {
        for broken in ["{% for %}", "{%}", "{%}%}", "{%"] {
            assert!(matches!(compile(broken), Err(ChatError::Syntax(_))), "{broken:?}");
        }
        let raises = compile("{{ raise_exception('roles must alternate') }}").unwrap();
        assert_eq!(raises.render(&[], true), Err(ChatError::Refused("roles must alternate".into())));
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(matches!(compile(endless).unwrap().render(&[], true), Err(ChatError::Refused(_))));
        let wordy = "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}";
        let refused = compile(wordy).unwrap().render(&[], true).unwrap_err().to_string();
        assert!(refused.contains("more than 4194304 bytes"), "{refused}");
        let outside = compile("{% include '/etc/passwd' %}").unwrap();
        assert!(matches!(outside.render(&[], true), Err(ChatError::Refused(_))));
    }
}
