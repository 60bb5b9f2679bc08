//! Which networks are configured and whether they can serve a pod: loaded and probed in the
//! background whenever something changes on disk.

use crate::chain::Walk;
use crate::config::Network;
use crate::directory::Directory;
use crate::error::Chain;
use crate::plugin::Runner;
use crate::watch::Watch;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

/// What plugins say of themselves (STATUS) is asked anew by the first look at a status older than this.
const FRESH: Duration = Duration::from_secs(5);
/// The reason that every kubelet runtime gives.
const REASON: &str = "NetworkPluginNotReady";

/// Whether pods can be attached to the network (CRI `NetworkReady`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkStatus {
    /// They can.
    Ready {
        /// The name of the network that gives pods their addresses.
        network: String,
    },
    /// They can't.
    NotReady {
        /// One word.
        reason: String,
        /// What is wrong and what to do about it.
        message: String,
    },
}

impl NetworkStatus {
    fn not_ready(message: impl Into<String>) -> Self {
        Self::NotReady {
            reason: REASON.into(),
            message: message.into(),
        }
    }
}

/// Where configurations are and how to ask plugins.
#[derive(Debug)]
pub(crate) struct Source {
    pub conf_dir: PathBuf,
    pub limit: usize,
    pub runner: Runner,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Loaded {
    networks: Arc<Vec<Network>>,
    /// What to tell when there is no network.
    problem: String,
    /// Files that were passed over, and why.
    rejected: Vec<String>,
}

/// The networks as last loaded, and their status as last probed.
#[derive(Debug)]
pub(crate) struct Readiness {
    source: Source,
    loaded: RwLock<Loaded>,
    status: watch::Sender<NetworkStatus>,
    /// When the status was last made; `None` while that is under way.
    probed: Mutex<Option<Instant>>,
    /// Changes on disk are seen at once.
    watching: AtomicBool,
    reload: Notify,
    refresh: Notify,
}

/// Why the background task looks again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    Change,
    Age,
}

impl Readiness {
    /// Loads the configuration, blocking on its files; [`Readiness::keep`] does the rest.
    pub fn new(source: Source) -> Self {
        let loaded = source.load();
        loaded.tell_of_rejected(&[]);
        let status = match loaded.networks.first() {
            None => NetworkStatus::not_ready(&loaded.problem),
            Some(network) => NetworkStatus::not_ready(format!(
                "the plugins of CNI network {:?} are being looked at",
                network.name()
            )),
        };
        Self {
            source,
            loaded: RwLock::new(loaded),
            status: watch::Sender::new(status),
            probed: Mutex::new(None),
            watching: AtomicBool::new(true),
            reload: Notify::new(),
            refresh: Notify::new(),
        }
    }

    /// The networks to attach pods to; else what is wrong.
    pub fn networks(&self) -> Result<Arc<Vec<Network>>, String> {
        let loaded = self.loaded();
        if loaded.networks.is_empty() {
            Err(loaded.problem)
        } else {
            Ok(loaded.networks)
        }
    }

    /// The networks in another directory, as it is now; else what is wrong.
    pub async fn networks_in(&self, dir: &Path) -> Result<Arc<Vec<Network>>, String> {
        let source = Source {
            conf_dir: dir.to_owned(),
            limit: self.source.limit,
            runner: self.source.runner.clone(),
        };
        let loaded = spawn_blocking(move || source.load()).await;
        let loaded = loaded.map_err(|error| error.to_string())?;
        loaded.tell_of_rejected(&[]);
        match loaded.networks.is_empty() {
            true => Err(loaded.problem),
            false => Ok(loaded.networks),
        }
    }

    pub fn runner(&self) -> &Runner {
        &self.source.runner
    }

    pub fn reload(&self) {
        self.reload.notify_one();
    }

    pub fn changed(&self) -> watch::Receiver<NetworkStatus> {
        self.status.subscribe()
    }

    /// The status as last probed. Looking at one that may have changed without a trace on disk has
    /// it probed anew in the background.
    pub fn status(&self) -> NetworkStatus {
        let status = self.status.borrow().clone();
        let probed = *self.probed.lock().unwrap_or_else(PoisonError::into_inner);
        let may_change = !self.watching.load(Ordering::Relaxed)
            || matches!(status, NetworkStatus::NotReady { .. })
            || self
                .loaded()
                .networks
                .iter()
                .any(|n| n.version().has_status_and_gc());
        if may_change && probed.is_some_and(|at| at.elapsed() >= FRESH) {
            self.refresh.notify_one();
        }
        status
    }

