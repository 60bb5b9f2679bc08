//! A command in a container, by its runtime.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Process, Spec};
use rustix::process::{Signal, pidfd_send_signal};
use slipway_proto::keeper::ErrorKind;

use super::command::{self, Call, Streams};
use super::create::{Console, parent_of};
use super::{CommandError, Runtime};
use crate::cgroup::{self, Hierarchies};
use crate::creator;
use crate::freezer::Freezer;
use crate::ids::IdMaps;

/// How often a command is tried in a container that is frozen again and again.
const TRIES: u32 = 3;

/// Why a command could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// What the container was made from is lost or damaged.
    #[error("can't read {}", path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A command that is no text.
    #[error("runtime handler {0:?} takes commands as text, and this is not UTF-8")]
    Text(String),
    /// The file for the runtime.
    #[error(transparent)]
    File(#[from] creator::CreateError),
    /// The runtime.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// It was frozen all the time.
    #[error(
        "the container is frozen: it is being checkpointed, or its runtime was told to pause it"
    )]
    Frozen,
    /// What it left is not what it should.
    #[error("runtime handler {handler:?} started the command, but {problem}")]
    Result {
        /// The handler.
        handler: String,
        /// What is wrong.
        problem: String,
    },
}

impl ExecError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Command(error) => error.kind(),
            Self::Text(_) => ErrorKind::Invalid,
            Self::Frozen => ErrorKind::TimedOut,
            _ => ErrorKind::Internal,
        }
    }
}

/// What is to be run.
pub struct Session<'a> {
    /// In which container.
    pub id: &'a str,
    /// That one's run directory.
    pub dir: &'a Path,
    /// Its cgroup.
    pub cgroup: &'a Path,
    /// Command and arguments.
    pub args: &'a [Vec<u8>],
    /// On a terminal.
    pub tty: bool,
    /// Three streams, or the socket that gets a terminal's master end.
    pub stdio: &'a [OwnedFd],
    /// How long starting it may take.
    pub timeout: Duration,
    /// The container's score for the OOM killer, which crun leaves as it is.
    pub oom_score_adj: i32,
}

/// Starts a command and returns its process id; the process becomes the keeper's child. `Err` with an exit code: the
/// runtime says that the command can't be executed, and has said it on the standard error, too. Runs in a job.
///
/// # Errors
/// [`ExecError`].
pub fn exec(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    session: &Session<'_>,
) -> Result<Result<i32, i32>, ExecError> {
    let until = Instant::now() + session.timeout;
    let wrong = |problem: String| ExecError::Result {
        handler: runtime.handler.clone(),
        problem,
    };
    let own = std::process::id();
    let process_file = session.dir.join(format!("exec-{own}.json"));
    let pid_file = session.dir.join(format!("exec-{own}.pid"));
    if runtime.sandbox.is_none() {
        creator::set_oom_score(session.oom_score_adj);
    }
    let spec = read_spec(session.dir)?;
    let process = process_of(
        &spec,
        &runtime.handler,
        session.dir,
        session.args,
        session.tty,
    )?;
    creator::write_private(&process_file, &process)?;
    let _files = Files([&process_file, &pid_file]);
    let console = match session.tty {
        true => Some(
            Console::listen(session.dir)
                .map_err(|e| wrong(format!("no terminal can be made: {e}")))?,
        ),
        false => None,
    };
    for fd in session.stdio.iter().filter(|_| !session.tty) {
        own_pipe(fd, &spec);
    }
    let texts = (process_file.to_string_lossy(), pid_file.to_string_lossy());
    let inner = inner_file(session.dir, own.cast_signed());
    let inner = inner.to_string_lossy();
    let mut args = vec![
        "exec",
        "--process",
        &texts.0,
        "--detach",
        "--pid-file",
        &texts.1,
    ];
    if runtime.sandbox.is_some() {
        args.extend(["--internal-pid-file", &inner]);
    }
    if let Some(console) = &console {
        args.extend(["--console-socket", &console.path]);
    }
    args.push(session.id);
    let mut streams = Streams::default();
    if let [stdin, stdout, stderr] = session.stdio {
        streams.stdin = Some(stdin.as_fd());
        streams.stdout = Some(stdout.as_fd());
        streams.stderr = Some(stderr.as_fd());
    }
    let call = || Call::new(&args, session.dir, until).streams(streams);
    let ran = unfrozen(runtime, cgroups, session.cgroup, until, || {
        command::run(runtime, cgroups, call())
    })?;
    if let Err(error) = ran {
        return match super::command_failure(error.said()) {
            Some(code) => {
                let command = session.args.first().map(|a| String::from_utf8_lossy(a));
                let command = command.unwrap_or_default();
                if let (false, [_, _, stderr]) = (error.said().contains(&*command), session.stdio) {
                    // The runtime has said the rest.
                    let text = format!("can't execute {command:?}\n");
                    let _ = rustix::io::write(stderr, text.as_bytes());
                }
                Ok(Err(code))
            }
            None => Err(error.into()),
        };
    }
    let pid = fs::read_to_string(&pid_file).unwrap_or_default();
    let pid: i32 = pid
        .trim()
        .parse()
        .ok()
        .filter(|pid| *pid > 1)
        .ok_or_else(|| wrong("wrote no process id".to_owned()))?;
    if let Some(parent) = parent_of(pid)
        && parent != nix::unistd::getppid().as_raw()
    {
        let problem = format!("process {pid} is a child of {parent}, and none of the pod's");
        return Err(wrong(problem));
    }
    if IdMaps::of_spec(&spec).is_some_and(|ids| !ended_or_in(&ids, pid)) {
        let problem =
            format!("its process {pid} was not in the pod's user namespace, and was killed");
        return Err(wrong(problem));
    }
    if let (Some(console), [socket]) = (console, session.stdio) {
        console
            .forward(socket)
            .map_err(|e| wrong(format!("its terminal did not come: {e}")))?;
    }
    Ok(Ok(pid))
}

