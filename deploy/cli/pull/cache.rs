//! A model's folder in the hub's cache, written as the hub's clients have it: `blobs` by their digests, `snapshots` of links to
//! them by commit, and `refs` from names of revisions to commits.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use ring::digest::{Context as Hasher, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use tonic::Code;

use super::listing::{Digest, RemoteFile};
use crate::{call_error::CallError, report, show::bytes};

/// Bytes read at once.
const PIECE: usize = 1 << 18;
/// Most connections for one file, each of which has to bring something.
const MAX_CONNECTIONS: usize = 1000;

/// A model's folder.
pub struct ModelCache {
    model: PathBuf,
    /// Where the hub's clients keep locks, by digest.
    locks: PathBuf,
}

impl ModelCache {
    /// The folder of `OWNER/NAME` in a cache, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(cache: &Path, id: &str) -> anyhow::Result<Self> {
        let name = format!("models--{}", id.replace('/', "--"));
        let (model, locks) = (cache.join(&name), cache.join(".locks").join(&name));
        for folder in [&model.join("blobs"), &locks] {
            fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        }
        Ok(ModelCache { model, locks })
    }

    /// Whether it has all of a file.
    pub fn has(&self, file: &RemoteFile) -> bool {
        self.blob(file).metadata().is_ok_and(|found| found.is_file() && found.len() == file.bytes)
    }

    /// The content of a file that it has.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, file: &RemoteFile) -> anyhow::Result<Vec<u8>> {
        fs::read(self.blob(file)).with_context(|| format!("{}", self.blob(file).display()))
    }

    /// Whether there is room for what is left of some files.
    ///
    /// # Errors
    /// If there is not.
    pub fn check_space(&self, missing: &[&RemoteFile]) -> anyhow::Result<()> {
        let rest = |file: &&RemoteFile| {
            let here = self.unfinished(file).metadata().map_or(0, |found| found.len());
            file.bytes.saturating_sub(here)
        };
        let needed = missing.iter().map(rest).fold(0, u64::saturating_add);
        let Ok(disk) = rustix::fs::statvfs(&self.model) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if needed > free {
            bail!(
                "{}: {} are to come, but {} are free there: make room, or set HF_HOME to a folder on another disk",
                self.model.display(),
                bytes(needed),
                bytes(free)
            );
        }
        Ok(())
    }

    /// Brings what is not here of a file, and checks it; how many bytes came. `open` gives its bytes from some on, and whether they
    /// do begin there or at its first; `progress` hears how many there are.
    ///
    /// # Errors
    /// If bytes no longer come, cannot be written (what came is kept), or are not those that the hub has (then they are deleted).
    pub fn fetch<R: Read>(
        &self,
        file: &RemoteFile,
        open: impl Fn(u64) -> anyhow::Result<(R, bool)>,
        progress: impl Fn(u64),
    ) -> anyhow::Result<u64> {
        // Until the end of this, for who downloads the same.
        let _lock = self.lock(file)?;
        if self.has(file) {
            return Ok(0);
        }
        let path = self.unfinished(file);
        let mut part = Part::open(&path, file).map_err(|e| unwritable(&path, &e))?;
        let mut came = 0;
        let mut connections = 0;
        while part.bytes < file.bytes {
            let (mut body, is_rest) = open(part.bytes)?;
            if part.bytes > 0 && !is_rest {
                part.restart().map_err(|e| unwritable(&path, &e))?;
            }
            let before = part.bytes;
            let broken = part.extend(&mut body, file.bytes, &progress).map_err(|e| unwritable(&path, &e))?;
            came += part.bytes - before;
            connections += 1;
            // What broke off goes on at once, for as long as that helps.
            if part.bytes < file.bytes && (part.bytes == before || connections == MAX_CONNECTIONS) {
                let why = broken.map_or("the connection was closed".into(), |error| error.to_string());
                let text = format!(
                    "{}: it broke off after {} of {} ({why}): pull again, what came is kept",
                    file.name,
                    bytes(part.bytes),
                    bytes(file.bytes)
                );
                return Err(CallError { code: Code::Unavailable, text }.into());
            }
        }
        let (found, expected) = (part.hash(), file.digest.text());
        if found != expected {
            fs::remove_file(&path).map_err(|e| unwritable(&path, &e))?;
            bail!(
                "{}: what came hashes to {found}, but the hub says {expected}: it was deleted; pull again, and if that does not \
                 help, ask who runs the hub, its mirror or the proxy",
                file.name
            );
        }
        part.file.sync_all().map_err(|e| unwritable(&path, &e))?;
        fs::rename(&path, self.blob(file)).map_err(|e| unwritable(&path, &e))?;
        Ok(came)
    }

    /// The folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.model.join("snapshots").join(commit)
    }

    /// Puts a file that is here into the folder of a commit.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn link(&self, commit: &str, file: &RemoteFile) -> anyhow::Result<()> {
        let path = self.snapshot(commit).join(&file.name);
        let up = "../".repeat(2 + file.name.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{}", file.digest.text()));
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&self.model);
        fs::create_dir_all(folder).map_err(|e| unwritable(folder, &e))?;
        let fresh = self.model.join("blobs").join(format!(".link-{}", std::process::id()));
        let made = symlink(&target, &fresh).and_then(|()| fs::rename(&fresh, &path));
        made.map_err(|e| unwritable(&path, &e))
    }

    /// Remembers which commit a revision's name stands for.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn name_revision(&self, revision: &str, commit: &str) -> anyhow::Result<()> {
        if commit.starts_with(revision) && revision.len() >= 7 {
            return Ok(());
        }
        let path = self.model.join("refs").join(revision);
        let folder = path.parent().unwrap_or(&self.model);
        let fresh = self.model.join("blobs").join(format!(".ref-{}", std::process::id()));
        let write = || {
            fs::create_dir_all(folder)?;
            fs::write(&fresh, commit)?;
            fs::rename(&fresh, &path)
        };
        write().map_err(|e| unwritable(&path, &e))
    }

    /// Waits until nobody else downloads a file.
    fn lock(&self, file: &RemoteFile) -> anyhow::Result<File> {
        let path = self.locks.join(format!("{}.lock", file.digest.text()));
        let lock =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| unwritable(&path, &e))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => {
                report::tell(&format!(
                    "{} is being downloaded by another process: waiting for it",
                    file.name
                ));
            }
            Err(TryLockError::Error(error)) => return Err(unwritable(&path, &error)),
        }
        lock.lock().map_err(|e| unwritable(&path, &e))?;
        Ok(lock)
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.model.join("blobs").join(file.digest.text())
    }

    fn unfinished(&self, file: &RemoteFile) -> PathBuf {
        self.model.join("blobs").join(format!("{}.incomplete", file.digest.text()))
    }
}

