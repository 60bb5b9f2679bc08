//! A container in its pod's sandbox has no process on the host that would be its own. What stands for it is an attendant: a
//! process of ours that waits to have the runtime start the container, and then for its end, with whose exit code it ends.
//!
//! ```text
//! keeper --fork--> job --fork--> attendant (becomes the keeper's child; holds streams and root file system until the start)
//!                   \-- RUNTIME create          |-- RUNTIME start
//!                                               \-- RUNTIME wait
//! ```
//!
//! It is in the sandbox's cgroup. Killing it ends nothing in the sandbox.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use slipway_proto::keeper::{
    Empty, Error as WireError, ErrorKind, Response, response::Result as Answer,
};

use super::command::{self, Call, Streams};
use super::{CommandError, KILL, Runtime, START};
use crate::cgroup::Hierarchies;
use crate::confine::chain;
use crate::creator::Stdio;
use crate::{sys, wire};

/// Exit code of a container that ended with its sandbox, or before it was started.
const KILLED: i32 = 128 + libc::SIGKILL;
/// What runsc exits with when it fails.
const FAILED: i32 = 128;
/// No container runs longer.
const EVER: Duration = Duration::from_secs(100 * 365 * 86400);
/// How long the answer to a start may trail the runtime's deadline.
const LAG: Duration = Duration::from_secs(3);
/// How often the runtime is asked for an end again when it was killed while it waited.
const TRIES: usize = 3;

/// The container that an attendant stands for.
pub struct Attended<'a> {
    /// Its runtime.
    pub runtime: &'a Runtime,
    /// The host's cgroups.
    pub cgroups: &'a Hierarchies,
    /// Its run directory.
    pub dir: &'a Path,
    /// Its id.
    pub id: &'a str,
    /// Its PID namespace does not end with its init.
    pub shared_pids: bool,
}

/// Forks the attendant of a container that the runtime has created, and returns its process id. Runs in a job, in whose mount
/// namespace the root file system is.
///
/// # Errors
/// What forking says.
pub fn fork(container: &Attended<'_>, stdio: &Stdio, control: &OwnedFd) -> io::Result<i32> {
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Parent(pid) => Ok(pid),
        sys::Forked::Child => {
            let _ = nix::unistd::setsid();
            // So that whoever wonders what this process is for can see it.
            let _ = std::env::set_current_dir(container.dir);
            let streams = match stdio {
                Stdio::Terminal(_) => Streams::default(),
                Stdio::Pipes {
                    stdin,
                    stdout,
                    stderr,
                } => Streams {
                    stdin: stdin.as_ref().map(AsFd::as_fd),
                    stdout: Some(stdout.as_fd()),
                    stderr: Some(stderr.as_fd()),
                },
            };
            let own = [streams.stdin, streams.stdout, streams.stderr];
            let mut keep: Vec<i32> = own.iter().flatten().map(AsRawFd::as_raw_fd).collect();
            keep.push(control.as_raw_fd());
            sys::close_all_but(&keep);
            sys::exit_now(attend(container, streams, control.as_fd()))
        }
    }
}

fn attend(container: &Attended<'_>, streams: Streams<'_>, control: BorrowedFd<'_>) -> i32 {
    let mut word = [0];
    let told = |word: &mut [u8]| loop {
        match rustix::io::read(control, &mut *word) {
            Err(rustix::io::Errno::INTR) => {}
            read => return read.is_ok_and(|n| n > 0),
        }
    };
    if !told(&mut word) {
        return KILLED;
    }
    let Attended {
        runtime,
        cgroups,
        dir,
        id,
        ..
    } = container;
    let call = Call::new(&["start", id], dir, Instant::now() + START);
    let started = command::run(runtime, cgroups, call.streams(streams).prepared());
    let (answer, failed) = match &started {
        Ok(()) => (Ok(()), None),
        Err(e) => {
            let code = super::command_failure(e.said());
            let kind = match code {
                Some(_) => ErrorKind::CannotRun,
                None => e.kind(),
            };
            let error = WireError {
                kind: kind.into(),
                message: chain(e),
            };
            (Err(error), Some(code.unwrap_or(FAILED)))
        }
    };
    let _ = rustix::io::write(control, &wire::frame(&response(answer)));
    if let Some(code) = failed {
        // The failure is told before the end that comes of it.
        told(&mut word);
        return code;
    }
    // From here on the streams are the container's alone.
    sys::close_all_but(&[control.as_raw_fd()]);
    let code = wait(container);
    if container.shared_pids {
        let _ = super::simple(runtime, cgroups, &["kill", "--all", id, "9"], dir, KILL);
    }
    code
}

