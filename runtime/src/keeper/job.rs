//! Work done in a forked child of the keeper: its answer comes back through a pipe.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::pipe::PipeFlags;
use slipway_proto::keeper::{
    Empty, Error as WireError, ErrorKind, Response, Warned, response::Result as Answer,
};

use super::{Keeper, Source, wire_error};
use crate::{sys, wire};

/// What becomes of a job's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    Setup,
    /// Starts the pod's shim.
    Sandbox,
    /// Has the shim forget a container that has ended, with this exit code.
    Reap(String, i32),
    /// Asks the shim how a container ended of which it has not told.
    Ask(String),
    /// Runs a command by the shim, to its end.
    ShimExec,
    /// Removes what a shim that is gone has left.
    Clear,
    Create(String),
    /// Has a runtime start a container.
    Start(String),
    /// Has a runtime start an exec.
    Exec,
    /// Has a runtime send a signal.
    Kill,
    /// Removes what a failed create left; the error that the caller gets then.
    Undo(String, String, i32),
    Delete(String),
    /// The hooks after a start, whose call is answered when they are through.
    PostStart,
    Update,
    Checkpoint,
    Restore(String),
    /// Kills what a failed restore left; the error that the caller gets then.
    Unrestore(String, String, i32),
    Teardown,
}

/// A running job.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) purpose: Purpose,
    /// Who waits for the answer.
    pub(super) connection: u64,
    pipe: OwnedFd,
    token: u64,
    input: Vec<u8>,
    /// Set when the child has ended; the answer may still be in the pipe.
    exit: Option<i32>,
}

/// What a job starts with.
#[derive(Default)]
pub(super) struct Origin<'a> {
    /// Descriptors of the keeper that it keeps.
    pub(super) keep: &'a [RawFd],
    /// The cgroup it is born in; `None` for the keeper's.
    pub(super) cgroup: Option<BorrowedFd<'a>>,
    /// Namespaces that it is born with (`CLONE_NEW*`).
    pub(super) namespaces: u64,
}

/// The answer of a call that was done, with what the daemon is to log.
pub(super) fn done(warnings: Vec<String>) -> Answer {
    match warnings.is_empty() {
        true => Answer::Empty(Empty {}),
        false => Answer::Warned(Warned { warnings }),
    }
}

