//! What goes wrong, and when, by a seed.

use super::{
    letters::Node,
    random::Random,
    world::{Happening, MILLISECOND, SECOND, Time, World},
};

/// When faults begin.
const FAULTS: std::ops::Range<Time> = SECOND / 2..12 * SECOND;
/// Longest fault.
const LONGEST: Time = 8 * SECOND;
/// When all is well again.
pub const CALM: Time = 16 * SECOND;

/// Something that the driver does.
#[derive(Debug, Clone)]
pub enum Deed {
    Crash(Node, bool),
    Start(Node),
    Pause(Node),
    Resume(Node),
    Cut(Vec<(Node, Node)>),
    Heal(Vec<(Node, Node)>),
    Slow(Node, Time),
    Fast(Node),
    /// The connections of coordinators to it break.
    Disconnect(Node),
    /// A machine's clock is set, by so many microseconds.
    Clock(usize, i64),
    /// The next steps are poisoned.
    Poison,
}

impl World {
    /// Makes up what goes wrong over so many coordinators.
    pub fn plan_faults(&mut self, coordinators: usize) {
        let mut random = Random::new(self.random.next());
        let workers = self.workers.len();
        let coordinator = |random: &mut Random| Node::Coordinator(random.index(coordinators));
        let worker = |random: &mut Random| Node::Worker(random.index(workers));
        let faults = random.within(1..12);
        for _ in 0..faults {
            let at = random.within(FAULTS);
            // Most of them are short, some long enough for everybody to notice.
            let long = if random.percent(50) { 1500 * MILLISECOND } else { LONGEST };
            let end = (at + random.within(20 * MILLISECOND..long)).min(CALM);
            let any = if random.percent(50) { coordinator(&mut random) } else { worker(&mut random) };
            let mut both = |begin, over| {
                self.schedule(at, Happening::Driver(begin));
                self.schedule(end, Happening::Driver(over));
            };
            match random.within(0..100) {
                0..25 => both(Deed::Crash(any, random.percent(70)), Deed::Start(any)),
                25..45 => both(Deed::Pause(any), Deed::Resume(any)),
                45..60 => {
                    let other = loop {
                        let other = match random.within(0..5) {
                            0 => Node::Store,
                            1 | 2 => coordinator(&mut random),
                            _ => worker(&mut random),
                        };
                        if other != any {
                            break other;
                        }
                    };
                    let mut ways = vec![(any, other)];
                    if random.percent(60) {
                        ways.push((other, any));
                    }
                    both(Deed::Cut(ways.clone()), Deed::Heal(ways));
                }
                60..70 => {
                    // One side of a partition.
                    let mut nodes: Vec<_> = (0..coordinators).map(Node::Coordinator).collect();
                    nodes.extend((0..workers).map(Node::Worker));
                    nodes.push(Node::Store);
                    let (side, others): (Vec<Node>, Vec<Node>) =
                        nodes.into_iter().partition(|_| random.percent(50));
                    let pairs =
                        side.iter().flat_map(|a| others.iter().flat_map(move |b| [(*a, *b), (*b, *a)]));
                    let ways: Vec<_> = pairs.collect();
                    both(Deed::Cut(ways.clone()), Deed::Heal(ways));
                }
                70..78 => both(Deed::Slow(any, random.within(20..600) * MILLISECOND), Deed::Fast(any)),
                78..84 => {
                    self.schedule(at, Happening::Driver(Deed::Disconnect(worker(&mut random))));
                }
                84..92 => {
                    let by = random.within(0..7200 * SECOND) as i64 - (3600 * SECOND) as i64;
                    let at_once = Happening::Driver(Deed::Clock(random.index(coordinators), by));
                    self.schedule(at, at_once);
                }
                92..96 => both(Deed::Pause(Node::Store), Deed::Resume(Node::Store)),
                _ => self.schedule(at, Happening::Driver(Deed::Poison)),
            }
        }
    }
}
