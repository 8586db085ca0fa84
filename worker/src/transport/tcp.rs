//! Links over TCP: a handshake that shows the link's token, then one checked frame per step.
//!
//! A frame is a head (magic, fence, step, number of tensors or poison), a shape line per tensor, a payload, and
//! a CRC-32C over all of it. Shapes are compared with what the step announced before anything is allocated.
//! All integers are little-endian. The handshake authenticates; it does not encrypt.

use std::{
    collections::HashMap,
    io::{BufWriter, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use strata_proto::{DType, v1::Fence};

use super::{
    Activation, Downstream, End, Link, LinkError, LinkToken, Payload, Tensors, Transport, Upstream,
    check_step, check_tensors, same_fence,
};
use crate::{
    interrupt::Interrupt,
    kernels::{
        ops::TensorSpec,
        tensor::{bytes_of, spec_of, tensor_of},
    },
};

const HELLO: [u8; 8] = *b"strata\x00\x01";
const FRAME: [u8; 4] = *b"STRF";
/// How long a stranger may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(3);
/// Strangers that may be saying hello at once.
const MAX_STRANGERS: usize = 64;
/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long the ends of a link wait for each other.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Activations a stage may be ahead of the socket.
const IN_FLIGHT: usize = 2;
/// Longest poison reason that is sent on.
const MAX_REASON: usize = 1024;
const HEAD_BYTES: usize = 4 + 8 + 4 + 8 + 8 + 1 + 4;
const POISON: u8 = 255;

/// Links over TCP: the sending end dials.
pub(super) struct Tcp;

impl Transport for Tcp {
    fn upstream(&self, link: Link, mut end: End) -> Result<Box<dyn Upstream>, LinkError> {
        Ok(Box::new(end.announced(link.token)?.accept(end.fence, &end.interrupt)?))
    }

    fn downstream(&self, link: Link, end: End) -> Result<Box<dyn Downstream>, LinkError> {
        Ok(Box::new(dial(&link.address, &link.token, end.fence, &end.interrupt)?))
    }
}

/// Accepts activation links for every stage of a worker.
#[derive(Debug)]
pub(crate) struct Listener {
    address: SocketAddr,
    expected: Arc<Mutex<HashMap<LinkToken, SyncSender<TcpStream>>>>,
}

impl Listener {
    /// Listens on `address`; port 0 picks a free one. Accepts on a thread of its own for the life of the process.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub fn bind(address: impl ToSocketAddrs) -> std::io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        let address = socket.local_addr()?;
        let expected = Arc::<Mutex<HashMap<LinkToken, SyncSender<TcpStream>>>>::default();
        let waiting = expected.clone();
        thread::Builder::new().name("strata-links".into()).spawn(move || {
            let strangers = Arc::new(AtomicUsize::new(0));
            for stream in socket.incoming() {
                let Ok(stream) = stream else {
                    // Out of descriptors, most likely: trying again at once would only burn a core.
                    thread::sleep(ACCEPT_PAUSE);
                    continue;
                };
                if strangers.fetch_add(1, Ordering::Relaxed) >= MAX_STRANGERS {
                    strangers.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let (waiting, strangers_here) = (waiting.clone(), strangers.clone());
                let greeter = thread::Builder::new().name("strata-hello".into()).spawn(move || {
                    if let Err(error) = greet(stream, &waiting) {
                        tracing::warn!(%error, "refused a connection to the activation port");
                    }
                    strangers_here.fetch_sub(1, Ordering::Relaxed);
                });
                if greeter.is_err() {
                    strangers.fetch_sub(1, Ordering::Relaxed);
                }
            }
        })?;
        Ok(Listener { address, expected })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on a peer that shows `token` is let in, once.
    pub fn expect(&self, token: LinkToken) -> Pending {
        let (sender, receiver) = sync_channel(1);
        self.lock().insert(token, sender);
        Pending { token, receiver, expected: self.expected.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<LinkToken, SyncSender<TcpStream>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a hello and hands the stream to whoever expects its token.
fn greet(
    mut stream: TcpStream,
    expected: &Mutex<HashMap<LinkToken, SyncSender<TcpStream>>>,
) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
    stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
    let mut hello = [0; 40];
    stream.read_exact(&mut hello)?;
    if hello[..8] != HELLO {
        return Err(LinkError::Protocol("not a Strata activation link of this version".into()));
    }
    let token = super::link_token(&hello[8..])?;
    let stage = expected.lock().unwrap_or_else(PoisonError::into_inner).remove(&token);
    let Some(stage) = stage else {
        return Err(LinkError::Protocol(
            "the token belongs to no incarnation that is being connected".into(),
        ));
    };
    // The answer proves to the dialer that data flows both ways.
    stream.write_all(&crc32c::crc32c(&hello).to_le_bytes())?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stage.send(stream).map_err(|_| LinkError::Interrupted)
}

/// A stage's claim on the peer that will dial it. Dropping it withdraws the welcome.
#[derive(Debug)]
pub(crate) struct Pending {
    token: LinkToken,
    receiver: Receiver<TcpStream>,
    expected: Arc<Mutex<HashMap<LinkToken, SyncSender<TcpStream>>>>,
}

impl Pending {
    /// The token the peer must show.
    pub fn token(&self) -> &LinkToken {
        &self.token
    }

    /// Waits for the peer.
    ///
    /// # Errors
    /// If it does not come in time, or its socket cannot be watched.
    pub fn accept(self, fence: Fence, interrupt: &Interrupt) -> Result<TcpUpstream, LinkError> {
        let stream = self.accept_stream(interrupt)?;
        Ok(TcpUpstream { stream, fence, interrupt: interrupt.clone() })
    }

    /// Waits for the peer, whose connection is for something else than activations.
    pub(crate) fn accept_stream(self, interrupt: &Interrupt) -> Result<TcpStream, LinkError> {
        let begun = Instant::now();
        loop {
            match self.receiver.recv_timeout(Duration::from_millis(50)) {
                Ok(stream) => {
                    interrupt.watch(&stream)?;
                    return Ok(stream);
                }
                Err(_) if interrupt.is_tripped() => return Err(LinkError::Interrupted),
                Err(_) if begun.elapsed() > CONNECT_TIMEOUT => {
                    return Err(LinkError::Timeout(CONNECT_TIMEOUT));
                }
                Err(_) => {}
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.token);
    }
}

/// Dials the stage after this one.
///
/// # Errors
/// If it cannot be reached, does not know the token, or answers wrongly.
pub(crate) fn dial(
    address: &str,
    token: &LinkToken,
    fence: Fence,
    interrupt: &Interrupt,
) -> Result<TcpDownstream, LinkError> {
    let stream = reach(address, token, interrupt)?;
    let (sender, queue) = sync_channel(IN_FLIGHT);
    let failure = Arc::<Mutex<Option<LinkError>>>::default();
    let report = failure.clone();
    thread::Builder::new().name("strata-send".into()).spawn(move || {
        if let Err(error) = write_frames(&stream, fence, &queue) {
            *report.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    })?;
    Ok(TcpDownstream { sender, failure, interrupt: interrupt.clone() })
}

/// A connection to the stage after this one, which has been shown the link's token.
pub(crate) fn reach(address: &str, token: &LinkToken, interrupt: &Interrupt) -> Result<TcpStream, LinkError> {
    let target = address
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| LinkError::Protocol(format!("{address:?} names no address")))?;
    let mut stream = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT)?;
    interrupt.watch(&stream)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    let mut hello = [0; 40];
    hello[..8].copy_from_slice(&HELLO);
    hello[8..].copy_from_slice(token);
    stream.write_all(&hello)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    if u32::from_le_bytes(answer) != crc32c::crc32c(&hello) {
        return Err(LinkError::Protocol(format!("{address} answered the hello wrongly")));
    }
    Ok(stream)
}

/// The sending end. Frames are encoded and written by a thread of its own.
#[derive(Debug)]
pub(crate) struct TcpDownstream {
    sender: SyncSender<Activation>,
    failure: Arc<Mutex<Option<LinkError>>>,
    interrupt: Interrupt,
}

impl Downstream for TcpDownstream {
    fn send(&mut self, activation: Activation, expected: &[TensorSpec]) -> Result<(), LinkError> {
        check_tensors(&activation, expected)?;
        self.sender.send(activation).map_err(|_| {
            if self.interrupt.is_tripped() {
                return LinkError::Interrupted;
            }
            let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
            failure.unwrap_or_else(|| LinkError::Closed("the sending thread ended".into()))
        })
    }
}

/// The receiving end. Bytes wait in the socket until their step is due.
#[derive(Debug)]
pub(crate) struct TcpUpstream {
    stream: TcpStream,
    fence: Fence,
    interrupt: Interrupt,
}

impl Upstream for TcpUpstream {
    fn receive(&mut self, step: u64, expected: &[TensorSpec]) -> Result<Activation, LinkError> {
        read_frame(&mut self.stream, &self.fence, step, expected)
            .map_err(|error| if self.interrupt.is_tripped() { LinkError::Interrupted } else { error })
    }
}

fn write_frames(stream: &TcpStream, fence: Fence, queue: &Receiver<Activation>) -> Result<(), LinkError> {
    let mut out = BufWriter::with_capacity(256 << 10, stream);
    while let Ok(activation) = queue.recv() {
        write_frame(&mut out, &fence, activation)?;
        out.flush()?;
    }
    Ok(())
}

pub(crate) fn write_frame(
    out: &mut impl Write,
    fence: &Fence,
    activation: Activation,
) -> Result<(), LinkError> {
    let mut head = Vec::with_capacity(HEAD_BYTES + 16);
    head.extend(FRAME);
    head.extend(fence.term.to_le_bytes());
    head.extend(fence.pipeline.to_le_bytes());
    head.extend(fence.incarnation.to_le_bytes());
    head.extend(activation.step.to_le_bytes());
    let mut body = Vec::new();
    match activation.payload {
        Payload::Poisoned(reason) => {
            let mut end = reason.len().min(MAX_REASON);
            while !reason.is_char_boundary(end) {
                end -= 1;
            }
            head.push(POISON);
            head.extend((end as u32).to_le_bytes());
            body.extend(&reason.as_bytes()[..end]);
        }
        Payload::Tensors(tensors) => {
            let tensors = tensors.into_host()?;
            let count = u8::try_from(tensors.len()).ok().filter(|count| *count != POISON);
            head.push(count.ok_or_else(|| LinkError::Protocol("an activation has too many tensors".into()))?);
            head.extend(0u32.to_le_bytes());
            for tensor in &tensors {
                let spec = spec_of(tensor).ok_or_else(|| {
                    let what = "an activation's tensors must be contiguous matrices of f32, bf16 or f16";
                    LinkError::Protocol(what.into())
                })?;
                head.push(format_code(spec.dtype));
                head.extend((spec.rows as u32).to_le_bytes());
                head.extend((spec.columns as u32).to_le_bytes());
                let at = body.len();
                body.resize(at + spec.bytes(), 0);
                bytes_of(tensor, &mut body[at..]);
            }
        }
    }
    let check = crc32c::crc32c_append(crc32c::crc32c(&head), &body);
    out.write_all(&head)?;
    out.write_all(&body)?;
    out.write_all(&check.to_le_bytes())?;
    Ok(())
}

pub(crate) fn read_frame(
    stream: &mut impl Read,
    fence: &Fence,
    step: u64,
    expected: &[TensorSpec],
) -> Result<Activation, LinkError> {
    let closed = |e: std::io::Error| LinkError::Closed(e.to_string());
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).map_err(closed)?;
    if head[..4] != FRAME {
        return Err(LinkError::Protocol("a frame does not begin as one".into()));
    }
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let sent = Fence { term: u64_at(4), pipeline: u32_at(12), incarnation: u64_at(16) };
    same_fence(&sent, fence)?;
    check_step(u64_at(24), step)?;
    let mut check = crc32c::crc32c(&head);
    let (count, reason_bytes) = (head[32], u32_at(33) as usize);

    let payload = if count == POISON {
        if reason_bytes > MAX_REASON {
            return Err(LinkError::Protocol(format!("a poison reason of {reason_bytes} bytes is too long")));
        }
        let mut reason = vec![0; reason_bytes];
        stream.read_exact(&mut reason).map_err(closed)?;
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
        stream.read_exact(&mut shapes).map_err(closed)?;
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
            stream.read_exact(&mut bytes).map_err(closed)?;
            check = crc32c::crc32c_append(check, &bytes);
            tensors.push(tensor_of(&bytes, want).map_err(|e| LinkError::Protocol(e.to_string()))?);
        }
        Payload::Tensors(Tensors::Host(tensors))
    };
    let mut sum = [0; 4];
    stream.read_exact(&mut sum).map_err(closed)?;
    if u32::from_le_bytes(sum) != check {
        return Err(LinkError::Protocol(format!("the checksum of step {step} does not match")));
    }
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
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::kernels::tensor::candle_dtype;

    fn fence(incarnation: u64) -> Fence {
        Fence { term: 1, pipeline: 0, incarnation }
    }

    fn pair(interrupt: &Interrupt) -> (TcpDownstream, TcpUpstream) {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let pending = listener.expect([7; 32]);
        let down = dial(&listener.address().to_string(), &[7; 32], fence(1), interrupt).unwrap();
        (down, pending.accept(fence(1), interrupt).unwrap())
    }

    fn tensor(dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..6).map(|i| i as f32 - 2.5).collect();
        Tensor::from_vec(values, (2, 3), &candle_core::Device::Cpu)
            .unwrap()
            .to_dtype(candle_dtype(dtype))
            .unwrap()
    }

    #[test]
    fn carries_every_format_and_poison() {
        let (mut down, mut up) = pair(&Interrupt::default());
        for (step, dtype) in DType::ALL.into_iter().enumerate() {
            let sent = tensor(dtype);
            let step = step as u64;
            let shape = TensorSpec { dtype, rows: 2, columns: 3 };
            let payload = Payload::Tensors(Tensors::Host(vec![sent.clone()]));
            down.send(Activation { step, payload }, &[shape]).unwrap();
            let got = up.receive(step, &[shape]).unwrap();
            let Payload::Tensors(got) = got.payload else { panic!("poisoned") };
            let flat = |t: Tensor| {
                t.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert_eq!(flat(got.into_host().unwrap().remove(0)), flat(sent));
        }
        let shape = TensorSpec { dtype: DType::F32, rows: 9, columns: 9 };
        down.send(Activation { step: 3, payload: Payload::Poisoned("é".repeat(2000)) }, &[shape]).unwrap();
        let got = up.receive(3, &[shape]).unwrap();
        assert!(matches!(got.payload, Payload::Poisoned(why) if why == "é".repeat(512)));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let frame = |activation: Activation| {
            let mut bytes = Vec::new();
            write_frame(&mut bytes, &fence(1), activation).unwrap();
            bytes
        };
        let good =
            frame(Activation { step: 5, payload: Payload::Tensors(Tensors::Host(vec![tensor(DType::F32)])) });
        let want = TensorSpec { dtype: DType::F32, rows: 2, columns: 3 };
        let read = |bytes: &[u8], incarnation, step, want: TensorSpec| {
            read_frame(&mut &bytes[..], &fence(incarnation), step, &[want])
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
    fn strangers_are_turned_away() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let address = listener.address().to_string();
        let pending = listener.expect([7; 32]);
        let interrupt = Interrupt::default();
        assert!(dial(&address, &[8; 32], fence(1), &interrupt).is_err(), "a wrong token was let in");
        let down = dial(&address, &[7; 32], fence(1), &interrupt).unwrap();
        assert!(dial(&address, &[7; 32], fence(1), &interrupt).is_err(), "a token served twice");
        drop((down, pending));
        drop(listener.expect([9; 32]));
        assert!(dial(&address, &[9; 32], fence(1), &interrupt).is_err(), "a withdrawn token was let in");
    }

    #[test]
    fn an_interrupt_ends_a_blocked_read() {
        let interrupt = Interrupt::default();
        let (_down, mut up) = pair(&interrupt);
        let waiter = thread::spawn(move || up.receive(0, &[]).map(|_| ()));
        interrupt.trip();
        assert!(matches!(waiter.join().unwrap(), Err(LinkError::Interrupted)));
    }
}
