//! The node: everything that pods and containers need, in one place.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::RwLock;
use slipway_cdi::Cdi;
use slipway_config::Config;
use slipway_hooks::Hooks;
use slipway_image::{Credentials, Image, ImageStore, ProgressSender};
use slipway_network::Cni;
use slipway_nri::Nri;
use slipway_observe::Layout;
use slipway_observe::disk::Ledger;
use slipway_proto::cri::{CreateContainerRequest, RunPodSandboxRequest};
use slipway_runtime::client::Keepers;
use slipway_seccomp::ProfileCache;
use slipway_spec::HostFacts;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::checkpoint::Tool;
use super::container::Container;
use super::error::PodError;
use super::feed::Feed;
use super::handlers::{Features, Runtimes};
use super::levels::Levels;
use super::names::Names;
use super::phases::Traces;
use super::plugins;
use super::sandbox::Pod;
use super::stats;
use super::store::{Found, Store};
use crate::memory;

/// Pods, containers, and what they are made with.
pub struct Node {
    config: RwLock<Arc<Config>>,
    runtimes: RwLock<Arc<Runtimes>>,
    /// What this machine can do for handlers that make containers here.
    pub features: Features,
    /// The boot that all of this lives in.
    pub boot_id: String,
    /// Pods by id.
    pub pods: Store<Pod>,
    /// Containers by id.
    pub containers: Store<Container>,
    /// Who holds which pod name.
    pub pod_names: Arc<Names<RunPodSandboxRequest>>,
    /// Who holds which container name.
    pub container_names: Arc<Names<CreateContainerRequest>>,
    /// Where keepers come from.
    pub keepers: Keepers,
    /// Images.
    pub images: ImageStore,
    /// The pod network.
    pub cni: Cni,
    /// What this machine can do.
    pub host: HostFacts,
    /// SELinux levels of pods.
    pub levels: Levels,
    cdi: RwLock<Arc<Cdi>>,
    hooks: RwLock<Arc<Hooks>>,
    /// Compiled seccomp filters.
    pub seccomp: ProfileCache,
    /// Where the time of the last operations went.
    pub traces: Traces,
    /// Where cgroups are, for statistics.
    pub layout: Layout,
    /// Where what happens is told.
    pub feed: Arc<Feed>,
    /// NRI plugins, unless there shall be none.
    pub nri: Option<Arc<Nri>>,
    /// Sizes of writable layers.
    pub ledger: Arc<Ledger>,
    /// The node's pod network range, as the kubelet said; kept for the operator's information.
    pub pod_cidr: RwLock<String>,
    /// criu.
    pub(super) tool: Tool,
    /// Work that a shutdown waits for.
    pub tasks: TaskTracker,
}

impl Node {
    /// A node without pods; `recover` finds those of an earlier daemon.
    pub fn new(
        config: Config,
        mut host: HostFacts,
        keepers: Keepers,
        images: ImageStore,
        cni: Cni,
    ) -> Arc<Self> {
        let features = Features::detect(&config.state_root);
        let tasks = TaskTracker::new();
        if !config.pod.selinux {
            host.selinux = None;
        }
        Arc::new(Self {
            runtimes: RwLock::new(Arc::new(Runtimes::new(&config, features, None))),
            features,
            boot_id: boot_id(),
            pods: Store::default(),
            containers: Store::default(),
            pod_names: Names::new("pod sandbox", tasks.clone()),
            container_names: Names::new("container", tasks.clone()),
            keepers,
            images,
            cni,
            host,
            levels: Levels::default(),
            cdi: RwLock::new(Arc::new(Cdi::new(config.pod.cdi_dirs.clone()))),
            hooks: RwLock::new(Arc::new(Hooks::new(config.pod.hooks_dirs.clone()))),
            seccomp: ProfileCache::new(),
            traces: Traces::default(),
            layout: stats::layout(),
            feed: Arc::default(),
            nri: plugins::of(&config),
            ledger: Arc::default(),
            pod_cidr: RwLock::default(),
            tool: Tool::default(),
            tasks,
            config: RwLock::new(Arc::new(config)),
        })
    }

