//! A container: what is known of it, readable without waiting.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use slipway_image::ImageLease;
use slipway_proto::cri;
use slipway_runtime::client::Keeper;
use tokio::sync::OnceCell;

use super::error::PodError;
use super::names::container_name;
use super::record::ContainerRecord;
use super::sandbox::Cell;
use super::state::{Stage, Status};
use super::stats::Meter;

/// A container.
pub struct Container {
    /// What does not change.
    pub record: ContainerRecord,
    /// Its directory under its pod's.
    pub dir: PathBuf,
    /// Its pod's supervisor.
    pub keeper: Keeper,
    cell: Arc<Cell>,
    /// Starting and removing take turns; nothing else waits here.
    pub turn: tokio::sync::Mutex<()>,
    stop_signalled: AtomicBool,
    /// Set when NRI plugins have been told of its end.
    pub(super) end_told: OnceCell<()>,
    /// Set when they have been told of its removal.
    pub(super) removal_told: OnceCell<()>,
    /// Its use of the machine, as far as that is remembered between two samples.
    pub meter: Mutex<Meter>,
    /// What limits are in force now; the record has those that it was created with or found with.
    resources: RwLock<cri::LinuxContainerResources>,
    /// Keeps the layers of its image and of those that are its volumes.
    leases: Mutex<Vec<ImageLease>>,
}

impl Container {
    /// A container as its record describes it.
    pub fn new(
        record: ContainerRecord,
        dir: PathBuf,
        keeper: Keeper,
        cell: Arc<Cell>,
        leases: Vec<ImageLease>,
    ) -> Arc<Self> {
        Arc::new(Self {
            resources: RwLock::new(record.resources.clone()),
            record,
            dir,
            keeper,
            cell,
            turn: tokio::sync::Mutex::new(()),
            stop_signalled: AtomicBool::new(false),
            end_told: OnceCell::new(),
            removal_told: OnceCell::new(),
            meter: Mutex::default(),
            leases: Mutex::new(leases),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// How long its hooks after the start may take; zero: it has none.
    pub fn poststart(&self) -> Duration {
        Duration::from_millis(self.record.poststart_ms)
    }

    /// How long its hooks after the end may take; zero: it has none.
    pub fn poststop(&self) -> Duration {
        Duration::from_millis(self.record.poststop_ms)
    }

    /// Its identity as the kubelet gave it.
    pub fn metadata(&self) -> cri::ContainerMetadata {
        self.record.config.metadata.clone().unwrap_or_default()
    }

    /// The name that it holds.
    pub fn name(&self) -> String {
        let m = self.metadata();
        container_name(&self.record.pod_id, &m.name, m.attempt)
    }

    /// What limits are in force now.
    pub fn resources(&self) -> cri::LinuxContainerResources {
        self.resources.read().clone()
    }

    /// Other limits are in force from now on.
    pub(super) fn set_resources(&self, resources: cri::LinuxContainerResources) {
        *self.resources.write() = resources;
        self.meter.lock().outdate();
    }

    /// Its state now.
    pub fn status(&self) -> Status {
        self.cell.status.borrow().clone()
    }

    /// Where it is in its life.
    pub fn stage(&self) -> Stage {
        self.cell.status.borrow().stage
    }

    /// Refuses what needs a process to join.
    ///
    /// # Errors
    /// [`PodError::WrongState`] unless it runs.
    pub fn must_run(&self) -> Result<(), PodError> {
        match self.stage() {
            Stage::Running => Ok(()),
            stage => Err(PodError::WrongState {
                id: self.id().to_owned(),
                state: stage.as_str(),
                needs: "a command can only be executed in a running one",
            }),
        }
    }

    /// Changes its state; `change` says whether it did.
    pub fn update(&self, change: impl FnOnce(&mut Status) -> bool) {
        self.cell.change(change);
    }

    /// Waits until it has exited.
    pub async fn exited(&self) {
        let mut status = self.cell.status.subscribe();
        // An error says that there is nothing more to wait for.
        let _ = status
            .wait_for(|status| status.stage == Stage::Exited)
            .await;
    }

    /// Waits until it has exited, but not longer than `patience`. Returns whether it has.
    pub async fn exited_within(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.exited()).await.is_ok()
    }

    /// Whether the caller is the first to ask it to stop, and so the one to send the signal.
    pub fn first_to_stop(&self) -> bool {
        !self.stop_signalled.swap(true, Ordering::Relaxed)
    }

    /// The images' layers are not needed any more.
    pub fn release_images(&self) {
        self.leases.lock().clear();
    }
}
