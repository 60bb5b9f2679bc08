//! Containers that are restored from a checkpoint, in their keeper: created without a process, which criu makes when
//! they are started.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::Value;
use slipway_proto::keeper::{
    ContainerState, CreateContainer, CreateContainerResult, Empty, Error as WireError, ErrorKind,
    Phase, response::Result as Answer,
};

use super::attach::Readers;
use super::container::{Container, not_found};
use super::job::{Origin, Purpose};
use super::oci::Driver;
use super::output::Streams;
use super::{Keeper, now_ns, wire_error};
use crate::cgroup::{self, Hierarchies};
use crate::confine::{SETUP_FAILED, chain};
use crate::creator::Stdio;
use crate::ids::IdMaps;
use crate::log::LogFile;
use crate::restore::{self, Inherited, RestoreError};
use crate::{removal, sys};

/// What a container is to be restored with.
pub(super) struct Pending {
    pub(super) create: CreateContainer,
    /// The container's ends of its standard streams.
    pub(super) stdio: Stdio,
}

impl Pending {
    /// In a job.
    pub(super) fn prepare(
        &self,
        cgroups: &Hierarchies,
        cgroup: &Path,
    ) -> Result<Answer, WireError> {
        let made = self.with(cgroups, cgroup, restore::prepare)?;
        Ok(Answer::CreateContainer(made))
    }

    fn run(&self, cgroups: &Hierarchies, cgroup: &Path) -> Result<Answer, WireError> {
        let pid = self.with(cgroups, cgroup, restore::run)?;
        Ok(Answer::CreateContainer(CreateContainerResult {
            pid,
            ..CreateContainerResult::default()
        }))
    }

    /// Changes the limits that it will have: those that `resources`, in JSON, names.
    pub(super) fn limit(&mut self, resources: &[u8]) -> serde_json::Result<()> {
        let mut spec: Value = serde_json::from_slice(&self.create.spec)?;
        let new = serde_json::from_slice(resources)?;
        lay_over(&mut spec["linux"]["resources"], new);
        self.create.spec = serde_json::to_vec(&spec)?;
        Ok(())
    }

    fn with<T>(
        &self,
        cgroups: &Hierarchies,
        cgroup: &Path,
        work: fn(&Inherited<'_>) -> Result<T, RestoreError>,
    ) -> Result<T, WireError> {
        let Some(restore) = &self.create.restore else {
            return Err(wire_error(
                ErrorKind::Invalid,
                "there is nothing to restore",
            ));
        };
        let inherited = Inherited {
            create: &self.create,
            restore,
            cgroups,
            cgroup,
            stdio: &self.stdio,
        };
        work(&inherited).map_err(|e| wire_error(e.kind(), chain(&e)))
    }
}

/// Puts what a JSON value has in the place of what another one has, key by key.
fn lay_over(old: &mut Value, new: Value) {
    match (old, new) {
        (_, Value::Null) => {}
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                lay_over(old.entry(key).or_insert(Value::Null), value);
            }
        }
        (old, new) => *old = new,
    }
}

impl Keeper {
    /// A container whose root file system is made by a job, and its processes by another when it is started.
    pub(super) fn begin_prepare(
        &mut self,
        connection: u64,
        create: CreateContainer,
        spec: &Spec,
        (cgroup, log): (PathBuf, LogFile),
        (stdio, ours): (Stdio, Streams),
    ) -> Result<(), WireError> {
        let made = match create.systemd {
            true => Ok(false),
            false => self.cgroups.ensure(&cgroup),
        };
        let pending = Pending { create, stdio };
        let id = pending.create.id.clone();
        let job = made.and_then(|_| {
            let cgroups = self.cgroups.clone();
            let (pending, cgroup) = (&pending, &cgroup);
            let purpose = Purpose::Create(id.clone());
            self.start_job(purpose, connection, Origin::default(), move || {
                pending.prepare(&cgroups, cgroup)
            })
        });
        let creator = job.map_err(|e| {
            let _ = self.cgroups.remove(&cgroup);
            wire_error(
                ErrorKind::Internal,
                format!("can't prepare the restore: {e}"),
            )
        })?;
        let create = pending.create.clone();
        let container = Container {
            dir: PathBuf::from(&create.dir),
            cgroup,
            driver: Driver::Native,
            state: ContainerState {
                id,
                ..ContainerState::default()
            },
            creator: Some(creator),
            pidfd: None,
            confinement: None,
            ids: IdMaps::of_spec(spec),
            oom_score_adj: create.oom_score_adj,
            own_pid_namespace: true,
            oom_kills_of_execs: 0,
            create: Some(create),
            stdout: None,
            stderr: None,
            stdin: ours.stdin,
            terminal: ours.terminal,
            readers: Readers::default(),
            log,
            start: None,
            poststart: None,
            restore: Some(pending),
            restoring: None,
            deleting: false,
        };
        self.enter(container, ours.stdout, ours.stderr);
        Ok(())
    }

