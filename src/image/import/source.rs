//! Where an import reads from: a directory or a tar archive, by the names of files in it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::decompress::Decompressor;
use crate::error::ImageError;
use crate::tarball::{Kind, TarReader};
use crate::trees::Staging;

/// Links in an archive are followed this far; old versions of `docker save` wrote them.
const MAX_LINKS: usize = 8;
/// An archive of more files is no image.
const MAX_FILES: usize = 100_000;

/// Files by name.
pub(super) struct Source {
    path: PathBuf,
    files: Files,
    /// Holds the uncompressed copy of a compressed archive.
    _staging: Option<Staging>,
}

enum Files {
    Directory,
    Archive {
        file: Arc<File>,
        members: HashMap<String, Member>,
    },
}

enum Member {
    Data { offset: u64, size: u64 },
    Link(String),
}

impl Source {
    /// Opens a directory or reads an archive's table of contents. A compressed archive is
    /// uncompressed below `staging` first, because its parts are needed in another order.
    pub(super) fn open(path: &Path, staging: &Path) -> Result<Self, ImageError> {
        let fail = |error| ImageError::io("read", path, error);
        let metadata = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::BadArchive {
                path: path.to_path_buf(),
                reason: "there is no such file or directory".to_owned(),
            },
            _ => fail(error),
        })?;
        if metadata.is_dir() {
            return Ok(Self {
                path: path.to_path_buf(),
                files: Files::Directory,
                _staging: None,
            });
        }
        let file = File::open(path).map_err(fail)?;
        let content = Decompressor::new(&file).map_err(fail)?;
        let (mut file, held) = if matches!(content, Decompressor::Plain(_)) {
            drop(content);
            (file, None)
        } else {
            let (copy, held) = uncompress(content, path, staging)?;
            (copy, Some(held))
        };
        file.seek(SeekFrom::Start(0)).map_err(fail)?;
        let members = members(&file).map_err(|reason| ImageError::BadArchive {
            path: path.to_path_buf(),
            reason,
        })?;
        let files = Files::Archive {
            file: Arc::new(file),
            members,
        };
        Ok(Self {
            path: path.to_path_buf(),
            files,
            _staging: held,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bad(&self, reason: impl Into<String>) -> ImageError {
        ImageError::BadArchive {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.size(name).is_ok()
    }

    /// The size of a file, in bytes.
    pub(super) fn size(&self, name: &str) -> Result<u64, ImageError> {
        match &self.files {
            Files::Directory => {
                let path = self.inside(name)?;
                match fs::metadata(&path) {
                    Ok(metadata) if metadata.is_file() => Ok(metadata.len()),
                    Ok(_) => Err(self.bad(format!("{name:?} is no file"))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        Err(self.missing(name))
                    }
                    Err(error) => Err(ImageError::io("read", &path, error)),
                }
            }
            Files::Archive { members, .. } => find(members, name)
                .map(|(_, size)| size)
                .ok_or_else(|| self.missing(name)),
        }
    }

    /// A small file as a whole.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, ImageError> {
        if self.size(name)? > limit {
            return Err(ImageError::TooLarge {
                what: format!("{name:?} in {}", self.path.display()),
                limit,
            });
        }
        let mut bytes = Vec::new();
        self.stream(name)?
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(|error| ImageError::io("read", &self.path, error))?;
        Ok(bytes)
    }

    /// A file as a stream.
    pub(super) fn stream(&self, name: &str) -> Result<Box<dyn Read + Send>, ImageError> {
        match &self.files {
            Files::Directory => {
                let path = self.inside(name)?;
                let file =
                    File::open(&path).map_err(|error| ImageError::io("open", &path, error))?;
                Ok(Box::new(file))
            }
            Files::Archive { file, members } => {
                let (offset, left) = find(members, name).ok_or_else(|| self.missing(name))?;
                Ok(Box::new(Slice {
                    file: Arc::clone(file),
                    offset,
                    left,
                }))
            }
        }
    }

    fn missing(&self, name: &str) -> ImageError {
        self.bad(format!("it says that it holds {name:?}, but doesn't"))
    }

    /// The names come from the file itself; they must not lead out of it.
    fn inside(&self, name: &str) -> Result<PathBuf, ImageError> {
        let relative = Path::new(name);
        if relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Ok(self.path.join(relative));
        }
        Err(self.bad(format!("it names a file outside of it: {name:?}")))
    }
}

/// Part of a file; several can be read at the same time.
struct Slice {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let got = self.file.read_at(&mut buffer[..want], self.offset)?;
        self.offset += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

fn uncompress(
    mut content: impl Read,
    path: &Path,
    staging: &Path,
) -> Result<(File, Staging), ImageError> {
    let dir = Staging::new(staging, "import")
        .map_err(|e| ImageError::io("make a directory in", staging, e))?;
    let copy = dir.path().join("archive.tar");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&copy)
        .map_err(|error| ImageError::io("create", &copy, error))?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let got = content
            .read(&mut buffer)
            .map_err(|error| ImageError::BadArchive {
                path: path.to_path_buf(),
                reason: format!("it can't be uncompressed: {error}"),
            })?;
        if got == 0 {
            return Ok((file, dir));
        }
        io::Write::write_all(&mut file, &buffer[..got])
            .map_err(|error| ImageError::io("write", &copy, error))?;
    }
}

/// The table of contents. The error is a reason.
fn members(file: &File) -> Result<HashMap<String, Member>, String> {
    let mut reader = TarReader::new(BufReader::with_capacity(64 * 1024, file));
    let mut members = HashMap::new();
    while let Some(entry) = reader
        .next()
        .map_err(|error| format!("it is no tar archive: {error}"))?
    {
        let name = normal(&String::from_utf8_lossy(&entry.name), "");
        let member = match &entry.kind {
            Kind::Regular if entry.segments.is_none() => Member::Data {
                offset: reader.offset(),
                size: entry.size,
            },
            // Relative to the archive, or to the link's own directory.
            Kind::HardLink(target) => Member::Link(normal(&String::from_utf8_lossy(target), "")),
            Kind::Symlink(target) => {
                let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
                Member::Link(normal(&String::from_utf8_lossy(target), dir))
            }
            _ => continue,
        };
        members.insert(name, member);
        if members.len() > MAX_FILES {
            return Err(format!(
                "it holds more than {MAX_FILES} files, so it is no image"
            ));
        }
    }
    Ok(members)
}

/// A path within the archive, resolved by its text. It is only ever looked up in the table of
/// contents, so a wrong one finds nothing.
fn normal(path: &str, dir: &str) -> String {
    let base = if path.starts_with('/') { "" } else { dir };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn find(members: &HashMap<String, Member>, name: &str) -> Option<(u64, u64)> {
    let mut name = normal(name, "");
    for _ in 0..MAX_LINKS {
        match members.get(&name)? {
            Member::Data { offset, size } => return Some((*offset, *size)),
            Member::Link(target) => name = target.clone(),
        }
    }
    None
}
