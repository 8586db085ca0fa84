//! No circles: no two files of a folder need each other, and no two folders.
//!
//! The rule is one of siblings. Below every module its children, each with all that is below it, form a graph of who names whom,
//! in a `use` or in the code, followed through `pub use` to where a thing is defined; that graph has no circle. A module's own
//! file (`mod.rs`, `x.rs` beside `x/`, `lib.rs`) is one room with its children, and stands aside: it says how they are put together
//! and has what they share, so either side may name the other. The crates are siblings, too. Tests may use what they like.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// A name of a thing as code writes it, in parts.
type Name = Vec<String>;

/// The crates, with the folder and the name of their first file.
const CRATES: [(&str, &str, &str); 4] = [
    ("strata_proto", "proto/src", "lib"),
    ("strata_coordinator", "coordinator/src", "lib"),
    ("strata_worker", "worker/src", "lib"),
    ("strata", "deploy/cli", "main"),
];

/// What would close a circle and is there for a reason: who names whom, and why.
const EXCEPTIONS: [(&str, &str, &str); 1] = [(
    "strata_coordinator::front::grpc",
    "strata_coordinator::coordinator",
    "`front` has two floors: sessions, which the coordinator gives out, and the ports on top of it, which ask it",
)];

/// Most `pub use` that a name is followed through.
const HOPS: usize = 8;

#[test]
fn no_two_files_or_folders_need_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut house = House::default();
    for (name, folder, first) in CRATES {
        house.read(name, &root.join(folder).join(format!("{first}.rs")), &root.join(folder));
    }
    let below = |module: &str, room: &str| {
        module.strip_prefix(room).is_some_and(|m| m.is_empty() || m.starts_with("::"))
    };
    let excepted =
        |edge: &Edge, (from, to, _): &(&str, &str, &str)| below(&edge.from, from) && below(&edge.to, to);
    let mut edges = house.edges();
    let all = circles(&edges);
    for exception in &EXCEPTIONS {
        let needed = all.iter().any(|edge| excepted(edge, exception));
        assert!(needed, "{exception:?} closes no circle any more: take it off the list");
    }
    edges.retain(|edge| !EXCEPTIONS.iter().any(|exception| excepted(edge, exception)));
    let left: Vec<_> = circles(&edges).iter().map(|edge| edge.to_string()).collect();
    assert!(left.is_empty(), "circles; move what both need to where it belongs:\n{}", left.join("\n"));
}

#[test]
fn planted_circles_are_found() {
    let found = |files: &[(&str, &str)]| {
        let mut house = House::default();
        files.iter().for_each(|(name, text)| drop(house.add(name, text)));
        circles(&house.edges()).iter().map(|edge| format!("{} -> {}", edge.from, edge.to)).collect::<Vec<_>>()
    };
    let root = ("a", "mod x; mod y; mod z; pub use y::deep::Y;");
    // In a line, a parent and its child aside, and in tests, comments and strings.
    let line = [
        root,
        ("a::x", "use super::y::{self, deep::{Deep as D, Y}}; use std::fmt; fn f() { y::g() }"),
        ("a::y", "mod deep; pub struct Shared; fn g() { deep::h(); crate::z::i(\"crate::x\") }"),
        (
            "a::y::deep",
            "use super::Shared; // crate::x\npub struct Y; #[cfg(test)] mod tests { use crate::x::f; }",
        ),
        ("a::z", "#[cfg(test)] use crate::x; const C: char = '\"'; const S: &str = r#\"crate::\"x\"#;"),
    ];
    assert_eq!(found(&line), [""; 0]);
    // Between files, by a path in the code.
    let files =
        [root, ("a::x", "use crate::z::i;"), ("a::y", ""), ("a::z", "fn i<'a>() { super::x::f::<'a>() }")];
    assert_eq!(found(&files), ["a::x -> a::z", "a::z -> a::x"]);
    // Of three, between folders, and through what the parent passes on.
    let folders = [
        root,
        ("a::x", "use crate::Y;"),
        ("a::y", "mod deep;"),
        ("a::y::deep", "use crate::z; pub struct Y;"),
        ("a::z", "use crate::{y::nothing, x};"),
    ];
    assert_eq!(found(&folders), ["a::x -> a::y::deep", "a::y::deep -> a::z", "a::z -> a::y", "a::z -> a::x"]);
    // Through a star, and not where it brings something else.
    let star = [
        ("a", "mod x; mod y; pub use x::*; pub use y::*;"),
        ("a::x", "use super::Of; pub struct It;"),
        ("a::y", "pub enum Of { That(super::It) }"),
    ];
    assert_eq!(found(&star), ["a::x -> a::y", "a::y -> a::x"]);
    assert_eq!(found(&[star[0], star[1], ("a::y", "pub enum Of { Nothing(super::That) }")]), [""; 0]);
    // Between crates.
    assert_eq!(found(&[("a", "use b::B;"), ("b", "use a::A;")]), ["a -> b", "b -> a"]);
}

