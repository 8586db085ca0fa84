//! How many tokens of prompts a step may hold so that those who decode do not wait too long for it.

use std::{collections::VecDeque, time::Duration};

/// Tokens from which a step's time is in proportion to them.
const PROPORTIONAL: u32 = 16;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// Steps that may be under way.
const REMEMBERED: usize = 64;

/// What prompts may take of a step, by the measured speed of one pipeline.
#[derive(Debug)]
pub(crate) struct PrefillBudget {
    /// Longest wait from token to token; zero if nobody minds.
    target: Duration,
    /// Steps on their way, and their tokens.
    sent: VecDeque<(u64, u32)>,
    /// Seconds per token, by stage.
    stages: Vec<Option<f64>>,
}

impl PrefillBudget {
    /// Of a pipeline that has computed nothing yet.
    pub fn new(target: Duration) -> Self {
        PrefillBudget { target, sent: VecDeque::new(), stages: Vec::new() }
    }

    /// A step of so many tokens is on its way.
    pub fn sent(&mut self, step: u64, tokens: u32) {
        self.sent.push_back((step, tokens));
        while self.sent.len() > REMEMBERED {
            self.sent.pop_front();
        }
    }

    /// A stage computed its part of a step.
    pub fn done(&mut self, stage: usize, step: u64, compute: Duration) {
        let Some((_, tokens)) = self.sent.iter().find(|(sent, _)| *sent == step) else { return };
        if *tokens < PROPORTIONAL {
            return;
        }
        if self.stages.len() <= stage {
            self.stages.resize(stage + 1, None);
        }
        let measured = compute.as_secs_f64() / f64::from(*tokens);
        let known = &mut self.stages[stage];
        *known = Some(known.map_or(measured, |known| known + (measured - known) * NEWEST));
    }

    /// Most tokens of prompts in a step that somebody who decodes waits for: what the slowest stage computes in time,
    /// though never too few to be worth the reading of its weights.
    pub fn tokens(&self) -> u32 {
        let slowest = self.stages.iter().flatten().copied().fold(0.0, f64::max);
        if self.target.is_zero() || slowest <= 0.0 {
            return u32::MAX;
        }
        ((self.target.as_secs_f64() / slowest) as u32).max(PROPORTIONAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_stage_sets_the_pace_and_decode_steps_do_not() {
        let ms = Duration::from_millis;
        let mut budget = PrefillBudget::new(ms(200));
        assert_eq!(budget.tokens(), u32::MAX, "nothing is known yet");
        budget.sent(0, 8);
        budget.done(0, 0, ms(100));
        assert_eq!(budget.tokens(), u32::MAX, "eight tokens cost as much as one");
        budget.sent(1, 100);
        budget.done(0, 1, ms(100));
        assert_eq!(budget.tokens(), 200);
        budget.done(1, 1, ms(200));
        assert_eq!(budget.tokens(), 100);
        budget.done(1, 7, ms(1));
        assert_eq!(budget.tokens(), 100, "a step that was never sent says nothing");
        for step in 2..40 {
            budget.sent(step, 100);
            budget.done(1, step, ms(10_000));
        }
        assert_eq!(budget.tokens(), 16, "some progress is always made");
        let mut patient = PrefillBudget::new(Duration::ZERO);
        patient.sent(0, 100);
        patient.done(0, 0, ms(100));
        assert_eq!(patient.tokens(), u32::MAX);
    }
}
