//! Calls that find parts of texts: classes of tokens, and answers to questions.

use strata_proto::v1;

use super::{Session, SessionError};
use crate::{
    engine::Reply,
    request::{
        located,
        parts::{Answers, entities},
        tokens_alone,
    },
};

/// The label of what belongs to no class, by custom.
const OUTSIDE: &str = "O";

impl Session {
    /// Classes of the tokens of each text, or what those of one class make up.
    ///
    /// # Errors
    /// If a text is out of its bounds, there is no room, or one has no answer; the first such error.
    pub async fn classify_tokens(
        &self,
        request: v1::ClassifyTokensRequest,
    ) -> Result<v1::ClassifyTokensResponse, SessionError> {
        let (texts, ignored) = (request.texts.clone(), request.ignore_labels.clone());
        let ignored = if ignored.is_empty() { vec![OUTSIDE.to_owned()] } else { ignored };
        let (aggregation, model) = (request.aggregation(), request.model.clone());
        let bytes = texts.iter().map(String::len).sum();
        let mut texts = texts.iter();
        let results = self.compute(
            ("ClassifyTokens", &model, bytes),
            move |served| {
                located::check_texts(&request, &served.tokenizer, &served.profile, served.longest_input)
            },
            |served, input, reply| {
                let (Reply::Vector(logits), Some(text)) = (reply, texts.next()) else { return None };
                let labels = &served.profile.labels;
                let entities = entities((text, &input.places), &logits, labels, aggregation, &ignored);
                Some(v1::ClassifiedTokens { entities, tokens: input.tokens, dropped_tokens: input.dropped })
            },
        );
        Ok(v1::ClassifyTokensResponse { results: results.await?, model: self.model() })
    }

    /// The parts of a text that answer a question best.
    ///
    /// # Errors
    /// As for [`classify_tokens`](Self::classify_tokens).
    pub async fn answer(&self, request: v1::AnswerRequest) -> Result<v1::AnswerResponse, SessionError> {
        let (top_k, tokens) = match located::wanted(&request) {
            Ok(wanted) => wanted,
            Err(error) => return self.arrived("Answer").end(Err(error.into())),
        };
        let (context, model) = (request.context.clone(), request.model.clone());
        let bytes = context.len() + request.question.len();
        let mut answers = Answers::new(&context, top_k, tokens, request.handle_impossible_answer);
        let windows = self.compute(
            ("Answer", &model, bytes),
            move |served| {
                located::check_question(&request, &served.tokenizer, &served.profile, served.longest_input)
            },
            |_, input, reply| {
                let Reply::Vector(logits) = reply else { return None };
                answers.add(&input.places, &logits);
                Some(input.tokens)
            },
        );
        let windows = windows.await?;
        Ok(v1::AnswerResponse {
            answers: answers.best(),
            tokens: windows.iter().sum(),
            windows: windows.len() as u32,
            model: self.model(),
        })
    }

    /// What the model says of each of some tokens, as it says it.
    ///
    /// # Errors
    /// As for [`classify_tokens`](Self::classify_tokens).
    pub(crate) async fn tell_tokens(&self, ids: Vec<u32>) -> Result<Vec<f32>, SessionError> {
        let told = self.compute(
            ("Probe", "", 0),
            move |served| tokens_alone(ids, &served.profile),
            |_, _, reply| match reply {
                Reply::Vector(logits) => Some(logits),
                _ => None,
            },
        );
        Ok(told.await?.concat())
    }
}