/// A module that names another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Edge {
    from: String,
    to: String,
    /// As the code has it.
    by: String,
}

impl std::fmt::Display for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} names {}: {}", self.from, self.to, self.by)
    }
}

/// Edges that are part of a circle of siblings, or lie between two.
fn circles(edges: &[Edge]) -> Vec<&Edge> {
    let mut siblings = BTreeMap::<&str, Vec<(&str, &str, &Edge)>>::new();
    for edge in edges {
        if let Some((parent, from, to)) = apart(&edge.from, &edge.to) {
            siblings.entry(parent).or_default().push((from, to, edge));
        }
    }
    let mut left = Vec::new();
    for mut between in siblings.into_values() {
        // Who is named by nobody, or names nobody, is in no circle.
        loop {
            let (from, to): (BTreeSet<_>, BTreeSet<_>) =
                between.iter().map(|(from, to, _)| (*from, *to)).unzip();
            let before = between.len();
            between.retain(|(a, b, _)| to.contains(a) && from.contains(b));
            if between.len() == before {
                break;
            }
        }
        left.extend(between.into_iter().map(|(_, _, edge)| edge));
    }
    left
}

/// The module below which two modules part ("" of crates), and the siblings there that they are, or are below; nothing of a
/// module and one that is below it.
fn apart<'a>(from: &'a str, to: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
    let part = |module: &'a str| module.match_indices("::").map(|(at, _)| at).chain([module.len()]);
    let (a, b) = part(from).zip(part(to)).find(|(a, b)| from[..*a] != to[..*b])?;
    Some((from[..a].rsplit_once("::").map_or("", |(parent, _)| parent), &from[..a], &to[..b]))
}

/// The modules of some crates, by their names from the crate on.
#[derive(Default)]
struct House(BTreeMap<String, Module>);

/// What a module's text names, and has.
#[derive(Default)]
struct Module {
    named: Vec<Name>,
    /// What its `use` lines bring in, by the name that it has here.
    used: BTreeMap<String, Name>,
    /// What its `use` lines with a star bring in from.
    opened: Vec<Name>,
    /// Functions, types and the like that it has itself.
    items: BTreeSet<String>,
}

impl House {
    /// Reads a module's file, and those of its children, which are in `folder`.
    fn read(&mut self, module: &str, file: &Path, folder: &Path) {
        let text = fs::read_to_string(file).unwrap_or_else(|why| panic!("{}: {why}", file.display()));
        for child in self.add(module, &text) {
            let (flat, nested) = (folder.join(format!("{child}.rs")), folder.join(&child));
            let file = if flat.exists() { flat } else { nested.join("mod.rs") };
            self.read(&format!("{module}::{child}"), &file, &nested);
        }
    }

    /// Adds a module by its text; its children, tests aside.
    fn add(&mut self, module: &str, text: &str) -> Vec<String> {
        let tokens = without_tests(tokens(text));
        let mut children = Vec::new();
        let mut read = Module::default();
        let is_word = |at: usize| {
            tokens.get(at).is_some_and(|t| t.starts_with(|c: char| c.is_alphabetic() || c == '_'))
        };
        let mut at = 0;
        while at < tokens.len() {
            let token = tokens[at].as_str();
            if token == "mod" && tokens.get(at + 2).is_some_and(|t| t == ";") {
                children.push(tokens[at + 1].clone());
            }
            if matches!(
                token,
                "struct" | "enum" | "union" | "trait" | "type" | "fn" | "const" | "static" | "!"
            ) && is_word(at + 1)
            {
                read.items.insert(tokens[at + 1].clone());
            }
            let begins = is_word(at) && tokens.get(at + 1).is_some_and(|t| t == "::");
            if token == "use" && tokens.get(at + 1).is_some_and(|t| t != "<") {
                at += 1;
                let mut brought = Vec::new();
                names(&tokens, &mut at, &[], &mut brought);
                read.named.extend(brought.iter().map(|(name, _)| name.clone()));
                for (mut name, here) in brought {
                    if here == "*" {
                        name.pop();
                        read.opened.push(name);
                    } else {
                        read.used.insert(here, name);
                    }
                }
            } else if begins {
                let mut named = Vec::new();
                names(&tokens, &mut at, &[], &mut named);
                read.named.extend(named.into_iter().map(|(name, _)| name));
            } else {
                at += 1;
            }
        }
        self.0.insert(module.to_owned(), read);
        children
    }

