//! Containers that a command-line runtime of others makes: runc, crun, youki, runsc, by the arguments that they all
//! have (`liboci-cli` names them).
//!
//! The keeper supervises them as its own: it is the subreaper, so a container's init becomes its child when the runtime
//! has ended; it holds the streams, and its cgroup is the one that the spec names. A runtime's command runs in
//! a forked job, never in the keeper itself, and always has a deadline ([`command`]).
//!
//! ```text
//! keeper --fork--> job --fork--> RUNTIME --root R --log F --log-format json create --bundle B --pid-file P ID
//!                   |               \-- init (becomes the keeper's child)
//!                   \-- mounts the root file system in a mount namespace of its own, writes the bundle
//! ```

mod attendant;
mod bundle;
mod command;
mod create;
mod exec;
mod inside;
mod prepare;
mod sandbox;
mod words;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use slipway_proto::keeper::{ErrorKind, Runtime as Settings};

use crate::cgroup::Hierarchies;
use crate::removal::{self, RemovalError};
use crate::shim::sandbox_cgroup;

pub use attendant::start as start_attended;
use command::Call;
pub use command::{CommandError, short_path};
pub use create::{Inherited, create};
pub use exec::{ExecError, Session, descriptors, exec, inner_file, process};
pub use inside::kill_tree as kill_inside;
pub use prepare::{PrepareError, prepare, read};
pub use sandbox::{end as end_sandbox, start as start_sandbox};
pub use words::{beyond, command_failure, of as words, of_command, says_paused};

/// How long `delete --force` may take before the container is removed without it. All of a pod's share it, so that
/// a runtime that hangs does not hold up its pod's end: less than limits.delete_timeout.
pub const DELETE: Duration = Duration::from_secs(10);
/// How long `kill` may take before the signal is sent without it: less than a caller waits for an answer.
pub const KILL: Duration = Duration::from_secs(4);
/// How long `start` may take: less than limits.start_timeout.
pub const START: Duration = Duration::from_secs(25);
/// Likewise, for `update`.
pub const UPDATE: Duration = Duration::from_secs(20);
/// How long `exec` may take to start a command.
pub const EXEC: Duration = Duration::from_secs(60);

/// A runtime of others.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// The handler's name, for messages.
    pub handler: String,
    path: PathBuf,
    root: PathBuf,
    arguments: Vec<String>,
    /// What its containers of the pod share, if it makes such a thing.
    pub sandbox: Option<PodSandbox>,
    /// It is youki, which wants some things said otherwise.
    pub youki: bool,
    /// How long a create may take.
    pub create_timeout: Duration,
}

impl Runtime {
    /// As the daemon describes it, for a pod.
    pub fn new(settings: &Settings, pod: &Pod<'_>) -> Self {
        let root = PathBuf::from(&settings.root);
        let sandbox = settings.pod_sandbox.then(|| PodSandbox {
            id: pod.id.to_owned(),
            cgroup: pod.cgroup.join(sandbox_cgroup(pod.id, pod.systemd)),
        });
        Self {
            handler: settings.handler.clone(),
            path: PathBuf::from(&settings.path),
            // Of its own, so that what is left of it goes with the pod.
            root: match &sandbox {
                Some(sandbox) => root.join(&sandbox.id),
                None => root,
            },
            arguments: settings.arguments.clone(),
            sandbox,
            youki: settings.youki,
            create_timeout: Duration::from_millis(settings.create_timeout_ms.max(1)),
        }
    }

