//! Who holds a name: a live operation or an object, and nothing else.
//!
//! A create whose client gave up goes on in its own task. Its object is then *unclaimed*: the client's
//! retry, the same request once more, gets it. So a name can't stay reserved without an owner.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use slipway_proto::cri;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::error::PodError;

type Answer = Result<String, Arc<PodError>>;

enum Holder<R> {
    /// An operation runs; these wait for its end.
    Working {
        request: R,
        waiters: Vec<oneshot::Sender<Answer>>,
    },
    /// An object exists. `request` is there while no client has learnt its id.
    Object { id: String, unclaimed: Option<R> },
}

/// The names of one kind of object; `R` is the request that makes one.
pub struct Names<R> {
    what: &'static str,
    tasks: TaskTracker,
    holders: Mutex<HashMap<String, Holder<R>>>,
}

impl<R: PartialEq + Clone + Send + 'static> Names<R> {
    /// No names yet; `what` names the kind in messages, operations run among `tasks`.
    pub fn new(what: &'static str, tasks: TaskTracker) -> Arc<Self> {
        Arc::new(Self {
            what,
            tasks,
            holders: Mutex::default(),
        })
    }

    /// Runs `make` under `name`, in a task of its own, and returns the id that it gives.
    ///
    /// Exactly one caller learns the id. While the operation runs, a caller with an equal request waits
    /// for it, and gets the id if the earlier callers are gone.
    ///
    /// # Errors
    /// [`PodError::NameTaken`], or what `make` says.
    pub async fn make<F>(
        self: &Arc<Self>,
        name: &str,
        request: R,
        make: F,
    ) -> Result<String, PodError>
    where
        F: Future<Output = Result<String, PodError>> + Send + 'static,
    {
        let (tx, rx) = oneshot::channel();
        let mut start = false;
        {
            let mut holders = self.holders.lock();
            match holders.get_mut(name) {
                None => {
                    let holder = Holder::Working {
                        request,
                        waiters: vec![tx],
                    };
                    holders.insert(name.to_owned(), holder);
                    start = true;
                }
                Some(Holder::Working {
                    request: first,
                    waiters,
                }) if *first == request => {
                    waiters.push(tx);
                }
                Some(Holder::Working { .. }) => {
                    return Err(self.taken(name, "that is being made"));
                }
                Some(Holder::Object { id, unclaimed }) => {
                    if unclaimed.as_ref() == Some(&request) {
                        *unclaimed = None;
                        return Ok(id.clone());
                    }
                    return Err(self.taken(name, id));
                }
            }
        }
        if start {
            let names = self.clone();
            let name = name.to_owned();
            // The inner task's end, even by a panic, always comes back to settle the name.
            let work = self.tasks.spawn(make.in_current_span());
            self.tasks.spawn(async move {
                let end = work.await.unwrap_or(Err(PodError::Lost {
                    what: "making an object",
                }));
                names.settle(&name, end.map_err(Arc::new));
            });
        }
        match rx.await {
            Ok(answer) => answer.map_err(|e| Arc::try_unwrap(e).unwrap_or_else(PodError::Shared)),
            Err(_) => Err(PodError::Lost {
                what: "making an object",
            }),
        }
    }

    fn settle(&self, name: &str, end: Answer) {
        let mut holders = self.holders.lock();
        let Some(Holder::Working { request, waiters }) = holders.remove(name) else {
            return;
        };
        match end {
            Ok(id) => {
                let mut unclaimed = Some(request);
                for waiter in waiters {
                    if unclaimed.is_none() {
                        let _ = waiter.send(Err(Arc::new(self.taken(name, &id))));
                    } else if waiter.send(Ok(id.clone())).is_ok() {
                        unclaimed = None;
                    }
                }
                holders.insert(name.to_owned(), Holder::Object { id, unclaimed });
            }
            Err(error) => {
                drop(holders);
                for waiter in waiters {
                    let _ = waiter.send(Err(error.clone()));
                }
            }
        }
    }

    /// Enters an object found at start.
    pub fn adopt(&self, name: &str, id: &str) {
        let holder = Holder::Object {
            id: id.to_owned(),
            unclaimed: None,
        };
        self.holders.lock().insert(name.to_owned(), holder);
    }

    /// Gives the name of a removed object back.
    pub fn release(&self, name: &str, id: &str) {
        let mut holders = self.holders.lock();
        if matches!(holders.get(name), Some(Holder::Object { id: held, .. }) if held == id) {
            holders.remove(name);
        }
    }

    fn taken(&self, name: &str, id: &str) -> PodError {
        PodError::NameTaken {
            what: self.what,
            name: name.to_owned(),
            id: id.to_owned(),
        }
    }
}

