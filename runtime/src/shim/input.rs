//! A command's standard input, on its way from the caller's pipe to the FIFO that the shim reads.
//!
//! A shim may hold that FIFO open for writing itself (containerd's does), and gives that up when it is told to
//! (`CloseIO`). So it can't be the caller's pipe, whose end nobody would see.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_setfl, fstat, open};
use slipway_shim::{Process, Task};

use super::Running;
use super::relay::both_ends;

/// Bytes that are under way.
const CHUNK: usize = 16 << 10;
/// How many of them are moved before others have their turn.
const ROUNDS: usize = 16;
/// How often it is looked whether the shim has opened the FIFO.
const LOOK: Duration = Duration::from_millis(5);
/// How long the shim may take to open it.
const OPENED: Duration = Duration::from_secs(10);

/// The way.
pub struct Input {
    from: Option<OwnedFd>,
    to: Option<OwnedFd>,
    /// Somebody reads the FIFO; until then this is when that must be.
    read: Result<(), Instant>,
    buffer: Vec<u8>,
    /// The connection on which the shim was told of the end.
    _closing: Option<Task>,
}

impl Input {
    /// Whether a caller's standard input is one, and not a device that has none.
    pub fn is(from: &OwnedFd) -> bool {
        fstat(from).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo)
    }

    /// From a pipe to a FIFO. Its other end is held until the command is started, so that the shim waits for nobody.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(from: &OwnedFd, fifo: &Path) -> io::Result<Self> {
        let from = from.try_clone()?;
        fcntl_setfl(&from, OFlags::NONBLOCK)?;
        Ok(Self {
            from: Some(from),
            to: Some(both_ends(fifo)?.into()),
            read: Ok(()),
            buffer: Vec::new(),
            _closing: None,
        })
    }

    /// The shim has started the command, and opens the FIFO about now if it has not yet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn started(&mut self, fifo: &Path) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // While both are open, so that it never has none.
        self.to = Some(open(fifo, flags, Mode::empty())?);
        self.read = Err(Instant::now() + OPENED);
        Ok(())
    }

    /// What to wait for.
    pub fn wants(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.from, &self.to) {
            _ if self.read.is_err() => None,
            (_, Some(to)) if !self.buffer.is_empty() => Some((to.as_fd(), PollFlags::OUT)),
            (Some(from), Some(_)) => Some((from.as_fd(), PollFlags::IN)),
            _ => None,
        }
    }

    /// When to look without that.
    pub fn wake(&self) -> Option<Instant> {
        let waits = self.read.is_err() && self.to.is_some();
        waits.then(|| Instant::now() + LOOK)
    }

    /// Moves what is there, and tells the shim of the end.
    pub fn turn(&mut self, running: &Running, process: Process<'_>) {
        let Some(to) = &self.to else { return };
        if let Err(until) = self.read {
            let now = Timespec::default();
            let mut fds = [PollFd::new(to, PollFlags::OUT)];
            let asked = poll(&mut fds, Some(&now)).is_ok();
            match asked && !fds[0].revents().contains(PollFlags::ERR) {
                true => self.read = Ok(()),
                false if until <= Instant::now() => return self.give_up(),
                false => return,
            }
        }
        for _ in 0..ROUNDS {
            if !self.buffer.is_empty() {
                match rustix::io::write(to, &self.buffer) {
                    Ok(n) => drop(self.buffer.drain(..n)),
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                    // The command has closed its end.
                    Err(_) => return self.give_up(),
                }
                continue;
            }
            let Some(from) = &self.from else {
                self.to = None;
                let told = running.connect().and_then(|mut task| {
                    task.send_close_stdin(process)?;
                    Ok(task)
                });
                self._closing = told.ok();
                return;
            };
            self.buffer.resize(CHUNK, 0);
            let read = rustix::io::read(from, &mut self.buffer);
            self.buffer.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(n) if n > 0 => {}
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                _ => self.from = None,
            }
        }
    }

    fn give_up(&mut self) {
        (self.from, self.to) = (None, None);
        self.buffer.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::Running;

    const PROCESS: Process<'_> = Process { id: "c", exec: "e" };

    /// A directory with a FIFO, and a shim that does not answer.
    fn place() -> (tempfile::TempDir, Running) {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let running = Running::of("unix:///nonexistent", 2, 0, false).unwrap();
        (dir, running)
    }

    #[test]
    fn bytes_wait_for_a_reader_and_end_with_the_pipe() {
        let (dir, running) = place();
        let fifo = dir.path().join("fifo");
        let (from, pipe) = crate::descriptor::pipe().unwrap();
        assert!(Input::is(&from));
        assert!(!Input::is(
            &std::fs::File::open("/dev/null").unwrap().into()
        ));
        let mut input = Input::new(&from, &fifo).unwrap();
        input.started(&fifo).unwrap();
        rustix::io::write(&pipe, b"hello").unwrap();
        // Nobody has opened it yet.
        input.turn(&running, PROCESS);
        assert!(input.wants().is_none() && input.wake().is_some());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = open(&fifo, flags, Mode::empty()).unwrap();
        input.turn(&running, PROCESS);
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer), Ok(5));
        assert_eq!(&buffer[..5], b"hello");
        assert_eq!(
            rustix::io::read(&reader, &mut buffer),
            Err(rustix::io::Errno::AGAIN)
        );
        drop(pipe);
        input.turn(&running, PROCESS);
        assert_eq!(rustix::io::read(&reader, &mut buffer), Ok(0));
        assert!(input.wants().is_none() && input.wake().is_none());
    }

    #[test]
    fn a_reader_that_goes_ends_it() {
        let (dir, running) = place();
        let fifo = dir.path().join("fifo");
        let (from, pipe) = crate::descriptor::pipe().unwrap();
        let mut input = Input::new(&from, &fifo).unwrap();
        let reader = open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        input.started(&fifo).unwrap();
        input.turn(&running, PROCESS);
        drop(reader);
        rustix::io::write(&pipe, b"hello").unwrap();
        input.turn(&running, PROCESS);
        assert!(input.wants().is_none() && input.wake().is_none());
    }
}
