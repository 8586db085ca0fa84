//! The coordinator, as it is, in a world that is made up: several of them, workers, an election, clients, a network, and what
//! goes wrong with each, by a seed. What happens with a seed happens again with it.
//!
//! One thread runs all. Each coordinator has a tokio runtime of its own whose time stands still until the driver moves it on,
//! 10 ms at a time, which is the shortest way through the network: meanwhile nothing can come. So a process can be stopped, or
//! be gone with everything in it, as tasks of a common runtime cannot, and thousands of seeds take minutes, which they would
//! not with sockets and HTTP (`turmoil`), whose adapters here (`cluster/remote.rs`) have no logic. Workers are state machines
//! with the real memory of leaders ([`strata_proto::Lead`]), and a cache that computes tokens: a wrong replay, a block that is
//! used twice or a step that runs twice is a wrong token. With a list of workers, the real claims decide who leads. Etcd's
//! election is made up to the contract of `cluster/etcd/election.rs`, which real servers test (`tests/it/etcd.rs`).

mod cache;
mod checks;
mod client;
mod elected;
mod faults;
mod letters;
mod model;
mod network;
mod process;
mod random;
mod stage;
mod store;
mod tests;
mod worker;
mod world;

use std::sync::{Arc, Mutex};

use self::{
    client::Ledger,
    faults::{CALM, Deed},
    letters::{Node, ProcessId},
    network::LEAST_DELAY,
    process::{By, Process},
    random::Random,
    world::{Happening, SECOND, Shared, Time, World, lock},
};
use crate::engine::State;

pub(crate) use process::is_running;

/// When clients ask.
const ASKING: Time = 16 * SECOND;
/// How long everything may take to be as it should, once nothing goes wrong any more.
const BOUND: Time = 100 * SECOND;
/// How long it is watched that it stays so.
const STAYS: Time = 2 * SECOND;
/// What clocks say when the world begins, in microseconds since 1970.
const EPOCH: u64 = 1_800_000_000_000_000;
/// Pause before a process that has ended is started anew.
const START_AGAIN: Time = SECOND;

/// A defect that is made on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plant {
    None,
    /// Workers take calls with any fence.
    NoFence,
    /// Stages leave out what a replay brings again.
    NoReplay,
    /// Every leader has the same term.
    SameTerm,
    /// Stages compute some steps twice.
    TwiceComputed,
    /// Stages write to blocks of a sequence after it has ended.
    LateWrite,
}

/// What became of a world.
#[derive(Debug)]
struct Outcome {
    violation: Option<String>,
    /// The end of its trace.
    trace: String,
    /// Of all of it.
    hash: u64,
    answered: usize,
    /// How long it took after the last fault.
    settled: Time,
}

/// Those who are driven.
struct Driver {
    world: Shared,
    by: By,
    workers: usize,
    processes: Vec<Option<Process>>,
    /// Of each coordinator, how often it was started, and what its clock is ahead.
    boots: Vec<(u64, i64)>,
    ledger: Arc<Mutex<Ledger>>,
    random: Random,
}

/// What a world begins with.
struct Setup {
    by: By,
    coordinators: usize,
    /// Layers that each worker has room for.
    rooms: Vec<u64>,
    clients: usize,
    /// Within which time they ask.
    asking: Time,
}

/// Lets a world of this seed run.
fn run(seed: u64, plant: Plant, is_loud: bool) -> Outcome {
    let mut random = Random::new(seed);
    let by = if random.percent(50) || plant == Plant::SameTerm { By::Election } else { By::Claims };
    let workers = random.within(2..6) as usize;
    let coordinators = random.within(2..4) as usize;
    let room = if random.percent(50) { 3 } else { 6 };
    let rooms = (0..workers).map(|_| room + random.within(0..2)).collect();
    let clients = random.within(4..16) as usize;
    let setup = Setup { by, coordinators, rooms, clients, asking: ASKING };
    let mut driver = Driver::new(setup, plant, random);
    {
        let mut world = lock(&driver.world);
        world.is_loud = is_loud;
        world.plan_faults(coordinators);
    }
    driver.drive()
}

impl Driver {
    /// A world in which nothing goes wrong yet, and the coordinators have just been started.
    fn new(setup: Setup, plant: Plant, mut random: Random) -> Self {
        let Setup { by, coordinators, rooms, clients, asking } = setup;
        let workers = rooms.len();
        let there = rooms.into_iter().map(worker::Worker::new).collect();
        let mut world = World::new(random.next(), plant, there);
        world.network.coordinators = coordinators;
        world.schedule(0, Happening::Keepalive);
        let ledger = Arc::new(Mutex::new(Ledger::new(clients, asking, &mut random)));
        let mut driver = Driver {
            world: Arc::new(Mutex::new(world)),
            by,
            workers,
            processes: (0..coordinators).map(|_| None).collect(),
            boots: vec![(0, 0); coordinators],
            ledger,
            random,
        };
        (0..coordinators).for_each(|coordinator| driver.start(coordinator, 0));
        driver
    }

