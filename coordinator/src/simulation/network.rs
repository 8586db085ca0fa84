//! Between the nodes: delays, order, and ways that are cut, each in one direction.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{
    letters::{Letter, Node},
    random::Random,
    world::{MILLISECOND, Time},
};

/// Shortest way: a coordinator may run for so long without hearing of anything that happens meanwhile.
pub const LEAST_DELAY: Time = 10 * MILLISECOND;
/// Seconds without a sign after which a connection breaks: a ping is due after 2, and answered within 3.
const PATIENCE: u32 = 4;

#[derive(Default)]
pub struct Network {
    cut: BTreeSet<(Node, Node)>,
    held: BTreeMap<(Node, Node), VecDeque<Letter>>,
    last: BTreeMap<(Node, Node), Time>,
    /// How much longer the ways of a node are than usual.
    pub slow: BTreeMap<Node, Time>,
    pub coordinators: usize,
    /// Seconds that a coordinator has not been heard by, or has not heard of, somebody.
    silent: BTreeMap<(Node, Node), u32>,
}

impl Network {
    /// When a letter comes, unless it is held back.
    pub fn send(
        &mut self,
        at: Time,
        from: Node,
        to: Node,
        letter: Letter,
        random: &mut Random,
    ) -> Option<(Time, Letter)> {
        if self.cut.contains(&(from, to)) {
            self.held.entry((from, to)).or_default().push_back(letter);
            return None;
        }
        let slow = [from, to].iter().filter_map(|node| self.slow.get(node)).sum::<Time>();
        let spread = random.within(0..5 * MILLISECOND) + random.within(0..slow + 1);
        let last = self.last.entry((from, to)).or_default();
        *last = (at + LEAST_DELAY + spread).max(*last + 1);
        Some((*last, letter))
    }

    /// Nothing that is sent comes from now on.
    pub fn cut(&mut self, from: Node, to: Node) {
        self.cut.insert((from, to));
    }

    /// A way is open again; what was held back.
    pub fn heal(&mut self, from: Node, to: Node) -> VecDeque<Letter> {
        self.cut.remove(&(from, to));
        self.held.remove(&(from, to)).unwrap_or_default()
    }

    /// Ways that are cut.
    pub fn cuts(&self) -> Vec<(Node, Node)> {
        self.cut.iter().copied().collect()
    }

    pub fn is_cut(&self, from: Node, to: Node) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Of what is held back only the beginning will ever come.
    pub fn lose(&mut self, from: Node, to: Node, random: &mut Random) {
        if let Some(held) = self.held.get_mut(&(from, to)) {
            held.truncate(random.index(held.len() + 1));
        }
    }

    /// Which connections to a node break: called once a second.
    pub fn silent(&mut self, to: Node, is_stopped: bool) -> Vec<(Node, Node)> {
        let mut broken = Vec::new();
        for coordinator in (0..self.coordinators).map(Node::Coordinator) {
            let silent = is_stopped || self.is_cut(coordinator, to) || self.is_cut(to, coordinator);
            let seconds = self.silent.entry((coordinator, to)).or_default();
            *seconds = if silent { *seconds + 1 } else { 0 };
            if *seconds == PATIENCE {
                *seconds = 0;
                broken.push((coordinator, to));
            }
        }
        broken
    }
}
