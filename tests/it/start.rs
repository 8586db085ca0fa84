//! How processes start on GPUs, which the emulator stands in for: by which libraries, and with kernels that were
//! compiled before.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
};

use serde_json::Value;

use crate::{
    cluster::model,
    gpu::emulator,
    processes::{Process, free_dir},
};

/// `strata check` of the demo model on a GPU.
fn check(environment: &[(&str, &str)], kernel_cache: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_strata"))
        .args(["--log", "info", "check"])
        .arg(model("shakespeare"))
        .args(["--devices", "cuda:0=64MiB", "--kernel-cache"])
        .arg(kernel_cache)
        .env("LD_LIBRARY_PATH", emulator())
        .env("NO_COLOR", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

/// How many sets of kernels a process compiled, and how many it read.
fn counts(output: &Output) -> (u32, u32) {
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    let (_, last) = log.rsplit_once("kernels: ").unwrap_or_else(|| panic!("nothing of kernels in {log}"));
    let numbers: Vec<u32> = last.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

fn files(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_second_start_compiles_nothing_and_a_damaged_file_is_compiled_anew() {
    let directory = free_dir();
    let cache = directory.path().join("kernels");
    let (compiled, read) = counts(&check(&[], &cache));
    assert!(compiled > 0 && read == 0, "{compiled} compiled, {read} read");
    assert_eq!(counts(&check(&[], &cache)), (0, compiled));
    let kept = files(&cache);
    assert_eq!(kept.len(), compiled as usize);

    // One is cut short, in the others a byte is wrong.
    for (index, path) in kept.iter().enumerate() {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        match index {
            0 => bytes.truncate(middle),
            _ => bytes[middle] ^= 1,
        }
        fs::write(path, bytes).unwrap();
    }
    let anew = check(&[], &cache);
    assert_eq!(counts(&anew), (compiled, 0));
    assert!(String::from_utf8_lossy(&anew.stderr).contains("kernels are damaged"));
    assert_eq!(counts(&check(&[], &cache)), (0, compiled));

    // Another compiler makes other kernels.
    assert_eq!(counts(&check(&[("EMULATOR_NVRTC", "12080")], &cache)), (compiled, 0));
}

#[test]
fn processes_that_start_at_once_share_a_kernel_cache() {
    let directory = free_dir();
    thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| counts(&check(&[], directory.path()))));
        for one in both {
            let (compiled, read) = one.join().unwrap();
            assert!(compiled + read > 0);
        }
    });
    assert_eq!(counts(&check(&[], directory.path())).0, 0);
    let names = files(directory.path());
    assert!(names.iter().all(|path| path.extension().is_some_and(|e| e == "kernels")), "{names:?}");
}

#[test]
fn without_a_directory_to_write_to_kernels_are_compiled_at_every_start() {
    let directory = free_dir();
    let file = directory.path().join("file");
    fs::write(&file, "no directory").unwrap();
    let output = check(&[], &file.join("below"));
    assert!(counts(&output).0 > 0);
    assert!(String::from_utf8_lossy(&output.stderr).contains("compiled kernels cannot be kept"));
    // Switched off, or a user without a home: nothing is written, and nothing said.
    let off = check(&[], Path::new(""));
    assert!(counts(&off).0 > 0);
    assert!(!String::from_utf8_lossy(&off.stderr).contains("WARN"), "{off:?}");
    let homeless = Command::new(env!("CARGO_BIN_EXE_strata"))
        .args(["--log", "info", "check"])
        .arg(model("shakespeare"))
        .args(["--devices", "cuda:0=64MiB"])
        .env("LD_LIBRARY_PATH", emulator())
        .env_remove("XDG_CACHE_HOME")
        .env_remove("STRATA_KERNEL_CACHE")
        .env("HOME", file.join("home"))
        .output()
        .unwrap();
    assert!(counts(&homeless).0 > 0);
    assert!(!String::from_utf8_lossy(&homeless.stderr).contains("WARN"), "{homeless:?}");
}

#[test]
fn a_library_that_is_damaged_is_told_from_one_that_is_not_there() {
    // The driver alone.
    let directory = free_dir();
    let emulator = emulator().canonicalize().unwrap();
    for name in ["libcuda.so.1", "libemulator.so"] {
        std::os::unix::fs::symlink(emulator.join(name), directory.path().join(name)).unwrap();
    }
    let log = || {
        let output = check(&[("LD_LIBRARY_PATH", directory.path().to_str().unwrap())], Path::new(""));
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let without = log();
    assert!(
        without.contains("libnvrtc.so.13 or libnvrtc.so.12 or libnvrtc.so was not found: install"),
        "{without}"
    );
    fs::write(directory.path().join("libnvrtc.so.13"), [b'?'; 4096]).unwrap();
    let damaged = log();
    for part in ["libnvrtc.so.13 cannot be used (", "invalid ELF header", "LD_LIBRARY_PATH"] {
        assert!(damaged.contains(part), "{damaged}");
    }
}

#[test]
fn what_needs_no_gpu_makes_no_directory_for_kernels() {
    let home = free_dir();
    let output = Command::new(env!("CARGO_BIN_EXE_strata"))
        .arg("check")
        .arg(model("shakespeare"))
        .args(["--devices", "cpu=64MiB"])
        .env_remove("XDG_CACHE_HOME")
        .env_remove("STRATA_KERNEL_CACHE")
        .env("HOME", home.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(files(home.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_driver_takes_kernels_of_any_compiler_of_its_generation() {
    let directory = free_dir();
    assert!(counts(&check(&[("EMULATOR_NVRTC", "13020")], directory.path())).0 > 0);
    let refused = check(&[("EMULATOR_NVRTC", "14000")], directory.path());
    let log = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    for part in ["the driver, for CUDA 13.0, does not take kernels from NVRTC 14.0 (", "install a driver"] {
        assert!(log.contains(part), "{log}");
    }
}

#[test]
fn libraries_are_opened_by_names_with_a_version_and_shown() {
    // What is found first by a name without a version is of another installation.
    let decoys = free_dir();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let other = maps.split_whitespace().find(|word| word.contains("/libc.so")).unwrap();
    for name in ["libnvrtc.so", "libcublas.so", "libnccl.so"] {
        std::os::unix::fs::symlink(other, decoys.path().join(name)).unwrap();
    }
    let path = format!("{}:{}", decoys.path().display(), emulator().display());
    let model = model("shakespeare");
    let serve = ["serve", model.to_str().unwrap(), "--port", "0", "--devices", "cuda:0=64MiB"];
    let server = Process::start_with(&[("LD_LIBRARY_PATH", &path)], &serve, "ready ");
    let status = |more: &[&str]| {
        let args = [&["status", "--address", &server.address], more].concat();
        String::from_utf8(Command::new(env!("CARGO_BIN_EXE_strata")).args(args).output().unwrap().stdout)
            .unwrap()
    };
    let (text, json) = (status(&[]), status(&["--json"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    let library = emulator().canonicalize().unwrap().join("libemulator.so");
    for (index, (name, version)) in
        [("driver", "13.0"), ("NVRTC", "13.0"), ("cuBLAS", "13.0.0"), ("NCCL", "2.27.3")]
            .into_iter()
            .enumerate()
    {
        let line = format!("library   {name} {version}: {}\n", library.display());
        assert!(text.contains(&line), "{line} is not in {text}");
        let found = &json["members"][0]["devices"][0]["libraries"][index];
        assert_eq!((found["name"].as_str(), found["version"].as_str()), (Some(name), Some(version)));
        assert_eq!(found["path"].as_str(), library.to_str());
    }
}
