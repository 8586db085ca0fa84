//! The two ends of a TCP link, which notice that the other one is silent.
//!
//! A stage may compute for minutes, and one may have nothing to do for days; neither is silence. So the receiving end
//! sends a sign of life four times in the time after which it would be missed, and the sending end answers each by
//! one, unless it is about to send an activation anyway. Both on threads of their own, so that no computation delays
//! them. Keepalives and timeouts of TCP do not see what is to be seen here: the system acknowledges for a process
//! that is stopped, and so does whatever stands between two machines and forwards no more.

use std::{
    io::{BufWriter, ErrorKind},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use strata_proto::{Side, v1::Fence};

use super::frame::{Frame, HEARTBEAT_BYTES, ended, is_heartbeat, read_activation, read_heartbeat};
use crate::{
    health::Neighbours,
    interrupt::Interrupt,
    kernels::ops::TensorSpec,
    transport::{Activation, Downstream, End, LinkError, Upstream, check_tensors},
};

/// Activations a stage may be ahead of the socket.
const IN_FLIGHT: usize = 2;
/// Bytes that are gathered before they are written.
const WRITE_BUFFER: usize = 256 << 10;
/// Signs of life in the time after which they would be missed.
const HEARTBEATS: u32 = 4;

/// What the threads of one end have in common.
struct Shared {
    side: Side,
    fence: Fence,
    interrupt: Interrupt,
    neighbours: Neighbours,
    timeout: Duration,
    /// When something last came, whoever read it.
    heard: Mutex<Instant>,
    /// For closing; who reads or writes has its own handle.
    socket: TcpStream,
    /// What ended the link first: what follows is a consequence.
    failure: Mutex<Option<LinkError>>,
}

impl Shared {
    fn new(socket: &TcpStream, side: Side, end: &End) -> Result<Arc<Self>, LinkError> {
        // Of all handles: a read or write that has to wait longer is in vain.
        socket.set_read_timeout(Some(end.timeout))?;
        let End { fence, timeout, .. } = *end;
        let (interrupt, neighbours) = (end.interrupt.clone(), end.neighbours.clone());
        let (heard, socket, failure) = (Mutex::new(Instant::now()), socket.try_clone()?, Mutex::default());
        Ok(Arc::new(Shared { side, fence, interrupt, neighbours, timeout, heard, socket, failure }))
    }

    /// The link has failed: whoever waits for it is woken.
    fn fail(&self, error: LinkError) {
        // Not if it is only that this end was ended itself.
        let error = if self.interrupt.is_tripped() { LinkError::Interrupted } else { error };
        self.neighbours.failed(self.side, error.health());
        lock(&self.failure).get_or_insert(error);
        // A socket that is closed already is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// What ended the link.
    fn why(&self) -> LinkError {
        if self.interrupt.is_tripped() {
            return LinkError::Interrupted;
        }
        lock(&self.failure).take().unwrap_or_else(|| LinkError::Closed("the link has failed before".into()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sending end. Frames are encoded and written by a thread of its own; another one listens for signs of life.
pub(crate) struct TcpDownstream {
    queue: SyncSender<Activation>,
    shared: Arc<Shared>,
}

impl TcpDownstream {
    /// The sending end over a connection that was shown the link's token.
    ///
    /// # Errors
    /// If there can be no threads.
    pub fn start(socket: TcpStream, end: &End) -> Result<Self, LinkError> {
        let shared = Shared::new(&socket, Side::Downstream, end)?;
        let (queue, activations) = sync_channel(IN_FLIGHT);
        let writer = Arc::new(Mutex::new(BufWriter::with_capacity(WRITE_BUFFER, socket.try_clone()?)));
        let (sending, writing) = (shared.clone(), writer.clone());
        thread::Builder::new().name("strata-send".into()).spawn(move || {
            let ended = send(&sending, &writing, &activations);
            sending.fail(ended.err().unwrap_or(LinkError::Interrupted));
        })?;
        let hearing = shared.clone();
        thread::Builder::new().name("strata-hear".into()).spawn(move || {
            if let Err(error) = hear(&hearing, socket, &writer) {
                hearing.fail(error);
            }
        })?;
        Ok(TcpDownstream { queue, shared })
    }
}

impl Downstream for TcpDownstream {
    fn send(&mut self, activation: Activation, expected: &[TensorSpec]) -> Result<(), LinkError> {
        check_tensors(&activation, expected)?;
        self.queue.send(activation).map_err(|_| self.shared.why())
    }
}

type Writer = Mutex<BufWriter<TcpStream>>;

/// Writes activations until there will be none.
fn send(shared: &Shared, writer: &Writer, activations: &Receiver<Activation>) -> Result<(), LinkError> {
    while let Ok(activation) = activations.recv() {
        // May take as long as a step, which is no silence: the writer is free meanwhile.
        let frame = Frame::of(&shared.fence, activation)?;
        frame.write(&mut *lock(writer)).map_err(ended)?;
    }
    Ok(())
}

/// Answers signs of life until they stay away; never returns `Ok`.
fn hear(shared: &Shared, mut socket: TcpStream, writer: &Writer) -> Result<(), LinkError> {
    let answer = Frame::heartbeat(&shared.fence);
    loop {
        read_heartbeat(&mut socket, &shared.fence)?;
        match writer.try_lock() {
            Ok(mut writer) => answer.write(&mut *writer).map_err(ended)?,
            // An activation is as good a sign.
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Poisoned(_)) => {
                return Err(LinkError::Closed("the sending thread ended".into()));
            }
        }
    }
}

/// The receiving end. Bytes wait in the socket until their step is due; a thread of its own reads signs of life.
pub(crate) struct TcpUpstream {
    socket: Arc<Mutex<TcpStream>>,
    shared: Arc<Shared>,
    /// Ends the thread when it is dropped.
    _ends: Sender<()>,
}

impl TcpUpstream {
    /// The receiving end over a connection that has shown the link's token.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(socket: TcpStream, end: &End) -> Result<Self, LinkError> {
        let shared = Shared::new(&socket, Side::Upstream, end)?;
        let (ends, ended) = channel();
        let socket = Arc::new(Mutex::new(socket));
        let (watching, watched) = (shared.clone(), socket.clone());
        thread::Builder::new().name("strata-watch".into()).spawn(move || {
            if let Err(error) = watch(&watching, &watched, &ended) {
                watching.fail(error);
            }
        })?;
        Ok(TcpUpstream { socket, shared, _ends: ends })
    }
}

impl Upstream for TcpUpstream {
    fn receive(&mut self, step: u64, expected: &[TensorSpec]) -> Result<Activation, LinkError> {
        let mut socket = lock(&self.socket);
        let read = read_activation(&mut *socket, &self.shared.fence, step, expected);
        // With it came the signs of life before it, which the thread that looks for them will not see.
        *lock(&self.shared.heard) = Instant::now();
        drop(socket);
        read.map_err(|error| {
            self.shared.fail(error);
            self.shared.why()
        })
    }
}

/// Gives signs of life, and reads those of the sending end while nobody else reads, until the end is dropped.
fn watch(shared: &Shared, socket: &Mutex<TcpStream>, ends: &Receiver<()>) -> Result<(), LinkError> {
    let sign = Frame::heartbeat(&shared.fence);
    let mut writer = BufWriter::new(shared.socket.try_clone()?);
    while ends.recv_timeout(shared.timeout / HEARTBEATS) == Err(RecvTimeoutError::Timeout) {
        sign.write(&mut writer).map_err(ended)?;
        match socket.try_lock() {
            Ok(mut socket) => {
                if read_heartbeats(shared, &mut socket)? {
                    *lock(&shared.heard) = Instant::now();
                } else if lock(&shared.heard).elapsed() > shared.timeout {
                    return Err(LinkError::Silent);
                }
            }
            // The stage waits for an activation, and notices silence itself.
            Err(_) => *lock(&shared.heard) = Instant::now(),
        }
    }
    Ok(())
}

/// Reads the signs of life that have come; whether anything has. An activation stays for the stage, with all behind it.
fn read_heartbeats(shared: &Shared, socket: &mut TcpStream) -> Result<bool, LinkError> {
    let mut heard = false;
    loop {
        let mut begin = [0; HEARTBEAT_BYTES];
        socket.set_nonblocking(true)?;
        let come = socket.peek(&mut begin);
        socket.set_nonblocking(false)?;
        match come {
            Ok(0) => return Err(LinkError::Closed("it closed the link".into())),
            Ok(HEARTBEAT_BYTES) if is_heartbeat(&begin) => {
                read_heartbeat(socket, &shared.fence)?;
                heard = true;
            }
            Ok(_) => return Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(heard),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(ended(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use strata_proto::v1::LinkHealth;

    use super::*;
    use crate::transport::{
        Payload, Tensors,
        tcp::frame::tests::{fence, tensor},
    };

    const TIMEOUT: Duration = Duration::from_millis(200);

    fn end() -> End {
        End { timeout: TIMEOUT, ..End::of(fence(1), Interrupt::default()) }
    }

    /// Two sockets that are connected.
    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (dialled, listener.accept().unwrap().0)
    }

    fn activation(step: u64) -> (Activation, TensorSpec) {
        let dtype = strata_proto::DType::F32;
        let payload = Payload::Tensors(Tensors::Host(vec![tensor(dtype)]));
        (Activation { step, payload }, TensorSpec { dtype, rows: 2, columns: 3 })
    }

    /// Waits until an end says how its link is, other than well.
    fn health(end: &End, side: Side) -> LinkHealth {
        let waited = end.neighbours.until_failed(side);
        futures::executor::block_on(waited)
    }

    #[test]
    fn a_long_step_and_a_long_pause_are_no_silence() {
        let (down, up) = sockets();
        let mut down = TcpDownstream::start(down, &end()).unwrap();
        let mut up = TcpUpstream::start(up, &end()).unwrap();
        for step in 0..3 {
            // The second activation waits while the first one is computed.
            let (first, shape) = activation(2 * step);
            let (second, _) = activation(2 * step + 1);
            down.send(first, &[shape]).unwrap();
            down.send(second, &[shape]).unwrap();
            up.receive(2 * step, &[shape]).unwrap();
            thread::sleep(3 * TIMEOUT);
            up.receive(2 * step + 1, &[shape]).unwrap();
            thread::sleep(3 * TIMEOUT);
        }
    }

    #[test]
    fn a_stage_that_always_reads_what_comes_hears_it() {
        let (down, up) = sockets();
        let mut down = TcpDownstream::start(down, &end()).unwrap();
        let up_end = end();
        let mut up = TcpUpstream::start(up, &up_end).unwrap();
        let begun = Instant::now();
        for step in 0.. {
            let (sent, shape) = activation(step);
            down.send(sent, &[shape]).unwrap();
            up.receive(step, &[shape]).unwrap();
            // Nothing that came is left for the thread that watches.
            thread::sleep(TIMEOUT / 40);
            if begun.elapsed() > 5 * TIMEOUT {
                break;
            }
        }
    }

    #[test]
    fn each_end_misses_the_other_while_it_waits_and_while_it_does_not() {
        // The peer is a socket that nobody reads or writes, as of a process that is stopped.
        let (silent, socket) = sockets();
        let idle = end();
        let _up = TcpUpstream::start(socket, &idle).unwrap();
        assert_eq!(health(&idle, Side::Upstream), LinkHealth::Silent);
        drop(silent);

        let (_silent, socket) = sockets();
        let waiting = end();
        let mut up = TcpUpstream::start(socket, &waiting).unwrap();
        let (_, shape) = activation(0);
        assert!(matches!(up.receive(0, &[shape]), Err(LinkError::Silent)));
        assert_eq!(health(&waiting, Side::Upstream), LinkHealth::Silent);

        let (socket, _silent) = sockets();
        let sending = end();
        let mut down = TcpDownstream::start(socket, &sending).unwrap();
        assert_eq!(health(&sending, Side::Downstream), LinkHealth::Silent);
        let refused = (0..=IN_FLIGHT as u64 + 1).find_map(|step| {
            let (activation, shape) = activation(step);
            down.send(activation, &[shape]).err()
        });
        assert!(matches!(refused, Some(LinkError::Silent)), "{refused:?}");
    }

    #[test]
    fn a_peer_that_closes_is_told_from_one_that_is_silent() {
        let (gone, socket) = sockets();
        let idle = end();
        let _up = TcpUpstream::start(socket, &idle).unwrap();
        drop(gone);
        assert_eq!(health(&idle, Side::Upstream), LinkHealth::Broken);
    }
}
