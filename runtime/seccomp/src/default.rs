//! RuntimeDefault: the profile of a container that asks for none of its own.
//!
//! It means what containerd's default profile means (`contrib/seccomp`, 2026-08), put in our own words in
//! `default_tables`. CRI-O and Podman ship a second one (containers-common, `seccomp.json`). Where the two
//! differ, containerd's choice was taken:
//!
//! | | containerd and Slipway | containers-common |
//! | --- | --- | --- |
//! | refused calls | `EPERM` for those older than the profile, `ENOSYS` for newer ones | `ENOSYS`, and `EPERM` for a list of known ones |
//! | mount(2) and its family, setns, unshare, umount, quotactl, `clone` and `clone3` with new namespaces | with CAP_SYS_ADMIN only; `clone3` gets `ENOSYS` so that libraries try `clone`, whose flags a filter can see | allowed, left to the kernel's own checks |
//! | reboot | with CAP_SYS_BOOT | allowed |
//! | syslog | with CAP_SYSLOG or CAP_SYS_ADMIN | allowed |
//! | pidfd_getfd; `get_mempolicy`, `mbind`, `set_mempolicy` | with CAP_SYS_PTRACE; CAP_SYS_NICE | older ones: allowed |
//! | sigaction, signal, sigpending, sigsuspend, readdir, query_module on i386 | refused | allowed |
//! | keyctl, pivot_root | refused | allowed |
//! | ptrace and `process_vm_*` | on kernels since 4.8 | newer ones: with CAP_SYS_PTRACE |
//! | `socket(AF_VSOCK)`, `socket(AF_ALG)` | refused | allowed |
//! | `socket(AF_NETLINK, …, NETLINK_AUDIT)` | allowed; the kernel asks for CAP_AUDIT_WRITE | `EINVAL` without CAP_AUDIT_WRITE |
//! | vmsplice, io_pgetevents | allowed | refused |
//! | bpf, perf_event_open | also with CAP_BPF, CAP_PERFMON | with CAP_SYS_ADMIN only |
//!
//! On i386 socket(2) is also reached through socketcall(2), whose arguments no filter can see, so the
//! rules about address families bind 64-bit programs (and 32-bit ones that call socket directly).

use crate::default_tables::{
    ABIS, AF_ALG, AF_VSOCK, ALWAYS, BY_CAPABILITY, BY_MACHINE, CLONE_NEW_ANY, PERSONALITIES,
    PTRACE, PTRACE_SINCE,
};
use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompOperator as Op, LinuxSyscall,
};

/// The RuntimeDefault profile for a container whose **bounding set** is `capabilities`, on machine `arch`
/// (its own 64-bit name, see [`crate::native_arch`]) with kernel `kernel` (major, minor; see
/// [`crate::running_kernel`]).
///
/// Like its models it depends on what the container may do: each capability opens the calls that need it.
pub fn default_profile(
    capabilities: &Capabilities,
    arch: Arch,
    kernel: (u32, u32),
) -> LinuxSeccomp {
    let mut calls: Vec<LinuxSyscall> = ALWAYS.iter().map(|calls| allow(calls)).collect();

    // The families that are neither AF_ALG nor AF_VSOCK, as three ranges: two conditions on one argument
    // would be alternatives.
    const { assert!(AF_ALG + 2 == AF_VSOCK) };
    calls.push(allow_if("socket", &[arg(0, Op::ScmpCmpLt, AF_ALG, None)]));
    calls.push(allow_if(
        "socket",
        &[arg(0, Op::ScmpCmpEq, AF_ALG + 1, None)],
    ));
    calls.push(allow_if("socket", &[arg(0, Op::ScmpCmpGt, AF_VSOCK, None)]));

    for domain in PERSONALITIES {
        calls.push(allow_if(
            "personality",
            &[arg(0, Op::ScmpCmpEq, domain, None)],
        ));
    }

    if kernel >= PTRACE_SINCE {
        calls.push(allow(PTRACE));
    }
    for (_, names) in BY_MACHINE
        .iter()
        .filter(|(machines, _)| machines.contains(&arch))
    {
        calls.push(allow(names));
    }
    for (_, names) in BY_CAPABILITY
        .iter()
        .filter(|(c, _)| capabilities.contains(c))
    {
        calls.push(allow(names));
    }

    if !capabilities.contains(&Capability::SysAdmin) {
        // s390 has clone's first two arguments the other way round.
        let flags = if matches!(arch, Arch::ScmpArchS390 | Arch::ScmpArchS390x) {
            1
        } else {
            0
        };
        calls.push(allow_if(
            "clone",
            &[arg(flags, Op::ScmpCmpMaskedEq, CLONE_NEW_ANY, Some(0))],
        ));
        // clone3's flags are in memory. ENOSYS makes C libraries fall back to clone.
        let mut clone3 = entry(&["clone3"], Action::ScmpActErrno);
        clone3.set_errno_ret(Some(libc::ENOSYS.cast_unsigned()));
        calls.push(clone3);
    }

    let abis = ABIS
        .iter()
        .find(|a| a[0] == arch)
        .map_or_else(|| vec![arch], |a| a.to_vec());
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(Action::ScmpActErrno);
    profile.set_architectures(Some(abis));
    profile.set_syscalls(Some(calls));
    profile
}

fn entry(names: &[&str], action: Action) -> LinuxSyscall {
    let mut call = LinuxSyscall::default();
    call.set_names(names.iter().map(|n| (*n).to_owned()).collect());
    call.set_action(action);
    call
}

fn allow(names: &[&str]) -> LinuxSyscall {
    entry(names, Action::ScmpActAllow)
}

fn allow_if(name: &str, args: &[LinuxSeccompArg]) -> LinuxSyscall {
    let mut call = allow(&[name]);
    call.set_args(Some(args.to_vec()));
    call
}

#[expect(
    clippy::expect_used,
    reason = "the builder has a default for every field, so it can't fail"
)]
fn arg(index: usize, op: Op, value: u64, value_two: Option<u64>) -> LinuxSeccompArg {
    let arg = LinuxSeccompArgBuilder::default()
        .index(index)
        .op(op)
        .value(value);
    match value_two {
        Some(two) => arg.value_two(two),
        None => arg,
    }
    .build()
    .expect("a condition with all its fields")
}