impl Keeper {
    /// Forks a child that runs `work` and sends its answer.
    pub(super) fn start_job(
        &mut self,
        purpose: Purpose,
        connection: u64,
        origin: Origin<'_>,
        work: impl FnOnce() -> Result<Answer, WireError>,
    ) -> io::Result<i32> {
        // Seekable memory would do as well, but a pipe tells when the answer is there. Non-blocking on
        // our side only: the flags belong to the two ends separately.
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK)?;
        let options = sys::CloneOptions {
            cgroup: origin.cgroup,
            new_namespaces: origin.namespaces,
            ..Default::default()
        };
        let keeper = std::process::id().cast_signed();
        match sys::clone_process(&options)? {
            sys::Forked::Child => {
                // What a dead keeper's job still makes would be nobody's.
                if sys::die_with(keeper).is_err() {
                    sys::exit_now(1);
                }
                let mut kept = origin.keep.to_vec();
                kept.push(write.as_raw_fd());
                sys::reset_signals();
                sys::close_all_but(&kept);
                let response = match work() {
                    Ok(result) => Response {
                        error: None,
                        result: Some(result),
                    },
                    Err(error) => Response {
                        error: Some(error),
                        result: None,
                    },
                };
                let sent = std::fs::File::from(write).write_all(&wire::frame(&response));
                sys::exit_now(i32::from(sent.is_err()))
            }
            sys::Forked::Parent(pid) => {
                drop(write);
                let token = self.watch(read.as_fd(), Source::Job(pid))?;
                let job = Job {
                    purpose,
                    connection,
                    pipe: read,
                    token,
                    input: Vec::new(),
                    exit: None,
                };
                self.jobs.insert(pid, job);
                Ok(pid)
            }
        }
    }

    pub(super) fn job_readable(&mut self, pid: i32) {
        let Some(job) = self.jobs.get_mut(&pid) else {
            return;
        };
        let mut buffer = [0; 4096];
        let mut pipe = std::fs::File::from(match job.pipe.try_clone() {
            Ok(pipe) => pipe,
            Err(_) => return,
        });
        let ended = loop {
            match pipe.read(&mut buffer) {
                Ok(0) => break true,
                Ok(n) => job.input.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break true,
            }
        };
        let complete = job.input.first_chunk::<4>().is_some_and(|head| {
            wire::announced_len(*head).is_ok_and(|len| job.input.len() >= 4 + len)
        });
        if complete || ended {
            self.finish_job(pid);
        }
    }

    pub(super) fn job_exited(&mut self, pid: i32, code: i32) {
        if let Some(job) = self.jobs.get_mut(&pid) {
            job.exit = Some(code);
        }
        // Its last words first; the pipe itself may be held open by the container that it made.
        self.job_readable(pid);
        if self.jobs.contains_key(&pid) {
            self.finish_job(pid);
        }
    }

    fn finish_job(&mut self, pid: i32) {
        let Some(job) = self.jobs.remove(&pid) else {
            return;
        };
        self.forget(&job.pipe, job.token);
        let answer = match job.input.get(4..).map(wire::decode::<Response>) {
            Some(Ok(Response {
                error: Some(error), ..
            })) => Err(error),
            Some(Ok(Response {
                result: Some(result),
                ..
            })) => Ok(result),
            _ => Err(wire_error(
                ErrorKind::Internal,
                match job.exit {
                    Some(code) if code > 128 => {
                        format!(
                            "the process that did this was killed by signal {}",
                            code - 128
                        )
                    }
                    Some(code) => format!("the process that did this exited with {code}"),
                    None => "the process that did this gave no answer".to_owned(),
                },
            )),
        };
        match job.purpose {
            Purpose::Setup => self.sandbox_made(job.connection, answer),
            Purpose::Sandbox => self.sandbox_started(job.connection, answer),
            // One that does not answer is found out by others; the container has ended.
            Purpose::Reap(id, code) => self.shim_exited(&id, code),
            Purpose::Ask(id) => self.end_asked(&id, answer),
            Purpose::ShimExec => {
                self.shim_exec_ended(pid, &answer);
                self.reply(job.connection, answer);
            }
            Purpose::Clear => self.shim_cleared(),
            Purpose::Create(id) => self.container_made(&id, job.connection, answer),
            Purpose::Start(id) => self.start_done(&id, answer),
            Purpose::Exec => self.exec_started(pid, answer),
            Purpose::Undo(id, message, kind) => {
                // What could not be removed stays known: the daemon asks for its deletion next.
                let message = match answer {
                    Ok(answer) => {
                        self.containers.remove(&id);
                        let warnings = match answer {
                            Answer::Warned(warned) => warned.warnings,
                            _ => Vec::new(),
                        };
                        let parts = std::iter::once(message).chain(warnings);
                        parts.collect::<Vec<_>>().join("; ")
                    }
                    Err(undo) => format!("{message}; undoing it failed, too: {}", undo.message),
                };
                self.reply(job.connection, Err(WireError { kind, message }));
            }
            Purpose::Delete(id) => self.container_deleted(&id, job.connection, answer),
            Purpose::PostStart => {
                // Its container runs, whatever became of the hooks.
                let warned =
                    |error: WireError| done(vec![format!("poststart hooks: {}", error.message)]);
                self.reply(job.connection, Ok(answer.unwrap_or_else(warned)));
            }
            Purpose::Update | Purpose::Checkpoint | Purpose::Kill => {
                self.reply(job.connection, answer)
            }
            Purpose::Restore(id) => self.restored(&id, job.connection, answer),
            Purpose::Unrestore(id, message, kind) => {
                self.restore_failed(&id, job.connection, WireError { kind, message });
            }
            Purpose::Teardown => self.torn_down(job.connection, answer),
        }
    }
}
