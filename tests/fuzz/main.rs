//! Throws damaged input at whatever reads input. `tests/fuzz/run` builds and starts it; `main` is libFuzzer's.
//!
//! `FUZZ_TARGET` names what is to be fuzzed, and `FUZZ_SEEDS` a directory that gets the inputs to begin with: they are
//! made from `tests/models`, so that none has to be kept.

#![no_main]

mod seeds;
mod targets;

use std::{
    env, fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
    process,
    sync::{Mutex, OnceLock, PoisonError},
};

use libfuzzer_sys::fuzz_target;

use crate::targets::Target;

/// What gets the inputs.
static CHOSEN: OnceLock<Target> = OnceLock::new();
/// What the last panic said. One that Strata catches is no crash, and is not shown.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn choose() -> Target {
    let name = env::var("FUZZ_TARGET").unwrap_or_default();
    let target = targets::open(&name);
    if let Some(directory) = env::var_os("FUZZ_SEEDS") {
        for (i, seed) in seeds::of(&name).iter().enumerate() {
            fs::write(Path::new(&directory).join(format!("seed-{i}")), seed)
                .expect("FUZZ_SEEDS is a directory");
        }
    }
    panic::set_hook(Box::new(|info| {
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string()
    }));
    target
}

fn run(data: &[u8]) {
    let target = CHOSEN.get_or_init(choose);
    if panic::catch_unwind(AssertUnwindSafe(|| target(data))).is_err() {
        eprintln!("{}", PANIC.lock().unwrap_or_else(PoisonError::into_inner));
        process::abort();
    }
}

fuzz_target!(init: CHOSEN.get_or_init(choose), |data: &[u8]| run(data));
