//! Reading a checkpoint that somebody brings: an archive, or the layers of an image. Only what a restore needs is taken,
//! only ordinary files, each once, each to a place of ours, and no more than is allowed in all.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::de::DeserializeOwned;
use slipway_runtime::checkpoint::{DELETED_FILES, IMAGES, ROOTFS_DIFF};
use tar::{Archive, EntryType};

use super::archive::{self, CONFIG, ContainerConfig, SPEC};
use crate::pod::error::{PodError, file};

/// What is taken, beside criu's images.
const TAKEN: [&str; 4] = [CONFIG, SPEC, ROOTFS_DIFF, DELETED_FILES];
/// The largest description, in bytes.
const LARGEST: u64 = 16 << 20;
/// The most images of criu's.
const MOST_IMAGES: usize = 100_000;

/// Where things go to, and how much may.
struct Sink<'a> {
    what: String,
    dir: &'a Path,
    left: u64,
    limit: u64,
    images: usize,
}

/// Takes an archive apart into an empty directory.
///
/// # Errors
/// [`PodError::NoCheckpoint`], [`PodError::Checkpoint`] for a damaged or hostile one, [`PodError::File`].
pub fn archive(path: &Path, dir: &Path, limit: u64) -> Result<(), PodError> {
    let opened = open(path)?;
    let mut sink = Sink::new(path.display().to_string(), dir, limit)?;
    let damaged = |e: io::Error| bad(&path.display(), format!("it is damaged: {e}"));
    let mut archive = Archive::new(io::BufReader::with_capacity(256 << 10, opened));
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let inside = entry.path().map_err(damaged)?.into_owned();
        let Some(inside) = sink.place(&inside)? else {
            continue;
        };
        if !matches!(
            entry.header().entry_type(),
            EntryType::Regular | EntryType::Continuous
        ) {
            return Err(sink.bad(format!("{inside:?} in it is no ordinary file")));
        }
        let size = entry.size();
        sink.put(&inside, size, &mut entry)?;
    }
    Ok(())
}

/// Takes the content of an image's layers, topmost first.
///
/// # Errors
/// As [`archive`].
pub fn layers<'a>(
    image: &str,
    layers: impl Iterator<Item = &'a Path>,
    dir: &Path,
    limit: u64,
) -> Result<(), PodError> {
    let mut sink = Sink::new(image.to_owned(), dir, limit)?;
    for layer in layers {
        let root: OwnedFd = File::open(layer).map_err(file("open", layer))?.into();
        let mut names: Vec<PathBuf> = TAKEN.iter().map(PathBuf::from).collect();
        let images = layer.join(IMAGES);
        if images.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            for entry in fs::read_dir(&images).map_err(file("list", &images))? {
                let name = entry.map_err(file("list", &images))?.file_name();
                names.push(Path::new(IMAGES).join(name));
            }
        }
        for name in names {
            // A layer above has it.
            if dir.join(&name).symlink_metadata().is_ok() {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let opened = match rustix::fs::openat2(&root, &name, flags, Mode::empty(), resolve) {
                Ok(opened) => File::from(opened),
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(sink.bad(format!("{name:?} in it can't be opened: {e}"))),
            };
            let metadata = opened.metadata().map_err(file("read", layer.join(&name)))?;
            if !metadata.is_file() {
                return Err(sink.bad(format!("{name:?} in it is no ordinary file")));
            }
            if let Some(inside) = sink.place(&name)? {
                sink.put(&inside, metadata.len(), &mut &opened)?;
            }
        }
    }
    Ok(())
}

/// What a checkpoint says of the container.
#[derive(Debug)]
pub struct Description {
    /// `config.dump`.
    pub config: ContainerConfig,
    /// `spec.dump`.
    pub spec: Spec,
}

/// Reads what is in a directory that one of the above has filled. `what` names the checkpoint.
///
/// # Errors
/// [`PodError::Checkpoint`].
pub fn describe(what: &str, dir: &Path) -> Result<Description, PodError> {
    for needed in [
        "inventory.img",
        "pstree.img",
        "files.img",
        "descriptors.json",
    ] {
        if !dir.join(IMAGES).join(needed).is_file() {
            return Err(bad(&what, format!("{IMAGES}/{needed} is not in it")));
        }
    }
    let read = |name: &str| {
        let file =
            File::open(dir.join(name)).map_err(|_| bad(&what, format!("{name} is not in it")));
        file.and_then(|mut file| text(what, name, &mut file))
    };
    Ok(Description {
        config: json(what, CONFIG, &read(CONFIG)?)?,
        spec: json(what, SPEC, &read(SPEC)?)?,
    })
}

