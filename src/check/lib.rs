//! `slipway check`: what this machine offers for running pods, found by trying it.
//!
//! Each [`Finding`] says what was looked at, what was found, and, when something is missing, what that
//! costs and how to mend it. Probes are real wherever that leaves no trace: mounts are made in a mount
//! namespace that goes with the thread that made it, processes are killed and reaped before the probe
//! returns, files and cgroups are removed. What needs root is skipped, and said so, without it.
//!
//! ```no_run
//! let config = slipway_config::Config::default();
//! let (text, ok) = slipway_check::run(&config, slipway_check::Output::Table);
//! print!("{text}");
//! std::process::exit(if ok { 0 } else { 1 });
//! ```
#![deny(unsafe_code)]

mod accounting;
mod attempt;
mod cdi;
mod cgroup;
mod checkpoint;
mod finding;
mod handlers;
mod host;
mod kernel;
mod lsm;
mod memfd;
mod mountinfo;
mod mounts;
mod namespaces;
mod network;
mod overlay;
mod privileges;
mod render;
mod roots;
mod runtime;
mod seccomp;
mod socket;
mod sys;
mod sysctl;

pub use checkpoint::{criu_complaint, find_criu};
pub use finding::{Finding, Report, Status};
pub use mounts::user_namespaces;
pub use runtime::{
    Identity, LinuxFeatures, RuntimeFacts, RuntimeFeatures, ask_runtime, ask_shim, find_program,
    runtime_says, shim_program, tell_runtime,
};

use slipway_config::Config;

/// How the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// For people: aligned, and wrapped at the terminal's width.
    #[default]
    Table,
    /// One JSON object: `ok`, `version`, `findings` with the fields of [`Finding`].
    Json,
}

/// Looks at the machine as the daemon with this configuration would find it, and writes the report.
/// The flag is false when something is missing without which pods do not run.
///
/// Takes a few hundred milliseconds; every probe that could hang has a deadline.
pub fn run(config: &Config, output: Output) -> (String, bool) {
    let report = inspect(config);
    let text = match output {
        Output::Table => render::table(&report, sys::terminal_width().unwrap_or(100)),
        Output::Json => render::json(&report),
    };
    (text, report.ok())
}

/// As [`run`], for callers that want the findings themselves.
pub fn inspect(config: &Config) -> Report {
    let privileged = privileges::is_root() && privileges::has(caps::Capability::CAP_SYS_ADMIN);
    let mut findings = Vec::new();
    findings.extend(kernel::check());
    findings.extend(memfd::check());
    findings.extend(seccomp::check());
    findings.extend(namespaces::check(privileged));
    findings.extend(mounts::check(privileged, &config.state_root));
    findings.extend(overlay::check(privileged, &config.state_root));
    findings.extend(cgroup::check(privileged));
    findings.extend(checkpoint::check(privileged, config));
    findings.extend(lsm::check(&config.pod.apparmor_profile));
    findings.extend(privileges::check());
    findings.extend(roots::check(config));
    findings.push(accounting::check(&config.state_root));
    findings.extend(socket::check(&config.listen));
    findings.extend(network::check(config));
    findings.extend(cdi::check(config));
    findings.extend(sysctl::check());
    findings.extend(host::check(config, privileged));
    let handlers = handlers::check(config, &findings);
    findings.extend(handlers);
    Report { findings }
}
