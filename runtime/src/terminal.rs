//! Pseudo terminals of containers and exec sessions, opened inside the container so that they are in its
//! own `devpts`. The master end travels to whoever serves it through a socket.
//!
//! `unsafe` is confined to six `ioctl`s on descriptors that are open for the call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::{sys, wire};

/// The multiplexer's device number (Linux allocated devices: 5:2), which any `/dev/ptmx` must have.
const PTMX: u64 = libc::makedev(5, 2);

/// A new terminal.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Opens a terminal of the `devpts` that this process sees, and gives it to a user.
    ///
    /// # Errors
    /// What the kernel says; a `/dev/ptmx` that is something else is refused.
    pub fn open(uid: u32) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true);
        options.custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC);
        let master = options.open("/dev/ptmx")?;
        let found = master.metadata()?;
        if !found.file_type().is_char_device() || found.rdev() != PTMX {
            return Err(io::Error::other(
                "/dev/ptmx is not the terminal multiplexer",
            ));
        }
        let unlocked: libc::c_int = 0;
        // SAFETY: see the module's header; the argument outlives the call.
        if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // The other end by its descriptor: a path could lead anywhere in the container's file system.
        // SAFETY: see the module's header; the descriptor that comes back is nobody else's.
        let slave = unsafe {
            let fd = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None)?;
        Ok(Self {
            master: master.into(),
            slave,
        })
    }

    /// Shows the terminal as `/dev/console`, as every container with one has it.
    ///
    /// # Errors
    /// What making the file or mounting says.
    pub fn show_as_console(&self) -> io::Result<()> {
        let console = Path::new("/dev/console");
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        match options.open(console) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let slave = format!("/proc/self/fd/{}", self.slave.as_raw_fd());
        let flags = MsFlags::MS_BIND;
        Ok(mount(
            Some(slave.as_str()),
            console,
            None::<&str>,
            flags,
            None::<&str>,
        )?)
    }

    /// Sends the master end through a socket, and makes the other this process's controlling terminal and
    /// its standard streams. The process must be a session leader without a terminal.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take(self, socket: BorrowedFd<'_>) -> io::Result<()> {
        wire::send_with_fds(socket, b"t", &[self.master.as_fd()])?;
        // SAFETY: see the module's header.
        if unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        for stream in 0..3 {
            sys::dup_to(&self.slave, stream)?;
        }
        Ok(())
    }
}

/// Receives the one descriptor that was sent through a socket; the socket must be non-blocking.
///
/// # Errors
/// `WouldBlock` when it is not there yet; when the other side has gone without sending one.
pub fn receive(socket: impl AsFd) -> io::Result<OwnedFd> {
    let (mut byte, mut fds) = ([0], Vec::new());
    wire::recv_with_fds(socket, &mut byte, &mut fds)?;
    fds.pop()
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no descriptor came"))
}

/// A terminal's number in its `devpts`, by its master end.
///
/// # Errors
/// What the kernel says; `ENOTTY` for what is no master end.
pub fn number(master: impl AsFd) -> io::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: see the module's header; the argument outlives the call.
    let got = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTN, &raw mut number) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(number)
}

/// A terminal's size in characters: width and height.
///
/// # Errors
/// What the kernel says; `ENOTTY` for what is no terminal.
pub fn size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: see the module's header; the argument outlives the call.
    let got = unsafe {
        libc::ioctl(
            terminal.as_fd().as_raw_fd(),
            libc::TIOCGWINSZ,
            &raw mut size,
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size.ws_col, size.ws_row))
}

/// Sets a terminal's size in characters; what runs on it gets SIGWINCH.
///
/// # Errors
/// What the kernel says; `ENOTTY` for what is no terminal.
pub fn resize(terminal: impl AsFd, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: see the module's header; the argument outlives the call.
    let set = unsafe {
        libc::ioctl(
            terminal.as_fd().as_raw_fd(),
            libc::TIOCSWINSZ,
            &raw const size,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