/// Looks only at an archive's `config.dump`.
///
/// # Errors
/// As [`archive`].
pub fn peek(path: &Path) -> Result<ContainerConfig, PodError> {
    let mut opened = open(path)?;
    let what = path.display().to_string();
    let damaged = |e: io::Error| bad(&what, format!("it is damaged: {e}"));
    opened.rewind().map_err(damaged)?;
    let mut archive = Archive::new(opened);
    for entry in archive.entries_with_seek().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let is_it = entry
            .path()
            .map_err(damaged)?
            .components()
            .eq(Path::new(CONFIG).components());
        if is_it && entry.header().entry_type() == EntryType::Regular {
            let text = text(&what, CONFIG, &mut entry)?;
            return json(&what, CONFIG, &text);
        }
    }
    Err(bad(&what, format!("{CONFIG} is not in it")))
}

/// Opens an ordinary file, wherever a link leads, and never waits for it.
fn open(path: &Path) -> Result<File, PodError> {
    let mut options = File::options();
    let opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let opened = match opened {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(PodError::NoCheckpoint {
                path: path.to_owned(),
            });
        }
        other => other.map_err(file("open", path))?,
    };
    match opened.metadata().map_err(file("read", path))?.is_file() {
        true => Ok(opened),
        false => Err(bad(&path.display(), "it is no ordinary file")),
    }
}

fn bad(what: &dyn std::fmt::Display, reason: impl Into<String>) -> PodError {
    PodError::Checkpoint {
        what: what.to_string(),
        reason: reason.into(),
    }
}

fn text(what: &str, name: &str, from: &mut dyn Read) -> Result<Vec<u8>, PodError> {
    let mut text = Vec::new();
    let read = from.take(LARGEST + 1).read_to_end(&mut text);
    read.map_err(|e| bad(&what, format!("{name} in it can't be read: {e}")))?;
    match text.len() as u64 > LARGEST {
        true => Err(bad(&what, format!("{name} in it is too large"))),
        false => Ok(text),
    }
}

fn json<T: DeserializeOwned>(what: &str, name: &str, text: &[u8]) -> Result<T, PodError> {
    serde_json::from_slice(text)
        .map_err(|e| bad(&what, format!("{name} in it can't be understood: {e}")))
}

impl<'a> Sink<'a> {
    fn new(what: String, dir: &'a Path, limit: u64) -> Result<Self, PodError> {
        archive::private_dir(&dir.join(IMAGES))?;
        Ok(Self {
            what,
            dir,
            left: limit,
            limit,
            images: 0,
        })
    }

    fn bad(&self, reason: impl Into<String>) -> PodError {
        bad(&self.what, reason)
    }

    /// Where a member goes; `None`: nowhere.
    fn place(&self, inside: &Path) -> Result<Option<PathBuf>, PodError> {
        let mut names = Vec::new();
        for part in inside.components() {
            match part {
                Component::Normal(name) => names.push(name),
                Component::CurDir => {}
                _ => return Err(self.bad(format!("{inside:?} in it leads out of it"))),
            }
        }
        Ok(match names.as_slice() {
            [one] if TAKEN.iter().any(|taken| one == taken) => Some(PathBuf::from(one)),
            [images, one] if *images == IMAGES => Some(Path::new(IMAGES).join(one)),
            [images, _, ..] if *images == IMAGES => {
                return Err(self.bad(format!("{inside:?} in it is none of criu's images")));
            }
            // Logs, statistics, directories.
            _ => None,
        })
    }

