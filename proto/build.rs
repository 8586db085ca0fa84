//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use prost::Message;

/// What clients call.
const CLIENTS: [&str; 2] = ["strata/v1/inference.proto", "strata/v1/cluster.proto"];
/// What a coordinator calls.
const WORKERS: &str = "strata/v1/stage.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), protox::compile(CLIENTS, ["."])?.encode_to_vec())?;
    let all = protox::compile(CLIENTS.into_iter().chain([WORKERS]), ["."])?;
    let methods = |files: &[&str]| {
        let files = all.file.iter().filter(|file| files.contains(&file.name()));
        let services = files.flat_map(|file| file.service.iter().map(move |s| (file.package(), s)));
        let methods = services.map(|(package, service)| {
            let methods: Vec<_> = service.method.iter().map(|method| method.name()).collect();
            (format!("{package}.{}", service.name()), methods)
        });
        format!("&{:?}", methods.collect::<Vec<_>>()).replace(", [", ", &[")
    };
    std::fs::write(out.join("methods.rs"), methods(&CLIENTS))?;
    std::fs::write(out.join("stage_methods.rs"), methods(&[WORKERS]))?;
    // Without `build_transport`: its `connect` constructor would collide with `Stage.Connect`.
    tonic_prost_build::configure().build_transport(false).bytes(".").compile_fds(all)?;
    println!("cargo:rerun-if-changed=strata");
    Ok(())
}
