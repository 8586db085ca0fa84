//! Checks before a deployment turns ready: that the tokenizer is the model's, and that the model says something.
//!
//! Each has a name, by which it can be skipped, and a failure says what to do.

use std::{fmt, str::FromStr};

use serde::Serialize;
use strata_proto::{Files, ModelProfile, v1::Task};

use crate::request::{
    Tokenizer, TokenizerError,
    chat::{ChatError, Conversation},
    input_chat::Chats,
};

/// A text that every tokenizer of natural language can say.
const PROBE: &str = "The quick brown fox, aged 12, jumps over 345 lazy dogs.";

/// Something that is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The tokenizer's files are there and parse.
    Tokenizer,
    /// Every token id of the tokenizer is a row of the embedding.
    TokenIds,
    /// The tokenizer is of a kind that the model's family has, and frames an encoder's input.
    Family,
    /// bos, eos and pad of the tokenizer are those of the configuration.
    SpecialTokens,
    /// The chat template, if there is one, compiles and renders.
    ChatTemplate,
    /// A text survives being encoded and decoded.
    RoundTrip,
    /// A forward pass gives finite logits, which depend on the input.
    Output,
}

impl Check {
    /// Every check, in order.
    pub const ALL: [Check; 7] = [
        Check::Tokenizer,
        Check::TokenIds,
        Check::Family,
        Check::SpecialTokens,
        Check::ChatTemplate,
        Check::RoundTrip,
        Check::Output,
    ];

    /// Whether its failure may be ignored: without a tokenizer there is nothing to serve.
    pub fn can_be_skipped(self) -> bool {
        self != Check::Tokenizer
    }

