//! Compiled kernels on a disk, each set of them a file whose name is a hash of everything that it was made from.
//!
//! A file says how long its content is and what it hashes to; one that does not keep to that is as good as none, and is
//! replaced. Files appear whole, by renaming, so that processes need not know of each other.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use sha2::{Digest, Sha256};

/// What a file begins with; then come the length of the content (8 bytes, little-endian), its SHA-256, and the content.
const MAGIC: &[u8] = b"strata kernels 1\n";
const HEADER: usize = MAGIC.len() + 8 + 32;
/// No set of kernels is longer.
const LONGEST: u64 = 64 << 20;

/// The kernels in a file; none if it is not there, or damaged.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "kernels cannot be read, and are compiled anew");
            return None;
        }
    };
    let mut bytes = Vec::new();
    let read = file.take(HEADER as u64 + LONGEST).read_to_end(&mut bytes);
    let content = content(&bytes).map(<[u8]>::to_vec);
    if read.is_err() || content.is_none() {
        tracing::warn!(path = %path.display(), "kernels are damaged, and are compiled anew");
        return None;
    }
    content
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
    let directory = path.parent().unwrap_or(Path::new("."));
    // Machine code that runs as this user: nobody else is to write it.
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(MAGIC)?;
    file.write_all(&(content.len() as u64).to_le_bytes())?;
    file.write_all(&Sha256::digest(content))?;
    file.write_all(content)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
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
    fn a_directory_that_cannot_be_written_costs_nothing_but_time() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "no directory").unwrap();
        let path = file.join("a.kernels");
        write(&path, b"machine code");
        assert_eq!(read(&path), None);
    }
}
