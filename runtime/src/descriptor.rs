//! A pipe end or a terminal as an asynchronous stream.
//!
//! `unsafe` is confined to one call, which wants the descriptor to stay the same and open: it is owned, never
//! given out but by reference, and closed with the [`AsyncFd`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A pipe that execve closes: its read end, its write end.
///
/// # Errors
/// When there are too many open descriptors.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// Both ends of a FIFO, neither of which blocks: its read end, its write end.
///
/// # Errors
/// What opening says.
pub fn fifo(path: &std::path::Path) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    let read = open(path, flags | OFlags::RDONLY, Mode::empty())?;
    let write = open(path, flags | OFlags::WRONLY, Mode::empty())?;
    Ok((read, write))
}

/// A non-blocking descriptor that can be polled: a pipe, a socket, a terminal.
#[derive(Debug)]
pub struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// Takes a descriptor over and makes it non-blocking.
    ///
    /// # Errors
    /// For what can't be polled, such as a file.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        // SAFETY: see the module's header.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Another handle on the same.
    ///
    /// # Errors
    /// When there are too many open descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Self::new(self.0.get_ref().try_clone()?)
    }

    /// Reads what is there; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        end_of_terminal(rustix::io::read(self.0.get_ref(), buffer))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A terminal whose other end nobody has open says EIO where a pipe says that it has ended.
fn end_of_terminal(read: rustix::io::Result<usize>) -> io::Result<usize> {
    match read {
        Err(rustix::io::Errno::IO) => Ok(0),
        other => Ok(other?),
    }
}

impl AsyncRead for Descriptor {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            match guard.try_io(|fd| end_of_terminal(rustix::io::read(fd.get_ref(), &mut *space))) {
                Ok(read) => {
                    buf.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Descriptor {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Nothing: an end that is shared ends with its last handle.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
