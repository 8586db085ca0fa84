//! Communicators of the real NCCL, and the two ends of a link over them.
//!
//! An activation is one message of known length: 256 bytes (step, and why there are no tensors if there are none), then
//! its tensors. So nothing hangs downstream of a stage that failed.

use std::{
    collections::VecDeque,
    ffi::{c_char, c_int},
    io::ErrorKind,
    mem::MaybeUninit,
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use cudarc::{
    driver::{CudaEvent, CudaStream},
    nccl::sys,
};
use strata_proto::NCCL_ID_BYTES;

use super::{
    Joining,
    library::Nccl,
    watched::{Communicator, Watched},
};
use crate::{
    kernels::cuda::{
        self, CudaError, DeviceTensors, Doing,
        activations::{HEAD, Slots},
        gate::{self, Handle},
        memory::{self, Ptr},
    },
    kernels::ops::TensorSpec,
    transport::{Activation, Downstream, LinkError, Payload, Tensors, Upstream, check_step, check_tensors},
};

/// How long the ranks of a link wait for each other, and for their first message.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long an activation may take. Stages before this one may be slow; that they live is known otherwise.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// Ranks of a link.
const SENDER: c_int = 0;
const RECEIVER: c_int = 1;
/// Activations a stage may be ahead of its successor.
const IN_FLIGHT: usize = 2;

/// A new id, which this process listens for.
///
/// # Errors
/// If NCCL is not there, or refuses.
pub(crate) fn mint_id() -> Result<[u8; NCCL_ID_BYTES], LinkError> {
    let mut id = sys::ncclUniqueId { internal: [0; NCCL_ID_BYTES] };
    let _turn = gate::changing();
    // SAFETY: NCCL writes an id into memory for one.
    unsafe { (Nccl::get()?.get_unique_id)(&mut id) }.result().map_err(|e| failed("making an id", e.0))?;
    Ok(id.internal.map(|b| b as u8))
}

fn failed(doing: &str, error: sys::ncclResult_t) -> LinkError {
    LinkError::Device(reason(doing, error))
}

fn reason(doing: &str, error: sys::ncclResult_t) -> String {
    format!("NCCL, {doing}: {error:?}")
}

impl From<CudaError> for LinkError {
    fn from(error: CudaError) -> Self {
        LinkError::Device(error.survived().to_string())
    }
}

/// One rank of a communicator of two.
struct Rank {
    nccl: &'static Nccl,
    comm: sys::ncclComm_t,
    peer: c_int,
    stream: Handle<Arc<CudaStream>>,
    /// Where the stream has to come to.
    asked: Handle<CudaEvent>,
    /// A connection to the other rank's process.
    process: TcpStream,
}

impl Rank {
    /// Begins to join; [`Communicator::poll`] says when it is done.
    fn join(joining: &Joining, rank: c_int) -> Result<Self, LinkError> {
        let process = joining.peer.try_clone()?;
        process.set_nonblocking(true)?;
        let nccl = Nccl::get()?;
        let context = cuda::context(joining.gpu)?;
        context.bind_to_thread().doing("binding a GPU")?;
        let stream = Handle::new(|| context.new_stream()).doing("making a stream")?;
        let asked = Handle::new(|| context.new_event(None)).doing("making an event")?;
        asked.record(&stream).doing("making an event")?;
        let id = sys::ncclUniqueId { internal: joining.id.map(|b| b as c_char) };
        let mut config = config();
        let mut comm = MaybeUninit::uninit();
        // SAFETY: both are valid for the call; the communicator is aborted before it is forgotten.
        let asked_for = unsafe { (nccl.init_rank)(comm.as_mut_ptr(), 2, id, rank, &mut config) };
        asked_for.result().map_err(|e| failed("joining", e.0))?;
        // SAFETY: NCCL has written it, as it did not refuse.
        let comm = unsafe { comm.assume_init() };
        Ok(Rank { nccl, comm, peer: SENDER + RECEIVER - rank, stream, asked, process })
    }

    /// Sends a message, or receives one; in order with what else is asked of the stream.
    fn exchange(&mut self, at: Ptr, bytes: u64, send: bool) -> Result<(), LinkError> {
        let (kind, stream) = (sys::ncclDataType_t::ncclUint8, self.stream.cu_stream().cast());
        // SAFETY: `at` is memory of this GPU, of so many bytes, that stays until the stream has come past this.
        let asked_for = unsafe {
            match send {
                true => (self.nccl.send)(at.raw(), bytes as usize, kind, self.peer, self.comm, stream),
                false => {
                    (self.nccl.recv)(at.raw().cast_mut(), bytes as usize, kind, self.peer, self.comm, stream)
                }
            }
        };
        asked_for.result().map_err(|e| failed(if send { "sending" } else { "receiving" }, e.0))?;
        Ok(())
    }

    /// All that was asked for up to now is what is to be waited for.
    fn mark(&self) -> Result<(), LinkError> {
        Ok(self.asked.record(&self.stream).doing("making an event")?)
    }
}

impl Rank {
    /// Whether NCCL has taken note of what was asked for: only then is it on the stream, if not done.
    fn is_settled(&mut self) -> Result<bool, String> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives, and belongs to this thread.
        let asked = unsafe { (self.nccl.async_error)(self.comm, &mut state) };
        asked.result().map_err(|e| reason("asking for errors", e.0))?;
        match state {
            sys::ncclResult_t::ncclSuccess => Ok(true),
            sys::ncclResult_t::ncclInProgress => self.not_yet(),
            error => Err(reason("its other end", error)),
        }
    }

    /// Whether the stream has come to where it has to.
    fn is_done(&self) -> Result<bool, CudaError> {
        self.asked.try_is_complete().doing("waiting for NCCL's stream")
    }

    /// That something is not done, as long as there is somebody to do it.
    fn not_yet(&self) -> Result<bool, String> {
        // Nothing is ever sent on it: what comes is its end.
        match self.process.peek(&mut [0]) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
            _ => Err("the other rank's process ended, or aborted".into()),
        }
    }
}

