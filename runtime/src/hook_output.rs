//! What OCI hooks write to their standard error, kept for the message of a failure.
//!
//! libcontainer lets hooks inherit this process's. Those that the container's init runs (`createContainer`,
//! `startContainer`) have the container's, so they speak in its log.

use std::fs::File;
use std::io::{Read, Seek};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::sys;

/// How much of it a message quotes, in bytes.
const LONGEST: u64 = 2048;

/// A file in memory that is this process's standard error from now on.
pub struct Complaints(File);

impl Complaints {
    /// Collects what is written to standard error. `None` where that can't be: it is worth no failure.
    ///
    /// A hook may end without having read its state, which must not end us; what the container executes gets
    /// its signals back from `Confinement::enter`.
    pub fn collect() -> Option<Self> {
        sys::ignore_broken_pipes();
        let file = memfd_create("hooks", MemfdFlags::CLOEXEC).ok()?;
        nix::unistd::dup2_stderr(&file).ok()?;
        Some(Self(file.into()))
    }

    /// The end of a message: what was said, or nothing.
    pub fn text(&self) -> String {
        let mut file = &self.0;
        let mut bytes = Vec::new();
        let read = file
            .rewind()
            .and_then(|()| file.take(LONGEST).read_to_end(&mut bytes));
        let said = String::from_utf8_lossy(&bytes);
        match (read, said.trim()) {
            (Ok(_), said) if !said.is_empty() => format!("; the hook said: {said}"),
            _ => String::new(),
        }
    }
}
