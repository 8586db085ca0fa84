//! A model's chat templates: where they are, which of them a chat takes, and what is around the rendering.
//!
//! A template comes only from the model's own directory, runs without a loader and with a bound on its work, and its
//! own text alone may become control tokens.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use strata_proto::Files;

use super::{
    ChatError,
    conversation::{Conversation, Ending},
};
use crate::jinja;

/// The folder of named templates.
const FOLDER: &str = "additional_chat_templates/";
/// The template that is taken unless another is asked for.
const DEFAULT: &str = "default";
/// The one that is taken for a chat with tools.
const WITH_TOOLS: &str = "tool_use";
/// What transformers marks the end of what is to be continued with. Its space shows whether the template trims.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// The names under which messages have a model's reasoning; templates read the first, those of gpt-oss the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What of `tokenizer_config.json` matters to templates.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    chat_template: Option<TemplateEntry>,
}

impl TokenizerConfig {
    fn read(files: &Files) -> Result<Self, ChatError> {
        let broken = |e: serde_json::Error| ChatError::Config {
            file: "tokenizer_config.json".into(),
            why: e.to_string(),
        };
        files
            .get("tokenizer_config.json")
            .map_or(Ok(Self::default()), |json| serde_json::from_slice(json).map_err(broken))
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

/// A model's chat templates, compiled.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    /// By name. Those that do not compile are refused when one asks for them.
    templates: BTreeMap<String, Result<Template, ChatError>>,
    /// `bos_token`, `eos_token`, …, as templates name them.
    special_tokens: BTreeMap<String, String>,
}

/// One of them.
#[derive(Debug)]
struct Template {
    source: String,
    compiled: jinja::Template,
}

impl ChatTemplate {
    /// The templates among a model's files, to which `roles` are `bos_token`, `eos_token`, …; `None` if there are none. As in transformers, files have precedence over
    /// tokenizer_config.json, which counts only if there are none.
    ///
    /// # Errors
    /// If the one that is taken by default does not compile, or the configuration does not parse.
    pub fn new(files: &Files, roles: &BTreeMap<String, String>) -> Result<Option<Self>, ChatError> {
        let mut sources = from_files(files)?;
        if sources.is_empty() {
            let inside = |name| format!("tokenizer_config.json: chat_template{name}");
            sources = match TokenizerConfig::read(files)?.chat_template {
                None => return Ok(None),
                Some(TemplateEntry::Text(text)) => {
                    [(DEFAULT.to_owned(), (inside(String::new()), text))].into()
                }
                Some(TemplateEntry::Named(list)) => {
                    let list = list.into_iter();
                    list.map(|t| (t.name.clone(), (inside(format!(" {:?}", t.name)), t.template))).collect()
                }
            };
        }
        if sources.is_empty() {
            return Ok(None);
        }
        let templates = sources.into_iter().map(|(name, (file, source))| {
            let compiled = jinja::Template::new(&source);
            let compiled = compiled.map_err(|why| ChatError::Syntax { file, why: why.to_string() });
            (name, compiled.map(|compiled| Template { source, compiled }))
        });
        let templates: BTreeMap<_, _> = templates.collect();
        if let Some(Err(error)) = templates.get(DEFAULT) {
            return Err(error.clone());
        }
        Ok(Some(ChatTemplate { templates, special_tokens: roles.clone() }))
    }

    /// The text of a chat.
    ///
    /// # Errors
    /// If no template has the name, or the template raises an exception, fails, works too long, or writes too much.
    pub fn render(&self, chat: &Conversation) -> Result<String, ChatError> {
        let template = self.choose(chat)?;
        let mut messages: Vec<_> = chat.messages.iter().map(|message| readable(message.clone())).collect();
        let continued = match &chat.ending {
            Ending::Continue(name) => Some(mark(&mut messages, name, &template.source)?),
            Ending::Prompt | Ending::Nothing => None,
        };
        let tokens = self.special_tokens.iter().map(|(name, text)| (name.clone(), Json::from(text.as_str())));
        let mut variables: Map<String, Json> = tokens.collect();
        // What a caller gives has precedence over the tokens' texts, and is as little in the way of the rest.
        variables.extend(chat.arguments.clone());
        let prompt = chat.ending == Ending::Prompt;
        for (name, value) in [
            ("messages", messages.into()),
            ("tools", chat.tools.clone().into()),
            ("documents", chat.documents.clone().into()),
            ("add_generation_prompt", prompt.into()),
        ] {
            variables.insert(name.to_owned(), value);
        }
        let text = template.compiled.render(&variables).map_err(|why| ChatError::Refused(why.to_string()))?;
        match continued {
            Some(continued) => cut(text, &continued),
            None => Ok(text),
        }
    }