    fn drive(&mut self) -> Outcome {
        let (mut time, mut good_since, mut is_calm) = (0, None, false);
        let violation = loop {
            time += LEAST_DELAY;
            self.run_until(time);
            if let Some(violation) = self.violation() {
                break Some(violation);
            }
            if time >= CALM && !is_calm {
                is_calm = true;
                self.calm();
            }
            if !is_calm {
                continue;
            }
            match self.unsettled() {
                None if time - *good_since.get_or_insert(time) >= STAYS => match self.leaks() {
                    // A connection that breaks late is as good as any.
                    Some(leak) if time - CALM > BOUND => break Some(leak),
                    Some(_) => {}
                    None => break None,
                },
                None => {}
                Some(what) if time > CALM + BOUND => break Some(format!("in the end {what}")),
                Some(_) => good_since = None,
            }
        };
        for process in self.processes.iter().flatten() {
            process::told(&mut lock(&self.world), process);
        }
        self.processes.clear();
        let (world, ledger) = (lock(&self.world), lock(&self.ledger));
        let settled = good_since.unwrap_or(time).saturating_sub(CALM);
        Outcome { violation, trace: world.report(), hash: world.hash, answered: ledger.answered, settled }
    }

    fn run_until(&mut self, time: Time) {
        lock(&self.ledger).now = time;
        self.ask();
        for process in self.processes.iter().flatten().filter(|process| !process.is_paused) {
            process.run_until(time);
        }
        loop {
            let deed = {
                let mut world = lock(&self.world);
                world.run_until(time);
                world.due.pop_front()
            };
            match deed {
                Some(deed) => self.act(deed, time),
                None => break,
            }
        }
        let told = std::mem::take(&mut lock(&self.ledger).told);
        told.into_iter().for_each(|line| lock(&self.world).note(|| line));
        // Who cannot start is started anew.
        for coordinator in 0..self.processes.len() {
            let failed = self.processes[coordinator].as_ref().and_then(Process::failed);
            if let Some(why) = failed {
                self.processes[coordinator] = None;
                let mut world = lock(&self.world);
                world.note(|| format!("c{coordinator} ends: {why}"));
                world.schedule(
                    time + START_AGAIN,
                    Happening::Driver(Deed::Start(Node::Coordinator(coordinator))),
                );
            }
        }
    }

    /// Clients that are due ask a coordinator: one that is ready, if any is.
    fn ask(&mut self) {
        let due = lock(&self.ledger).due();
        for client in due {
            let there: Vec<_> =
                self.processes.iter().flatten().filter(|process| !process.is_paused).collect();
            let ready = there.iter().filter(|process| process.coordinator().watch().borrow().ready());
            let ready: Vec<_> = ready.collect();
            let asked = match (ready.len(), there.len()) {
                (0, 0) => None,
                (0, some) => Some(there[self.random.index(some)]),
                (some, _) => Some(*ready[self.random.index(some)]),
            };
            match asked {
                Some(process) => process.ask(&self.ledger, client),
                None => lock(&self.ledger).put_off(client),
            }
        }
    }

    /// Starts a coordinator, if it is not there.
    fn start(&mut self, coordinator: usize, time: Time) {
        if self.processes[coordinator].is_none() {
            let (boot, ahead) = &mut self.boots[coordinator];
            *boot += 1;
            let (id, clock) =
                (ProcessId { coordinator, boot: *boot }, EPOCH.saturating_add_signed(*ahead) + time);
            lock(&self.world).note(|| format!("{id} starts"));
            self.processes[coordinator] =
                Some(Process::start(id, &self.world, self.by, self.workers, time, clock));
        }
    }

    fn act(&mut self, deed: Deed, time: Time) {
        lock(&self.world).note(|| format!("{deed:?}"));
        match deed {
            Deed::Crash(Node::Coordinator(coordinator), tells) => {
                if let Some(gone) = self.processes[coordinator].take() {
                    let id = gone.id;
                    drop(gone);
                    lock(&self.world).forget(id, tells);
                }
            }
            Deed::Start(Node::Coordinator(coordinator)) => self.start(coordinator, time),
            Deed::Pause(Node::Coordinator(coordinator)) => {
                self.processes[coordinator].iter_mut().for_each(|process| process.is_paused = true);
            }
            Deed::Resume(Node::Coordinator(coordinator)) => {
                self.processes[coordinator].iter_mut().for_each(|process| process.resume(time));
            }
            Deed::Clock(coordinator, by) => {
                self.boots[coordinator].1 += by;
                self.processes[coordinator].iter_mut().for_each(|process| process.set_clock(by));
            }
            deed => lock(&self.world).suffer(deed),
        }
    }

