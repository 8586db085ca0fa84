//! Streams tensors from the files: read and hashed on a thread of its own, handed out on the caller's.

use std::{io, sync::mpsc, thread};

use twox_hash::XxHash3_128;

use super::{Checkpoint, PIECE, TensorInfo, WeightsError};

/// Pieces in memory at a time: one is read, one waits, one is handed out.
const BUFFERS: usize = 3;
/// Bytes that are read, then hashed while a core's cache has them: memory is what loading waits for.
const PART: usize = 256 << 10;

/// A piece of a tensor: the tensor's number, the offset in it, and the bytes.
type Read = Result<(usize, u64, Vec<u8>), WeightsError>;

/// Hands every byte of `tensors` to `each`, in order, as the number of the tensor, an offset in it and at most [`PIECE`]
/// bytes. Returns the digest of each tensor, XXH3 in 128 bits over its bytes as the file has them: it finds damage, not
/// what somebody changed on purpose. At most three pieces are in memory.
///
/// # Errors
/// If a file cannot be read, or `each` fails.
pub(crate) fn stream<E: From<WeightsError>>(
    checkpoint: &Checkpoint,
    tensors: &[&TensorInfo],
    mut each: impl FnMut(usize, u64, &[u8]) -> Result<(), E>,
) -> Result<Vec<u128>, E> {
    let (filled, pieces) = mpsc::sync_channel(1);
    let (emptied, buffers) = mpsc::channel();
    for _ in 0..BUFFERS {
        // The receiver is here.
        let _ = emptied.send(Vec::new());
    }
    let no_thread = |source: io::Error| WeightsError::Io { file: "starting a thread".into(), source };
    thread::scope(|scope| {
        // Ends when its receiver is gone, too.
        let read = move || read_pieces(checkpoint, tensors, &buffers, &filled);
        let read = thread::Builder::new().name("strata-read".into()).spawn_scoped(scope, read);
        let read = read.map_err(no_thread)?;
        // Moved here, so that they are gone before the thread is waited for.
        let (pieces, emptied) = (pieces, emptied);
        for piece in &pieces {
            let (number, offset, data) = piece?;
            each(number, offset, &data)?;
            // When all is read, nobody waits for it.
            let _ = emptied.send(data);
        }
        Ok(read.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Reads tensors into the buffers that come, and hands them on in order; ends at an error, or if nobody is there any
/// more. Returns the digests of the tensors that came whole, and zeros in the place of others.
fn read_pieces(
    checkpoint: &Checkpoint,
    tensors: &[&TensorInfo],
    buffers: &mpsc::Receiver<Vec<u8>>,
    filled: &mpsc::SyncSender<Read>,
) -> Vec<u128> {
    let mut digests = vec![0; tensors.len()];
    for (number, tensor) in tensors.iter().enumerate() {
        let mut hasher = XxHash3_128::new();
        for offset in (0..tensor.bytes).step_by(PIECE) {
            let Ok(mut buffer) = buffers.recv() else { return digests };
            buffer.resize((tensor.bytes - offset).min(PIECE as u64) as usize, 0);
            let read = buffer.chunks_mut(PART).enumerate().try_for_each(|(i, part)| {
                checkpoint.fill(tensor, offset + (i * PART) as u64, part)?;
                hasher.write(part);
                Ok(())
            });
            let failed = read.is_err();
            if filled.send(read.map(|()| (number, offset, buffer))).is_err() || failed {
                return digests;
            }
        }
        digests[number] = hasher.finish_128();
    }
    digests
}
