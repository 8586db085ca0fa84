//! What the hub says of a revision of a model: its commit, and its files with their sizes and hashes.

use std::{
    collections::BTreeSet,
    path::{Component, Path},
};

use anyhow::bail;
use serde::Deserialize;
use strata_proto::error::quoted;

/// Most files of a repository.
const MAX_FILES: usize = 50_000;

/// A file of a repository, as the hub lists it.
#[derive(Debug, Clone)]
pub struct RemoteFile {
    /// Its path in the repository, which leads nowhere else.
    pub name: String,
    pub bytes: u64,
    pub digest: Digest,
}

/// What a file's bytes must hash to, in hexadecimal. Its name in the cache is the same, as the hub's clients have it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Digest {
    /// SHA-256 of a large file.
    Sha256(String),
    /// SHA-1 as git has it of a small one: over `blob LENGTH\0` too.
    Git(String),
}

/// A commit of a repository.
#[derive(Debug)]
pub struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct Repository {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Reads what the hub says of a revision, in JSON.
///
/// # Errors
/// If a name leads out of the folder, a size or a hash is missing, or there are too many files.
pub fn read(text: &[u8]) -> anyhow::Result<Listing> {
    let repository: Repository = serde_json::from_slice(text)?;
    let is_hash = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    if !is_hash(&repository.sha, 40) {
        bail!("sha: {}: expected a commit of 40 hexadecimal digits", quoted(&repository.sha));
    }
    if repository.siblings.len() > MAX_FILES {
        bail!("siblings: {} files; expected {MAX_FILES} at most", repository.siblings.len());
    }
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for Sibling { rfilename: name, size, blob_id, lfs } in repository.siblings {
        let leads_inside = Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
        let is_plain =
            !name.is_empty() && !name.ends_with('/') && !name.contains("//") && !name.contains("/./");
        if !leads_inside
            || !is_plain
            || name.len() > 1024
            || name.chars().any(|c| c.is_control() || c == '\\')
        {
            bail!("siblings: {} is no path inside of the model's folder", quoted(&name));
        }
        if !seen.insert(name.clone()) {
            bail!("siblings: {} is listed twice", quoted(&name));
        }
        let (bytes, digest) = match (lfs, size, blob_id) {
            (Some(lfs), _, _) if is_hash(&lfs.sha256, 64) => (lfs.size, Digest::Sha256(lfs.sha256)),
            (None, Some(size), Some(id)) if is_hash(&id, 40) => (size, Digest::Git(id)),
            _ => bail!("siblings: {}: expected a size, and a SHA-256 or a git hash", quoted(&name)),
        };
        files.push(RemoteFile { name, bytes, digest });
    }
    Ok(Listing { commit: repository.sha, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(sibling: &str) -> Result<Listing, String> {
        let text = format!(r#"{{"sha": "{}", "siblings": [{sibling}]}}"#, "a".repeat(40));
        read(text.as_bytes()).map_err(|error| error.to_string())
    }

    fn small(name: &str) -> String {
        format!(r#"{{"rfilename": "{name}", "size": 3, "blobId": "{}"}}"#, "b".repeat(40))
    }

    #[test]
    fn names_that_lead_out_of_the_folder_are_refused() {
        for name in ["a.json", "1_Pooling/config.json", "..a", "a..b/c.json"] {
            assert_eq!(listing(&small(name)).unwrap().files[0].name, name);
        }
        for name in [
            "",
            "/etc/x",
            "../x",
            "a/../../x",
            "a/..",
            "./a",
            "a/./b",
            "a//b",
            "a/",
            r"a\\b",
            r"a\u0000",
            r"a\n",
        ] {
            let refused = listing(&small(name)).unwrap_err();
            assert!(refused.contains("no path inside of the model's folder"), "{name:?}: {refused}");
        }
        let twice = [small("a"), small("a")].join(",");
        assert!(listing(&twice).unwrap_err().contains("listed twice"));
    }

    #[test]
    fn a_file_has_a_size_and_a_hash() {
        let sha = "0".repeat(64);
        let large = format!(r#"{{"rfilename": "a", "size": 1, "lfs": {{"sha256": "{sha}", "size": 9}}}}"#);
        let found = listing(&large).unwrap().files.remove(0);
        assert_eq!((found.bytes, found.digest), (9, Digest::Sha256(sha)));
        assert_eq!(listing(&small("a")).unwrap().files[0].digest, Digest::Git("b".repeat(40)));
        for sibling in [
            r#"{"rfilename": "a", "size": 1}"#,
            r#"{"rfilename": "a", "size": 1, "blobId": "../../x"}"#,
            r#"{"rfilename": "a", "lfs": {"sha256": "00", "size": 9}}"#,
        ] {
            assert!(listing(sibling).unwrap_err().contains("expected a size"), "{sibling}");
        }
        assert!(read(br#"{"sha": "../x"}"#).unwrap_err().to_string().contains("40 hexadecimal digits"));
    }
}
