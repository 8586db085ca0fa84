//! Compiles the kernels: once per GPU, format and width of heads, to the GPU's own machine code, kept in memory and on
//! disk.
//!
//! PTX would be compiled once more by the driver, which refuses that of a newer NVRTC; machine code it takes from any
//! NVRTC of its generation. PTX is left for a GPU that is younger than the NVRTC that is here.

use std::{
    collections::HashMap,
    ffi::{CString, c_char, c_int},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use sha2::{Digest, Sha256};
use strata_proto::DType;

use super::{
    CudaError, disk, launch,
    library::{self, Cuda, Nvrtc, Program},
};

/// What the driver loads: machine code, or PTX, which ends with a zero byte.
pub(super) type Image = Arc<[u8]>;

static COMPILED: AtomicU32 = AtomicU32::new(0);
static READ: AtomicU32 = AtomicU32::new(0);

/// How many sets of kernels this process compiled so far, and how many it read from the disk instead.
pub(crate) fn counts() -> (u32, u32) {
    (COMPILED.load(Ordering::Relaxed), READ.load(Ordering::Relaxed))
}

/// The kernels for a GPU, a format and a width of heads; `directory` is where compiled ones are kept, if anywhere.
///
/// # Errors
/// If the compiler refuses them, or knows neither this GPU nor an older one.
pub(super) fn kernels(
    cuda: &Cuda,
    capability: (i32, i32),
    element: DType,
    head_dim: usize,
    directory: Option<&Path>,
) -> Result<Image, CudaError> {
    type Key = ((i32, i32), DType, usize);
    type Slot = Arc<Mutex<Option<Image>>>;
    static KNOWN: Mutex<Option<HashMap<Key, Slot>>> = Mutex::new(None);
    let slot = {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_default().entry((capability, element, head_dim)).or_default().clone()
    };
    // Whoever needs others compiles them meanwhile.
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(image) = &*slot {
        return Ok(image.clone());
    }
    let target = Target::for_gpu(capability, &architectures(&cuda.nvrtc)?)
        .ok_or_else(|| failed(capability, format!("{} does not know it", cuda.named("NVRTC"))))?;
    let options: Vec<String> =
        [target.option()].into_iter().chain(launch::options(element, head_dim)).collect();
    let source = launch::SOURCES.concat();
    let path = directory.map(|directory| disk::place(directory, &name(cuda, &source, &options)));
    let image = match path.as_deref().and_then(disk::read) {
        Some(image) => {
            READ.fetch_add(1, Ordering::Relaxed);
            image
        }
        None => {
            let image =
                compile(&cuda.nvrtc, &source, &options, target).map_err(|log| failed(capability, log))?;
            COMPILED.fetch_add(1, Ordering::Relaxed);
            if let Some(path) = &path {
                disk::write(path, &image);
            }
            image
        }
    };
    Ok(slot.insert(image.into()).clone())
}

fn failed((major, minor): (i32, i32), log: String) -> CudaError {
    CudaError::Compile { capability: format!("{major}.{minor}"), log }
}

/// What is compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Machine code of this architecture.
    Machine(i32),
    /// PTX for it, which the driver compiles for a younger GPU.
    Ptx(i32),
}

impl Target {
    /// The best for a GPU that a compiler which knows these architectures can do.
    fn for_gpu((major, minor): (i32, i32), known: &[i32]) -> Option<Target> {
        let own = 10 * major + minor;
        match known.iter().copied().filter(|known| *known <= own).max()? {
            known if known == own => Some(Target::Machine(own)),
            older => Some(Target::Ptx(older)),
        }
    }

    fn option(self) -> String {
        match self {
            Target::Machine(architecture) => format!("--gpu-architecture=sm_{architecture}"),
            Target::Ptx(architecture) => format!("--gpu-architecture=compute_{architecture}"),
        }
    }
}

/// What a set of kernels is called on the disk: everything that changes what the compiler makes of it, the compiler
/// itself included, of which there are several with one version.
fn name(cuda: &Cuda, source: &str, options: &[String]) -> String {
    let compiler = cuda.named("NVRTC");
    let file = std::fs::metadata(library::path_of(cuda.nvrtc.compile as *const _));
    let file = file.map(|file| format!("{} {:?}", file.len(), file.modified().ok())).unwrap_or_default();
    let mut hash = Sha256::new();
    for part in [source, &compiler, &file].into_iter().chain(options.iter().map(String::as_str)) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The architectures that the compiler knows, as `10 * major + minor`.
fn architectures(nvrtc: &Nvrtc) -> Result<Vec<i32>, CudaError> {
    let mut count = 0;
    // SAFETY: the pointers are of numbers that live on, as many as the library asks for.
    let known = unsafe {
        let counted = (nvrtc.count_architectures)(&mut count);
        let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
        (counted == 0 && (nvrtc.architectures)(known.as_mut_ptr()) == 0).then_some(known)
    };
    known.ok_or_else(|| CudaError::Library("NVRTC does not say which architectures it knows".into()))
}

/// A program of NVRTC, gone when this is dropped.
struct Compiling<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Compiling<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `compile`, used nowhere else.
        unsafe { (self.nvrtc.destroy)(&mut self.program) };
    }
}

impl Compiling<'_> {
    /// The compiler's reason why not.
    fn check(&self, result: c_int) -> Result<(), String> {
        match result {
            0 => Ok(()),
            // SAFETY: the library's own text, which lives as long as it.
            code => Err(unsafe { library::text((self.nvrtc.error_text)(code)) }),
        }
    }

    /// Something of a program, by the two calls that give its size and it.
    fn bytes(
        &self,
        size_of: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program lives; the buffer is as large as the library says.
        unsafe {
            self.check(size_of(self.program, &mut size))?;
            let mut bytes = vec![0u8; size];
            self.check(get(self.program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}

/// Compiles a source, or says why the compiler would not.
fn compile(nvrtc: &Nvrtc, source: &str, options: &[String], target: Target) -> Result<Vec<u8>, String> {
    let text = |text: &str| CString::new(text).map_err(|e| e.to_string());
    let (source, name) = (text(source)?, c"strata.cu");
    let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut compiling = Compiling { nvrtc, program: std::ptr::null_mut() };
    let none = std::ptr::null();
    // SAFETY: the texts end with a zero byte and outlive the program.
    unsafe {
        let made = (nvrtc.create)(&mut compiling.program, source.as_ptr(), name.as_ptr(), 0, none, none);
        compiling.check(made)?;
        let done = (nvrtc.compile)(compiling.program, pointers.len() as c_int, pointers.as_ptr());
        compiling.check(done).map_err(|error| {
            let log = compiling.bytes(nvrtc.log_size, nvrtc.log).unwrap_or_default();
            format!("{error}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0').trim())
        })?;
    }
    match target {
        Target::Machine(_) => compiling.bytes(nvrtc.code_size, nvrtc.code),
        Target::Ptx(_) => compiling.bytes(nvrtc.ptx_size, nvrtc.ptx),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_younger_gpu_gets_the_ptx_of_an_older_one() {
        let known = [80, 86, 89, 90];
        assert_eq!(Target::for_gpu((9, 0), &known), Some(Target::Machine(90)));
        assert_eq!(Target::for_gpu((8, 7), &known), Some(Target::Ptx(86)));
        assert_eq!(Target::for_gpu((12, 1), &known), Some(Target::Ptx(90)));
        assert_eq!(Target::for_gpu((7, 5), &known), None);
        assert_eq!(Target::Machine(90).option(), "--gpu-architecture=sm_90");
    }
}
