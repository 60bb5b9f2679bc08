//! SELinux labels of files that containers are given.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, XattrFlags};

const LABEL: &str = "security.selinux";
/// As deep as paths can be that a program can still name.
const DEEPEST: usize = 2048;

/// Gives a file, or a directory with all that is in it, a label. Links are labelled, never followed, and nothing is
/// opened by more than one name at a time: what is walked through may belong to a container that runs.
///
/// # Errors
/// What the kernel says of the first file that can't have the label. A file system without labels is none.
pub fn relabel(path: &Path, label: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    // Through the descriptor, which lsetxattr must follow: it is no link of anybody's.
    match set(&own, label, true) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        other => other?,
    }
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let dir = rustix::fs::openat(
            &file,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        below(&Dir::new(dir)?, label, 0)?;
    }
    Ok(())
}

fn below(dir: &Dir, label: &str, depth: usize) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    let fd = dir.fd()?;
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
        let path = path.join(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(
            name.to_bytes(),
        ));
        match set(&path, label, false) {
            // It went while we looked, or is another file system's.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => continue,
            other => other?,
        }
        let directory = match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            kind => kind == FileType::Directory,
        };
        if directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(fd.as_fd(), name, flags, Mode::empty()) {
                Ok(inner) => below(&Dir::new(inner)?, label, depth + 1)?,
                // Gone, or no directory any more.
                Err(
                    rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP,
                ) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Writes a label unless it is there already: a volume of many files is mostly labelled from the last time.
fn set(path: impl AsRef<Path>, label: &str, follow: bool) -> io::Result<()> {
    let path = path.as_ref();
    let mut found = [0u8; 512];
    let length = if follow {
        rustix::fs::getxattr(path, LABEL, &mut found[..])
    } else {
        rustix::fs::lgetxattr(path, LABEL, &mut found[..])
    };
    let current = length.ok().and_then(|n| found.get(..n)).unwrap_or_default();
    if current.strip_suffix(b"\0").unwrap_or(current) == label.as_bytes() {
        return Ok(());
    }
    let bytes = [label.as_bytes(), b"\0"].concat();
    if follow {
        rustix::fs::setxattr(path, LABEL, &bytes, XattrFlags::empty())?;
    } else {
        rustix::fs::lsetxattr(path, LABEL, &bytes, XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label_of(path: &Path) -> Option<Vec<u8>> {
        let mut found = [0u8; 512];
        let length = rustix::fs::lgetxattr(path, LABEL, &mut found[..]).ok()?;
        Some(found[..length].to_vec())
    }

    #[test]
    fn all_that_is_below_is_labelled_and_nothing_beside() {
        // Without SELinux the kernel stores these attributes as it is told, if the file system has any.
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(inside.join("a/b")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(inside.join("a/b/file"), "x").unwrap();
        std::fs::write(outside.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        std::os::unix::fs::symlink(outside.join("file"), inside.join("a/link")).unwrap();
        let before = label_of(&outside);
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        match relabel(&inside, label) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                println!("SKIPPED: needs root to set labels");
                return;
            }
            done => done.unwrap(),
        }
        let wanted = format!("{label}\0").into_bytes();
        if label_of(&inside).is_none() {
            println!("SKIPPED: the temporary directory's file system has no labels");
            return;
        }
        for name in ["", "a", "a/b", "a/b/file"] {
            assert_eq!(
                label_of(&inside.join(name)).as_ref(),
                Some(&wanted),
                "{name}"
            );
        }
        assert_eq!(label_of(&outside), before);
        assert_eq!(label_of(&outside.join("file")), before);
        // Again, with nothing to do.
        relabel(&inside, label).unwrap();
        assert!(relabel(&dir.path().join("missing"), label).is_err());
    }
}
