//! A test tool: a shim of containerd's protocol with the sandbox API, which boots a virtual machine for each pod (QEMU without
//! KVM, a kernel of Debian's) and runs its containers in there. It is for testing the parts of Slipway that only shims of
//! virtual machines see, where no Kata Containers can be had: `integration/test-vm-shim` does. Nobody should run anything in
//! earnest under it: in the guest there are a chroot, a cgroup and a user for each container, and nothing else that keeps
//! containers apart.
//!
//! ```text
//! Slipway --ttrpc--> shim (shim.rs) --serial port (link.rs)--> agent (agent.rs), process 1 of the guest
//!                      |-- QEMU, virtiofsd (machine.rs): in the sandbox's cgroup, QEMU in the pod's network namespace
//!                      \-- tap devices, to which all frames for the pod's interfaces go (network.rs)
//! ```
//!
//! The same program is all three of shim, `start`/`delete`, and agent. It needs `ip`, `tc`, `nsenter`, `qemu-system-x86_64` and the
//! virtiofsd of QEMU 7. Its only option is `ConfigPath`: a directory with a kernel as `hack/vm prepare` makes it (`vmlinuz`,
//! `lib/modules`, `initrd/bin/busybox`).

mod agent;
mod initrd;
mod link;
mod machine;
mod network;
mod shim;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        return agent::run();
    }
    let words: Vec<String> = std::env::args().collect();
    let option = |name: &str| {
        let after = words.iter().skip_while(|w| *w != name).nth(1);
        after.cloned().unwrap_or_default()
    };
    let done = match words.last().map(String::as_str) {
        Some("-v") => {
            println!("slipway-vm-shim: a test tool of Slipway's");
            Ok(())
        }
        Some("start") => shim::start(&option("-id")),
        Some("delete") => shim::delete(&option("-id")),
        Some("serve") => shim::serve(&option("-id")),
        _ => Err(anyhow::anyhow!(
            "usage: slipway-vm-shim -id ID start|delete"
        )),
    };
    if let Err(error) = done {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
