//! The scheduler against a stage that believes nothing: random arrivals, cancellations, failures, timings.

mod cases;
mod drafts;
mod stage;

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use proptest::prelude::*;

use self::stage::{FakeStage, LAST, next_token};
use super::*;

fn submit(scheduler: &mut Scheduler, id: SequenceId, request: Request) -> Result<(), SubmitError> {
    let unplaced = Unplaced::new(id, request);
    scheduler.check(&unplaced)?;
    scheduler.adopt(unplaced);
    Ok(())
}

#[derive(Debug, Clone)]
enum Action {
    Submit {
        prompt: u32,
        max_tokens: u32,
        deadline: Option<u32>,
    },
    /// An input for an encoder, with so many masks.
    Encode {
        tokens: u32,
        masks: u32,
    },
    Cancel(usize),
    Step,
    Commit,
    Fail,
    /// The last stage forgets a token.
    Garble(usize),
    /// A new incarnation with so many blocks.
    Restart(u32),
    /// Another scheduler takes over, with so many blocks.
    Move(u32),
    /// Prompts may take so many tokens of a step while somebody decodes.
    Limit(u32),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (1u32..40, 1u32..30, prop::option::weighted(0.2, 0u32..200))
            .prop_map(|(prompt, max_tokens, deadline)| Action::Submit { prompt, max_tokens, deadline }),
        2 => (1u32..40, 0u32..5).prop_map(|(tokens, masks)| Action::Encode { tokens, masks }),
        1 => any::<usize>().prop_map(Action::Cancel),
        8 => Just(Action::Step),
        8 => Just(Action::Commit),
        1 => Just(Action::Fail),
        1 => any::<usize>().prop_map(Action::Garble),
        1 => (4u32..24).prop_map(Action::Restart),
        1 => (4u32..24).prop_map(Action::Move),
        1 => (0u32..40).prop_map(Action::Limit),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    use StateKind::{CrossKv, PagedKv, Recurrent};
    let sizes = (4u32..24, 1u32..40, 1u32..8, 1u32..40, 1u32..5);
    let states = prop_oneof![
        4 => Just(vec![PagedKv]),
        1 => Just(vec![Recurrent]),
        1 => Just(vec![PagedKv, Recurrent]),
        1 => Just(vec![PagedKv, CrossKv]),
    ];
    (sizes, prop::option::of(1u32..40), any::<bool>(), states, 1u32..6).prop_map(
        |(sizes, rope_switch, prefix_cache, states, slots)| {
            let (blocks, max_step_tokens, max_step_rows, prefill_chunk, depth) = sizes;
            let has = |kind| states.contains(&kind);
            Config {
                // Without pages a plan has no blocks, and without other states no slots.
                blocks: if has(PagedKv) { blocks } else { 0 },
                block_tokens: 4,
                state_slots: if has(Recurrent) || has(CrossKv) { slots } else { 0 },
                states,
                max_step_tokens: max_step_tokens.max(max_step_rows),
                max_step_rows,
                prefill_chunk,
                depth,
                stages: depth,
                rope_switch,
                prefix_cache,
            }
        },
    )
}

/// A step between issue and commit.
struct InFlight {
    step: u64,
    sampled: Vec<(u64, Output)>,
    /// Sequences that sample in it, with their epoch.
    sampling: Vec<(u64, u32)>,
}

/// The scheduler, the stage, the steps between them, and what each answer must be.
struct World {
    scheduler: Scheduler,
    stage: FakeStage,
    pipe: VecDeque<InFlight>,
    /// Tokens of each live sequence, and how many are still to come.
    live: BTreeMap<u64, (Vec<u32>, u32)>,
    /// Those of them that an encoder computes, whole.
    encodes: HashSet<u64>,
    next_id: u64,
    clock: u32,
    /// Most tokens that are guessed at once, of which some are right.
    guesses: u32,
}

