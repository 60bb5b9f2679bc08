//! Loading a filter into the calling process.
//!
//! The only unsafe code of the crate. Invariant: the pointer handed to the kernel is that of a live
//! slice of [`Instruction`], which has the layout of `struct sock_filter`, and the length beside it
//! is that slice's; a descriptor that the kernel makes gets one owner.
#![allow(unsafe_code)]

use crate::{Filter, Instruction, filter::MAX_INSTRUCTIONS};
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

// The kernel reads our instructions as its own.
const _: () = assert!(
    size_of::<Instruction>() == size_of::<libc::sock_filter>()
        && align_of::<Instruction>() >= align_of::<libc::sock_filter>()
);

/// Confines the calling thread (with `SECCOMP_FILTER_FLAG_TSYNC` in the flags: every thread of the
/// process) with `filter`, by seccomp(2). Allocates nothing, so that it may be called between fork and exec.
///
/// The caller must hold CAP_SYS_ADMIN in its user namespace or have set no_new_privs; and the filter
/// applies at once, so whatever the caller does afterwards (execve at least) must be allowed by it.
///
/// # Errors
/// `EACCES`: neither CAP_SYS_ADMIN nor no_new_privs. `EINVAL`: the kernel refused the program or knows
/// no such flag. `ENOMEM`: the filters of this process are too long together. `ESRCH`: another thread
/// could not take the filter (TSYNC).
pub fn load(filter: &Filter) -> io::Result<()> {
    load_program(&filter.instructions, filter.flags)
}

/// As [`load`], for a filter that [`Filter::notifies`]. Answers with the descriptor by which calls are decided
/// (seccomp_unotify(2)), which is close-on-exec.
///
/// # Errors
/// As [`load`]; `EBUSY`: a filter of this process has a listener already; `EINVAL` also when the filter does not notify.
pub fn load_with_listener(filter: &Filter) -> io::Result<OwnedFd> {
    if !filter.notifies() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let listener = call(&filter.instructions, filter.flags)?;
    // SAFETY: with this flag a result that is no error is a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// As [`load`], for a program and flags that the caller holds by themselves.
///
/// # Errors
/// As [`load`].
pub fn load_program(program: &[Instruction], flags: u32) -> io::Result<()> {
    match call(program, flags)? {
        0 => Ok(()),
        // With TSYNC a positive result is the id of the thread that could not follow.
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

fn call(program: &[Instruction], flags: u32) -> io::Result<i32> {
    if program.is_empty() || program.len() > MAX_INSTRUCTIONS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let fprog = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
    };
    // SAFETY: `fprog` and the slice it points to outlive the call, the kernel only reads them, and the
    // length was checked to fit. The call changes no memory of this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER as libc::c_ulong,
            libc::c_ulong::from(flags),
            &raw const fprog,
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}
