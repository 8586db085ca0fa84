//! How long a sequence may be, and what it is that allows no more.

use std::fmt;

/// Most tokens of a sequence. Its text says what they are bounded by, and where more would come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    /// So many.
    pub tokens: u64,
    by: By,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    /// The model takes no more.
    Model,
    /// `--context`, less than the model would take.
    Context,
    /// `--kv-tokens`.
    KvTokens,
    /// What the plan has memory for.
    Memory,
    /// `--max-step-tokens`, for what is computed whole.
    Step,
}

impl Limit {
    /// Of sequences of a model that takes `model` tokens, where `context` was asked for.
    pub fn of_context(model: u32, context: Option<u32>) -> Self {
        let context = context.map(|tokens| Limit { tokens: tokens.into(), by: By::Context });
        Limit { tokens: model.into(), by: By::Model }.and(context)
    }

    /// The same, where a cache holds `capacity` tokens: because they were `asked` for, or as there is memory for no more.
    pub fn within_cache(self, capacity: u64, asked: bool) -> Self {
        self.and(Some(Limit { tokens: capacity, by: if asked { By::KvTokens } else { By::Memory } }))
    }

    /// The same for an input that is computed whole, in a step of at most `tokens`.
    pub fn within_step(self, tokens: u32) -> Self {
        self.and(Some(Limit { tokens: tokens.into(), by: By::Step }))
    }

    /// The smaller one; of equal ones `self`.
    fn and(self, other: Option<Self>) -> Self {
        other.filter(|other| other.tokens < self.tokens).unwrap_or(self)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tokens = self.tokens;
        match self.by {
            By::Model => write!(f, "the model takes {tokens} tokens at most"),
            By::Context => write!(f, "--context allows {tokens} tokens, less than the model would take"),
            By::KvTokens => write!(f, "the cache holds {tokens} tokens, as --kv-tokens asked for"),
            By::Memory => write!(f, "the cache holds {tokens} tokens, as there is memory for no more"),
            By::Step => {
                write!(f, "an input is computed whole, and a step has {tokens} tokens (--max-step-tokens)")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_says_where_it_comes_from() {
        let says = |limit: Limit, tokens: u64, words: &str| {
            assert_eq!(limit.tokens, tokens);
            assert!(limit.to_string().contains(words), "{limit}");
        };
        let model = Limit::of_context(256, None);
        says(model, 256, "the model takes 256 tokens");
        says(Limit::of_context(256, Some(999)), 256, "the model takes 256 tokens");
        says(Limit::of_context(256, Some(16)), 16, "--context allows 16 tokens");
        says(model.within_cache(4096, false), 256, "the model takes");
        says(model.within_cache(64, true), 64, "holds 64 tokens, as --kv-tokens asked");
        says(model.within_cache(64, false), 64, "holds 64 tokens, as there is memory for no more");
        says(model.within_step(512), 256, "the model takes");
        says(model.within_step(128), 128, "a step has 128 tokens (--max-step-tokens)");
    }
}
