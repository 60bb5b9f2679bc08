//! One command of a runtime's, from fork to exit: its streams, its log, its deadline.
//!
//! Runs in a job of the keeper's, a forked process with one thread.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Runtime, words};
use crate::cgroup::{Hierarchies, pin};
use crate::sys;

/// How long a runtime that was asked to end (SIGTERM) may take before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long SIGKILL may take; a process in an uninterruptible wait survives it.
const AFTER_KILL: Duration = Duration::from_secs(3);
/// What poll(2) can wait, in its milliseconds, for certain.
const LONGEST_POLL: Duration = Duration::from_secs(86400);
/// How much of a standard error is read, in bytes.
const LONGEST_STDERR: u64 = 16 << 10;
/// The whole environment of a runtime. It gets none of the daemon's: runc, for one, would take a NOTIFY_SOCKET for the
/// container's.
const ENVIRONMENT: &[&std::ffi::CStr] =
    &[c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];

/// Why a runtime's command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It can't be run at all.
    #[error("can't run {}, the program of runtime handler {handler:?}; see slipway check", path.display())]
    NotRun {
        /// The handler.
        handler: String,
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A shim failed, and said why.
    #[error("runtime handler {handler:?}: {said}")]
    Shim {
        /// The handler.
        handler: String,
        /// Because it did not answer in time.
        late: bool,
        /// Its own words.
        said: String,
    },
    /// Something around it failed.
    #[error("can't {step} for runtime handler {handler:?}")]
    Around {
        /// The handler.
        handler: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It failed, and said why.
    #[error("{} ({handler}) {command}: {}", name(path), said_or(said, *code))]
    Failed {
        /// The handler.
        handler: String,
        /// The program.
        path: PathBuf,
        /// Its command.
        command: String,
        /// Exit status, or 128 + signal.
        code: i32,
        /// Its own words; may be empty.
        said: String,
    },
    /// It did not end in time, and was ended.
    #[error(
        "{} ({handler}) {command} did not end within {timeout:?} and was killed{}",
        name(path),
        if said.is_empty() { String::new() } else { format!("; it said: {said}") }
    )]
    TimedOut {
        /// The handler.
        handler: String,
        /// The program.
        path: PathBuf,
        /// Its command.
        command: String,
        /// How long it had.
        timeout: Duration,
        /// Its own words; may be empty.
        said: String,
    },
}

impl CommandError {
    /// What the runtime said, if it did.
    pub fn said(&self) -> &str {
        match self {
            Self::Failed { said, .. } | Self::TimedOut { said, .. } | Self::Shim { said, .. } => {
                said
            }
            _ => "",
        }
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

fn said_or(said: &str, code: i32) -> String {
    match (said, code) {
        ("", 129..) => format!("it was ended by signal {} and said nothing", code - 128),
        ("", _) => format!("it failed with exit status {code} and said nothing"),
        _ => said.to_owned(),
    }
}

/// What a runtime's descriptors 0 to 2 are; without one it is `/dev/null`, and for the standard error something that
/// is read when the command fails.
#[derive(Default, Clone, Copy)]
pub struct Streams<'a> {
    /// Standard input.
    pub stdin: Option<BorrowedFd<'a>>,
    /// Standard output.
    pub stdout: Option<BorrowedFd<'a>>,
    /// Standard error.
    pub stderr: Option<BorrowedFd<'a>>,
}

/// A command.
pub struct Call<'a> {
    args: Vec<&'a str>,
    /// Where its log goes while it runs, and the working directory of the runtime.
    dir: &'a Path,
    until: Instant,
    /// How long that is, for messages.
    limit: Duration,
    streams: Streams<'a>,
    /// Whether this process's mount namespace is the runtime's already.
    prepared: bool,
    /// Further global arguments.
    global: &'a [&'a str],
}

