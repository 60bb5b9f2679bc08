//! What this machine's kernel can do, asked of the kernel itself.
//!
//! `unsafe` is here for one system call that has no safe wrapper. Invariant: it is made with arguments that
//! the kernel refuses before it acts on anything.
#![allow(unsafe_code)]

use std::io;

/// Whether the kernel knows mount_setattr(2), which recursive read-only mounts need (Linux 5.12).
pub fn recursive_read_only_mounts() -> bool {
    // SAFETY: with a null attribute of size 0 the kernel fails with EINVAL before it reads anything; one
    // that does not know the call fails with ENOSYS.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            -1,
            std::ptr::null::<libc::c_char>(),
            0,
            std::ptr::null::<libc::c_void>(),
            0,
        )
    };
    debug_assert!(result == -1, "the kernel took a call without arguments");
    !matches!(
        io::Error::last_os_error().raw_os_error(),
        Some(libc::ENOSYS | libc::EPERM)
    )
}