    fn put(&mut self, inside: &Path, size: u64, from: &mut dyn Read) -> Result<(), PodError> {
        self.images += 1;
        let fits = size <= self.left && self.images <= MOST_IMAGES;
        let small = ![CONFIG, SPEC].iter().any(|name| inside == Path::new(name)) || size <= LARGEST;
        if !fits || !small {
            return Err(self.bad(format!(
                "it holds more than {} bytes (checkpoint.restore_limit), or too many files",
                self.limit
            )));
        }
        self.left -= size;
        let path = self.dir.join(inside);
        let mut options = File::options();
        let made = options.write(true).create_new(true).mode(0o600).open(&path);
        let mut to = match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(self.bad(format!("{inside:?} is in it twice")));
            }
            other => other.map_err(file("create", &path))?,
        };
        let mut buffer = vec![0; 256 << 10];
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let length = match from.read(&mut buffer[..most]) {
                Ok(0) => return Err(self.bad(format!("it ends within {inside:?}"))),
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.bad(format!("{inside:?} in it can't be read: {e}"))),
            };
            to.write_all(&buffer[..length])
                .map_err(file("write", &path))?;
            left -= length as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tar::{Builder, Header};

    const LIMIT: u64 = 1 << 20;

    fn member(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, content: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        // The crate itself refuses names that lead upwards.
        let bytes = name.as_bytes();
        header.as_old_mut().name[..bytes.len()].copy_from_slice(bytes);
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }

    /// Members of an ordinary checkpoint, and others.
    fn made(others: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        member(&mut builder, "checkpoint/", EntryType::Directory, b"");
        for image in [
            "inventory.img",
            "pstree.img",
            "files.img",
            "descriptors.json",
        ] {
            member(
                &mut builder,
                &format!("checkpoint/{image}"),
                EntryType::Regular,
                b"x",
            );
        }
        member(
            &mut builder,
            CONFIG,
            EntryType::Regular,
            br#"{"id":"a","rootfsImageRef":"r"}"#,
        );
        member(
            &mut builder,
            SPEC,
            EntryType::Regular,
            br#"{"ociVersion":"1.0.2"}"#,
        );
        for (name, kind, content) in others {
            member(&mut builder, name, *kind, content);
        }
        builder.into_inner().unwrap()
    }

    fn unpack(bytes: &[u8]) -> Result<Vec<String>, String> {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = from.path().join("c.tar");
        fs::write(&path, bytes).unwrap();
        archive(&path, to.path(), LIMIT).map_err(|e| e.to_string())?;
        describe("c", to.path()).map_err(|e| e.to_string())?;
        assert_eq!(peek(&path).map_err(|e| e.to_string())?.id, "a");
        let mut names = Vec::new();
        for dir in [to.path().to_owned(), to.path().join(IMAGES)] {
            for entry in fs::read_dir(dir).unwrap() {
                names.push(entry.unwrap().file_name().into_string().unwrap());
            }
        }
        Ok(names)
    }

    #[test]
    fn what_is_needed_is_taken_and_nothing_else() {
        use EntryType as T;
        let names = unpack(&made(&[
            ("./rootfs-diff.tar", T::Regular, b"x"),
            ("dump.log", T::Regular, b"x"),
            ("artifacts/x", T::Symlink, b""),
            ("checkpoint/pages-1.img", T::Regular, b"x"),
        ]))
        .unwrap();
        assert!(
            names.contains(&"pages-1.img".to_owned()) && names.contains(&ROOTFS_DIFF.to_owned())
        );
        assert!(
            !names
                .iter()
                .any(|name| name == "dump.log" || name == "artifacts")
        );
    }

    #[test]
    fn hostile_archives_are_refused() {
        use EntryType as T;
        let large = vec![0; LIMIT as usize];
        for (name, kind, content, word) in [
            ("../config.dump", T::Regular, &b"x"[..], "leads out"),
            ("/config.dump", T::Regular, b"x", "leads out"),
            ("checkpoint/../../x", T::Regular, b"x", "leads out"),
            ("checkpoint/a/b", T::Regular, b"x", "none of criu's"),
            ("checkpoint/a", T::Symlink, b"", "no ordinary file"),
            ("checkpoint/a", T::Link, b"", "no ordinary file"),
            ("checkpoint/a", T::Char, b"", "no ordinary file"),
            ("checkpoint/a", T::Block, b"", "no ordinary file"),
            ("checkpoint/a", T::Fifo, b"", "no ordinary file"),
            ("checkpoint/a", T::GNUSparse, b"", ""),
            ("rootfs-diff.tar", T::Symlink, b"", "no ordinary file"),
            ("checkpoint/inventory.img", T::Regular, b"y", "twice"),
            ("config.dump", T::Regular, b"{}", "twice"),
            (
                "checkpoint/pages-1.img",
                T::Regular,
                &large,
                "restore_limit",
            ),
        ] {
            let error = unpack(&made(&[(name, kind, content)])).expect_err(name);
            assert!(error.contains(word), "{name}: {error}");
        }
    }

    #[test]
    fn damaged_archives_are_refused() {
        let whole = made(&[("checkpoint/pages-1.img", EntryType::Regular, &[7; 5000])]);
        unpack(&whole).unwrap();
        // Cut anywhere before its last block of content.
        for length in (0..whole.len() - 2048).step_by(300) {
            unpack(&whole[..length]).expect_err(&length.to_string());
        }
        for (n, byte) in [(0, 0xff), (600, 0xff), (124, b'9')] {
            let mut garbled = whole.clone();
            garbled[n] = byte;
            unpack(&garbled).expect_err(&n.to_string());
        }
        unpack(b"{}").unwrap_err();
        unpack(&vec![0xa5; 10_000]).unwrap_err();
    }

    #[test]
    fn descriptions_must_be_there_and_make_sense() {
        for (name, content) in [
            (CONFIG, "["),
            (CONFIG, ""),
            (SPEC, "{\"process\": 5}"),
            (SPEC, "null"),
        ] {
            let mut builder = Builder::new(Vec::new());
            for image in [
                "inventory.img",
                "pstree.img",
                "files.img",
                "descriptors.json",
            ] {
                member(
                    &mut builder,
                    &format!("checkpoint/{image}"),
                    EntryType::Regular,
                    b"x",
                );
            }
            for (own, fine) in [(CONFIG, r#"{"id":"a"}"#), (SPEC, r#"{"ociVersion":"1"}"#)] {
                let text = if own == name { content } else { fine };
                member(&mut builder, own, EntryType::Regular, text.as_bytes());
            }
            unpack(&builder.into_inner().unwrap()).expect_err(name);
        }
        let mut builder = Builder::new(Vec::new());
        member(&mut builder, CONFIG, EntryType::Regular, b"{}");
        assert!(
            unpack(&builder.into_inner().unwrap())
                .unwrap_err()
                .contains("not in it")
        );
    }

    #[test]
    fn layers_are_read_without_following_links() {
        let (low, top, to) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        fs::create_dir(low.path().join(IMAGES)).unwrap();
        fs::write(low.path().join(CONFIG), "low").unwrap();
        fs::write(low.path().join("checkpoint/a.img"), "a").unwrap();
        fs::write(top.path().join(CONFIG), "top").unwrap();
        let both = || [top.path(), low.path()].into_iter();
        layers("i", both(), to.path(), LIMIT).unwrap();
        assert_eq!(fs::read_to_string(to.path().join(CONFIG)).unwrap(), "top");
        assert_eq!(
            fs::read_to_string(to.path().join("checkpoint/a.img")).unwrap(),
            "a"
        );
        symlink("/etc/passwd", low.path().join("checkpoint/b.img")).unwrap();
        let to = tempfile::tempdir().unwrap();
        layers("i", both(), to.path(), LIMIT).unwrap_err();
        fs::remove_dir_all(low.path().join(IMAGES)).unwrap();
        symlink("/etc", low.path().join(IMAGES)).unwrap();
        let to = tempfile::tempdir().unwrap();
        layers("i", both(), to.path(), LIMIT).unwrap();
        assert_eq!(fs::read_dir(to.path().join(IMAGES)).unwrap().count(), 0);
    }

    #[test]
    fn only_ordinary_files_are_archives() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let gone = archive(&from.path().join("gone"), to.path(), LIMIT).unwrap_err();
        assert!(matches!(gone, PodError::NoCheckpoint { .. }), "{gone}");
        let fifo = from.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [fifo.as_path(), from.path(), Path::new("/dev/zero")] {
            archive(path, to.path(), LIMIT).unwrap_err();
        }
    }
}
