//! Seeds by the hundred, each of which must end well; and defects on purpose, none of which may.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    Driver, Plant, Setup,
    faults::Deed,
    letters::Node,
    network::LEAST_DELAY,
    process::By,
    random::Random,
    run,
    world::{Happening, SECOND, lock},
};

/// Seeds of a run that nobody asked for.
const SEEDS: u64 = 300;
/// Within so many seeds a defect is found.
const FOUND: u64 = 1000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}

/// Runs seeds on all cores until one fails; which is reported with its end.
fn all_end_well(first: u64, count: u64) {
    let next = AtomicU64::new(first);
    let work = || {
        let (mut answered, mut longest) = (0, 0);
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count {
                return (answered, longest);
            }
            let outcome = run(seed, Plant::None, false);
            if let Some(violation) = outcome.violation {
                next.store(u64::MAX / 2, Ordering::Relaxed);
                panic!("{}seed {seed}: {violation}; run it again with STRATA_SEED={seed}", outcome.trace);
            }
            answered += outcome.answered;
            longest = longest.max(outcome.settled);
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (answered, longest) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let done = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|why| std::panic::resume_unwind(why)));
        done.fold((0, 0), |(answered, longest), (a, l)| (answered + a, longest.max(l)))
    });
    println!(
        "{count} seeds, {answered} answers; all was well {longest} µs after the last fault at the latest"
    );
    assert!(answered as u64 > count, "the clients have hardly had an answer: {answered}");
}

#[test]
fn whatever_goes_wrong_answers_are_exact_and_one_coordinator_serves_in_the_end() {
    match number("STRATA_SEED") {
        Some(seed) => {
            let outcome = run(seed, Plant::None, true);
            assert_eq!(outcome.violation, None, "seed {seed}");
        }
        None => all_end_well(0, number("STRATA_SEEDS").unwrap_or(SEEDS)),
    }
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..6 {
        let [first, second] = [(); 2].map(|()| run(seed, Plant::None, false));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!((first.hash, first.answered), (second.hash, second.answered), "seed {seed}");
    }
}

/// Two copies of two stages lose one each; what is left makes one copy.
#[test]
fn requests_of_a_copy_that_finds_no_devices_move_to_one_that_does() {
    for lost in [[0, 2], [2, 0], [1, 3], [3, 1]] {
        let rooms = vec![3; 4];
        let setup = Setup { by: By::Claims, coordinators: 1, rooms, clients: 12, asking: 4 * SECOND };
        let mut driver = Driver::new(setup, Plant::None, Random::new(1));
        for worker in lost.map(Node::Worker) {
            lock(&driver.world).schedule(3 * SECOND, Happening::Driver(Deed::Crash(worker, true)));
        }
        (1..=15 * SECOND / LEAST_DELAY).for_each(|step| driver.run_until(step * LEAST_DELAY));
        assert_eq!(driver.violation(), None);
        let (open, report) = (lock(&driver.ledger).open(), lock(&driver.world).report());
        assert_eq!(open, 0, "without {lost:?}: {report}");
    }
}

/// The first seed that finds a defect must find it by what it says.
fn found(plant: Plant, says: &[&str]) {
    for seed in 0..FOUND {
        if let Some(violation) = run(seed, plant, false).violation {
            println!("{plant:?} is found by seed {seed}: {violation}");
            assert!(says.iter().any(|says| violation.contains(says)), "{plant:?}, seed {seed}: {violation}");
            return;
        }
    }
    panic!("{plant:?} was not found within {FOUND} seeds");
}

#[test]
fn a_worker_without_a_fence_is_found() {
    found(Plant::NoFence, &["lets a call of", "computes for"]);
}

#[test]
fn a_replay_that_is_left_out_is_found() {
    found(Plant::NoReplay, &["without any fault"]);
}

#[test]
fn a_term_that_two_leaders_have_is_found() {
    found(Plant::SameTerm, &["acts by term"]);
}

#[test]
fn a_step_that_is_computed_twice_is_found() {
    found(Plant::TwiceComputed, &["without any fault"]);
}

#[test]
fn blocks_that_are_written_after_their_sequence_are_found() {
    found(Plant::LateWrite, &["without any fault"]);
}
