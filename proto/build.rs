//! Compiles the `.proto` files with protox: no `protoc` is needed to build Slipway.
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=api.proto");
    println!("cargo:rerun-if-changed=keeper.proto");
    println!("cargo:rerun-if-changed=admin.proto");
    println!("cargo:rerun-if-changed=nri.proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let cri = protox::compile(["api.proto"], ["."])?;
    std::fs::write(out.join("cri.binpb"), prost::Message::encode_to_vec(&cri))?;
    tonic_prost_build::configure()
        // Its Debug is written by hand: the derived one would print passwords and tokens.
        .skip_debug(["runtime.v1.AuthConfig"])
        // Long answers that are asked for often.
        .extern_path(
            ".runtime.v1.ListContainersResponse",
            "crate::wire::ListContainersResponse",
        )
        .extern_path(
            ".runtime.v1.ListContainerStatsResponse",
            "crate::wire::ListContainerStatsResponse",
        )
        .extern_path(
            ".runtime.v1.ListPodSandboxStatsResponse",
            "crate::wire::ListPodSandboxStatsResponse",
        )
        .compile_fds(cri)?;

    let keeper = protox::compile(["keeper.proto"], ["."])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .compile_fds(keeper)?;

    let admin = protox::compile(["admin.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(admin)?;

    let nri = protox::compile(["nri.proto"], ["."])?;
    tonic_prost_build::configure()
        // Ordered, so that the same message has the same bytes.
        .btree_map(".nri")
        .compile_fds(nri)?;
    Ok(())
}
