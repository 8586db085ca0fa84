//! The examples of `deploy/examples`, as whoever starts them sees them.

use std::{path::Path, process::Command};

use crate::cluster::{encoder_expectations, model};

/// What an example prints. Cargo builds them with the tests, unless it is asked for one target alone.
fn printed(example: &str, directory: &Path, arguments: &[&str]) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_strata")).with_file_name("examples").join(example);
    assert!(program.exists(), "{} is missing: cargo build --examples --features cuda", program.display());
    let output = Command::new(program).arg(directory).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_program_generates_text_without_a_port() {
    let text = printed("generate", &model("shakespeare"), &["ROMEO:\n"]);
    assert!(text.starts_with("O, then, I'll be so.\n\nROMEO:\n"), "{text:?}");
}

#[test]
fn a_program_embeds_texts_without_a_port() {
    let directory = model("bert-embed-f32");
    let expected = encoder_expectations(&directory).unwrap();
    let mut single = expected.iter().filter(|e| e.pair.is_none());
    let (a, b) = (single.next().unwrap(), single.next().unwrap());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let (x, y) = (&a.values[0], &b.values[0]);
    let cosine = dot(x, y) / (dot(x, x) * dot(y, y)).sqrt();
    assert_eq!(printed("embed", &directory, &[&a.text, &b.text]), format!("cosine {cosine:.4}\n"));
}
