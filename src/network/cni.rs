//! Attaches pods to the node's networks and detaches them.

use crate::attachment::{Attached, Attachment, NetworkResult, RecordError, Store};
use crate::chain::{Subject, Walk};
use crate::config::Network;
use crate::error::{Chain, NetworkError, StepError, StepErrors};
use crate::name::{check_container_id, check_ifname};
use crate::plugin::{Runner, Target};
use crate::pod::PodNetwork;
use crate::readiness::{NetworkStatus, Readiness, Source};
use crate::turns::Turns;
use rustix::fs::{FsWord, statfs};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{RwLock, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tracing::Instrument;

/// Where CNI's files are and how patient to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniConfig {
    /// Network configurations; it may appear later.
    pub conf_dir: PathBuf,
    /// Plugins' executables; the first directory that has one wins.
    pub bin_dirs: Vec<PathBuf>,
    /// Records of attachments. Better durable: what plugins keep on disk for pods of an earlier boot
    /// (addresses of host-local) is then given back by [`Cni::gc`].
    pub cache_dir: PathBuf,
    /// The longest that one plugin may take for one request.
    pub timeout: Duration,
    /// How many networks a pod is attached to, in the order of their files' names; 0 means all.
    pub max_conf_num: usize,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/run/slipway/cni/results".into(),
            timeout: Duration::from_secs(60),
            max_conf_num: 1,
        }
    }
}

