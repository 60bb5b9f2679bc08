//! Progress of a pull, for a person who watches it.

use tokio::sync::watch;

/// Where the progress of a pull is published. The receiver always sees the latest state; it can
/// never hold up the pull.
pub type ProgressSender = watch::Sender<PullProgress>;

/// The state of a pull.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// The image's layers, base first; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
}

/// The state of one layer of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerProgress {
    /// The digest of the layer's blob.
    pub digest: String,
    /// Bytes that have arrived.
    pub downloaded: u64,
    /// Bytes of the blob.
    pub total: u64,
    /// Bytes of files that have been unpacked.
    pub unpacked: u64,
    /// What is happening.
    pub status: LayerStatus,
}

/// What is happening to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerStatus {
    /// Waits for its turn.
    Waiting = 0,
    /// Arrives and is unpacked.
    Downloading = 1,
    /// Verified and in place.
    Done = 2,
    /// Was already here.
    Present = 3,
}
