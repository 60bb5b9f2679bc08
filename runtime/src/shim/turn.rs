//! Waiting for one's turn at the shim.
//!
//! Shims take what makes or starts something one after the other, whatever is asked at once; and containerd's for runc (seen
//! with 1.6) can't hear of ends meanwhile. Dozens of calls in its queue hold back the one that would tell it of an end,
//! the ends pile up, and beyond 32 of them it waits a second for each, also for those of the runtime that the calls wait for. So
//! the queue is the keeper's: a job waits here until it is let in, and its going lets the next one in.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// The job's side. When it is dropped, the turn is over.
#[derive(Debug)]
pub struct Turn(OwnedFd);

impl Turn {
    /// A turn, and the keeper's side of it: a byte there lets the job in, and its end is that of the turn.
    ///
    /// # Errors
    /// When there are too many open descriptors.
    pub fn new() -> io::Result<(OwnedFd, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (keeper, job) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((keeper, Self(job)))
    }

    /// For the job to inherit.
    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Waits for it; false when it has not come by then, or when `caller` was closed by its other side.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn wait(&self, until: Instant, caller: Option<&OwnedFd>) -> io::Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
            fds.extend(caller.map(|caller| PollFd::new(caller, PollFlags::IN)));
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            }
            if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
                return Ok(false);
            }
            match rustix::io::read(&self.0, &mut [0; 1]) {
                Ok(1) => return Ok(true),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn let_in_too_late_and_alone() {
        let (keeper, turn) = Turn::new().unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(!turn.wait(soon(), None).unwrap());
        let (held, caller) = crate::descriptor::pipe().unwrap();
        drop(caller);
        let far = Instant::now() + Duration::from_secs(60);
        assert!(!turn.wait(far, Some(&held)).unwrap());
        rustix::io::write(&keeper, b".").unwrap();
        assert!(turn.wait(far, None).unwrap());
        drop(turn);
        assert_eq!(rustix::io::read(&keeper, &mut [0; 1]), Ok(0));
        let (keeper, turn) = Turn::new().unwrap();
        drop(keeper);
        assert!(turn.wait(far, None).is_err());
    }
}
