//! Tells the binary which commit it is built from: `STRATA_VERSION` is `0.1.0 (abcdef1)`, or `0.1.0` where nobody
//! knows.

use std::{ffi::OsString, path::Path, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=deploy/cli/build.rs");
    // For builds without a repository, as in a container.
    println!("cargo:rerun-if-env-changed=STRATA_COMMIT");
    let version = env!("CARGO_PKG_VERSION");
    let named = std::env::var("STRATA_COMMIT").ok().filter(|commit| !commit.is_empty());
    let version = match named.or_else(commit) {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    };
    println!("cargo:rustc-env=STRATA_VERSION={version}");
}

/// The commit of this repository; `None` without git, and for sources that lie in a repository of something else.
fn commit() -> Option<String> {
    let here = Path::new(&manifest_dir()?).canonicalize().ok()?;
    let top = Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()?;
    if top != here {
        return None;
    }
    // A commit changes the log of HEAD, or, without one, the branch. A file that is not there would mean a build each
    // time.
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD", "logs/HEAD", "packed-refs"].into_iter().chain(branch.as_deref()) {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=7", "HEAD"])
}

/// Where the sources are now, which need not be where this script was compiled.
fn manifest_dir() -> Option<OsString> {
    std::env::var_os("CARGO_MANIFEST_DIR")
}

/// What git says, if it is there and succeeds.
fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).current_dir(manifest_dir()?).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}
