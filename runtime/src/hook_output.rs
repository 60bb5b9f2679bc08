//! What OCI hooks write to their standard error, kept for the message of a failure.
//!
//! libcontainer lets hooks inherit that of who runs them: the creator `prestart` and `createRuntime`, the container's
//! init `createContainer`. So both have this file there, and the init changes it for the container's own when it
//! is through with them.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{hooks, sys};

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
        self.0
            .try_clone()
            .map_or_else(|_| String::new(), |mut file| hooks::said(&mut file))
    }

    /// One more descriptor of the same file: for the container's init, whose `createContainer` hooks inherit it.
    pub fn share(&self) -> Option<OwnedFd> {
        self.0.try_clone().map(OwnedFd::from).ok()
    }
}
