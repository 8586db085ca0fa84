//! Links by NCCL, from GPU to GPU: one communicator of two ranks, and one stream, per link.
//!
//! Each rank is owned by its stage's thread, which asks NCCL for something and then polls: whether it is done, whether
//! the other rank has failed, whether the incarnation was ended, whether it has taken too long. It never waits inside
//! NCCL, which would wait forever for a peer that is gone. A link that fails is aborted; an abort that does not come
//! back ends the process, for nothing else frees the GPU.

#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod library;
#[cfg(any(feature = "cuda", test))]
mod watched;

use std::net::TcpStream;

use strata_proto::NCCL_ID_BYTES;

use super::{Downstream, End, Link, LinkError, LinkToken, Transport, Upstream, tcp};
use crate::{interrupt::Interrupt, kernels::ops::TensorSpec};
#[cfg(feature = "cuda")]
pub(crate) use device::mint_id;
#[cfg(feature = "cuda")]
pub(crate) use library::{description, is_there};

/// What an end of a link needs to join.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "without CUDA, nobody joins"))]
struct Joining {
    /// Brings the ranks together.
    pub id: [u8; NCCL_ID_BYTES],
    /// Shows that they are of the same link.
    pub token: LinkToken,
    /// A connection to the other end's process, which the system closes when that ends. NCCL need not notice.
    pub peer: TcpStream,
    /// GPU of the stage, as CUDA counts.
    pub gpu: usize,
    /// The tensors of the longest step.
    pub longest: Vec<TensorSpec>,
    pub interrupt: Interrupt,
}

/// Reads an id from the wire.
///
/// # Errors
/// If it is none.
fn id_of(bytes: &[u8]) -> Result<[u8; NCCL_ID_BYTES], LinkError> {
    let error = || LinkError::Protocol(format!("an NCCL id has {NCCL_ID_BYTES} bytes, not {}", bytes.len()));
    bytes.try_into().map_err(|_| error())
}

/// Links by NCCL. The ends know each other by a TCP connection, which the sending end dials.
pub(super) struct Nccl;

impl Nccl {
    fn joining(link: &Link, end: End, peer: TcpStream) -> Result<Joining, LinkError> {
        Ok(Joining {
            id: id_of(&link.nccl_id)?,
            token: link.token,
            peer,
            gpu: end.ordinal,
            longest: end.longest,
            interrupt: end.interrupt,
        })
    }
}

impl Transport for Nccl {
    fn upstream(&self, link: Link, mut end: End) -> Result<Box<dyn Upstream>, LinkError> {
        let peer = end.announced(link.token)?.accept(&end)?;
        upstream(Self::joining(&link, end, peer)?)
    }

    fn downstream(&self, link: Link, end: End) -> Result<Box<dyn Downstream>, LinkError> {
        let peer = tcp::dial(&link.address, &link.token, &end)?;
        downstream(Self::joining(&link, end, peer)?)
    }
}

/// The sending end of a link.
///
/// # Errors
/// If the ranks do not come together.
fn downstream(joining: Joining) -> Result<Box<dyn Downstream>, LinkError> {
    #[cfg(feature = "cuda")]
    return Ok(Box::new(device::NcclDownstream::join(joining)?));
    #[cfg(not(feature = "cuda"))]
    Err(no_cuda(joining))
}

/// The receiving end of a link.
///
/// # Errors
/// If the ranks do not come together.
fn upstream(joining: Joining) -> Result<Box<dyn Upstream>, LinkError> {
    #[cfg(feature = "cuda")]
    return Ok(Box::new(device::NcclUpstream::join(joining)?));
    #[cfg(not(feature = "cuda"))]
    Err(no_cuda(joining))
}

/// A new id, which this process listens for.
///
/// # Errors
/// If this build has no NCCL.
#[cfg(not(feature = "cuda"))]
pub(crate) fn mint_id() -> Result<[u8; NCCL_ID_BYTES], LinkError> {
    Err(LinkError::Device(NO_CUDA.into()))
}

#[cfg(not(feature = "cuda"))]
const NO_CUDA: &str = "this build of Strata has no CUDA support: it cannot link by NCCL; use --links tcp";

#[cfg(not(feature = "cuda"))]
fn no_cuda(_: Joining) -> LinkError {
    LinkError::Device(NO_CUDA.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_their_length() {
        id_of(&[7; NCCL_ID_BYTES]).unwrap();
        assert!(id_of(&[7; 127]).unwrap_err().to_string().contains("127"));
    }
}