    /// Nothing goes wrong from now on, and what did is over.
    fn calm(&mut self) {
        let time = CALM;
        for coordinator in 0..self.processes.len() {
            self.act(Deed::Resume(Node::Coordinator(coordinator)), time);
            self.start(coordinator, time);
        }
        lock(&self.world).calm();
    }

    fn violation(&self) -> Option<String> {
        lock(&self.world).checks.violation.clone().or_else(|| lock(&self.ledger).violation.clone())
    }

    /// What is not yet as it should be in the end.
    fn unsettled(&self) -> Option<String> {
        let open = lock(&self.ledger).open();
        if open > 0 {
            return Some(format!("{open} clients have no answer"));
        }
        let ready: Vec<_> =
            self.processes.iter().flatten().filter(|p| p.coordinator().watch().borrow().ready()).collect();
        let [leader] = &ready[..] else { return Some(format!("{} coordinators serve", ready.len())) };
        let standing = |process: &&Process| process.coordinator().watch().borrow().state == State::Standby;
        if self.processes.iter().flatten().filter(standing).count() + 1 != self.processes.len() {
            return Some("not all others stand by".into());
        }
        let world = lock(&self.world);
        let last = world.last_actor();
        (last != Some(leader.id)).then(|| format!("{} serves, and {last:?} acted last", leader.id))
    }

    /// What is left of what has ended.
    fn leaks(&self) -> Option<String> {
        let world = lock(&self.world);
        for process in self.processes.iter().flatten() {
            let (id, snapshot) = (process.id, process.coordinator().watch().borrow().clone());
            let load = snapshot.load;
            let held = [load.running, load.waiting, load.steps_in_flight, load.kv_tokens_used as u32];
            if process.coordinator().session().in_progress() > 0 || held != [0; 4] {
                return Some(format!("{id} still has requests: {load:?}"));
            }
            if snapshot.state == State::Standby && !snapshot.loading.is_empty() {
                return Some(format!("{id} stands by, and says that it loads: {:?}", snapshot.loading));
            }
            let running = world.workers.iter().filter_map(|worker| worker.incarnation.as_ref());
            let running: Vec<_> = running.filter(|incarnation| incarnation.is_run_by(id)).collect();
            let streams = world.streams_of(id);
            if running.len() != streams || (snapshot.state == State::Standby && streams > 0) {
                return Some(format!("{id} has {streams} streams, and {} stages run for it", running.len()));
            }
            // Stages hear of an end with the next step.
            let most = model::STEP_ROWS as usize + 4;
            if running.iter().any(|incarnation| incarnation.sequences() > most) {
                return Some(format!("a stage of {id} knows more than {most} sequences"));
            }
            let most = 8 + 2 * self.workers + 3 * streams;
            if process.tasks() > most {
                return Some(format!("{id} has {} tasks, and needs no more than {most}", process.tasks()));
            }
        }
        None
    }
}

impl World {
    /// Something goes wrong, or right again.
    fn suffer(&mut self, deed: Deed) {
        match deed {
            Deed::Crash(Node::Worker(worker), tells) => self.crash(worker, tells),
            Deed::Start(Node::Worker(worker)) => self.restart(worker),
            Deed::Pause(Node::Worker(worker)) => self.pause(worker),
            Deed::Resume(Node::Worker(worker)) => self.resume(worker),
            Deed::Pause(_) => self.store.is_down = true,
            Deed::Resume(_) => self.store.is_down = false,
            Deed::Cut(ways) => ways.into_iter().for_each(|(from, to)| self.network.cut(from, to)),
            Deed::Heal(ways) => ways.into_iter().for_each(|(from, to)| self.heal(from, to)),
            Deed::Slow(node, time) => drop(self.network.slow.insert(node, time)),
            Deed::Fast(node) => drop(self.network.slow.remove(&node)),
            Deed::Disconnect(to) => self.disconnect_all(to),
            Deed::Poison => self.poison = 2,
            Deed::Crash(..) | Deed::Start(_) | Deed::Clock(..) => {}
        }
    }

    fn calm(&mut self) {
        self.note(|| "nothing goes wrong any more".into());
        for worker in 0..self.workers.len() {
            self.resume(worker);
            self.restart(worker);
        }
        for (from, to) in self.network.cuts() {
            self.heal(from, to);
        }
        self.network.slow.clear();
        (self.store.is_down, self.poison) = (false, 0);
    }
}
