//! Connections to a port: HTTP/2 goes on to the server, and who speaks something else is told.

use std::{future::poll_fn, io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::{peer::Connection, places::Places};

/// How long a client may take to say its first bytes, and one that is refused to read why.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed: most likely files are used up, and there is no event for when one is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Most bytes of a request in HTTP/1 that are read before its connection is closed.
const MAX_UNREAD: u64 = 1 << 20;

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What every TLS connection begins with: a record of a handshake (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// Connections whose client begins to speak HTTP/2. Clients take as long as they like to begin, up to a limit, and none
/// of them keeps others waiting. One that speaks HTTP/1 gets `refusal`. When there are more than `most`, one that has
/// proved nothing is closed for it; if there is none, the new one is. Ends when the receiver is dropped.
pub(super) fn accept(
    listener: TcpListener,
    refusal: &'static str,
    most: usize,
) -> ReceiverStream<io::Result<Connection>> {
    accept_within(listener, refusal, most, OPENING_TIMEOUT)
}

fn accept_within(
    listener: TcpListener,
    refusal: &'static str,
    most: usize,
    limit: Duration,
) -> ReceiverStream<io::Result<Connection>> {
    let (opened, connections) = mpsc::channel(1);
    let places = Places::new(most);
    tokio::spawn(async move {
        let mut full = false;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = opened.closed() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let Some(mut place) = places.take(peer.ip()) else {
                        if !std::mem::replace(&mut full, true) {
                            tracing::warn!(
                                "{most} connections are open, as many as there may be: more are closed at once"
                            );
                        }
                        continue;
                    };
                    full = false;
                    let opened = opened.clone();
                    tokio::spawn(async move {
                        let opening = timeout(limit, open(stream, peer, refusal));
                        let opening = tokio::select! {
                            opening = opening => opening,
                            () = poll_fn(|context| place.poll_left(context)) => return,
                        };
                        match opening {
                            // A server that is gone takes no more.
                            Ok(Some(stream)) => {
                                let connection = Connection::new(stream, place, PREFACE.len(), limit);
                                drop(opened.send(Ok(connection)).await);
                            }
                            Ok(None) => {}
                            Err(_) => tracing::debug!(%peer, "closed: said nothing for {limit:?}"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

/// The connection, if its client begins to speak HTTP/2; anyone else is told.
async fn open(stream: TcpStream, peer: SocketAddr, refusal: &str) -> Option<TcpStream> {
    // As many as tell the preface from the methods of HTTP/1.
    let mut first = [0; 3];
    let said = stream.peek(&mut first).await.ok()?;
    match &first[..said] {
        // Closed.
        [] => None,
        begin if PREFACE.starts_with(begin) => {
            // Without it, a server that goes on anyway: tokens would only come later.
            let _ = stream.set_nodelay(true);
            Some(stream)
        }
        [TLS_HANDSHAKE, ..] => {
            tracing::warn!(%peer, "a client speaks TLS, which is not served here: its address must begin with http://");
            None
        }
        begin => {
            if begin.iter().all(u8::is_ascii_uppercase) {
                // Whoever does not read it cannot be told.
                let _ = refuse_http1(stream, refusal).await;
            }
            tracing::debug!(%peer, "closed: does not speak HTTP/2");
            None
        }
    }
}

async fn refuse_http1(mut stream: TcpStream, refusal: &str) -> io::Result<()> {
    let length = refusal.len();
    let head = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all((head + refusal).as_bytes()).await?;
    stream.shutdown().await?;
    // Closed with bytes unread, the connection would be reset, and the answer lost with it.
    tokio::io::copy(&mut stream.take(MAX_UNREAD), &mut tokio::io::sink()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic::transport::server::Connected;

    use super::*;

    const REFUSAL: &str = "This port speaks something else.\n";
    const LONG: Duration = Duration::from_secs(60);

    async fn listening(most: usize, limit: Duration) -> (ReceiverStream<io::Result<Connection>>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (accept_within(listener, REFUSAL, most, limit), address)
    }

    /// Sends this, and reads until the connection is closed, be it by a reset: what was sent may be unread.
    async fn say(address: SocketAddr, bytes: &[u8]) -> String {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let mut answer = String::new();
        let _ = timeout(LONG, client.read_to_string(&mut answer)).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn http_1_is_answered_by_a_line_and_tls_is_closed() {
        let (mut connections, address) = listening(9, LONG).await;
        for request in
            ["GET / HTTP/1.1\r\nHost: x\r\n\r\n", "POST /strata.v1.Inference/Generate HTTP/1.1\r\n\r\n{}"]
        {
            let answer = say(address, request.as_bytes()).await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 400 ") && head.contains("text/plain"), "{head}");
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
            assert_eq!(body, REFUSAL);
        }
        assert_eq!(say(address, &[TLS_HANDSHAKE, 3, 1, 2, 0, 1, 0, 1, 252, 3]).await, "");
        assert_eq!(say(address, b"\0\0").await, "");
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        let mut server = connections.next().await.unwrap().unwrap();
        let mut first = [0; 24];
        server.read_exact(&mut first).await.unwrap();
        assert_eq!(first, PREFACE, "what was looked at is still there");
    }

    #[tokio::test]
    async fn who_says_nothing_keeps_nobody_waiting_and_is_closed() {
        let (mut connections, address) = listening(9, LONG).await;
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(PREFACE).await.unwrap();
        assert!(timeout(LONG, connections.next()).await.unwrap().unwrap().is_ok());

        let (_connections, address) = listening(9, Duration::from_millis(1)).await;
        assert_eq!(say(address, b"").await, "");
    }

    #[tokio::test]
    async fn who_is_too_many_takes_the_place_of_a_stranger_only() {
        let (mut connections, address) = listening(1, LONG).await;
        let mut connect = async |bytes: &'static [u8]| {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(bytes).await.unwrap();
            let served = timeout(LONG, connections.next()).await.unwrap().unwrap().unwrap();
            (client, served)
        };
        let mut silent = TcpStream::connect(address).await.unwrap();
        let (mut client, mut served) = connect(PREFACE).await;
        assert_eq!(timeout(LONG, silent.read(&mut [0])).await.unwrap().unwrap(), 0, "closed before it began");
        let mut bytes = [0; 24];
        timeout(LONG, served.read_exact(&mut bytes)).await.unwrap().unwrap();
        let (_second, mut other) = connect(PREFACE).await;
        let error = timeout(LONG, served.read_u8()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        drop(served);
        assert_eq!(timeout(LONG, client.read(&mut [0])).await.unwrap().unwrap(), 0);
        other.connect_info().prove();
        assert_eq!(say(address, PREFACE).await, "", "there is one place, and whoever has it is known");
        timeout(LONG, other.read_exact(&mut bytes)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_begins_and_does_not_go_on_is_closed() {
        let (mut connections, address) = listening(1, Duration::from_millis(50)).await;
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(&PREFACE[..3]).await.unwrap();
        let mut served = timeout(LONG, connections.next()).await.unwrap().unwrap().unwrap();
        let mut bytes = [0; 24];
        let error = timeout(LONG, served.read_exact(&mut bytes)).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(served);
        let mut second = TcpStream::connect(address).await.unwrap();
        second.write_all(PREFACE).await.unwrap();
        let mut served = timeout(LONG, connections.next()).await.unwrap().unwrap().unwrap();
        timeout(LONG, served.read_exact(&mut bytes)).await.unwrap().unwrap();
        // It has begun, and may take its time now.
        second.write_all(b"!").await.unwrap();
        assert_eq!(timeout(LONG, served.read_u8()).await.unwrap().unwrap(), b'!');
    }
}