impl<'a> Call<'a> {
    /// A command with its arguments, that must have ended by then.
    pub fn new(args: &[&'a str], dir: &'a Path, until: Instant) -> Self {
        let limit = until.saturating_duration_since(Instant::now());
        Self {
            args: args.to_vec(),
            dir,
            until,
            limit: Duration::from_secs(limit.as_secs_f64().round() as u64),
            streams: Streams::default(),
            prepared: false,
            global: &[],
        }
    }

    /// With these streams.
    pub fn streams(mut self, streams: Streams<'a>) -> Self {
        self.streams = streams;
        self
    }

    /// Of a longer time, which began before.
    pub fn of(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// In this process's mount namespace, in which [`hide_v2`] was called.
    pub fn prepared(mut self) -> Self {
        self.prepared = true;
        self
    }

    /// With further global arguments.
    pub fn global(mut self, arguments: &'a [&'a str]) -> Self {
        self.global = arguments;
        self
    }
}

/// Runs a command to its end, or its deadline.
///
/// # Errors
/// [`CommandError`].
pub fn run(runtime: &Runtime, cgroups: &Hierarchies, call: Call<'_>) -> Result<(), CommandError> {
    let around = |step: &'static str| {
        move |source: io::Error| CommandError::Around {
            handler: runtime.handler.clone(),
            step,
            source,
        }
    };
    // One for each job, as several commands may be about one container at once.
    let log = call.dir.join(format!("runtime-{}.log", std::process::id()));
    let stderr: File = memfd_create("runtime", MemfdFlags::CLOEXEC)
        .map_err(|e| around("make a file in memory")(e.into()))?
        .into();
    let (told, tell) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| around("make a pipe")(e.into()))?;
    let arguments = arguments(runtime, &call, &log).map_err(around("write the arguments"))?;
    let program = CString::new(runtime.path.as_os_str().as_bytes())
        .map_err(|e| around("name it")(e.into()))?;
    let parent = std::process::id().cast_signed();
    let pid = match sys::clone_process(&sys::CloneOptions::default()).map_err(around("fork"))? {
        sys::Forked::Child => {
            let failed = |step: u8, e: &io::Error| -> ! {
                let error = e.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
                let _ = rustix::io::write(&tell, &[&[step], error.as_slice()].concat());
                sys::exit_now(127)
            };
            if let Err(e) = become_runtime(parent, runtime, cgroups, &call, &stderr) {
                failed(b'a', &e);
            }
            let environment: Vec<CString> = ENVIRONMENT.iter().map(|&v| v.to_owned()).collect();
            let e = sys::execve(&program, &arguments, &environment);
            failed(b'x', &e)
        }
        sys::Forked::Parent(pid) => pid,
    };
    drop(tell);
    let in_time = wait(pid, call.until);
    let code = match in_time {
        true => {
            if !succeeded(pid) {
                // What it has left behind; it is not collected yet, so the number is still its group's.
                let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
            }
            Some(sys::wait_child(pid))
        }
        false => end(pid).then(|| sys::wait_child(pid)),
    };
    let mut failure = Vec::new();
    if code.is_some() {
        let _ = File::from(told).read_to_end(&mut failure);
    }
    let words = || {
        let said = words::of(&words::read_log(&log), &read_back(&stderr));
        let _ = std::fs::remove_file(&log);
        said
    };
    let command = call.args.first().copied().unwrap_or_default().to_owned();
    if let [step, error @ ..] = failure.as_slice()
        && let Ok(error) = <[u8; 4]>::try_from(error)
    {
        let source = io::Error::from_raw_os_error(i32::from_ne_bytes(error));
        return Err(match step {
            b'x' => CommandError::NotRun {
                handler: runtime.handler.clone(),
                path: runtime.path.clone(),
                source,
            },
            _ => around("prepare the mounts")(source),
        });
    }
    match code {
        Some(0) if in_time => {
            let _ = std::fs::remove_file(&log);
            Ok(())
        }
        Some(code) if in_time => Err(CommandError::Failed {
            handler: runtime.handler.clone(),
            path: runtime.path.clone(),
            command,
            code,
            said: words(),
        }),
        _ => Err(CommandError::TimedOut {
            handler: runtime.handler.clone(),
            path: runtime.path.clone(),
            command,
            timeout: call.limit,
            said: words(),
        }),
    }
}

fn arguments(runtime: &Runtime, call: &Call<'_>, log: &Path) -> io::Result<Vec<CString>> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    let mut add = |bytes: &[u8]| all.push(bytes.to_vec());
    add(runtime.path.as_os_str().as_bytes());
    add(b"--root");
    add(runtime.root.as_os_str().as_bytes());
    add(b"--log");
    add(log.as_os_str().as_bytes());
    add(b"--log-format");
    add(b"json");
    if runtime.sandbox.is_some() {
        add(b"--ignore-cgroups");
    }
    for argument in call.global {
        add(argument.as_bytes());
    }
    for argument in &runtime.arguments {
        add(argument.as_bytes());
    }
    for argument in &call.args {
        add(argument.as_bytes());
    }
    let all = all.into_iter().map(CString::new);
    Ok(all.collect::<Result<_, _>>()?)
}

