//! What a real card refuses, as the emulator does, or more strictly.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use cudarc::{
    driver::{CudaContext, DriverError, result, sys},
    nvrtc,
};

use super::{
    super::{
        self as cuda, CudaError, Doing,
        activations::Slots,
        gate::{self, Handle},
    },
    *,
};
use crate::{
    device::{self, Compute, Directories, Held},
    kernels::ops::TensorSpec,
    transport::{LinkError, Tensors},
};

fn begin(gpu: &Gpu, mode: sys::CUstreamCaptureMode) {
    gpu.stream.begin_capture(mode).unwrap();
}

/// What the emulator refuses, as CUDA does or more strictly, so that other tests notice who asks for it.
#[test]
fn beside_a_capture_all_is_refused_that_is_no_work_of_a_stream() {
    use sys::CUstreamCaptureMode::{
        CU_STREAM_CAPTURE_MODE_GLOBAL as GLOBAL, CU_STREAM_CAPTURE_MODE_RELAXED as RELAXED,
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as LOCAL,
    };
    let mut bench = Bench::new();
    let held = bench.words(&[1, 2, 3]);
    let Bench { gpu, .. } = &bench;
    let (context, stream) = (&gpu.context, &gpu.stream);
    let other = cuda::context(1).unwrap();
    context.bind_to_thread().unwrap();
    // SAFETY: freed below.
    let (pinned, device) = unsafe {
        let _turn = gate::changing();
        (result::malloc_host(64, 0).unwrap(), result::malloc_sync(64).unwrap())
    };
    type Call<'a> = (&'a str, Box<dyn Fn() -> bool + Sync + Send + 'a>);
    let (pinned, zeros) = (pinned as usize, [0u8; 8]);
    let image = nvrtc::Ptx::from_src("// no kernels");
    let refused = |result: Result<(), DriverError>| {
        result.is_err_and(|e| e.0 == sys::cudaError_enum::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
    };
    // SAFETY: all of them are refused; what they would do, they may.
    let calls: Vec<Call<'_>> = unsafe {
        vec![
            ("cuMemAlloc", Box::new(|| refused(result::malloc_sync(64).map(|_| ())))),
            ("cuMemFree", Box::new(|| refused(result::free_sync(device)))),
            ("cuMemHostAlloc", Box::new(|| refused(result::malloc_host(64, 0).map(|_| ())))),
            ("cuMemFreeHost", Box::new(|| refused(result::free_host(pinned as *mut _)))),
            ("cuMemcpyHtoD", Box::new(|| refused(result::memcpy_htod_sync(device, &zeros)))),
            ("cuMemsetD8", Box::new(|| refused(result::memset_d8_sync(device, 0, 8)))),
            ("cuModuleLoadData", Box::new(|| refused(context.load_module(image.clone()).map(|_| ())))),
            ("cuCtxSynchronize", Box::new(|| refused(context.synchronize()))),
            ("cuStreamCreate", Box::new(|| refused(context.new_stream().map(|_| ())))),
            ("cuEventCreate", Box::new(|| refused(context.new_event(None).map(|_| ())))),
            ("cuStreamSynchronize", Box::new(|| refused(stream.synchronize()))),
            ("cuDevicePrimaryCtxRetain", Box::new(|| refused(CudaContext::new(0).map(|_| ())))),
            (
                "cuCtxEnablePeerAccess",
                Box::new(|| refused(sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0).result())),
            ),
            (
                "cublasCreate",
                Box::new(|| {
                    let (calls, mut handle) = (&cuda::cuda().unwrap().blas, std::ptr::null_mut());
                    calls.check((calls.create)(&mut handle)).is_err()
                }),
            ),
        ]
    };
    for (name, call) in &calls {
        for (mode, elsewhere) in [(LOCAL, false), (LOCAL, true), (GLOBAL, true)] {
            let _turn = gate::recording();
            begin(gpu, mode);
            let was = match elsewhere {
                false => call(),
                true => std::thread::scope(|scope| {
                    let call = || {
                        context.bind_to_thread().unwrap();
                        call()
                    };
                    scope.spawn(call).join().unwrap()
                }),
            };
            assert!(was, "{name} in {mode:?}, in another thread: {elsewhere}");
            let ended = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map(|_| ());
            let lost =
                ended.is_err_and(|e| e.0 == sys::cudaError_enum::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            assert!(lost, "{name} in {mode:?} leaves no capture valid");
        }
    }
    // A whole context is never waited for beside a capture of a stream of it; that of another may be.
    let _turn = gate::recording();
    begin(gpu, RELAXED);
    other.synchronize().unwrap();
    assert!(refused(context.synchronize()));
    assert!(stream.end_capture(sys::CUgraphInstantiate_flags(0)).is_err());
    // Work of other streams is none of a capture's business.
    begin(gpu, LOCAL);
    memory::zero(stream, held, 12).unwrap();
    assert!(stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().is_some());
    // SAFETY: made above.
    unsafe {
        result::free_host(pinned as *mut _).unwrap();
        result::free_sync(device).unwrap();
    }
}

