//! Opens the files of a model's directory, none of which may lie outside it.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use strata_proto::Files;

use super::{
    INDEX, SINGLE, WeightsError,
    gguf::{self, Gguf},
};

/// A model's directory. Every file of a model is opened here, because a repository that somebody else made can hold symbolic
/// links to anything that this process may read. Links may lead to files of the directory itself; those of a revision in a hub's
/// cache, which consists of links, to files of that model's folder in the cache.
#[derive(Debug, Clone)]
pub(crate) struct ModelDir {
    /// As it was given.
    path: PathBuf,
    /// Without links.
    real: PathBuf,
    /// What links may not leave.
    root: PathBuf,
    /// What there is instead of files.
    gguf: Option<Arc<Gguf>>,
}

impl ModelDir {
    /// A directory, which may be a link itself: whoever gives it means what it leads to. A GGUF file, or a directory that has the
    /// files of one such model and no other weights, is a directory with what its metadata say, and with nothing that lies beside
    /// it.
    ///
    /// # Errors
    /// If it is not there, or a GGUF file cannot be read.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let real =
            |path: &Path| path.canonicalize().map_err(|e| WeightsError::io(&path.display().to_string(), e));
        let given = real(path)?;
        let mut names = gguf::names(&given);
        let (mut directory, mut root) = (given.clone(), cached_model(&given).unwrap_or(&given).to_owned());
        if !given.is_dir() {
            // In the hub's cache, a file's own name is that of a link.
            let beside =
                path.parent().map(|parent| if parent == Path::new("") { Path::new(".") } else { parent });
            let beside = beside.map(real).transpose()?;
            let own = given.parent().unwrap_or(&given).to_owned();
            (directory, root) =
                match beside.as_deref().and_then(|beside| Some((beside, cached_model(beside)?))) {
                    Some((beside, model)) => {
                        names = gguf::names(path);
                        (beside.to_owned(), model.to_owned())
                    }
                    None => (own.clone(), own),
                };
        }
        let mut dir = ModelDir { path: path.to_owned(), real: directory, root, gguf: None };
        let has_weights = || [SINGLE, INDEX].iter().any(|name| given.join(name).exists());
        if let Some(names) = names.filter(|_| !has_weights()) {
            let open = |name: String| match dir.file(&name)? {
                Some(file) => Ok((name, file)),
                None => Err(WeightsError::file(
                    &name,
                    "it is a part of the model, but it is not there: download it too",
                )),
            };
            let files = names.into_iter().map(open).collect::<Result<_, _>>()?;
            dir.gguf = Some(Arc::new(Gguf::read(files)?));
        }
        Ok(dir)
    }

    /// The GGUF files that it is, if it is some.
    pub fn gguf(&self) -> Option<&Arc<Gguf>> {
        self.gguf.as_ref()
    }

    /// The files that are made of metadata, if there are no others.
    pub fn made(&self) -> Option<&Files> {
        Some(&self.gguf.as_ref()?.files)
    }

    /// The directory as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it, by its name or by a relative path; none if there is none.
    ///
    /// # Errors
    /// If it lies elsewhere, is no regular file (a pipe would block, a device never end), or cannot be opened.
    pub fn file(&self, name: &str) -> Result<Option<File>, WeightsError> {
        let io = |e| WeightsError::io(name, e);
        if self.gguf.is_some() {
            return Ok(None);
        }
        let real = match self.real.join(name).canonicalize() {
            Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(None),
            real => real.map_err(io)?,
        };
        if !real.starts_with(&self.root) {
            let reason = format!(
                "it is a symbolic link to {}, outside the model's directory {}: expected one that stays inside; copy the file \
                 in its place",
                real.display(),
                self.root.display()
            );
            return Err(WeightsError::file(name, reason));
        }
        if !real.metadata().map_err(io)?.is_file() {
            return Err(WeightsError::file(name, "not a regular file"));
        }
        File::open(real).map(Some).map_err(io)
    }

    /// A whole file of at most `limit` bytes; none if there is none.
    ///
    /// # Errors
    /// As [`file`](Self::file), and if it is larger.
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, WeightsError> {
        if let Some(made) = self.made() {
            return Ok(made.get(name).cloned());
        }
        let Some(file) = self.file(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| WeightsError::io(name, e))?;
        if bytes.len() as u64 > limit {
            return Err(WeightsError::file(name, format!("larger than {limit} bytes")));
        }
        Ok(Some(bytes))
    }
}

