//! The few kernel calls that need `unsafe`: making processes, resetting inherited signal state, closing
//! descriptors wholesale, replacing the program.
//!
//! Invariant of the whole module: the calling process is single-threaded (zygote, keeper, or something one
//! of them forked), so a forked child may allocate and run ordinary Rust code, and process-wide state may
//! be changed without a race. [`die_with_parent`] alone may be called anywhere.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Result of making a process: who am I now.
pub enum Forked {
    /// In the child.
    Child,
    /// In the parent, with the child's process id.
    Parent(i32),
}

/// Options of [`clone_process`].
#[derive(Default)]
pub struct CloneOptions<'a> {
    /// Namespaces the child is born into (`CLONE_NEW*`).
    pub new_namespaces: u64,
    /// cgroup v2 directory the child is born into (`CLONE_INTO_CGROUP`), which costs no migration.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The child is a child of this process's parent (`CLONE_PARENT`).
    pub sibling: bool,
}

/// `fork(2)`, with the child in other namespaces or another cgroup from its first instruction.
///
/// # Errors
/// What `clone3(2)` says.
pub fn clone_process(options: &CloneOptions<'_>) -> io::Result<Forked> {
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
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut args = CloneArgs {
        flags: options.new_namespaces,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if options.sibling {
        // It ends with the signal that this process ends with.
        args.flags |= libc::CLONE_PARENT as u64;
        args.exit_signal = 0;
    }
    if let Some(cgroup) = options.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the structure is valid for the call and its size is given; without CLONE_VM the child gets a
    // copy of this process, which is single-threaded, so no lock can be held by a thread that is missing.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            std::mem::size_of::<CloneArgs>(),
        )
    };
    match pid {
        0 => Ok(Forked::Child),
        pid if pid > 0 => Ok(Forked::Parent(pid as i32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Collects a child that has ended, without waiting for one: its process id, and its exit status or
/// 128 + signal. The wrappers of `nix` know no real-time signals: a child that was killed by one would be
/// reaped and its end lost.
pub fn collect_child() -> Option<(i32, i32)> {
    loop {
        let mut status = 0;
        // SAFETY: the call writes to `status` only.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid > 0 && libc::WIFEXITED(status) {
            return Some((pid, libc::WEXITSTATUS(status)));
        }
        if pid > 0 && libc::WIFSIGNALED(status) {
            return Some((pid, 128 + libc::WTERMSIG(status)));
        }
        let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        if pid == 0 || (pid < 0 && !interrupted) {
            return None;
        }
    }
}

/// Kills a child that has not been waited for, so that its number is still its own. One that has ended is no
/// error.
pub fn kill_child(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// Asks the kernel to kill this process when its parent dies.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::NotFound`] when `parent` is dead already.
pub fn die_with(parent: i32) -> io::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64)?;
    // SAFETY: the call has no preconditions.
    match unsafe { libc::getppid() } {
        // 0: the parent is in a PID namespace outside of ours.
        now if now == parent || now == 0 => Ok(()),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The same for a program that is to be started: it is killed when the thread that starts it ends.
pub fn die_with_parent(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and execve only a system call is made, which allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64));
    }
}