/// A tensor of an activation.
const SPEC: TensorSpec = TensorSpec { dtype: DType::F32, rows: 2, columns: 8 };

#[test]
fn what_comes_and_goes_in_other_threads_spoils_no_recording() {
    let bench = Bench::new();
    let mut graph = None;
    let stop = AtomicBool::new(false);
    let (begun, first) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let gpus = [Gpu::open(0).unwrap(), Gpu::open(1).unwrap()];
                let [here, there] = &gpus;
                cuda::info(1).unwrap();
                here.kernels(DType::F32, 32).unwrap();
                let slots = Slots::new(&here.context, &[SPEC], 2).unwrap();
                let event = Handle::new(|| here.context.new_event(None)).unwrap();
                event.record(&here.stream).unwrap();
                let rows = slots.tensors(vec![SPEC]).unwrap();
                let memory = Memory::new(&there.context, 64).unwrap();
                rows.copy_first_to(&there.stream, memory.ptr()).unwrap();
                there.wait().unwrap();
                let _ = begun.send(());
            }
        });
        first.recv().unwrap();
        for _ in 0..50 {
            let _turn = gate::recording();
            begin(&bench.gpu, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
            std::thread::yield_now();
            let recorded = bench.gpu.stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap();
            graph = recorded.map(|graph| Handle::new(|| Ok::<_, ()>(graph)).unwrap());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(graph.is_some());
}

#[test]
fn what_a_gpu_has_no_room_for_is_said_beside_what_is_free() {
    let bench = Bench::new();
    let error = Memory::new(&bench.gpu.context, 1 << 50).map(|_| ()).unwrap_err().to_string();
    let parts = ["1125899906842624 bytes were asked for", " of 4294967296 are free", "cuda:0=20GiB"];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
}

#[test]
fn a_gpu_that_is_not_there_is_said_beside_those_that_are() {
    emulator();
    let error = Gpu::open(9).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("there is no GPU 9: this machine has 2"), "{error}");
}

#[test]
fn gpus_that_are_open_reach_each_others_memory() {
    emulator();
    let [here, there] = [0, 1].map(|ordinal| cuda::context(ordinal).unwrap());
    assert!(Arc::ptr_eq(&here, &cuda::context(0).unwrap()), "one context per GPU");
    let already = Err(sys::cudaError_enum::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    for (own, other) in [(&here, &there), (&there, &here)] {
        let _turn = gate::changing();
        own.bind_to_thread().unwrap();
        // SAFETY: both live.
        let enabled = unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) };
        assert_eq!(enabled.result().map_err(|e| e.0), already);
        memory::reach(own, other).unwrap();
    }
}

/// A call of the emulator's own, which takes nothing.
fn lose_every_gpu() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tmp/emulator/libcuda.so");
    // SAFETY: our own library, which is loaded already; the function has this type.
    unsafe {
        let library = libloading::Library::new(path).unwrap();
        library.get::<unsafe extern "C" fn()>(b"emulatorLose").unwrap()();
    }
}