impl Communicator for Rank {
    fn poll(&mut self) -> Result<bool, String> {
        let settled = self.is_settled()?;
        if settled && self.is_done().map_err(|e| e.to_string())? {
            return Ok(true);
        }
        self.not_yet()
    }

    fn abort(&mut self) {
        // The other rank aborts, too, when it sees this end.
        let _ = self.process.shutdown(Shutdown::Both);
        let begun = Instant::now();
        let _turn = gate::changing();
        // SAFETY: called once, and nothing is asked of the communicator after it.
        let aborted = unsafe { (self.nccl.abort)(self.comm) };
        if let Err(error) = aborted.result() {
            tracing::warn!(error = ?error.0, "aborting an NCCL communicator");
        }
        // What was asked for after a message that never came is done now; only then may its buffers go.
        if let Err(error) = self.stream.synchronize().doing("ending a communicator") {
            tracing::warn!(%error, "waiting for the stream of an aborted NCCL communicator");
        }
        tracing::info!(elapsed_ms = begun.elapsed().as_millis() as u64, "aborted an NCCL communicator");
    }
}

/// Everything by default, but that no call blocks (`NCCL_CONFIG_INITIALIZER` of nccl.h).
fn config() -> sys::ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 2 * 10_000 + 27 * 100,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
    }
}

/// One end, and its buffers.
struct End {
    rank: Watched<Rank>,
    slots: Slots,
}

impl End {
    /// Joins, and exchanges the link's token in a message of the largest size: that verifies the link, and allocates
    /// all that NCCL needs before the first step.
    fn join(joining: Joining, rank: c_int) -> Result<Self, LinkError> {
        let _turn = gate::changing();
        let mut watched = Watched::new(Rank::join(&joining, rank)?, joining.interrupt.clone());
        watched.wait(CONNECT_TIMEOUT)?;
        let context = watched.get().stream.context().clone();
        let slots = Slots::new(&context, &joining.longest, IN_FLIGHT + 1)?;
        let mut end = End { rank: watched, slots };
        let mut hello = end.slots.tensors(joining.longest)?;
        if rank == SENDER {
            hello.staging().0[..32].copy_from_slice(&joining.token);
            end.send(&mut hello)?;
            end.rank.wait(CONNECT_TIMEOUT)?;
        } else if end.receive(&mut hello, CONNECT_TIMEOUT)?[..32] != joining.token {
            return Err(LinkError::Protocol("the other rank is of another link".into()));
        }
        Ok(end)
    }

