//! Links that carry activations from a stage to the next one.
//!
//! One activation per link and step, in step order. A link is owned by its stage thread; waits end when the
//! incarnation's [`Interrupt`](crate::interrupt::Interrupt) is tripped.

pub mod loopback;
pub(crate) mod nccl;
pub mod tcp;

use candle_core::Tensor;
use strata_proto::{DType, LINK_TOKEN_BYTES, v1::Fence};

/// Secret that names one link of one incarnation.
pub type LinkToken = [u8; LINK_TOKEN_BYTES];

/// Reads a token from the wire.
///
/// # Errors
/// If it is not [`LINK_TOKEN_BYTES`] long.
pub fn link_token(bytes: &[u8]) -> Result<LinkToken, LinkError> {
    bytes.try_into().map_err(|_| {
        LinkError::Protocol(format!("a link token has {LINK_TOKEN_BYTES} bytes, not {}", bytes.len()))
    })
}

/// What one stage hands to the next for one step.
#[derive(Debug)]
pub struct Activation {
    /// The step it belongs to.
    pub step: u64,
    /// The tensors, or why there are none.
    pub payload: Payload,
}

/// Content of an [`Activation`].
#[derive(Debug)]
pub enum Payload {
    /// The residual stream `(tokens, hidden)` first; encoder-decoders will add the encoder's output.
    Tensors(Vec<Hidden>),
    /// A stage failed this step; nothing downstream computes, the last stage reports the reason.
    Poisoned(String),
}

/// Rows of activations, wherever they lie.
#[derive(Debug)]
pub enum Hidden {
    /// In host memory.
    Host(Tensor),
    /// In a GPU's memory.
    #[cfg(feature = "cuda")]
    Device(crate::kernels::cuda::DeviceRows),
}

impl Hidden {
    /// The rows in host memory.
    ///
    /// # Errors
    /// If the device that has them fails.
    pub fn into_host(self) -> Result<Tensor, LinkError> {
        match self {
            Hidden::Host(tensor) => Ok(tensor),
            #[cfg(feature = "cuda")]
            Hidden::Device(rows) => Ok(rows.to_host()?),
        }
    }

    /// Elements of all rows.
    pub fn elements(&self) -> usize {
        match self {
            Hidden::Host(tensor) => tensor.elem_count(),
            #[cfg(feature = "cuda")]
            Hidden::Device(rows) => rows.shape().rows * rows.shape().columns,
        }
    }

    /// Whether these are rows as `expected`.
    pub fn fits(&self, expected: &Expected) -> bool {
        match self {
            Hidden::Host(tensor) => {
                tensor.dtype() == candle_dtype(expected.dtype)
                    && tensor.dims() == [expected.rows, expected.columns]
            }
            #[cfg(feature = "cuda")]
            Hidden::Device(rows) => rows.shape() == *expected,
        }
    }
}

/// Shape and format of a tensor that a stage expects, known from `StepMeta` before anything is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Wire format.
    pub dtype: DType,
    /// Rows: tokens of the step.
    pub rows: usize,
    /// Columns: width of the residual stream.
    pub columns: usize,
}

/// The receiving end of a link.
pub trait Upstream {
    /// Waits for the activation of `step`; refuses one whose tensors differ from `expected`.
    fn receive(&mut self, step: u64, expected: &[Expected]) -> Result<Activation, LinkError>;
}

/// The sending end of a link. Sending overlaps the next step's compute.
pub trait Downstream {
    /// Queues an activation. `shape` is what the receiver expects, also of a step that is poisoned.
    fn send(&mut self, activation: Activation, shape: Expected) -> Result<(), LinkError>;
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
    Timeout(std::time::Duration),
    /// The operating system refused.
    #[error("activation link: {0}")]
    Io(#[from] std::io::Error),
    /// A device failed.
    #[error("activation link: {0}")]
    Device(String),
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

/// candle's name for a wire format.
pub(crate) fn candle_dtype(dtype: DType) -> candle_core::DType {
    match dtype {
        DType::F32 => candle_core::DType::F32,
        DType::BF16 => candle_core::DType::BF16,
        DType::F16 => candle_core::DType::F16,
    }
}
