//! CUDA's libraries, opened by names that say their version.
//!
//! cudarc, whose types their calls have, looks for NVRTC and cuBLAS by their development names first. Those may belong
//! to another installation than the libraries that they need in turn, which are always named with their version. So
//! cudarc calls the driver alone, of which there is one.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::OnceLock,
};

use cudarc::{
    cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasOperation_t, cudaDataType},
    driver::sys,
};
use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use strata_proto::Library;

use super::CudaError;

/// Where the driver is: the only name that it has on every machine.
const DRIVER: &str = "libcuda.so.1";
/// The oldest generation of CUDA whose NVRTC and cuBLAS have all calls.
const OLDEST: u32 = 12;
/// `RTLD_NOLOAD` of Linux' dlfcn.h: only what is open already.
const NO_LOAD: c_int = 4;

/// What a stage calls.
pub(crate) struct Cuda {
    /// The version of CUDA that the driver was made for, as `1000 * major + 10 * minor`.
    pub driver: u32,
    pub nvrtc: Nvrtc,
    pub blas: BlasCalls,
    /// All of them, for people.
    libraries: Vec<Library>,
    /// They stay open as long as their calls can be called.
    _open: [Opened; 2],
}

/// Whether there is a driver; calling one that is not there would panic.
pub(crate) fn has_driver() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading the library runs its initialisers, which are made for it.
    *THERE.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// All libraries that a stage needs, looked for once.
///
/// # Errors
/// If one is not there, or they do not belong together.
pub(crate) fn cuda() -> Result<&'static Cuda, CudaError> {
    static CUDA: OnceLock<Result<Cuda, String>> = OnceLock::new();
    let cuda = CUDA.get_or_init(|| {
        let cuda = Cuda::open()?;
        for Library { name, version, path } in &cuda.libraries {
            tracing::info!(name, version, path, "library");
        }
        Ok(cuda)
    });
    cuda.as_ref().map_err(|why| CudaError::Library(why.clone()))
}

impl Cuda {
    fn open() -> Result<Self, String> {
        if !has_driver() {
            let names = [DRIVER.to_owned()];
            return Err(open_one(&names).err().unwrap_or_else(|| missing(&names)));
        }
        let (driver, path) = driver_of()?;
        let (nvrtc_library, blas_library) = (open("nvrtc", driver)?, open("cublas", driver)?);
        let (nvrtc, blas) = (Nvrtc::load(&nvrtc_library)?, BlasCalls::load(&blas_library)?);
        let mut libraries = vec![Library { name: "driver".into(), version: cuda_version(driver), path }];
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are of numbers that live on.
        unsafe { (nvrtc.version)(&mut major, &mut minor) };
        libraries.push(Library {
            name: "NVRTC".into(),
            version: format!("{major}.{minor}"),
            path: path_of(nvrtc.version as *const c_void),
        });
        let part = |which| {
            let mut value = 0;
            // SAFETY: as above.
            unsafe { (blas.property)(which, &mut value) };
            value
        };
        let version = format!("{}.{}.{}", part(0), part(1), part(2));
        let path = path_of(blas.property as *const c_void);
        if let Some(inner) = inner_of_blas(driver) {
            if inner.version != version {
                tracing::warn!(
                    "cuBLAS {version} ({path}) uses cuBLASLt {} ({}), which is of another installation: take one of \
                     the two out of LD_LIBRARY_PATH",
                    inner.version,
                    inner.path
                );
            }
            libraries.push(inner);
        }
        libraries.push(Library { name: "cuBLAS".into(), version, path });
        Ok(Cuda { driver, nvrtc, blas, libraries, _open: [nvrtc_library, blas_library] })
    }

    /// A library's version and path, as an error says them.
    pub fn named(&self, name: &str) -> String {
        let found = self.libraries.iter().find(|library| library.name == name);
        found.map_or(name.to_owned(), |l| format!("{name} {} ({})", l.version, l.path))
    }

    /// What was opened.
    pub fn libraries(&self) -> &[Library] {
        &self.libraries
    }
}