/// Runs what runc and crun refuse in a frozen container, once it is not frozen: a checkpoint takes its time.
fn unfrozen(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    cgroup: &Path,
    until: Instant,
    mut run: impl FnMut() -> Result<(), CommandError>,
) -> Result<Result<(), CommandError>, ExecError> {
    // A sandbox is not frozen.
    let freezer = match runtime.sandbox {
        Some(_) => None,
        None => Freezer::of(cgroups, cgroup).ok(),
    };
    let mut tries = TRIES;
    loop {
        if let Some(freezer) = &freezer
            && !freezer.wait_until_thawed(until)
        {
            return Err(ExecError::Frozen);
        }
        tries -= 1;
        match run() {
            // Just after it was looked for.
            Err(error) if tries > 0 && super::says_paused(error.said()) => {}
            ran => return Ok(ran),
        }
    }
}

/// The process for a runtime: as the container's init, but for the command. The bundle is in `dir`.
///
/// # Errors
/// [`ExecError::Bundle`], [`ExecError::Text`].
pub fn process(
    handler: &str,
    dir: &Path,
    args: &[Vec<u8>],
    tty: bool,
) -> Result<Vec<u8>, ExecError> {
    process_of(&read_spec(dir)?, handler, dir, args, tty)
}

fn read_spec(dir: &Path) -> Result<Spec, ExecError> {
    let path = dir.join("config.json");
    let read = fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
    read.map_err(|source| ExecError::Bundle { path, source })
}

fn process_of(
    spec: &Spec,
    handler: &str,
    dir: &Path,
    args: &[Vec<u8>],
    tty: bool,
) -> Result<Vec<u8>, ExecError> {
    let failed = |source: io::Error| ExecError::Bundle {
        path: dir.join("config.json"),
        source,
    };
    let missing = || failed(io::ErrorKind::InvalidData.into());
    let mut process: Process = spec.process().clone().ok_or_else(missing)?;
    let args = args.iter().map(|a| String::from_utf8(a.clone()));
    let args = args
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| ExecError::Text(handler.to_owned()))?;
    let mut env = process.env().clone().unwrap_or_default();
    if tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    process
        .set_args(Some(args))
        .set_env(Some(env))
        .set_terminal(Some(tty));
    serde_json::to_vec(&process).map_err(|e| failed(e.into()))
}

/// Whether a command is in the pod's user namespace, or over. If it is not, it is killed: it would be the host's root.
fn ended_or_in(ids: &IdMaps, pid: i32) -> bool {
    let Some(process) = cgroup::pin(pid) else {
        return true;
    };
    if ids.are_of(pid).unwrap_or(false) {
        return true;
    }
    // The number may be somebody else's by now; then this one's process is gone.
    pidfd_send_signal(&process, Signal::KILL).is_err()
}

/// A process that is not root could not open /dev/stdout otherwise.
fn own_pipe(fd: &OwnedFd, spec: &Spec) {
    let Some(uid) = spec.process().as_ref().map(|p| p.user().uid()) else {
        return;
    };
    match IdMaps::of_spec(spec) {
        _ if !creator::is_pipe(fd) => {}
        Some(ids) => ids.own_pipe(fd, uid),
        None => {
            let _ = rustix::fs::fchown(fd, Some(rustix::fs::Uid::from_raw(uid)), None);
        }
    }
}

/// How the names of those files end.
pub const INNER: &str = ".inner";

/// Where a command's number in its sandbox is kept, by the job that has it started.
pub fn inner_file(dir: &Path, job: i32) -> PathBuf {
    dir.join(format!("exec-{job}{INNER}"))
}

/// Files that are of no use once the runtime has ended.
struct Files<'a>([&'a PathBuf; 2]);

impl Drop for Files<'_> {
    fn drop(&mut self) {
        for file in self.0 {
            let _ = fs::remove_file(file);
        }
    }
}

/// The descriptors that the job must not close.
pub fn descriptors(stdio: &[OwnedFd]) -> Vec<i32> {
    stdio.iter().map(AsRawFd::as_raw_fd).collect()
}