impl Digest {
    fn text(&self) -> &str {
        match self {
            Digest::Sha256(text) | Digest::Git(text) => text,
        }
    }

    /// What hashes a file of so many bytes.
    fn hasher(&self, bytes: u64) -> Hasher {
        match self {
            Digest::Sha256(_) => Hasher::new(&SHA256),
            Digest::Git(_) => {
                let mut hasher = Hasher::new(&SHA1_FOR_LEGACY_USE_ONLY);
                hasher.update(format!("blob {bytes}\0").as_bytes());
                hasher
            }
        }
    }
}

/// A file of which the beginning is here.
struct Part {
    file: File,
    bytes: u64,
    hasher: Hasher,
    /// Of none of its bytes.
    empty: Hasher,
}

impl Part {
    /// Opens what is here of a file, which may be nothing.
    fn open(path: &Path, whole: &RemoteFile) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let empty = whole.digest.hasher(whole.bytes);
        let mut part = Part { file: file.try_clone()?, bytes: 0, hasher: empty.clone(), empty };
        if file.metadata()?.len() > whole.bytes {
            part.restart()?;
        }
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(part),
                count => part.count(&piece[..count]),
            }
        }
    }

    /// Forgets what is here.
    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.bytes, self.hasher) = (0, self.empty.clone());
        Ok(())
    }

    /// Appends what comes until there are `whole` bytes; why no more came, if that was an error.
    ///
    /// # Errors
    /// If it cannot be written.
    fn extend(
        &mut self,
        body: &mut impl Read,
        whole: u64,
        progress: &impl Fn(u64),
    ) -> io::Result<Option<io::Error>> {
        let mut body = body.take(whole - self.bytes);
        let mut piece = vec![0; PIECE];
        loop {
            progress(self.bytes);
            match body.read(&mut piece) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.file.write_all(&piece[..count])?;
                    self.count(&piece[..count]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Ok(Some(error)),
            }
        }
    }

    fn count(&mut self, piece: &[u8]) {
        self.hasher.update(piece);
        self.bytes += piece.len() as u64;
    }

    /// What all of it hashes to, in hexadecimal.
    fn hash(&self) -> String {
        self.hasher.clone().finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A file or folder that cannot be written, and what to do about it.
fn unwritable(path: &Path, error: &io::Error) -> anyhow::Error {
    let what_to_do = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room and pull again, what came is kept; or set HF_HOME to a folder on another disk"
        }
        _ => "set HF_HOME to a folder that can be written, or mend that one",
    };
    anyhow::anyhow!("{}: {error}: {what_to_do}", path.display())
}
