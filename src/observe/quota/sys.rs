//! The kernel calls of project quotas, which have no safe wrapper: nix knows quotactl(2) only by the path of a block
//! device, and nobody wraps the attributes of files that carry the project.
//!
//! Invariant: every pointer handed to the kernel is to a live value of the type, and so of the size, that the command
//! reads or writes.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::Entry;

/// What is made in a directory belongs to the directory's project (linux/fs.h).
pub const PROJECT_INHERIT: u32 = 0x200;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    pub flags: u32,
    extent_size: u32,
    extents: u32,
    pub project: u32,
    copy_extent_size: u32,
    padding: [u8; 8],
}

// _IOR('X', 31, struct fsxattr), _IOW('X', 32, struct fsxattr), as x86_64 and aarch64 number them.
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
const _: () = assert!(size_of::<Attributes>() == 0x1c);

// linux/quota.h.
const PRJQUOTA: u32 = 2;
const Q_GETINFO: u32 = 0x80_0005;
const Q_GETQUOTA: u32 = 0x80_0007;

/// `struct if_dqblk` of linux/quota.h.
#[repr(C)]
#[derive(Default)]
struct Block {
    hard_blocks: u64,
    soft_blocks: u64,
    bytes: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}

/// `struct if_dqinfo` of linux/quota.h.
#[repr(C)]
#[derive(Default)]
struct Info {
    block_grace: u64,
    inode_grace: u64,
    flags: u32,
    valid: u32,
}

/// Whether the file system counts what projects use; an error says that it does not.
///
/// # Errors
/// ESRCH where it is off, ENOSYS and ENOTTY where there are no quotas; others.
pub fn accounting(on: BorrowedFd<'_>) -> io::Result<()> {
    let mut info = Info::default();
    // SAFETY: Q_GETINFO writes a struct if_dqinfo, which `info` is.
    unsafe { quotactl(on, Q_GETINFO, 0, (&raw mut info).cast()) }
}

/// What a project uses and may use.
///
/// # Errors
/// ENOENT on XFS for a project that nobody has used; others.
pub fn entry(on: BorrowedFd<'_>, project: u32) -> io::Result<Entry> {
    let mut block = Block::default();
    // SAFETY: Q_GETQUOTA writes a struct if_dqblk, which `block` is.
    unsafe { quotactl(on, Q_GETQUOTA, project, (&raw mut block).cast()) }?;
    let limits = [
        block.hard_blocks,
        block.soft_blocks,
        block.hard_inodes,
        block.soft_inodes,
    ];
    Ok(Entry {
        bytes: block.bytes,
        inodes: block.inodes,
        limited: limits.iter().any(|limit| *limit > 0),
    })
}

/// quotactl_fd(2) for projects.
///
/// # Safety
/// `value` points to what the command reads or writes.
unsafe fn quotactl(
    on: BorrowedFd<'_>,
    command: u32,
    project: u32,
    value: *mut libc::c_void,
) -> io::Result<()> {
    let command = (command << 8) | PRJQUOTA;
    // SAFETY: the caller's; the other arguments are numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            on.as_raw_fd(),
            command,
            project,
            value,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The attributes of a file or directory.
///
/// # Errors
/// ENOTTY where the file system has none; others.
pub fn attributes(of: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut found = Attributes::default();
    // SAFETY: the command writes a struct fsxattr, which `found` is.
    let result = unsafe { libc::ioctl(of.as_raw_fd(), FS_IOC_FSGETXATTR as _, &raw mut found) };
    match result {
        0 => Ok(found),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives a file or directory these attributes.
///
/// # Errors
/// What ioctl(2) says.
pub fn set_attributes(of: BorrowedFd<'_>, wanted: &Attributes) -> io::Result<()> {
    // SAFETY: the command reads a struct fsxattr, which `wanted` is.
    let result = unsafe {
        libc::ioctl(
            of.as_raw_fd(),
            FS_IOC_FSSETXATTR as _,
            std::ptr::from_ref(wanted),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
