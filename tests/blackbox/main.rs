//! Black-box tests: each starts a real daemon on a temporary root, talks gRPC to it, and looks at what the
//! kernel says about the result. Only the CRI, the command line and files that an operator may rely on are
//! used, nothing private.
//!
//! The program runs itself again in mount, network and process namespaces of its own (see
//! [`harness::stage`]), so whatever happens to it, the kernel ends every process and takes down every mount
//! and interface that came of it. Arguments are substrings of test names; `--list`, `--jobs N` and
//! `--shard I/N` (only every Nth of the tests) work.
#![forbid(unsafe_code)]
// A test says what it expects, and a failed expectation is a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

/// The tests of a module, by name. A test that is not listed is dead code, which clippy refuses.
macro_rules! tests {
    ($($name:ident),* $(,)?) => { tests!(@ TESTS false $($name)*); };
    // Those that measure time or load the machine run after the others, one at a time.
    (alone: $($name:ident),* $(,)?) => { tests!(@ ALONE true $($name)*); };
    (@ $list:ident $alone:literal $($name:ident)*) => {
        pub const $list: &[crate::harness::Test] = &[$(crate::harness::Test {
            name: concat!(module_path!(), "::", stringify!($name)),
            alone: $alone,
            run: |env| Box::pin($name(env)),
        }),*];
    };
}

mod harness;

mod apparmor;
mod artifacts;
mod bad_images;
mod cdi;
mod checkpoint;
mod clients;
mod cni;
mod confinement;
mod containers;
mod devices;
mod events;
mod exec;
mod filesystem;
mod gvisor;
mod handlers;
mod hooks;
mod hygiene;
mod idempotence;
mod image_volumes;
mod images;
mod lifecycle;
mod logs;
mod mounts;
mod names;
mod network;
mod nri;
mod operations;
mod pods;
mod quota;
mod resources;
mod restart;
mod restore;
mod seccomp;
mod selinux;
mod shim;
mod stats;
mod stop;
mod stream;
mod sysctls;
mod systemd;
mod update;
mod userns;
mod users;
mod v2;
mod vm_shim;

fn main() -> std::process::ExitCode {
    // Started by a daemon of ours, as a plugin.
    if std::env::var_os("NRI_PLUGIN_SOCKET").is_some() {
        return harness::plugin::run_installed();
    }
    // Started by a keeper of a daemon of ours, as a shim.
    if let Some(dir) = std::env::var_os(harness::fake_shim::VARIABLE) {
        return harness::fake_shim::run(std::path::Path::new(&dir));
    }
    // They need a kernel and a minute: integration/test-vm-shim has both, and says so where it has not.
    let machines = match std::env::var_os(vm_shim::SHIM) {
        Some(_) => vm_shim::TESTS,
        None => &[],
    };
    let all: &[&[harness::Test]] = &[
        apparmor::TESTS,
        pods::TESTS,
        names::TESTS,
        containers::TESTS,
        clients::TESTS,
        lifecycle::TESTS,
        users::TESTS,
        userns::TESTS,
        confinement::TESTS,
        seccomp::TESTS,
        selinux::TESTS,
        hygiene::TESTS,
        exec::TESTS,
        exec::ALONE,
        logs::TESTS,
        logs::ALONE,
        stop::TESTS,
        idempotence::TESTS,
        sysctls::TESTS,
        mounts::TESTS,
        filesystem::TESTS,
        devices::TESTS,
        resources::TESTS,
        v2::TESTS,
        v2::ALONE,
        systemd::TESTS,
        stats::TESTS,
        quota::TESTS,
        stream::TESTS,
        events::TESTS,
        update::TESTS,
        network::TESTS,
        checkpoint::TESTS,
        restore::TESTS,
        nri::TESTS,
        cdi::TESTS,
        cni::TESTS,
        image_volumes::TESTS,
        artifacts::TESTS,
        images::TESTS,
        bad_images::TESTS,
        restart::TESTS,
        handlers::TESTS,
        shim::TESTS,
        machines,
        gvisor::TESTS,
        hooks::TESTS,
        operations::TESTS,
    ];
    harness::stage::main(&all.concat())
}
