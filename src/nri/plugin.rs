//! One plugin that takes part.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use slipway_proto::nri::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Empty, Event, PodSandbox,
    StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
};
use tokio::process::Child;

use crate::error::{NriError, NriErrorKind};
use crate::events::{Events, has_fallback, method};
use crate::link::Link;
use crate::name::PluginName;
use crate::rpc::{self, code};

/// How long a plugin that we started may take to end when we ask.
const FAREWELL: Duration = Duration::from_secs(1);
/// What a message may have besides pods and containers.
const ROOM: usize = 64 << 10;

/// A plugin.
pub struct Plugin {
    link: Link,
    /// Set when it registers.
    name: OnceLock<PluginName>,
    /// Its process, if we started it.
    child: Mutex<Option<Child>>,
    events: OnceLock<Events>,
    /// Events for which it has no method of their own.
    old_style: AtomicI32,
}

/// What every event's request has: pod and container under these numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct Notice {
    #[prost(message, optional, tag = "1")]
    pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "2")]
    container: Option<Container>,
}

impl Plugin {
    /// Behind this connection, not registered yet; `name` for one that we started.
    pub fn new(link: Link, name: Option<PluginName>, child: Option<Child>) -> Self {
        Self {
            link,
            name: name.map(OnceLock::from).unwrap_or_default(),
            child: Mutex::new(child),
            events: OnceLock::new(),
            old_style: AtomicI32::new(0),
        }
    }

    /// Takes over what it calls itself, unless we know that.
    pub fn register(&self, name: PluginName) {
        let _ = self.name.set(name);
    }

    /// Who it is; nobody knows before it has registered.
    pub fn name(&self) -> Option<&PluginName> {
        self.name.get()
    }

    /// Who it is, for messages.
    pub fn shown(&self) -> String {
        self.name()
            .map_or_else(|| "without a name".to_owned(), ToString::to_string)
    }

    /// What it wants to hear.
    pub fn events(&self) -> Events {
        self.events.get().copied().unwrap_or(Events::NONE)
    }

    /// Its connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Tells it its configuration, and learns what it wants to hear.
    ///
    /// # Errors
    /// [`NriError`].
    pub async fn configure(
        &self,
        request: &ConfigureRequest,
        timeout: Duration,
    ) -> Result<(), NriError> {
        let answer: ConfigureResponse = self.call("Configure", request, timeout).await?;
        let events = Events::subscribed(answer.events).map_err(|bits| {
            NriError::Protocol(format!(
                "it subscribes to events that there are not: {bits:#x}"
            ))
        })?;
        let _ = self.events.set(events);
        Ok(())
    }

