//! What each kind of state allows the scheduler to do with a sequence.
//!
//! Preemption and replay need no columns of their own: whatever the kind, a sequence that gives way or whose step
//! failed loses its states, and is computed anew from where [`Reuse`] lets it begin. For a recurrent state that is
//! position 0.

use strata_proto::StateKind;

/// Where a sequence may begin behind positions that were computed before, for it or for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reuse {
    /// Nowhere: what is kept depends on more than the tokens of whole blocks.
    Never,
    /// Behind whole blocks with the same tokens before them.
    WholeBlocks,
}

/// What becomes of positions at the end of a sequence that turn out not to be part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rewind {
    /// They cannot be taken back.
    Never,
    /// Those that follow are written over them.
    Overwrite,
}

/// What the states of a sequence need and allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Whether it needs blocks, for each position.
    pub blocks: bool,
    /// Whether it needs a slot, for as long as it has any state.
    pub slot: bool,
    /// Where it may begin.
    pub reuse: Reuse,
    /// Whether its end may be a guess.
    pub rewind: Rewind,
}

impl Rules {
    /// Those of one kind of state.
    const fn of(kind: StateKind) -> Rules {
        let (blocks, slot) = (matches!(kind, StateKind::PagedKv), !matches!(kind, StateKind::PagedKv));
        match kind {
            StateKind::PagedKv => {
                Rules { blocks, slot, reuse: Reuse::WholeBlocks, rewind: Rewind::Overwrite }
            }
            // It has seen every position and forgets which.
            StateKind::Recurrent => Rules { blocks, slot, reuse: Reuse::Never, rewind: Rewind::Never },
            // The same tokens mean something else behind another encoder's input; positions of it are never taken back.
            StateKind::CrossKv => Rules { blocks, slot, reuse: Reuse::Never, rewind: Rewind::Overwrite },
        }
    }

    /// Those of a model whose layers have these kinds: what any of them needs, and what all of them allow.
    pub fn of_all(kinds: &[StateKind]) -> Rules {
        let none = Rules { blocks: false, slot: false, reuse: Reuse::WholeBlocks, rewind: Rewind::Overwrite };
        kinds.iter().map(|kind| Rules::of(*kind)).fold(none, |all, one| Rules {
            blocks: all.blocks || one.blocks,
            slot: all.slot || one.slot,
            reuse: all.reuse.min(one.reuse),
            rewind: all.rewind.min(one.rewind),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_needs_what_any_of_its_states_needs_and_may_what_all_of_them_allow() {
        use StateKind::{CrossKv, PagedKv, Recurrent};
        let rules = |kinds: &[StateKind]| {
            let Rules { blocks, slot, reuse, rewind } = Rules::of_all(kinds);
            (blocks, slot, reuse, rewind)
        };
        assert_eq!(rules(&[PagedKv]), (true, false, Reuse::WholeBlocks, Rewind::Overwrite));
        assert_eq!(rules(&[Recurrent]), (false, true, Reuse::Never, Rewind::Never));
        assert_eq!(rules(&[PagedKv, Recurrent]), (true, true, Reuse::Never, Rewind::Never));
        assert_eq!(rules(&[PagedKv, CrossKv]), (true, true, Reuse::Never, Rewind::Overwrite));
        assert_eq!(rules(&[]), (false, false, Reuse::WholeBlocks, Rewind::Overwrite));
    }
}
