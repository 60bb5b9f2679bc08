//! What happens to pods and containers, for those who want to be told (GetContainerEvents).
//!
//! One buffer of bounded length serves all subscribers, and each has its own place in it. Nobody waits for a
//! slow one: it loses the oldest, and is told so.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::mpsc::UnboundedSender;

use super::container::Container;
use super::sandbox::Pod;
use super::state::{PodStage, Status};

/// How many happenings a subscriber can be behind.
const LENGTH: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It was made.
    Created,
    /// Its command runs; a pod takes containers.
    Started,
    /// It ended.
    Stopped,
    /// It is gone.
    Deleted,
}

/// Something that happened to a container or pod, and how its pod was then.
pub struct Happening {
    /// What.
    pub kind: Kind,
    /// To which container; a pod's own id for the pod.
    pub id: String,
    /// When, in nanoseconds since the epoch.
    pub at: i64,
    /// Its pod.
    pub pod: Arc<Pod>,
    /// Where the pod was in its life.
    pub stage: PodStage,
    /// The pod's containers.
    pub containers: Vec<(Arc<Container>, Status)>,
}

/// Where happenings are told.
pub struct Feed<T = Arc<Happening>> {
    sender: Mutex<Option<broadcast::Sender<T>>>,
    /// Who must hear of every container's end.
    ends: OnceLock<UnboundedSender<String>>,
}

/// A subscriber.
pub struct Subscriber<T = Arc<Happening>>(broadcast::Receiver<T>);

/// Why a subscriber gets no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The daemon is going down.
    Closed,
    /// It was too slow, and lost so many.
    Lost(u64),
}

impl<T: Clone> Feed<T> {
    /// A feed for subscribers that are at most `length` behind.
    fn new(length: usize) -> Self {
        Self {
            sender: Mutex::new(Some(broadcast::Sender::new(length))),
            ends: OnceLock::new(),
        }
    }

    /// Tells all subscribers. What it is gets made only if there are any.
    pub fn tell(&self, what: impl FnOnce() -> T) {
        // Made under the lock: the order of telling is the order of happening.
        if let Some(sender) = &*self.sender.lock()
            && sender.receiver_count() > 0
        {
            // The last subscriber may have gone in between.
            let _ = sender.send(what());
        }
    }

    /// Tells the ids of containers that end from now on. Of several, only the first hears.
    pub fn tell_ends(&self, to: UnboundedSender<String>) {
        let _ = self.ends.set(to);
    }

    /// A container has ended.
    pub fn ended(&self, id: &str) {
        if let Some(ends) = self.ends.get() {
            // Nobody is there any more when the daemon goes down.
            let _ = ends.send(id.to_owned());
        }
    }

    /// Subscribes from now on; `None` when the daemon is going down.
    pub fn subscribe(&self) -> Option<Subscriber<T>> {
        let sender = self.sender.lock();
        sender.as_ref().map(|s| Subscriber(s.subscribe()))
    }

    /// Ends all subscriptions, after what has been told.
    pub fn close(&self) {
        self.sender.lock().take();
    }
}

impl Default for Feed {
    fn default() -> Self {
        Self::new(LENGTH)
    }
}

impl<T: Clone> Subscriber<T> {
    /// The next happening.
    ///
    /// # Errors
    /// [`End`]; after it the subscription is worth nothing.
    pub async fn next(&mut self) -> Result<T, End> {
        self.0.recv().await.map_err(|error| match error {
            RecvError::Closed => End::Closed,
            RecvError::Lagged(count) => End::Lost(count),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_gets_everything_in_order_until_the_end() {
        let feed: Feed<u32> = Feed::new(8);
        feed.tell(|| unreachable!("nobody listens"));
        let mut all = [feed.subscribe().unwrap(), feed.subscribe().unwrap()];
        for n in 0..5 {
            feed.tell(|| n);
        }
        let mut late = feed.subscribe().unwrap();
        feed.tell(|| 5);
        feed.close();
        feed.tell(|| unreachable!("it is closed"));
        assert!(feed.subscribe().is_none());
        for subscriber in &mut all {
            for n in 0..6 {
                assert_eq!(subscriber.next().await, Ok(n));
            }
            assert_eq!(subscriber.next().await, Err(End::Closed));
        }
        assert_eq!(late.next().await, Ok(5));
    }

    #[tokio::test]
    async fn a_slow_subscriber_is_told_what_it_lost_and_holds_nobody_up() {
        let feed: Feed<u32> = Feed::new(8);
        let (mut slow, mut quick) = (feed.subscribe().unwrap(), feed.subscribe().unwrap());
        for n in 0..20 {
            feed.tell(|| n);
            assert_eq!(quick.next().await, Ok(n));
        }
        assert_eq!(slow.next().await, Err(End::Lost(12)));
    }
}