    /// Asks for a message of `tensors` to be sent, after the head in its staging memory.
    fn send(&mut self, tensors: &mut DeviceTensors) -> Result<(), LinkError> {
        let (frame, bytes) = (tensors.frame(), HEAD + tensors.bytes());
        let rank = self.rank.get();
        memory::upload(&rank.stream, frame, &tensors.staging().0[..HEAD as usize])?;
        rank.exchange(frame, bytes, true)?;
        self.rank.wait_until(Rank::is_settled, STEP_TIMEOUT)?;
        self.rank.get().mark()
    }

    /// Waits for a message with such tensors; gives its head.
    fn receive<'a>(
        &mut self,
        tensors: &'a mut DeviceTensors,
        timeout: Duration,
    ) -> Result<&'a [u8], LinkError> {
        let (frame, bytes) = (tensors.frame(), HEAD + tensors.bytes());
        let head = &mut tensors.staging().0[..HEAD as usize];
        self.rank.get().exchange(frame, bytes, false)?;
        self.rank.wait_until(Rank::is_settled, timeout)?;
        let rank = self.rank.get();
        memory::download(&rank.stream, head, frame)?;
        rank.mark()?;
        self.rank.wait(timeout)?;
        Ok(head)
    }
}

/// The sending end.
pub(super) struct NcclDownstream {
    /// Activations that are under way, oldest first. The communicator goes first, so that nothing reads them any more.
    end: End,
    sending: VecDeque<DeviceTensors>,
}

impl NcclDownstream {
    pub fn join(joining: Joining) -> Result<Self, LinkError> {
        Ok(NcclDownstream { end: End::join(joining, SENDER)?, sending: VecDeque::new() })
    }
}

impl Downstream for NcclDownstream {
    fn send(&mut self, activation: Activation, expected: &[TensorSpec]) -> Result<(), LinkError> {
        check_tensors(&activation, expected)?;
        if self.sending.len() >= IN_FLIGHT {
            // All of them: NCCL says of the last one only.
            self.end.rank.wait(STEP_TIMEOUT)?;
            self.sending.clear();
        }
        let room = || self.end.slots.tensors(expected.to_vec());
        let (mut tensors, poison) = match activation.payload {
            Payload::Tensors(Tensors::Device(tensors)) => (tensors, None),
            Payload::Tensors(Tensors::Host(tensors)) => (room()?.fill(&tensors)?, None),
            Payload::Poisoned(reason) => (room()?, Some(reason)),
        };
        write_head(tensors.staging().0, activation.step, poison.as_deref());
        self.end.send(&mut tensors)?;
        self.sending.push_back(tensors);
        Ok(())
    }
}

/// The receiving end.
pub(super) struct NcclUpstream {
    end: End,
}

impl NcclUpstream {
    pub fn join(joining: Joining) -> Result<Self, LinkError> {
        Ok(NcclUpstream { end: End::join(joining, RECEIVER)? })
    }
}

impl Upstream for NcclUpstream {
    fn receive(&mut self, step: u64, expected: &[TensorSpec]) -> Result<Activation, LinkError> {
        let mut tensors = self.end.slots.tensors(expected.to_vec())?;
        let head = self.end.receive(&mut tensors, STEP_TIMEOUT)?;
        let (sent, poison) = read_head(head);
        check_step(sent, step)?;
        let payload = match poison {
            Some(reason) => Payload::Poisoned(reason),
            None => Payload::Tensors(Tensors::Device(tensors)),
        };
        Ok(Activation { step, payload })
    }
}

/// Step, whether it is poisoned, and why, cut to what there is room for.
fn write_head(head: &mut [u8], step: u64, poison: Option<&str>) {
    let head = &mut head[..HEAD as usize];
    head.fill(0);
    head[..8].copy_from_slice(&step.to_le_bytes());
    if let Some(reason) = poison {
        let mut end = reason.len().min(HEAD as usize - 10);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        head[8] = 1;
        head[9] = end as u8;
        head[10..10 + end].copy_from_slice(&reason.as_bytes()[..end]);
    }
}