    /// Shows it all there is, in as many parts as that takes, and returns the updates that it asks for.
    ///
    /// # Errors
    /// [`NriError`].
    pub async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
        timeout: Duration,
    ) -> Result<Vec<ContainerUpdate>, NriError> {
        let until = tokio::time::Instant::now() + timeout;
        for part in parts(pods, containers, rpc::LONGEST - ROOM)? {
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            let answer: SynchronizeResponse = self.call("Synchronize", &part, left).await?;
            if !part.more {
                return Ok(answer.update);
            }
            if !answer.more || !answer.update.is_empty() {
                let what =
                    "it can't take the state of the node in parts, and that is too long for one";
                return Err(NriError::Protocol(what.to_owned()));
            }
        }
        Ok(Vec::new())
    }

    /// Tells it of an event that it has nothing to answer to.
    ///
    /// # Errors
    /// [`NriError`].
    pub async fn notify(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
        timeout: Duration,
    ) -> Result<(), NriError> {
        let bit = 1 << (event as i32);
        if self.old_style.load(Ordering::Relaxed) & bit == 0 {
            let notice = Notice {
                pod: Some(pod.clone()),
                container: container.cloned(),
            };
            let answer = self
                .link
                .call::<Empty>(method(event), &notice, timeout)
                .await?;
            match answer {
                Ok(_) => return Ok(()),
                Err(status) if status.code == code::UNIMPLEMENTED && has_fallback(event) => {
                    self.old_style.fetch_or(bit, Ordering::Relaxed);
                    tracing::warn!(
                        plugin = self.shown(),
                        event = method(event),
                        "an NRI plugin hears of this through StateChange only; bring it up to date"
                    );
                }
                Err(status) => return Err(self.failed(method(event), status)),
            }
        }
        let change = StateChangeEvent {
            event: event.into(),
            pod: Some(pod.clone()),
            container: container.cloned(),
        };
        self.call::<Empty>("StateChange", &change, timeout)
            .await
            .map(drop)
    }

    /// Calls a method; its failure is an error.
    ///
    /// # Errors
    /// [`NriError`].
    pub async fn call<M: prost::Message + Default>(
        &self,
        method: &'static str,
        message: &impl prost::Message,
        timeout: Duration,
    ) -> Result<M, NriError> {
        let answer = self.link.call(method, message, timeout).await?;
        answer.map_err(|status| self.failed(method, status))
    }

    fn failed(&self, method: &'static str, status: rpc::Status) -> NriError {
        NriError::Answer {
            plugin: self.shown(),
            method,
            code: status.code,
            message: status.message,
        }
    }

    /// What an event comes to when the plugin failed at it: one that is broken is cut off, and the event goes on
    /// without it; one that refuses makes the event fail.
    ///
    /// # Errors
    /// The refusal.
    pub fn settle<T>(
        &self,
        method: &str,
        result: Result<T, NriError>,
    ) -> Result<Option<T>, NriError> {
        match result {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.kind() == NriErrorKind::Broken => {
                tracing::error!(
                    plugin = self.shown(),
                    event = method,
                    %error,
                    "an NRI plugin is closed; this and what follows goes on without it"
                );
                self.link.close();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Closes the connection, and ends the process if it is ours.
    pub async fn end(&self) {
        self.link.close();
        let child = self.child.lock().take();
        let Some(mut child) = child else { return };
        // Without its connection a plugin ends by itself.
        if tokio::time::timeout(FAREWELL, child.wait()).await.is_err()
            && let Err(error) = child.kill().await
        {
            tracing::error!(plugin = self.shown(), %error, "can't kill an NRI plugin");
        }
    }

    /// Says goodbye, and ends it.
    pub async fn shut_down(&self) {
        if !self.link.is_closed() {
            let bye = self
                .link
                .call::<Empty>("Shutdown", &Empty {}, FAREWELL)
                .await;
            if let Err(error) = bye {
                tracing::debug!(plugin = self.shown(), %error, "an NRI plugin does not answer the farewell");
            }
        }
        self.end().await;
    }
}

/// The requests that show this much in all, none longer than `limit`.
fn parts(
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
    limit: usize,
) -> Result<Vec<SynchronizeRequest>, NriError> {
    use prost::Message as _;
    /// Tag and length before an entry.
    const FRAME: usize = 6;
    let mut all = vec![SynchronizeRequest::default()];
    let mut used = 0;
    let mut room = |all: &mut Vec<SynchronizeRequest>, what, length: usize| {
        if length + FRAME > limit {
            return Err(NriError::TooLong {
                what,
                length,
                limit,
            });
        }
        if used + length + FRAME > limit {
            if let Some(last) = all.last_mut() {
                last.more = true;
            }
            all.push(SynchronizeRequest::default());
            used = 0;
        }
        used += length + FRAME;
        Ok(())
    };
    for pod in pods {
        room(&mut all, "a pod", pod.encoded_len())?;
        all.last_mut()
            .into_iter()
            .for_each(|part| part.pods.push(pod.clone()));
    }
    for container in containers {
        room(&mut all, "a container", container.encoded_len())?;
        all.last_mut()
            .into_iter()
            .for_each(|part| part.containers.push(container.clone()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message as _;

    #[test]
    fn what_does_not_fit_at_all() {
        let pod = PodSandbox {
            name: "x".repeat(1000),
            ..Default::default()
        };
        let error = parts(vec![pod], Vec::new(), 500).unwrap_err();
        assert!(matches!(error, NriError::TooLong { what: "a pod", .. }));
        let nothing = parts(Vec::new(), Vec::new(), 500).unwrap();
        assert_eq!(nothing, [SynchronizeRequest::default()]);
    }

    proptest! {
        #[test]
        fn parts_have_everything_once_and_fit(
            pods in prop::collection::vec(0usize..300, 0..40),
            containers in prop::collection::vec(0usize..300, 0..40),
        ) {
            let pods: Vec<_> = (pods.iter()).map(|n| PodSandbox { id: "p".repeat(*n), ..Default::default() }).collect();
            let containers: Vec<_> =
                (containers.iter()).map(|n| Container { id: "c".repeat(*n), ..Default::default() }).collect();
            let all = parts(pods.clone(), containers.clone(), 1000).unwrap();
            let last = all.len() - 1;
            for (i, part) in all.iter().enumerate() {
                prop_assert_eq!(part.more, i != last);
                prop_assert!(part.encoded_len() <= 1002);
            }
            let found: Vec<_> = all.iter().flat_map(|p| p.pods.clone()).collect();
            prop_assert_eq!(found, pods);
            let found: Vec<_> = all.iter().flat_map(|p| p.containers.clone()).collect();
            prop_assert_eq!(found, containers);
        }
    }
}
