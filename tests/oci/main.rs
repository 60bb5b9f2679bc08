//! `slipway oci` as podman and containerd call it: the built binary, bundles made of Debian's static busybox, and what
//! the kernel says about the result.
//!
//! The program runs itself again in mount, network and process namespaces of its own, so that whatever happens to it,
//! its processes and mounts end with it. Arguments are substrings of test names.
#![forbid(unsafe_code)]
// A test says what it expects, and a failed expectation is a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod bundle;
mod confinement;
mod errors;
mod exec;
mod hooks;
mod lifecycle;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, ExitCode};

const INSIDE: &str = "SLIPWAY_OCI_TESTS_INSIDE";

type Test = (&'static str, fn());

fn main() -> ExitCode {
    if !nix::unistd::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("SKIPPED oci: needs root and /bin/busybox (Debian: busybox-static)");
        println!("0 passed, 0 failed, 1 skipped");
        return ExitCode::SUCCESS;
    }
    match std::env::var_os(INSIDE) {
        None => outside(),
        Some(_) => inside(),
    }
}

fn outside() -> ExitCode {
    let options = "--mount --net --pid --fork --kill-child --mount-proc --propagation private --";
    let status = Command::new("unshare")
        .args(options.split(' '))
        .arg(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .status();
    match status {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("can't run unshare(1): {error}; install util-linux");
            ExitCode::FAILURE
        }
    }
}

fn inside() -> ExitCode {
    let all: &[&[Test]] = &[
        lifecycle::TESTS,
        exec::TESTS,
        confinement::TESTS,
        agent::TESTS,
        hooks::TESTS,
        errors::TESTS,
    ];
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let wanted =
        |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in all.concat().into_iter().filter(|(name, _)| wanted(name)) {
        let good = catch_unwind(AssertUnwindSafe(test)).is_ok();
        if good {
            passed += 1;
        } else {
            failed += 1;
        }
        println!("{} {name}", if good { "ok     " } else { "FAILED " });
    }
    println!("{passed} passed, {failed} failed, 0 skipped");
    ExitCode::from(u8::from(failed > 0))
}