/// `13000` as `13.0`.
pub(crate) fn cuda_version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// The file that the code at an address was loaded from.
pub(crate) fn path_of(address: *const c_void) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let bound = |text| usize::from_str_radix(text, 16).ok();
        let is_there = (bound(from)?..bound(to)?).contains(&address.addr());
        // After rights, offset, device and inode.
        is_there.then(|| rest.splitn(5, ' ').nth(4).unwrap_or_default().trim().to_owned())
    });
    path.unwrap_or_default()
}

/// The driver's version and path.
fn driver_of() -> Result<(u32, String), String> {
    type Get = unsafe extern "C" fn(*mut c_int) -> c_int;
    let failed = |e: libloading::Error| format!("{DRIVER}: {e}");
    // SAFETY: loading the library runs its initialisers, which are made for it; the call has the type of its header.
    unsafe {
        let called = *sys::culib().get::<Get>(b"cuDriverGetVersion").map_err(failed)?;
        let path = path_of(called as *const c_void);
        if let Ok(real) = Opened::open(Some(DRIVER), RTLD_NOW | RTLD_LOCAL) {
            let real = path_of(*real.get::<Get>(b"cuDriverGetVersion").map_err(failed)? as *const c_void);
            if real != path {
                return Err(format!(
                    "libcuda.so is {path}, but the driver {DRIVER} is {real}: take the first one's folder out of \
                     LD_LIBRARY_PATH"
                ));
            }
        }
        let mut version = 0;
        match called(&mut version) {
            0 if version > 0 => Ok((version as u32, path)),
            code => Err(format!("the driver {path} does not say its version: error {code}")),
        }
    }
}

/// Opens a library: of the driver's generation, or an older one, or the one for development.
fn open(stem: &str, driver: u32) -> Result<Opened, String> {
    open_one(&names(stem, driver))
}

/// Opens the first of these that can be opened.
fn open_one(names: &[String]) -> Result<Opened, String> {
    let mut unusable = None;
    for name in names {
        // SAFETY: loading the library runs its initialisers, which are made for it.
        match unsafe { Opened::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => return Ok(library),
            Err(error) => {
                let why = std::error::Error::source(&error).unwrap_or(&error).to_string();
                // What glibc says of a file that is nowhere; otherwise there is one, or one that it needs is nowhere.
                let is_nowhere =
                    why.starts_with(&format!("{name}: cannot open shared object file: No such file"));
                unusable = unusable.or((!is_nowhere).then_some((name, why)));
            }
        }
    }
    Err(unusable.map_or_else(
        || missing(names),
        |(name, why)| {
            format!(
                "{name} cannot be used ({why}): install it anew, or put the folder of a working one first in \
                 LD_LIBRARY_PATH, or use the device cpu"
            )
        },
    ))
}

/// What a library may be called where the driver is of this version, best first.
fn names(stem: &str, driver: u32) -> Vec<String> {
    let generations = (OLDEST..=(driver / 1000).max(OLDEST)).rev();
    let named = generations.map(|major| format!("lib{stem}.so.{major}"));
    named.chain([format!("lib{stem}.so")]).collect()
}

fn missing(names: &[String]) -> String {
    format!(
        "{} was not found: install the NVIDIA driver and CUDA's libraries, or use the device cpu",
        names.join(" or ")
    )
}

/// cuBLASLt, which cuBLAS opens by itself.
fn inner_of_blas(driver: u32) -> Option<Library> {
    names("cublasLt", driver).iter().find_map(|name| {
        // SAFETY: nothing is loaded, only found; the call has the type of its header.
        unsafe {
            let library = Opened::open(Some(name), RTLD_NOW | RTLD_LOCAL | NO_LOAD).ok()?;
            let version = *library.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion").ok()?;
            let number = version();
            Some(Library {
                name: "cuBLASLt".into(),
                version: format!("{}.{}.{}", number / 10_000, number % 10_000 / 100, number % 100),
                path: path_of(version as *const c_void),
            })
        }
    })
}

