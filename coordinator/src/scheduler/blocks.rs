//! KV blocks: who uses them, and what those hold that nobody uses any more.
//!
//! A full block whose contents are certain may be published under all the tokens up to its end. Later sequences that
//! begin with these tokens use it instead of computing its positions again. It is found by the block before it and its
//! own tokens, compared one by one: no two prefixes can be taken for each other.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// What sequences must have in common to share blocks, beside tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    /// Whose they are. Nobody can learn from the speed of an answer what another tenant asked.
    pub tenant: Arc<str>,
    /// Set of rotary frequencies that keys were turned by.
    pub rope_set: u32,
}

/// Names the contents of a published block, and with them all that came before. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Contents(u64);

/// What a published block is found by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Prefix {
    before: Before,
    tokens: Box<[u32]>,
}

/// What comes before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Before {
    Nothing(Scope),
    Block(Contents),
}

#[derive(Debug, Clone, Default)]
struct Block {
    users: u32,
    /// Set while it is published.
    published: Option<(Prefix, Contents)>,
    /// When its last user left, if it is published.
    idle_since: u64,
}

/// Hands out block ids `0..total`, to several users where contents are shared. The lowest free ids of a fresh allocator
/// come first; then those of idle published blocks, the longest unused first.
#[derive(Debug, Clone)]
pub(crate) struct BlockAllocator {
    blocks: Vec<Block>,
    /// Used by nobody, not published.
    free: Vec<u32>,
    /// Used by nobody, published, by the time at which that began.
    idle: BTreeMap<u64, u32>,
    published: HashMap<Prefix, u32>,
    clock: u64,
}

impl BlockAllocator {
    /// An allocator of `total` blocks, all free.
    pub fn new(total: u32) -> Self {
        BlockAllocator {
            blocks: vec![Block::default(); total as usize],
            free: (0..total).rev().collect(),
            idle: BTreeMap::new(),
            published: HashMap::new(),
            clock: 0,
        }
    }

    /// `count` blocks for one user, or `None` if fewer are available. What idle ones among them held is forgotten.
    pub fn take(&mut self, count: u32) -> Option<Vec<u32>> {
        if self.available() < count {
            return None;
        }
        let mut taken = self.free.split_off(self.free.len().saturating_sub(count as usize));
        while taken.len() < count as usize {
            let (_, block) = self.idle.pop_first()?;
            if let Some((prefix, _)) = self.blocks[block as usize].published.take() {
                self.published.remove(&prefix);
            }
            taken.push(block);
        }
        for block in &taken {
            self.blocks[*block as usize].users = 1;
        }
        Some(taken)
    }

    /// The published blocks that hold the beginning of `tokens`, in order, as far as there are any; `block_tokens`
    /// each.
    pub fn find(&self, scope: &Scope, tokens: &[u32], block_tokens: u32) -> Vec<u32> {
        let mut found = Vec::new();
        let mut before = Before::Nothing(scope.clone());
        for tokens in tokens.chunks_exact(block_tokens as usize) {
            let prefix = Prefix { before, tokens: tokens.into() };
            let Some(block) = self.published.get(&prefix) else { break };
            let Some((_, contents)) = self.blocks[*block as usize].published else { break };
            found.push(*block);
            before = Before::Block(contents);
        }
        found
    }

    /// How many of `found` nobody uses: so many fewer are available once they are [shared](Self::share).
    pub fn idle_among(&self, found: &[u32]) -> u32 {
        found.iter().filter(|b| self.blocks[**b as usize].users == 0).count() as u32
    }

    /// Adds a user to each of `found`, which [`find`](Self::find) yielded just now. Gives what the last one holds.
    pub fn share(&mut self, found: &[u32]) -> Option<Contents> {
        for block in found {
            let block = &mut self.blocks[*block as usize];
            if block.users == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.users += 1;
        }
        let last = &self.blocks[*found.last()? as usize];
        last.published.as_ref().map(|(_, contents)| *contents)
    }

    /// Publishes a block in use, full of `tokens`, which follow what `before` names. Another block may be published
    /// with the same contents already: then that one stays. Gives what names the contents.
    pub fn publish(
        &mut self,
        block: u32,
        scope: &Scope,
        before: Option<Contents>,
        tokens: &[u32],
    ) -> Contents {
        let before = before.map_or_else(|| Before::Nothing(scope.clone()), Before::Block);
        let prefix = Prefix { before, tokens: tokens.into() };
        let other = self.published.get(&prefix).and_then(|b| self.blocks[*b as usize].published.as_ref());
        if let Some((_, contents)) = other {
            return *contents;
        }
        self.clock += 1;
        let contents = Contents(self.clock);
        self.published.insert(prefix.clone(), block);
        self.blocks[block as usize].published = Some((prefix, contents));
        contents
    }

    /// Takes a user from each of `blocks`, which are one user's in order of positions. Of what becomes idle, the end of
    /// a prefix is forgotten before its beginning.
    pub fn give_back(&mut self, blocks: &[u32]) {
        for id in blocks.iter().rev() {
            let block = &mut self.blocks[*id as usize];
            debug_assert!(block.users > 0, "a block was given back twice");
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.published.is_none() {
                self.free.push(*id);
                continue;
            }
            self.clock += 1;
            block.idle_since = self.clock;
            self.idle.insert(self.clock, *id);
        }
    }

    /// Blocks that nobody uses.
    pub fn available(&self) -> u32 {
        (self.free.len() + self.idle.len()) as u32
    }

