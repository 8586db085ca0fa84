//! What tests/fuzz throws at the coordinator: each function takes anything, and panics only if something is wrong with
//! Strata.

use serde_json::json;
use strata_proto::{
    Files, ModelProfile,
    v1::{self, Task},
};

use crate::request::{Limit, Tokenizer, chat, encode, generate};

/// Text that has everything which tokenizers treat in a way of its own.
const TEXT: &str =
    " Hello,\u{a0}wörld!\n\n\t12345 <|eos|>[MASK] e\u{301}\u{1f469}\u{200d}\u{1f680}日本語 \u{0}'s";
/// Tokens that a model computes at a time.
const LONGEST: u32 = 64;

/// The tokenizer of a model's files.
pub struct Reader(Tokenizer);

impl Reader {
    /// `None` if the files hold none.
    pub fn new(files: &Files) -> Option<Self> {
        Tokenizer::new(files).ok().map(Reader)
    }
}

/// A `tokenizer.json`: it is refused, or reads and writes texts.
pub fn tokenizer(data: &[u8]) {
    let config = br#"{"mask_token": "[MASK]", "eos_token": {"content": "<|eos|>"}}"#;
    let files = [("tokenizer.json", data), ("tokenizer_config.json", &config[..])];
    let files = Files::from(files.map(|(name, data)| (name.to_owned(), data.to_vec())));
    let Ok(tokenizer) = Tokenizer::new(&files) else { return };
    if let Ok(ids) = tokenizer.encode(TEXT, true) {
        let _ = tokenizer.decode(&ids, true);
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX], false);
    if let Ok(encoded) = tokenizer.encode_input(TEXT, Some("a"), Some((8, v1::Truncation::KeepTail))) {
        assert_eq!(encoded.ids.len(), encoded.segments.len());
    }
    let _ = tokenizer.highest();
}

/// A `tokenizer_config.json`, or the template of a chat: it is refused, or renders within its bounds.
pub fn template(data: &[u8]) {
    let messages = [
        json!({"role": "system", "content": ""}),
        json!({"role": "user", "content": [{"type": "text", "text": TEXT}], "reasoning": 1e300}),
        json!({"role": "assistant", "content": "{{ 1 }}", "tool_calls": [{"id": "a", "arguments": {"x": [null, -1]}}]}),
    ];
    let messages = messages.iter().filter_map(|message| message.as_object().cloned()).collect();
    let endings = [chat::Ending::Prompt, chat::Ending::Continue("content".to_owned())];
    let mut chat =
        chat::Conversation { messages, tools: Some(vec![json!({"name": "f"})]), ..Default::default() };
    for name in ["tokenizer_config.json", "chat_template.jinja"] {
        let files = Files::from([(name.to_owned(), data.to_vec())]);
        if let Ok(Some(template)) = chat::ChatTemplate::new(&files, &Default::default()) {
            for ending in &endings {
                chat.ending = ending.clone();
                let _ = template.render(&chat);
            }
        }
    }
}

/// A GenerateRequest: it is refused, or within what the model can do.
pub fn generate(request: v1::GenerateRequest, reader: &Reader, profile: &ModelProfile) {
    let Ok(checked) =
        generate::check(request, &reader.0, profile, Limit::of_context(profile.context_length, None))
    else {
        return;
    };
    assert!(!checked.prompt.is_empty() && checked.max_tokens > 0);
    assert!(checked.prompt.iter().all(|id| *id < profile.vocab_size));
    assert!(checked.prompt.len() + checked.max_tokens as usize <= profile.context_length as usize);
    assert!(checked.stop.iter().all(|s| !s.is_empty()));
}

/// A request of an encoder: it is refused, or within what the model can do.
pub fn encode(request: v1::FillMaskRequest, reader: &Reader, profile: &ModelProfile) {
    let request = encode::Request {
        truncation: request.truncation(),
        model: request.model,
        task: Task::FillMask,
        ranks: false,
        prompt_name: None,
        inputs: request.inputs,
        candidates: request.top_k,
        deadline_ms: request.deadline_ms,
    };
    let Ok((inputs, _)) = encode::check(request, &reader.0, profile, Limit::of_context(LONGEST, None)) else {
        return;
    };
    for input in inputs {
        let tokens = input.ids.len() as u32;
        assert!((1..=LONGEST).contains(&tokens), "{tokens} tokens");
        assert!(input.ids.iter().all(|id| *id < profile.vocab_size));
        assert!(!input.encode.positions.is_empty() && input.encode.positions.iter().all(|at| *at < tokens));
    }
}
