//! Compiles the `.proto` files with protox, so that no `protoc` is needed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["strata/v1/inference.proto", "strata/v1/cluster.proto", "strata/v1/stage.proto"];
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Without `build_transport`: its `connect` constructor would collide with `Stage.Connect`.
    tonic_prost_build::configure().build_transport(false).bytes(".").compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=strata");
    Ok(())
}
