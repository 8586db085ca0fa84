//! Links over TCP: a handshake that shows the link's token, then one checked frame per step, and signs of life.
//!
//! The handshake authenticates; it does not encrypt.

mod ends;
mod frame;
mod strangers;

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

#[cfg(feature = "fuzzing")]
pub(crate) use self::frame::{Frame, HEARTBEAT_BYTES, read_activation};
use self::{
    ends::{TcpDownstream, TcpUpstream},
    frame::ended,
    strangers::{Place, Strangers},
};
use super::{Downstream, End, Link, LinkError, LinkToken, Transport, Upstream};
use crate::sparing::Sparing;

const HELLO: [u8; 8] = *b"strata\x00\x01";
/// How long the answer to a hello may take to be sent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often who waits for a peer looks whether it is still to wait.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Links over TCP: the sending end dials.
pub(super) struct Tcp;

impl Transport for Tcp {
    fn upstream(&self, link: Link, mut end: End) -> Result<Box<dyn Upstream>, LinkError> {
        let socket = end.announced(link.token)?.accept(&end)?;
        Ok(Box::new(TcpUpstream::start(socket, &end)?))
    }

    fn downstream(&self, link: Link, end: End) -> Result<Box<dyn Downstream>, LinkError> {
        Ok(Box::new(TcpDownstream::start(dial(&link.address, &link.token, &end)?, &end)?))
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
            static REFUSALS: Sparing = Sparing::new();
            let strangers = Strangers::default();
            for stream in socket.incoming() {
                let Ok(stream) = stream else {
                    // Out of descriptors, most likely: trying again at once would only burn a core.
                    thread::sleep(ACCEPT_PAUSE);
                    continue;
                };
                let Ok(place) = strangers.welcome(&stream) else { continue };
                let waiting = waiting.clone();
                let greeter = thread::Builder::new().name("strata-hello".into()).spawn(move || {
                    if let Err(error) = greet(stream, place, &waiting)
                        && REFUSALS.may_tell()
                    {
                        tracing::warn!(%error, "refused a connection to the activation port");
                    }
                });
                // Where no thread is to be had, this one is refused.
                drop(greeter);
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
    place: Place,
    expected: &Mutex<HashMap<LinkToken, SyncSender<TcpStream>>>,
) -> Result<(), LinkError> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let hello: [u8; 40] = place.hello(&mut stream)?;
    if hello[..8] != HELLO {
        return Err(LinkError::Protocol("not a Strata activation link of this version".into()));
    }
    let token = super::link_token(&hello[8..])?;
    if !place.leave() {
        return Err(LinkError::Interrupted);
    }
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
    pub fn accept(self, end: &End) -> Result<TcpStream, LinkError> {
        // Longer than the peer takes to find out that it gets no answer, which says more.
        let (begun, timeout) = (Instant::now(), 2 * end.timeout);
        loop {
            match self.receiver.recv_timeout(LOOK_EVERY) {
                Ok(stream) => {
                    end.interrupt.watch(&stream)?;
                    return Ok(stream);
                }
                Err(_) if end.interrupt.is_tripped() => return Err(LinkError::Interrupted),
                Err(_) if begun.elapsed() > timeout => return Err(LinkError::Timeout(timeout)),
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

/// A connection to the stage after this one, which has been shown the link's token.
///
/// # Errors
/// If it cannot be reached, does not know the token, or answers wrongly.
pub(crate) fn dial(address: &str, token: &LinkToken, end: &End) -> Result<TcpStream, LinkError> {
    let target = address
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| LinkError::Protocol(format!("{address:?} names no address")))?;
    let silent = |error: LinkError| match error {
        LinkError::Silent => LinkError::Timeout(end.timeout),
        error => error,
    };
    let mut stream = TcpStream::connect_timeout(&target, end.timeout).map_err(|e| silent(ended(e)))?;
    end.interrupt.watch(&stream)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(end.timeout))?;
    let mut hello = [0; 40];
    hello[..8].copy_from_slice(&HELLO);
    hello[8..].copy_from_slice(token);
    stream.write_all(&hello)?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).map_err(|e| silent(ended(e)))?;
    if u32::from_le_bytes(answer) != crc32c::crc32c(&hello) {
        return Err(LinkError::Protocol(format!("{address} answered the hello wrongly")));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use strata_proto::DType;

    use super::{
        frame::tests::{fence, tensor},
        *,
    };
    use crate::{
        interrupt::Interrupt,
        kernels::ops::TensorSpec,
        transport::{Activation, Payload, Tensors},
    };

    fn pair(interrupt: &Interrupt) -> (TcpDownstream, TcpUpstream) {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let pending = listener.expect([7; 32]);
        let end = || End::of(fence(1), interrupt.clone());
        let down = dial(&listener.address().to_string(), &[7; 32], &end()).unwrap();
        let up = pending.accept(&end()).unwrap();
        (TcpDownstream::start(down, &end()).unwrap(), TcpUpstream::start(up, &end()).unwrap())
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
            let flat = |t: candle_core::Tensor| {
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
    fn strangers_are_turned_away() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let address = listener.address().to_string();
        let pending = listener.expect([7; 32]);
        let end = End::of(fence(1), Interrupt::default());
        assert!(dial(&address, &[8; 32], &end).is_err(), "a wrong token was let in");
        let down = dial(&address, &[7; 32], &end).unwrap();
        assert!(dial(&address, &[7; 32], &end).is_err(), "a token served twice");
        drop((down, pending));
        drop(listener.expect([9; 32]));
        assert!(dial(&address, &[9; 32], &end).is_err(), "a withdrawn token was let in");
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
