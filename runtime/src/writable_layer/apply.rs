//! Putting the changes of a checkpoint back into a container's root file system, which is mounted: so directories
//! that the archive does not mention stay as the image has them, and overlayfs makes whiteouts itself.
//!
//! The archive may have been made by anybody. Nothing is followed on the way to an entry, and no path leads out of the
//! root; what an entry is itself is no more than what an image's layer could hold.

use std::collections::HashSet;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawDir, ResolveFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use super::XATTR;

/// Prefix of whiteouts in layers of images.
const WHITEOUT: &[u8] = b".wh.";
/// The directory hides what is below it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Attributes that an image's layer may have.
const XATTRS: [&str; 2] = ["user.", "security.capability"];
/// The deepest directory that is removed.
const DEEPEST: usize = 200;

/// Why the changes can't be put back.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The archive is damaged.
    #[error("the archive of the writable layer is damaged")]
    Archive(#[source] io::Error),
    /// An entry that there must not be.
    #[error("the archive of the writable layer has {path:?}, which {reason}")]
    Entry {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A file can't be made or removed.
    #[error("can't restore {path:?} in the container's root file system")]
    File {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is too much of it.
    #[error("the writable layer was not restored in time")]
    Late,
}

/// Removes what is listed from the root file system. What is not there is fine.
///
/// # Errors
/// [`ApplyError`].
pub fn remove_all(root: &OwnedFd, deleted: &[String], deadline: Instant) -> Result<(), ApplyError> {
    for path in deleted {
        if Instant::now() >= deadline {
            return Err(ApplyError::Late);
        }
        let path = plain(Path::new(path))?;
        let Some((parent, name)) = split(&path) else {
            return Err(entry(&path, "is the root itself"));
        };
        let removed = match open_dir(root, parent) {
            Ok(parent) => remove(&parent, name, 0),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(e) => Err(e),
        };
        removed.map_err(at(&path))?;
    }
    Ok(())
}

/// Puts everything of an archive into the root file system.
///
/// # Errors
/// [`ApplyError`].
pub fn unpack(root: &OwnedFd, archive: impl Read, deadline: Instant) -> Result<(), ApplyError> {
    let mut archive = Archive::new(archive);
    let mut made = HashSet::new();
    // Times of directories change with what is put into them.
    let mut times = Vec::new();
    for found in archive.entries().map_err(ApplyError::Archive)? {
        if Instant::now() >= deadline {
            return Err(ApplyError::Late);
        }
        let mut found = found.map_err(ApplyError::Archive)?;
        let path = plain(&found.path().map_err(ApplyError::Archive)?)?;
        if found.header().entry_type() == EntryType::Directory {
            let mtime = found.header().mtime().unwrap_or(0);
            times.push((path.clone(), mtime));
        }
        put(root, &path, &mut found, &made)?;
        made.insert(path);
    }
    for (path, mtime) in times.iter().rev() {
        if let Ok(dir) = open_dir(root, path) {
            let _ = rustix::fs::utimensat(&dir, ".", &stamps(*mtime), AtFlags::empty());
        }
    }
    Ok(())
}

fn entry(path: &Path, reason: &'static str) -> ApplyError {
    ApplyError::Entry {
        path: path.to_owned(),
        reason,
    }
}

fn at(path: &Path) -> impl Fn(Errno) -> ApplyError {
    move |e| ApplyError::File {
        path: path.to_owned(),
        source: e.into(),
    }
}

/// A path without anything but names: relative to the root, whether it was written so or not.
fn plain(path: &Path) -> Result<PathBuf, ApplyError> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(entry(path, "leads upwards")),
        }
    }
    Ok(out)
}

fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    Some((path.parent()?, path.file_name()?))
}

/// A directory below the root, through no link and into no other mount.
fn open_dir(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    rustix::fs::openat2(
        root,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )
}

/// As [`open_dir`]; what is missing is made.
fn make_dirs(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    match open_dir(root, path) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let Some((parent, name)) = split(path) else {
        return Err(Errno::NOENT);
    };
    let parent = make_dirs(root, parent)?;
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => open_dir(root, path),
        Err(e) => Err(e),
    }
}