impl World {
    fn new(config: Config) -> Self {
        let stage = FakeStage::new(config.clone());
        World {
            scheduler: Scheduler::new(config),
            stage,
            pipe: VecDeque::new(),
            live: BTreeMap::new(),
            encodes: HashSet::new(),
            next_id: 0,
            clock: 0,
            guesses: 0,
        }
    }

    /// Positions of a sequence that have a place.
    fn capacity(&self) -> u32 {
        let Config { blocks, block_tokens, .. } = self.stage.config;
        if self.stage.has(StateKind::PagedKv) { blocks * block_tokens } else { u32::MAX }
    }

    /// The same pipeline with so many blocks, if it has any.
    fn resized(&self, blocks: u32) -> Config {
        let blocks = if self.stage.has(StateKind::PagedKv) { blocks } else { 0 };
        Config { blocks, ..self.stage.config.clone() }
    }

    fn submit(&mut self, prompt: u32, max_tokens: u32, deadline: Option<u32>) {
        // Few tenants and few ways to begin, so that many prefixes are the same.
        let (tenant, first) = (self.clock % 2, self.clock / 2 % 3);
        let prompt: Vec<u32> = (0..prompt).map(|i| (i * 7 + first) % 50).collect();
        let request = Request {
            prompt: prompt.clone(),
            tenant: tenant.to_string().into(),
            connection: u64::from(self.clock / 4 % 2),
            deadline: deadline.map(|d| Duration::from_secs(u64::from(self.clock + d))),
            // One token in fifty ends an answer.
            work: Work::Generate { max_tokens, ends: vec![13], sampling: v1::RowSampling::default() },
        };
        let capacity = self.capacity();
        self.next_id += 1;
        let id = self.next_id;
        self.stage.tenants.insert(id, tenant);
        match submit(&mut self.scheduler, id, request) {
            Ok(()) => {
                assert!(prompt.len() as u32 + max_tokens <= capacity);
                assert!(self.live.insert(id, (prompt, max_tokens)).is_none(), "an id was reused");
            }
            Err(error) => {
                assert!(matches!(error, SubmitError::TooLarge { .. }), "{error}");
                assert!(prompt.len() as u32 + max_tokens > capacity);
            }
        }
    }

    fn encode(&mut self, tokens: u32, masks: u32) {
        let mut prompt = vec![1; tokens as usize];
        prompt[tokens as usize - 1] = LAST;
        let positions: Vec<u32> = (0..masks.min(tokens)).collect();
        let work = Encode { positions, candidates: 5, ..Encode::default() };
        let outputs = work.outputs();
        let (tenant, work) = ("".into(), Work::Encode(work));
        let request = Request { prompt: prompt.clone(), tenant, connection: 0, deadline: None, work };
        let config = &self.stage.config;
        let fits = tokens <= config.max_step_tokens && outputs <= config.max_step_rows;
        self.next_id += 1;
        let id = self.next_id;
        match submit(&mut self.scheduler, id, request) {
            Ok(()) => {
                assert!(fits && self.live.insert(id, (prompt, 0)).is_none());
                self.encodes.insert(id);
            }
            Err(error) => assert!(!fits && matches!(error, SubmitError::TooLargeForAStep { .. })),
        }
    }

    /// Guesses how each answer goes on, more often right than wrong.
    fn guess(&mut self) {
        for (id, (tokens, _)) in self.live.iter().filter(|_| self.guesses > 0) {
            let mut hasher = DefaultHasher::new();
            (id, tokens.len(), self.clock).hash(&mut hasher);
            let mut luck = hasher.finish();
            let mut guessed = tokens.clone();
            for _ in 0..luck % u64::from(self.guesses + 1) {
                luck /= 4;
                guessed.push(next_token(&guessed) + u32::from(luck.is_multiple_of(4)));
            }
            self.scheduler.propose(*id, guessed.split_off(tokens.len()));
        }
    }

