//! Checkpoints of containers in their keeper.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use libcontainer::rootfs::utils::is_bind;
use oci_spec::runtime::Spec;
use slipway_proto::keeper::{
    Checkpoint, CheckpointTarget, Empty, Error as WireError, ErrorKind, response::Result as Answer,
};

use super::container::{Container, not_found};
use super::job::{Origin, Purpose};
use super::oci::Driver;
use super::output::Output;
use super::{Keeper, wire_error};
use crate::checkpoint::{self, Target};
use crate::confine::chain;
use crate::{creator, sys, terminal};

impl Keeper {
    pub(super) fn checkpoint(&mut self, connection: u64, call: &Checkpoint) {
        if let Err(error) = self.begin_checkpoint(connection, call) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_checkpoint(&mut self, connection: u64, call: &Checkpoint) -> Result<(), WireError> {
        let criu = call
            .criu
            .clone()
            .ok_or_else(|| wire_error(ErrorKind::Invalid, "the call names no criu"))?;
        let targets = call.containers.iter().map(|asked| self.target(asked));
        let targets: Vec<Target> = targets.collect::<Result<_, _>>()?;
        let cgroups = self.cgroups.clone();
        let deadline = Instant::now() + Duration::from_millis(call.timeout_ms);
        let job = self.start_job(
            Purpose::Checkpoint,
            connection,
            Origin::default(),
            move || {
                checkpoint::take(&cgroups, &criu, &targets, deadline)
                    .map(|()| Answer::Empty(Empty {}))
                    .map_err(|e| wire_error(e.kind(), chain(&e)))
            },
        );
        job.map(drop)
            .map_err(|e| wire_error(ErrorKind::Internal, format!("can't fork: {e}")))
    }

    fn target(&self, asked: &CheckpointTarget) -> Result<Target, WireError> {
        let id = asked.id.as_str();
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        let wrong =
            |what: &str| wire_error(ErrorKind::WrongState, format!("container {id} {what}"));
        let pid = container
            .pid()
            .filter(|_| container.is_running())
            .ok_or_else(|| wrong("is not running"))?;
        let unsupported = |why: &str| {
            let message = format!("container {id} {why}, and can't be checkpointed");
            wire_error(ErrorKind::Unsupported, message)
        };
        let in_sandbox = container.driver.runtime().map(|r| r.sandbox.is_some());
        match (&container.driver, in_sandbox) {
            (Driver::Shim(_), _) => return Err(unsupported("is made by a containerd shim")),
            (_, Some(true)) => return Err(unsupported("runs in a sandbox of its runtime's")),
            // It is made of ordinary processes, whoever made it.
            (_, Some(false)) if !has_own_root(pid) => {
                return Err(unsupported(
                    "has no process in its own root file system (its runtime may have a virtual machine for it)",
                ));
            }
            _ => {}
        }
        let overlay = asked.overlay.clone().unwrap_or_default();
        Ok(Target {
            id: id.to_owned(),
            pid,
            cgroup: container.cgroup.clone(),
            dir: PathBuf::from(&asked.dir),
            upper: Some(PathBuf::from(overlay.upper)).filter(|p| !p.as_os_str().is_empty()),
            lower: overlay.lower.iter().map(PathBuf::from).collect(),
            descriptors: descriptors(container),
            binds: binds(container)?,
        })
    }

    /// Gives up the checkpoints whose caller has gone.
    pub(super) fn abandon_checkpoints(&mut self, connection: u64) {
        let its = |job: &super::job::Job| {
            job.connection == connection && job.purpose == Purpose::Checkpoint
        };
        for (pid, _) in self.jobs.iter().filter(|(_, job)| its(job)) {
            sys::kill_child(*pid);
        }
    }
}

/// Whether a process has another root directory than this one, as one of a container has.
fn has_own_root(pid: i32) -> bool {
    let root = |path: &str| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    match (root(&format!("/proc/{pid}/root/")), root("/")) {
        (Ok(its), Ok(own)) => its != own,
        _ => false,
    }
}

/// What a container's descriptors 0 to 2 began as: its terminal, or pipes, whose both ends have the same inode.
fn descriptors(container: &Container) -> [String; 3] {
    let terminal = container.stdout.as_ref().filter(|o| o.terminal);
    if let Some(number) = terminal.and_then(|o| terminal::number(&o.pipe).ok()) {
        return [(); 3].map(|()| format!("/dev/pts/{number}"));
    }
    let name = |fd: Option<std::os::fd::BorrowedFd<'_>>| {
        let inode = fd.and_then(|fd| rustix::fs::fstat(fd).ok());
        inode.map_or_else(
            || "/dev/null".to_owned(),
            |stat| format!("pipe:[{}]", stat.st_ino),
        )
    };
    let pipe = |output: &Option<Output>| name(output.as_ref().map(|o| o.pipe.as_fd()));
    [
        name(container.stdin.as_ref().map(AsFd::as_fd)),
        pipe(&container.stdout),
        pipe(&container.stderr),
    ]
}

fn binds(container: &Container) -> Result<Vec<PathBuf>, WireError> {
    let path = container.dir.join(creator::SPEC_FILE);
    let failed = |e: &dyn std::fmt::Display| {
        let message = format!("can't read {}: {e}", path.display());
        wire_error(ErrorKind::Internal, message)
    };
    let text = std::fs::read(&path).map_err(|e| failed(&e))?;
    let spec: Spec = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
    let mounts = spec.mounts().iter().flatten();
    Ok(mounts
        .filter(|mount| is_bind(mount))
        .map(|mount| mount.destination().clone())
        .collect())
}
