//! Connections whose hello has not come: so many at a time, and none of them for long.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read},
    net::{IpAddr, Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long a stranger may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);
/// Strangers that may be saying hello at once.
const MAX_STRANGERS: usize = 64;

/// Whoever may be saying hello. When there are too many, the oldest from the address that has most of them makes room,
/// so that whoever holds places without a word keeps nobody out.
#[derive(Debug, Clone, Default)]
pub(super) struct Strangers(Arc<Mutex<Places>>);

#[derive(Debug, Default)]
struct Places {
    last: u64,
    /// In order of arrival.
    taken: Vec<(u64, IpAddr, TcpStream)>,
}

impl Strangers {
    /// A place for a connection.
    ///
    /// # Errors
    /// If it is gone already, or no descriptor is left.
    pub fn welcome(&self, stream: &TcpStream) -> std::io::Result<Place> {
        let (from, watched) = (stream.peer_addr()?.ip(), stream.try_clone()?);
        let mut places = self.lock();
        if places.taken.len() >= MAX_STRANGERS {
            let mut by_address: HashMap<IpAddr, usize> = HashMap::new();
            places.taken.iter().for_each(|(_, from, _)| *by_address.entry(*from).or_default() += 1);
            let most = by_address.into_values().max();
            let of_most = |(_, from, _): &(u64, IpAddr, TcpStream)| {
                Some(places.taken.iter().filter(|(_, other, _)| other == from).count()) == most
            };
            if let Some(oldest) = places.taken.iter().position(of_most) {
                let (_, _, stream) = places.taken.remove(oldest);
                // It may have ended by itself.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        places.last += 1;
        let number = places.last;
        places.taken.push((number, from, watched));
        Ok(Place { number, until: Instant::now() + HELLO_TIMEOUT, strangers: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stranger's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    until: Instant,
    strangers: Strangers,
}

impl Place {
    /// Reads what the stranger says first.
    ///
    /// # Errors
    /// If that does not come whole, in time.
    pub fn hello<const BYTES: usize>(&self, stream: &mut TcpStream) -> std::io::Result<[u8; BYTES]> {
        let (mut hello, mut read) = ([0; BYTES], 0);
        while read < BYTES {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut hello[read..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => read += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(hello)
    }

    /// Gives the place back: it is no stranger any more. False if it had to make room for another one.
    pub fn leave(self) -> bool {
        self.remove()
    }

    fn remove(&self) -> bool {
        let mut places = self.strangers.lock();
        let at = places.taken.iter().position(|(number, ..)| *number == self.number);
        at.map(|at| places.taken.remove(at)).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpListener};

    use super::*;

    fn connect(listener: &TcpListener, strangers: &Strangers) -> (TcpStream, TcpStream, Place) {
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let place = strangers.welcome(&ours).unwrap();
        (theirs, ours, place)
    }

    #[test]
    fn the_oldest_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let strangers = Strangers::default();
        let mut silent: Vec<_> = (0..MAX_STRANGERS).map(|_| connect(&listener, &strangers)).collect();
        let (mut theirs, mut ours, place) = connect(&listener, &strangers);
        theirs.write_all(b"hel").unwrap();
        theirs.write_all(b"lo").unwrap();
        assert_eq!(&place.hello::<5>(&mut ours).unwrap(), b"hello");
        assert!(place.leave());
        let (mut theirs, mut first, place) = silent.remove(0);
        assert_eq!(place.hello::<5>(&mut first).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "it is not told");
        assert!(!place.leave());
        // The others may still say hello, and take their place with them when they go.
        let (theirs, ours, place) = &mut silent[0];
        theirs.write_all(b"hello").unwrap();
        assert_eq!(&place.hello::<5>(ours).unwrap(), b"hello");
        silent.clear();
        assert!(strangers.lock().taken.is_empty());
    }

    #[test]
    fn whoever_drips_has_no_longer_than_others() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let strangers = Strangers::default();
        let (mut theirs, mut ours, place) = connect(&listener, &strangers);
        let dripping = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(HELLO_TIMEOUT / 10);
            }
        });
        let begun = Instant::now();
        let error = place.hello::<4096>(&mut ours).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
        assert!(begun.elapsed() >= HELLO_TIMEOUT);
        drop((ours, place));
        dripping.join().unwrap();
    }
}