    fn step(&mut self) -> bool {
        self.guess();
        let Some(meta) = self.scheduler.next_step() else { return false };
        let samples = meta.rows.iter().filter(|r| r.output() != v1::RowOutput::None);
        let sampling: Vec<_> =
            samples.map(|r| (r.sequence, self.scheduler.live[&r.sequence].epoch)).collect();
        for other in &self.pipe {
            let twice = sampling.iter().any(|s| other.sampling.contains(s));
            assert!(!twice, "a sequence samples in two steps at once");
        }
        let sampled = self.stage.run(&meta);
        self.pipe.push_back(InFlight { step: meta.step, sampled, sampling });
        assert!(self.pipe.len() <= self.stage.config.depth as usize);
        true
    }

    fn commit(&mut self) {
        let Some(InFlight { step, sampled, .. }) = self.pipe.pop_front() else { return };
        let committed = self.scheduler.commit(step, &sampled).unwrap();
        assert!(committed.iter().all(|c| sampled[c.index] == (c.sequence, c.output)));
        self.receive(committed);
    }

    fn receive(&mut self, committed: Vec<Committed>) {
        for token in committed {
            let (tokens, left) =
                self.live.get_mut(&token.sequence).expect("a token for a sequence that ended");
            let Output::Token(id) = token.output else {
                assert_eq!(token.finished, Some(Finish::Encoded));
                assert!(self.encodes.contains(&token.sequence));
                self.live.remove(&token.sequence);
                continue;
            };
            assert_eq!(id, next_token(tokens), "an answer depends on how it was scheduled");
            tokens.push(id);
            *left -= 1;
            let want = match (id, *left) {
                (13, _) => Some(Finish::End),
                (_, 0) => Some(Finish::Length),
                _ => None,
            };
            assert_eq!(token.finished, want);
            if want.is_some() {
                self.live.remove(&token.sequence);
            }
        }
    }

    fn fail(&mut self) {
        let Some(InFlight { step, .. }) = self.pipe.pop_front() else { return };
        for id in self.scheduler.fail(step).unwrap() {
            assert!(self.live.remove(&id).is_some());
        }
    }

    fn garble(&mut self, n: usize) {
        let Some(InFlight { step, mut sampled, .. }) = self.pipe.pop_front() else { return };
        if !sampled.is_empty() {
            let (forgotten, _) = sampled[n % sampled.len()];
            sampled.retain(|(id, _)| *id != forgotten);
        }
        match self.scheduler.commit(step, &sampled) {
            // The token was of a sequence that had ended or begun anew.
            Ok(committed) => self.receive(committed),
            Err(_) => self.restart(self.stage.config.blocks),
        }
    }

    fn restart(&mut self, blocks: u32) {
        self.pipe.clear();
        let config = self.resized(blocks);
        let tenants = std::mem::take(&mut self.stage.tenants);
        self.stage = FakeStage { tenants, ..FakeStage::new(config.clone()) };
        let capacity = self.capacity();
        let lost = self.scheduler.restart(config);
        let too_large = |(id, (tokens, left)): &(&u64, &(Vec<u32>, u32))| {
            !self.encodes.contains(id) && tokens.len() as u32 + left > capacity
        };
        let expected: Vec<_> = self.live.iter().filter(too_large).map(|(id, _)| *id).collect();
        assert_eq!(lost, expected, "exactly those are lost that cannot fit any more");
        self.live.retain(|id, _| !lost.contains(id));
    }

