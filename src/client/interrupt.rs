//! The signals that ask the client to end, as events.
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::error::ClientError;

/// Watches SIGINT, SIGTERM and SIGHUP from its creation on; they no longer end the process.
#[derive(Debug)]
pub struct Interrupts {
    names: mpsc::UnboundedReceiver<&'static str>,
}

impl Interrupts {
    /// Starts to watch.
    ///
    /// # Errors
    /// [`ClientError::System`] when the handlers can't be installed.
    pub fn new() -> Result<Interrupts, ClientError> {
        let (sender, names) = mpsc::unbounded_channel();
        for (kind, name) in [
            (SignalKind::interrupt(), "SIGINT"),
            (SignalKind::terminate(), "SIGTERM"),
            (SignalKind::hangup(), "SIGHUP"),
        ] {
            let mut events = signal(kind).map_err(|source| ClientError::System {
                what: "cannot watch signals",
                source,
            })?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while events.recv().await.is_some() && sender.send(name).is_ok() {}
            });
        }
        Ok(Interrupts { names })
    }

    /// Signals that a test sends.
    #[cfg(test)]
    pub fn fake() -> (mpsc::UnboundedSender<&'static str>, Interrupts) {
        let (sender, names) = mpsc::unbounded_channel();
        (sender, Interrupts { names })
    }

    /// Waits for the next signal and gives its name. Safe to cancel.
    pub async fn next(&mut self) -> &'static str {
        match self.names.recv().await {
            Some(name) => name,
            None => std::future::pending().await,
        }
    }
}