/// The folder of a model in a hub's cache, of a revision `models--OWNER--NAME/snapshots/REVISION` in it.
fn cached_model(revision: &Path) -> Option<&Path> {
    let snapshots = revision.parent().filter(|parent| parent.ends_with("snapshots"))?;
    snapshots.parent().filter(|model| {
        model.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"models--"))
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn content(dir: &ModelDir, name: &str) -> Result<Option<Vec<u8>>, String> {
        dir.read(name, 100).map_err(|error| error.to_string())
    }

    #[test]
    fn links_that_leave_the_directory_are_refused() {
        let top = tempfile::tempdir().unwrap();
        let model = top.path().join("model");
        fs::create_dir_all(model.join("1_Pooling")).unwrap();
        fs::write(top.path().join("secret"), "secret").unwrap();
        fs::write(model.join("file"), "ours").unwrap();
        symlink("file", model.join("inside")).unwrap();
        symlink("../secret", model.join("outside")).unwrap();
        symlink(top.path().join("secret"), model.join("absolute")).unwrap();
        symlink("outside", model.join("twice")).unwrap();
        symlink("..", model.join("2_Pooling")).unwrap();
        symlink("missing", model.join("dangling")).unwrap();
        symlink("model", top.path().join("alias")).unwrap();
        // A link to the directory itself is the user's word.
        for given in ["model", "alias"] {
            let dir = ModelDir::open(&top.path().join(given)).unwrap();
            assert_eq!(content(&dir, "file"), Ok(Some(b"ours".to_vec())));
            assert_eq!(content(&dir, "inside"), Ok(Some(b"ours".to_vec())));
            for name in ["outside", "absolute", "twice", "2_Pooling/secret", "../secret"] {
                let refused = content(&dir, name).unwrap_err();
                assert!(
                    refused.starts_with(name) && refused.contains("outside the model's directory"),
                    "{refused}"
                );
            }
            for name in ["dangling", "missing", "file/below"] {
                assert_eq!(content(&dir, name), Ok(None), "{name}");
            }
            assert!(content(&dir, "1_Pooling").unwrap_err().contains("not a regular file"));
            assert!(dir.read("file", 3).unwrap_err().to_string().contains("larger than 3 bytes"));
        }
        assert!(ModelDir::open(&top.path().join("none")).is_err());
    }

    #[test]
    fn a_cache_of_the_hub_points_into_itself() {
        let top = tempfile::tempdir().unwrap();
        for model in ["models--a--b", "models--a--c"] {
            let revision = top.path().join(model).join("snapshots/abc");
            fs::create_dir_all(&revision).unwrap();
            fs::create_dir(top.path().join(model).join("blobs")).unwrap();
            fs::write(top.path().join(model).join("blobs/1"), model).unwrap();
            symlink("../../blobs/1", revision.join("config.json")).unwrap();
            symlink("../../../models--a--b/blobs/1", revision.join("other")).unwrap();
        }
        symlink("models--a--c/snapshots/abc", top.path().join("c")).unwrap();
        for given in ["models--a--c/snapshots/abc", "c"] {
            let dir = ModelDir::open(&top.path().join(given)).unwrap();
            assert_eq!(content(&dir, "config.json"), Ok(Some(b"models--a--c".to_vec())));
            assert!(content(&dir, "other").unwrap_err().contains("outside the model's directory"));
        }
        // A folder that only looks like one has no more rights than others.
        let fake = top.path().join("model/snapshots/abc");
        fs::create_dir_all(&fake).unwrap();
        fs::write(top.path().join("model/blob"), "").unwrap();
        symlink("../../blob", fake.join("config.json")).unwrap();
        let dir = ModelDir::open(&fake).unwrap();
        assert!(content(&dir, "config.json").unwrap_err().contains("outside the model's directory"));
    }
}
