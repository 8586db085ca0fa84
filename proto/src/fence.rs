//! Ordering of pipeline incarnations.

use std::fmt;

use crate::v1::Fence;

impl Fence {
    /// Whether a call with this fence must be refused by someone who has seen `newest`.
    ///
    /// Terms order leaders; within a term, incarnations of one pipeline are counted.
    /// Pipelines of one term do not order each other.
    pub fn is_stale(&self, newest: &Fence) -> bool {
        self.term < newest.term
            || (self.term == newest.term
                && self.pipeline == newest.pipeline
                && self.incarnation < newest.incarnation)
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.term, self.pipeline, self.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(term: u64, pipeline: u32, incarnation: u64) -> Fence {
        Fence { term, pipeline, incarnation }
    }

    #[test]
    fn orders_terms_then_incarnations_of_one_pipeline() {
        let newest = fence(2, 0, 5);
        assert!(fence(1, 0, 9).is_stale(&newest));
        assert!(fence(2, 0, 4).is_stale(&newest));
        assert!(!fence(2, 0, 5).is_stale(&newest));
        assert!(!fence(2, 1, 1).is_stale(&newest));
        assert!(!fence(3, 0, 1).is_stale(&newest));
    }
}