fn remove(dir: &OwnedFd, name: &OsStr, depth: usize) -> Result<(), Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    if depth > DEEPEST {
        return Err(Errno::NAMETOOLONG);
    }
    clear(&open_child(dir, name)?, depth, |_| false)?;
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}

fn open_child(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        dir,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Empties a directory but for what is to be kept.
fn clear(dir: &OwnedFd, depth: usize, keep: impl Fn(&OsStr) -> bool) -> Result<(), Errno> {
    let mut names: Vec<OsString> = Vec::new();
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut list = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(found) = list.next() {
        let name = found?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    for name in names.iter().filter(|name| !keep(name)) {
        remove(dir, name, depth + 1)?;
    }
    Ok(())
}

fn put<R: Read>(
    root: &OwnedFd,
    path: &Path,
    found: &mut Entry<'_, R>,
    made: &HashSet<PathBuf>,
) -> Result<(), ApplyError> {
    let kind = found.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(());
    }
    let failed = at(path);
    let Some((parent, name)) = split(path) else {
        let root = open_dir(root, Path::new("")).map_err(&failed)?;
        return own(&root, found).map_err(&failed);
    };
    let dir = make_dirs(root, parent).map_err(&failed)?;
    if name.as_bytes() == OPAQUE {
        let ours = |child: &OsStr| made.contains(&parent.join(child));
        return clear(&dir, 0, ours).map_err(&failed);
    }
    if let Some(gone) = name.as_bytes().strip_prefix(WHITEOUT) {
        if gone.is_empty() || gone == b"." || gone == b".." {
            return Err(entry(path, "hides nothing"));
        }
        return remove(&dir, OsStr::from_bytes(gone), 0).map_err(&failed);
    }
    let mode = found.header().mode().map_err(ApplyError::Archive)? & 0o7777;
    let mode = Mode::from_raw_mode(mode);
    if kind == EntryType::Directory {
        match open_child(&dir, name) {
            Ok(there) => return own(&there, found).map_err(&failed),
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) => remove(&dir, name, 0).map_err(&failed)?,
            Err(e) => return Err(failed(e)),
        }
        rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o700)).map_err(&failed)?;
        let there = open_child(&dir, name).map_err(&failed)?;
        return own(&there, found).map_err(&failed);
    }
    let target = match kind {
        EntryType::Symlink | EntryType::Link => {
            let target = found.link_name().map_err(ApplyError::Archive)?;
            Some(
                target
                    .ok_or_else(|| entry(path, "links to nothing"))?
                    .into_owned(),
            )
        }
        _ => None,
    };
    if let (EntryType::Link, Some(target)) = (kind, &target) {
        let target = plain(target)?;
        if !made.contains(&target) || target == path {
            return Err(entry(
                path,
                "is another name of nothing that comes before it",
            ));
        }
        let (from, old) =
            split(&target).ok_or_else(|| entry(path, "is another name of the root"))?;
        let from = open_dir(root, from).map_err(&failed)?;
        remove(&dir, name, 0).map_err(&failed)?;
        return rustix::fs::linkat(&from, old, &dir, name, AtFlags::empty()).map_err(&failed);
    }
    remove(&dir, name, 0).map_err(&failed)?;
    match kind {
        EntryType::Regular | EntryType::Continuous => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&dir, name, flags, Mode::from_raw_mode(0o600))
                .map_err(&failed)?;
            let size = found.header().entry_size().map_err(ApplyError::Archive)?;
            let mut file = File::from(file);
            let copied = io::copy(found, &mut file).map_err(|source| ApplyError::File {
                path: path.to_owned(),
                source,
            })?;
            if copied != size {
                return Err(ApplyError::Archive(io::ErrorKind::UnexpectedEof.into()));
            }
            let file = OwnedFd::from(file);
            own(&file, found).map_err(&failed)?;
            let mtime = found.header().mtime().unwrap_or(0);
            rustix::fs::futimens(&file, &stamps(mtime)).map_err(&failed)
        }
        EntryType::Symlink => {
            let target = target.unwrap_or_default();
            rustix::fs::symlinkat(&target, &dir, name).map_err(&failed)?;
            let (uid, gid) = owner(found).map_err(&failed)?;
            rustix::fs::chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(&failed)
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => {
            let (kind, device) = match kind {
                EntryType::Char => (FileType::CharacterDevice, device(found)?),
                EntryType::Block => (FileType::BlockDevice, device(found)?),
                _ => (FileType::Fifo, 0),
            };
            if kind == FileType::CharacterDevice && device == 0 {
                return Err(entry(path, "would be a whiteout"));
            }
            rustix::fs::mknodat(&dir, name, kind, mode, device).map_err(&failed)?;
            let (uid, gid) = owner(found).map_err(&failed)?;
            rustix::fs::chownat(&dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(&failed)?;
            // After the owner, which takes bits away. A node that was made just now is no link.
            rustix::fs::chmodat(&dir, name, mode, AtFlags::empty()).map_err(&failed)
        }
        _ => Err(entry(path, "is of a kind that can't be restored")),
    }
}

