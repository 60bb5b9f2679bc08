//! A pod sandbox: what is known of it, readable without waiting, and the one place where its work is
//! ordered.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use slipway_observe::Rate;
use slipway_proto::cri;
use slipway_runtime::client::Keeper;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, watch};

use super::names::pod_name;
use super::record::PodRecord;
use super::state::{PodStage, Status};

/// A container's state, shared by the container, those who wait for its end, and the pod's event stream.
pub struct Cell {
    /// The state.
    pub status: watch::Sender<Status>,
    /// Where its processes are, absolute in the hierarchy: to end it without its keeper.
    pub cgroup: String,
}

/// A pod sandbox.
pub struct Pod {
    /// What does not change; `stopped` in it is as of the last start of the daemon.
    pub record: PodRecord,
    /// Its directory under the run root.
    pub dir: PathBuf,
    /// Its supervisor.
    pub keeper: Keeper,
    /// Its last CPU sample.
    pub rate: Mutex<Rate>,
    stage: watch::Sender<PodStage>,
    /// Creating a container shares it; taking the pod down has it alone.
    order: RwLock<()>,
    /// The states of the pod's containers, those being created included.
    cells: Mutex<BTreeMap<String, Arc<Cell>>>,
}

impl Pod {
    /// A pod as its record describes it.
    pub fn new(record: PodRecord, dir: &Path, stage: PodStage) -> Arc<Self> {
        Arc::new(Self {
            keeper: Keeper::at(&record.id, dir),
            dir: dir.to_owned(),
            rate: Mutex::default(),
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

    /// Held while a container is being created in the pod.
    pub async fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.order.read().await
    }

    /// Held while the pod is taken down: nothing is being created then.
    pub async fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.order.write().await
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
    pub fn add_cell(&self, id: &str, cgroup: &str, status: Status) -> Arc<Cell> {
        let cell = Arc::new(Cell {
            status: watch::Sender::new(status),
            cgroup: cgroup.to_owned(),
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