    fn move_to_another(&mut self, blocks: u32) {
        let moved = self.scheduler.surrender();
        assert_eq!(self.scheduler.stats().blocks_used, 0);
        assert!(moved.iter().map(|m| m.id).eq(self.live.keys().copied()), "all of them, in order");
        let config = self.resized(blocks);
        self.pipe.clear();
        let tenants = std::mem::take(&mut self.stage.tenants);
        self.stage = FakeStage { tenants, ..FakeStage::new(config.clone()) };
        let capacity = self.capacity();
        self.scheduler = Scheduler::new(config);
        for moved in moved {
            if self.scheduler.check(&moved).is_ok() {
                self.scheduler.adopt(moved);
            } else {
                let (tokens, more) = &self.live[&moved.id];
                assert!(tokens.len() as u32 + more > capacity && !self.encodes.contains(&moved.id));
                self.live.remove(&moved.id);
            }
        }
    }

    fn act(&mut self, action: Action) {
        self.clock += 1;
        match action {
            Action::Submit { prompt, max_tokens, deadline } => self.submit(prompt, max_tokens, deadline),
            Action::Encode { tokens, masks } => self.encode(tokens, masks),
            Action::Cancel(n) => {
                if let Some(id) = self.live.keys().copied().nth(n % self.live.len().max(1)) {
                    self.scheduler.cancel(id);
                    self.live.remove(&id);
                }
            }
            Action::Step => drop(self.step()),
            Action::Commit => self.commit(),
            Action::Fail => self.fail(),
            Action::Garble(n) => self.garble(n),
            Action::Restart(blocks) => self.restart(blocks),
            Action::Move(blocks) => self.move_to_another(blocks),
            Action::Limit(tokens) => self.scheduler.limit_mixed_steps(tokens),
        }
        for id in self.scheduler.expire(Duration::from_secs(u64::from(self.clock))) {
            assert!(self.live.remove(&id).is_some());
        }
        self.check();
    }

    fn check(&self) {
        let s = &self.scheduler;
        let mut users = vec![0; s.blocks.total() as usize];
        s.live.values().flat_map(|q| &q.blocks).for_each(|b| users[*b as usize] += 1);
        for (block, users) in users.iter().enumerate() {
            assert_eq!(s.blocks.users(block as u32), *users, "the users of a block are miscounted");
        }
        let unused = users.iter().filter(|u| **u == 0).count();
        assert_eq!(s.blocks.available() as usize, unused, "a block leaked");
        let held = s.live.values().filter_map(|q| q.slot);
        let slots: BTreeSet<u32> = held.chain(s.slots.iter().copied()).collect();
        assert_eq!(slots.len() as u32, s.config.state_slots, "a slot leaked");
        let has_slot = s.live.values().filter(|q| q.slot.is_some()).count();
        assert_eq!(has_slot + s.slots.len(), slots.len(), "a slot belongs to two");
        let waits = |id: &&u64| !s.running.contains(id);
        assert!(
            s.waiting.ids().iter().eq(s.live.keys().filter(waits)),
            "who waits is in the queue, and nobody else"
        );
        assert!(self.live.keys().eq(s.live.keys()));
    }

    /// With no more arrivals or faults, every sequence ends.
    fn drain(&mut self) {
        let work: u32 =
            self.live.values().map(|(tokens, left)| (tokens.len() as u32 + left + 1) * (left + 1)).sum();
        for _ in 0..work * 4 + 100 {
            if self.live.is_empty() && self.pipe.is_empty() {
                break;
            }
            while self.step() {}
            self.commit();
            self.check();
        }
        assert!(self.live.is_empty(), "sequences starve: {:?}", self.live.keys().collect::<Vec<_>>());
        assert_eq!(self.scheduler.stats().blocks_used, 0);
        // Stages hear of the last ones to end with the next step, whenever that is.
        self.submit(1, 1, None);
        assert!(self.step());
        self.commit();
        assert_eq!(self.stage.cached.len(), 1, "stages keep state of sequences that ended");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_rule_holds_and_every_sequence_ends(
        config in config(),
        actions in prop::collection::vec(action(), 1..250),
        guesses in prop_oneof![Just(0u32), 1u32..9],
    ) {
        let mut world = World { guesses, ..World::new(config) };
        for action in actions {
            world.act(action);
        }
        world.drain();
    }
}
