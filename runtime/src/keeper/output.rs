//! A container's standard streams in its keeper: made, drained into the log and to readers, ended.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use slipway_proto::keeper::{
    CreateContainer, Empty, Error as WireError, ErrorKind, response::Result as Answer,
};

use super::container::not_found;
use super::{Keeper, Source, wire_error};
use crate::creator::Stdio;
use crate::log::{LineSplitter, Stream, timestamp};
use crate::{descriptor, terminal};

/// Most bytes that one round of the loop takes from one pipe, so that one noisy container does not keep
/// the others, or a call, waiting.
const PUMP_BUDGET: usize = 1 << 20;

/// How much is kept of what comes before a container is made: its runtime's words.
const LONGEST_EARLY: usize = 4096;

pub(super) struct Output {
    pub(super) pipe: OwnedFd,
    pub(super) terminal: bool,
    pub(super) token: u64,
    pub(super) lines: LineSplitter,
}

/// The keeper's ends of a container's standard streams, all non-blocking.
#[derive(Default)]
pub(super) struct Streams {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) terminal: Option<OwnedFd>,
}

impl Streams {
    /// Makes both ends.
    pub(super) fn new(create: &CreateContainer) -> std::io::Result<(Stdio, Self)> {
        let mut ours = Self::default();
        if create.tty {
            let (socket, theirs) = UnixStream::pair()?;
            socket.set_nonblocking(true)?;
            ours.terminal = Some(socket.into());
            return Ok((Stdio::Terminal(theirs.into()), ours));
        }
        let (out_read, stdout) = pipe(true)?;
        let (err_read, stderr) = pipe(true)?;
        (ours.stdout, ours.stderr) = (Some(out_read), Some(err_read));
        let mut stdin = None;
        if create.stdin {
            let (read, write) = pipe(false)?;
            (stdin, ours.stdin) = (Some(read), Some(write));
        }
        Ok((
            Stdio::Pipes {
                stdin,
                stdout,
                stderr,
            },
            ours,
        ))
    }
}

/// A pipe, closed by execve. The flags of its two ends are separate.
pub(super) fn pipe(non_blocking_read: bool) -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = descriptor::pipe()?;
    if non_blocking_read {
        rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK)?;
    }
    Ok((read, write))
}

impl Keeper {
    /// Starts to drain a non-blocking descriptor.
    pub(super) fn watch_output(
        &mut self,
        id: &str,
        pipe: OwnedFd,
        stream: Stream,
        terminal: bool,
    ) -> std::io::Result<Output> {
        let token = self.watch(&pipe, Source::Output(id.to_owned(), stream))?;
        Ok(Output {
            pipe,
            terminal,
            token,
            lines: LineSplitter::new(stream),
        })
    }

    /// Takes over the terminal that a container's init has opened and sent.
    pub(super) fn take_terminal(&mut self, id: &str) -> std::io::Result<()> {
        let container = self.containers.get_mut(id);
        let Some(socket) = container.and_then(|c| c.terminal.take()) else {
            return Ok(());
        };
        let master = terminal::receive(&socket)?;
        rustix::fs::fcntl_setfl(&master, rustix::fs::OFlags::NONBLOCK)?;
        let output = self.watch_output(id, master, Stream::Stdout, true)?;
        if let Some(container) = self.containers.get_mut(id) {
            container.stdout = Some(output);
        }
        Ok(())
    }

    /// Takes what a pipe holds, within the budget.
    pub(super) fn pump(&mut self, id: &str, stream: Stream) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let mut buffer = vec![0; 256 << 10];
        let mut lines = Vec::new();
        let (mut taken, mut ended) = (0, false);
        let time = timestamp(SystemTime::now());
        let mut readers = std::mem::take(&mut container.readers);
        let mut early = container.take_early();
        let Some(output) = container.output(stream).as_mut() else {
            container.readers = readers;
            container.put_early(early);
            return;
        };
        while taken < PUMP_BUDGET {
            match rustix::io::read(&output.pipe, &mut buffer) {
                Ok(0) => {
                    ended = true;
                    break;
                }
                Ok(n) => {
                    taken += n;
                    output.lines.feed(&buffer[..n], time.as_bytes(), &mut lines);
                    readers.feed(stream, &buffer[..n]);
                    if let Some(early) = early.as_mut().filter(|_| stream == Stream::Stderr) {
                        early.extend_from_slice(&buffer[..n]);
                        // The end of it is what counts.
                        let beyond = early.len().saturating_sub(LONGEST_EARLY);
                        early.drain(..beyond);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    ended = true;
                    break;
                }
            }
        }
        container.readers = readers;
        container.put_early(early);
        // A full disk must not stop the container, and there is nowhere else to put the text.
        let _ = container.log.write(&lines);
        if ended {
            self.end_output(id, stream);
        }
    }

    pub(super) fn pump_all(&mut self, id: &str, stream: Stream) {
        // A process outside the container's PID namespace may go on writing; what is there now counts.
        for _ in 0..64 {
            let waiting = self.containers.get_mut(id).is_some_and(|c| {
                c.output(stream)
                    .as_ref()
                    .is_some_and(|o| rustix::io::ioctl_fionread(&o.pipe).is_ok_and(|n| n > 0))
            });
            if !waiting {
                return;
            }
            self.pump(id, stream);
        }
    }

    pub(super) fn end_output(&mut self, id: &str, stream: Stream) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(mut output) = container.output(stream).take() else {
            return;
        };
        let mut lines = Vec::new();
        output
            .lines
            .finish(timestamp(SystemTime::now()).as_bytes(), &mut lines);
        let _ = container.log.write(&lines);
        container.readers.end(stream);
        self.forget(&output.pipe, output.token);
    }

    /// Ends both streams and closes the log.
    pub(super) fn drop_io(&mut self, id: &str) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.end_output(id, stream);
        }
        if let Some(container) = self.containers.get_mut(id) {
            container.log.close();
            container.stdin = None;
        }
    }

    pub(super) fn reopen_log(&mut self, id: &str) -> Result<Answer, WireError> {
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        container.log.reopen().map_err(|e| {
            wire_error(
                ErrorKind::Internal,
                format!("can't reopen the log of {id}: {e}"),
            )
        })?;
        if container.has_exited() {
            container.log.close();
        }
        Ok(Answer::Empty(Empty {}))
    }
}
