//! Inputs that a model reads as chats: how sentence-transformers' cross-encoders put texts to models that continue them.

use serde_json::{Map, Value as Json, json};
use strata_proto::v1::InputChat;

use super::{
    chat::{Conversation, Ending},
    tokenizer::Tokenizer,
};

/// Who says the first text of a pair, and who the second.
const PAIR: [&str; 2] = ["query", "document"];

/// What is the same of all inputs of a request.
pub(crate) struct Chats<'a> {
    system: &'a str,
    in_parts: bool,
    ending: Ending,
    arguments: Map<String, Json>,
}

impl<'a> Chats<'a> {
    /// Chats as `how` says, each with what `system` says in front unless it is empty.
    ///
    /// # Errors
    /// If the model's files say no object where they say what its template is to be given.
    pub fn new(how: &InputChat, system: &'a str, tokenizer: &Tokenizer) -> Result<Self, String> {
        let arguments = match how.arguments.as_str() {
            "" => Map::new(),
            text => serde_json::from_str(text)
                .map_err(|why| format!("the model's arguments for its chat template are no object: {why}"))?,
        };
        let ending = if how.add_generation_prompt { Ending::Prompt } else { Ending::Nothing };
        let in_parts = how.in_parts.unwrap_or_else(|| tokenizer.reads_parts());
        Ok(Chats { system, in_parts, ending, arguments })
    }

    /// The chat of a text, or of a pair of them.
    pub fn of(&self, text: &str, pair: Option<&str>) -> Conversation {
        let mut said = Vec::new();
        if !self.system.is_empty() {
            said.push(("system", self.system));
        }
        match pair {
            None => said.push(("user", text)),
            Some(pair) => said.extend([(PAIR[0], text), (PAIR[1], pair)]),
        }
        let message = |(role, text): (&str, &str)| {
            let content = if self.in_parts { json!([{"type": "text", "text": text}]) } else { json!(text) };
            Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), content)])
        };
        Conversation {
            messages: said.into_iter().map(message).collect(),
            arguments: self.arguments.clone(),
            ending: self.ending.clone(),
            ..Conversation::default()
        }
    }

    /// Checks that both texts of a pair reach what the model reads, by pairs of which one text differs.
    ///
    /// # Errors
    /// Which does not, or why the template refuses them.
    pub fn check_pairs(&self, tokenizer: &Tokenizer) -> Result<(), String> {
        let render = |query, document| {
            tokenizer.render_chat(&self.of(query, Some(document))).map_err(|error| error.to_string())
        };
        let base = render("alpha", "bravo")?;
        let others = [render("charlie", "bravo")?, render("alpha", "foxtrot")?];
        match PAIR.iter().zip(&others).find(|(_, text)| **text == base) {
            None => Ok(()),
            Some((role, _)) => Err(format!(
                "what {role:?} says is not in what the model's chat template makes of a pair: expected a \
                 chat_template.jinja that renders messages of the roles \"query\" and \"document\""
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use strata_proto::Files;

    use super::*;

    /// A tokenizer with this template.
    fn tokenizer(template: &str) -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/shakespeare");
        let read = |name: &str| (name.to_owned(), std::fs::read(dir.join(name)).unwrap());
        let mut files = Files::from(["tokenizer.json", "tokenizer_config.json"].map(read));
        files.insert("chat_template.jinja".into(), template.as_bytes().to_vec());
        Tokenizer::new(&files).unwrap()
    }

    #[test]
    fn texts_are_said_by_who_the_template_expects_in_the_form_that_it_reads() {
        let flat = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{{ style }}\
                    {% if add_generation_prompt %}!{% endif %}";
        let parts =
            "{% for m in messages %}{{ m['content'][0]['text'] }}{{ m.content[0].text }};{% endfor %}";
        let how = InputChat { arguments: r#"{"style": "s"}"#.into(), ..InputChat::default() };
        let text = |how: &InputChat, template: &str, system: &str, pair: Option<&str>| {
            let tokenizer = tokenizer(template);
            let chats = Chats::new(how, system, &tokenizer).unwrap();
            tokenizer.render_chat(&chats.of("q", pair)).unwrap()
        };
        assert_eq!(text(&how, flat, "i", Some("d")), "system=i;query=q;document=d;s");
        assert_eq!(text(&how, flat, "", None), "user=q;s");
        assert_eq!(text(&how, parts, "", Some("")), "qq;;", "an empty text is a text too");
        let how = InputChat { add_generation_prompt: true, in_parts: Some(true), ..InputChat::default() };
        assert_eq!(text(&how, flat, "", None), "user=[{'type': 'text', 'text': 'q'}];!");
    }

    #[test]
    fn a_template_that_drops_a_text_is_refused_with_whose_it_is() {
        let check = |template: &str| {
            let tokenizer = tokenizer(template);
            Chats::new(&InputChat::default(), "", &tokenizer).unwrap().check_pairs(&tokenizer)
        };
        assert_eq!(check("{% for m in messages %}{{ m.content }}{% endfor %}"), Ok(()));
        let dropped = check("{{ messages[0].content }}").unwrap_err();
        assert!(dropped.contains("\"document\" says"), "{dropped}");
        let dropped = check("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}");
        assert!(dropped.unwrap_err().contains("\"query\" says"));
        let raised = check("{{ raise_exception('only users speak') }}").unwrap_err();
        assert!(raised.contains("only users speak"), "{raised}");
    }
}
