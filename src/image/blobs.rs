//! Manifests, indexes and image configurations, kept as they came, in the `blobs` directory of an
//! OCI image layout. Layers are not kept here; they live unpacked.

use std::collections::HashSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::ImageError;

/// The blob directory of a store.
#[derive(Debug, Clone)]
pub(crate) struct Blobs {
    root: PathBuf,
}

impl Blobs {
    /// Opens or makes the directory.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        for algorithm in ["sha256", "sha512"] {
            let dir = root.join(algorithm);
            fs::create_dir_all(&dir).map_err(|e| ImageError::io("create", &dir, e))?;
        }
        Ok(Self {
            root: root.to_path_buf(),
        })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.algorithm().name()).join(digest.hex())
    }

    /// Stores verified bytes under their digest; complete or not at all.
    pub(crate) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let path = self.path(digest);
        if path.exists() && self.get(digest, bytes.len() as u64).is_ok() {
            return Ok(());
        }
        let fail = |error| ImageError::io("write", &path, error);
        let mut file = tempfile_in(&self.root).map_err(fail)?;
        let written = file
            .0
            .write_all(bytes)
            .and_then(|()| file.0.sync_all())
            .and_then(|()| fs::rename(&file.1, &path));
        if let Err(error) = written {
            // The temporary file is swept at the next start if even this fails.
            let _ = fs::remove_file(&file.1);
            return Err(fail(error));
        }
        Ok(())
    }

    /// Makes the names of new blobs durable; their content is already.
    pub(crate) fn sync(&self) -> Result<(), ImageError> {
        for algorithm in ["sha256", "sha512"] {
            let dir = self.root.join(algorithm);
            fs::File::open(&dir)
                .and_then(|file| file.sync_all())
                .map_err(|e| ImageError::io("sync", &dir, e))?;
        }
        Ok(())
    }

    /// Reads a blob of at most `limit` bytes and verifies it again.
    pub(crate) fn get(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, ImageError> {
        let path = self.path(digest);
        let length = fs::metadata(&path)
            .map_err(|e| ImageError::io("read", &path, e))?
            .len();
        if length > limit {
            return Err(ImageError::TooLarge {
                what: format!("blob {digest}"),
                limit,
            });
        }
        let bytes = fs::read(&path).map_err(|e| ImageError::io("read", &path, e))?;
        match digest.check(&bytes) {
            Ok(()) => Ok(bytes),
            Err(actual) => Err(ImageError::DigestMismatch {
                what: format!("blob {}", path.display()),
                expected: digest.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    /// Removes a blob; one that is already gone is fine.
    pub(crate) fn remove(&self, digest: &Digest) {
        let path = self.path(digest);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "can't remove a blob");
        }
    }

    /// Removes every file that is not one of `keep`.
    pub(crate) fn sweep(&self, keep: &HashSet<Digest>) -> Result<(), ImageError> {
        let list = |dir: &Path| -> Result<Vec<fs::DirEntry>, ImageError> {
            fs::read_dir(dir)
                .and_then(Iterator::collect)
                .map_err(|e| ImageError::io("list", dir, e))
        };
        for entry in list(&self.root)? {
            let name = entry.file_name();
            let path = entry.path();
            if path.is_file() {
                fs::remove_file(&path).map_err(|e| ImageError::io("remove", &path, e))?;
                continue;
            }
            for entry in list(&path)? {
                let text = format!("{}:{}", name.display(), entry.file_name().display());
                if !Digest::parse(&text).is_ok_and(|digest| keep.contains(&digest)) {
                    let path = entry.path();
                    fs::remove_file(&path).map_err(|e| ImageError::io("remove", &path, e))?;
                }
            }
        }
        Ok(())
    }
}

/// A new file of a name that nobody else uses.
fn tempfile_in(dir: &Path) -> std::io::Result<(fs::File, PathBuf)> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("tmp-{}-{number}", std::process::id()));
        match fs::File::create_new(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            result => return result.map(|file| (file, path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_verified_and_swept() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path()).unwrap();
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        blobs.put(&one, b"one").unwrap();
        blobs.put(&two, b"two").unwrap();
        assert_eq!(blobs.get(&one, 10).unwrap(), b"one");
        assert!(blobs.get(&one, 2).is_err());
        fs::write(blobs.path(&one), b"eno").unwrap();
        assert_eq!(
            blobs.get(&one, 10).unwrap_err().kind(),
            crate::ErrorKind::DataLoss
        );
        // A damaged blob is replaced.
        blobs.put(&one, b"one").unwrap();
        assert_eq!(blobs.get(&one, 10).unwrap(), b"one");
        fs::write(dir.path().join("tmp-1-1"), b"left over").unwrap();
        blobs.sweep(&HashSet::from([one.clone()])).unwrap();
        assert!(blobs.get(&one, 10).is_ok());
        assert!(blobs.get(&two, 10).is_err());
        assert!(!dir.path().join("tmp-1-1").exists());
    }
}
