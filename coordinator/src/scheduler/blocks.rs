//! The free list of KV blocks.

/// Hands out block ids `0..total`. The lowest free ids of a fresh allocator come first.
#[derive(Debug, Clone)]
pub struct BlockAllocator {
    free: Vec<u32>,
    total: u32,
}

impl BlockAllocator {
    /// An allocator of `total` blocks, all free.
    pub fn new(total: u32) -> Self {
        BlockAllocator { free: (0..total).rev().collect(), total }
    }

    /// `count` blocks, or `None` if fewer are free.
    pub fn take(&mut self, count: u32) -> Option<Vec<u32>> {
        let left = self.free.len().checked_sub(count as usize)?;
        Some(self.free.split_off(left))
    }

    /// Takes blocks back. Each must have come from [`take`](Self::take) and be given back once.
    pub fn give_back(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.free.extend(blocks);
        debug_assert!(self.free.len() <= self.total as usize, "a block was given back twice");
    }

    /// Free blocks.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// All blocks.
    pub fn total(&self) -> u32 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn never_hands_a_block_out_twice_and_loses_none(
            total in 0u32..40,
            orders in prop::collection::vec((any::<bool>(), 0u32..12), 0..60),
        ) {
            let mut allocator = BlockAllocator::new(total);
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (take, n) in orders {
                if take {
                    let free = allocator.free();
                    match allocator.take(n) {
                        Some(blocks) => {
                            prop_assert_eq!(blocks.len() as u32, n);
                            held.push(blocks);
                        }
                        None => prop_assert!(n > free),
                    }
                } else if !held.is_empty() {
                    let blocks = held.swap_remove(n as usize % held.len());
                    allocator.give_back(blocks);
                }
                let all: Vec<u32> = held.iter().flatten().copied().collect();
                let distinct: HashSet<u32> = all.iter().copied().collect();
                prop_assert_eq!(distinct.len(), all.len());
                prop_assert!(all.iter().all(|b| *b < total));
                prop_assert_eq!(allocator.free() as usize + all.len(), total as usize);
            }
        }
    }
}
