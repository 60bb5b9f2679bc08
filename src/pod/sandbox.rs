//! A pod sandbox: what is known of it, readable without waiting, and the one place where its work is
//! ordered.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use slipway_proto::cri;
use slipway_runtime::client::Keeper;
use tokio::sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard, watch};

use super::container::Container;
use super::feed::{Feed, Happening, Kind};
use super::names::pod_name;
use super::node::now;
use super::record::PodRecord;
use super::shares::Told;
use super::state::{PodStage, Stage, Status};
use super::stats::Meter;

/// A container's state, shared by the container, those who wait for its end, and the pod's event stream.
pub struct Cell {
    /// The state; changed through [`Cell::change`] alone.
    pub status: watch::Sender<Status>,
    /// Where its processes are, absolute in the hierarchy: to end it without its keeper.
    pub cgroup: String,
    id: String,
    pod: Weak<Pod>,
    /// The container, once it is finished.
    container: OnceLock<Weak<Container>>,
    /// What the feed has been told; `None` before the container is finished. Held while the state changes,
    /// so that two changes are told in their order.
    told: Mutex<Option<Stage>>,
}

impl Cell {
    /// Changes the state, and tells what has happened by that. `change` says whether it changed anything, and
    /// so does this.
    pub fn change(&self, change: impl FnOnce(&mut Status) -> bool) -> bool {
        let mut told = self.told.lock();
        let changed = self.status.send_if_modified(change);
        if changed {
            self.tell(&mut told);
        }
        changed
    }

    /// The container is finished: tells of its creation, and of what has happened to it meanwhile.
    pub fn announce(&self, container: &Arc<Container>) {
        let mut told = self.told.lock();
        if self.container.set(Arc::downgrade(container)).is_ok() {
            *told = Some(Stage::Created);
            self.happened(Kind::Created);
            self.tell(&mut told);
        }
    }

    fn tell(&self, told: &mut Option<Stage>) {
        let Some(before) = *told else { return };
        let (stage, started_at) = {
            let status = self.status.borrow();
            (status.stage, status.started_at)
        };
        if before == Stage::Created && stage > before && started_at != 0 {
            self.happened(Kind::Started);
        }
        if before < Stage::Exited && stage == Stage::Exited {
            self.happened(Kind::Stopped);
            if let Some(pod) = self.pod.upgrade() {
                pod.feed.ended(&self.id);
            }
        }
        *told = Some(before.max(stage));
    }

    fn happened(&self, kind: Kind) {
        if let Some(pod) = self.pod.upgrade() {
            pod.happened(kind, &self.id);
        }
    }
}

/// The resources of a pod as a whole, as the kubelet said them last.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sizes {
    /// What the pod needs beside its containers.
    pub overhead: Option<cri::LinuxContainerResources>,
    /// The sum of its containers', or what its own specification says.
    pub resources: Option<cri::LinuxContainerResources>,
}

impl Sizes {
    fn of(record: &PodRecord) -> Self {
        let linux = record.config.linux.as_ref();
        Self {
            overhead: linux.and_then(|l| l.overhead.clone()),
            resources: linux.and_then(|l| l.resources.clone()),
        }
    }
}

/// A pod sandbox.
pub struct Pod {
    /// What does not change; `stopped` in it is as of the last start of the daemon.
    pub record: PodRecord,
    /// Its directory under the run root.
    pub dir: PathBuf,
    /// Its supervisor.
    pub keeper: Keeper,
    /// What the pod was sized to last; the record has what it was made or found with.
    sizes: Mutex<Sizes>,
    /// Its use of the machine, as far as that is remembered between two samples.
    pub meter: Mutex<Meter>,
    /// What its runtime has told of its containers last, where they share a sandbox.
    pub told: Mutex<Option<Told>>,
    /// Until when its shim is not asked for statistics again, after it gave no answer.
    pub silent_until: Mutex<Option<Instant>>,
    stage: watch::Sender<PodStage>,
    feed: Arc<Feed>,
    /// Whether its end has been told.
    end_told: AtomicBool,
    /// Set when NRI plugins have been told that it was stopped.
    pub(super) stop_told: OnceCell<()>,
    /// Creating a container shares it; taking the pod down has it alone.
    order: RwLock<()>,
    /// The states of the pod's containers, those being created included.
    cells: Mutex<BTreeMap<String, Arc<Cell>>>,
}

impl Pod {
    /// A pod as its record describes it.
    pub fn new(record: PodRecord, dir: &Path, stage: PodStage, feed: Arc<Feed>) -> Arc<Self> {
        Arc::new(Self {
            keeper: Keeper::at(&record.id, dir),
            dir: dir.to_owned(),
            sizes: Mutex::new(Sizes::of(&record)),
            meter: Mutex::default(),
            told: Mutex::default(),
            silent_until: Mutex::default(),
            feed,
            end_told: AtomicBool::new(stage == PodStage::Stopped),
            stop_told: OnceCell::new_with((stage == PodStage::Stopped).then_some(())),
            stage: watch::Sender::new(stage),
            order: RwLock::new(()),
            cells: Mutex::default(),
            record,
        })
    }

