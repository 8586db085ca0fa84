//! Waking a stage thread that waits on its neighbours or on its coordinator.

use std::{
    future::Future,
    net::{Shutdown, TcpStream},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::future::{Either, select};
use tokio::sync::watch;

/// Ends every wait of one incarnation of a stage, once and for good.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt {
    tripped: Arc<watch::Sender<bool>>,
    sockets: Arc<Mutex<Vec<TcpStream>>>,
}

impl Default for Interrupt {
    fn default() -> Self {
        Interrupt { tripped: Arc::new(watch::Sender::new(false)), sockets: Arc::default() }
    }
}

impl Interrupt {
    /// Wakes everyone and closes the watched sockets.
    pub fn trip(&self) {
        self.tripped.send_replace(true);
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A socket that is closed already is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Whether it was tripped.
    pub fn is_tripped(&self) -> bool {
        *self.tripped.borrow()
    }

    /// Resolves when it is tripped.
    pub async fn tripped(&self) {
        let mut watch = self.tripped.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _ = watch.wait_for(|tripped| *tripped).await;
    }

    /// Closes `socket` when tripped, which ends a blocking read or write on it.
    ///
    /// # Errors
    /// If the socket's descriptor cannot be duplicated.
    pub fn watch(&self, socket: &TcpStream) -> std::io::Result<()> {
        let clone = socket.try_clone()?;
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(clone);
        if self.is_tripped() {
            self.trip();
        }
        Ok(())
    }

    /// Blocks this thread on `future`; `None` if tripped first.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        futures::executor::block_on(async {
            match select(pin!(future), pin!(self.tripped())).await {
                Either::Left((value, _)) => Some(value),
                Either::Right(_) => None,
            }
        })
    }
}
