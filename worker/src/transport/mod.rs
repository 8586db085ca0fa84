//! Links that carry activations from a stage to the next one.
//!
//! One activation per link and step, in step order. A link is owned by its stage thread; waits end when the
//! incarnation's [`Interrupt`] is tripped. `open` alone knows all kinds of links: a new one is a file that implements
//! `Transport`, and an arm there.

pub(crate) mod loopback;
pub(crate) mod nccl;
pub(crate) mod tcp;

use std::{sync::Arc, time::Duration};

use candle_core::Tensor;
use strata_proto::{
    LINK_TOKEN_BYTES,
    v1::{self, Fence, LinkHealth, LinkKind},
};

use crate::{
    health::Neighbours,
    interrupt::Interrupt,
    kernels::{ops::TensorSpec, tensor::spec_of},
};

/// Secret that names one link of one incarnation.
pub(crate) type LinkToken = [u8; LINK_TOKEN_BYTES];

/// Reads a token from the wire.
///
/// # Errors
/// If it is not [`LINK_TOKEN_BYTES`] long.
pub(crate) fn link_token(bytes: &[u8]) -> Result<LinkToken, LinkError> {
    bytes.try_into().map_err(|_| {
        LinkError::Protocol(format!("a link token has {LINK_TOKEN_BYTES} bytes, not {}", bytes.len()))
    })
}

/// What one stage hands to the next for one step.
#[derive(Debug)]
pub(crate) struct Activation {
    /// The step it belongs to.
    pub step: u64,
    /// The tensors, or why there are none.
    pub payload: Payload,
}

/// Content of an [`Activation`].
#[derive(Debug)]
pub(crate) enum Payload {
    /// What the stage computed.
    Tensors(Tensors),
    /// A stage failed this step; nothing downstream computes, the last stage reports the reason.
    Poisoned(String),
}

/// The tensors of an activation: the residual stream `(tokens, width)` first, then what the model carries beside it, in
/// the order of [`Tower::activation`](crate::model::architecture::Tower::activation). All lie in one place.
#[derive(Debug)]
pub enum Tensors {
    /// In host memory.
    Host(Vec<Tensor>),
    /// In a GPU's memory.
    #[cfg(feature = "cuda")]
    Device(crate::kernels::cuda::DeviceTensors),
}

impl Tensors {
    /// The tensors in host memory.
    ///
    /// # Errors
    /// If the device that has them fails.
    pub fn into_host(self) -> Result<Vec<Tensor>, LinkError> {
        match self {
            Tensors::Host(tensors) => Ok(tensors),
            #[cfg(feature = "cuda")]
            Tensors::Device(tensors) => Ok(tensors.into_host()?),
        }
    }

    /// Rows of the first tensor: the tokens of the step.
    pub fn rows(&self) -> usize {
        match self {
            Tensors::Host(tensors) => tensors.first().and_then(spec_of).map_or(0, |spec| spec.rows),
            #[cfg(feature = "cuda")]
            Tensors::Device(tensors) => tensors.specs().first().map_or(0, |spec| spec.rows),
        }
    }

    /// Whether these are the tensors that are `expected`, in order, and no others.
    pub fn fit(&self, expected: &[TensorSpec]) -> bool {
        match self {
            Tensors::Host(tensors) => {
                let specs = tensors.iter().map(spec_of);
                specs.eq(expected.iter().map(|spec| Some(*spec)))
            }
            #[cfg(feature = "cuda")]
            Tensors::Device(tensors) => tensors.specs() == expected,
        }
    }
}

/// The receiving end of a link.
pub(crate) trait Upstream {
    /// Waits for the activation of `step`; refuses one whose tensors differ from `expected`, which is known from
    /// `StepMeta` before anything is read.
    fn receive(&mut self, step: u64, expected: &[TensorSpec]) -> Result<Activation, LinkError>;
}

/// The sending end of a link. Sending overlaps the next step's compute.
pub(crate) trait Downstream {
    /// Queues an activation. `expected` is what the receiver expects, also of a step that is poisoned; others are
    /// refused.
    fn send(&mut self, activation: Activation, expected: &[TensorSpec]) -> Result<(), LinkError>;
}

/// A way for activations to travel.
pub(crate) trait Transport {
    /// Opens the receiving end of a link.
    fn upstream(&self, link: Link, end: End) -> Result<Box<dyn Upstream>, LinkError>;

    /// Opens the sending end of a link.
    fn downstream(&self, link: Link, end: End) -> Result<Box<dyn Downstream>, LinkError>;
}

/// The way that a kind of link names.
///
/// # Errors
/// If this build knows none of that kind.
pub(crate) fn open(kind: LinkKind) -> Result<&'static dyn Transport, LinkError> {
    match kind {
        LinkKind::Loopback => Ok(&loopback::Loopback { by_host: true }),
        LinkKind::DeviceCopy => Ok(&loopback::Loopback { by_host: false }),
        LinkKind::Tcp => Ok(&tcp::Tcp),
        LinkKind::Nccl => Ok(&nccl::Nccl),
        LinkKind::Unspecified => {
            Err(LinkError::Protocol("a link needs a kind that this worker knows".into()))
        }
    }
}

