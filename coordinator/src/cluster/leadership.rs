//! Whether this coordinator may act, and by which term.

/// Whether this coordinator may act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leadership {
    /// It may, and its calls carry this term.
    Leads {
        /// Later leaders have higher ones.
        term: u64,
    },
    /// It may not.
    StandsBy {
        /// What it waits for.
        why: String,
    },
}