    /// Whether the one that is taken by default reads what is said as a list of parts, by its text, as sentence-transformers
    /// tells (`InputFormatter._infer_format`).
    pub fn reads_parts(&self) -> bool {
        const SIGNS: [&str; 5] = ["content[0]", ".type", "'type'", "\"type\"", "message.content["];
        let default = self.templates.get(DEFAULT).and_then(|template| template.as_ref().ok());
        default.is_none_or(|template| SIGNS.iter().any(|sign| template.source.contains(sign)))
    }

    /// Which template a chat takes: the one that is named, `tool_use` if it has tools, `default`.
    fn choose(&self, chat: &Conversation) -> Result<&Template, ChatError> {
        let found = match &chat.template {
            Some(name) => self.templates.get(name),
            None => {
                let with_tools = chat.tools.as_ref().and_then(|_| self.templates.get(WITH_TOOLS));
                with_tools.or_else(|| self.templates.get(DEFAULT))
            }
        };
        match found {
            Some(Ok(template)) => Ok(template),
            Some(Err(error)) => Err(error.clone()),
            None => {
                let asked = match &chat.template {
                    Some(name) => strata_proto::error::quoted(name).to_string(),
                    None => "no name (which stands for \"default\")".to_owned(),
                };
                let names = self.templates.keys().map(|name| format!("{name:?}")).collect();
                Err(ChatError::NoSuchTemplate { asked, names })
            }
        }
    }
}

/// The templates that are files of their own: name, path and text.
fn from_files(files: &Files) -> Result<BTreeMap<String, (String, String)>, ChatError> {
    let names = files.keys().filter_map(|path| match path.as_str() {
        "chat_template.jinja" => Some((DEFAULT, path)),
        path_in_folder => Some((path_in_folder.strip_prefix(FOLDER)?.strip_suffix(".jinja")?, path)),
    });
    let mut sources = BTreeMap::new();
    for (name, path) in names {
        let text = std::str::from_utf8(&files[path])
            .map_err(|e| ChatError::Config { file: path.clone(), why: format!("no UTF-8 text: {e}") })?;
        // The folder comes first in the order of names, and its `default`, too, is what transformers takes.
        sources.entry(name.to_owned()).or_insert((path.clone(), text.to_owned()));
    }
    Ok(sources)
}

/// A message as templates of any age read it: keys that are null are left out, and reasoning is under each of the names
/// that templates read.
fn readable(mut message: Map<String, Json>) -> Map<String, Json> {
    message.retain(|_, value| !value.is_null());
    let Some(reasoning) = REASONING.iter().find_map(|key| message.get(*key)).cloned() else { return message };
    let mut aliased = Map::new();
    aliased.insert("thinking".to_owned(), reasoning.clone());
    aliased.extend(message);
    aliased.insert("reasoning_content".to_owned(), reasoning);
    aliased
}

/// Puts [`MARK`] behind what a field of the last message says, and returns what it said.
fn mark(messages: &mut [Map<String, Json>], name: &str, source: &str) -> Result<String, ChatError> {
    let refuse = |why: String| ChatError::Continue(why);
    let last = messages.last_mut().ok_or_else(|| refuse("there is no message to continue".into()))?;
    let said = last.get(name).cloned();
    let said = said.ok_or_else(|| refuse(format!("the last message has no {name:?} to continue")))?;
    let mut names = vec![name];
    if REASONING.contains(&name) {
        names = REASONING.into_iter().filter(|key| last.get(*key) == Some(&said)).collect();
    }
    if !names.iter().any(|name| source.contains(name)) {
        return Err(refuse(format!("the model's chat template does not read {name:?}")));
    }
    if let Json::String(text) = said {
        for name in names {
            last.insert(name.to_owned(), Json::String(format!("{text}{MARK}")));
        }
        return Ok(text);
    }
    // Of several parts, the last that is a text.
    let parts = last.get_mut(name).and_then(Json::as_array_mut).into_iter().flatten().rev();
    for part in parts {
        if let Some(Json::String(text)) = part.get_mut("text") {
            let said = text.clone();
            text.push_str(MARK);
            return Ok(said);
        }
    }
    Err(refuse(format!("{name:?} of the last message has no text to continue")))
}

/// The text up to where the mark is; without the space before it if the template trims what it writes.
fn cut(text: String, continued: &str) -> Result<String, ChatError> {
    let found = text.rfind(MARK.trim_end()).filter(|_| text.contains(continued.trim()));
    let at = found.ok_or_else(|| {
        let why =
            "the last message does not appear as it is in what the model's chat template makes of the chat";
        ChatError::Continue(why.into())
    })?;
    let before = &text[..at];
    Ok(if text[at..].starts_with(MARK) { before } else { before.trim_end() }.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        list.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    fn template(list: &[(&str, &str)]) -> ChatTemplate {
        ChatTemplate::new(&files(list), &roles("<s>")).unwrap().unwrap()
    }

    fn roles(bos: &str) -> BTreeMap<String, String> {
        [("bos_token".to_owned(), bos.to_owned())].into()
    }

    fn named(name: &str) -> Conversation {
        Conversation { template: Some(name.into()), ..Conversation::says("x") }
    }

    /// The chats of the fixture, as transformers takes them.
    fn conversation(chat: &Json) -> Conversation {
        let mut arguments = chat.as_object().unwrap().clone();
        let list = |value: Option<Json>| Some(value?.as_array()?.clone());
        let messages = list(arguments.shift_remove("messages")).unwrap().into_iter();
        let (tools, documents) = (arguments.shift_remove("tools"), arguments.shift_remove("documents"));
        let prompt = arguments.shift_remove("add_generation_prompt").is_some();
        Conversation {
            messages: messages.map(|message| message.as_object().unwrap().clone()).collect(),
            tools: list(tools),
            documents: list(documents),
            arguments,
            template: None,
            ending: if prompt { Ending::Prompt } else { Ending::Nothing },
        }
    }

    fn fixture() -> (Json, BTreeMap<String, String>) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/chat_templates.json");
        let tokens = [("bos_token", "<|bos|>"), ("eos_token", "<|eos|>")];
        let tokens = tokens.map(|(name, text)| (name.to_owned(), text.to_owned()));
        (serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap(), tokens.into())
    }

    #[test]
    fn templates_of_every_style_render_as_in_transformers() {
        let (fixture, roles) = fixture();
        let mut wrong = Vec::new();
        for (name, case) in fixture["templates"].as_object().unwrap() {
            let files = files(&[("chat_template.jinja", case["template"].as_str().unwrap())]);
            let template = ChatTemplate::new(&files, &roles).unwrap().unwrap();
            for (chat, expected) in case["texts"].as_object().unwrap() {
                let found = template.render(&conversation(&fixture["chats"][chat]));
                if found.as_deref().ok() != expected.as_str() {
                    wrong.push(format!("{name}, {chat}:\n{found:?}\nexpected {expected}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn last_messages_are_continued_as_in_transformers() {
        let (fixture, roles) = fixture();
        for case in fixture["continued"].as_array().unwrap() {
            let files = files(&[("chat_template.jinja", case["template"].as_str().unwrap())]);
            let template = ChatTemplate::new(&files, &roles).unwrap().unwrap();
            let mut chat = conversation(case);
            chat.arguments.clear();
            chat.ending = Ending::Continue(case["field"].as_str().unwrap().to_owned());
            let found = template.render(&chat);
            assert_eq!(found.as_deref().ok(), case["text"].as_str(), "{case}: {found:?}");
        }
    }

    #[test]
    fn finds_templates_in_each_place_and_chooses_as_transformers_does() {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/shakespeare");
        let read = |name: &str| (name.to_owned(), std::fs::read(models.join(name)).unwrap());
        let new = Files::from(["tokenizer_config.json", "chat_template.jinja"].map(read));
        let expected: Json = serde_json::from_slice(&read("expected.json").1).unwrap();
        let messages = expected["chat"]["messages"].as_array().unwrap();
        let messages = messages.iter().map(|m| m.as_object().unwrap().clone()).collect();
        let chat = Conversation { messages, ..Conversation::default() };
        let text = ChatTemplate::new(&new, &roles("<|bos|>")).unwrap().unwrap().render(&chat).unwrap();
        assert_eq!(text, expected["chat"]["text"].as_str().unwrap());

        let chat = Conversation::says("x");
        let with_tools = Conversation { tools: Some(Vec::new()), ..chat.clone() };
        let old = r#"{"bos_token": {"content": "<s>"}, "chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}!"}]}"#;
        let old = ("tokenizer_config.json", old);
        assert_eq!(template(&[old]).render(&chat).unwrap(), "<s>!");
        assert_eq!(template(&[old]).render(&with_tools).unwrap(), "tools", "of no tools, but given");
        let folder = [
            old,
            ("additional_chat_templates/rag.jinja", "rag"),
            ("additional_chat_templates/a.b.jinja", "{{ no"),
            ("chat_template.jinja", "file"),
        ];
        let several = template(&folder);
        assert_eq!(several.render(&with_tools).unwrap(), "file", "the configuration's count no more");
        assert_eq!(several.render(&named("rag")).unwrap(), "rag");
        let broken = several.render(&named("a.b")).unwrap_err();
        assert!(
            matches!(broken, ChatError::Syntax { ref file, .. } if file.ends_with("a.b.jinja")),
            "{broken}"
        );
        let unknown = several.render(&named("tool_use")).unwrap_err().to_string();
        assert_eq!(
            unknown,
            "chat_template: \"tool_use\" is none of the model's chat templates, which are \"a.b\", \"default\", \"rag\""
        );
        let alone = template(&[("additional_chat_templates/default.jinja", "alone"), old]);
        assert_eq!(alone.render(&chat).unwrap(), "alone");
        let none = template(&folder[..2]).render(&chat).unwrap_err().to_string();
        assert!(none.contains("no name") && none.contains("\"rag\""), "{none}");
        assert!(ChatTemplate::new(&Files::new(), &roles("<s>")).unwrap().is_none());
    }

    #[test]
    fn tools_and_documents_are_always_there_and_arguments_have_precedence() {
        let source =
            "{{ tools is none }}{{ documents is defined }}{{ tools == none }}|{{ bos_token }}{{ style }}";
        let template = template(&[("chat_template.jinja", source)]);
        let mut chat = Conversation::says("x");
        assert_eq!(template.render(&chat).unwrap(), "TrueTrueTrue|<s>");
        chat.tools = Some(vec![json!({})]);
        chat.arguments = json!({"bos_token": "<b>", "style": "s"}).as_object().unwrap().clone();
        assert_eq!(template.render(&chat).unwrap(), "FalseTrueFalse|<b>s");
    }

    #[test]
    fn messages_lose_nulls_and_have_their_reasoning_under_each_name() {
        let source =
            "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}|{% endfor %}";
        let template = template(&[("chat_template.jinja", source)]);
        let object = |value: Json| value.as_object().unwrap().clone();
        let messages = vec![
            object(json!({"role": "a", "content": null, "x": 1})),
            object(json!({"role": "a", "reasoning": "r"})),
            object(json!({"role": "a", "thinking": "t", "reasoning_content": null})),
        ];
        let chat = Conversation { messages, ..Conversation::default() };
        let expected = "role=a;x=1;|thinking=r;role=a;reasoning=r;reasoning_content=r;|\
                        thinking=t;role=a;reasoning_content=t;|";
        assert_eq!(template.render(&chat).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_continued_is_refused() {
        let template =
            template(&[("chat_template.jinja", "{% for m in messages %}{{ m.content[:3] }}{% endfor %}")]);
        let refused = |mut chat: Conversation, name: &str, expected: &str| {
            chat.ending = Ending::Continue(name.into());
            let error = template.render(&chat).unwrap_err().to_string();
            assert!(error.starts_with("continue_final_message: ") && error.contains(expected), "{error}");
        };
        refused(Conversation::default(), "content", "no message");
        refused(Conversation::says("x"), "reasoning", "has no \"reasoning\"");
        refused(Conversation::says("x"), "role", "does not read \"role\"");
        refused(Conversation::says("long enough to be cut"), "content", "does not appear");
        let mut parts = Conversation::says("");
        parts.messages[0].insert("content".into(), json!([{"type": "image"}]));
        refused(parts, "content", "no text to continue");
    }
}
