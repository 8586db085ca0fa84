//! Streams tensors from the files: read, hashed and handed out, each on a thread of its own.

use std::{io, sync::mpsc, thread};

use strata_proto::Digest;

use super::{Checkpoint, PIECE, TensorInfo, WeightsError};

/// Pieces in memory at a time: one is read, one is hashed, one is handed out.
const BUFFERS: usize = 3;

/// A piece of a tensor: the tensor's number, the offset in it, and the bytes.
type Read = Result<(usize, u64, Vec<u8>), WeightsError>;

/// Hands every byte of `tensors` to `each`, in order, as the number of the tensor, an offset in it and at most [`PIECE`] bytes;
/// returns the digest of each tensor, over its bytes as the file has them. At most three pieces are in memory.
///
/// # Errors
/// If a file cannot be read, or `each` fails.
pub(crate) fn stream<E: From<WeightsError>>(
    checkpoint: &Checkpoint,
    tensors: &[&TensorInfo],
    mut each: impl FnMut(usize, u64, &[u8]) -> Result<(), E>,
) -> Result<Vec<Digest>, E> {
    let (filled, unhashed) = mpsc::sync_channel(1);
    let (hashed, pieces) = mpsc::sync_channel(1);
    let (emptied, buffers) = mpsc::channel();
    for _ in 0..BUFFERS {
        // The receiver is here.
        let _ = emptied.send(Vec::new());
    }
    let no_thread = |source: io::Error| WeightsError::Io { file: "starting a thread".into(), source };
    thread::scope(|scope| {
        // Both end when their receivers are gone, too.
        let read = move || read_pieces(checkpoint, tensors, &buffers, &filled);
        let hash = move || hash_pieces(tensors, &unhashed, &hashed);
        thread::Builder::new().name("strata-read".into()).spawn_scoped(scope, read).map_err(no_thread)?;
        let hash = thread::Builder::new().name("strata-hash".into()).spawn_scoped(scope, hash);
        let hash = hash.map_err(no_thread)?;
        // Moved here, so that they are gone before the threads are waited for.
        let (pieces, emptied) = (pieces, emptied);
        for piece in &pieces {
            let (number, offset, data) = piece?;
            each(number, offset, &data)?;
            // When all is read, nobody waits for it.
            let _ = emptied.send(data);
        }
        Ok(hash.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Reads tensors into the buffers that come, and hands them on in order; ends at an error, or if nobody is there any
/// more.
fn read_pieces(
    checkpoint: &Checkpoint,
    tensors: &[&TensorInfo],
    buffers: &mpsc::Receiver<Vec<u8>>,
    filled: &mpsc::SyncSender<Read>,
) {
    for (number, tensor) in tensors.iter().enumerate() {
        for offset in (0..tensor.bytes).step_by(PIECE) {
            let Ok(mut buffer) = buffers.recv() else { return };
            let read = checkpoint.read(tensor, offset, &mut buffer).map(|()| (number, offset, buffer));
            let failed = read.is_err();
            if filled.send(read).is_err() || failed {
                return;
            }
        }
    }
}

/// Hands pieces on as they come; the digests of the tensors that came whole, and of nothing in the place of others.
fn hash_pieces(
    tensors: &[&TensorInfo],
    unhashed: &mpsc::Receiver<Read>,
    hashed: &mpsc::SyncSender<Read>,
) -> Vec<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut digests = vec![Digest::from(hasher.finalize()); tensors.len()];
    for piece in unhashed {
        if let Ok((number, offset, data)) = &piece {
            hasher.update(data);
            if offset + data.len() as u64 == tensors[*number].bytes {
                digests[*number] = hasher.finalize().into();
                hasher.reset();
            }
        }
        if hashed.send(piece).is_err() {
            break;
        }
    }
    digests
}
