//! The calls of NCCL that links make. cudarc, whose types they have, looks for the library by its development name
//! only, which a machine that merely runs programs does not have.

use std::{
    ffi::{c_int, c_void},
    sync::OnceLock,
};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclResult_t, ncclUniqueId};
use libloading::Library;

use crate::{kernels::cuda, transport::LinkError};

/// Where NCCL is looked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

type Send = unsafe extern "C" fn(
    *const c_void,
    usize,
    ncclDataType_t,
    c_int,
    ncclComm_t,
    cudaStream_t,
) -> ncclResult_t;
type Receive =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;

/// NCCL, loaded.
pub(super) struct Nccl {
    pub get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    pub init_rank:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t,
    pub send: Send,
    pub recv: Receive,
    pub async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    pub abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    version: unsafe extern "C" fn(*mut c_int) -> ncclResult_t,
    _library: Library,
}

impl Nccl {
    /// NCCL, if it is there.
    ///
    /// # Errors
    /// If it is not.
    pub fn get() -> Result<&'static Nccl, LinkError> {
        static LOADED: OnceLock<Option<Nccl>> = OnceLock::new();
        let missing =
            || LinkError::Device(format!("{} was not found: install NCCL, or use --links tcp", NAMES[0]));
        LOADED.get_or_init(|| NAMES.iter().find_map(|name| Self::load(name))).as_ref().ok_or_else(missing)
    }

    fn load(name: &str) -> Option<Nccl> {
        // SAFETY: loading the library runs its initialisers, which are made for it; the calls have the types of its
        // header.
        unsafe {
            let library = Library::new(name).ok()?;
            Some(Nccl {
                get_unique_id: *library.get(b"ncclGetUniqueId").ok()?,
                init_rank: *library.get(b"ncclCommInitRankConfig").ok()?,
                send: *library.get(b"ncclSend").ok()?,
                recv: *library.get(b"ncclRecv").ok()?,
                async_error: *library.get(b"ncclCommGetAsyncError").ok()?,
                abort: *library.get(b"ncclCommAbort").ok()?,
                version: *library.get(b"ncclGetVersion").ok()?,
                _library: library,
            })
        }
    }
}

/// NCCL for people, if it is there.
pub(crate) fn description() -> Option<strata_proto::Library> {
    let nccl = Nccl::get().ok()?;
    let mut number = 0;
    // SAFETY: the pointer is of a number that lives on.
    unsafe { (nccl.version)(&mut number) };
    Some(strata_proto::Library {
        name: "NCCL".into(),
        version: format!("{}.{}.{}", number / 10_000, number % 10_000 / 100, number % 100),
        path: cuda::path_of(nccl.version as *const c_void),
    })
}

/// Whether NCCL can be used.
pub(crate) fn is_there() -> bool {
    Nccl::get().is_ok()
}
