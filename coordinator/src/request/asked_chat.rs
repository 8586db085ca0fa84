//! The chat that a request asks for: its JSON read, and bounded.

use serde_json::{Map, Value as Json};
use strata_proto::v1;

use super::{
    bounds::{MAX_JSON_DEPTH, MAX_MESSAGES, MAX_TEXT_BYTES},
    chat::{Conversation, Ending},
    error::{AdmissionError, field},
};

/// What has a field of its own in a request, with its name there.
const FIELDS: [&str; 5] = ["messages", "tools", "documents", "chat_template", "continue_final_message"];

/// Bytes of what a request says of a chat.
pub(crate) fn bytes(request: &v1::GenerateRequest) -> usize {
    let messages = request.messages.iter().map(|m| m.role.len() + m.content.len() + m.fields.len());
    let texts = [&request.tools, &request.documents, &request.template_arguments];
    messages.sum::<usize>() + texts.into_iter().flatten().map(String::len).sum::<usize>()
}

/// Refuses what belongs to a chat in a request that has no messages.
///
/// # Errors
/// The first such field.
pub(crate) fn check_absent(request: &v1::GenerateRequest) -> Result<(), AdmissionError> {
    let fields = [
        ("tools", request.tools.is_some()),
        ("documents", request.documents.is_some()),
        ("template_arguments", request.template_arguments.is_some()),
        ("continue_final_message", !request.continue_final_message.is_empty()),
        ("chat_template", request.chat_template.is_some()),
    ];
    match fields.into_iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(field(name, "given without messages: it is for the template of a chat")),
        None => Ok(()),
    }
}

/// The chat of a request that has messages.
///
/// # Errors
/// The first field that does not parse, with the place; or that is too long or too deep, with the bound.
pub(crate) fn conversation(request: &mut v1::GenerateRequest) -> Result<Conversation, AdmissionError> {
    if request.messages.len() > MAX_MESSAGES {
        let why = format!("{} messages are too many: at most {MAX_MESSAGES}", request.messages.len());
        return Err(field("messages", why));
    }
    let bytes = bytes(request);
    if bytes > MAX_TEXT_BYTES {
        let why = format!(
            "{bytes} bytes of messages, tools, documents and arguments are too long: at most {MAX_TEXT_BYTES} are taken"
        );
        return Err(field("messages", why));
    }
    let messages = std::mem::take(&mut request.messages).into_iter().enumerate();
    let messages: Vec<_> = messages.map(|(at, m)| message(at, m)).collect::<Result<_, _>>()?;
    let mut arguments = match &request.template_arguments {
        Some(text) => object("template_arguments", text)?,
        None => Map::new(),
    };
    if let Some(name) = FIELDS.iter().find(|name| arguments.contains_key(**name)) {
        let why = format!("{name:?} has a field of its own in the request: give it there");
        return Err(field("template_arguments", why));
    }
    let add_prompt = match arguments.shift_remove("add_generation_prompt") {
        None => None,
        Some(Json::Bool(add)) => Some(add),
        Some(other) => {
            let why = format!("add_generation_prompt is {other}: expected true or false");
            return Err(field("template_arguments", why));
        }
    };
    let ending = match (request.continue_final_message.as_str(), add_prompt) {
        ("", Some(false)) => Ending::Nothing,
        ("", _) => Ending::Prompt,
        (_, Some(true)) => {
            let why = "given together with add_generation_prompt: the model either goes on with the last message or \
                       begins one, so leave one of them out";
            return Err(field("continue_final_message", why));
        }
        (continued, _) => Ending::Continue(continued.to_owned()),
    };
    Ok(Conversation {
        messages,
        tools: request.tools.as_deref().map(|text| objects("tools", text)).transpose()?,
        documents: request.documents.as_deref().map(|text| objects("documents", text)).transpose()?,
        arguments,
        template: request.chat_template.take(),
        ending,
    })
}

