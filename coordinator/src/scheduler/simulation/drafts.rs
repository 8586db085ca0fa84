//! Drafts that are right, and wrong, and those that nobody made.

use super::{cases::world, *};

/// Runs one sequence of four tokens and `max_tokens` more, with these drafts before each step; gives the rows of its
/// steps as first position, tokens, drafts and blocks, and its answer.
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
    assert_eq!(ends, [(0, None), (1, Some(Finish::End))], "13 ends an answer");
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
