//! Models in the Hugging Face hub's cache, as its clients keep it: `models--OWNER--NAME` with `refs` (names of revisions, and the
//! commits that they stood for when they were downloaded) and `snapshots` (a directory of links per commit).

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// A model on the hub, and which revision of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `OWNER/NAME`.
    pub name: String,
    /// A branch, a tag, a commit, or the beginning of one; `main` unless given.
    pub revision: Option<String>,
}

/// Why a model is not in the cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// None of its revisions is.
    #[error("{name} is not in the hub's cache {cache}: download it by `strata pull {name}`")]
    NoModel {
        /// The model.
        name: String,
        /// Where it was looked for.
        cache: String,
    },
    /// This one is not.
    #[error(
        "{name} is in the hub's cache, but its revision {revision} is not: there is {there}; download it by `strata pull \
         {name}@{revision}`"
    )]
    NoRevision {
        /// The model.
        name: String,
        /// The revision asked for.
        revision: String,
        /// What there is.
        there: String,
    },
    /// The beginning of several commits.
    #[error("{name}: {revision} begins several commits in the hub's cache: {there}; give more of it")]
    Ambiguous {
        /// The model.
        name: String,
        /// The revision asked for.
        revision: String,
        /// The commits.
        there: String,
    },
}

impl HubId {
    /// Reads `OWNER/NAME` or `OWNER/NAME@REVISION`; none if it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = id.split_once('/')?;
        // A revision may have folders (`refs/pr/1`), but leads nowhere else.
        let is_inside = |revision: &str| revision.split('/').all(is_word);
        let fits = is_word(owner) && is_word(name) && revision.is_none_or(is_inside);
        fits.then(|| HubId { name: id.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// The directory of its revision in `cache`, which is named by the commit.
    ///
    /// # Errors
    /// If it is not there, with what is, and how to get it.
    pub fn snapshot(&self, cache: &Path) -> Result<PathBuf, HubError> {
        let (name, revision) = (self.name.clone(), self.revision.as_deref().unwrap_or("main"));
        let model = cache.join(format!("models--{}", self.name.replace('/', "--")));
        let (snapshots, refs) = (model.join("snapshots"), model.join("refs"));
        let mut commits = entries(&snapshots);
        commits.retain(|commit| snapshots.join(commit).is_dir());
        if commits.is_empty() {
            return Err(HubError::NoModel { name, cache: cache.display().to_string() });
        }
        // Who wrote the file by hand may have ended its line.
        let named = fs::read_to_string(refs.join(revision)).ok().map(|commit| commit.trim().to_owned());
        let wanted = named.as_deref().unwrap_or(revision);
        let is_hash = wanted.len() >= 7 && wanted.bytes().all(|b| b.is_ascii_hexdigit());
        let fitting = |commit: &&String| *commit == wanted || is_hash && commit.starts_with(wanted);
        let found: Vec<_> = commits.iter().filter(fitting).collect();
        let list = |all: &[&String]| all.iter().map(|c| c.as_str()).collect::<Vec<_>>().join(", ");
        match found[..] {
            [commit] => Ok(snapshots.join(commit)),
            [] => {
                let mut names = entries(&refs);
                names.retain(|name| refs.join(name).is_file());
                let there = list(&names.iter().chain(&commits).collect::<Vec<_>>());
                Err(HubError::NoRevision { name, revision: revision.to_owned(), there })
            }
            _ => Err(HubError::Ambiguous { name, revision: revision.to_owned(), there: list(&found) }),
        }
    }
}

/// Where the hub's clients keep their cache, by the variables that they read: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME`.
pub fn hub_cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let below = |base: Option<PathBuf>, rest: &str| base.map(|base| base.join(rest));
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| below(set("HF_HOME"), "hub"))
        .or_else(|| below(set("XDG_CACHE_HOME"), "huggingface/hub"))
        .or_else(|| below(set("HOME"), ".cache/huggingface/hub"))
}

/// The commit that a model's directory is, or that of its file, if it is a revision in the hub's cache.
pub(crate) fn commit(directory: &Path) -> Option<String> {
    // A GGUF file is that of a directory.
    let directory = if directory.is_dir() { directory } else { directory.parent()? };
    let real = directory.canonicalize().ok()?;
    let snapshots = real.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let model = snapshots.parent()?.file_name()?.to_str()?;
    model.starts_with("models--").then(|| real.file_name()?.to_str().map(str::to_owned))?
}

/// Whether it could be an owner's, a model's or a revision's name on the hub.
pub fn is_word(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// Names of what is in a directory, in order; none if it cannot be read.
fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths_and_lead_nowhere_else() {
        let id = HubId::parse("Qwen/Qwen3-0.6B@refs/pr/1").unwrap();
        assert_eq!((id.name.as_str(), id.revision.as_deref()), ("Qwen/Qwen3-0.6B", Some("refs/pr/1")));
        assert_eq!(HubId::parse("a/b").unwrap().revision, None);
        for other in [
            "a", "a/b/c", "./a", "/a/b", "a/..", "../a", "a/b@", "a/b@../c", "a/b@/etc", "a/b@c//d",
            "a\\b/c", "",
        ] {
            assert_eq!(HubId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_revision_is_found_by_its_name_or_its_commit() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--a--b");
        let (one, two) =
            ("0123456789abcdef0123456789abcdef01234567", "0123456fff00000000000000000000000000ffff");
        for commit in [one, two] {
            fs::create_dir_all(model.join("snapshots").join(commit)).unwrap();
        }
        fs::create_dir_all(model.join("refs/refs/pr")).unwrap();
        fs::write(model.join("refs/main"), one).unwrap();
        fs::write(model.join("refs/refs/pr/1"), format!("{two}\n")).unwrap();
        fs::write(model.join("refs/gone"), "ffff").unwrap();
        let find = |id: &str| HubId::parse(id).unwrap().snapshot(cache.path());
        let at = |commit: &str| Ok(model.join("snapshots").join(commit));
        assert_eq!(find("a/b"), at(one));
        assert_eq!(find("a/b@main"), at(one));
        assert_eq!(find("a/b@refs/pr/1"), at(two));
        assert_eq!(find(&format!("a/b@{two}")), at(two));
        assert_eq!(find("a/b@0123456f"), at(two));
        assert_eq!(commit(&find("a/b").unwrap()), Some(one.to_owned()));
        assert_eq!(commit(&model), None);
        let says = |id: &str, what: &str| {
            let error = find(id).unwrap_err().to_string();
            assert!(error.contains(what), "{id}: {error}");
        };
        says("a/b@0123456", "begins several commits");
        says("a/b@v2", "its revision v2 is not: there is gone, main, 0123456789");
        says("a/b@gone", "its revision gone is not");
        says("a/c", "`strata pull a/c`");
    }

    #[test]
    fn the_cache_is_where_the_hubs_clients_have_it() {
        let of = |set: &[(&str, &str)]| {
            hub_cache(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
        };
        let home = ("HOME", "/h");
        assert_eq!(of(&[home]), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(of(&[home, ("XDG_CACHE_HOME", "/x")]), Some("/x/huggingface/hub".into()));
        assert_eq!(of(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), Some("/f/hub".into()));
        assert_eq!(of(&[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Some("/c".into()));
        assert_eq!(of(&[("HF_HOME", "")]), None);
    }
}