/// By what a process may first hear that its GPU is lost.
const FIRST_HEARD: [&str; 5] =
    ["a step", "a hop to the host", "an offer", "an NCCL link", "memory that goes"];

#[test]
fn a_process_whose_gpu_is_lost_ends_by_whatever_it_hears_of_it() {
    const HEARD: &str = "STRATA_TEST_LOST";
    if let Ok(heard) = std::env::var(HEARD) {
        return hear_of_a_lost_gpu(&heard);
    }
    emulator();
    let name = "kernels::cuda::tests::refusals::a_process_whose_gpu_is_lost_ends_by_whatever_it_hears_of_it";
    for heard in FIRST_HEARD {
        let mut test = Command::new(std::env::current_exe().unwrap());
        // What it asks for is not started.
        test.env_remove("EMULATOR_TRACE");
        let ended = test.args(["--exact", name]).env(HEARD, heard).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert_eq!(ended.status.code(), Some(70), "{heard}: {said}");
    }
}

/// Returns if nothing ends the process.
fn hear_of_a_lost_gpu(heard: &str) {
    let bench = Bench::new();
    let slots = Slots::new(&bench.gpu.context, &[SPEC], 1).unwrap();
    let rows = slots.tensors(vec![SPEC]).unwrap();
    let kernels = bench.gpu.kernels(DType::F32, 32).unwrap();
    lose_every_gpu();
    let said = match heard {
        "a step" => bench.gpu.wait().unwrap_err().to_string(),
        "a hop to the host" => Tensors::Device(rows).into_host().unwrap_err().to_string(),
        "an offer" => {
            let (devices, compute) = (["cuda:0".parse().unwrap()], Compute::shared_by(1));
            let held = |_: &str| Held::default();
            device::offers(&devices, compute, &Directories::default(), held).unwrap_err().to_string()
        }
        "an NCCL link" => {
            let done = Handle::new(|| bench.gpu.context.new_event(None)).unwrap();
            LinkError::from(done.try_is_complete().doing("waiting").unwrap_err()).to_string()
        }
        // A kernel's own start gives an error that nobody makes another one of.
        _ => {
            let started =
                launch!(bench.gpu, kernels.soft_cap, (1, 1, 1), 32, 0; Ptr::NULL, 1.0f32, 0i32, 0i32);
            let error = started.unwrap_err();
            drop(bench);
            error.to_string()
        }
    };
    panic!("the process goes on: {said}");
}

#[test]
fn errors_after_which_cuda_wants_another_process_are_sticky() {
    use sys::cudaError_enum as E;
    let sticky = |source| CudaError::Driver { doing: "testing", source: DriverError(source) }.is_sticky();
    let all = [
        E::CUDA_ERROR_ECC_UNCORRECTABLE,
        E::CUDA_ERROR_NVLINK_UNCORRECTABLE,
        E::CUDA_ERROR_CONTAINED,
        E::CUDA_ERROR_ILLEGAL_ADDRESS,
        E::CUDA_ERROR_LAUNCH_TIMEOUT,
        E::CUDA_ERROR_ASSERT,
        E::CUDA_ERROR_HARDWARE_STACK_ERROR,
        E::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        E::CUDA_ERROR_MISALIGNED_ADDRESS,
        E::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        E::CUDA_ERROR_INVALID_PC,
        E::CUDA_ERROR_LAUNCH_FAILED,
        E::CUDA_ERROR_TENSOR_MEMORY_LEAK,
        E::CUDA_ERROR_MPS_CLIENT_TERMINATED,
        E::CUDA_ERROR_EXTERNAL_DEVICE,
    ];
    let missed: Vec<_> = all.into_iter().filter(|e| !sticky(*e)).collect();
    assert_eq!(missed, []);
    for passing in
        [E::CUDA_ERROR_OUT_OF_MEMORY, E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, E::CUDA_ERROR_NOT_READY]
    {
        assert!(!sticky(passing), "{passing:?}");
    }
}