    /// The name by which it is skipped.
    pub fn name(self) -> &'static str {
        match self {
            Check::Tokenizer => "tokenizer",
            Check::TokenIds => "token-ids",
            Check::Family => "family",
            Check::SpecialTokens => "special-tokens",
            Check::ChatTemplate => "chat-template",
            Check::RoundTrip => "round-trip",
            Check::Output => "output",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Check {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match Check::ALL.into_iter().find(|c| c.name() == s) {
            Some(check) if check.can_be_skipped() => Ok(check),
            _ => {
                let names: Vec<_> =
                    Check::ALL.into_iter().filter(|c| c.can_be_skipped()).map(Check::name).collect();
                Err(format!("unknown check {s:?}: expected one of {}", names.join(", ")))
            }
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check.
    pub check: Check,
    /// It found nothing wrong.
    pub passed: bool,
    /// Its failure does not count, because the user said so.
    pub skipped: bool,
    /// What it found, or what is wrong and what to do.
    pub detail: String,
}

impl Finding {
    /// The outcome of a check; a failure of one in `skip` does not count.
    pub fn new(check: Check, outcome: Result<String, String>, skip: &[Check]) -> Self {
        let passed = outcome.is_ok();
        let skipped = !passed && skip.contains(&check);
        let (Ok(detail) | Err(detail)) = outcome;
        if skipped {
            tracing::warn!(%check, detail, "A FAILED CHECK IS IGNORED, as asked for by --skip-check");
        }
        Finding { check, passed, skipped, detail }
    }

    /// Whether it forbids serving.
    pub fn refuses(&self) -> bool {
        !self.passed && !self.skipped
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match (self.passed, self.skipped) {
            (true, _) => "ok",
            (_, true) => "FAILED, ignored",
            _ => "FAILED",
        };
        write!(f, "{:15} {mark}: {}", self.check, self.detail)
    }
}

/// Runs every check that needs no forward pass. The tokenizer is there if its own check passed.
pub(crate) fn inspect(
    files: &Files,
    profile: &ModelProfile,
    skip: &[Check],
) -> (Option<Tokenizer>, Vec<Finding>) {
    let tokenizer = match Tokenizer::new(files) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return (None, vec![Finding::new(Check::Tokenizer, Err(error.to_string()), &[])]),
    };
    let findings = [
        (Check::Tokenizer, Ok(format!("{} tokens", tokenizer.size()))),
        (Check::TokenIds, token_ids(&tokenizer, profile)),
        (Check::Family, family(&tokenizer, profile)),
        (Check::SpecialTokens, special_tokens(&tokenizer, profile)),
        (Check::ChatTemplate, chat_template(&tokenizer, profile)),
        (Check::RoundTrip, round_trip(&tokenizer)),
    ];
    let findings = findings.into_iter().map(|(check, outcome)| Finding::new(check, outcome, skip)).collect();
    (Some(tokenizer), findings)
}

fn token_ids(tokenizer: &Tokenizer, profile: &ModelProfile) -> Result<String, String> {
    let ((text, highest), rows) = (tokenizer.highest(), profile.vocab_size);
    if highest < rows {
        return Ok(format!("highest id {highest}, {rows} embedding rows"));
    }
    Err(format!(
        "the tokenizer knows id {highest} ({text:?}) but the embedding has {rows} rows: this tokenizer, or the file beside it that \
         names this token, belongs to another model; put the right tokenizer.json, tokenizer_config.json and \
         special_tokens_map.json beside the weights"
    ))
}

fn family(tokenizer: &Tokenizer, profile: &ModelProfile) -> Result<String, String> {
    let (kind, family) = (tokenizer.kind(), &profile.family);
    if !profile.tokenizers.iter().any(|t| t == kind) {
        return Err(format!(
            "the tokenizer is a {kind} one, but models of family {family} have {}: it belongs to another model; put the \
             right tokenizer.json beside the weights",
            profile.tokenizers.join(" or ")
        ));
    }
    if profile.task == Task::Generate {
        return Ok(format!("{kind}, as {family} has"));
    }
    if profile.task == Task::FillMask && tokenizer.mask().is_none() {
        return Err("the tokenizer has no mask token: name one as mask_token in tokenizer_config.json".into());
    }
    let ids = tokenizer.encode_input(PROBE, None, None).map_err(|e| e.to_string())?.ids;
    for (name, found) in [("cls_token", ids.first()), ("sep_token", ids.last())] {
        let expected = tokenizer.role(name).map(|(_, id)| id);
        if expected.is_some() && expected.as_ref() != found {
            return Err(format!(
                "the tokenizer does not put {name} around a text, which this encoder was trained on: its tokenizer.json has \
                 no post-processor; convert the tokenizer anew"
            ));
        }
    }
    Ok(format!("{kind}, as {family} has, and frames a text"))
}

fn special_tokens(tokenizer: &Tokenizer, profile: &ModelProfile) -> Result<String, String> {
    let mut said = Vec::new();
    for (name, configured) in [("bos_token", &profile.bos_token_ids), ("eos_token", &profile.eos_token_ids)] {
        // Encoders read whole texts: the ids that their classes write down belong to other vocabularies now and then.
        let unknown = configured.iter().find(|id| **id >= profile.vocab_size);
        if let Some(id) = unknown.filter(|_| profile.task == Task::Generate) {
            return Err(format!(
                "{name}_id {id} of config.json or generation_config.json is no token: expected less than {}; correct it there",
                profile.vocab_size
            ));
        }
        let Some((text, id)) = tokenizer.role(name) else { continue };
        // Both may be right: chats end otherwise than texts. But an ordinary token on one side is another model's id.
        let stranger = configured.iter().find(|id| tokenizer.control(**id).is_none());
        if let Some(other) = stranger.filter(|_| !configured.contains(&id)) {
            return Err(format!(
                "{name} is {text:?} (id {id}) by the tokenizer but {configured:?} by config.json and \
                 generation_config.json, and {other} is an ordinary token: the tokenizer is another model's, or a \
                 configuration is out of date"
            ));
        }
        said.push(match configured.is_empty() || configured.contains(&id) {
            true => format!("{name} {id}"),
            false => format!("{name} {id} by the tokenizer, {configured:?} by the configuration"),
        });
    }
    if profile.task == Task::Generate && tokenizer.eos(profile).is_empty() {
        said.push("no token ends an answer".into());
    }
    Ok(if said.is_empty() { "the tokenizer names none".into() } else { said.join(", ") })
}

fn chat_template(tokenizer: &Tokenizer, profile: &ModelProfile) -> Result<String, String> {
    if let (Some(how), true) = (&profile.sentences.chat, tokenizer.has_chat_template()) {
        let pairs = Chats::new(how, "", tokenizer).and_then(|chats| chats.check_pairs(tokenizer));
        return pairs.map(|()| "renders a query and a document".into());
    }
    let say = |content: &str| {
        let message =
            [("role", "user"), ("content", content)].map(|(key, text)| (key.to_owned(), text.into()));
        let chat = Conversation { messages: vec![message.into_iter().collect()], ..Conversation::default() };
        tokenizer.encode_chat(&chat, usize::MAX)
    };
    match say("Hello").and_then(|hello| Ok((hello, say("Good night")?))) {
        Ok((hello, other)) if hello == other => Err("it says the same whatever it is told, so it is no chat template of \
                                                     this model; mend chat_template.jinja, or remove it to serve prompts \
                                                     only"
            .into()),
        Ok((hello, _)) => Ok(format!("renders a greeting as {} tokens", hello.len())),
        Err(TokenizerError::Chat(ChatError::NoTemplate)) => Ok("the model has none".into()),
        Err(error) => Err(format!("{error}; mend chat_template.jinja, or remove it to serve prompts only")),
    }
}

fn round_trip(tokenizer: &Tokenizer) -> Result<String, String> {
    let again = |text: &str| -> Result<_, TokenizerError> {
        let ids = tokenizer.encode(text, false)?;
        let said = tokenizer.decode(&ids, false)?;
        Ok((tokenizer.encode(&said, false)?, ids, said))
    };
    // A vocabulary that is not of a natural language is tried with what it can say.
    let known = |ids: &[u32]| tokenizer.role("unk_token").is_none_or(|(_, unk)| !ids.contains(&unk));
    let probe = match again(PROBE) {
        Ok((_, ids, _)) if !known(&ids) => tokenizer.letters(),
        _ => PROBE.to_owned(),
    };
    match again(&probe) {
        Ok((again, ids, _)) if again == ids => Ok(format!("{} tokens of {probe:?}", ids.len())),
        Ok((_, _, text)) => Err(format!(
            "{probe:?} comes back as {text:?}, which is encoded differently: the tokenizer's decoder does not fit its \
             model; fetch the tokenizer's files anew"
        )),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use strata_proto::{DType, FormatBytes, Module};

    use super::*;

    fn profile(vocab_size: u32, eos: u32) -> ModelProfile {
        ModelProfile {
            model: "m".into(),
            family: "llama".into(),
            task: Task::Generate,
            dtype: DType::F32,
            quantization: None,
            hidden_size: 8,
            vocab_size,
            context_length: 32,
            layers: vec![Module::default()],
            embedding: Module::default(),
            head: Module::default(),
            shared: FormatBytes::default(),
            shared_tensors: vec![],
            bos_token_ids: vec![0],
            eos_token_ids: vec![eos],
            pad_token_ids: vec![2],
            fingerprint: String::new(),
            recompute_at: None,
            workspace_bytes_per_token: 0,
            workspace_bytes_per_output: 0,
            labels: vec![],
            scoring: strata_proto::v1::Scoring::Unspecified,
            commit: String::new(),
            sentences: Default::default(),
            ranking: Default::default(),
            segments: 0,
            tokenizers: vec!["BPE".into()],
            stacks: vec![],
        }
    }

    fn demo() -> Files {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/shakespeare");
        let read = |name: &str| (name.to_owned(), std::fs::read(format!("{directory}/{name}")).unwrap());
        Files::from(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"].map(read))
    }

    fn failures(files: &Files, profile: &ModelProfile) -> Vec<(Check, String)> {
        let (_, findings) = inspect(files, profile, &[]);
        findings.into_iter().filter(Finding::refuses).map(|f| (f.check, f.detail)).collect()
    }

    #[test]
    fn the_models_own_tokenizer_passes_and_every_other_is_refused_with_the_reason() {
        assert_eq!(failures(&demo(), &profile(2048, 1)), []);
        let refused = |files: &Files, profile: &ModelProfile, check: Check, says: &str| {
            let failures = failures(files, profile);
            let found = failures.iter().any(|(c, detail)| *c == check && detail.contains(says));
            assert!(found, "{failures:?} does not refuse {check} with {says:?}");
        };
        refused(&demo(), &profile(2000, 1), Check::TokenIds, "but the embedding has 2000 rows");
        refused(&demo(), &profile(2048, 7), Check::SpecialTokens, "eos_token is \"<|eos|>\" (id 1)");
        refused(&Files::new(), &profile(2048, 1), Check::Tokenizer, "no tokenizer.json");
        let with = |name: &str, data: &str| {
            let mut files = demo();
            files.insert(name.into(), data.into());
            files
        };
        let garbage = with("tokenizer.json", "{}");
        refused(&garbage, &profile(2048, 1), Check::Tokenizer, "tokenizer.json");
        let other = with("tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        refused(&other, &profile(2048, 1), Check::TokenIds, "knows id 2048 (\"</s>\")");
        refused(&demo(), &profile(2048, 5000), Check::SpecialTokens, "eos_token_id 5000 of config.json");
        let other_kind = ModelProfile { tokenizers: vec!["WordPiece".into()], ..profile(2048, 1) };
        refused(
            &demo(),
            &other_kind,
            Check::Family,
            "is a BPE one, but models of family llama have WordPiece",
        );
        let masks = ModelProfile { task: Task::FillMask, ..profile(2048, 1) };
        refused(&demo(), &masks, Check::Family, "no mask token");
        let unframed = with("tokenizer_config.json", r#"{"cls_token": "<|eos|>"}"#);
        let embeds = ModelProfile { task: Task::Embed, ..profile(2048, 1) };
        refused(&unframed, &embeds, Check::Family, "does not put cls_token around a text");
        let raises = with("chat_template.jinja", "{{ raise_exception('no') }}");
        refused(&raises, &profile(2048, 1), Check::ChatTemplate, "refuses these messages: no");
        let broken = with("chat_template.jinja", "{% if %}");
        refused(&broken, &profile(2048, 1), Check::Tokenizer, "does not compile");
        // A decoder that drops what the model's pre-tokenizer wrote.
        let text = String::from_utf8(demo()["tokenizer.json"].clone()).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["decoder"] = serde_json::Value::Null;
        let undecoded = with("tokenizer.json", &json.to_string());
        refused(&undecoded, &profile(2048, 1), Check::RoundTrip, "comes back as");
    }

    #[test]
    fn a_failure_can_be_skipped_by_name() {
        let skip = ["token-ids".parse().unwrap()];
        let (tokenizer, findings) = inspect(&demo(), &profile(2000, 1), &skip);
        assert!(tokenizer.is_some() && !findings.iter().any(Finding::refuses));
        assert!(findings.iter().any(|f| f.skipped && f.to_string().contains("FAILED, ignored")));
        assert!(
            "tokenizer".parse::<Check>().is_err() && "x".parse::<Check>().unwrap_err().contains("round-trip")
        );
    }
}
