//! What travels over a TCP link: frames of one form, with an activation, the reason why there is none, or nothing but a sign of
//! life.
//!
//! A frame is a head (magic, fence, step, number of tensors, poison or heartbeat), a shape line per tensor, a payload, and a
//! CRC-32C over all of it. Shapes are compared with what the step announced before anything is allocated. All integers are
//! little-endian.

use std::io::{ErrorKind, Read, Write};

use strata_proto::{DType, v1::Fence};

use crate::{
    kernels::{
        ops::TensorSpec,
        tensor::{bytes_of, spec_of, tensor_of},
    },
    transport::{Activation, LinkError, Payload, Tensors, check_step, same_fence},
};

const FRAME: [u8; 4] = *b"STRF";
/// Longest poison reason that is sent on.
const MAX_REASON: usize = 1024;
const HEAD_BYTES: usize = 4 + 8 + 4 + 8 + 8 + 1 + 4;
/// In the place of the number of tensors.
const POISON: u8 = 255;
const HEARTBEAT: u8 = 254;
/// Where that number is in a head.
const COUNT_AT: usize = 32;
/// Bytes of a frame without a payload.
pub(crate) const HEARTBEAT_BYTES: usize = HEAD_BYTES + 4;

/// A frame that is ready to be written.
pub(crate) struct Frame {
    head: Vec<u8>,
    body: Vec<u8>,
}

impl Frame {
    /// An activation. Waits for the device that has it.
    ///
    /// # Errors
    /// If its tensors cannot be sent.
    pub fn of(fence: &Fence, activation: Activation) -> Result<Self, LinkError> {
        let (count, reason_bytes, shapes, body) = match activation.payload {
            Payload::Poisoned(reason) => {
                let end = reason.floor_char_boundary(MAX_REASON);
                (POISON, end as u32, Vec::new(), reason.as_bytes()[..end].to_vec())
            }
            Payload::Tensors(tensors) => {
                let tensors = tensors.into_host()?;
                let count = u8::try_from(tensors.len()).ok().filter(|count| *count < HEARTBEAT);
                let count =
                    count.ok_or_else(|| LinkError::Protocol("an activation has too many tensors".into()))?;
                let (mut shapes, mut body) = (Vec::new(), Vec::new());
                for tensor in &tensors {
                    let spec = spec_of(tensor).ok_or_else(|| {
                        let what = "an activation's tensors must be contiguous matrices of f32, bf16 or f16";
                        LinkError::Protocol(what.into())
                    })?;
                    shapes.push(format_code(spec.dtype));
                    shapes.extend((spec.rows as u32).to_le_bytes());
                    shapes.extend((spec.columns as u32).to_le_bytes());
                    let at = body.len();
                    body.resize(at + spec.bytes(), 0);
                    bytes_of(tensor, &mut body[at..]);
                }
                (count, 0, shapes, body)
            }
        };
        let mut head = head(fence, activation.step, count, reason_bytes);
        head.extend(shapes);
        Ok(Frame { head, body })
    }

    /// Nothing but a sign of life.
    pub fn heartbeat(fence: &Fence) -> Self {
        Frame { head: head(fence, 0, HEARTBEAT, 0), body: Vec::new() }
    }

    /// Writes it.
    ///
    /// # Errors
    /// If `out` takes no more.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let check = crc32c::crc32c_append(crc32c::crc32c(&self.head), &self.body);
        out.write_all(&self.head)?;
        out.write_all(&self.body)?;
        out.write_all(&check.to_le_bytes())?;
        out.flush()
    }
}

fn head(fence: &Fence, step: u64, count: u8, reason_bytes: u32) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_BYTES + 16);
    head.extend(FRAME);
    head.extend(fence.term.to_le_bytes());
    head.extend(fence.pipeline.to_le_bytes());
    head.extend(fence.incarnation.to_le_bytes());
    head.extend(step.to_le_bytes());
    head.push(count);
    head.extend(reason_bytes.to_le_bytes());
    head
}

/// Whether a frame begins like this one, of which so much has come, that is nothing but a sign of life.
pub(super) fn is_heartbeat(begin: &[u8]) -> bool {
    begin.get(COUNT_AT) == Some(&HEARTBEAT)
}

