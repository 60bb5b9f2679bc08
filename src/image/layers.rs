//! Layers: from a stream of bytes to a verified directory of its own.

use std::fs;
use std::io::{Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};

use crate::artifact::Form;
use crate::decompress::Decompressor;
use crate::digest::{Algorithm, Digest, HashingReader};
use crate::error::ImageError;
use crate::tarball::TarError;
use crate::trees::{self, Staging};
use crate::unpack::{self, UnpackError, Unpacked};

/// What a layer's stream must turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// The digest and length of the stream as it comes; unknown in archives of `docker save`.
    pub(crate) blob: Option<(Digest, u64)>,
    /// The digest of the uncompressed archive; of an artifact's blob, what its layer is known by.
    pub(crate) diff_id: Digest,
    /// What is made of it.
    pub(crate) form: Form,
}

impl Expected {
    /// The layer's name in messages: the blob's digest, if there is one.
    pub(crate) fn name(&self) -> String {
        match &self.blob {
            Some((digest, _)) => digest.to_string(),
            None => self.diff_id.to_string(),
        }
    }
}

/// A layer that is unpacked and verified, but not in its place yet. Dropped, it vanishes.
pub(crate) struct Prepared {
    staging: Staging,
    pub(crate) unpacked: Unpacked,
}

impl Prepared {
    /// Moves the layer to `target`, which must not exist.
    pub(crate) fn place(self, target: &Path) -> Result<Unpacked, ImageError> {
        let source = self.staging.path().join("fs");
        rustix::fs::renameat_with(CWD, &source, CWD, target, RenameFlags::NOREPLACE)
            .map_err(|error| ImageError::io("put a layer in place at", target, error.into()))?;
        Ok(self.unpacked)
    }
}

/// Unpacks a stream below `staging_root` and verifies everything about it.
///
/// The stream is read to its end. What it is is compared with what it should be before this
/// returns, and nothing of it is left when it fails.
pub(crate) fn prepare(
    stream: impl Read,
    expected: &Expected,
    staging_root: &Path,
    written: &AtomicU64,
) -> Result<Prepared, ImageError> {
    let staging = Staging::new(staging_root, "layer")
        .map_err(|error| ImageError::io("make a directory in", staging_root, error))?;
    let make = |name: &str| -> Result<PathBuf, ImageError> {
        let path = staging.path().join(name);
        fs::create_dir(&path).map_err(|error| ImageError::io("create", &path, error))?;
        Ok(path)
    };
    let (root, spare) = (make("fs")?, make("spare")?);
    // Made under an unknown umask; an image that says nothing of its root gets the usual mode.
    rustix::fs::chmodat(
        CWD,
        &root,
        rustix::fs::Mode::from_raw_mode(0o755),
        AtFlags::empty(),
    )
    .map_err(|error| ImageError::io("set the mode of", &root, error.into()))?;
    let algorithm = expected
        .blob
        .as_ref()
        .map_or(Algorithm::Sha256, |(digest, _)| digest.algorithm());
    let mut blob = HashingReader::new(stream, algorithm);
    let result = match &expected.form {
        Form::File(path) => file(&mut blob, path, &root, written).map(|unpacked| (unpacked, None)),
        Form::Layer | Form::Tree => unpack_stream(&mut blob, expected, &root, &spare, written)
            .map(|(unpacked, diff_id)| (unpacked, Some(diff_id))),
    };
    let (unpacked, diff_id) = match result {
        Ok(result) => result,
        Err(error) => return Err(explain(error, blob, expected)),
    };
    let name = expected.name();
    blob.drain().map_err(|error| corrupt(&name, &error))?;
    verify_blob(blob, expected)?;
    if let Some(diff_id) = diff_id
        && expected.form == Form::Layer
        && diff_id != expected.diff_id
    {
        return Err(ImageError::DigestMismatch {
            what: format!("the content of layer {name}"),
            expected: expected.diff_id.to_string(),
            actual: diff_id.to_string(),
        });
    }
    Ok(Prepared { staging, unpacked })
}

fn unpack_stream(
    blob: &mut HashingReader<impl Read>,
    expected: &Expected,
    root: &Path,
    spare: &Path,
    written: &AtomicU64,
) -> Result<(Unpacked, Digest), UnpackError> {
    let read = |error| UnpackError::Archive(TarError::Read(error));
    let content = Decompressor::new(blob).map_err(read)?;
    let content = HashingReader::new(content, expected.diff_id.algorithm());
    let (mut content, unpacked) = unpack::unpack(content, root, spare, written)?;
    content.drain().map_err(read)?;
    Ok((unpacked, content.finish().0))
}

