//! All plugins together.
//!
//! Whatever changes pods or containers holds a [`Turn`] from the first word to the plugins until the change can be
//! seen. A plugin that joins waits until nobody holds one, is shown everything, and takes part before the next
//! begins: so it hears of each container once, either that it is there or that it is created.

use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join_all};
use parking_lot::RwLock;
use prost::Message as _;
use slipway_proto::nri::{
    ConfigureRequest, Container, ContainerAdjustment, ContainerEviction, ContainerUpdate,
    CreateContainerRequest, CreateContainerResponse, Empty, Event, LinuxResources, PluginInstance,
    PodSandbox, RegisterPluginRequest, StopContainerRequest, StopContainerResponse,
    UpdateContainerRequest, UpdateContainerResponse, UpdateContainersRequest,
    UpdateContainersResponse, UpdatePodSandboxRequest, UpdatePodSandboxResponse,
    ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedRwLockReadGuard, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::{NriError, file};
use crate::events::{Events, method};
use crate::launch::{self, Installed};
use crate::link::{Answer, Link};
use crate::merge::{Creation, Updates};
use crate::name::PluginName;
use crate::owners::Owners;
use crate::plugin::Plugin;
use crate::rpc::{Status, code};
use crate::validator::{VALIDATOR, ValidatorSettings};

/// Plugins that may be about to join at a time.
const JOINING: usize = 16;

/// How plugins take part.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the runtime calls itself.
    pub runtime: (String, String),
    /// Where plugins connect; `None`: they can't.
    pub socket: Option<PathBuf>,
    /// Directory of plugins that are started.
    pub plugin_dir: PathBuf,
    /// Directory of their configurations.
    pub config_dir: PathBuf,
    /// How long a plugin may take to register, and to look at all there is.
    pub registration_timeout: Duration,
    /// How long it may take for anything else.
    pub request_timeout: Duration,
    /// The validator that is built in.
    pub validator: ValidatorSettings,
}

/// What the runtime does for plugins.
pub trait Runtime: Send + Sync + 'static {
    /// All pods, and all containers that have not ended.
    fn inventory(&self) -> BoxFuture<'static, (Vec<PodSandbox>, Vec<Container>)>;
    /// Changes limits of containers; returns those that could not be changed.
    fn update(&self, updates: Vec<ContainerUpdate>) -> BoxFuture<'static, Vec<ContainerUpdate>>;
    /// Ends containers.
    fn evict(&self, evictions: Vec<ContainerEviction>) -> BoxFuture<'static, ()>;
}

/// The plugins.
pub struct Nri {
    settings: Settings,
    plugins: RwLock<Arc<Vec<Arc<Plugin>>>>,
    /// Shared by those who change pods and containers; alone for a plugin that joins.
    gate: Arc<tokio::sync::RwLock<()>>,
    /// Plugins are asked about one thing at a time.
    asking: tokio::sync::Mutex<()>,
    /// The socket is ours.
    listening: AtomicBool,
}

/// What plugins made of a new container.
#[derive(Debug, Default)]
pub struct Created {
    /// What is to be different.
    pub adjust: ContainerAdjustment,
    /// Updates of other containers.
    pub update: Vec<ContainerUpdate>,
    /// Containers that have to go.
    pub evict: Vec<ContainerEviction>,
}

/// What plugins made of an update.
#[derive(Debug, Default)]
pub struct Updated {
    /// The limits to be set.
    pub resources: LinuxResources,
    /// Updates of other containers.
    pub update: Vec<ContainerUpdate>,
    /// Containers that have to go.
    pub evict: Vec<ContainerEviction>,
}

