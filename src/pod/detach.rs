//! Networks of pods that are gone, whose plugins could not give them back at first.

use std::sync::Arc;
use std::time::Duration;

use super::error::chain;
use super::node::Node;

/// Until the second attempt; each further one waits twice as long as the one before.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Plugins' backends are down for minutes, not for hours.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

impl Node {
    /// Goes on trying to detach a pod that nobody else will ask about: the kubelet never learnt its id, or
    /// has forgotten it. In the background, until it works or the daemon ends; the next daemon begins anew.
    pub(super) fn detach_later(self: &Arc<Self>, id: String) {
        let node = self.clone();
        // Not one of the tasks that a shutdown waits for.
        tokio::spawn(async move {
            let mut wait = FIRST_WAIT;
            loop {
                tokio::time::sleep(wait).await;
                match node.cni.del(&id, None).await {
                    Ok(()) => {
                        tracing::info!(
                            pod = id,
                            "the network of a pod that is gone was given back"
                        );
                        return;
                    }
                    Err(e) => {
                        wait = (wait * 2).min(LONGEST_WAIT);
                        tracing::warn!(
                            pod = id,
                            error = chain(&e),
                            again_in = ?wait,
                            "can't give back the network of a pod that is gone"
                        );
                    }
                }
            }
        });
    }
}