/// Ends the process at once: no destructors, no `atexit` handlers of the program it was forked from.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Gives every signal its default action back and unblocks all: what a program expects at its start, and
/// what neither Rust's run time (SIGPIPE) nor a keeper (SIGCHLD) leaves in place.
pub fn reset_signals() {
    // SAFETY: plain signal calls on valid, zero-initialised structures; errors (SIGKILL, SIGSTOP, signals
    // that the C library keeps) are harmless.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=64 {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Makes writing to a pipe that nobody reads an error, not a death. What is forked resets it.
pub fn ignore_broken_pipes() {
    // SAFETY: setting a disposition to SIG_IGN has no preconditions.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Blocks SIGCHLD and returns a non-blocking descriptor that becomes readable when it arrives.
///
/// # Errors
/// What `signalfd(2)` says.
pub fn child_signals() -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the set is initialised before use, and signalfd returns a descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Waits for SIGCHLD, which must be blocked. For the pod's init, which has nothing else to wait for.
pub fn wait_for_child_signal() {
    // SAFETY: the set is initialised before use; no information about the signal is asked for.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigwaitinfo(&set, std::ptr::null_mut());
    }
}

/// Closes every descriptor above 2 that is not in `keep`. Whoever owns one of them in this process must
/// never touch it again: for freshly forked children that leave by exec or [`exit_now`].
pub fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter(|fd| **fd > 2)
        .map(|fd| *fd as u32)
        .collect();
    keep.sort_unstable();
    let mut from = 3u32;
    for fd in keep {
        if fd > from {
            close_range(from, fd - 1, 0);
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX, 0);
}

/// Marks every descriptor above 2 close-on-exec.
pub fn cloexec_all() {
    cloexec_from(3);
}

/// Marks this descriptor and all with greater numbers close-on-exec.
pub fn cloexec_from(first: u32) {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    close_range(first, u32::MAX, CLOSE_RANGE_CLOEXEC);
}

/// Joins a new session keyring, so that the process sees none of its parent's keys (keyctl(2),
/// `KEYCTL_JOIN_SESSION_KEYRING`).
///
/// # Errors
/// What the kernel says; `ENOSYS` from one without keys.
pub fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: a null name asks for an anonymous keyring; nothing else is passed.
    let keyring = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    match keyring {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn close_range(first: u32, last: u32, flags: u32) {
    // SAFETY: see the callers' contract; the call itself only takes integers.
    unsafe {
        libc::syscall(libc::SYS_close_range, first, last, flags);
    }
}

/// Replaces the program; returns only on failure.
pub fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: path and both arrays are NUL-terminated and outlive the call.
    unsafe {
        libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
    }
    io::Error::last_os_error()
}

/// Sets all three user ids or group ids of the process without glibc's broadcast to other threads.
///
/// # Errors
/// What the kernel says.
pub fn set_ids(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: setgroups gets a valid array of its length; the other calls take integers only.
    unsafe {
        let checks = [
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()),
            libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ];
        if checks.contains(&-1) {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `dup2(2)` onto a standard stream of a process that is about to execute something else.
///
/// # Errors
/// What the kernel says.
pub fn dup_to(from: &OwnedFd, to: RawFd) -> io::Result<()> {
    // SAFETY: descriptors 0 to 2 belong to no Rust object in this crate's forked children.
    if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets a descriptor stay open over execve.
pub fn keep_over_exec(fd: RawFd) {
    // SAFETY: the call takes integers; a number that is no descriptor is refused by it.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
}

/// Waits for a child's end: its exit status, or 128 + signal; -1 when there is no such child.
pub fn wait_child(pid: i32) -> i32 {
    loop {
        let mut status = 0;
        // SAFETY: the call writes to `status` only.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if waited == pid && libc::WIFEXITED(status) {
            return libc::WEXITSTATUS(status);
        }
        if waited == pid && libc::WIFSIGNALED(status) {
            return 128 + libc::WTERMSIG(status);
        }
        if waited < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return -1;
        }
    }
}

/// `prctl(2)` with integer arguments.
///
/// # Errors
/// What the kernel says.
pub fn prctl(option: i32, arg: u64) -> io::Result<()> {
    // SAFETY: only options that take integers are passed by this crate.
    if unsafe { libc::prctl(option, arg, 0u64, 0u64, 0u64) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What kind of a namespace a descriptor leads to (`CLONE_NEW*`); none for another file. A link in procfs tells of it only
/// where the namespace is not bound to a file of its own.
///
/// # Errors
/// What `ioctl_ns(2)` says of a namespace.
pub fn namespace_kind(fd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    if rustix::fs::fstatfs(fd)?.f_type as u64 != NSFS_MAGIC {
        return Ok(None);
    }
    // SAFETY: this request takes no argument, and the file is one that knows it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(Some(kind)),
    }
}

/// `struct sched_attr` of `sched_setattr(2)`, in the version with utilisation clamps.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SchedAttr {
    /// Set by [`set_scheduler`].
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// For SCHED_DEADLINE, in nanoseconds, as the next two.
    pub runtime: u64,
    /// See `runtime`.
    pub deadline: u64,
    /// See `runtime`.
    pub period: u64,
    /// Not used.
    pub util_min: u32,
    /// Not used.
    pub util_max: u32,
}

/// Gives this process another scheduling policy.
///
/// # Errors
/// What `sched_setattr(2)` says.
pub fn set_scheduler(attributes: &SchedAttr) -> io::Result<()> {
    let attributes = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        ..*attributes
    };
    // SAFETY: the structure lives for the call and says how long it is.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Gives this process another I/O priority: class and level as in `ioprio_set(2)`.
///
/// # Errors
/// What the kernel says.
pub fn set_io_priority(priority: i64) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i64 = 1;
    // SAFETY: the call takes integers.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0i64, priority) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Sets the execution domain, `PER_*` of `personality(2)`.
///
/// # Errors
/// What the kernel says.
pub fn set_personality(domain: i32) -> io::Result<()> {
    // SAFETY: the call takes an integer.
    match unsafe { libc::personality(domain as libc::c_ulong) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// What [`mount_setattr`] is to set and to clear (`MOUNT_ATTR_*`).
pub fn mount_attr(set: u64, clear: u64) -> libc::mount_attr {
    libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: 0,
    }
}

/// `mount_setattr(2)` on the mount that a descriptor leads to, and on all below it if `recursive`.
///
/// # Errors
/// What the kernel says.
pub fn mount_setattr(
    tree: BorrowedFd<'_>,
    attr: &libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is NUL-terminated, the structure is alive and of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            std::mem::size_of::<libc::mount_attr>(),
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Raises a hard resource limit to what is wanted, if it is lower and if this process may; nothing else changes.
pub fn raise_hard_limit(resource: u32, wanted: u64) {
    let mut held = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure lives for the calls.
    unsafe {
        if libc::prlimit64(0, resource, std::ptr::null(), &raw mut held) == 0
            && held.rlim_max < wanted
        {
            held.rlim_max = wanted;
            libc::prlimit64(0, resource, &raw const held, std::ptr::null_mut());
        }
    }
}

/// Lifts or sets a resource limit. A hard limit that may not be raised is clamped to what is held
/// (raising needs CAP_SYS_RESOURCE).
///
/// # Errors
/// What `prlimit(2)` says.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    // SAFETY: both structures live for the calls.
    unsafe {
        let wanted = libc::rlimit64 {
            rlim_cur: soft,
            rlim_max: hard,
        };
        if libc::prlimit64(0, resource, &wanted, std::ptr::null_mut()) == 0 {
            return Ok(());
        }
        let mut held = libc::rlimit64 {
            rlim_cur: 0,
            rlim_max: 0,
        };
        if libc::prlimit64(0, resource, std::ptr::null(), &mut held) != 0 {
            return Err(io::Error::last_os_error());
        }
        let clamped = libc::rlimit64 {
            rlim_cur: soft.min(held.rlim_max),
            rlim_max: hard.min(held.rlim_max),
        };
        if libc::prlimit64(0, resource, &clamped, std::ptr::null_mut()) == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_a_child_with_its_own_exit_code() {
        match clone_process(&CloneOptions::default()).unwrap() {
            Forked::Child => exit_now(7),
            Forked::Parent(pid) => {
                let status =
                    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
                assert_eq!(
                    status,
                    nix::sys::wait::WaitStatus::Exited(nix::unistd::Pid::from_raw(pid), 7)
                );
            }
        }
    }
}
