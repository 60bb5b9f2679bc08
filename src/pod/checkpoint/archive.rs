//! The archive of a container's checkpoint, as the peers write it and `checkpointctl` reads it: criu's images in
//! `checkpoint/`, the writable layer's changes, and descriptions of the container in JSON.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD};
use serde::{Deserialize, Serialize};
use tar::{Builder, EntryType, Header};

use crate::pod::error::{PodError, file};

/// Description of the container.
pub const CONFIG: &str = "config.dump";
/// Its OCI specification.
pub const SPEC: &str = "spec.dump";
/// Its CRI status.
pub const STATUS: &str = "status.dump";
/// Its mounts of the host's.
pub const BINDS: &str = "bind.mounts";
/// Its log; CRI-O's name for it.
pub const LOG: &str = "io.kubernetes.cri-o.LogPath";

/// `config.dump`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerConfig {
    /// The container's id.
    pub id: String,
    /// Its full name.
    pub name: String,
    /// The image as it was asked for.
    pub rootfs_image: String,
    /// The image so that it can be pulled again, or its id.
    pub rootfs_image_ref: String,
    /// A name of the image.
    pub rootfs_image_name: String,
    /// Runtime handler.
    pub runtime: String,
    /// RFC 3339.
    pub created_time: String,
    /// RFC 3339.
    #[serde(rename = "checkpointedTime")]
    pub checkpointed_time: String,
    /// RFC 3339.
    #[serde(rename = "restoredTime")]
    pub restored_time: String,
    /// Whether the container itself came from a checkpoint.
    pub restored: bool,
}

/// An entry of `bind.mounts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Path on the host.
    pub source: String,
    /// Path in the container.
    pub destination: String,
    /// `file` or `directory`.
    pub file_type: String,
    /// Mode.
    pub permissions: u32,
}

/// Writes everything in `dir` (files, and directories of files) as an archive to `target`, which appears whole
/// or not at all, for its owner's eyes only. An existing file is not replaced.
///
/// # Errors
/// [`PodError::Invalid`] when `target` exists or its directory does not, [`PodError::File`].
pub fn write(dir: &Path, target: &Path) -> Result<(), PodError> {
    let parent = check_target(target)?;
    // Without a name until it is complete: nothing is left of it when this process dies.
    let mut options = File::options();
    options.write(true).read(true).mode(0o600);
    let out = options
        .custom_flags(libc::O_TMPFILE)
        .open(parent)
        .map_err(file("create a checkpoint in", parent))?;
    let mut builder = Builder::new(io::BufWriter::with_capacity(1 << 20, &out));
    append(&mut builder, dir, Path::new(""))?;
    let written = builder
        .into_inner()
        .and_then(|mut out| io::Write::flush(&mut out));
    written.map_err(file("write", target))?;
    let unnamed = format!("/proc/self/fd/{}", out.as_raw_fd());
    match rustix::fs::linkat(CWD, unnamed, CWD, target, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => Err(taken(target)),
        Err(e) => Err(file("write", target)(e.into())),
    }
}

/// Looks whether an archive can be written to `target`; returns its directory.
///
/// # Errors
/// [`PodError::Invalid`].
pub fn check_target(target: &Path) -> Result<&Path, PodError> {
    let parent = target.parent().filter(|_| target.is_absolute());
    let (Some(parent), Some(_)) = (parent, target.file_name()) else {
        return Err(PodError::Invalid(format!(
            "the checkpoint's location {target:?} is no absolute path of a file"
        )));
    };
    if target.symlink_metadata().is_ok() {
        return Err(taken(target));
    }
    if !parent.is_dir() {
        return Err(PodError::Invalid(format!(
            "the directory of the checkpoint's location {} does not exist",
            target.display()
        )));
    }
    Ok(parent)
}

fn taken(target: &Path) -> PodError {
    PodError::Invalid(format!(
        "the checkpoint's location {} exists; name another or remove it",
        target.display()
    ))
}

fn append<W: io::Write>(
    builder: &mut Builder<W>,
    root: &Path,
    inside: &Path,
) -> Result<(), PodError> {
    let dir = root.join(inside);
    let read = |e| file("read", &dir)(e);
    let mut entries: Vec<_> = fs::read_dir(&dir)
        .map_err(read)?
        .collect::<Result<_, _>>()
        .map_err(|e| file("read", &dir)(e))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), inside.join(entry.file_name()));
        let add = |builder: &mut Builder<W>| -> io::Result<bool> {
            let metadata = fs::symlink_metadata(&path)?;
            let mut header = Header::new_gnu();
            header.set_metadata(&metadata);
            header.set_mode(if metadata.is_dir() { 0o700 } else { 0o600 });
            header.set_uid(0);
            header.set_gid(0);
            if metadata.is_dir() {
                header.set_entry_type(EntryType::Directory);
                header.set_size(0);
                builder.append_data(&mut header, &name, io::empty())?;
                return Ok(true);
            }
            if metadata.is_file() {
                header.set_size(metadata.len());
                builder.append_data(&mut header, &name, File::open(&path)?)?;
            }
            Ok(false)
        };
        if add(builder).map_err(file("archive", &path))? {
            append(builder, root, &name)?;
        }
    }
    Ok(())
}

/// Makes a directory for root alone.
///
/// # Errors
/// [`PodError::File`].
pub fn private_dir(path: &Path) -> Result<(), PodError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = fs::DirBuilder::new();
    builder
        .mode(0o700)
        .create(path)
        .map_err(file("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dir: &Path) {
        fs::create_dir(dir.join("checkpoint")).unwrap();
        fs::write(dir.join("checkpoint/inventory.img"), "i").unwrap();
        fs::write(dir.join(CONFIG), "{}").unwrap();
    }

    #[test]
    fn what_is_written_can_be_read_and_replaces_nothing() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tree(from.path());
        let target = to.path().join("c.tar");
        write(from.path(), &target).unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            fs::metadata(&target).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = write(from.path(), &target).unwrap_err();
        assert!(matches!(again, PodError::Invalid(_)), "{again}");
        let missing = write(from.path(), &to.path().join("none/c.tar")).unwrap_err();
        assert!(matches!(missing, PodError::Invalid(_)), "{missing}");
        assert!(write(from.path(), Path::new("c.tar")).is_err());
        let mut found = tar::Archive::new(File::open(&target).unwrap());
        let names: Vec<_> = (found.entries().unwrap())
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        for name in ["checkpoint/inventory.img", CONFIG] {
            assert!(names.iter().any(|n| n == name), "{names:?}");
        }
    }
}