    /// The configuration as it is now.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().clone()
    }

    /// The runtime handlers as they are now.
    pub fn runtimes(&self) -> Arc<Runtimes> {
        self.runtimes.read().clone()
    }

    /// Devices that vendors describe.
    pub fn cdi(&self) -> Arc<Cdi> {
        self.cdi.read().clone()
    }

    /// OCI hooks that the node gives to containers.
    pub fn hooks(&self) -> Arc<Hooks> {
        self.hooks.read().clone()
    }

    /// Takes a new configuration over; what runs keeps the one it began with.
    pub fn reconfigure(&self, config: Config) {
        let runtimes = Arc::new(Runtimes::new(
            &config,
            self.features,
            Some(&self.runtimes()),
        ));
        *self.runtimes.write() = runtimes.clone();
        self.tasks.spawn(runtimes.ask_all());
        if config.pod.cdi_dirs != self.config().pod.cdi_dirs {
            *self.cdi.write() = Arc::new(Cdi::new(config.pod.cdi_dirs.clone()));
        }
        if config.pod.hooks_dirs != self.config().pod.hooks_dirs {
            *self.hooks.write() = Arc::new(Hooks::new(config.pod.hooks_dirs.clone()));
        }
        *self.config.write() = Arc::new(config);
    }

    /// The directory of all pods.
    pub fn pods_dir(&self) -> PathBuf {
        self.config().run_root.join("pods")
    }

    /// The directory of all containers' writable layers.
    pub fn layers_dir(&self) -> PathBuf {
        self.config().state_root.join("containers")
    }

    /// The pod of this id or unique beginning of one; `None` when there is none.
    ///
    /// # Errors
    /// [`PodError::Ambiguous`]; [`PodError::Invalid`] for an empty id.
    pub fn find_pod(&self, id: &str) -> Result<Option<Arc<Pod>>, PodError> {
        found(self.pods.find(id), "pod sandbox", id)
    }

    /// The container of this id or unique beginning of one; `None` when there is none.
    ///
    /// # Errors
    /// [`PodError::Ambiguous`]; [`PodError::Invalid`] for an empty id.
    pub fn find_container(&self, id: &str) -> Result<Option<Arc<Container>>, PodError> {
        found(self.containers.find(id), "container", id)
    }

    /// The pod of this id.
    ///
    /// # Errors
    /// [`PodError::NoPod`], [`PodError::Ambiguous`].
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>, PodError> {
        self.find_pod(id)?
            .ok_or_else(|| PodError::NoPod { id: id.to_owned() })
    }

    /// The container of this id.
    ///
    /// # Errors
    /// [`PodError::NoContainer`], [`PodError::Ambiguous`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        self.find_container(id)?
            .ok_or_else(|| PodError::NoContainer { id: id.to_owned() })
    }

    /// The finished containers of a pod, found through the pod: nobody else's are looked at.
    pub fn containers_of_pod(&self, pod: &Pod) -> Vec<Arc<Container>> {
        let cells = pod.cells().into_iter();
        cells
            .filter_map(|(id, _)| self.containers.get(&id))
            .collect()
    }

    /// The finished containers of a pod.
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        let mut all = self.containers.all();
        all.retain(|container| container.record.pod_id == pod_id);
        all
    }

    /// Pulls an image, and tells `progress` how far that is. Ends when the last one who waits for it gives up.
    ///
    /// # Errors
    /// [`PodError::Image`].
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Credentials>,
        progress: Option<ProgressSender>,
    ) -> Result<Arc<Image>, PodError> {
        let pulled = self.images.pull(reference, auth, progress).await;
        // TLS, decompression and unpacking are done with.
        memory::effort();
        pulled.map_err(|source| PodError::Image {
            action: "pull",
            image: reference.to_owned(),
            source,
        })
    }

    /// Runs `work` to its end, whatever becomes of the caller: a client that gives up must not leave
    /// anything half done.
    ///
    /// # Errors
    /// What `work` says.
    pub async fn complete<T, F>(&self, what: &'static str, work: F) -> Result<T, PodError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, PodError>> + Send + 'static,
    {
        match self.tasks.spawn(work.in_current_span()).await {
            Ok(result) => result,
            Err(_) => Err(PodError::Lost { what }),
        }
    }
}

fn found<T>(found: Found<T>, what: &'static str, id: &str) -> Result<Option<Arc<T>>, PodError> {
    if id.is_empty() {
        return Err(PodError::Invalid(format!("the request names no {what}")));
    }
    match found {
        Found::One(object) => Ok(Some(object)),
        Found::None => Ok(None),
        Found::Many(matches) => Err(PodError::Ambiguous {
            what,
            id: id.to_owned(),
            matches,
        }),
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A new id of 64 hexadecimal digits, as the peers' are.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn new_id() -> Result<String, PodError> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| PodError::File {
        action: "read random bytes from",
        path: "/dev/urandom".into(),
        source: std::io::Error::other(e),
    })?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn boot_id() -> String {
    let text = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"));
    text.unwrap_or_default().trim().to_owned()
}