/// A message: `role` and `content` first, where its further fields do not say them. Those that say `role` are all of it.
fn message(at: usize, message: v1::ChatMessage) -> Result<Map<String, Json>, AdmissionError> {
    let refuse = |why: String| field("messages", format!("message {at}: {why}"));
    let v1::ChatMessage { role, content, fields } = message;
    let fields = match fields.as_str() {
        "" => Map::new(),
        text => match read(text).map_err(|why| refuse(format!("fields: {why}")))? {
            Json::Object(fields) => fields,
            other => return Err(refuse(format!("fields: {}: expected an object", kind(&other)))),
        },
    };
    let is_whole = fields.contains_key("role");
    let mut whole = Map::new();
    for (key, text) in [("role", role), ("content", content)] {
        match is_whole || fields.contains_key(key) {
            true if !text.is_empty() => {
                let why = format!(
                    "{key} is given by itself, and fields say it too, or role: give all in one place"
                );
                return Err(refuse(why));
            }
            true => {}
            false => drop(whole.insert(key.to_owned(), Json::String(text))),
        }
    }
    whole.extend(fields);
    if let Some((part, what)) = whole.get("content").and_then(other_than_text) {
        return Err(refuse(format!(
            "part {part} of its content holds {what}: models are served for text alone; leave it out"
        )));
    }
    Ok(whole)
}

/// The first part of a message's content that is no text: which one, and what it is. Templates would write a mark for it, and
/// nothing would stand behind that.
fn other_than_text(content: &Json) -> Option<(usize, String)> {
    let media = |name: &str| ["image", "video", "audio"].into_iter().find(|media| name.contains(media));
    content.as_array()?.iter().enumerate().find_map(|(at, part)| {
        let found = match part.get("type").and_then(Json::as_str) {
            Some(kind) => media(kind)?,
            // Some templates look for the key alone.
            None => part.as_object()?.keys().find_map(|key| media(key))?,
        };
        Some((at, found.to_owned()))
    })
}

fn object(name: &'static str, text: &str) -> Result<Map<String, Json>, AdmissionError> {
    match read(text).map_err(|why| field(name, why))? {
        Json::Object(object) => Ok(object),
        other => Err(field(name, format!("{}: expected an object, as in {{\"key\": 1}}", kind(&other)))),
    }
}

fn objects(name: &'static str, text: &str) -> Result<Vec<Json>, AdmissionError> {
    let list = match read(text).map_err(|why| field(name, why))? {
        Json::Array(list) => list,
        other => return Err(field(name, format!("{}: expected a list of objects", kind(&other)))),
    };
    match list.iter().enumerate().find(|(_, value)| !value.is_object()) {
        Some((at, value)) => Err(field(name, format!("entry {at} is {}: expected an object", kind(value)))),
        None => Ok(list),
    }
}

fn read(text: &str) -> Result<Json, String> {
    let value: Json = serde_json::from_str(text).map_err(|error| format!("no JSON: {error}"))?;
    match depth(&value) > MAX_JSON_DEPTH {
        true => Err(format!("nested too deep: at most {MAX_JSON_DEPTH} lists and objects inside each other")),
        false => Ok(value),
    }
}

/// Lists and objects inside each other; the parser bounds it, so this may recurse.
fn depth(value: &Json) -> usize {
    match value {
        Json::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Json::Object(object) => 1 + object.values().map(depth).max().unwrap_or(0),
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => 0,
    }
}

fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn says(role: &str, content: &str, fields: &str) -> v1::ChatMessage {
        v1::ChatMessage { role: role.into(), content: content.into(), fields: fields.into() }
    }

    fn asks(messages: Vec<v1::ChatMessage>) -> v1::GenerateRequest {
        v1::GenerateRequest { messages, ..Default::default() }
    }

    #[test]
    fn messages_keep_their_fields_in_order() {
        let calls = r#"{"tool_calls": [{"id": 1e2, "n": 3}], "name": "x", "content": null}"#;
        let whole = r#"{"content": [{"type": "text", "text": "b"}], "role": "user"}"#;
        let silent = r#"{"role": "assistant", "tool_calls": []}"#;
        let messages =
            vec![says("a", "b", ""), says("assistant", "", calls), says("", "", whole), says("", "", silent)];
        let mut request = asks(messages);
        let chat = conversation(&mut request).unwrap();
        let texts: Vec<_> = chat.messages.iter().map(|m| serde_json::to_string(m).unwrap()).collect();
        let expected = [
            r#"{"role":"a","content":"b"}"#,
            r#"{"role":"assistant","tool_calls":[{"id":100.0,"n":3}],"name":"x","content":null}"#,
            r#"{"content":[{"type":"text","text":"b"}],"role":"user"}"#,
            r#"{"role":"assistant","tool_calls":[]}"#,
        ];
        assert_eq!(texts, expected);
    }

    #[test]
    fn a_prompt_has_nothing_of_a_chat() {
        check_absent(&v1::GenerateRequest { prompt: Some("x".into()), ..Default::default() }).unwrap();
        let named = v1::GenerateRequest { chat_template: Some("rag".into()), ..Default::default() };
        let error = check_absent(&named).unwrap_err().to_string();
        assert!(error.starts_with("chat_template: given without messages"), "{error}");
    }

    #[test]
    fn arguments_say_how_the_text_ends() {
        let ending = |arguments: Option<&str>, continued: &str| {
            let mut request = v1::GenerateRequest {
                template_arguments: arguments.map(Into::into),
                continue_final_message: continued.into(),
                ..asks(vec![says("user", "x", "")])
            };
            conversation(&mut request).map(|chat| (chat.ending, chat.arguments))
        };
        assert_eq!(ending(None, "").unwrap().0, Ending::Prompt);
        let (end, arguments) =
            ending(Some(r#"{"add_generation_prompt": false, "enable_thinking": true}"#), "").unwrap();
        assert_eq!((end, json!(arguments)), (Ending::Nothing, json!({"enable_thinking": true})));
        assert_eq!(ending(None, "content").unwrap().0, Ending::Continue("content".into()));
        let both = ending(Some(r#"{"add_generation_prompt": true}"#), "content").unwrap_err().to_string();
        assert!(both.contains("continue_final_message: given together"), "{both}");
    }

    #[test]
    fn what_does_not_parse_or_is_too_much_is_refused_with_its_place() {
        let refused = |change: &dyn Fn(&mut v1::GenerateRequest), expected: &str| {
            let mut request = asks(vec![says("user", "x", "")]);
            change(&mut request);
            let error = conversation(&mut request).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}: expected {expected}");
        };
        refused(&|r| r.tools = Some("[{]".into()), "tools: no JSON: key must be a string at line 1 column 3");
        refused(&|r| r.tools = Some("{}".into()), "tools: an object: expected a list of objects");
        refused(&|r| r.tools = Some("[{}, 1]".into()), "tools: entry 1 is a number: expected an object");
        refused(&|r| r.documents = Some("null".into()), "documents: null: expected a list of objects");
        refused(
            &|r| r.template_arguments = Some("[]".into()),
            "template_arguments: a list: expected an object",
        );
        let own = |r: &mut v1::GenerateRequest| r.template_arguments = Some(r#"{"tools": []}"#.into());
        refused(&own, "\"tools\" has a field of its own");
        let odd = |r: &mut v1::GenerateRequest| {
            r.template_arguments = Some(r#"{"add_generation_prompt": 1}"#.into());
        };
        refused(&odd, "add_generation_prompt is 1: expected true or false");
        refused(&|r| r.messages[0].fields = "[]".into(), "message 0: fields: a list: expected an object");
        let twice = r#"{"content": "y"}"#;
        refused(&|r| r.messages[0].fields = twice.into(), "message 0: content is given by itself");
        for (part, what) in [
            (
                r#"{"type": "image", "url": "x.png"}"#,
                "part 1 of its content holds image: models are served for text",
            ),
            (r#"{"type": "image_url", "image_url": {"url": "x"}}"#, "holds image"),
            (r#"{"type": "input_audio"}"#, "holds audio"),
            (r#"{"video": "x.mp4"}"#, "holds video"),
        ] {
            let seen =
                format!(r#"{{"role": "user", "content": [{{"type": "text", "text": "an image"}}, {part}]}}"#);
            refused(&|r| r.messages[0] = says("", "", &seen), what);
        }
        let deep = format!("[{{\"a\": {}{}}}]", "[".repeat(MAX_JSON_DEPTH), "]".repeat(MAX_JSON_DEPTH));
        refused(&|r| r.tools = Some(deep.clone()), "nested too deep: at most 64");
        refused(&|r| r.tools = Some("[".repeat(100_000)), "no JSON: recursion limit exceeded");
        let long = format!("[{{\"a\": \"{}\"}}]", "x".repeat(MAX_TEXT_BYTES));
        refused(&|r| r.tools = Some(long.clone()), "too long: at most 1048576");
        refused(
            &|r| r.messages = vec![says("user", "x", ""); MAX_MESSAGES + 1],
            "1025 messages are too many",
        );
    }
}
