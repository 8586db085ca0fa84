//! Links between stages of one process: the tensor itself changes hands.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    Activation, Downstream, End as StageEnd, Link, LinkError, LinkToken, Payload, Tensors, Transport,
    Upstream, check_step, check_tensors,
};
use crate::{interrupt::Interrupt, kernels::ops::TensorSpec};

/// Links inside one process; what is sent goes through host memory, or stays on its device.
pub(super) struct Loopback {
    pub by_host: bool,
}

impl Transport for Loopback {
    fn upstream(&self, link: Link, end: StageEnd) -> Result<Box<dyn Upstream>, LinkError> {
        Ok(Box::new(end.hub.upstream(link.token, end.interrupt)))
    }

    fn downstream(&self, link: Link, end: StageEnd) -> Result<Box<dyn Downstream>, LinkError> {
        Ok(Box::new(end.hub.downstream(link.token, self.by_host, end.interrupt)))
    }
}

/// Activations a stage may be ahead of its successor.
const IN_FLIGHT: usize = 2;

/// Where the two ends of loopback links find each other. Workers that share one are in one process.
#[derive(Debug)]
pub struct Hub {
    id: Uuid,
    waiting: Mutex<HashMap<LinkToken, End>>,
}

/// The end of a channel whose other end was taken first.
#[derive(Debug)]
enum End {
    Sender(mpsc::Sender<Activation>),
    Receiver(mpsc::Receiver<Activation>),
}

impl Default for Hub {
    fn default() -> Self {
        Hub { id: Uuid::new_v4(), waiting: Mutex::default() }
    }
}

impl Hub {
    /// Equal for two workers if and only if they can be linked by loopback.
    pub fn id(&self) -> String {
        self.id.to_string()
    }

    /// The sending end of the link `token`. With `by_host`, what is sent goes through host memory.
    pub(crate) fn downstream(
        self: &Arc<Self>,
        token: LinkToken,
        by_host: bool,
        interrupt: Interrupt,
    ) -> LoopbackDownstream {
        let mut waiting = self.lock();
        let sender = match waiting.remove(&token) {
            Some(End::Sender(sender)) => sender,
            _ => {
                let (sender, receiver) = mpsc::channel(IN_FLIGHT);
                waiting.insert(token, End::Receiver(receiver));
                sender
            }
        };
        LoopbackDownstream { sender, by_host, interrupt, _claim: Claim { hub: self.clone(), token } }
    }

    /// The receiving end of the link `token`.
    pub(crate) fn upstream(self: &Arc<Self>, token: LinkToken, interrupt: Interrupt) -> LoopbackUpstream {
        let mut waiting = self.lock();
        let receiver = match waiting.remove(&token) {
            Some(End::Receiver(receiver)) => receiver,
            _ => {
                let (sender, receiver) = mpsc::channel(IN_FLIGHT);
                waiting.insert(token, End::Sender(sender));
                receiver
            }
        };
        LoopbackUpstream { receiver, interrupt, _claim: Claim { hub: self.clone(), token } }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<LinkToken, End>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the unclaimed end of a link whose claimed end is dropped.
#[derive(Debug)]
struct Claim {
    hub: Arc<Hub>,
    token: LinkToken,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.hub.lock().remove(&self.token);
    }
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct LoopbackDownstream {
    sender: mpsc::Sender<Activation>,
    by_host: bool,
    interrupt: Interrupt,
    _claim: Claim,
}

impl Downstream for LoopbackDownstream {
    fn send(&mut self, mut activation: Activation, expected: &[TensorSpec]) -> Result<(), LinkError> {
        check_tensors(&activation, expected)?;
        if self.by_host {
            activation.payload = match activation.payload {
                Payload::Tensors(tensors) => Payload::Tensors(Tensors::Host(tensors.into_host()?)),
                poisoned => poisoned,
            };
        }
        match self.interrupt.block_on(self.sender.send(activation)) {
            None => Err(LinkError::Interrupted),
            Some(sent) => sent.map_err(|_| LinkError::Closed("the next stage ended".into())),
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub(crate) struct LoopbackUpstream {
    receiver: mpsc::Receiver<Activation>,
    interrupt: Interrupt,
    _claim: Claim,
}

impl Upstream for LoopbackUpstream {
    fn receive(&mut self, step: u64, expected: &[TensorSpec]) -> Result<Activation, LinkError> {
        let activation = match self.interrupt.block_on(self.receiver.recv()) {
            None => return Err(LinkError::Interrupted),
            Some(None) => return Err(LinkError::Closed("the previous stage ended".into())),
            Some(Some(activation)) => activation,
        };
        check_step(activation.step, step)?;
        check_tensors(&activation, expected)?;
        Ok(activation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_meet_in_either_order_and_leave_nothing_behind() {
        let hub = Arc::new(Hub::default());
        for receiver_first in [false, true] {
            let interrupt = Interrupt::default();
            let (mut down, mut up) = if receiver_first {
                let up = hub.upstream([1; 32], interrupt.clone());
                (hub.downstream([1; 32], true, interrupt.clone()), up)
            } else {
                let down = hub.downstream([1; 32], true, interrupt.clone());
                let up = hub.upstream([1; 32], interrupt.clone());
                (down, up)
            };
            down.send(Activation { step: 4, payload: Payload::Poisoned("x".into()) }, &[]).unwrap();
            assert!(matches!(up.receive(4, &[]).unwrap().payload, Payload::Poisoned(why) if why == "x"));
            drop(down);
            assert!(matches!(up.receive(5, &[]), Err(LinkError::Closed(_))));
        }
        drop(hub.upstream([2; 32], Interrupt::default()));
        assert!(hub.waiting.lock().unwrap().is_empty());
    }

    #[test]
    fn ends_meet_when_both_come_at_once() {
        let hub = Arc::new(Hub::default());
        for round in 0..2000u16 {
            let mut token = [0; 32];
            token[..2].copy_from_slice(&round.to_le_bytes());
            let (there, interrupt) = (hub.clone(), Interrupt::default());
            let other = interrupt.clone();
            let sending = std::thread::spawn(move || {
                let mut down = there.downstream(token, true, other);
                down.send(Activation { step: 0, payload: Payload::Poisoned(String::new()) }, &[])
                    .map(|()| down)
            });
            let mut up = hub.upstream(token, interrupt);
            up.receive(0, &[]).unwrap();
            sending.join().unwrap().unwrap();
        }
    }

    #[test]
    fn an_interrupt_ends_a_wait() {
        let hub = Arc::new(Hub::default());
        let interrupt = Interrupt::default();
        let mut up = hub.upstream([1; 32], interrupt.clone());
        let waiter = std::thread::spawn(move || up.receive(0, &[]));
        interrupt.trip();
        assert!(matches!(waiter.join().unwrap(), Err(LinkError::Interrupted)));
    }
}
