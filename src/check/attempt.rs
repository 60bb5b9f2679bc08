//! Trying things out where they leave no trace and hold nobody up.

use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// The longest that a probe may take: a file system of a server that is gone hangs for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a probe in a thread of its own, for what it changes about the thread goes with it.
///
/// # Errors
/// When the thread can't be started, or gives no result in time; it is then left to itself.
pub(crate) fn apart<T: Send + 'static>(
    probe: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = sync_channel(1);
    let thread = thread::Builder::new().name("probe".into()).spawn(move || {
        let _ = sender.send(probe());
    })?;
    let result = match receiver.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            return Err(io::Error::other(format!(
                "no answer within {} s",
                PATIENCE.as_secs()
            )));
        }
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the probe failed in itself")),
    };
    // Its namespaces go when it is gone, which the result alone does not say.
    let _ = thread.join();
    result
}

/// As [`apart`], in a mount namespace that nothing propagates into or out of, and that goes with the thread.
///
/// # Errors
/// As [`apart`]; when there is no such namespace.
pub(crate) fn in_private_mounts<T: Send + 'static>(
    probe: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    apart(move || {
        // In Linux a mount namespace belongs to a thread; the others keep theirs.
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        probe()
    })
}

/// The nearest directory above (or at) `path` that exists: where it would be made.
pub(crate) fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_that_panics_is_an_error() {
        let result: io::Result<()> = apart(|| {
            // What a probe must never do; without the noise of a panic's message.
            std::panic::resume_unwind(Box::new(()))
        });
        assert!(result.is_err());
        assert_eq!(apart(|| Ok(7)).unwrap(), 7);
    }

    #[test]
    fn private_mounts_stay_private() {
        let mounted = in_private_mounts(|| {
            nix::mount::mount(
                Some("none"),
                "/proc",
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )?;
            Ok(!Path::new("/proc/self").exists())
        });
        match mounted {
            Ok(hidden) => assert!(hidden, "the thread sees its own mount"),
            Err(e) => println!("SKIPPED: {e}"),
        }
        assert!(Path::new("/proc/self").exists(), "nobody else does");
    }

    #[test]
    fn the_nearest_directory_is_found() {
        assert_eq!(
            existing(Path::new("/proc/no/such/thing")),
            Path::new("/proc")
        );
        assert_eq!(existing(Path::new("/proc")), Path::new("/proc"));
    }
}