impl Nri {
    /// Without plugins yet.
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            settings,
            plugins: RwLock::default(),
            gate: Arc::default(),
            asking: tokio::sync::Mutex::new(()),
            listening: AtomicBool::new(false),
        })
    }

    /// Starts the plugins that are installed, one after the other, and then lets others connect. A plugin that
    /// fails is left out.
    ///
    /// # Errors
    /// For a directory, a configuration or a socket that can't be used.
    pub async fn start(
        self: &Arc<Self>,
        runtime: Arc<dyn Runtime>,
        ended: CancellationToken,
    ) -> Result<(), NriError> {
        let listener = match self.settings.socket.as_deref().map(listen) {
            // Two runtimes on one node: the first has the plugins, and the second's pods need none to run.
            Some(Err(error @ NriError::Taken { .. })) => {
                tracing::error!(%error, "NRI plugins can't connect");
                None
            }
            listener => listener.transpose()?,
        };
        let installed = launch::discover(&self.settings.plugin_dir, &self.settings.config_dir)?;
        for installed in installed {
            let started = installed.start();
            let joined = match started {
                Ok((socket, child)) => self.join(socket, Some((installed, child)), &runtime).await,
                Err(error) => Err((error, installed.name.to_string())),
            };
            if let Err((error, name)) = joined {
                tracing::error!(
                    plugin = name,
                    error = chain(&error),
                    "an NRI plugin does not take part"
                );
            }
        }
        if let Some(listener) = listener {
            self.listening.store(true, Ordering::Relaxed);
            tokio::spawn(self.clone().accept(listener, runtime, ended));
        }
        Ok(())
    }

    async fn accept(
        self: Arc<Self>,
        listener: UnixListener,
        runtime: Arc<dyn Runtime>,
        ended: CancellationToken,
    ) {
        let joining = Arc::new(tokio::sync::Semaphore::new(JOINING));
        loop {
            let socket = tokio::select! {
                () = ended.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => socket,
                    Err(error) => {
                        // For want of descriptors, most likely; that passes.
                        tracing::error!(%error, "can't accept an NRI plugin");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let Ok(turn) = joining.clone().acquire_owned().await else {
                return;
            };
            let (nri, runtime) = (self.clone(), runtime.clone());
            tokio::spawn(async move {
                if let Err((error, name)) = nri.join(socket, None, &runtime).await {
                    tracing::error!(
                        plugin = name,
                        error = chain(&error),
                        "an NRI plugin does not take part"
                    );
                }
                drop(turn);
            });
        }
    }

    /// Makes a plugin take part: it registers, is configured, is shown everything.
    async fn join(
        self: &Arc<Self>,
        socket: UnixStream,
        installed: Option<(Installed, tokio::process::Child)>,
        runtime: &Arc<dyn Runtime>,
    ) -> Result<(), (NriError, String)> {
        let (config, name, child) = match installed {
            Some((installed, child)) => (installed.config, Some(installed.name), Some(child)),
            None => (String::new(), None, None),
        };
        let (register, registered) = oneshot::channel();
        let link = Link::new(socket, answers(register, runtime.clone()));
        let plugin = Arc::new(Plugin::new(link, name, child));
        let joined = self.introduce(&plugin, config, registered, runtime).await;
        if let Err(error) = joined {
            plugin.end().await;
            return Err((error, plugin.shown()));
        }
        tracing::info!(plugin = plugin.shown(), "an NRI plugin takes part");
        // It goes when its connection does.
        let (nri, closed) = (Arc::downgrade(self), plugin.link().closed());
        tokio::spawn(async move {
            closed.cancelled().await;
            tracing::info!(plugin = plugin.shown(), "an NRI plugin is gone");
            if let Some(nri) = nri.upgrade() {
                nri.change(|all| all.retain(|other| !Arc::ptr_eq(other, &plugin)));
            }
            plugin.end().await;
        });
        Ok(())
    }

    async fn introduce(
        &self,
        plugin: &Arc<Plugin>,
        config: String,
        registered: oneshot::Receiver<PluginName>,
        runtime: &Arc<dyn Runtime>,
    ) -> Result<(), NriError> {
        let Settings {
            registration_timeout: patience,
            request_timeout,
            ..
        } = self.settings;
        let late = || NriError::Timeout {
            method: "being connected with RegisterPlugin",
            timeout: patience,
        };
        let closed = plugin.link().closed();
        let name = tokio::select! {
            () = closed.cancelled() => return Err(NriError::Closed),
            name = tokio::time::timeout(patience, registered) => {
                name.map_err(|_| late())?.map_err(|_| NriError::Closed)?
            }
        };
        plugin.register(name);
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let request = ConfigureRequest {
            config,
            runtime_name: self.settings.runtime.0.clone(),
            runtime_version: self.settings.runtime.1.clone(),
            registration_timeout: millis(patience),
            request_timeout: millis(request_timeout),
            nri_version: crate::VERSION.to_owned(),
        };
        plugin.configure(&request, request_timeout).await?;
        // From here on nothing changes until it takes part.
        let alone = tokio::time::timeout(patience, self.gate.write());
        let alone = alone.await.map_err(|_| NriError::Busy(patience))?;
        let (pods, containers) = runtime.inventory().await;
        let updates = plugin.synchronize(pods, containers, patience).await?;
        if !updates.is_empty() {
            let failed = runtime.update(updates).await;
            complain(plugin, &failed);
        }
        self.change(|all| {
            all.push(plugin.clone());
            // Of the same index, who came first.
            all.sort_by(|a, b| index(a).cmp(index(b)));
        });
        drop(alone);
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Plugin>>)) {
        let mut plugins = self.plugins.write();
        let mut all = plugins.to_vec();
        change(&mut all);
        *plugins = Arc::new(all);
    }

    /// Takes a turn: no plugin joins before that ends. Must not be taken twice by one operation.
    pub async fn turn(self: &Arc<Self>) -> Turn {
        let gate = self.gate.clone().read_owned().await;
        let plugins = self.plugins.read().clone();
        Turn {
            wanted: plugins
                .iter()
                .fold(Events::NONE, |all, p| all.with(p.events())),
            plugins,
            nri: self.clone(),
            _gate: gate,
        }
    }

    /// Tells all plugins that the daemon ends, and ends those that it started.
    pub async fn stop(&self) {
        let plugins = self.plugins.read().clone();
        join_all(plugins.iter().map(|plugin| plugin.shut_down())).await;
        if let Some(socket) = &self.settings.socket
            && self.listening.load(Ordering::Relaxed)
        {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// The right to change pods and containers, and to ask plugins about it.
pub struct Turn {
    nri: Arc<Nri>,
    plugins: Arc<Vec<Arc<Plugin>>>,
    wanted: Events,
    _gate: OwnedRwLockReadGuard<()>,
}

impl Turn {
    /// Whether anybody wants to hear of this: what nobody does need not be described.
    pub fn wants(&self, event: Event) -> bool {
        let validates = event == Event::CreateContainer && self.validates();
        validates || (!self.plugins.is_empty() && self.wanted.has(event))
    }

    /// What a plugin makes of a container is looked at.
    fn validates(&self) -> bool {
        self.nri.settings.validator.enable
    }

    fn who_want(&self, event: Event) -> impl Iterator<Item = &Arc<Plugin>> {
        self.plugins
            .iter()
            .filter(move |plugin| plugin.events().has(event) && !plugin.link().is_closed())
    }

    fn patience(&self) -> Duration {
        self.nri.settings.request_timeout
    }

    /// Tells of an event that nobody changes anything about.
    ///
    /// # Errors
    /// The first plugin's refusal; those behind it do not hear of the event.
    pub async fn notify(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), NriError> {
        let _one = self.nri.asking.lock().await;
        for plugin in self.who_want(event) {
            let told = plugin.notify(event, pod, container, self.patience()).await;
            plugin.settle(method(event), told)?;
        }
        Ok(())
    }

    /// Asks about a container that is to be created.
    ///
    /// # Errors
    /// A plugin's or validator's refusal; contradictory wishes.
    pub async fn create(
        &self,
        pod: &PodSandbox,
        container: Container,
    ) -> Result<Created, NriError> {
        const EVENT: Event = Event::CreateContainer;
        let _one = self.nri.asking.lock().await;
        let pristine = container.clone();
        let mut all = Creation::new(container);
        let mut evict = Vec::new();
        let mut asked = Vec::new();
        for plugin in self.who_want(EVENT) {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(all.container.clone()),
            };
            let answer = plugin.call(method(EVENT), &request, self.patience()).await;
            let answer: Option<CreateContainerResponse> = plugin.settle(method(EVENT), answer)?;
            let Some(answer) = answer else { continue };
            let name = plugin.shown();
            if let Some(wish) = answer.adjust {
                all.adjust(wish, &name)?;
            }
            all.update(answer.update, &name)?;
            evict.extend(answer.evict);
            asked.push(plugin.clone());
        }
        self.validate(pod, &pristine, &all, &asked).await?;
        Ok(Created {
            adjust: all.adjust,
            update: all.updates.into_list(),
            evict,
        })
    }

    async fn validate(
        &self,
        pod: &PodSandbox,
        container: &Container,
        all: &Creation,
        asked: &[Arc<Plugin>],
    ) -> Result<(), NriError> {
        const EVENT: Event = Event::ValidateContainerAdjustment;
        let rejected = |validator: String, reason| NriError::Rejected {
            container: container.id.clone(),
            validator,
            reason,
        };
        let names: Vec<_> = asked.iter().filter_map(|plugin| plugin.name()).collect();
        if self.validates() {
            let plain: Vec<_> = names.iter().map(|name| name.name.as_str()).collect();
            let checked = (self.nri.settings.validator).check(pod, container, &all.owners, &plain);
            checked.map_err(|reason| rejected(VALIDATOR.to_owned(), reason))?;
        }
        let validators: Vec<_> = self.who_want(EVENT).collect();
        if validators.is_empty() {
            return Ok(());
        }
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
            adjust: Some(all.adjust.clone()),
            update: all.updates.list().to_vec(),
            owners: Some(all.owners.0.clone()),
            plugins: (names.into_iter())
                .map(|name| PluginInstance {
                    name: name.name.clone(),
                    index: name.index.clone(),
                })
                .collect(),
        };
        let asked = validators.into_iter().map(|plugin| {
            let request = &request;
            async move {
                let answer: Result<ValidateContainerAdjustmentResponse, _> =
                    plugin.call(method(EVENT), request, self.patience()).await;
                (plugin, answer)
            }
        });
        for (plugin, answer) in join_all(asked).await {
            // Who guards and does not answer guards nothing: the container is not created.
            match answer {
                Ok(answer) if answer.reject => return Err(rejected(plugin.shown(), answer.reason)),
                Ok(_) => {}
                Err(error) => {
                    let reason = format!("it failed: {error}");
                    plugin.settle::<()>(method(EVENT), Err(error)).ok();
                    return Err(rejected(plugin.shown(), reason));
                }
            }
        }
        Ok(())
    }

    /// Asks about an update of a container's limits.
    ///
    /// # Errors
    /// A plugin's refusal; contradictory wishes.
    pub async fn update(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: LinuxResources,
    ) -> Result<Updated, NriError> {
        const EVENT: Event = Event::UpdateContainer;
        let _one = self.nri.asking.lock().await;
        let mut updates = Updates::starting_with(&container.id, resources);
        let mut owners = Owners::default();
        let mut evict = Vec::new();
        for plugin in self.who_want(EVENT) {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: updates.of(&container.id).cloned(),
            };
            let answer = plugin.call(method(EVENT), &request, self.patience()).await;
            let answer: Option<UpdateContainerResponse> = plugin.settle(method(EVENT), answer)?;
            let Some(answer) = answer else { continue };
            for update in answer.update {
                updates.add(update, &plugin.shown(), &mut owners)?;
            }
            evict.extend(answer.evict);
        }
        Ok(Updated {
            resources: updates.take(&container.id).unwrap_or_default(),
            update: updates.into_list(),
            evict,
        })
    }

    /// Tells that a container has ended; the updates of others that this makes room for.
    ///
    /// # Errors
    /// A plugin's refusal; contradictory wishes.
    pub async fn stopped(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Vec<ContainerUpdate>, NriError> {
        const EVENT: Event = Event::StopContainer;
        let _one = self.nri.asking.lock().await;
        let (mut updates, mut owners) = (Updates::default(), Owners::default());
        for plugin in self.who_want(EVENT) {
            let request = StopContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
            };
            let answer = plugin.call(method(EVENT), &request, self.patience()).await;
            let answer: Option<StopContainerResponse> = plugin.settle(method(EVENT), answer)?;
            for update in answer.unwrap_or_default().update {
                updates.add(update, &plugin.shown(), &mut owners)?;
            }
        }
        Ok(updates.into_list())
    }

    /// Asks about new sizes of a pod.
    ///
    /// # Errors
    /// A plugin's refusal.
    pub async fn update_pod(
        &self,
        pod: &PodSandbox,
        overhead: Option<LinuxResources>,
        resources: Option<LinuxResources>,
    ) -> Result<(), NriError> {
        const EVENT: Event = Event::UpdatePodSandbox;
        let _one = self.nri.asking.lock().await;
        let request = UpdatePodSandboxRequest {
            pod: Some(pod.clone()),
            overhead_linux_resources: overhead,
            linux_resources: resources,
        };
        for plugin in self.who_want(EVENT) {
            let answer = plugin.call(method(EVENT), &request, self.patience()).await;
            plugin.settle::<UpdatePodSandboxResponse>(method(EVENT), answer)?;
        }
        Ok(())
    }
}

