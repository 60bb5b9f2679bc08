//! Counts what a pull does, for whoever watches it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use tokio::sync::watch;

use crate::manifest::Descriptor;
use crate::progress::{LayerProgress, LayerStatus, PullProgress};

/// The counters of one pull.
pub(crate) struct Meter {
    layers: OnceLock<Vec<Counters>>,
    /// Marked whenever a counter has changed.
    changed: watch::Sender<()>,
}

struct Counters {
    digest: String,
    total: u64,
    downloaded: AtomicU64,
    unpacked: AtomicU64,
    status: AtomicU8,
}

/// The counters of one layer.
#[derive(Clone, Copy)]
pub(crate) struct LayerMeter<'a> {
    meter: &'a Meter,
    index: usize,
}

impl Meter {
    pub(crate) fn new() -> Self {
        Self {
            layers: OnceLock::new(),
            changed: watch::Sender::new(()),
        }
    }

    /// Says which layers there are; the first word counts.
    pub(crate) fn begin<'a>(&self, layers: impl Iterator<Item = &'a Descriptor>) {
        self.layers.get_or_init(|| {
            layers
                .map(|layer| Counters {
                    digest: layer.digest.to_string(),
                    total: layer.size,
                    downloaded: AtomicU64::new(0),
                    unpacked: AtomicU64::new(0),
                    status: AtomicU8::new(LayerStatus::Waiting as u8),
                })
                .collect()
        });
        self.changed.send_replace(());
    }

    pub(crate) fn layer(&self, index: usize) -> LayerMeter<'_> {
        LayerMeter { meter: self, index }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(crate) fn snapshot(&self) -> PullProgress {
        let layers = self.layers.get().map(Vec::as_slice).unwrap_or_default();
        PullProgress {
            layers: layers
                .iter()
                .map(|layer| LayerProgress {
                    digest: layer.digest.clone(),
                    downloaded: layer.downloaded.load(Ordering::Relaxed),
                    total: layer.total,
                    unpacked: layer.unpacked.load(Ordering::Relaxed),
                    status: match layer.status.load(Ordering::Relaxed) {
                        1 => LayerStatus::Downloading,
                        2 => LayerStatus::Done,
                        3 => LayerStatus::Present,
                        _ => LayerStatus::Waiting,
                    },
                })
                .collect(),
        }
    }
}

/// Counts into nothing, for work that nobody watches.
static NOWHERE: AtomicU64 = AtomicU64::new(0);

impl<'a> LayerMeter<'a> {
    fn counters(&self) -> Option<&'a Counters> {
        self.meter.layers.get()?.get(self.index)
    }

    pub(crate) fn downloaded(&self, bytes: u64) {
        if let Some(counters) = self.counters() {
            counters.downloaded.store(bytes, Ordering::Relaxed);
            self.meter.changed.send_replace(());
        }
    }

    pub(crate) fn status(&self, status: LayerStatus) {
        if let Some(counters) = self.counters() {
            counters.status.store(status as u8, Ordering::Relaxed);
            self.meter.changed.send_replace(());
        }
    }

    /// Where the bytes of unpacked files are counted.
    pub(crate) fn unpacked(&self) -> &'a AtomicU64 {
        self.counters()
            .map_or(&NOWHERE, |counters| &counters.unpacked)
    }
}