    /// The process id of its keeper; `None` when that is dead or does not answer soon.
    pub async fn keeper_pid(&self) -> Option<i32> {
        const SOON: Duration = Duration::from_millis(500);
        let hello = tokio::time::timeout(SOON, self.keeper.hello()).await;
        hello.ok()?.ok().map(|hello| hello.pid)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// Its identity as the kubelet gave it.
    pub fn metadata(&self) -> cri::PodSandboxMetadata {
        self.record.config.metadata.clone().unwrap_or_default()
    }

    /// The name that it holds.
    pub fn name(&self) -> String {
        let m = self.metadata();
        pod_name(&m.name, &m.namespace, &m.uid, m.attempt)
    }

    /// Where it is in its life.
    pub fn stage(&self) -> PodStage {
        *self.stage.borrow()
    }

    /// Moves it forward; never back.
    pub fn advance(&self, to: PodStage) {
        self.stage.send_if_modified(|stage| {
            let forward = to > *stage;
            if forward {
                *stage = to;
            }
            forward
        });
    }

    /// Tells the feed what happened to a container of the pod, or (with its own id) to the pod.
    pub fn happened(self: &Arc<Self>, kind: Kind, id: &str) {
        self.feed.tell(|| {
            let finished = |cell: Arc<Cell>| {
                let container = cell.container.get()?.upgrade()?;
                let status = cell.status.borrow().clone();
                Some((container, status))
            };
            let cells = self.cells().into_iter();
            Arc::new(Happening {
                kind,
                id: id.to_owned(),
                at: now(),
                pod: self.clone(),
                stage: self.stage(),
                containers: cells.filter_map(|(_, cell)| finished(cell)).collect(),
            })
        });
    }

    /// Tells that the pod has ended: stopped, or without its keeper. Once.
    pub fn ended(self: &Arc<Self>) {
        if !self.end_told.swap(true, Ordering::Relaxed) {
            self.happened(Kind::Stopped, self.id());
        }
    }

    /// Held while a container is being created in the pod.
    pub async fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.order.read().await
    }

    /// Held while the pod is taken down: nothing is being created then.
    pub async fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.order.write().await
    }

    /// Takes over what the pod is sized to now, as far as it is given, and returns the record that says so.
    pub fn resize(&self, to: Sizes) -> PodRecord {
        let mut sizes = self.sizes.lock();
        sizes.overhead = to.overhead.or(sizes.overhead.take());
        sizes.resources = to.resources.or(sizes.resources.take());
        self.with_sizes(&sizes)
    }

    /// The record as it is now.
    pub fn record_now(&self) -> PodRecord {
        self.with_sizes(&self.sizes.lock())
    }

    fn with_sizes(&self, sizes: &Sizes) -> PodRecord {
        let mut record = self.record.clone();
        if *sizes != Sizes::default() {
            let linux = record.config.linux.get_or_insert_default();
            linux.overhead.clone_from(&sizes.overhead);
            linux.resources.clone_from(&sizes.resources);
        }
        record
    }

    /// Whether the pod has namespaces or addresses of its own network.
    pub fn has_network(&self) -> bool {
        !self.record.namespaces.network.is_empty()
    }

    /// The directory of one of its containers.
    pub fn container_dir(&self, id: &str) -> PathBuf {
        self.containers_dir().join(id)
    }

    /// The directory of its containers.
    pub fn containers_dir(&self) -> PathBuf {
        self.dir.join("containers")
    }

    /// Where its namespaces are mounted.
    pub fn ns_dir(&self) -> PathBuf {
        self.dir.join("ns")
    }

    /// Makes the state of a container known to the event stream.
    pub fn add_cell(self: &Arc<Self>, id: &str, cgroup: &str, status: Status) -> Arc<Cell> {
        let cell = Arc::new(Cell {
            status: watch::Sender::new(status),
            cgroup: cgroup.to_owned(),
            id: id.to_owned(),
            pod: Arc::downgrade(self),
            container: OnceLock::new(),
            told: Mutex::new(None),
        });
        self.cells.lock().insert(id.to_owned(), cell.clone());
        cell
    }

    /// The state of a container.
    pub fn cell(&self, id: &str) -> Option<Arc<Cell>> {
        self.cells.lock().get(id).cloned()
    }

    /// Forgets the state of a container.
    pub fn remove_cell(&self, id: &str) {
        self.cells.lock().remove(id);
    }

    /// The states of all its containers, those being created included.
    pub fn cells(&self) -> Vec<(String, Arc<Cell>)> {
        self.cells
            .lock()
            .iter()
            .map(|(id, cell)| (id.clone(), cell.clone()))
            .collect()
    }
}
