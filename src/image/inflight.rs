//! Pulls in progress. Those of one image with the same credentials are one; it goes on while
//! somebody waits for it, and is called off when nobody does.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::credentials::{Credentials, Secret};
use crate::error::ImageError;
use crate::image::Image;
use crate::meter::Meter;
use crate::progress::ProgressSender;
use crate::pull;
use crate::reference::ImageName;
use crate::store::{ImageStore, Inner};

type PullResult = Result<Arc<Image>, ImageError>;

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    name: ImageName,
    secret: Secret,
}

/// The pulls in progress of a store.
#[derive(Default)]
pub(crate) struct Inflight {
    pulls: HashMap<Key, Pull>,
    next: u64,
}

#[derive(Clone)]
struct Pull {
    number: u64,
    waiters: usize,
    cancel: CancellationToken,
    meter: Arc<Meter>,
    result: watch::Receiver<Option<PullResult>>,
}

/// One who waits for a pull. When the last one goes, the pull is called off.
struct Waiter {
    inner: Arc<Inner>,
    key: Key,
    pull: Pull,
}

impl ImageStore {
    /// Pulls an image: resolves the reference for this platform, downloads and unpacks the layers
    /// that are not here, verifies everything, and makes the image durable and visible.
    ///
    /// Pulls of one reference with the same credentials share their work. Dropping the future calls
    /// the pull off, unless somebody else waits for it, too; nothing of it stays.
    ///
    /// # Errors
    /// See [`ImageError`]; [`ImageError::kind`] says what class it is.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Credentials>,
        progress: Option<ProgressSender>,
    ) -> PullResult {
        let name = ImageName::parse(reference)?;
        let secret = match auth {
            Some(credentials) => credentials.for_host(name.registry())?,
            None => Secret::Anonymous,
        };
        Waiter::join(&self.inner, Key { name, secret })
            .wait(progress)
            .await
    }
}

impl Waiter {
    fn join(inner: &Arc<Inner>, key: Key) -> Self {
        let mut inflight = inner
            .inflight
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pull) = inflight.pulls.get_mut(&key) {
            pull.waiters += 1;
            let pull = pull.clone();
            return Self {
                inner: Arc::clone(inner),
                key,
                pull,
            };
        }
        let (sender, result) = watch::channel(None);
        inflight.next += 1;
        let pull = Pull {
            number: inflight.next,
            waiters: 1,
            cancel: CancellationToken::new(),
            meter: Arc::new(Meter::new()),
            result,
        };
        inflight.pulls.insert(key.clone(), pull.clone());
        let span = tracing::info_span!("pull", image = %key.name);
        inner
            .tasks
            .spawn(drive(Arc::clone(inner), key.clone(), pull.clone(), sender).instrument(span));
        Self {
            inner: Arc::clone(inner),
            key,
            pull,
        }
    }

    async fn wait(&self, progress: Option<ProgressSender>) -> PullResult {
        let mut result = self.pull.result.clone();
        let mut changed = self.pull.meter.subscribe();
        loop {
            tokio::select! {
                biased;
                done = result.wait_for(Option::is_some) => {
                    if let Some(progress) = &progress {
                        progress.send_replace(self.pull.meter.snapshot());
                    }
                    let lost = || ImageError::Lost { what: format!("the pull of {}", self.key.name) };
                    return done.ok().and_then(|result| result.clone()).unwrap_or_else(|| Err(lost()));
                }
                Ok(()) = changed.changed(), if progress.is_some() => {
                    if let Some(progress) = &progress {
                        progress.send_replace(self.pull.meter.snapshot());
                    }
                }
            }
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut inflight = self
            .inner
            .inflight
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pull) = inflight.pulls.get_mut(&self.key)
            && pull.number == self.pull.number
        {
            pull.waiters -= 1;
            if pull.waiters == 0 {
                pull.cancel.cancel();
                // Who comes now starts anew and does not share a pull that is being called off.
                inflight.pulls.remove(&self.key);
            }
        }
    }
}

async fn drive(inner: Arc<Inner>, key: Key, pull: Pull, sender: watch::Sender<Option<PullResult>>) {
    let result = tokio::select! {
        biased;
        () = pull.cancel.cancelled() => Err(ImageError::Cancelled { reference: key.name.to_string() }),
        result = pull::pull(&inner, &key.name, &key.secret, &pull.meter) => result,
    };
    match &result {
        Ok(image) => tracing::info!(id = image.id, bytes = image.size_bytes, "image pulled"),
        Err(error) => tracing::warn!(error = error.chain(), "image pull failed"),
    }
    let mut inflight = inner
        .inflight
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if inflight
        .pulls
        .get(&key)
        .is_some_and(|known| known.number == pull.number)
    {
        inflight.pulls.remove(&key);
    }
    drop(inflight);
    sender.send_replace(Some(result));
}
