//! One operation at a time per attachment, as the CNI specification demands (section 2), without
//! making other pods wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Hands out turns by pod id.
#[derive(Debug, Default)]
pub(crate) struct Turns(Arc<Mutex<HashMap<String, Arc<AsyncMutex<()>>>>>);

/// A pod's turn; ends when dropped.
pub(crate) struct Turn {
    turns: Turns,
    id: String,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for the pod's turn.
    pub async fn take(&self, id: &str) -> Turn {
        let queue = Arc::clone(self.map().entry(id.to_owned()).or_default());
        let turns = Self(Arc::clone(&self.0));
        // Made before waiting, so that the entry goes even if the wait is given up.
        let mut turn = Turn {
            turns,
            id: id.to_owned(),
            guard: None,
        };
        turn.guard = Some(queue.lock_owned().await);
        turn
    }

    /// The pods that have a turn or wait for one.
    pub fn busy(&self) -> Vec<String> {
        self.map().keys().cloned().collect()
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<AsyncMutex<()>>>> {
        // The map is whole at any instant that a panic could happen in.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.guard = None;
        let mut map = self.turns.map();
        // Whoever else waits for this pod holds the queue as well.
        if map
            .get(&self.id)
            .is_some_and(|queue| Arc::strong_count(queue) == 1)
        {
            map.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn one_pod_waits_for_itself_only_and_leaves_nothing() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let other = turns.take("b").await;
        assert!(
            timeout(Duration::from_millis(50), turns.take("a"))
                .await
                .is_err()
        );
        let mut busy = turns.busy();
        busy.sort();
        assert_eq!(busy, ["a", "b"]);
        drop(first);
        drop(
            timeout(Duration::from_secs(10), turns.take("a"))
                .await
                .unwrap(),
        );
        drop(other);
        assert!(turns.busy().is_empty());
    }
}
