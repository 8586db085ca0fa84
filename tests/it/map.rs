//! The map in ARCHITECTURE.md: a line for every file, which is the first sentence of the file itself.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const BEGIN: &str = "<!-- The files, as `STRATA_WRITE_MAP=1 cargo test --workspace --features cuda -- map::` writes them. -->\n";
const END: &str = "<!-- The end of the files. -->\n";
/// Folders of the map, each a table; a file is in the first that it is under.
const TABLES: [&str; 12] = [
    "proto/",
    "coordinator/src/",
    "coordinator/",
    "worker/src/kernels/",
    "worker/src/",
    "worker/",
    "deploy/",
    "tests/it/",
    "tests/emulator/",
    "tests/gpu/",
    "tests/",
    ".ci/",
];

/// Bytes of a sentence, beyond which a colon ends it, too.
const LONGEST: usize = 100;

#[test]
fn every_file_has_its_line_in_the_map() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("ARCHITECTURE.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("ARCHITECTURE.md has a map");
    let (written, after) = rest.split_once(END).expect("the map has an end");
    let wanted = map(root);
    if std::env::var_os("STRATA_WRITE_MAP").is_some() {
        return fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
    }
    let missing: Vec<_> =
        wanted.lines().filter(|line| !written.lines().any(|other| other == *line)).collect();
    let stale: Vec<_> = written.lines().filter(|line| !wanted.lines().any(|other| other == *line)).collect();
    assert!(
        written == wanted,
        "the map in ARCHITECTURE.md is not what the files say; write it anew with STRATA_WRITE_MAP=1\n\
         missing: {missing:#?}\nstale: {stale:#?}"
    );
}

/// All tables.
fn map(root: &Path) -> String {
    let mut tables = BTreeMap::<usize, Vec<String>>::new();
    let mut files = Vec::new();
    for folder in ["proto", "coordinator", "worker", "deploy", "tests", ".ci"] {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    for file in files {
        let name = file.strip_prefix(root).unwrap().to_str().unwrap();
        let Some(says) = first_sentence(&file) else { continue };
        let table = TABLES.iter().position(|folder| name.starts_with(folder)).unwrap();
        tables.entry(table).or_default().push(format!("| `{}` | {says} |\n", &name[TABLES[table].len()..]));
    }
    let table = |(table, lines): (usize, Vec<String>)| {
        format!("\n| `{}` | |\n|---|---|\n{}", TABLES[table], lines.concat())
    };
    tables.into_iter().map(table).chain(["\n".to_owned()]).collect()
}

/// Files below a folder, results and models aside.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        match path.is_dir() {
            true if name == "results" || name == "__pycache__" => {}
            true => collect(&path, files),
            false => files.push(path),
        }
    }
}

/// What a program says of itself in its first comment; nothing of files that are no programs.
///
/// # Panics
/// If it is a program and says nothing.
fn first_sentence(file: &Path) -> Option<String> {
    let marks: &[&str] = match file.extension().and_then(|e| e.to_str()) {
        Some("rs") => &["//! "],
        Some("cu" | "cpp" | "h" | "proto") => &["// "],
        Some("py") => &["\"\"\"", ""],
        Some(_) => return None,
        None => &["# "],
    };
    // A file without an extension that is no text is no program.
    let text = fs::read_to_string(file).ok()?;
    let mut paragraph = String::new();
    for line in text.lines().skip_while(|line| line.starts_with("#!/") || line.starts_with("# syntax=")) {
        let said = marks.iter().find_map(|mark| line.strip_prefix(mark)).unwrap_or("");
        if said.trim().is_empty() {
            break;
        }
        paragraph += said.trim_end();
        paragraph.push(' ');
        if said.ends_with("\"\"\"") {
            break;
        }
    }
    let paragraph = paragraph.trim().trim_end_matches("\"\"\"");
    assert!(!paragraph.is_empty(), "{} does not say in its first line what it is", file.display());
    let mut sentence = paragraph.split_once(". ").map_or(paragraph, |(first, _)| first);
    if sentence.len() > LONGEST {
        sentence = sentence.split_once(": ").map_or(sentence, |(first, _)| first);
    }
    Some(sentence.trim_end_matches(['.', ':']).replace('|', "\\|"))
}