/// A pod's full name: as in the peers, everything that makes it unique.
pub fn pod_name(name: &str, namespace: &str, uid: &str, attempt: u32) -> String {
    format!("{name}_{namespace}_{uid}_{attempt}")
}

/// A container's full name: unique in its pod.
pub fn container_name(pod_id: &str, name: &str, attempt: u32) -> String {
    format!("{pod_id}_{name}_{attempt}")
}

/// What a container is called in the messages of what is tried again and again: ids are new each time, and the kubelet
/// takes a new text for a new event.
pub fn title(config: &cri::ContainerConfig) -> String {
    let name = config.metadata.as_ref().map_or("", |m| &m.name);
    format!("container {name:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::error::Class;
    use futures_util::FutureExt as _;

    fn names() -> Arc<Names<u32>> {
        Names::new("container", TaskTracker::new())
    }

    #[tokio::test]
    async fn a_name_is_held_by_its_object_until_that_is_removed() {
        let names = names();
        assert_eq!(
            names
                .make("a", 1, async { Ok("id1".into()) })
                .await
                .unwrap(),
            "id1"
        );
        let error = names
            .make("a", 1, async { Ok("id2".into()) })
            .await
            .unwrap_err();
        assert_eq!(error.class(), Class::AlreadyExists);
        assert!(error.to_string().contains("id1"), "{error}");
        names.release("a", "other");
        names
            .make("a", 1, async { Ok("id2".into()) })
            .await
            .unwrap_err();
        names.release("a", "id1");
        assert_eq!(
            names
                .make("a", 1, async { Ok("id2".into()) })
                .await
                .unwrap(),
            "id2"
        );
    }

    #[tokio::test]
    async fn a_failed_or_panicked_operation_frees_the_name() {
        let names = names();
        let failed = names
            .make("a", 1, async { Err(PodError::Invalid("no".into())) })
            .await;
        assert!(matches!(failed, Err(PodError::Invalid(_))), "{failed:?}");
        let lost = names.make("a", 1, async { panic!("on purpose") }).await;
        assert!(matches!(lost, Err(PodError::Lost { .. })), "{lost:?}");
        names.make("a", 1, async { Ok("id".into()) }).await.unwrap();
    }

    #[tokio::test]
    async fn the_retry_of_a_client_that_gave_up_gets_the_finished_object() {
        let names = names();
        let (finish, finished) = oneshot::channel::<()>();
        let make = async move {
            let _ = finished.await;
            Ok("id".to_owned())
        };
        let mut first = Box::pin(names.make("a", 1, make));
        assert!((&mut first).now_or_never().is_none());
        drop(first);
        // Another request of the same name must not get it, then or later.
        names
            .make("a", 2, async { Ok("x".into()) })
            .await
            .unwrap_err();
        let mut retry = Box::pin(names.make("a", 1, async { Ok("second".into()) }));
        assert!((&mut retry).now_or_never().is_none());
        finish.send(()).unwrap();
        assert_eq!(retry.await.unwrap(), "id");
        names
            .make("a", 1, async { Ok("x".into()) })
            .await
            .unwrap_err();
    }

    #[tokio::test]
    async fn an_object_that_nobody_waited_for_is_kept_for_the_retry_only() {
        let names = names();
        let (finish, finished) = oneshot::channel::<()>();
        let (done, mut is_done) = oneshot::channel::<()>();
        let make = async move {
            let _ = finished.await;
            let _done = done;
            Ok("id".to_owned())
        };
        let mut first = Box::pin(names.make("a", 1, make));
        assert!((&mut first).now_or_never().is_none());
        drop(first);
        finish.send(()).unwrap();
        let _ = (&mut is_done).await;
        // Settling follows the work by a hair; a retry in between waits for it and gets the same.
        names
            .make("a", 2, async { Ok("x".into()) })
            .await
            .unwrap_err();
        assert_eq!(
            names.make("a", 1, async { Ok("x".into()) }).await.unwrap(),
            "id"
        );
    }

    #[tokio::test]
    async fn two_live_callers_do_not_both_get_the_object() {
        let names = names();
        let (finish, finished) = oneshot::channel::<()>();
        let make = async move {
            let _ = finished.await;
            Ok("id".to_owned())
        };
        let mut first = Box::pin(names.make("a", 1, make));
        assert!((&mut first).now_or_never().is_none());
        let mut second = Box::pin(names.make("a", 1, async { Ok("x".into()) }));
        assert!((&mut second).now_or_never().is_none());
        finish.send(()).unwrap();
        assert_eq!(first.await.unwrap(), "id");
        assert_eq!(second.await.unwrap_err().class(), Class::AlreadyExists);
    }
}