/// Reads the activation of `step`, and every sign of life before it.
///
/// # Errors
/// If the stream ends or is silent, or brings something else.
pub(crate) fn read_activation(
    stream: &mut impl Read,
    fence: &Fence,
    step: u64,
    expected: &[TensorSpec],
) -> Result<Activation, LinkError> {
    loop {
        let head = read_head(stream, fence)?;
        match head[COUNT_AT] {
            HEARTBEAT => end_heartbeat(stream, &head)?,
            _ => return read_rest(stream, &head, step, expected),
        }
    }
}

/// Reads a sign of life.
///
/// # Errors
/// As [`read_activation`].
pub(super) fn read_heartbeat(stream: &mut impl Read, fence: &Fence) -> Result<(), LinkError> {
    let head = read_head(stream, fence)?;
    match head[COUNT_AT] {
        HEARTBEAT => end_heartbeat(stream, &head),
        _ => Err(LinkError::Protocol("an activation came from the stage that receives them".into())),
    }
}

type Head = [u8; HEAD_BYTES];

fn read_head(stream: &mut impl Read, fence: &Fence) -> Result<Head, LinkError> {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).map_err(ended)?;
    if head[..4] != FRAME {
        return Err(LinkError::Protocol("a frame does not begin as one".into()));
    }
    let sent = Fence { term: u64_at(&head, 4), pipeline: u32_at(&head, 12), incarnation: u64_at(&head, 16) };
    same_fence(&sent, fence)?;
    Ok(head)
}

fn end_heartbeat(stream: &mut impl Read, head: &Head) -> Result<(), LinkError> {
    check_sum(stream, crc32c::crc32c(head), "a heartbeat")?;
    match (u64_at(head, 24), u32_at(head, 33)) {
        (0, 0) => Ok(()),
        _ => Err(LinkError::Protocol("a heartbeat came with a step or a reason".into())),
    }
}

fn check_sum(stream: &mut impl Read, check: u32, of: &str) -> Result<(), LinkError> {
    let mut sum = [0; 4];
    stream.read_exact(&mut sum).map_err(ended)?;
    match u32::from_le_bytes(sum) == check {
        true => Ok(()),
        false => Err(LinkError::Protocol(format!("the checksum of {of} does not match"))),
    }
}

/// Why a socket brings no more.
pub(super) fn ended(error: std::io::Error) -> LinkError {
    match error.kind() {
        // What a socket with a timeout says when it has passed.
        ErrorKind::WouldBlock | ErrorKind::TimedOut => LinkError::Silent,
        _ => LinkError::Closed(error.to_string()),
    }
}

fn u64_at(head: &Head, at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| head[at + i]))
}

fn u32_at(head: &Head, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| head[at + i]))
}

/// The rest of an activation's frame.
fn read_rest(
    stream: &mut impl Read,
    head: &Head,
    step: u64,
    expected: &[TensorSpec],
) -> Result<Activation, LinkError> {
    check_step(u64_at(head, 24), step)?;
    let mut check = crc32c::crc32c(head);
    let (count, reason_bytes) = (head[COUNT_AT], u32_at(head, 33) as usize);

    let payload = if count == POISON {
        if reason_bytes > MAX_REASON {
            return Err(LinkError::Protocol(format!("a poison reason of {reason_bytes} bytes is too long")));
        }
        let mut reason = vec![0; reason_bytes];
        stream.read_exact(&mut reason).map_err(ended)?;
        check = crc32c::crc32c_append(check, &reason);
        Payload::Poisoned(String::from_utf8_lossy(&reason).into_owned())
    } else {
        if reason_bytes != 0 {
            return Err(LinkError::Protocol(format!("step {step} came with tensors and a poison reason")));
        }
        let mut shapes = vec![0; 9 * expected.len()];
        if usize::from(count) != expected.len() {
            return Err(LinkError::Protocol(format!(
                "step {step} came with {count} tensors, not {}",
                expected.len()
            )));
        }
        stream.read_exact(&mut shapes).map_err(ended)?;
        check = crc32c::crc32c_append(check, &shapes);
        for (shape, want) in shapes.chunks_exact(9).zip(expected) {
            let dim = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| shape[at + i])) as usize;
            if shape[0] != format_code(want.dtype) || dim(1) != want.rows || dim(5) != want.columns {
                return Err(LinkError::Protocol(format!(
                    "step {step} came with another shape than {want:?}"
                )));
            }
        }
        let mut tensors = Vec::with_capacity(expected.len());
        for want in expected {
            let mut bytes = vec![0; want.bytes()];
            stream.read_exact(&mut bytes).map_err(ended)?;
            check = crc32c::crc32c_append(check, &bytes);
            tensors.push(tensor_of(&bytes, want).map_err(|e| LinkError::Protocol(e.to_string()))?);
        }
        Payload::Tensors(Tensors::Host(tensors))
    };
    check_sum(stream, check, &format!("step {step}"))?;
    Ok(Activation { step, payload })
}

