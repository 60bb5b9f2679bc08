//! The signals that ask the client to end, as events.
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::ClientError;

/// Watches SIGINT, SIGTERM and SIGHUP from its creation on; they no longer end the process.
#[derive(Debug)]
pub struct Interrupts {
    int: Signal,
    term: Signal,
    hup: Signal,
}

impl Interrupts {
    /// Starts to watch.
    ///
    /// # Errors
    /// [`ClientError::System`] when the handlers can't be installed.
    pub fn new() -> Result<Interrupts, ClientError> {
        let watch = |kind| {
            signal(kind).map_err(|source| ClientError::System {
                what: "cannot watch signals",
                source,
            })
        };
        Ok(Interrupts {
            int: watch(SignalKind::interrupt())?,
            term: watch(SignalKind::terminate())?,
            hup: watch(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal and gives its name. Safe to cancel.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.int.recv() => "SIGINT",
            _ = self.term.recv() => "SIGTERM",
            _ = self.hup.recv() => "SIGHUP",
        }
    }
}
