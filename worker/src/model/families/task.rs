//! What a model was made for, as `architectures` says, and the heads that models of several families have alike.

use strata_proto::v1::Scoring;

use super::Description;
use crate::model::{
    ModelError,
    architecture::{AttentionMask, Embedding, Head, Pool, Slot, Source, Tower},
    config::Config,
};

/// Most classes of a classifier.
const MAX_LABELS: usize = 1 << 16;
/// Most classes of tokens: each token of a step has a logit for each.
const MAX_TAGS: usize = 1 << 10;

/// What an encoder answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    FillMask,
    Classify,
    Tag,
    Span,
    Embed,
}

/// Products of the heads that tell something of each token.
pub(super) const TAGS: &[(Slot, Source)] = &[(Slot::Head, Source::Rows("classifier"))];
pub(super) const SPANS: &[(Slot, Source)] = &[(Slot::Head, Source::Rows("qa_outputs"))];

/// What an encoder was made for: the end of its architecture's name.
pub(super) fn task(config: &Config) -> Result<Task, ModelError> {
    let Some(architectures) = config.strings("architectures")? else { return Ok(Task::Embed) };
    let known = [
        ("ForMaskedLM", Task::FillMask),
        ("ForPreTraining", Task::FillMask),
        ("ForSequenceClassification", Task::Classify),
        ("ForTokenClassification", Task::Tag),
        ("ForQuestionAnswering", Task::Span),
        ("Model", Task::Embed),
    ];
    let task = known.into_iter().find(|(end, _)| architectures.iter().any(|a| a.ends_with(end)));
    task.map(|(_, task)| task).ok_or_else(|| {
        let expected =
            "a model, or one for MaskedLM, SequenceClassification, TokenClassification or QuestionAnswering";
        config.error("architectures", expected).into()
    })
}

/// The classes of tokens that `id2label` names.
pub(super) fn tags(config: &Config) -> Result<Vec<String>, ModelError> {
    match labels(config)? {
        labels if labels.len() <= MAX_TAGS => Ok(labels),
        _ => Err(config.error("id2label", format!("at most {MAX_TAGS} classes of tokens")).into()),
    }
}

/// The classes that `id2label` names, and how their logits are read.
pub(super) fn classes(config: &Config) -> Result<(Vec<String>, Scoring), ModelError> {
    let labels = labels(config)?;
    let scoring = match config.string("problem_type")? {
        Some("multi_label_classification") => Scoring::Sigmoid,
        Some("regression") => Scoring::None,
        None | Some("single_label_classification") if labels.len() > 1 => Scoring::Softmax,
        None | Some("single_label_classification") => Scoring::Sigmoid,
        Some(_) => {
            let expected = "single_label_classification, multi_label_classification or regression";
            return Err(config.error("problem_type", expected).into());
        }
    };
    Ok((labels, scoring))
}

fn labels(config: &Config) -> Result<Vec<String>, ModelError> {
    let labels = match config.object("id2label")? {
        Some(names) => (0..names.count())
            .map(|i| {
                let field = i.to_string();
                let name = names.string(&field)?.map(str::to_owned);
                name.ok_or_else(|| names.error(&field, "a name for each class, numbered from 0"))
            })
            .collect::<Result<Vec<_>, _>>()?,
        None => {
            let count = config.integer("num_labels", 1..=MAX_LABELS)?.unwrap_or(2);
            (0..count).map(|i| format!("LABEL_{i}")).collect()
        }
    };
    if labels.is_empty() || labels.len() > MAX_LABELS {
        return Err(config.error("id2label", format!("1 to {MAX_LABELS} classes")).into());
    }
    Ok(labels)
}

/// Makes of a decoder one that judges an input by the logits of `tokens` tokens, that for yes and perhaps that for no, to
/// follow its last one.
pub(in crate::model) fn judge(tower: &mut Tower, tokens: usize) {
    let labels: Vec<String> = ["true", "false"].into_iter().take(tokens).map(str::to_owned).collect();
    let scoring = if tokens > 1 { Scoring::Softmax } else { Scoring::Sigmoid };
    tower.head = Head::Classify { pool: Pool::Last, act: None, norm: None, labels, scoring };
    // An input is computed whole, and nothing of it is kept.
    (tower.caches, tower.whole_input) = (false, true);
}

/// Makes of a decoder what its `architectures` say: a bare model embeds, and so does any for which files of
/// sentence-transformers say how its vectors are pooled; one for SequenceClassification tells classes from the last token.
pub(super) fn of_decoder(
    config: &Config,
    description: &mut Description,
    is_pooled: bool,
) -> Result<(), ModelError> {
    if !matches!(description.tower.head, Head::Lm { .. }) {
        return Ok(());
    }
    let architectures = config.strings("architectures")?.unwrap_or_default();
    let ends = |end: &str| architectures.iter().any(|name| name.ends_with(end));
    // GPT-2 names its head so.
    let is_bare = ends("Model") && !ends("LMHeadModel");
    let tower = &mut description.tower;
    if ends("ForSequenceClassification") {
        let (labels, scoring) = classes(config)?;
        tower.head = Head::Classify { pool: Pool::Last, act: None, norm: None, labels, scoring };
        description.names.root.retain(|(slot, _)| *slot != Slot::Head);
        description.names.root.push((Slot::Head, Source::Rows("score")));
        description.names.tied = false;
    } else if is_pooled || is_bare {
        tower.head = Head::Embed(Embedding::mean(tower.width));
    }
    let generates = matches!(tower.head, Head::Lm { .. });
    for field in ["use_bidirectional_attention", "is_causal"] {
        let causal = field == "is_causal";
        if config.flag(field, causal)? == causal {
            continue;
        }
        if generates {
            return Err(config.error(field, format!("{causal} of a model that continues texts")).into());
        }
        for layer in &mut tower.layers {
            let mask = &mut layer.attention.mask;
            *mask = match *mask {
                AttentionMask::Causal => AttentionMask::Full,
                AttentionMask::Window(window) if causal => AttentionMask::Near(window),
                // Half of the window on each side.
                AttentionMask::Window(window) => AttentionMask::Near(window / 2),
                other => other,
            };
        }
    }
    if generates {
        return Ok(());
    }
    // An input is computed whole, and nothing of it is kept.
    (tower.caches, tower.whole_input) = (false, true);
    Ok(())
}