/// Writes a stream to one file in an empty directory.
fn file(
    stream: &mut impl Read,
    path: &str,
    root: &Path,
    written: &AtomicU64,
) -> Result<Unpacked, UnpackError> {
    let failed = |source| UnpackError::Io {
        entry: path.to_owned(),
        source,
    };
    let at = root.join(path);
    let above: Vec<&Path> = at
        .ancestors()
        .skip(1)
        .take_while(|dir| *dir != root)
        .collect();
    for dir in above.iter().rev() {
        fs::create_dir(dir).map_err(failed)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    }
    let mut file = fs::File::create_new(&at).map_err(failed)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))
        .map_err(failed)?;
    let mut buffer = vec![0; 128 << 10];
    let mut length = 0;
    loop {
        let read = stream.read(&mut buffer);
        let read = read.map_err(|error| UnpackError::Archive(TarError::Read(error)))?;
        if read == 0 {
            break;
        }
        file.write_all(&buffer[..read]).map_err(failed)?;
        length += read as u64;
        written.fetch_add(read as u64, Ordering::Relaxed);
    }
    let directories = above.len() as u64 + 1;
    Ok(Unpacked {
        bytes: length.next_multiple_of(unpack::BLOCK) + directories * unpack::BLOCK,
        inodes: directories + 1,
        ..Unpacked::default()
    })
}

fn verify_blob(blob: HashingReader<impl Read>, expected: &Expected) -> Result<(), ImageError> {
    let Some((digest, size)) = &expected.blob else {
        return Ok(());
    };
    let (actual, length) = blob.finish();
    if length != *size {
        return Err(ImageError::SizeMismatch {
            what: format!("layer {digest}"),
            expected: *size,
            actual: length,
        });
    }
    if actual != *digest {
        return Err(ImageError::DigestMismatch {
            what: format!("layer {digest}"),
            expected: digest.to_string(),
            actual: actual.to_string(),
        });
    }
    Ok(())
}

/// A broken archive is most often the wrong archive: if its digest is wrong, that is the error.
fn explain(
    error: UnpackError,
    mut blob: HashingReader<impl Read>,
    expected: &Expected,
) -> ImageError {
    let layer = expected.name();
    match error {
        UnpackError::Refused { entry, reason } => ImageError::LayerRefused {
            layer,
            entry,
            reason,
        },
        UnpackError::Io { entry, source } => ImageError::LayerIo {
            layer,
            entry,
            source: Arc::new(source),
        },
        UnpackError::Archive(error) => {
            if blob.drain().is_ok()
                && let Err(mismatch) = verify_blob(blob, expected)
            {
                return mismatch;
            }
            corrupt(&layer, &error)
        }
    }
}

fn corrupt(layer: &str, error: &dyn std::error::Error) -> ImageError {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        reason.push_str(": ");
        reason.push_str(&error.to_string());
        cause = error.source();
    }
    ImageError::LayerCorrupt {
        layer: layer.to_owned(),
        reason,
    }
}

/// Gives directories that `layer` implied, but did not describe, the attributes of the nearest
/// layer below that has them. `lower` is ordered from the top down.
///
/// This is done once, when the first image with this layer is put together. It is best effort:
/// another image may have the same layer above other directories.
pub(crate) fn settle(
    layer: &Path,
    implied: &[Vec<u8>],
    lower: &[PathBuf],
) -> Result<(), ImageError> {
    let open = |path: &Path| trees::open_dir(path).map_err(|e| ImageError::io("open", path, e));
    let own = open(layer)?;
    let lower = lower
        .iter()
        .map(|path| open(path))
        .collect::<Result<Vec<_>, _>>()?;
    for path in implied {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
        let found = lower
            .iter()
            .find_map(|dir| unpack::open_beneath(dir.as_fd(), path, flags).ok());
        let (Some(found), Ok(target)) = (found, unpack::open_beneath(own.as_fd(), path, flags))
        else {
            continue;
        };
        copy_attributes(&found, &target).map_err(|error| {
            let shown = layer.join(String::from_utf8_lossy(path).as_ref());
            ImageError::io("set the attributes of", &shown, error.into())
        })?;
    }
    Ok(())
}

fn copy_attributes(
    from: &impl std::os::fd::AsFd,
    to: &impl std::os::fd::AsFd,
) -> rustix::io::Result<()> {
    use rustix::fs::{Gid, Mode, Uid};
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(
        to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    let mut names = vec![0; rustix::fs::flistxattr(from, &mut [0u8; 0])?];
    let length = rustix::fs::flistxattr(from, names.as_mut_slice())?;
    for name in names[..length].split(|byte| *byte == 0) {
        // Overlayfs' own attributes (opaque!) belong to the lower layer.
        if name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_") {
            let mut value = vec![0; rustix::fs::fgetxattr(from, name, &mut [0u8; 0])?];
            let length = rustix::fs::fgetxattr(from, name, value.as_mut_slice())?;
            rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty())?;
        }
    }
    let time = Timespec {
        tv_sec: stat.st_mtime,
        tv_nsec: stat.st_mtime_nsec as _,
    };
    rustix::fs::futimens(
        to,
        &Timestamps {
            last_access: time,
            last_modification: time,
        },
    )
}
