//! The OCI runtime command line (`slipway oci create|start|state|kill|delete|…`) over the code that makes Slipway's own
//! containers: what podman, containerd's shim or conmon call in the place of runc.
//!
//! ```text
//! caller ─exec─► slipway oci create ─fork─► creator ─libcontainer─► init    waits for "start"
//!                 │    ▲ asks for hooks ───────┘                     ▲
//!                 │                                                  │
//!                 └─ <root>/<id>/: record.json, spec.json, start (FIFO), libcontainer's socket
//! caller ─exec─► slipway oci start ──────────────────────────────────┘
//! ```
//!
//! There is no daemon and no keeper: the container's init becomes the child of whoever collects its caller's orphans.
//! What a container is doing is never written down, but looked at: whether its init lives, by process number and time of
//! start; whether it still waits, by who has the FIFO open; whether it is frozen, by its cgroup. So nothing that is
//! killed half way leaves a wrong state behind.
//!
//! Everything here runs in single-threaded processes: libcontainer forks without `fork`'s handlers.
#![forbid(unsafe_code)]

mod agent;
mod bundle;
mod cgroup_path;
mod cli;
mod console;
mod copy_up;
mod create;
mod delete;
mod error;
mod exec;
mod features;
mod foreground;
mod hooks;
mod kill;
mod list;
mod log;
mod namespaces;
mod process_file;
mod ps;
mod record;
mod relay;
mod shared_mounts;
mod start;
mod template;
mod trace;
mod update;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use liboci_cli::{CommonCmd, StandardCmd};
use slipway_runtime::confine::chain;

use cli::Command;
pub use error::OciError;
use log::Log;

/// The word after `slipway` that leads here.
pub const COMMAND: &str = "oci";

/// Where state is kept when `--root` says nothing.
pub const DEFAULT_ROOT: &str = "/run/slipway-oci";

type Result<T> = std::result::Result<T, OciError>;

/// What every command has.
pub(crate) struct Context {
    /// Where state is kept.
    root: PathBuf,
    /// Cgroups are scopes of systemd's.
    systemd: bool,
    /// How many descriptors the caller left open, counted from 3: what is opened here gets greater numbers.
    passed: u32,
    log: Log,
}

/// Runs a command; `args` are those behind `slipway oci`. Call it before any thread is started.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // Before anything is opened.
    let open = |fd: &u32| std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
    let passed = (3..).take_while(open).count();
    let args: Vec<OsString> = args.into_iter().collect();
    if args.first().is_some_and(|arg| arg == relay::COMMAND) {
        return relay::main(&args[1..]);
    }
    let cli = match cli::parse(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1));
        }
    };
    let log = match Log::open(&cli.global) {
        Ok(log) => log,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "slipway oci: error: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let context = Context {
        root: cli
            .global
            .root
            .clone()
            .unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT)),
        systemd: cli.global.systemd_cgroup,
        passed: u32::try_from(passed).unwrap_or(0),
        log,
    };
    match run(&context, cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            context.log.error(&chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(context: &Context, command: Command) -> Result<u8> {
    let done = |()| 0;
    match command {
        Command::Standard(StandardCmd::Create(args)) => create::create(context, &args).map(done),
        Command::Standard(StandardCmd::Start(args)) => {
            start::start(context, &args.container_id).map(done)
        }
        Command::Standard(StandardCmd::State(args)) => {
            list::state(context, &args.container_id).map(done)
        }
        Command::Standard(StandardCmd::Kill(args)) => kill::kill(context, &args).map(done),
        Command::Standard(StandardCmd::Delete(args)) => {
            delete::delete(context, &args.container_id, args.force).map(done)
        }
        Command::Common(command) => common(context, *command),
        Command::Update(args) => update::update(context, &args).map(done),
        Command::Restore { .. } => Err(NO_CHECKPOINTS),
    }
}

fn common(context: &Context, command: CommonCmd) -> Result<u8> {
    let done = |()| 0;
    match command {
        CommonCmd::Run(args) => create::run(context, &args),
        CommonCmd::Exec(args) => exec::exec(context, &args),
        CommonCmd::Pause(args) => kill::pause(context, &args.container_id).map(done),
        CommonCmd::Resume(args) => kill::resume(context, &args.container_id).map(done),
        CommonCmd::Update(_) => Err(OciError::Unsupported {
            what: "this form of update",
            instead: "use update",
        }),
        CommonCmd::Ps(args) => ps::ps(context, &args).map(done),
        CommonCmd::List(args) => list::list(context, &args).map(done),
        CommonCmd::Features(_) => features::print_features().map(done),
        CommonCmd::Spec(args) => template::write(&args).map(done),
        CommonCmd::Events(_) => Err(OciError::Unsupported {
            what: "events",
            instead: "read the container's cgroup, whose path `state` tells as cgroupPath",
        }),
        CommonCmd::Checkpointt(_) => Err(NO_CHECKPOINTS),
    }
}

const NO_CHECKPOINTS: OciError = OciError::Unsupported {
    what: "checkpoint and restore",
    instead: "use the daemon's CheckpointContainer for containers of pods",
};

/// Writes to standard output; a closed pipe (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(OciError::file("write to", "standard output")(e))
        }
        _ => Ok(()),
    }
}