fn device<R: Read>(found: &Entry<'_, R>) -> Result<u64, ApplyError> {
    let header = found.header();
    let major = header.device_major().map_err(ApplyError::Archive)?;
    let minor = header.device_minor().map_err(ApplyError::Archive)?;
    Ok(rustix::fs::makedev(major.unwrap_or(0), minor.unwrap_or(0)))
}

fn owner<R: Read>(found: &Entry<'_, R>) -> Result<(Uid, Gid), Errno> {
    let id = |n: io::Result<u64>| {
        let n = n.ok().and_then(|n| u32::try_from(n).ok());
        n.filter(|n| *n != u32::MAX).ok_or(Errno::OVERFLOW)
    };
    let header = found.header();
    Ok((
        Uid::from_raw(id(header.uid())?),
        Gid::from_raw(id(header.gid())?),
    ))
}

/// Gives what is open its owner, attributes and mode.
fn own<R: Read>(file: &OwnedFd, found: &mut Entry<'_, R>) -> Result<(), Errno> {
    let (uid, gid) = owner(found)?;
    rustix::fs::fchown(file, Some(uid), Some(gid))?;
    let mode = found.header().mode().map_err(|_| Errno::INVAL)? & 0o7777;
    rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    let Ok(Some(extensions)) = found.pax_extensions() else {
        return Ok(());
    };
    for extension in extensions.flatten() {
        let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR)) else {
            continue;
        };
        if !XATTRS.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        let set = rustix::fs::fsetxattr(
            file.as_fd(),
            &name,
            extension.value_bytes(),
            XattrFlags::empty(),
        );
        match set {
            // The image store treats file systems without attributes likewise.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn stamps(mtime: u64) -> Timestamps {
    let time = Timespec {
        tv_sec: i64::try_from(mtime).unwrap_or(0),
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Makes what a mount of the container's is mounted on, if it is missing: a file, or a directory.
///
/// # Errors
/// [`ApplyError::File`].
pub fn make_place(root: &OwnedFd, path: &Path, file: bool) -> Result<(), ApplyError> {
    let path = plain(path)?;
    let failed = at(&path);
    let Some((parent, name)) = split(&path) else {
        return Ok(());
    };
    if !file {
        return make_dirs(root, &path).map(drop).map_err(&failed);
    }
    let dir = make_dirs(root, parent).map_err(&failed)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, name, flags, Mode::from_raw_mode(0o644)) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(failed(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::time::Duration;
    use tar::{Builder, Header};

    fn member(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, content: &str) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        let data = matches!(kind, EntryType::Regular);
        header.set_size(if data { content.len() as u64 } else { 0 });
        // The crate itself refuses names that lead upwards.
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        if !data {
            old.linkname[..content.len()].copy_from_slice(content.as_bytes());
        }
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_cksum();
        let content = if data { content.as_bytes() } else { b"" };
        builder.append(&header, content).unwrap();
    }

    fn apply(dir: &Path, members: &[(&str, EntryType, &str)]) -> Result<(), String> {
        let mut builder = Builder::new(Vec::new());
        for (name, kind, content) in members {
            member(&mut builder, name, *kind, content);
        }
        let archive = builder.into_inner().unwrap();
        let root = OwnedFd::from(File::open(dir).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        unpack(&root, archive.as_slice(), deadline).map_err(|e| e.to_string())
    }

    #[test]
    fn changes_are_put_over_what_is_there() {
        use EntryType as T;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("kept/inner")).unwrap();
        fs::set_permissions(at("kept"), fs::Permissions::from_mode(0o711)).unwrap();
        fs::write(at("kept/old"), "old").unwrap();
        fs::create_dir(at("was-dir")).unwrap();
        fs::write(at("was-dir/x"), "x").unwrap();
        fs::write(at("was-file"), "x").unwrap();
        fs::write(at("gone"), "x").unwrap();
        fs::create_dir(at("opaque")).unwrap();
        fs::write(at("opaque/hidden"), "x").unwrap();
        apply(
            dir.path(),
            &[
                ("kept/old", T::Regular, "new"),
                ("./kept/second", T::Link, "kept/old"),
                ("was-dir", T::Regular, "file"),
                ("was-file", T::Directory, ""),
                ("was-file/y", T::Symlink, "/etc/passwd"),
                ("opaque/ours", T::Regular, "ours"),
                ("opaque/.wh..wh..opq", T::Regular, ""),
                (".wh.gone", T::Regular, ""),
                ("fifo", T::Fifo, ""),
            ],
        )
        .unwrap();
        assert_eq!(fs::read_to_string(at("kept/old")).unwrap(), "new");
        assert_eq!(
            fs::metadata(at("kept")).unwrap().permissions().mode() & 0o777,
            0o711
        );
        let inode = |name: &str| fs::metadata(at(name)).unwrap().ino();
        assert_eq!(inode("kept/old"), inode("kept/second"));
        assert_eq!(
            fs::metadata(at("kept/old")).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert!(at("kept/inner").is_dir());
        assert_eq!(fs::read_to_string(at("was-dir")).unwrap(), "file");
        assert_eq!(
            fs::read_link(at("was-file/y")).unwrap(),
            Path::new("/etc/passwd")
        );
        assert!(at("opaque/ours").exists() && !at("opaque/hidden").exists());
        assert!(!at("gone").exists());
        let root = OwnedFd::from(File::open(dir.path()).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        remove_all(
            &root,
            &list(&["/kept", "/not/there", "/was-dir/below"]),
            deadline,
        )
        .unwrap();
        assert!(!at("kept").exists());
        for bad in ["/../etc", "..", "/", ""] {
            remove_all(&root, &list(&[bad]), deadline).unwrap_err();
        }
        let late = remove_all(&root, &list(&["/x"]), Instant::now());
        assert!(matches!(late, Err(ApplyError::Late)));
    }

    #[test]
    fn nothing_is_made_or_removed_outside() {
        use EntryType as T;
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let out = outside.path().to_str().unwrap();
        let secret = format!("{out}/secret");
        for members in [
            &[("../x", T::Regular, "x")][..],
            &[("a/../../x", T::Regular, "x")],
            &[("link", T::Symlink, out), ("link/x", T::Regular, "x")],
            &[
                ("link", T::Symlink, out),
                ("link/.wh.secret", T::Regular, ""),
            ],
            &[
                ("link", T::Symlink, out),
                ("link/.wh..wh..opq", T::Regular, ""),
            ],
            &[("link", T::Symlink, out), ("hard", T::Link, "link/secret")],
            &[("hard", T::Link, &secret)],
            &[("hard", T::Link, "../secret")],
            &[("hard", T::Link, "hard")],
            &[(".wh...", T::Regular, "")],
            &[("zero", T::Char, "")],
            &[("odd", T::new(b'?'), "")],
        ] {
            let dir = tempfile::tempdir().unwrap();
            apply(dir.path(), members).expect_err(members[0].0);
        }
        // A link that is there is replaced, not followed.
        let dir = tempfile::tempdir().unwrap();
        symlink(&secret, dir.path().join("file")).unwrap();
        symlink(out, dir.path().join("dir")).unwrap();
        apply(
            dir.path(),
            &[("file", T::Regular, "x"), ("dir", T::Directory, "")],
        )
        .unwrap();
        assert!(dir.path().join("dir").symlink_metadata().unwrap().is_dir());
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
