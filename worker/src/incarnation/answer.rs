//! From the values that the head yields to the result of a step.

use strata_proto::v1::{self, RowOutput, step_result};

use crate::{
    engine::Values,
    sampler::{Draw, SampleError, Sampled, likeliest, sample},
};

/// A token to be drawn, or drawn.
struct Choice<'a> {
    sequence: u64,
    /// The token that the row guessed it to be.
    draft: Option<u32>,
    logits: &'a mut [f32],
    order: &'a mut [u32],
    draw: Draw<'a>,
    chosen: Option<Result<Sampled, SampleError>>,
}

/// Turns the values `(outputs, width)` of a step into its result.
pub(crate) fn answer(
    meta: &v1::StepMeta,
    Values { values, order, drawn, cpu }: Values<'_>,
    width: usize,
    draws: &[Option<Draw<'_>>],
) -> Result<step_result::Output, String> {
    let drawn = drawn.iter().cloned().chain(std::iter::repeat(None));
    let values = values.chunks_exact_mut(width).zip(order.chunks_exact_mut(width));
    let mut values = values.zip(draws.iter().zip(drawn));
    let mut next = || values.next().ok_or("a row has no values");
    let (mut choices, mut vectors, mut guesses) = (Vec::new(), Vec::new(), Vec::new());
    let mut ids = &meta.token_ids[..];
    for row in &meta.rows {
        let sequence = row.sequence;
        let (own, others) = ids.split_at(row.count as usize);
        ids = others;
        match row.output() {
            RowOutput::None => {}
            RowOutput::Logits | RowOutput::Vector => {
                vectors.push(v1::Vector { sequence, values: next()?.0.0.to_vec() });
            }
            RowOutput::Token => {
                let drafts = &own[(row.count - row.drafts) as usize..];
                for draft in drafts.iter().copied().map(Some).chain([None]) {
                    let ((logits, order), (draw, chosen)) = next()?;
                    let draw = draw.ok_or("a row that samples came without sampling parameters")?;
                    choices.push(Choice { sequence, draft, logits, order, draw, chosen });
                }
            }
            RowOutput::Vectors => {
                let mut all = Vec::with_capacity(row.positions.len() * width);
                for _ in &row.positions {
                    all.extend_from_slice(next()?.0.0);
                }
                vectors.push(v1::Vector { sequence, values: all });
            }
            RowOutput::Masks => {
                for _ in &row.positions {
                    let top = likeliest(cpu, next()?.0.0, row.candidates).map_err(|e| e.to_string())?;
                    guesses.push(v1::Guess { sequence, top });
                }
            }
        }
    }
    cpu.each(&mut choices, |c| {
        c.chosen.get_or_insert_with(|| sample(cpu, c.logits, c.order, &c.draw));
    });
    let tokens = verified(choices)?;
    match (tokens.is_empty(), vectors.is_empty(), guesses.is_empty()) {
        (_, true, true) => Ok(step_result::Output::Tokens(v1::SampledTokens { tokens })),
        (true, false, true) => Ok(step_result::Output::Vectors(v1::Vectors { vectors })),
        (true, true, false) => Ok(step_result::Output::Guesses(v1::Guesses { guesses })),
        _ => Err("a step yields one kind of output".into()),
    }
}

/// The tokens that count: of each sequence its drafts for as long as they are what is sampled in their place, and the
/// first token that no draft is.
fn verified(choices: Vec<Choice<'_>>) -> Result<Vec<v1::SampledToken>, String> {
    let mut tokens = Vec::with_capacity(choices.len());
    let mut over = None;
    for Choice { sequence, draft, chosen, .. } in choices {
        let Some(chosen) = chosen.filter(|_| over != Some(sequence)) else { continue };
        let Sampled { token, logprobs } = chosen.map_err(|e| e.to_string())?;
        if draft != Some(token) {
            over = Some(sequence);
        }
        tokens.push(v1::SampledToken { sequence, token_id: token, logprobs });
    }
    Ok(tokens)
}
