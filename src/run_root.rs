//! The run root: one daemon at a time, and a mount of its own that nothing propagates from.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};

use crate::pod;

/// Held as long as this daemon owns the run root.
#[derive(Debug)]
pub struct RunRoot {
    /// Its path, without symbolic links.
    pub path: PathBuf,
    _lock: Flock<File>,
}

impl RunRoot {
    /// Makes the run root if need be, and takes it over.
    ///
    /// It becomes a private mount on itself: what a keeper mounts below it (namespaces, shared memory) must
    /// not appear in other mount namespaces, where it would be pinned beyond the pod's end.
    ///
    /// # Errors
    /// When it can't be made or mounted; when another daemon owns it.
    pub fn take(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(path)
            .with_context(|| format!("can't create the run root {shown}"))?;
        let path = path
            .canonicalize()
            .with_context(|| format!("can't resolve the run root {shown}"))?;
        let none: Option<&str> = None;
        if !pod::is_mount_point(&path) {
            mount(Some(&path), &path, none, MsFlags::MS_BIND, none).with_context(|| {
                format!("can't make the run root {shown} a mount; Slipway needs to run as root")
            })?;
        }
        mount(none, &path, none, MsFlags::MS_PRIVATE, none)
            .with_context(|| format!("can't make the mount {shown} private"))?;
        let lock = path.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock)
            .with_context(|| format!("can't open {}", lock.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                bail!(
                    "another slipway daemon owns the run root {shown}; stop it, or give this one another --run-root"
                )
            }
            Err((_, e)) => Err(e).with_context(|| format!("can't lock {}", lock.display())),
        }
    }
}

/// Listens at `path`, replacing the socket of a dead daemon.
///
/// # Errors
/// When somebody listens there already, or something other than a socket is there.
pub fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let shown = path.display();
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("can't create the directory of the socket {shown}"))?;
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("can't look at {shown}")),
        Ok(there) if !there.file_type().is_socket() => {
            bail!("can't listen at {shown}: it is no socket; remove it or choose another --listen")
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            bail!(
                "can't listen at {shown}: another process does; stop it or choose another --listen"
            )
        }
        Ok(_) => {
            std::fs::remove_file(path)
                .with_context(|| format!("can't replace the stale socket {shown}"))?;
        }
    }
    // Bound aside and renamed, so that nobody can connect before the mode is right.
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&draft);
    let listener =
        UnixListener::bind(&draft).with_context(|| format!("can't listen at {shown}"))?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o660))
        .and_then(|()| std::fs::rename(&draft, path))
        .with_context(|| format!("can't put the socket {shown} in place"))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/s.sock");
        let first = listen(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(first);
        let second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        listen(&file).unwrap_err();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no draft is left"
        );
    }
}
