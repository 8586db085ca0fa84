//! The scheduler in situations that are known beforehand.

use super::*;

pub(super) fn world(blocks: u32, depth: u32) -> World {
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
    assert!(w.scheduler.running.contains(&1) && w.scheduler.waiting.ids().contains(&2));
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
        connection: 0,
        deadline: None,
        work: Work::Generate { max_tokens: 3, ends: vec![], sampling: v1::RowSampling::default() },
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

/// Begins and ends a sequence of `tenant`; gives where its first row began, and how many tokens of the prompt were
/// known.
fn answered(w: &mut World, tenant: &str, prompt: Vec<u32>) -> (u32, u32) {
    w.next_id += 1;
    let work = Work::Generate { max_tokens: 1, ends: vec![], sampling: v1::RowSampling::default() };
    let request = Request { prompt, tenant: tenant.into(), connection: 0, deadline: None, work };
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
        connection: 0,
        deadline: None,
        work: Work::Generate { max_tokens: 1, ends: vec![], sampling: v1::RowSampling::default() },
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

/// Steps until the last of these tenants' requests, which come at once, has its first token, if four of the others run
/// already.
fn steps_until_answered(tenants: &[&str]) -> usize {
    let mut w = world(16, 1);
    let (mut running, last) = (Vec::new(), tenants.len() as u64 + 3);
    for id in 0..=last {
        let at = (id as usize).saturating_sub(4);
        let work = Work::Generate { max_tokens: 8, ends: vec![], sampling: v1::RowSampling::default() };
        let (prompt, tenant) = (vec![7; 8], tenants[at].into());
        submit(&mut w.scheduler, id, Request { prompt, tenant, connection: 0, deadline: None, work })
            .unwrap();
        if id == 3 {
            running.push(w.scheduler.next_step().unwrap());
        }
    }
    for steps in 1.. {
        let meta = running.pop().unwrap_or_else(|| w.scheduler.next_step().unwrap());
        let samples = meta.rows.iter().filter(|row| row.output() == v1::RowOutput::Token);
        let outputs: Vec<_> = samples.map(|row| (row.sequence, Output::Token(9))).collect();
        if w.scheduler.commit(meta.step, &outputs).unwrap().iter().any(|c| c.sequence == last) {
            return steps;
        }
    }
    unreachable!("everybody is answered")
}

#[test]
fn after_a_burst_another_tenant_waits_no_longer_than_behind_one_of_its_own() {
    let alone = steps_until_answered(&["a", "b"]);
    let burst: Vec<_> = std::iter::repeat_n("a", 2000).chain(["b"]).collect();
    assert_eq!(steps_until_answered(&burst), alone);
    let own: Vec<_> = std::iter::repeat_n("a", 200).collect();
    assert!(steps_until_answered(&own) > 10 * alone, "its own wait for each other");
}

#[test]
fn in_a_full_cache_those_give_way_whose_tenant_holds_most() {
    let mut w = world(30, 1);
    // Four of one tenant, then one of another, who is the youngest: with their answers they need 60 blocks.
    for id in 0..5u32 {
        let work = Work::Generate { max_tokens: 40, ends: vec![], sampling: v1::RowSampling::default() };
        let (prompt, tenant) = (vec![id; 8], if id < 4 { "burst" } else { "other" }.into());
        submit(&mut w.scheduler, id.into(), Request { prompt, tenant, connection: 0, deadline: None, work })
            .unwrap();
    }
    let (mut began, mut ended) = ([0; 5], Vec::new());
    while let Some(meta) = w.scheduler.next_step() {
        meta.rows.iter().filter(|row| row.reset).for_each(|row| began[row.sequence as usize] += 1);
        let samples = meta.rows.iter().filter(|row| row.output() == v1::RowOutput::Token);
        let outputs: Vec<_> = samples.map(|row| (row.sequence, Output::Token(9))).collect();
        let committed = w.scheduler.commit(meta.step, &outputs).unwrap();
        ended.extend(committed.iter().filter(|c| c.finished.is_some()).map(|c| c.sequence));
    }
    assert!(w.scheduler.stats().preemptions > 0);
    assert_eq!((began[0], began[4]), (1, 1), "{began:?}: neither the oldest nor who holds little");
    assert_eq!(ended.len(), 5);
    assert!(ended.iter().position(|id| *id == 4) < Some(2), "{ended:?}");
}