fn read_head(head: &[u8]) -> (u64, Option<String>) {
    let step = u64::from_le_bytes(std::array::from_fn(|i| head[i]));
    let reason = &head[10..][..usize::from(head[9]).min(HEAD as usize - 10)];
    (step, (head[8] != 0).then(|| String::from_utf8_lossy(reason).into_owned()))
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        thread,
        time::{Duration, Instant},
    };

    use candle_core::{Device, Tensor};
    use strata_proto::DType;

    use super::*;
    use crate::{interrupt::Interrupt, kernels::cuda::tests::emulator};

    const SHAPE: TensorSpec = TensorSpec { dtype: DType::F32, rows: 2, columns: 3 };

    /// Both ends of a link between two emulated GPUs.
    fn pair(tokens: [u8; 2]) -> (Result<NcclDownstream, LinkError>, Result<NcclUpstream, LinkError>) {
        emulator();
        let id = mint_id().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        let joining = move |gpu: usize, peer| Joining {
            id,
            token: [tokens[gpu]; 32],
            peer,
            gpu,
            longest: vec![TensorSpec { rows: 64, ..SHAPE }],
            interrupt: Interrupt::default(),
        };
        thread::scope(|scope| {
            let down = scope.spawn(move || Carried(NcclDownstream::join(joining(0, near))));
            let up = NcclUpstream::join(joining(1, far));
            (down.join().unwrap().0, up)
        })
    }

    /// Carries an end out of the thread that joined it, which ends with that.
    struct Carried<T>(T);
    // SAFETY: a communicator may be used by one thread at a time, which is what happens.
    unsafe impl<T> Send for Carried<T> {}

    #[test]
    fn rows_and_poison_arrive_in_order_and_the_end_of_a_process_is_noticed() {
        let (down, up) = pair([7, 7]);
        let (mut down, mut up) = (down.unwrap(), up.unwrap());
        let tensor = Tensor::from_vec(vec![1f32, -2.0, 3.5, 0.0, 5.0, 6.0], (2, 3), &Device::Cpu).unwrap();
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for step in 0..6 {
            let payload = match step % 3 {
                2 => Payload::Poisoned(format!("reason {step}")),
                _ => Payload::Tensors(Tensors::Host(vec![tensor.clone()])),
            };
            down.send(Activation { step, payload }, &[SHAPE]).unwrap();
            match up.receive(step, &[SHAPE]).unwrap().payload {
                Payload::Poisoned(why) => assert_eq!(why, format!("reason {step}")),
                Payload::Tensors(got) => {
                    assert!(step % 3 < 2 && got.fit(&[SHAPE]));
                    assert_eq!(flat(got.into_host().unwrap().remove(0)), flat(tensor.clone()));
                }
            }
        }
        // The emulated NCCL does not notice by itself.
        let begun = Instant::now();
        let sender = thread::spawn({
            let down = Carried(down);
            move || {
                thread::sleep(Duration::from_millis(200));
                drop(down);
            }
        });
        let error = up.receive(6, &[SHAPE]).unwrap_err();
        assert!(matches!(&error, LinkError::Closed(why) if why.contains("process ended")), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
        sender.join().unwrap();
    }

    #[test]
    fn both_ranks_abort_when_one_does() {
        let (down, up) = pair([7, 7]);
        let (mut down, mut up) = (down.unwrap(), up.unwrap());
        let failed = down.end.rank.wait_until(|_| Err("it failed".into()), Duration::from_secs(60));
        assert!(matches!(failed, Err(LinkError::Closed(why)) if why == "it failed"));
        // What aborted is still there; an abort may take long, and until it is done nothing else goes.
        let error = up.receive(0, &[SHAPE]).unwrap_err();
        assert!(matches!(&error, LinkError::Closed(why) if why.contains("process ended")), "{error}");
        drop(down);
    }

    #[test]
    fn ranks_of_different_links_are_told_apart() {
        let (_, up) = pair([7, 8]);
        assert!(matches!(up.err(), Some(LinkError::Protocol(why)) if why.contains("another link")));
    }

    #[test]
    fn heads_carry_steps_and_reasons() {
        let mut head = [0xff; 300];
        write_head(&mut head, 7, None);
        assert_eq!(read_head(&head), (7, None));
        write_head(&mut head, u64::MAX, Some(&"é".repeat(200)));
        assert_eq!(read_head(&head), (u64::MAX, Some("é".repeat(123))));
        write_head(&mut head, 1, Some(""));
        assert_eq!(read_head(&head), (1, Some(String::new())));
    }
}
