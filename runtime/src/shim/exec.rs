//! A command in a container, by its pod's shim: one job from its start to its end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipway_proto::keeper::{ErrorKind, ExecResult};
use slipway_shim::{Exec, Process, ShimError};

use super::input::Input;
use super::relay::{Limits, Relay, Terminal, begin};
use super::{EXEC, KILL, Running, Shim, Turn, kind, path_of, text};
use crate::oci::{self, ExecError};

/// What is to be run.
pub struct Session<'a> {
    /// In which container.
    pub id: &'a str,
    /// That one's run directory.
    pub dir: &'a Path,
    /// Command and arguments.
    pub args: &'a [Vec<u8>],
    /// On a terminal.
    pub tty: bool,
    /// Three streams, or the socket that gets a terminal's master end.
    pub stdio: &'a [OwnedFd],
    /// How long it may take in all.
    pub timeout: Option<Duration>,
    /// Closed by the other side when nobody waits for it any more.
    pub caller: &'a OwnedFd,
    /// Its place in the queue at the shim.
    pub turn: Turn,
    /// The container's processes are the host's, and so will this one be.
    pub on_host: bool,
    /// What kills a process of the host's with all that it started.
    pub kill_tree: &'a dyn Fn(i32),
}

/// Why a command could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The shim.
    #[error("runtime handler {handler:?}: can't {step}")]
    Shim {
        /// The handler.
        handler: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: Box<ShimError>,
    },
    /// What precedes its part.
    #[error(transparent)]
    Process(#[from] ExecError),
    /// Its streams.
    #[error("runtime handler {handler:?}: the command's streams failed")]
    Streams {
        /// The handler.
        handler: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl Failure {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Shim { source, .. } => kind(source),
            Self::Process(error) => error.kind(),
            Self::Streams { .. } => ErrorKind::Internal,
        }
    }
}

/// Runs a command to its end. Runs in a job.
///
/// # Errors
/// [`Failure`]. A command that can't be executed is no failure, but a result, and the reason is on its standard
/// error.
pub fn exec(shim: &Shim, running: &Running, session: Session<'_>) -> Result<ExecResult, Failure> {
    let failed = |step: &'static str| {
        move |source: ShimError| Failure::Shim {
            handler: shim.handler.clone(),
            step,
            source: source.into(),
        }
    };
    let streams = |source| Failure::Streams {
        handler: shim.handler.clone(),
        source,
    };
    let name = format!("exec-{}", std::process::id());
    let process = oci::process(&shim.handler, session.dir, session.args, session.tty)?;
    let mut task = running.connect().map_err(failed("call the pod's shim"))?;
    let mut files = Files::default();
    let mut relay = Relay::none(running.clone());
    let mut paths = [String::new(), String::new(), String::new()];
    match session.stdio {
        [socket] => {
            let stdin = files.fifo(session.dir, &name, "in").map_err(streams)?;
            let stdout = files.fifo(session.dir, &name, "out").map_err(streams)?;
            paths = [text(&stdin), text(&stdout), String::new()];
            let terminal = Terminal::open(&stdin, &stdout).map_err(streams)?;
            begin(socket).map_err(streams)?;
            relay = Relay::new(terminal, running.clone()).map_err(streams)?;
        }
        // The shim opens the caller's own pipes for output: nothing is copied twice.
        stdio => {
            for (path, fd) in paths.iter_mut().zip(stdio) {
                *path = path_of(fd);
            }
            paths[0].clear();
            if let Some(from) = stdio.first().filter(|from| Input::is(from)) {
                let fifo = files.fifo(session.dir, &name, "in").map_err(streams)?;
                paths[0] = text(&fifo);
                let input = Input::new(from, &fifo).map_err(streams)?;
                relay = relay.with_input(input, fifo);
            }
        }
    }
    let exec = Exec {
        id: session.id,
        exec: &name,
        terminal: session.tty,
        stdin: &paths[0],
        stdout: &paths[1],
        stderr: &paths[2],
        process,
    };
    let command = Process {
        id: session.id,
        exec: &name,
    };
    let deadline = session.timeout.map(|timeout| Instant::now() + timeout);
    let patience = |longest: Duration| {
        let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        left.map_or(longest, |left| left.min(longest))
            .max(Duration::from_millis(1))
    };
    let late = |deadline: Option<Instant>| deadline.is_some_and(|d| d <= Instant::now());
    let timed_out = ExecResult {
        exit_code: 128 + libc::SIGKILL,
        timed_out: true,
    };
    let until = Instant::now() + patience(EXEC);
    match session.turn.wait(until, Some(session.caller)) {
        Ok(true) => {}
        Ok(false) if until <= Instant::now() && !late(deadline) => {
            return Err(failed("start the command, for others are in its way")(
                ShimError::TimedOut {
                    method: "Start".to_owned(),
                    timeout: EXEC,
                },
            ));
        }
        // Its time is up, or nobody waits any more.
        Ok(false) => return Ok(timed_out),
        Err(source) => return Err(streams(source)),
    }
    match task.exec(&exec, patience(EXEC)) {
        Err(e) if e.is_timeout() && late(deadline) => return Ok(timed_out),
        prepared => prepared.map_err(failed("prepare the command"))?,
    }
    let started = task.start(command, patience(EXEC));
    drop(session.turn);
    let pid = match started {
        Ok(pid) => pid,
        Err(e) => {
            let _ = running.connect().and_then(|mut task| {
                let _ = task.kill(command, libc::SIGKILL.cast_unsigned(), true, KILL);
                task.delete(command, KILL)
            });
            if e.is_timeout() && late(deadline) {
                return Ok(timed_out);
            }
            let said = e.to_string();
            let Some(exit_code) = oci::command_failure(&said) else {
                return Err(failed("start the command")(e));
            };
            // As a shell does it: the caller sees the text on standard error and the code.
            let words = format!("{said}\r\n");
            match session.stdio {
                [_, _, stderr] => drop(rustix::io::write(
                    stderr,
                    words.trim_end_matches('\r').as_bytes(),
                )),
                _ => drop(rustix::io::write(io::stdout(), words.as_bytes())),
            }
            return Ok(ExecResult {
                exit_code,
                timed_out: false,
            });
        }
    };
    relay.started(pid, session.on_host).map_err(streams)?;
    let mut limits = Limits {
        deadline,
        caller: Some(session.caller),
        end: Box::new(|| {
            if let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) {
                (session.kill_tree)(pid);
            }
            let _ = running
                .connect()
                .and_then(|mut task| task.kill(command, libc::SIGKILL.cast_unsigned(), true, KILL));
        }),
        ended: false,
        late: false,
        exit: None,
    };
    let ran = relay.run(&mut task, command, &mut limits);
    match limits.exit {
        Some(exit) => Ok(ExecResult {
            exit_code: i32::try_from(exit.code).unwrap_or(255),
            timed_out: limits.late,
        }),
        None if limits.late => Ok(timed_out),
        None => Err(streams(
            ran.err()
                .unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()),
        )),
    }
}

/// FIFOs that are of no use once the command has ended.
#[derive(Default)]
struct Files(Vec<PathBuf>);

impl Files {
    fn fifo(&mut self, dir: &Path, name: &str, end: &str) -> io::Result<PathBuf> {
        let path = dir.join(format!("{name}.{end}"));
        let _ = fs::remove_file(&path);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
        self.0.push(path.clone());
        Ok(path)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = fs::remove_file(file);
        }
    }
}
