//! Handing over the listener of a seccomp filter that leaves calls to somebody else (`SCMP_ACT_NOTIFY`, seccomp_unotify(2)).
//!
//! The process that loads such a filter is under it at once, so it does as little as can be: it writes the number of the
//! descriptor to a socket, and reads one byte. Who makes the process takes the descriptor itself (pidfd_getfd(2)); the
//! kernel tells it whose it is.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, setsockopt,
    socketpair, sockopt::PassCred,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const TAKEN: [u8; 1] = [1];

/// Both ends of the socket: that of who makes the process, and the process's own.
///
/// # Errors
/// When there are too many descriptors.
pub fn line() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    setsockopt(&ours, PassCred, &true)?;
    Ok((ours, theirs))
}

/// In the process: tells of the listener, and waits until it has been taken.
///
/// # Errors
/// When the other end was closed instead, and what the filter makes of read(2) and write(2).
pub fn hand_over(line: &OwnedFd, listener: &OwnedFd) -> io::Result<()> {
    rustix::io::write(line, &listener.as_raw_fd().to_ne_bytes())?;
    let mut answer = [0];
    let read = loop {
        match rustix::io::read(line, &mut answer) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    match (read, answer) {
        (1, TAKEN) => Ok(()),
        _ => Err(io::Error::other("nobody takes its listener")),
    }
}

/// For who makes the process, when there is something to read: the listener, and the process's number.
///
/// # Errors
/// What the kernel says; `UnexpectedEof` when the process has ended before it told.
pub fn take(line: &OwnedFd) -> io::Result<(OwnedFd, i32)> {
    let mut number = [0; size_of::<i32>()];
    let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
    let (length, sender) = {
        let mut parts = [IoSliceMut::new(&mut number)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(line.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut controls = message.cmsgs()?;
        let sender = controls.find_map(|control| match control {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        });
        (message.bytes, sender)
    };
    let sender = sender.and_then(Pid::from_raw);
    let (true, Some(sender)) = (length == number.len(), sender) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let process = pidfd_open(sender, PidfdFlags::empty())?;
    let listener = pidfd_getfd(
        process,
        i32::from_ne_bytes(number),
        PidfdGetfdFlags::empty(),
    )?;
    Ok((listener, sender.as_raw_nonzero().get()))
}

/// Tells the process that its listener has been taken.
///
/// # Errors
/// When it has ended.
pub fn taken(line: &OwnedFd) -> io::Result<()> {
    Ok(rustix::io::write(line, &TAKEN).map(drop)?)
}
