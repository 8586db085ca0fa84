//! A chat as a template takes it: messages, and everything beside them.

use serde_json::{Map, Value as Json};

/// A chat, with what its template is to make of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Conversation {
    /// What was said, in order. The keys of a message are `role`, mostly `content` (a text, or a list of parts), and
    /// whatever else the template reads, in the order in which the caller wrote them: templates print them.
    pub messages: Vec<Map<String, Json>>,
    /// Tools that the model may call, mostly as JSON schemas.
    pub tools: Option<Vec<Json>>,
    /// Documents that the model may refer to.
    pub documents: Option<Vec<Json>>,
    /// Further variables of the template, such as `enable_thinking`.
    pub arguments: Map<String, Json>,
    /// The template's name, where a model has several.
    pub template: Option<String>,
    /// How the text ends.
    pub ending: Ending,
}

/// How the text of a chat ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With the beginning of the model's answer (`add_generation_prompt`).
    #[default]
    Prompt,
    /// With the end of the last message.
    Nothing,
    /// Inside the last message, behind what this field of it says (`continue_final_message`).
    Continue(String),
}

impl Conversation {
    /// Every string in it, keys included.
    pub fn texts(&self) -> Vec<&str> {
        let mut texts = Vec::new();
        for object in self.messages.iter().chain([&self.arguments]) {
            texts_of_object(object, &mut texts);
        }
        let lists = [&self.tools, &self.documents];
        lists.into_iter().flatten().flatten().for_each(|value| texts_of(value, &mut texts));
        texts
    }

    /// The same chat with every string replaced, keys included.
    pub fn map_texts(&self, replace: &dyn Fn(&str) -> String) -> Self {
        let list = |list: &Option<Vec<Json>>| {
            Some(list.as_ref()?.iter().map(|value| map_value(value, replace)).collect())
        };
        Conversation {
            messages: self.messages.iter().map(|message| map_object(message, replace)).collect(),
            tools: list(&self.tools),
            documents: list(&self.documents),
            arguments: map_object(&self.arguments, replace),
            template: self.template.clone(),
            ending: self.ending.clone(),
        }
    }
}

fn texts_of<'a>(value: &'a Json, texts: &mut Vec<&'a str>) {
    match value {
        Json::String(text) => texts.push(text),
        Json::Array(list) => list.iter().for_each(|value| texts_of(value, texts)),
        Json::Object(object) => texts_of_object(object, texts),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

fn texts_of_object<'a>(object: &'a Map<String, Json>, texts: &mut Vec<&'a str>) {
    for (key, value) in object {
        texts.push(key);
        texts_of(value, texts);
    }
}

fn map_value(value: &Json, replace: &dyn Fn(&str) -> String) -> Json {
    match value {
        Json::String(text) => Json::String(replace(text)),
        Json::Array(list) => list.iter().map(|value| map_value(value, replace)).collect(),
        Json::Object(object) => Json::Object(map_object(object, replace)),
        Json::Null | Json::Bool(_) | Json::Number(_) => value.clone(),
    }
}

fn map_object(object: &Map<String, Json>, replace: &dyn Fn(&str) -> String) -> Map<String, Json> {
    object.iter().map(|(key, value)| (replace(key), map_value(value, replace))).collect()
}

#[cfg(test)]
impl Conversation {
    /// One message of a user.
    pub fn says(content: &str) -> Self {
        Conversation::of(&[("user", content)])
    }

    /// Messages that are texts.
    pub fn of(messages: &[(&str, &str)]) -> Self {
        let message = |(role, content): &(&str, &str)| {
            let fields = [("role", *role), ("content", *content)];
            Map::from_iter(fields.map(|(key, text)| (key.to_owned(), Json::from(text))))
        };
        Conversation { messages: messages.iter().map(message).collect(), ..Conversation::default() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_string_is_seen_and_replaced_keys_included() {
        let object = |value: Json| value.as_object().unwrap().clone();
        let chat = Conversation {
            messages: vec![object(json!({"role": "a", "content": [{"text": "b", "n": 1}], "x": null}))],
            tools: Some(vec![json!({"function": {"name": "c"}})]),
            documents: Some(vec![json!({"title": "d"})]),
            arguments: object(json!({"flag": true, "style": "e"})),
            template: Some("rag".into()),
            ending: Ending::Continue("content".into()),
        };
        let mut texts = chat.texts();
        texts.sort();
        let expected = [
            "a", "b", "c", "content", "d", "e", "flag", "function", "n", "name", "role", "style", "text",
            "title", "x",
        ];
        assert_eq!(texts, expected);
        let twice = chat.map_texts(&|text| text.repeat(2));
        let mut doubled = twice.texts();
        doubled.sort();
        let mut expected = expected.map(|text| text.repeat(2));
        expected.sort();
        assert_eq!(doubled, expected);
        let keys: Vec<_> = twice.messages[0].keys().collect();
        assert_eq!(keys, ["rolerole", "contentcontent", "xx"], "their order is kept");
        assert_eq!((twice.template, twice.ending), (chat.template, chat.ending));
    }
}