    /// StartContainer of a container that is to be restored.
    pub(super) fn begin_restore(&mut self, connection: u64, id: &str) -> Result<(), WireError> {
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        let phase = container.state.phase();
        let ready = phase == Phase::Created && !container.is_becoming();
        let cgroup = container.cgroup.clone();
        let Some(pending) = container.restore.as_ref().filter(|_| ready) else {
            let message = format!(
                "container {id} can't be started: it is {}",
                phase.as_str_name()
            );
            return Err(wire_error(ErrorKind::WrongState, message));
        };
        let internal = |e: std::io::Error| {
            wire_error(
                ErrorKind::Internal,
                format!("can't restore container {id}: {e}"),
            )
        };
        // What is restored is born where criu is.
        let born_in = match pending.create.systemd {
            true => None,
            false => self.cgroups.open_v2(&cgroup).map_err(internal)?,
        };
        let keep = pending.stdio.descriptors();
        let origin = Origin {
            keep: &keep,
            cgroup: born_in.as_ref().map(|fd| fd.as_fd()),
            ..Origin::default()
        };
        let cgroups = self.cgroups.clone();
        // The job has a copy of it; here it is put back.
        let pending = self.containers.get_mut(id).and_then(|c| c.restore.take());
        let job = match &pending {
            Some(pending) => {
                self.start_job(Purpose::Restore(id.to_owned()), connection, origin, || {
                    pending.run(&cgroups, &cgroup)
                })
            }
            None => Err(std::io::ErrorKind::NotFound.into()),
        };
        if let Some(container) = self.containers.get_mut(id) {
            container.restore = pending;
            container.restoring = job.as_ref().ok().copied();
        }
        job.map(drop).map_err(internal)
    }

    /// The job has answered.
    pub(super) fn restored(
        &mut self,
        id: &str,
        connection: u64,
        answer: Result<Answer, WireError>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            let error = wire_error(
                ErrorKind::NotFound,
                format!("container {id} was deleted while it was restored"),
            );
            return self.reply(connection, Err(error));
        };
        container.restoring = None;
        let ended = container.has_exited();
        let answer = answer.and_then(|made| match self.take_terminal(id) {
            Ok(()) => Ok(made),
            Err(e) => Err(wire_error(
                ErrorKind::Internal,
                format!("can't take over the container's terminal: {e}"),
            )),
        });
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        match answer {
            Ok(Answer::CreateContainer(made)) if !ended => {
                // From here on only the container holds its ends of its streams.
                container.restore = None;
                let end = self.unclaimed.remove(&made.pid);
                container.pidfd = match end {
                    Some(_) => None,
                    None => cgroup::pin(made.pid),
                };
                container.state.pid = made.pid;
                container.state.set_phase(Phase::Running);
                container.state.started_at = now_ns();
                let state = container.state.clone();
                self.publish(&state);
                self.reply(connection, Ok(Answer::Empty(Empty {})));
                if let Some(code) = end {
                    self.container_exited(id, code);
                }
            }
            other => {
                let error = other.err().unwrap_or_else(|| {
                    wire_error(
                        ErrorKind::WrongState,
                        format!("container {id} was killed while it was restored"),
                    )
                });
                self.undo_restore(id, connection, error);
            }
        }
        self.forget_unclaimed();
    }

    fn undo_restore(&mut self, id: &str, connection: u64, error: WireError) {
        let Some(cgroup) = self.containers.get(id).map(|c| c.cgroup.clone()) else {
            return self.reply(connection, Err(error));
        };
        let cgroups = self.cgroups.clone();
        let purpose = Purpose::Unrestore(id.to_owned(), error.message.clone(), error.kind);
        let job = self.start_job(purpose, connection, Origin::default(), || {
            removal::kill_cgroup(&cgroups, &cgroup, &[])
                .map(|()| Answer::Empty(Empty {}))
                .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))
        });
        if job.is_err() {
            cgroups.signal_all(&cgroup, libc::SIGKILL);
            self.restore_failed(id, connection, error);
        }
    }

    /// Nothing of it is left; it has exited, as after any start that failed.
    pub(super) fn restore_failed(&mut self, id: &str, connection: u64, error: WireError) {
        if let Some(container) = self.containers.get_mut(id).filter(|c| !c.has_exited()) {
            container.restore = None;
            container.state.cannot_run = true;
            container.state.message.clone_from(&error.message);
            self.container_exited(id, SETUP_FAILED);
        }
        let error = WireError {
            kind: match error.kind() {
                ErrorKind::TimedOut | ErrorKind::Unsupported => error.kind,
                _ => ErrorKind::CannotRun as i32,
            },
            ..error
        };
        self.reply(connection, Err(error));
    }

    /// Ends a container that was never started and so has no process that could be killed.
    pub(super) fn end_before_start(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let waits = container.restore.is_some() && container.state.phase() == Phase::Created;
        if !waits || container.is_creating() {
            return;
        }
        if let Some(job) = container.restoring {
            // Its end ends the container.
            return sys::kill_child(job);
        }
        container.restore = None;
        self.container_exited(id, 128 + libc::SIGKILL);
    }

    /// As [`Keeper::end_before_start`], all.
    pub(super) fn end_unrestored(&mut self) {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        ids.iter().for_each(|id| self.end_before_start(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_limits_are_laid_over_the_old_ones() {
        let old = br#"{"linux":{"resources":{"memory":{"limit":5,"swap":9},"cpu":{"shares":2}}}}"#;
        let create = CreateContainer {
            spec: old.to_vec(),
            ..CreateContainer::default()
        };
        let mut pending = Pending {
            create,
            stdio: Stdio::Terminal(std::fs::File::open("/dev/null").unwrap().into()),
        };
        let new = br#"{"memory":{"limit":7},"cpu":{"shares":null,"cpus":"0"},"unified":{"a":"b"}}"#;
        pending.limit(new).unwrap();
        let spec: Value = serde_json::from_slice(&pending.create.spec).unwrap();
        let wanted = serde_json::json!({
            "memory": {"limit": 7, "swap": 9}, "cpu": {"shares": 2, "cpus": "0"}, "unified": {"a": "b"},
        });
        assert_eq!(spec["linux"]["resources"], wanted);
        pending.create.spec = b"{}".to_vec();
        pending.limit(new).unwrap();
        pending.limit(b"{").unwrap_err();
    }
}
