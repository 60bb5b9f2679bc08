//! When a connection last did something.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Remembers when a frame last passed a connection, in either direction.
#[derive(Clone)]
pub(crate) struct Activity(Arc<Mutex<Instant>>);

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    /// Something passed just now.
    pub(crate) fn touch(&self) {
        *self.0.lock() = Instant::now();
    }

    /// Returns when nothing has passed for `limit`.
    pub(crate) async fn idle_for(&self, limit: Duration) {
        loop {
            let until = *self.0.lock() + limit;
            if Instant::now() >= until {
                return;
            }
            sleep_until(until).await;
        }
    }
}
