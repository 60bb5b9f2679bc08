//! Whose turn it is to bring a layer: a bound over all work, and a share of it for each registry, so
//! that one that stalls doesn't hold up the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The turns of a store.
pub(crate) struct Turns {
    all: Arc<Semaphore>,
    /// How many turns one registry gets at the same time.
    share: usize,
    registries: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// A turn; ends when it is dropped.
pub(crate) struct Turn {
    _all: OwnedSemaphorePermit,
    _share: Option<OwnedSemaphorePermit>,
}

impl Turns {
    /// At most `bound` turns at the same time, two thirds of them for one registry.
    pub(crate) fn new(bound: usize) -> Self {
        let bound = bound.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            all: Arc::new(Semaphore::new(bound)),
            share: bound - bound / 3,
            registries: Mutex::default(),
        }
    }

    /// Waits for a turn with a registry. `None` never comes in practice: nothing closes the turns.
    pub(crate) async fn with_registry(&self, host: &str) -> Option<Turn> {
        // The share first: who waits for it takes no turn from others.
        let share = self.share(host).acquire_owned().await.ok()?;
        Some(Turn {
            _share: Some(share),
            ..self.local().await?
        })
    }

    /// Waits for a turn with what is here already.
    pub(crate) async fn local(&self) -> Option<Turn> {
        Some(Turn {
            _all: Arc::clone(&self.all).acquire_owned().await.ok()?,
            _share: None,
        })
    }

    fn share(&self, host: &str) -> Arc<Semaphore> {
        let mut registries = self
            .registries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        registries.retain(|_, share| share.strong_count() > 0);
        if let Some(share) = registries.get(host).and_then(Weak::upgrade) {
            return share;
        }
        let share = Arc::new(Semaphore::new(self.share));
        registries.insert(host.to_owned(), Arc::downgrade(&share));
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_registry_leaves_turns_to_others() {
        let turns = Turns::new(3);
        let soon = |host: &'static str| {
            let turn = turns.with_registry(host);
            tokio::time::timeout(std::time::Duration::from_millis(50), turn)
        };
        let one = soon("a").await.unwrap();
        let _two = soon("a").await.unwrap();
        assert!(soon("a").await.is_err());
        let _three = soon("b").await.unwrap();
        assert!(soon("b").await.is_err(), "the bound over all");
        drop(one);
        assert!(soon("a").await.is_ok());
        assert_eq!(turns.registries.lock().unwrap().len(), 2);
        // One is enough for everybody, if there's only one.
        assert!(Turns::new(0).with_registry("a").await.is_some());
    }
}