    /// Who names whom.
    fn edges(&self) -> Vec<Edge> {
        let of = |(from, module): (&String, &Module)| {
            let edge = |name: &Name| {
                let to = self.home(from, name, HOPS)?;
                (to != *from).then(|| Edge { from: from.clone(), to, by: name.join("::") })
            };
            module.named.iter().filter_map(edge).collect::<Vec<_>>()
        };
        let mut edges: Vec<_> = self.0.iter().flat_map(of).collect();
        edges.dedup();
        edges
    }

    /// The module that has what a name means in module `from`; nothing if that is of none of these crates.
    fn home(&self, from: &str, name: &[String], hops: usize) -> Option<String> {
        let (first, mut rest) = name.split_first()?;
        let parent = |module: &str| module.rsplit_once("::").map(|(parent, _)| parent.to_owned());
        let used = |module: &str, name: &str| self.0[module].used.get(name).filter(|_| hops > 0);
        let mut at = match first.as_str() {
            "crate" => from.split("::").next()?.to_owned(),
            "self" => from.to_owned(),
            "super" => parent(from)?,
            word if self.0.contains_key(&format!("{from}::{word}")) => format!("{from}::{word}"),
            word => match used(from, word) {
                Some(name) if name.first() != Some(first) => {
                    return self.home(from, &[name, rest].concat(), hops - 1);
                }
                _ => self.0.contains_key(word).then(|| word.to_owned())?,
            },
        };
        while let Some((next, further)) = rest.split_first() {
            let child = format!("{at}::{next}");
            if next == "super" {
                at = parent(&at)?;
            } else if self.0.contains_key(&child) {
                at = child;
            } else {
                let passed_on =
                    used(&at, next).and_then(|name| self.home(&at, &[name, further].concat(), hops - 1));
                return Some(passed_on.or_else(|| self.opened(&at, next, hops)).unwrap_or(at));
            }
            rest = further;
        }
        Some(at)
    }

    /// The module from which a star brings an item into a module that has none of that name itself.
    fn opened(&self, module: &str, item: &str, hops: usize) -> Option<String> {
        let Module { items, opened, .. } = &self.0[module];
        let open = opened.iter().filter(|_| hops > 0 && !items.contains(item));
        open.filter_map(|name| self.home(module, name, hops - 1))
            .find(|home| self.0[home].items.contains(item))
    }
}

/// Reads a name, or a tree of them in braces, from `at` on: each with what it is called here.
fn names(tokens: &[String], at: &mut usize, before: &[String], into: &mut Vec<(Name, String)>) {
    if tokens[*at] == "{" {
        *at += 1;
        while tokens[*at] != "}" {
            match tokens[*at].as_str() {
                "," => *at += 1,
                _ => names(tokens, at, before, into),
            }
        }
        *at += 1;
        return;
    }
    let mut name = [before, &tokens[*at..=*at]].concat();
    *at += 1;
    let goes_on = |t: &String| t == "{" || t == "*" || t.starts_with(|c: char| c.is_alphabetic() || c == '_');
    if tokens.get(*at).is_some_and(|t| t == "::") && tokens.get(*at + 1).is_some_and(goes_on) {
        *at += 1;
        return names(tokens, at, &name, into);
    }
    if name.len() > 1 && name.last().is_some_and(|last| last == "self") {
        name.pop();
    }
    let mut here = name[name.len() - 1].clone();
    if tokens.get(*at).is_some_and(|t| t == "as") {
        here.clone_from(&tokens[*at + 1]);
        *at += 2;
    }
    into.push((name, here));
}

/// Words, `::` and single signs of a source; no comments, texts and characters.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let hashes = rest[word..].len() - rest[word..].trim_start_matches('#').len();
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if matches!(&rest[..word], "r" | "br") && rest[word + hashes..].starts_with('"') {
            let begin = word + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            rest[begin..].find(&end).map_or(rest.len(), |at| begin + at + end.len())
        } else if first == '"' {
            1 + closing(&rest[1..], '"')
        } else if first == '\'' && (rest[1..].starts_with('\\') || rest[1..].chars().nth(1) == Some('\'')) {
            1 + closing(&rest[1..], '\'')
        } else if word > 0 {
            tokens.push(rest[..word].to_owned());
            word
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[skipped..];
    }
    tokens
}

/// Bytes up to a quote that no backslash is before, with it.
fn closing(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

/// Leaves out each item below a `#[cfg(test)]`.
fn without_tests(tokens: Vec<String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].starts_with(&["#", "[", "cfg", "(", "test", ")", "]"].map(str::to_owned)) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        // An item ends by a semicolon or the brace that closes it; attributes between have brackets.
        let mut depth = 0;
        at += 7;
        while at < tokens.len() {
            match tokens[at].as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            let ends = depth == 0 && matches!(tokens[at].as_str(), ";" | "}");
            at += 1;
            if ends {
                break;
            }
        }
    }
    kept
}
