//! Places of a port's connections. Who is connected is a stranger until a call of theirs is taken, and makes room for
//! whoever comes when there is no other place: silence keeps nobody out.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::FutureExt;
use tokio::sync::oneshot;

/// So many places.
#[derive(Debug, Clone)]
pub(super) struct Places(Arc<Room>);

#[derive(Debug)]
struct Room {
    most: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    /// In order of arrival.
    taken: BTreeMap<u64, Taken>,
}

#[derive(Debug)]
struct Taken {
    from: IpAddr,
    /// Tells a stranger to leave; none if this is no stranger.
    leave: Option<oneshot::Sender<()>>,
}

impl Places {
    pub fn new(most: usize) -> Self {
        Places(Arc::new(Room { most, table: Mutex::default() }))
    }

    /// A place. If all are taken, the oldest stranger from the address that has most of them leaves; none if there is no
    /// stranger.
    pub fn take(&self, from: IpAddr) -> Option<Place> {
        let from = from.to_canonical();
        let mut table = self.0.lock();
        if table.taken.len() >= self.0.most {
            let oldest = table.oldest_stranger()?;
            let leave = table.taken.remove(&oldest)?.leave?;
            // It may have ended by itself.
            let _ = leave.send(());
        }
        table.last += 1;
        let number = table.last;
        let (leave, left) = oneshot::channel();
        table.taken.insert(number, Taken { from, leave: Some(leave) });
        let standing = Standing { number, room: self.0.clone(), known: Arc::default() };
        Some(Place { standing, left: Some(left) })
    }
}

impl Room {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn oldest_stranger(&self) -> Option<u64> {
        let strangers = || self.taken.iter().filter(|(_, taken)| taken.leave.is_some());
        let mut by_address: HashMap<IpAddr, usize> = HashMap::new();
        strangers().for_each(|(_, taken)| *by_address.entry(taken.from).or_default() += 1);
        let most = by_address.values().copied().max()?;
        strangers().find(|(_, taken)| by_address[&taken.from] == most).map(|(number, _)| *number)
    }
}

/// What a connection counts as, for as long as it has a place.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    number: u64,
    room: Arc<Room>,
    known: Arc<AtomicBool>,
}

impl Standing {
    /// It is no stranger from now on.
    pub fn prove(&self) {
        if !self.known.swap(true, Ordering::Relaxed)
            && let Some(taken) = self.room.lock().taken.get_mut(&self.number)
        {
            taken.leave = None;
        }
    }
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    pub standing: Standing,
    /// None once it need not leave for others.
    left: Option<oneshot::Receiver<()>>,
}

impl Place {
    /// Ready when it has to leave for somebody else.
    pub fn poll_left(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(left) = &mut self.left else { return Poll::Pending };
        match Pin::new(left).poll_unpin(context) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(_)) => {
                self.left = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.standing.room.lock().taken.remove(&self.standing.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures::poll;

    use super::*;

    async fn has_to_leave(place: &mut Place) -> bool {
        poll!(Box::pin(poll_fn(|context| place.poll_left(context)))).is_ready()
    }

    #[tokio::test]
    async fn the_oldest_stranger_of_the_address_that_has_most_makes_room() {
        let places = Places::new(4);
        let take = |from: u8| places.take([10, 0, 0, from].into());
        let mut lonely = take(1).unwrap();
        let mut crowd = [take(2).unwrap(), take(2).unwrap(), take(2).unwrap()];
        crowd[0].standing.prove();
        let mut new = take(3).unwrap();
        assert!(!has_to_leave(&mut lonely).await);
        assert!(!has_to_leave(&mut crowd[0]).await, "it has proved who it is");
        assert!(has_to_leave(&mut crowd[1]).await);
        assert!(!has_to_leave(&mut crowd[2]).await);
        // A place is given back once.
        drop(crowd);
        for place in [&mut lonely, &mut new] {
            place.standing.prove();
            assert!(!has_to_leave(place).await);
        }
        let known: Vec<_> = (0..2).map(|_| take(2).unwrap()).collect();
        known.iter().for_each(|place| place.standing.prove());
        assert!(take(4).is_none(), "nobody is a stranger");
        drop(lonely);
        assert!(take(4).is_some());
    }
}