    /// All blocks.
    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Users of a block.
    #[cfg(test)]
    pub fn users(&self, block: u32) -> u32 {
        self.blocks[block as usize].users
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKENS: u32 = 2;

    fn scope(tenant: &str) -> Scope {
        Scope { tenant: tenant.into(), rope_set: 0 }
    }

    /// Uses blocks for `tokens`, those that are published and new ones, and publishes the full ones.
    fn hold(allocator: &mut BlockAllocator, scope: &Scope, tokens: &[u32]) -> Option<(Vec<u32>, usize)> {
        let mut blocks = allocator.find(scope, tokens, TOKENS);
        let needed = (tokens.len() as u32).div_ceil(TOKENS) - blocks.len() as u32;
        if allocator.available() - allocator.idle_among(&blocks) < needed {
            return None;
        }
        let found = blocks.len();
        let mut before = allocator.share(&blocks);
        blocks.extend(allocator.take(needed).unwrap());
        for (block, tokens) in blocks.iter().zip(tokens.chunks_exact(TOKENS as usize)).skip(found) {
            before = Some(allocator.publish(*block, scope, before, tokens));
        }
        Some((blocks, found))
    }

    proptest! {
        #[test]
        fn blocks_are_shared_only_for_the_same_prefix_and_none_is_lost(
            total in 0u32..20,
            orders in prop::collection::vec((any::<bool>(), 0u32..2, prop::collection::vec(0u32..2, 1..12)), 0..80),
        ) {
            let mut allocator = BlockAllocator::new(total);
            // What was written to each block last: the tenant, and all tokens up to its end.
            let mut written: HashMap<u32, (u32, Vec<u32>)> = HashMap::new();
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (take, tenant, tokens) in orders {
                if take {
                    let available = allocator.available();
                    match hold(&mut allocator, &scope(&tenant.to_string()), &tokens) {
                        Some((blocks, found)) => {
                            for (i, block) in blocks.iter().enumerate() {
                                let end = tokens.len().min((i + 1) * TOKENS as usize);
                                let contents = (tenant, tokens[..end].to_vec());
                                if i < found {
                                    prop_assert_eq!(&written[block], &contents);
                                } else {
                                    let in_use = held.iter().any(|h| h.contains(block));
                                    prop_assert!(!in_use, "a block in use was handed out");
                                    written.insert(*block, contents);
                                }
                            }
                            held.push(blocks);
                        }
                        None => prop_assert!((tokens.len() as u32).div_ceil(TOKENS) > available),
                    }
                } else if !held.is_empty() {
                    let blocks = held.swap_remove(tokens.len() % held.len());
                    allocator.give_back(&blocks);
                }
                let mut users = vec![0; total as usize];
                held.iter().flatten().for_each(|b| users[*b as usize] += 1);
                let unused = users.iter().filter(|u| **u == 0).count();
                prop_assert_eq!(allocator.available() as usize, unused);
                for (block, users) in users.iter().enumerate() {
                    prop_assert_eq!(allocator.users(block as u32), *users);
                }
            }
        }
    }

    #[test]
    fn the_end_of_the_longest_unused_prefix_is_forgotten_first() {
        let mut allocator = BlockAllocator::new(6);
        let scope = scope("");
        let found = |a: &BlockAllocator, tokens: &[u32]| a.find(&scope, tokens, TOKENS).len();
        let (one, two) = ([1, 1, 2, 2, 3, 3], [7, 7, 8, 8]);
        for tokens in [&one[..], &two] {
            let (blocks, _) = hold(&mut allocator, &scope, tokens).unwrap();
            allocator.give_back(&blocks);
        }
        assert_eq!((found(&allocator, &one), found(&allocator, &two), allocator.available()), (3, 2, 6));
        let taken = allocator.take(2).unwrap();
        assert_eq!((found(&allocator, &one), found(&allocator, &two)), (2, 2));
        // The first one is used again, which makes the second one the older.
        let (blocks, known) = hold(&mut allocator, &scope, &one[..4]).unwrap();
        assert_eq!(known, 2);
        allocator.give_back(&blocks);
        let more = allocator.take(1).unwrap();
        assert_eq!((found(&allocator, &one), found(&allocator, &two)), (2, 1));
        assert!(allocator.take(4).is_none());
        allocator.give_back(&[taken, more].concat());
        assert!(allocator.take(6).is_some());
        assert_eq!((found(&allocator, &one), found(&allocator, &two)), (0, 0));
    }

    #[test]
    fn of_two_blocks_with_the_same_contents_one_is_found_and_both_go_on() {
        let mut allocator = BlockAllocator::new(8);
        let scope = scope("");
        let mut publish = |tokens: [u32; 4]| {
            let blocks = allocator.take(2).unwrap();
            let first = allocator.publish(blocks[0], &scope, None, &tokens[..2]);
            allocator.publish(blocks[1], &scope, Some(first), &tokens[2..]);
            blocks
        };
        let (a, b) = (publish([1, 1, 2, 2]), publish([1, 1, 3, 3]));
        assert_eq!(allocator.find(&scope, &[1, 1, 2, 2], TOKENS), a);
        assert_eq!(allocator.find(&scope, &[1, 1, 3, 3], TOKENS), [a[0], b[1]]);
        allocator.give_back(&b);
        assert_eq!(allocator.find(&scope, &[1, 1, 3, 3, 9], TOKENS), [a[0], b[1]]);
        assert_eq!(allocator.available(), 6);
    }
}