fn response(answer: Result<(), WireError>) -> Response {
    match answer {
        Ok(()) => Response {
            error: None,
            result: Some(Answer::Empty(Empty {})),
        },
        Err(error) => Response {
            error: Some(error),
            result: None,
        },
    }
}

/// The exit code that `wait` prints.
fn exit_status(text: &str) -> Option<i32> {
    let value: serde_json::Value = serde_json::from_str(text.trim()).ok()?;
    i32::try_from(value.get("exitStatus")?.as_i64()?).ok()
}

/// Waits for the container's end, and returns its exit code.
fn wait(container: &Attended<'_>) -> i32 {
    for _ in 0..TRIES {
        match output(
            container.runtime,
            container.cgroups,
            &["wait", container.id],
            container.dir,
            EVER,
        ) {
            Ok(text) => return exit_status(&text).unwrap_or(KILLED),
            // Killed, maybe for want of memory, and maybe alone.
            Err(CommandError::Failed { code: 129.., .. }) => {}
            // It can't be asked any more: the sandbox is gone. The keeper, which hears of that as well, knows why, and kills
            // this process when it does.
            Err(_) => {
                let _ = rustix::event::poll(
                    &mut [],
                    rustix::event::Timespec::try_from(LAG).ok().as_ref(),
                );
                return KILLED;
            }
        }
    }
    KILLED
}

/// Runs a command of the runtime's and returns what it has written to its standard output.
///
/// # Errors
/// [`CommandError`].
pub fn output(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    args: &[&str],
    dir: &Path,
    timeout: Duration,
) -> Result<String, CommandError> {
    let failed = |source: io::Error| CommandError::Around {
        handler: runtime.handler.clone(),
        step: "keep an answer",
        source,
    };
    let answer = memfd_create("answer", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let mut answer = File::from(answer);
    let streams = Streams {
        stdout: Some(answer.as_fd()),
        ..Streams::default()
    };
    let call = Call::new(args, dir, Instant::now() + timeout).streams(streams);
    command::run(runtime, cgroups, call)?;
    let mut text = String::new();
    let read = answer
        .rewind()
        .and_then(|()| answer.read_to_string(&mut text));
    read.map_err(failed)?;
    Ok(text)
}

/// Has an attendant start its container. Runs in a job.
///
/// # Errors
/// What the runtime said, or that there is no attendant any more.
pub fn start(control: OwnedFd, id: &str) -> Result<(), WireError> {
    let failed = |source: io::Error| WireError {
        kind: ErrorKind::Internal.into(),
        message: format!("can't have container {id} started in its sandbox: {source}"),
    };
    let mut control = UnixStream::from(control);
    let asked = control
        .set_read_timeout(Some(START + LAG))
        .and_then(|()| control.write_all(b"s"));
    asked.map_err(failed)?;
    let mut read = || -> io::Result<Response> {
        let mut head = [0; 4];
        control.read_exact(&mut head)?;
        let mut body = vec![0; wire::announced_len(head)?];
        control.read_exact(&mut body)?;
        wire::decode(&body)
    };
    match read().map_err(failed)?.error {
        None => Ok(()),
        Some(error) => Err(error),
    }
}