/// The node's pod networks. Clones share everything; the last one's drop ends the watch over the
/// configuration, while attachments stay.
#[derive(Clone, Debug)]
pub struct Cni(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    keeper: AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

#[derive(Debug)]
struct Shared {
    readiness: Arc<Readiness>,
    store: Store,
    results: Mutex<HashMap<String, Arc<NetworkResult>>>,
    turns: Turns,
    /// When each ADD of this process began, so that GC spares what is younger than itself.
    begun: Mutex<HashMap<String, Instant>>,
    /// GC runs alone; ADD and DEL of different pods run side by side (CNI specification, section 2).
    exclusive: RwLock<()>,
}

impl Cni {
    /// Loads the configuration and the records of attachments, blocking on their small files, and
    /// starts a task that follows the configuration from there on. Call it within a tokio runtime.
    ///
    /// Nothing here fails: what is missing is told by [`Cni::status`], damaged records by the log.
    pub fn new(config: CniConfig) -> Self {
        let runner = Runner {
            bin_dirs: config.bin_dirs,
            timeout: config.timeout,
        };
        let source = Source {
            conf_dir: config.conf_dir,
            limit: config.max_conf_num,
            runner,
        };
        let readiness = Arc::new(Readiness::new(source));
        let store = Store::new(config.cache_dir);
        let results = Mutex::new(recorded_results(&store));
        let keeper = tokio::spawn(Arc::clone(&readiness).keep()).abort_handle();
        let shared = Arc::new(Shared {
            readiness,
            store,
            results,
            turns: Turns::default(),
            begun: Mutex::default(),
            exclusive: RwLock::new(()),
        });
        Self(Arc::new(Handle { shared, keeper }))
    }

    /// Whether pods can be attached, as last found. Never waits.
    pub fn status(&self) -> NetworkStatus {
        self.0.shared.readiness.status()
    }

    /// Tells every change of the status.
    pub fn changed(&self) -> watch::Receiver<NetworkStatus> {
        self.0.shared.readiness.changed()
    }

    /// Has the configuration read and the plugins asked anew, in the background. Changes on disk
    /// don't need it.
    pub fn reload(&self) {
        self.0.shared.readiness.reload();
    }

    /// Attaches a pod (ADD): every plugin of every configured network. When a step fails, what was
    /// done is undone. Goes on to its end even if the caller gives up; a [`Cni::del`] that follows
    /// waits for it.
    ///
    /// # Errors
    ///
    /// Names the plugin that failed, its network, file and words. A pod that is attached already is
    /// an error.
    pub async fn add(&self, pod: &PodNetwork) -> Result<NetworkResult, NetworkError> {
        let pod = pod.clone();
        self.run(|shared| async move { shared.add(&pod).await })
            .await
    }

    /// Detaches a pod (DEL) with the configuration that it was attached with: every plugin of every
    /// network, in reverse, also after a failure. Succeeds for a pod that is not attached. `netns` is
    /// the pod's network namespace; the recorded one when absent. It may be gone.
    ///
    /// # Errors
    ///
    /// Every step that failed; the attachment then stays on record for another try.
    pub async fn del(&self, id: &str, netns: Option<&Path>) -> Result<(), NetworkError> {
        check_container_id(id)?;
        let (id, netns) = (id.to_owned(), netns.map(Path::to_path_buf));
        self.run(|shared| async move { shared.del(&id, netns.as_deref()).await })
            .await
    }

    /// Asks the plugins whether a pod's attachment is as they made it (CHECK). Networks that forbid
    /// it, or whose version lacks it, are passed over.
    ///
    /// # Errors
    ///
    /// What the plugins find; a pod that is not attached.
    pub async fn check(&self, id: &str) -> Result<(), NetworkError> {
        check_container_id(id)?;
        let id = id.to_owned();
        self.run(|shared| async move { shared.check(&id).await })
            .await
    }

    /// Detaches every pod on record but those named, those being worked on right now and those whose
    /// ADD begins later, then has the plugins of CNI 1.1 networks drop what belongs to no attachment (GC): of the node's
    /// networks and of those in `more` directories.
    ///
    /// # Errors
    ///
    /// All that failed; the rest was done.
    pub async fn gc(&self, valid_ids: &[String], more: &[PathBuf]) -> Result<(), NetworkError> {
        let valid = valid_ids.iter().cloned().collect();
        let more = more.to_vec();
        self.run(|shared| async move { shared.gc(valid, &more).await })
            .await
    }

    /// What a pod's ADD gave, also after a restart of the daemon; `None` for a pod that is not
    /// attached.
    pub fn cached(&self, id: &str) -> Option<NetworkResult> {
        self.0
            .shared
            .results()
            .get(id)
            .map(|result| NetworkResult::clone(result))
    }

    /// The pods with an attachment on record, complete or not, readable or not.
    ///
    /// # Errors
    ///
    /// When the records can't be listed.
    pub async fn attached(&self) -> Result<Vec<String>, NetworkError> {
        self.run(|shared| async move { shared.ids().await }).await
    }

    /// Runs to the end even if the caller is dropped: half an ADD is worth nothing to anybody.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Shared>) -> F) -> Result<T, NetworkError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetworkError>> + Send + 'static,
    {
        let work = work(Arc::clone(&self.0.shared)).in_current_span();
        tokio::spawn(work).await.map_err(NetworkError::CutOff)?
    }
}

impl Shared {
    async fn add(&self, pod: &PodNetwork) -> Result<NetworkResult, NetworkError> {
        pod.check()?;
        let netns = pod
            .netns
            .to_str()
            .filter(|_| pod.netns.is_absolute())
            .ok_or_else(|| NetworkError::Netns(pod.netns.clone()))?;
        let networks = match &pod.conf_dir {
            None => self.readiness.networks(),
            Some(dir) => self.readiness.networks_in(dir).await,
        };
        let networks = networks.map_err(NetworkError::NotReady)?;
        let _turn = self.turns.take(&pod.id).await;
        let _side_by_side = self.exclusive.read().await;
        if let Some(old) = self.read(&pod.id).await? {
            if old.result().is_some() {
                return Err(NetworkError::AlreadyAttached(pod.id.clone()));
            }
            // An ADD that was cut off half way; the plugins must forget it first.
            self.detach(&old, None).await?;
        }
        let mut attachment = Attachment {
            id: pod.id.clone(),
            netns: netns.to_owned(),
            args: pod.args(),
            wishes: pod.wishes(),
            networks: attachments(&networks, &pod.ifname)?,
        };
        for at in &attachment.networks {
            let installed = self.walk(&at.network).installed().await;
            installed.map_err(|error| NetworkError::Attach {
                id: pod.id.clone(),
                source: Box::new(error),
                cleanup: None,
            })?;
        }
        self.begun().insert(pod.id.clone(), Instant::now());
        // On record before the first plugin runs, so that no crash leaves something unknown behind.
        self.write(&attachment).await?;
        for n in 0..attachment.networks.len() {
            let added = match attachment.networks.get(n) {
                Some(at) => {
                    let subject = subject(&attachment, at, &attachment.netns);
                    self.walk(&at.network).add(subject).await
                }
                None => break,
            };
            match added {
                Ok(result) => {
                    if let Some(at) = attachment.networks.get_mut(n) {
                        at.result = Some(result);
                    }
                }
                Err(error) => return Err(self.undo(attachment, n, error).await),
            }
        }
        if let Err(error) = self.write(&attachment).await {
            // What can't be recorded can't be undone later, so it is undone now.
            if let Err(undo) = self.detach(&attachment, None).await {
                tracing::error!(pod = pod.id, error = %Chain(&undo), "cannot undo an ADD");
            }
            return Err(error);
        }
        let result = attachment
            .result()
            .ok_or_else(|| NetworkError::NotAttached(pod.id.clone()))?;
        if result.ips.is_empty() {
            let names: Vec<_> = networks.iter().map(|n| format!("{:?}", n.name())).collect();
            return Err(NetworkError::NoAddress {
                id: pod.id.clone(),
                networks: names.join(", "),
                ifname: pod.ifname.clone(),
            });
        }
        self.results()
            .insert(pod.id.clone(), Arc::new(result.clone()));
        Ok(result)
    }

    /// Undoes an ADD that failed on the network of index `last`.
    async fn undo(&self, mut tried: Attachment, last: usize, error: StepError) -> NetworkError {
        tried.networks.truncate(last.saturating_add(1));
        let cleanup = match self.detach(&tried, None).await {
            Ok(()) => None,
            Err(NetworkError::Detach { source, .. }) => Some(source),
            Err(other) => {
                tracing::error!(pod = tried.id, error = %Chain(&other), "cannot undo a failed ADD");
                None
            }
        };
        NetworkError::Attach {
            id: tried.id,
            source: Box::new(error),
            cleanup,
        }
    }

    async fn del(&self, id: &str, netns: Option<&Path>) -> Result<(), NetworkError> {
        let _turn = self.turns.take(id).await;
        let _side_by_side = self.exclusive.read().await;
        match self.read(id).await? {
            Some(attachment) => self.detach(&attachment, netns).await,
            None => Ok(()),
        }
    }

    /// DEL for all of an attachment; forgets it when every step succeeds.
    async fn detach(
        &self,
        attachment: &Attachment,
        netns: Option<&Path>,
    ) -> Result<(), NetworkError> {
        let id = &attachment.id;
        let netns = netns.unwrap_or(Path::new(&attachment.netns)).to_path_buf();
        let netns = live_namespace(netns).await;
        let mut errors = Vec::new();
        for at in attachment.networks.iter().rev() {
            let subject = subject(attachment, at, &netns);
            errors.extend(
                self.walk(&at.network)
                    .del(subject, at.result.as_ref())
                    .await,
            );
        }
        StepErrors::none_or(errors).map_err(|source| NetworkError::Detach {
            id: id.clone(),
            source,
        })?;
        self.store(id, {
            let id = id.clone();
            move |store| store.remove(&id)
        })
        .await?;
        self.results().remove(id);
        self.begun().remove(id);
        Ok(())
    }

    async fn check(&self, id: &str) -> Result<(), NetworkError> {
        let _turn = self.turns.take(id).await;
        let attachment = self
            .read(id)
            .await?
            .ok_or_else(|| NetworkError::NotAttached(id.to_owned()))?;
        let mut errors = Vec::new();
        for at in &attachment.networks {
            let Some(result) = &at.result else {
                return Err(NetworkError::NotAttached(id.to_owned()));
            };
            let subject = subject(&attachment, at, &attachment.netns);
            errors.extend(self.walk(&at.network).check(subject, result).await.err());
        }
        StepErrors::none_or(errors).map_err(|source| NetworkError::Check {
            id: id.to_owned(),
            source,
        })
    }

    async fn gc(&self, mut valid: BTreeSet<String>, more: &[PathBuf]) -> Result<(), NetworkError> {
        let now = Instant::now();
        valid.extend(self.turns.busy());
        let mut errors = Vec::new();
        for id in self.ids().await? {
            let younger = self.begun().get(&id).is_some_and(|begun| *begun >= now);
            if !younger
                && !valid.contains(&id)
                && let Err(error) = self.del(&id, None).await
            {
                errors.push(Chain(&error).to_string());
            }
        }
        let own = self.readiness.networks().unwrap_or_default();
        let mut networks: Vec<Network> = own.to_vec();
        for dir in more {
            let others = self.readiness.networks_in(dir).await.unwrap_or_default();
            // By its name: what is valid is known by that, too.
            let known = |other: &&Network| networks.iter().all(|n| n.name() != other.name());
            let others: Vec<_> = others.iter().filter(known).cloned().collect();
            networks.extend(others);
        }
        if networks
            .iter()
            .any(|n| n.version().has_status_and_gc() && !n.gc_disabled())
        {
            // No ADD or DEL is under way from here on, so what is on record is all there is.
            let _alone = self.exclusive.write().await;
            let attachments = self.valid_attachments().await?;
            for network in networks.iter() {
                let valid = attachments
                    .get(network.name())
                    .map(Vec::as_slice)
                    .unwrap_or_default();
                let failed = self.walk(network).gc(valid).await;
                errors.extend(failed.iter().map(|error| Chain(error).to_string()));
            }
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(NetworkError::Gc(errors))
        }
    }

    /// Container id and interface of every attachment on record, by network. One that could not be
    /// detached is still there: its plugins must not lose what its DEL needs.
    async fn valid_attachments(
        &self,
    ) -> Result<BTreeMap<String, Vec<(String, String)>>, NetworkError> {
        let mut valid = BTreeMap::<String, Vec<(String, String)>>::new();
        for id in self.ids().await? {
            for at in self.read(&id).await?.iter().flat_map(|a| &a.networks) {
                let pair = (id.clone(), at.ifname.clone());
                valid
                    .entry(at.network.name().to_owned())
                    .or_default()
                    .push(pair);
            }
        }
        Ok(valid)
    }

    fn walk<'a>(&'a self, network: &'a Network) -> Walk<'a> {
        Walk {
            runner: self.readiness.runner(),
            network,
        }
    }

    fn results(&self) -> MutexGuard<'_, HashMap<String, Arc<NetworkResult>>> {
        // The map is whole at any instant that a panic could happen in.
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begun(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ids(&self) -> Result<Vec<String>, NetworkError> {
        self.store("", Store::ids).await
    }

    async fn write(&self, attachment: &Attachment) -> Result<(), NetworkError> {
        let written = attachment.clone();
        self.store(&attachment.id, move |store| store.write(&written))
            .await
    }

    /// A pod's record. One that can't be understood is set aside and replaced by one of the networks
    /// as they are configured now: their DEL is the best that is left.
    async fn read(&self, id: &str) -> Result<Option<Attachment>, NetworkError> {
        let networks = self.readiness.networks().unwrap_or_default();
        let read = move |store: &Store, id: &str| match store.read(id) {
            Err(error) if error.is_damage() => {
                let aside = store.set_aside(id)?;
                tracing::error!(
                    pod = id,
                    error = %Chain(&error),
                    kept = %aside.display(),
                    "the record of a network attachment can't be read; \
                     detaching with the present configuration instead"
                );
                let Ok(networks) = attachments(&networks, "eth0") else {
                    return Ok(None);
                };
                if networks.is_empty() {
                    return Ok(None);
                }
                let rebuilt = Attachment {
                    id: id.to_owned(),
                    netns: String::new(),
                    args: "IgnoreUnknown=1".into(),
                    wishes: serde_json::Map::new(),
                    networks,
                };
                store.write(&rebuilt)?;
                Ok(Some(rebuilt))
            }
            read => read,
        };
        let own = id.to_owned();
        self.store(id, move |store| read(store, &own)).await
    }

    /// Works on the records off the runtime's threads.
    async fn store<T: Send + 'static>(
        &self,
        id: &str,
        work: impl FnOnce(&Store) -> Result<T, RecordError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let store = self.store.clone();
        spawn_blocking(move || work(&store))
            .await
            .map_err(NetworkError::CutOff)?
            .map_err(|source| NetworkError::Record {
                id: id.to_owned(),
                source: Box::new(source),
            })
    }
}

/// What the records say was given, for those that can be read.
fn recorded_results(store: &Store) -> HashMap<String, Arc<NetworkResult>> {
    let ids = store.ids().unwrap_or_else(|error| {
        tracing::error!(error = %Chain(&error), "cannot list the network attachments");
        Vec::new()
    });
    let mut results = HashMap::new();
    for id in ids {
        match store.read(&id) {
            Ok(attachment) => {
                let result = attachment.and_then(|a| a.result());
                results.extend(result.map(|result| (id, Arc::new(result))));
            }
            Err(error) => {
                tracing::error!(
                    pod = id,
                    error = %Chain(&error),
                    "the record of a network attachment can't be read"
                );
            }
        }
    }
    results
}

/// One attachment per network, on `eth0`, `eth1` and so on.
fn attachments(networks: &[Network], ifname: &str) -> Result<Vec<Attached>, NetworkError> {
    let stem = ifname.trim_end_matches(|c: char| c.is_ascii_digit());
    let first = ifname
        .get(stem.len()..)
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0usize);
    networks
        .iter()
        .enumerate()
        .map(|(n, network)| {
            let ifname = match n {
                0 => ifname.to_owned(),
                n => format!("{stem}{}", first.saturating_add(n)),
            };
            check_ifname(&ifname)?;
            Ok(Attached {
                network: network.clone(),
                ifname,
                result: None,
            })
        })
        .collect()
}

fn subject<'a>(attachment: &'a Attachment, at: &'a Attached, netns: &'a str) -> Subject<'a> {
    let target = Target {
        id: &attachment.id,
        netns,
        ifname: &at.ifname,
        args: &attachment.args,
    };
    Subject {
        target,
        wishes: &attachment.wishes,
    }
}

/// The path if a network namespace is there, else nothing: plugins take that as "gone already", but
/// not a path that leads to something else.
async fn live_namespace(path: PathBuf) -> String {
    // linux/magic.h. Before Linux 3.19 namespaces were files of /proc.
    const NSFS_MAGIC: FsWord = 0x6e73_6673;
    const PROC_MAGIC: FsWord = 0x9fa0;
    let look = move || {
        let kind = statfs(&path).ok()?.f_type;
        let live = kind == NSFS_MAGIC || kind == PROC_MAGIC;
        live.then(|| path.to_str().map(str::to_owned)).flatten()
    };
    spawn_blocking(look)
        .await
        .ok()
        .flatten()
        .unwrap_or_default()
}