/// Calls of a library, by what they are called in it.
macro_rules! calls {
    ($(#[$doc:meta])* $name:ident { $($field:ident $symbol:literal ($($arg:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        pub(crate) struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> $result,)*
        }

        impl $name {
            fn load(library: &Opened) -> Result<Self, String> {
                // SAFETY: the calls have the types of the library's header.
                unsafe {
                    Ok($name {
                        $($field: *library.get::<unsafe extern "C" fn($($arg),*) -> $result>($symbol.as_bytes())
                            .map_err(|e| format!("{}: {e}", $symbol))?,)*
                    })
                }
            }
        }
    };
}

/// A program of NVRTC.
pub(crate) type Program = *mut c_void;

calls! {
    /// NVRTC; results are `nvrtcResult`.
    Nvrtc {
        version "nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
        count_architectures "nvrtcGetNumSupportedArchs" (*mut c_int) -> c_int;
        architectures "nvrtcGetSupportedArchs" (*mut c_int) -> c_int;
        create "nvrtcCreateProgram" (
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        destroy "nvrtcDestroyProgram" (*mut Program) -> c_int;
        compile "nvrtcCompileProgram" (Program, c_int, *const *const c_char) -> c_int;
        code_size "nvrtcGetCUBINSize" (Program, *mut usize) -> c_int;
        code "nvrtcGetCUBIN" (Program, *mut c_char) -> c_int;
        ptx_size "nvrtcGetPTXSize" (Program, *mut usize) -> c_int;
        ptx "nvrtcGetPTX" (Program, *mut c_char) -> c_int;
        log_size "nvrtcGetProgramLogSize" (Program, *mut usize) -> c_int;
        log "nvrtcGetProgramLog" (Program, *mut c_char) -> c_int;
        error_text "nvrtcGetErrorString" (c_int) -> *const c_char;
    }
}

calls! {
    /// cuBLAS; results are `cublasStatus_t`.
    BlasCalls {
        property "cublasGetProperty" (c_int, *mut c_int) -> c_int;
        create "cublasCreate_v2" (*mut cublasHandle_t) -> c_int;
        destroy "cublasDestroy_v2" (cublasHandle_t) -> c_int;
        set_stream "cublasSetStream_v2" (cublasHandle_t, *mut c_void) -> c_int;
        set_workspace "cublasSetWorkspace_v2" (cublasHandle_t, *mut c_void, usize) -> c_int;
        gemm "cublasGemmEx" (
            cublasHandle_t, cublasOperation_t, cublasOperation_t, c_int, c_int, c_int,
            *const c_void, *const c_void, cudaDataType, c_int, *const c_void, cudaDataType, c_int,
            *const c_void, *mut c_void, cudaDataType, c_int, cublasComputeType_t, cublasGemmAlgo_t
        ) -> c_int;
        error_text "cublasGetStatusName" (c_int) -> *const c_char;
    }
}

impl BlasCalls {
    /// An error, if the library says that it is one.
    pub fn check(&self, status: c_int) -> Result<(), CudaError> {
        match status {
            0 => Ok(()),
            // SAFETY: the library's own text, which lives as long as it.
            status => Err(CudaError::Blas(unsafe { text((self.error_text)(status)) })),
        }
    }
}

/// A text of a library's.
///
/// # Safety
/// It must be null, or end with a zero byte.
pub(super) unsafe fn text(at: *const c_char) -> String {
    match at.is_null() {
        true => "an unknown error".into(),
        // SAFETY: the caller says so.
        false => unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_version_come_first() {
        assert_eq!(names("nvrtc", 13_000), ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]);
        assert_eq!(names("cublas", 12_080), ["libcublas.so.12", "libcublas.so"]);
    }

    #[test]
    fn says_where_code_is() {
        let own = std::env::current_exe().unwrap().canonicalize().unwrap();
        assert_eq!(path_of(says_where_code_is as *const c_void), own.display().to_string());
        assert_eq!(path_of(std::ptr::null()), "");
    }
}
