//! What a request may ask for: every limit that is the coordinator's own, and the checks that calls share.
//!
//! What workers check too, such as sampling, is in `strata_proto::limits`.

use std::time::Duration;

use strata_proto::{ModelProfile, v1::Task};

use super::error::{AdmissionError, field};

/// Largest request, in bytes: the longest text that is tokenized, or as many ids, and some air.
pub(crate) const MAX_REQUEST_BYTES: usize = 8 << 20;
/// Largest text that is tokenized, in bytes; of a call's inputs, or messages, all together.
pub(crate) const MAX_TEXT_BYTES: usize = 1 << 20;
/// Most token ids in a Detokenize.
pub(crate) const MAX_IDS: usize = 1 << 20;
/// Most inputs of one call.
pub(crate) const MAX_INPUTS: usize = 1024;
/// Candidates for a mask unless asked for otherwise.
pub(crate) const DEFAULT_CANDIDATES: u32 = 5;
/// Most messages of a chat.
pub(super) const MAX_MESSAGES: usize = 1024;
/// Most lists and objects inside each other in a request's JSON.
pub(super) const MAX_JSON_DEPTH: usize = 64;
/// Most stop strings, and bytes of each.
pub(super) const MAX_STOPS: usize = 16;
pub(super) const MAX_STOP_BYTES: usize = 1024;
/// Most ids that end an answer.
pub(super) const MAX_STOP_IDS: usize = 64;
/// Longest name of a tenant, in bytes.
const MAX_TENANT_BYTES: usize = 256;
/// Longest deadline.
pub(crate) const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// Most devices of a preview: a plan costs time in proportion.
pub(crate) const MAX_IMAGINED_DEVICES: usize = 1024;

/// Refuses a name that is none of those served. No name is whichever model there is.
///
/// # Errors
/// [`AdmissionError::WrongModel`].
pub(crate) fn check_model(asked: &str, served: &[String]) -> Result<(), AdmissionError> {
    if asked.is_empty() || served.iter().any(|name| name == asked) {
        return Ok(());
    }
    let served: Vec<_> = served.iter().map(|name| format!("{name:?}")).collect();
    Err(AdmissionError::WrongModel { asked: asked.to_owned(), served: served.join(", ") })
}

/// Refuses a text that is too long to tokenize.
///
/// # Errors
/// If it is longer than [`MAX_TEXT_BYTES`].
pub(crate) fn check_text(name: &'static str, text: &str) -> Result<(), AdmissionError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(field(
            name,
            format!("{} bytes are too long: at most {MAX_TEXT_BYTES} are taken", text.len()),
        ));
    }
    Ok(())
}

/// Refuses a name of a tenant that is too long.
///
/// # Errors
/// If it is longer than [`MAX_TENANT_BYTES`].
pub(crate) fn check_tenant(tenant: &str) -> Result<(), AdmissionError> {
    if tenant.len() > MAX_TENANT_BYTES {
        let why = format!("{} bytes are too long: at most {MAX_TENANT_BYTES}", tenant.len());
        return Err(field("tenant", why));
    }
    Ok(())
}

/// The time that a caller allows.
///
/// # Errors
/// If it is nothing, or more than a day.
pub(super) fn check_deadline(millis: Option<u64>) -> Result<Option<Duration>, AdmissionError> {
    let deadline = millis.map(Duration::from_millis);
    if deadline.is_some_and(|d| d.is_zero() || d > MAX_DEADLINE) {
        return Err(field("deadline_ms", format!("expected 1 to {}", MAX_DEADLINE.as_millis())));
    }
    Ok(deadline)
}

/// Refuses a call that the served model cannot answer.
///
/// # Errors
/// [`AdmissionError::WrongTask`], with the call that it does answer.
pub(crate) fn check_task(asked: Task, profile: &ModelProfile) -> Result<(), AdmissionError> {
    if asked == profile.task {
        return Ok(());
    }
    let (asked, served) = (call_name(asked), call_name(profile.task));
    Err(AdmissionError::WrongTask { asked, served, model: profile.model.clone() })
}

/// The call by which a task is asked for.
fn call_name(task: Task) -> &'static str {
    match task {
        Task::Generate => "Generate",
        Task::Classify => "Classify",
        Task::Embed => "Embed",
        Task::FillMask => "FillMask",
        Task::ClassifyTokens => "ClassifyTokens",
        Task::Answer => "Answer",
        Task::Unspecified => "nothing",
    }
}
