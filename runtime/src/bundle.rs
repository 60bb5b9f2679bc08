//! What is different for a container that comes as a bundle of the OCI runtime specification, from the command line
//! (`slipway oci`) and not through a keeper: its root file system is there already, its user is given by ids, and its
//! creator's parent is no keeper.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use crate::user::Resolved;

/// Something that the container's init does for whoever asked for the container; what it says on failure is told.
pub type Step = Rc<dyn Fn() -> io::Result<()>>;

/// A bundle, as far as the creator has to know.
#[derive(Clone)]
pub struct Bundle {
    /// Its root file system: a directory, which need not be a mount point.
    pub rootfs: PathBuf,
    /// Whom its process runs as.
    pub user: Resolved,
    /// `chroot` instead of `pivot_root`, for a root that is on the initial RAM disk.
    pub no_pivot: bool,
    /// How many descriptors beside the standard streams stay open.
    pub preserve_fds: i32,
    /// There is a command, which is looked for before anybody is told that the container is there.
    pub has_process: bool,
    /// The init's end of a [`crate::listener::line`], if its seccomp filter leaves calls to somebody else. Then it is
    /// confined as the very last step of create, and what it does after its start is done confined.
    pub listener: Option<Arc<OwnedFd>>,
    /// Done by the init in its root, with all its privileges, as the last step of create.
    pub entered: Step,
    /// Done by the init when it was let go, before it becomes the container's process.
    pub starting: Step,
}
