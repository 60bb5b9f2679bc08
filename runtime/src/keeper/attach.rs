//! Attached readers of a container's output, and the other end of its standard input.
//!
//! A reader is a pipe of the daemon's. The container never waits for one: what does not fit into the pipe is
//! left out, and the reader is told how much that was. The log has it all.

use std::os::fd::OwnedFd;

use slipway_proto::keeper::{
    Attach, Empty, Error as WireError, ErrorKind, response::Result as Answer,
};

use super::container::not_found;
use super::{Keeper, wire_error};
use crate::log::Stream;
use crate::wire;

/// One who reads along.
#[derive(Debug)]
pub(super) struct Reader {
    pipe: OwnedFd,
    stream: Stream,
    /// Bytes left out since the pipe was last written to.
    skipped: usize,
}

/// Everybody who reads along with one container.
#[derive(Debug, Default)]
pub(super) struct Readers(Vec<Reader>);

impl Readers {
    fn add(&mut self, pipe: OwnedFd, stream: Stream) -> std::io::Result<()> {
        rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::NONBLOCK)?;
        self.0.push(Reader {
            pipe,
            stream,
            skipped: 0,
        });
        Ok(())
    }

    /// Hands output on; those who have gone are forgotten.
    pub(super) fn feed(&mut self, stream: Stream, bytes: &[u8]) {
        self.0
            .retain_mut(|reader| reader.stream != stream || reader.write(bytes));
    }

    /// The stream has ended.
    pub(super) fn end(&mut self, stream: Stream) {
        self.0.retain(|reader| reader.stream != stream);
    }
}

impl Reader {
    /// False when nobody reads any more.
    fn write(&mut self, mut bytes: &[u8]) -> bool {
        use rustix::io::Errno;
        if self.skipped > 0 {
            let note = format!(
                "\r\n[slipway: {} bytes left out here, the reader was too slow]\r\n",
                self.skipped
            );
            // All or nothing: writes of this size are atomic (pipe(7)).
            match rustix::io::write(&self.pipe, note.as_bytes()) {
                Ok(_) => self.skipped = 0,
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.skipped += bytes.len();
                    return true;
                }
                Err(_) => return false,
            }
        }
        while !bytes.is_empty() {
            match rustix::io::write(&self.pipe, bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.skipped = bytes.len();
                    return true;
                }
                Err(_) => return false,
            }
        }
        true
    }
}

impl Keeper {
    /// Lets the daemon read along, and sends it what it writes the container's input to, and resizes its
    /// terminal with. Descriptors: write ends of pipes for stdout and stderr, and a socket for the latter.
    pub(super) fn attach(&mut self, call: &Attach, fds: Vec<OwnedFd>) -> Result<Answer, WireError> {
        let id = call.container_id.as_str();
        let invalid = |what: &str| wire_error(ErrorKind::Invalid, what);
        let failed = |e: &dyn std::fmt::Display| {
            wire_error(
                ErrorKind::Internal,
                format!("can't attach to container {id}: {e}"),
            )
        };
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        if container.has_exited() || container.is_creating() {
            return Err(wire_error(
                ErrorKind::WrongState,
                format!("can't attach to container {id}: it is not running"),
            ));
        }
        let [stdout, stderr, socket] = <[OwnedFd; 3]>::try_from(fds)
            .map_err(|_| invalid("an attach needs three descriptors: stdout, stderr, a socket"))?;
        if let Some(input) = container.input() {
            wire::send_with_fds(&socket, b"i", &[input]).map_err(|e| failed(&e))?;
        }
        for (wanted, pipe, stream) in [
            (call.stdout, stdout, Stream::Stdout),
            (call.stderr, stderr, Stream::Stderr),
        ] {
            // One that the container has closed has nothing to give.
            if wanted && container.has_output(stream) {
                container
                    .readers
                    .add(pipe, stream)
                    .map_err(|e| failed(&e))?;
            }
        }
        Ok(Answer::Empty(Empty {}))
    }

    /// Closes a container's standard input for good (`stdin_once`). A terminal has no such end.
    pub(super) fn close_stdin(&mut self, id: &str) -> Result<Answer, WireError> {
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        container.stdin = None;
        self.close_stdin_by_shim(id);
        Ok(Answer::Empty(Empty {}))
    }
}
