//! A TCP proxy that can be told to misbehave, for links between workers.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What becomes of bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// They arrive.
    #[default]
    None,
    /// They are swallowed; sockets stay open.
    Blackhole,
    /// One bit of the next ones is another one, and then all is well.
    Flip,
    /// Half of the next ones arrive, and their connection is closed; then all is well.
    Truncate,
    /// A connection is closed; then all is well.
    Cut,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From who dials.
    Forth,
    /// To who dials.
    Back,
    /// Either.
    Both,
}

/// A proxy; it and its connections end when it is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    ways: [Arc<watch::Sender<Fault>>; 2],
    carried: Arc<AtomicU64>,
    _ends: watch::Sender<()>,
}

impl Proxy {
    /// One before whoever listens at `target`, or will.
    pub async fn to(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ways = [(); 2].map(|()| Arc::<watch::Sender<Fault>>::default());
        let carried = Arc::<AtomicU64>::default();
        let (ends, ended) = watch::channel(());
        let (ways_here, count) = (ways.clone(), carried.clone());
        tokio::spawn(async move {
            loop {
                let client = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    () = closed(ended.clone()) => return,
                };
                // Who listens there may have ended.
                let Ok(server) = TcpStream::connect(target).await else { continue };
                [&client, &server].iter().for_each(|socket| socket.set_nodelay(true).unwrap());
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let ([forth, back], count, ended) = (ways_here.clone(), count.clone(), ended.clone());
                tokio::spawn(async move {
                    // Whichever ends first ends the other: the halves of both sockets are dropped.
                    tokio::select! {
                        () = carry(from_client, to_server, &forth, &count) => {}
                        () = carry(from_server, to_client, &back, &count) => {}
                        () = closed(ended) => {}
                    }
                });
            }
        });
        Proxy { address, ways, carried, _ends: ends }
    }

    /// From now on, bytes on this way have this fault; those of connections to come, too.
    pub fn set(&self, way: Way, fault: Fault) {
        for (sender, own) in self.ways.iter().zip([Way::Forth, Way::Back]) {
            if way == own || way == Way::Both {
                sender.send_replace(fault);
            }
        }
    }

    /// Bytes that have arrived, both ways.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

/// Returns when the proxy is dropped.
async fn closed(mut ended: watch::Receiver<()>) {
    while ended.changed().await.is_ok() {}
}

/// Carries bytes until an end is gone or a fault ends the connection.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    faults: &watch::Sender<Fault>,
    carried: &AtomicU64,
) {
    let mut bytes = vec![0; 64 << 10];
    let mut changes = faults.subscribe();
    loop {
        let read = tokio::select! {
            read = from.read(&mut bytes) => read.unwrap_or(0),
            _ = changes.wait_for(|fault| *fault == Fault::Cut) => 0,
        };
        // What happens once has happened.
        let mut fault = Fault::None;
        faults.send_if_modified(|now| {
            fault = *now;
            let once = !matches!(fault, Fault::None | Fault::Blackhole);
            *now = if once { Fault::None } else { fault };
            once
        });
        let arrive = match fault {
            _ if read == 0 => return,
            Fault::None => read,
            Fault::Blackhole => 0,
            Fault::Flip => {
                bytes[read / 2] ^= 0x10;
                read
            }
            Fault::Truncate => read / 2,
            Fault::Cut => return,
        };
        if to.write_all(&bytes[..arrive]).await.is_err() || fault == Fault::Truncate {
            return;
        }
        carried.fetch_add(arrive as u64, Ordering::Relaxed);
    }
}