/// Everything between fork and execve.
fn become_runtime(
    parent: i32,
    runtime: &Runtime,
    cgroups: &Hierarchies,
    call: &Call<'_>,
    stderr: &File,
) -> io::Result<()> {
    // Its own group, so that it can be ended with what it has started; and its own session, which what crun makes
    // without a terminal stays in.
    nix::unistd::setsid()?;
    sys::die_with(parent)?;
    sys::reset_signals();
    // One with a sandbox leaves all cgroups alone.
    let prepared = call.prepared || runtime.sandbox.is_some();
    if !prepared && cgroups.hidden_v2().is_some() {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        hide_v2(cgroups)?;
    }
    std::env::set_current_dir(call.dir)?;
    let null = |write: bool| File::options().read(!write).write(write).open("/dev/null");
    let streams = call.streams;
    let own = |fd: Option<BorrowedFd<'_>>, write: bool| -> io::Result<OwnedFd> {
        match fd {
            // Above 2, so that none is overwritten before it is used.
            Some(fd) => Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?),
            None => {
                let null = null(write)?;
                Ok(rustix::io::fcntl_dupfd_cloexec(&null, 3)?)
            }
        }
    };
    let stdin = own(streams.stdin, false)?;
    let stdout = own(streams.stdout, true)?;
    let stderr = own(Some(streams.stderr.unwrap_or(stderr.as_fd())), true)?;
    for (fd, to) in [stdin, stdout, stderr].iter().zip(0..) {
        sys::dup_to(fd, to)?;
    }
    sys::cloexec_all();
    Ok(())
}

/// Takes the v2 hierarchy of a hybrid host out of this mount namespace, which must be this process's own: crun refuses
/// to work where it sees one that has controllers. What a runtime makes is born in its cgroup there all the same
/// (see [`super::create`]).
///
/// # Errors
/// What mounting says.
pub fn hide_v2(cgroups: &Hierarchies) -> io::Result<()> {
    let Some(place) = cgroups.hidden_v2() else {
        return Ok(());
    };
    // What is unmounted from a shared mount goes from the host's, too.
    for (at, flags) in [
        (Path::new("/sys"), MsFlags::MS_PRIVATE),
        (
            Path::new(crate::cgroup_view::CGROUP_ROOT),
            MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        ),
    ] {
        mount(None::<&str>, at, None::<&str>, flags, None::<&str>)?;
    }
    Ok(umount2(place, MntFlags::MNT_DETACH)?)
}

/// Waits for the end of a child, without collecting it; false at the deadline.
fn wait(pid: i32, until: Instant) -> bool {
    let Some(process) = pin(pid) else { return true };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(timeout) = rustix::event::Timespec::try_from(left.min(LONGEST_POLL)) else {
            return false;
        };
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left > LONGEST_POLL => {}
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => {}
            _ => return true,
        }
    }
}

/// Whether a child that has ended did so with 0; it stays to be collected.
fn succeeded(pid: i32) -> bool {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    let status = waitid(Id::Pid(Pid::from_raw(pid)), flags);
    matches!(status, Ok(WaitStatus::Exited(_, 0)))
}

/// Ends a runtime and its process group, first politely; true when it has ended.
fn end(pid: i32) -> bool {
    let group = Pid::from_raw(-pid);
    let _ = kill(group, Signal::SIGTERM);
    let ended = wait(pid, Instant::now() + GRACE);
    // What it has started may not have ended with it.
    let _ = kill(group, Signal::SIGKILL);
    ended || wait(pid, Instant::now() + AFTER_KILL)
}

fn read_back(mut file: &File) -> String {
    let mut bytes = Vec::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(LONGEST_STDERR).read_to_end(&mut bytes));
    read.map_or_else(
        |_| String::new(),
        |_| String::from_utf8_lossy(&bytes).into_owned(),
    )
}

/// A path by a descriptor of this process, for other processes: short, and to be reached whatever may be passed on the
/// way to it.
pub fn short_path(dir: &OwnedFd, name: &str) -> String {
    format!("/proc/{}/fd/{}/{name}", std::process::id(), dir.as_raw_fd())
}
