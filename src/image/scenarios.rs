//! The store as a whole, against a registry that can lie.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::digest::Digest;
use crate::testing::registry::{FakeRegistry, Reply, ranged};
use crate::testing::{Tar, TestImage, gzip, noise, platform};
use crate::{ErrorKind, Image, ImageError, ImageStore, LayerStatus, RegistryConfig, StoreConfig};

mod auth;
mod disaster;
mod lifecycle;
mod lying;
mod real;

/// A store in a directory of its own.
struct Fixture {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Fixture {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), change);
        Self { dir, store }
    }

    async fn pull(&self, reference: &str) -> Result<Arc<Image>, ImageError> {
        let pull = self.store.pull(reference, None, None);
        tokio::time::timeout(Duration::from_secs(60), pull)
            .await
            .expect("a pull has its own deadlines")
    }

    /// Everything that takes space, besides the database.
    fn files(&self) -> Vec<PathBuf> {
        ["layers/sha256", "staging", "trash", "blobs/sha256"]
            .iter()
            .flat_map(|dir| fs::read_dir(self.dir.path().join(dir)).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    async fn assert_clean(&self) {
        self.store.idle().await;
        assert_eq!(self.files(), Vec::<PathBuf>::new());
        assert!(self.store.list().is_empty());
        assert_eq!(self.store.fs_info().used_bytes, 0);
    }

    /// Drops the store and opens it again, as a restarted daemon would.
    async fn reopen(self) -> Self {
        self.store.idle().await;
        let Self { dir, store } = self;
        drop(store);
        let mut attempts = 0;
        loop {
            let config = config(dir.path());
            match ImageStore::open(config) {
                Ok(store) => return Self { dir, store },
                // The collector thread may hold the last reference for a moment.
                Err(error) if attempts < 500 => {
                    assert!(matches!(error, ImageError::Database { .. }), "{error}");
                    attempts += 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{}", error.chain()),
            }
        }
    }
}

fn config(root: &Path) -> StoreConfig {
    StoreConfig {
        root: root.to_path_buf(),
        platform: platform(),
        pull_progress_timeout: Duration::from_secs(5),
        registry: RegistryConfig {
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(5),
            retries: 2,
            ..RegistryConfig::default()
        },
        ..StoreConfig::default()
    }
}

fn open(root: &Path, change: impl FnOnce(&mut StoreConfig)) -> ImageStore {
    let mut config = config(root);
    change(&mut config);
    ImageStore::open(config).unwrap()
}

/// A layer with a megabyte that doesn't compress.
fn large_layer(seed: u64) -> Vec<u8> {
    Tar::default()
        .dir("d", 0o755)
        .file("d/noise", &noise(1 << 20, seed))
        .file(&format!("f{seed}"), b"x")
        .finish()
}

/// Three large layers, in all compressions.
fn large_image() -> TestImage {
    TestImage::new(
        &[large_layer(1), large_layer(2), large_layer(3)],
        "1003:group",
    )
}