fn format_code(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::kernels::tensor::candle_dtype;

    pub fn fence(incarnation: u64) -> Fence {
        Fence { term: 1, pipeline: 0, incarnation }
    }

    pub fn tensor(dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..6).map(|i| i as f32 - 2.5).collect();
        Tensor::from_vec(values, (2, 3), &candle_core::Device::Cpu)
            .unwrap()
            .to_dtype(candle_dtype(dtype))
            .unwrap()
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let frame = |activation: Activation| {
            let mut bytes = Vec::new();
            Frame::of(&fence(1), activation).unwrap().write(&mut bytes).unwrap();
            bytes
        };
        let good =
            frame(Activation { step: 5, payload: Payload::Tensors(Tensors::Host(vec![tensor(DType::F32)])) });
        let want = TensorSpec { dtype: DType::F32, rows: 2, columns: 3 };
        let read = |bytes: &[u8], incarnation, step, want: TensorSpec| {
            read_activation(&mut &bytes[..], &fence(incarnation), step, &[want])
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        read(&good, 1, 5, want).unwrap();
        assert!(read(&good, 2, 5, want).unwrap_err().contains("fence 1.0.1 is not this incarnation's 1.0.2"));
        assert!(read(&good, 1, 6, want).unwrap_err().contains("step 5 while step 6"));
        assert!(read(&good, 1, 5, TensorSpec { rows: 3, ..want }).unwrap_err().contains("another shape"));
        assert!(
            read(&good, 1, 5, TensorSpec { dtype: DType::BF16, ..want })
                .unwrap_err()
                .contains("another shape")
        );
        assert!(read(&good[..good.len() - 1], 1, 5, want).unwrap_err().contains("gone"));
        let mut both = good[..good.len() - 4].to_vec();
        both[HEAD_BYTES - 4] = 1;
        both.extend(crc32c::crc32c(&both).to_le_bytes());
        assert!(read(&both, 1, 5, want).unwrap_err().contains("with tensors and a poison reason"));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(read(&bad, 1, 5, want).is_err(), "flipping a bit of byte {at} went unnoticed");
        }
    }

    #[test]
    fn signs_of_life_may_come_before_an_activation_and_nothing_else() {
        let bytes = |frame: Frame| {
            let mut bytes = Vec::new();
            frame.write(&mut bytes).unwrap();
            bytes
        };
        let beat = bytes(Frame::heartbeat(&fence(1)));
        assert!(beat.len() == HEARTBEAT_BYTES && is_heartbeat(&beat) && !is_heartbeat(&beat[..32]));
        let poison = Activation { step: 3, payload: Payload::Poisoned("why".into()) };
        let poison = bytes(Frame::of(&fence(1), poison).unwrap());
        assert!(!is_heartbeat(&poison));
        let stream = [&beat[..], &beat, &poison].concat();
        let read = read_activation(&mut &stream[..], &fence(1), 3, &[]).unwrap();
        assert!(matches!(read.payload, Payload::Poisoned(why) if why == "why"));
        read_heartbeat(&mut &beat[..], &fence(1)).unwrap();
        assert!(read_heartbeat(&mut &beat[..], &fence(2)).is_err(), "of another incarnation");
        assert!(read_heartbeat(&mut &poison[..], &fence(1)).is_err(), "an activation is none");
        for at in 0..beat.len() {
            let mut bad = beat.clone();
            bad[at] ^= 0x40;
            assert!(
                read_heartbeat(&mut &bad[..], &fence(1)).is_err(),
                "flipping a bit of byte {at} went unnoticed"
            );
        }
    }
}
