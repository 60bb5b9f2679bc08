//! The kernel calls that have no safe wrapper.
//!
//! Invariants: a cloned child shares no memory with us and makes nothing but raw system calls that need no
//! lock of the C library, so it is safe to clone although other threads exist; every pointer handed to the
//! kernel is to a live value of the size given with it.
#![allow(unsafe_code)]

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `struct clone_args` of clone3(2), as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A process that does nothing but exist, until it is dropped.
#[derive(Debug)]
pub(crate) struct Sleeper {
    pidfd: OwnedFd,
    pid: Pid,
}

impl Sleeper {
    /// Starts one in new namespaces (`CLONE_NEW*`) and, if given, in a v2 cgroup. It dies with the calling
    /// thread at the latest.
    ///
    /// # Errors
    /// What clone3(2) says.
    pub fn start(namespaces: i32, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        let mut pidfd: RawFd = -1;
        let mut args = CloneArgs {
            flags: libc::CLONE_PIDFD as u64 | u64::from(namespaces as u32),
            pidfd: &raw mut pidfd as u64,
            exit_signal: libc::SIGCHLD as u64,
            ..CloneArgs::default()
        };
        if let Some(cgroup) = cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: the structure and the place for the pidfd outlive the call, and the size is given. Without
        // CLONE_VM the child has a copy of our memory; `sleep_until_killed` keeps to raw system calls.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut args,
                std::mem::size_of::<CloneArgs>(),
            )
        };
        match pid {
            0 => sleep_until_killed(),
            pid if pid > 0 => {
                // SAFETY: on success the kernel has put a new descriptor there that nobody else owns.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
                Ok(Self { pidfd, pid })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it ends within so many milliseconds.
    pub fn ends_within(&self, milliseconds: u16) -> bool {
        let mut wanted = [nix::poll::PollFd::new(
            self.pidfd.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        nix::poll::poll(&mut wanted, milliseconds).is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        // By number where P_PIDFD is unknown; our own child, so the number is its own until it is reaped.
        if waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED).is_err() {
            let _ = waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED);
        }
    }
}

fn sleep_until_killed() -> ! {
    // SAFETY: raw system calls with integers. The descriptors belong to the parent's copy of everything;
    // this process never touches what owns them here.
    unsafe {
        libc::syscall(
            libc::SYS_prctl,
            libc::PR_SET_PDEATHSIG,
            libc::SIGKILL,
            0,
            0,
            0,
        );
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
        loop {
            libc::syscall(libc::SYS_ppoll, 0usize, 0usize, 0usize, 0usize, 0usize);
        }
    }
}

/// What mount_setattr(2) changes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountChange<'a> {
    /// `AT_*` flags: `AT_RECURSIVE`, `AT_EMPTY_PATH`.
    pub at: i32,
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// A user namespace, for `MOUNT_ATTR_IDMAP`.
    pub user_namespace: Option<BorrowedFd<'a>>,
}

/// mount_setattr(2).
///
/// # Errors
/// What the kernel says.
pub(crate) fn mount_setattr(
    dir: BorrowedFd<'_>,
    path: &CStr,
    change: MountChange<'_>,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: change.set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: change
            .user_namespace
            .map_or(0, |fd| u64::from(fd.as_raw_fd() as u32)),
    };
    // SAFETY: the path is NUL-terminated, and the structure is alive and of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_raw_fd(),
            path.as_ptr(),
            change.at,
            &raw const attr,
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    checked(result)
}

/// close_range(2) with `CLOSE_RANGE_CLOEXEC`, over a descriptor that can't exist.
///
/// # Errors
/// `ENOSYS` before Linux 5.9, `EINVAL` before 5.11.
pub(crate) fn close_range() -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: integers only; no descriptor has this number.
    checked(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            u32::MAX,
            u32::MAX,
            CLOSE_RANGE_CLOEXEC,
        )
    })
}

/// Whether seccomp filters may return this action (`SECCOMP_RET_*`).
///
/// # Errors
/// `EOPNOTSUPP` when not; `EINVAL` or `ENOSYS` when the kernel can't tell.
pub(crate) fn seccomp_action(action: u32) -> io::Result<()> {
    const SECCOMP_GET_ACTION_AVAIL: libc::c_ulong = 2;
    // SAFETY: the kernel reads one u32, which outlives the call.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_GET_ACTION_AVAIL,
            0 as libc::c_ulong,
            &raw const action,
        )
    })
}

/// Columns of the terminal on standard output, if there is one.
pub(crate) fn terminal_width() -> Option<usize> {
    // SAFETY: all-zero bytes are a valid winsize, and the kernel writes no more than one.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size) == 0).then_some(size)?
    };
    (size.ws_col > 0).then(|| usize::from(size.ws_col))
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeper_lives_until_it_is_dropped() {
        let sleeper = match Sleeper::start(0, None) {
            Ok(sleeper) => sleeper,
            Err(e) => return println!("SKIPPED: clone3: {e}"),
        };
        let place = format!("/proc/{}", sleeper.pid());
        assert!(std::path::Path::new(&place).exists());
        assert!(!sleeper.ends_within(0));
        drop(sleeper);
        assert!(!std::path::Path::new(&place).exists());
    }

    #[test]
    fn an_unknown_action_is_not_available() {
        assert!(seccomp_action(libc::SECCOMP_RET_ALLOW).is_ok());
        assert!(seccomp_action(0x1234_0000).is_err());
    }
}