fn index(plugin: &Plugin) -> &str {
    plugin.name().map_or("", |name| name.index.as_str())
}

fn complain(plugin: &Plugin, failed: &[ContainerUpdate]) {
    for update in failed.iter().filter(|update| !update.ignore_failure) {
        tracing::warn!(
            plugin = plugin.shown(),
            container = update.container_id,
            "an update that an NRI plugin asked for failed"
        );
    }
}

/// What answers a plugin's own calls.
fn answers(register: oneshot::Sender<PluginName>, runtime: Arc<dyn Runtime>) -> Answer {
    let register = Arc::new(parking_lot::Mutex::new(Some(register)));
    Arc::new(move |name: String, payload: Bytes| {
        let (register, runtime) = (register.clone(), runtime.clone());
        async move {
            let unreadable = |e: prost::DecodeError| Status::new(code::INVALID_ARGUMENT, e.to_string());
            match name.as_str() {
                "RegisterPlugin" => {
                    let request = RegisterPluginRequest::decode(payload).map_err(unreadable)?;
                    let name = PluginName::new(&request.plugin_idx, &request.plugin_name);
                    let name = name.map_err(|e| Status::new(code::INVALID_ARGUMENT, e.to_string()))?;
                    let Some(register) = register.lock().take() else {
                        let what = "a plugin registers once";
                        return Err(Status::new(code::FAILED_PRECONDITION, what));
                    };
                    tracing::info!(plugin = %name, nri = request.nri_version, "an NRI plugin registers");
                    let _ = register.send(name);
                    Ok(Empty {}.encode_to_vec())
                }
                "UpdateContainers" => {
                    let request = UpdateContainersRequest::decode(payload).map_err(unreadable)?;
                    if register.lock().is_some() {
                        let what = "only a registered plugin may ask for updates";
                        return Err(Status::new(code::FAILED_PRECONDITION, what));
                    }
                    let failed = runtime.update(request.update).await;
                    runtime.evict(request.evict).await;
                    Ok(UpdateContainersResponse { failed }.encode_to_vec())
                }
                other => Err(Status::new(
                    code::UNIMPLEMENTED,
                    format!("there is no method {other:?}"),
                )),
            }
        }
        .boxed()
    })
}

/// Listens where plugins connect, for root alone; replaces the socket of a dead daemon.
fn listen(path: &Path) -> Result<UnixListener, NriError> {
    if let Some(parent) = path.parent() {
        let mut private = std::fs::DirBuilder::new();
        let made = private.recursive(true).mode(0o700).create(parent);
        made.map_err(file("make the directory of the NRI socket,", parent))?;
    }
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(file("look at the NRI socket", path)(e)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(NriError::NoSocket {
                path: path.to_owned(),
            });
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(NriError::Taken {
                path: path.to_owned(),
            });
        }
        Ok(_) => std::fs::remove_file(path).map_err(file("replace the stale NRI socket", path))?,
    }
    // Bound aside and renamed, so that nobody can connect before the mode is right.
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&draft);
    let listener = UnixListener::bind(&draft).map_err(file("listen at the NRI socket", path))?;
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&draft, path))
        .map_err(file("put the NRI socket in place,", path))?;
    Ok(listener)
}

/// An error and its causes on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