    /// Removes a container, by force: every process is killed, the runtime is told to delete what it knows of it, and
    /// then its cgroup and what is left of its state are removed, whatever the runtime did. Runs in a job.
    ///
    /// # Errors
    /// [`RemovalError`]; never what the runtime says, without which it works as well.
    pub fn remove(
        &self,
        cgroups: &Hierarchies,
        container: &Removed<'_>,
        until: Instant,
    ) -> Result<(), RemovalError> {
        let Removed {
            id,
            dir,
            cgroup,
            init,
        } = container;
        removal::kill_cgroup(cgroups, cgroup, init)?;
        let call = Call::new(&["delete", "--force", id], dir, until);
        let deleted = command::run(self, cgroups, call);
        if let (Err(_), Some(sandbox)) = (deleted, &self.sandbox) {
            // What runs in a sandbox that does not obey is ended with all of it.
            removal::kill_cgroup(cgroups, &sandbox.cgroup, &[])?;
        }
        // It may have begun anew what it should end.
        removal::kill_cgroup(cgroups, cgroup, &[])?;
        removal::remove_cgroup(cgroups, cgroup)?;
        let Some(state) = self.state_of(id) else {
            return Ok(());
        };
        match std::fs::remove_dir_all(&state) {
            Err(source) if !is_gone(&source) => Err(RemovalError::Directory {
                path: state,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Where a container's state is, in runc, crun and youki. A runtime with a sandbox has a root for each pod.
    fn state_of(&self, id: &str) -> Option<PathBuf> {
        // An id is one component; anything else must not lead elsewhere.
        let plain = !id.is_empty() && !id.contains('/') && id != "." && id != "..";
        plain.then(|| self.root.join(id))
    }
}

/// A pod, for its runtime.
pub struct Pod<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its cgroup.
    pub cgroup: &'a Path,
    /// That one is a slice of systemd's.
    pub systemd: bool,
}

/// What the containers of a pod run in, where a runtime makes one for all of them.
#[derive(Debug, Clone)]
pub struct PodSandbox {
    /// Its id, which is the pod's.
    pub id: String,
    /// The cgroup of all its processes, whichever container they serve.
    pub cgroup: PathBuf,
}

/// A container to be removed.
pub struct Removed<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its run directory.
    pub dir: &'a Path,
    /// Its cgroup.
    pub cgroup: &'a Path,
    /// Its init, if it is known.
    pub init: &'a [std::os::fd::OwnedFd],
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Runs a command that has no more to it than its arguments. Runs in a job.
///
/// # Errors
/// [`CommandError`].
pub fn simple(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    args: &[&str],
    dir: &Path,
    timeout: Duration,
) -> Result<(), CommandError> {
    command::run(
        runtime,
        cgroups,
        Call::new(args, dir, Instant::now() + timeout),
    )
}

/// Tells a runtime of limits that the container's cgroup has already: its own record is to agree, and one that is not a
/// cgroup's matter alone (a virtual machine's) has to act. Runs in a job.
///
/// # Errors
/// [`CommandError`].
pub fn update(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    id: &str,
    dir: &Path,
    resources: &LinuxResources,
) -> Result<(), CommandError> {
    let told = tell(runtime, cgroups, id, dir, resources);
    let unlimited = resources.cpu().as_ref().and_then(|cpu| cpu.quota());
    if told.is_err() && unlimited.is_some_and(|quota| quota < 0) {
        // crun 1.8 can't write the number that lifts a quota on v1, where it is lifted already. (One that keeps the old
        // quota has to hear of it.)
        let mut others = resources.clone();
        let mut cpu = others.cpu().clone().unwrap_or_default();
        cpu.set_quota(None);
        others.set_cpu(Some(cpu));
        return tell(runtime, cgroups, id, dir, &others);
    }
    told
}

fn tell(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    id: &str,
    dir: &Path,
    resources: &LinuxResources,
) -> Result<(), CommandError> {
    let path = dir.join(format!("update-{}.json", std::process::id()));
    let text = serde_json::to_vec(resources).unwrap_or_default();
    if let Err(source) = std::fs::write(&path, text) {
        return Err(CommandError::Around {
            handler: runtime.handler.clone(),
            step: "write the new limits",
            source,
        });
    }
    let file = path.to_string_lossy();
    let told = simple(
        runtime,
        cgroups,
        &["update", "--resources", &file, id],
        dir,
        UPDATE,
    );
    let _ = std::fs::remove_file(&path);
    told
}

impl CommandError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TimedOut { .. } | Self::Shim { late: true, .. } => ErrorKind::TimedOut,
            _ => ErrorKind::Internal,
        }
    }
}
