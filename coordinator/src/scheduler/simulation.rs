//! The scheduler against a stage that believes nothing: random arrivals, cancellations, failures, timings.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use proptest::prelude::*;

use super::*;

/// What a stage knows of a sequence.
#[derive(Default)]
struct Cached {
    blocks: Vec<u32>,
    tokens: Vec<u32>,
    /// How many of them are drafts of the last row, which the next one may take back.
    drafts: u32,
    rope_set: u32,
    slot: Option<u32>,
    /// What else its states depend on: the tenant, and with an encoder its input, which no two sequences have in common.
    source: (u32, u64),
    /// Of all that, the frequencies, and all tokens up to each position.
    hashes: Vec<u64>,
}

impl Cached {
    /// What a state becomes by one more token.
    fn next(&self, state: Option<&u64>, token: u32) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.source, self.rope_set, state, token).hash(&mut hasher);
        hasher.finish()
    }

    fn push(&mut self, token: u32) {
        self.hashes.push(self.next(self.hashes.last(), token));
        self.tokens.push(token);
    }
}

fn submit(scheduler: &mut Scheduler, id: SequenceId, request: Request) -> Result<(), SubmitError> {
    let unplaced = Unplaced::new(id, request);
    scheduler.check(&unplaced)?;
    scheduler.adopt(unplaced);
    Ok(())
}

/// A stage that checks every rule of the protocol, and "samples" by hashing everything it has cached.
struct FakeStage {
    config: Config,
    due: u64,
    cached: HashMap<u64, Cached>,
    /// What was last written to a position of a block: it depends on all that came before.
    memory: HashMap<(u32, u32), u64>,
    /// A running hash per slot, which only knows the tokens it was given.
    recurrent: HashMap<u32, u64>,
    tenants: HashMap<SequenceId, u32>,
}

/// Ends the input of an encoder, and is in no other place.
const LAST: u32 = 99;

fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17u32, |h, t| h.wrapping_mul(31).wrapping_add(*t)) % 50
}

impl FakeStage {
    fn new(config: Config) -> Self {
        let (cached, memory, recurrent) = (HashMap::new(), HashMap::new(), HashMap::new());
        FakeStage { config, due: 0, cached, memory, recurrent, tenants: HashMap::new() }
    }

    fn has(&self, kind: StateKind) -> bool {
        self.config.states.contains(&kind)
    }