    /// Keeps networks and status up to date, until dropped.
    pub async fn keep(self: Arc<Self>) {
        let mut cause = Cause::Change;
        let mut verified = false;
        loop {
            *self.probed.lock().unwrap_or_else(PoisonError::into_inner) = None;
            // Watching starts before reading: a change in between is seen.
            let before = self.loaded();
            let watch = self.watch(&before);
            let loaded = self.load().await;
            if plugin_directories(&loaded) != plugin_directories(&before) {
                // Another network, another plugin directory to be watched before it is read.
                cause = Cause::Change;
                continue;
            }
            verified &= cause == Cause::Age && loaded == before && watch.is_some();
            let probe = async {
                let status = self.probe(&loaded, verified).await;
                verified = matches!(status, NetworkStatus::Ready { .. });
                self.publish(status);
                *self.probed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                // From here on only a change or age matters.
                self.refresh.notified().await;
            };
            cause = tokio::select! {
                () = probe => Cause::Age,
                () = self.reload.notified() => Cause::Change,
                () = changed(watch.as_ref()) => Cause::Change,
            };
        }
    }

    fn loaded(&self) -> Loaded {
        self.loaded
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn watch(&self, loaded: &Loaded) -> Option<Watch> {
        let mut dirs = vec![self.source.conf_dir.clone()];
        dirs.extend(self.source.runner.bin_dirs.iter().cloned());
        dirs.extend(plugin_directories(loaded));
        let watch = Watch::new(&dirs);
        self.watching.store(watch.is_ok(), Ordering::Relaxed);
        watch
            .inspect_err(|error| {
                tracing::error!(
                    %error,
                    "cannot watch the CNI directories, so a change there is seen late: \
                     raise fs.inotify.max_user_instances"
                );
            })
            .ok()
    }

    async fn load(self: &Arc<Self>) -> Loaded {
        let this = Arc::clone(self);
        let loaded = match spawn_blocking(move || this.source.load()).await {
            Ok(loaded) => loaded,
            Err(error) => Loaded {
                problem: error.to_string(),
                ..Loaded::default()
            },
        };
        let mut current = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        loaded.tell_of_rejected(&current.rejected);
        current.clone_from(&loaded);
        loaded
    }

    async fn probe(&self, loaded: &Loaded, verified: bool) -> NetworkStatus {
        let Some(first) = loaded.networks.first() else {
            return NetworkStatus::not_ready(&loaded.problem);
        };
        for network in loaded.networks.iter() {
            let walk = Walk {
                runner: &self.source.runner,
                network,
            };
            let answer = async {
                if !verified {
                    walk.versions().await?;
                }
                walk.status().await
            };
            if let Err(error) = answer.await {
                return NetworkStatus::not_ready(Chain(&error).to_string());
            }
        }
        NetworkStatus::Ready {
            network: first.name().to_owned(),
        }
    }

    fn publish(&self, status: NetworkStatus) {
        self.status.send_if_modified(|current| {
            if *current == status {
                return false;
            }
            match &status {
                NetworkStatus::Ready { network } => tracing::info!(network, "pod network is ready"),
                NetworkStatus::NotReady { message, .. } => {
                    tracing::warn!(message, "pod network is not ready");
                }
            }
            *current = status;
            true
        });
    }
}

impl Source {
    fn load(&self) -> Loaded {
        let found = match Directory::read(&self.conf_dir, self.limit) {
            Ok(found) => found,
            Err(error) => {
                return Loaded {
                    problem: Chain(&error).to_string(),
                    ..Loaded::default()
                };
            }
        };
        let rejected: Vec<_> = found
            .rejected
            .iter()
            .map(|e| Chain(e).to_string())
            .collect();
        let mut problem = format!(
            "no usable CNI network in {}: install a network add-on, or put a .conflist there",
            self.conf_dir.display()
        );
        for error in &rejected {
            problem = format!("{problem}; {error}");
        }
        Loaded {
            networks: Arc::new(found.networks),
            problem,
            rejected,
        }
    }
}

impl Loaded {
    /// Says which files are passed over, once for as long as they stay what they are.
    fn tell_of_rejected(&self, before: &[String]) {
        for error in self.rejected.iter().filter(|error| !before.contains(error)) {
            tracing::warn!(error, "a CNI configuration is passed over");
        }
    }
}

fn plugin_directories(loaded: &Loaded) -> Vec<PathBuf> {
    loaded
        .networks
        .iter()
        .filter_map(Network::plugin_directory)
        .collect()
}

async fn changed(watch: Option<&Watch>) {
    if let Some(watch) = watch {
        match watch.changed().await {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%error, "cannot read what changed in the CNI directories")
            }
        }
    }
    // Without a watch the looks at an old status bring the news.
    std::future::pending().await
}
