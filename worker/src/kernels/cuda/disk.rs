//! Compiled kernels on a disk, each set of them a file whose name is a hash of everything that it was made from.
//!
//! A file says how long its content is and what it hashes to; one that does not keep to that is as good as none, and is
//! replaced. Files appear whole, by renaming, so that processes need not know of each other. They are code that runs as
//! this user, so what others could have written is not read.

use std::{
    fs::{self, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use sha2::{Digest, Sha256};

/// What a file begins with; then come the length of the content (8 bytes, little-endian), its SHA-256, and the content.
const MAGIC: &[u8] = b"strata kernels 1\n";
const HEADER: usize = MAGIC.len() + 8 + 32;
/// No set of kernels is longer.
const LONGEST: u64 = 64 << 20;
/// How names of files end.
const EXTENSION: &str = "kernels";
/// Files that a directory keeps: those that were used last. Each version of the kernels, of NVRTC, and each kind of GPU
/// has some of its own.
const MOST_FILES: usize = 32;

/// Where kernels of a name are in a directory.
pub(super) fn place(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.{EXTENSION}"))
}

/// The kernels in a file; none if it is not there, damaged, or may be of others than this user.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    match try_read(path) {
        Ok(content) => Some(content),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "kept kernels are not used, and are compiled anew");
            None
        }
    }
}

fn try_read(path: &Path) -> io::Result<Vec<u8>> {
    let directory = directory(path);
    trust(&fs::metadata(directory)?).map_err(|why| not_trusted("their directory", why))?;
    // A pipe is opened without waiting for who writes it, and then refused.
    let file = OpenOptions::new().read(true).custom_flags(NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("expected a file"));
    }
    trust(&metadata).map_err(|why| not_trusted("their file", why))?;
    let mut bytes = Vec::new();
    (&file).take(HEADER as u64 + LONGEST).read_to_end(&mut bytes)?;
    let content = content(&bytes).ok_or_else(|| io::Error::other("kernels are damaged"))?;
    // So that it is one of those that were used last.
    let _ = file.set_modified(SystemTime::now());
    Ok(content.to_vec())
}

const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether nobody but this user, or the administrator, could have written something.
fn trust(metadata: &Metadata) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    match (metadata.uid(), metadata.mode() & 0o022) {
        (owner, _) if owner != own && owner != 0 => {
            Err(format!("belongs to user {owner}, and this process runs as user {own}"))
        }
        (_, 0) => Ok(()),
        _ => Err(format!("can be written by others (mode {:o})", metadata.mode() & 0o777)),
    }
}

fn not_trusted(what: &str, why: String) -> io::Error {
    let kind = io::ErrorKind::PermissionDenied;
    io::Error::new(kind, format!("{what} {why}: chmod go-w it, or let --kernel-cache name another directory"))
}

/// What a file holds, if it is whole.
fn content(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    let (hash, content) = rest.split_first_chunk::<32>()?;
    let is_whole =
        u64::from_le_bytes(*length) == content.len() as u64 && Sha256::digest(content)[..] == hash[..];
    is_whole.then_some(content)
}

/// Keeps kernels; if that cannot be, a process that starts later compiles them again.
pub(super) fn write(path: &Path, content: &[u8]) {
    if let Err(error) = try_write(path, content) {
        tracing::warn!(
            %error,
            path = %path.display(),
            "compiled kernels cannot be kept, and are compiled at every start; --kernel-cache names another directory"
        );
    }
}

fn try_write(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = directory(path);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    if trust(&fs::metadata(directory)?).is_err() {
        // Nobody would read it, as who tried to has said.
        return Ok(());
    }
    // Named as the others, so that what a process leaves that dies here goes in its time, too.
    let suffix = format!(".{EXTENSION}");
    let mut file = tempfile::Builder::new().suffix(&suffix).tempfile_in(directory)?;
    file.write_all(MAGIC)?;
    file.write_all(&(content.len() as u64).to_le_bytes())?;
    file.write_all(&Sha256::digest(content))?;
    file.write_all(content)?;
    file.persist(path)?;
    remove_oldest(directory)
}

/// Removes files beyond those that were used last. Another process may do the same, or compiles again what it misses.
fn remove_oldest(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = path.symlink_metadata();
        if let Some(metadata) = metadata.ok().filter(Metadata::is_file)
            && path.extension().is_some_and(|extension| extension == EXTENSION)
        {
            files.push((metadata.modified()?, path));
        }
    }
    files.sort();
    let beyond = files.len().saturating_sub(MOST_FILES);
    files.iter().take(beyond).for_each(|(_, path)| drop(fs::remove_file(path)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn what_is_not_whole_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("below/a.kernels");
        assert_eq!(read(&path), None);
        write(&path, b"machine code");
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(read(&path), None, "{length} bytes");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(read(&path), None, "byte {at}");
        }
        fs::write(&path, [&whole[..], b"!"].concat()).unwrap();
        assert_eq!(read(&path), None, "something follows");
        write(&path, b"other");
        assert_eq!(read(&path).as_deref(), Some(&b"other"[..]));
        let files = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(files, 1, "nothing else is left behind");
    }

    #[test]
    fn a_pipe_in_the_place_of_a_file_keeps_nobody_waiting_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = place(directory.path(), "a");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert_eq!(read(&path), None);
        write(&path, b"machine code");
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
    }

    #[test]
    fn what_others_could_have_written_is_not_read() {
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("strata/kernels");
        let path = place(&below, "a");
        write(&path, b"machine code");
        for made in [&below, &directory.path().join("strata")] {
            assert_eq!(fs::metadata(made).unwrap().mode() & 0o777, 0o700);
        }
        for (what, open, closed) in [(&path, 0o620, 0o600), (&path, 0o602, 0o644), (&below, 0o777, 0o755)] {
            mode(what, open);
            assert_eq!(read(&path), None, "{} is {open:o}", what.display());
            mode(what, closed);
            assert!(read(&path).is_some(), "{} is {closed:o}", what.display());
        }
        mode(&below, 0o777);
        write(&place(&below, "b"), b"machine code");
        mode(&below, 0o700);
        assert_eq!(read(&place(&below, "b")), None, "nothing is written where nothing would be read");
        // Only root gives files away; who is not cannot show it.
        if std::os::unix::fs::chown(&path, Some(12_345), None).is_ok() {
            assert_eq!(read(&path), None, "another user's");
            let trusted = trust(&fs::metadata(&path).unwrap()).unwrap_err();
            assert!(trusted.contains("belongs to user 12345"), "{trusted}");
        }
    }

    #[test]
    fn a_directory_keeps_the_files_that_were_used_last() {
        let directory = tempfile::tempdir().unwrap();
        let at = |index: usize| place(directory.path(), &index.to_string());
        let age = |index: usize, seconds: u64| {
            let file = fs::File::options().write(true).open(at(index)).unwrap();
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(seconds)).unwrap();
        };
        for index in 0..MOST_FILES {
            write(&at(index), b"machine code");
            age(index, 1000 - index as u64);
        }
        fs::write(directory.path().join("other"), "of somebody else").unwrap();
        assert!(read(&at(0)).is_some(), "used just now");
        write(&at(MOST_FILES), b"machine code");
        assert!(at(0).exists() && !at(1).exists() && at(2).exists() && at(MOST_FILES).exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), MOST_FILES + 1);
    }

    #[test]
    fn a_directory_that_cannot_be_written_costs_nothing_but_time() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "no directory").unwrap();
        let path = file.join("a.kernels");
        write(&path, b"machine code");
        assert_eq!(read(&path), None);
    }
}