    fn run(&mut self, meta: &v1::StepMeta) -> Vec<(u64, Output)> {
        assert_eq!(meta.step, self.due, "steps are numbered without gaps");
        self.due += 1;
        let total: u32 = meta.rows.iter().map(|r| r.count).sum();
        assert_eq!(total as usize, meta.token_ids.len());
        assert!(total > 0 && total <= self.config.max_step_tokens);
        assert!(meta.rows.len() as u32 <= self.config.max_step_rows);
        let outputs: usize = meta.rows.iter().map(|r| r.masked.len().max(1) + r.drafts as usize).sum();
        assert!(outputs as u32 <= self.config.max_step_rows, "more outputs than a stage is prepared for");
        let distinct: HashSet<_> = meta.rows.iter().map(|r| r.sequence).collect();
        assert_eq!(distinct.len(), meta.rows.len(), "a sequence is twice in one step");
        for id in &meta.released {
            self.cached.remove(id);
        }
        let mut sampled = Vec::new();
        let mut at = 0;
        for row in &meta.rows {
            let ids = &meta.token_ids[at..at + row.count as usize];
            at += row.count as usize;
            if matches!(row.output(), v1::RowOutput::Vector | v1::RowOutput::Masks) {
                assert!(
                    row.reset && row.start == 0 && row.new_blocks.is_empty() && row.state_slot.is_none(),
                    "an encoder's row is whole"
                );
                assert_eq!(ids.last(), Some(&LAST), "and has its end in this step");
                sampled.push((row.sequence, Output::Whole));
                continue;
            }
            assert_eq!(row.reset, row.sampling.is_some(), "sampling travels with reset");
            let [paged, recurrent, cross] = StateKind::ALL.map(|kind| self.has(kind));
            if row.reset {
                let source = (self.tenants[&row.sequence], if cross { row.sequence } else { 0 });
                let (rope_set, slot) = (row.rope_set, row.state_slot);
                let mut begun = Cached { rope_set, slot, source, ..Cached::default() };
                let history = &row.sampling.as_ref().expect("checked above").history;
                assert_eq!(row.start % self.config.block_tokens, 0, "whole blocks are shared");
                history.iter().for_each(|id| begun.push(*id));
                assert_eq!(slot.is_some(), recurrent || cross, "a slot for states of fixed size");
                if let Some(slot) = slot {
                    assert!(slot < self.config.state_slots);
                    self.recurrent.remove(&slot);
                }
                self.cached.insert(row.sequence, begun);
            }
            let cached = self.cached.get_mut(&row.sequence).expect("unknown and not reset");
            if !row.reset {
                assert_eq!(row.state_slot, None, "a slot travels with reset");
            }
            let length = cached.tokens.len() as u32;
            let contiguous = (length - cached.drafts..=length).contains(&row.start);
            assert!(contiguous, "positions are contiguous, but for drafts that are taken back");
            cached.tokens.truncate(row.start as usize);
            cached.hashes.truncate(row.start as usize);
            let kept = row.first_block_index as usize;
            assert!(kept == cached.blocks.len() || cached.drafts > 0 && kept < cached.blocks.len());
            cached.blocks.truncate(kept);
            assert!(
                row.drafts == 0 || row.drafts < row.count && !recurrent,
                "these states cannot be taken back"
            );
            assert!(row.drafts == 0 || row.output() == v1::RowOutput::Token);
            cached.drafts = row.drafts;
            assert_eq!(row.rope_set, cached.rope_set, "one cache, one set of frequencies");
            cached.blocks.extend(&row.new_blocks);
            ids.iter().for_each(|id| cached.push(*id));
            if let Some(slot) = cached.slot.filter(|_| recurrent) {
                let state = ids
                    .iter()
                    .fold(self.recurrent.remove(&slot), |state, id| Some(cached.next(state.as_ref(), *id)));
                self.recurrent.extend(state.map(|state| (slot, state)));
                assert_eq!(
                    state.as_ref(),
                    cached.hashes.last(),
                    "it has seen something else than the sequence"
                );
            }
            let covered = (cached.tokens.len() as u32).div_ceil(self.config.block_tokens);
            assert_eq!(cached.blocks.len() as u32, if paged { covered } else { 0 });
            let positions = if paged { ids.len() } else { 0 };
            for i in 0..positions {
                let position = row.start + i as u32;
                let block = cached.blocks[(position / self.config.block_tokens) as usize];
                let hash = cached.hashes[position as usize];
                self.memory.insert((block, position % self.config.block_tokens), hash);
            }
            // Everything the sequence reads must be what its own tokens make of it.
            for (position, hash) in cached.hashes.iter().enumerate().filter(|_| paged) {
                let position = position as u32;
                let block = cached.blocks[(position / self.config.block_tokens) as usize];
                let found = self.memory.get(&(block, position % self.config.block_tokens));
                assert_eq!(found, Some(hash), "a block does not hold what the sequence relies on");
            }
            if row.output() == v1::RowOutput::Token {
                for known in cached.tokens.len() - row.drafts as usize..=cached.tokens.len() {
                    let long = self.config.rope_switch.is_some_and(|switch| known as u32 > switch);
                    assert_eq!(
                        row.rope_set,
                        u32::from(long),
                        "the length of a sequence chooses its frequencies"
                    );
                    let token = next_token(&cached.tokens[..known]);
                    sampled.push((row.sequence, Output::Token(token)));
                    if cached.tokens.get(known).is_some_and(|draft| *draft != token) {
                        break;
                    }
                }
            }
        }
        sampled
    }
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
            deadline: deadline.map(|d| Duration::from_secs(u64::from(self.clock + d))),
            // One token in fifty ends an answer.
            work: Work::Generate { max_tokens, eos: vec![13], sampling: v1::RowSampling::default() },
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
        let masked: Vec<u32> = (0..masks.min(tokens)).collect();
        let work = Encode { masked, candidates: 5, ..Encode::default() };
        let outputs = work.outputs();
        let (tenant, work) = ("".into(), Work::Encode(work));
        let request = Request { prompt: prompt.clone(), tenant, deadline: None, work };
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
                (13, _) => Some(Finish::Eos),
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
        assert!(s.running.is_disjoint(&s.waiting));
        assert_eq!(s.running.len() + s.waiting.len(), s.live.len());
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

fn world(blocks: u32, depth: u32) -> World {
    World::new(Config {
        blocks,
        block_tokens: 4,
        states: vec![StateKind::PagedKv],
        state_slots: 0,
        max_step_tokens: 32,
        max_step_rows: 16,
        prefill_chunk: 8,
        depth,
        stages: depth,
        rope_switch: None,
        prefix_cache: true,
    })
}

#[test]
fn chunks_of_one_prompt_follow_each_other_and_decoders_spread() {
    let mut w = world(64, 3);
    w.submit(24, 8, None);
    let starts: Vec<_> = (0..3).map(|_| w.scheduler.next_step().unwrap().rows[0].start).collect();
    assert_eq!(starts, [0, 8, 16], "three chunks are in flight at once");
    assert!(w.scheduler.next_step().is_none());

    let mut w = world(64, 3);
    for _ in 0..9 {
        w.submit(2, 20, None);
    }
    for _ in 0..6 {
        while w.step() {}
        w.commit();
    }
    while w.step() {}
    let sizes: Vec<_> = w.pipe.iter().map(|p| p.sampled.len()).collect();
    assert_eq!(sizes, [3, 3, 3], "nine decoders fill three micro-batches evenly");
}

#[test]
fn chunks_are_small_where_stages_would_wait_for_them() {
    let chunk = |stages: u32, prompt: u32| {
        let mut w = world(1024, 1);
        let sizes = (stages, 256, 512);
        let config = &mut w.scheduler.config;
        (config.stages, config.prefill_chunk, config.max_step_tokens) = sizes;
        w.submit(prompt, 1, None);
        w.scheduler.next_step().unwrap().rows[0].count
    };
    assert_eq!([chunk(1, 1024), chunk(1, 100)], [256, 100]);
    assert_eq!([chunk(2, 1024), chunk(2, 4000), chunk(2, 100)], [128, 256, 32]);
    assert_eq!([chunk(3, 1024), chunk(5, 1024)], [64, 32]);
}

#[test]
fn the_youngest_is_preempted_and_never_the_oldest() {
    let mut w = world(6, 1);
    w.submit(8, 12, None);
    w.clock += 2;
    w.submit(8, 8, None);
    while w.scheduler.stats().preemptions == 0 {
        assert!(w.step());
        w.commit();
    }
    assert!(w.scheduler.running.contains(&1) && w.scheduler.waiting.contains(&2));
    w.drain();
}

#[test]
fn a_poison_request_is_tried_alone_and_given_up() {
    let mut w = world(64, 1);
    w.submit(4, 4, None);
    w.submit(4, 4, None);
    for _ in 0..3 {
        let step = w.scheduler.next_step().unwrap();
        assert_eq!(step.rows.len(), 2, "a failed batch is replayed as it was, twice");
        assert!(step.rows.iter().all(|r| r.reset && r.start == 0));
        assert!(w.scheduler.fail(step.step).unwrap().is_empty());
    }
    let alone = w.scheduler.next_step().unwrap();
    assert_eq!(alone.rows.len(), 1);
    let id = alone.rows[0].sequence;
    assert_eq!(w.scheduler.fail(alone.step).unwrap(), [id]);
    let other = w.scheduler.next_step().unwrap();
    assert!(other.rows.len() == 1 && other.rows[0].sequence != id);
    let committed = w.scheduler.commit(other.step, &[(other.rows[0].sequence, Output::Token(3))]).unwrap();
    assert_eq!(committed.len(), 1, "the innocent one goes on");
}

#[test]
fn nonsense_from_the_pipeline_is_an_error() {
    let mut w = world(8, 2);
    w.submit(4, 4, None);
    assert_eq!(w.scheduler.commit(0, &[]), Err(CommitError::OutOfOrder { got: 0, due: None }));
    let meta = w.scheduler.next_step().unwrap();
    assert_eq!(w.scheduler.commit(meta.step, &[]), Err(CommitError::Missing { step: 0, sequence: 1 }));
}

#[test]
fn a_token_counts_only_if_its_whole_step_does() {
    let mut w = world(64, 1);
    w.submit(4, 4, None);
    w.submit(4, 1, None);
    let meta = w.scheduler.next_step().unwrap();
    let missing = Err(CommitError::Missing { step: 0, sequence: 1 });
    assert_eq!(w.scheduler.commit(meta.step, &[(2, Output::Token(3))]), missing);
    w.restart(64);
    let counts: Vec<_> = w.scheduler.next_step().unwrap().rows.iter().map(|r| r.count).collect();
    assert_eq!(counts, [4, 4], "nobody saw a token, so none is part of an answer, and none ended one");
}

#[test]
fn prompts_go_slowly_while_somebody_decodes() {
    let mut w = world(64, 1);
    w.scheduler.limit_mixed_steps(3);
    w.submit(7, 4, None);
    let first = w.scheduler.next_step().unwrap();
    assert_eq!(first.rows[0].count, 7, "nobody waits for it");
    w.scheduler.commit(first.step, &[(1, Output::Token(9))]).unwrap();
    w.clock += 2;
    w.submit(7, 4, None);
    let mut counts = Vec::new();
    for _ in 0..3 {
        let step = w.scheduler.next_step().unwrap();
        let outputs: Vec<_> = step.rows.iter().map(|r| (r.sequence, Output::Token(9))).collect();
        counts.push(step.rows.iter().map(|r| r.count).collect::<Vec<_>>());
        w.scheduler.commit(step.step, &outputs).unwrap();
    }
    assert_eq!(counts, [[1, 3], [1, 3], [1, 1]]);
}

#[test]
fn stages_hear_of_the_end_of_a_preempted_sequence() {
    let mut w = world(6, 1);
    w.submit(8, 12, None);
    w.clock += 2;
    w.submit(8, 8, None);
    while w.scheduler.stats().preemptions == 0 {
        assert!(w.step());
        w.commit();
    }
    w.act(Action::Cancel(1));
    let released = w.scheduler.next_step().unwrap().released;
    assert_eq!(released, [2], "it had state on the stages although it was waiting");
}

#[test]
fn too_large_says_both_numbers() {
    let mut w = world(2, 1);
    let request = Request {
        prompt: vec![1; 6],
        tenant: "".into(),
        deadline: None,
        work: Work::Generate { max_tokens: 3, eos: vec![], sampling: v1::RowSampling::default() },
    };
    let error = submit(&mut w.scheduler, 1, request).unwrap_err().to_string();
    assert!(error.contains('9') && error.contains('8'), "{error}");
}

#[test]
fn inputs_of_an_encoder_share_a_step_for_as_long_as_they_fit() {
    let mut w = world(64, 1);
    for (tokens, masks) in [(20, 0), (10, 4), (3, 0), (2, 12)] {
        w.encode(tokens, masks);
    }
    let sequences = |meta: &v1::StepMeta| meta.rows.iter().map(|r| r.sequence).collect::<Vec<_>>();
    let first = w.scheduler.next_step().unwrap();
    assert_eq!(sequences(&first), [1, 2], "33 tokens are too many, and nobody overtakes");
    let all = [(1, Output::Whole), (2, Output::Whole)];
    assert_eq!(w.scheduler.commit(first.step, &all).unwrap().len(), 2);
    let second = w.scheduler.next_step().unwrap();
    assert_eq!(sequences(&second), [3, 4]);
}

#[test]
fn a_sequence_that_grows_past_the_switch_is_computed_anew() {
    let mut w = world(64, 1);
    w.scheduler.config.rope_switch = Some(5);
    w.stage.config.rope_switch = Some(5);
    w.submit(4, 8, None);
    let mut sets = Vec::new();
    for _ in 0..4 {
        let meta = w.scheduler.next_step().unwrap();
        let row = &meta.rows[0];
        sets.push((row.start, row.count, row.rope_set));
        let id = row.sequence;
        w.scheduler.commit(meta.step, &[(id, Output::Token(7))]).unwrap();
    }
    assert_eq!(sets, [(0, 4, 0), (4, 1, 0), (0, 6, 1), (6, 1, 1)]);
}

/// Begins and ends a sequence of `tenant`; gives where its first row began, and how many tokens of the prompt were known.
fn answered(w: &mut World, tenant: &str, prompt: Vec<u32>) -> (u32, u32) {
    w.next_id += 1;
    let work = Work::Generate { max_tokens: 1, eos: vec![], sampling: v1::RowSampling::default() };
    let request = Request { prompt, tenant: tenant.into(), deadline: None, work };
    submit(&mut w.scheduler, w.next_id, request).unwrap();
    let mut start = None;
    loop {
        let meta = w.scheduler.next_step().unwrap();
        start.get_or_insert(meta.rows[0].start);
        let samples = meta.rows[0].output() == v1::RowOutput::Token;
        let outputs = if samples { vec![(w.next_id, Output::Token(9))] } else { vec![] };
        if let Some(committed) = w.scheduler.commit(meta.step, &outputs).unwrap().first() {
            return (start.unwrap(), committed.cached_prompt);
        }
    }
}

#[test]
fn a_prefix_is_computed_once_per_tenant_and_incarnation() {
    let mut w = world(64, 1);
    let prompt: Vec<u32> = (0..20).collect();
    assert_eq!(answered(&mut w, "a", prompt.clone()), (0, 0));
    assert_eq!(answered(&mut w, "a", prompt.clone()), (16, 16), "the last token is always computed");
    let other: Vec<u32> = (0..11).chain([40, 41, 42]).collect();
    assert_eq!(answered(&mut w, "a", other), (8, 8), "whole blocks are shared");
    assert_eq!(answered(&mut w, "b", prompt.clone()), (0, 0), "nobody learns what others asked");
    // The end of an answer is known too, once it was an input.
    let stats = w.scheduler.stats();
    assert_eq!((stats.prefix_queries, stats.prefix_hits, stats.blocks_used), (74, 24, 0));
    w.scheduler.restart(w.stage.config.clone());
    assert_eq!(answered(&mut w, "a", prompt.clone()), (0, 0), "the cache dies with its incarnation");
    w.scheduler.restart(Config { prefix_cache: false, ..w.stage.config.clone() });
    assert_eq!(answered(&mut w, "a", prompt.clone()), (0, 0));
    assert_eq!(answered(&mut w, "a", prompt), (0, 0), "it can be switched off");
}

#[test]
fn nothing_is_shared_before_it_is_committed_or_between_sets_of_frequencies() {
    let mut w = world(64, 3);
    w.scheduler.config.rope_switch = Some(21);
    let prompt: Vec<u32> = (0..20).collect();
    let request = |prompt: &[u32]| Request {
        prompt: prompt.to_vec(),
        tenant: "".into(),
        deadline: None,
        work: Work::Generate { max_tokens: 1, eos: vec![], sampling: v1::RowSampling::default() },
    };
    submit(&mut w.scheduler, 1, request(&prompt)).unwrap();
    let first = w.scheduler.next_step().unwrap();
    submit(&mut w.scheduler, 2, request(&prompt)).unwrap();
    let second = w.scheduler.next_step().unwrap();
    let starts = |meta: &v1::StepMeta| meta.rows.iter().map(|r| (r.sequence, r.start)).collect::<Vec<_>>();
    assert_eq!((starts(&first), starts(&second)), (vec![(1, 0)], vec![(1, 8), (2, 0)]));
    w.scheduler.commit(first.step, &[]).unwrap();
    submit(&mut w.scheduler, 3, request(&prompt)).unwrap();
    let third = w.scheduler.next_step().unwrap();
    assert!(starts(&third).contains(&(3, 8)), "what the first step filled is known: {:?}", starts(&third));
    // A step that fails publishes nothing.
    w.scheduler.fail(second.step).unwrap();
    w.scheduler.cancel(1);
    w.scheduler.cancel(2);
    w.scheduler.cancel(3);
    w.scheduler.commit(third.step, &[]).unwrap();
    w.next_id = 3;
    assert_eq!(answered(&mut w, "", prompt), (8, 8));
    assert_eq!(answered(&mut w, "", (0..22).collect()), (0, 0), "long sequences turn by other frequencies");
}

#[test]
fn only_pages_alone_are_shared_and_what_is_recurrent_begins_anew() {
    let prompt: Vec<u32> = (0..20).collect();
    for kind in [StateKind::Recurrent, StateKind::CrossKv] {
        let mut w = world(64, 1);
        let config =
            Config { states: vec![StateKind::PagedKv, kind], state_slots: 2, ..w.stage.config.clone() };
        w.scheduler = Scheduler::new(config);
        for _ in 0..2 {
            assert_eq!(answered(&mut w, "a", prompt.clone()), (0, 0), "{kind:?}");
        }
    }
    // A preempted sequence is computed from its first token, and its slot is free meanwhile.
    let mut w = world(6, 1);
    let states = vec![StateKind::PagedKv, StateKind::Recurrent];
    w = World::new(Config { states, state_slots: 2, ..w.stage.config });
    w.submit(8, 12, None);
    w.clock += 2;
    w.submit(8, 8, None);
    while w.scheduler.stats().preemptions == 0 {
        assert!(w.step());
        w.commit();
    }
    assert_eq!((w.scheduler.live[&2].slot, w.scheduler.slots.len()), (None, 1));
    w.drain();
}

#[test]
fn sequences_wait_for_a_slot() {
    let mut w = world(64, 1);
    w = World::new(Config {
        blocks: 0,
        states: vec![StateKind::Recurrent],
        state_slots: 2,
        ..w.stage.config
    });
    for _ in 0..3 {
        w.submit(4, 2, None);
    }
    let rows = |meta: &v1::StepMeta| meta.rows.iter().map(|r| (r.sequence, r.state_slot)).collect::<Vec<_>>();
    let first = w.scheduler.next_step().unwrap();
    assert_eq!(rows(&first), [(1, Some(0)), (2, Some(1))]);
    let token = |id| (id, Output::Token(9));
    w.scheduler.commit(first.step, &[token(1), token(2)]).unwrap();
    let second = w.scheduler.next_step().unwrap();
    assert_eq!(rows(&second), [(1, None), (2, None)]);
    let done = w.scheduler.commit(second.step, &[token(1), token(2)]).unwrap();
    assert!(done.iter().all(|c| c.finished == Some(Finish::Length)));
    assert_eq!(rows(&w.scheduler.next_step().unwrap()).len(), 1);
}

/// Runs one sequence of four tokens and `max_tokens` more, with these drafts before each step; gives the rows of its steps
/// as first position, tokens, drafts and blocks, and its answer.
fn drafted(w: &mut World, max_tokens: u32, draft: impl Fn(&[u32]) -> Vec<u32>) -> (Vec<[u32; 4]>, Vec<u32>) {
    w.submit(4, max_tokens, None);
    let (id, mut rows) = (w.next_id, Vec::new());
    let mut tokens = w.live[&id].0.clone();
    while w.live.contains_key(&id) {
        w.scheduler.propose(id, draft(&tokens));
        let meta = w.scheduler.next_step().unwrap();
        let row = &meta.rows[0];
        let sampled = w.stage.run(&meta);
        let blocks = w.stage.cached[&id].blocks.len() as u32;
        rows.push([row.start, row.count, row.drafts, blocks]);
        let committed = w.scheduler.commit(meta.step, &sampled).unwrap();
        tokens.extend(committed.iter().map(|c| match c.output {
            Output::Token(token) => token,
            Output::Whole => unreachable!("a generation"),
        }));
        w.receive(committed);
        w.check();
    }
    (rows, tokens.split_off(4))
}

#[test]
fn right_drafts_save_steps_and_wrong_ones_are_taken_back() {
    let right = |tokens: &[u32]| {
        let mut tokens = tokens.to_vec();
        (0..3).for_each(|_| tokens.push(next_token(&tokens)));
        tokens.split_off(tokens.len() - 3)
    };
    let (rows, plain) = drafted(&mut world(64, 1), 8, |_| vec![]);
    assert_eq!((rows.len(), plain.len()), (8, 8));
    // The prompt yields a token; then three drafts and one more at a time, and never more than the answer may have.
    let (rows, tokens) = drafted(&mut world(64, 1), 8, right);
    assert_eq!(tokens, plain);
    assert_eq!(rows, [[0, 4, 0, 1], [4, 4, 3, 2], [8, 3, 2, 3]]);
    // A row of wrong ones yields its own token, and the block that only they needed is free again.
    let (rows, tokens) =
        drafted(&mut world(64, 1), 8, |tokens| right(tokens).into_iter().map(|t| t + 50).collect());
    assert_eq!(tokens, plain);
    assert_eq!(rows[1..4], [[4, 4, 3, 2], [5, 4, 3, 3], [6, 4, 3, 3]]);
    // The first two of three are right.
    let (rows, tokens) = drafted(&mut world(64, 1), 8, |tokens| {
        let mut drafts = right(tokens);
        drafts[2] += 50;
        drafts
    });
    assert_eq!(tokens, plain);
    assert_eq!(rows, [[0, 4, 0, 1], [4, 4, 3, 2], [7, 4, 3, 3], [10, 1, 0, 3]]);
    // There is no room for any beside others, or beyond the step.
    let mut w = world(64, 1);
    w.stage.config.max_step_rows = 3;
    w.scheduler.config.max_step_rows = 3;
    assert_eq!(drafted(&mut w, 8, right).0[1], [4, 3, 2, 2]);
    let mut w = world(3, 1);
    assert_eq!(drafted(&mut w, 8, right).0[1..], [[4, 4, 3, 2], [8, 3, 2, 3]]);
}

#[test]
fn an_answer_ends_inside_a_burst() {
    let mut w = world(64, 1);
    w.submit(4, 8, None);
    let first = w.scheduler.next_step().unwrap();
    w.scheduler.commit(first.step, &[(1, Output::Token(5))]).unwrap();
    w.scheduler.propose(1, vec![6, 13, 7]);
    let second = w.scheduler.next_step().unwrap();
    assert_eq!((second.rows[0].drafts, &second.token_ids[..]), (3, &[5, 6, 13, 7][..]));
    let burst = [6, 13, 7, 8].map(|token| (1, Output::Token(token)));
    let committed = w.scheduler.commit(second.step, &burst).unwrap();
    let ends: Vec<_> = committed.iter().map(|c| (c.index, c.finished)).collect();
    assert_eq!(ends, [(0, None), (1, Some(Finish::Eos))], "13 ends an answer");
    assert_eq!(w.scheduler.stats().blocks_used, 0);
}

#[test]
fn outputs_that_nobody_drafted_are_an_error() {
    let burst = |drafts: &[u32], tokens: &[u32]| {
        let mut w = world(64, 1);
        w.submit(4, 8, None);
        let first = w.scheduler.next_step().unwrap();
        w.scheduler.commit(first.step, &[(1, Output::Token(5))]).unwrap();
        w.scheduler.propose(1, drafts.to_vec());
        let second = w.scheduler.next_step().unwrap();
        let outputs: Vec<_> = tokens.iter().map(|token| (1, Output::Token(*token))).collect();
        w.scheduler.commit(second.step, &outputs).map(|committed| committed.len())
    };
    let refused = |outputs, drafts| Err(CommitError::NotDrafted { step: 1, sequence: 1, outputs, drafts });
    assert_eq!(burst(&[6, 7], &[6, 7, 8]), Ok(3));
    assert_eq!(burst(&[6, 7], &[6, 9]), Ok(2));
    assert_eq!(burst(&[6, 7], &[9, 7]), refused(2, 2));
    assert_eq!(burst(&[6, 7], &[6, 7, 8, 9]), refused(4, 2));
    assert_eq!(burst(&[], &[6, 7]), refused(2, 0));
}

#[test]
fn recurrent_states_are_never_given_drafts() {
    let mut w = world(64, 1);
    let states = vec![StateKind::PagedKv, StateKind::Recurrent];
    w = World::new(Config { states, state_slots: 1, ..w.stage.config });
    let (rows, tokens) = drafted(&mut w, 8, |_| vec![1, 2, 3]);
    assert!(rows.iter().all(|row| row[2] == 0) && tokens.len() == 8);
}