/// Kinds of link that GPUs of this worker can be ends of, since what these need beside a network is here.
#[cfg(feature = "cuda")]
pub(crate) fn of_gpus() -> Vec<strata_proto::LinkKind> {
    let nccl = nccl::is_there().then_some(strata_proto::LinkKind::Nccl);
    nccl.into_iter().collect()
}

/// A link as the coordinator describes it to one of its ends.
pub(crate) struct Link {
    /// How activations travel.
    pub kind: LinkKind,
    /// Its secret.
    pub token: LinkToken,
    /// Where to dial.
    pub address: String,
    /// What both ends of an NCCL link join by.
    pub nccl_id: Vec<u8>,
}

impl TryFrom<v1::Link> for Link {
    type Error = LinkError;

    fn try_from(link: v1::Link) -> Result<Self, LinkError> {
        let (kind, token) = (link.kind(), link_token(&link.token)?);
        open(kind)?;
        Ok(Link { kind, token, address: link.address, nccl_id: link.nccl_id.to_vec() })
    }
}

/// What a stage knows of its own end of a link.
pub(crate) struct End {
    /// Of the incarnation.
    pub fence: Fence,
    /// Ends waits.
    pub interrupt: Interrupt,
    /// Where ends in one process find each other.
    pub hub: Arc<loopback::Hub>,
    /// The peer that `Prepare` announced, if this is a receiving end that is dialled.
    pub pending: Option<tcp::Pending>,
    /// The number of the stage's device.
    pub ordinal: usize,
    /// The tensors of the longest step.
    pub longest: Vec<TensorSpec>,
    /// Where it says that the neighbour is missed.
    pub neighbours: Neighbours,
    /// Silence after which the neighbour counts as lost.
    pub timeout: Duration,
}

impl End {
    /// One of a test, which has no neighbours but those it makes up.
    #[cfg(test)]
    fn of(fence: Fence, interrupt: Interrupt) -> Self {
        let (hub, neighbours) = (Arc::default(), Neighbours::default());
        let timeout = Duration::from_secs(2);
        End { fence, interrupt, hub, pending: None, ordinal: 0, longest: Vec::new(), neighbours, timeout }
    }

    /// The claim on the peer that shows `token`.
    fn announced(&mut self, token: LinkToken) -> Result<tcp::Pending, LinkError> {
        let error = || LinkError::Protocol("this link's token was not announced by Prepare".into());
        self.pending.take().filter(|pending| *pending.token() == token).ok_or_else(error)
    }
}

/// Why a link failed. Each of these ends the incarnation.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The incarnation was aborted.
    #[error("the incarnation was ended")]
    Interrupted,
    /// The other end is gone.
    #[error("the neighbouring stage is gone: {0}")]
    Closed(String),
    /// Bytes or an activation that do not fit what was expected.
    #[error("the neighbouring stage broke the protocol: {0}")]
    Protocol(String),
    /// The peer did not come or answer in time.
    #[error("no answer from the neighbouring stage within {0:?}")]
    Timeout(Duration),
    /// The peer gives no sign of life any more.
    #[error("the neighbouring stage has been silent for longer than --heartbeat-timeout")]
    Silent,
    /// The operating system refused.
    #[error("activation link: {0}")]
    Io(#[from] std::io::Error),
    /// A device failed.
    #[error("activation link: {0}")]
    Device(String),
}

impl LinkError {
    /// What it says of the link.
    pub(crate) fn health(&self) -> LinkHealth {
        match self {
            LinkError::Interrupted => LinkHealth::Unspecified,
            LinkError::Timeout(_) | LinkError::Silent => LinkHealth::Silent,
            _ => LinkHealth::Broken,
        }
    }
}

fn check_step(got: u64, want: u64) -> Result<(), LinkError> {
    if got == want {
        Ok(())
    } else {
        Err(LinkError::Protocol(format!("received the activation of step {got} while step {want} was due")))
    }
}

fn same_fence(got: &Fence, want: &Fence) -> Result<(), LinkError> {
    if got == want {
        Ok(())
    } else {
        Err(LinkError::Protocol(format!("fence {got} is not this incarnation's {want}")))
    }
}

/// Refuses an activation whose tensors are not those that are expected.
fn check_tensors(activation: &Activation, expected: &[TensorSpec]) -> Result<(), LinkError> {
    match &activation.payload {
        Payload::Tensors(tensors) if !tensors.fit(expected) => Err(LinkError::Protocol(format!(
            "the activation of step {} has other tensors than {expected:?}",
            activation.step
        ))),
        _ => Ok(()),
    }
}
