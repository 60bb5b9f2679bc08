//! Making a container by its pod's shim: what the creator is for native ones ([`crate::creator`]), up to where that calls
//! libcontainer.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::Spec;
use slipway_proto::keeper::{CreateContainer, CreateContainerResult, ErrorKind};
use slipway_shim::{Create, OptionsError, Process, ShimError, Task};

use super::relay::{self, Terminal};
use super::{Running, Shim, enter, kind, text};
use crate::cgroup::Hierarchies;
use crate::creator;
use crate::oci::{self, PrepareError};

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// What precedes the shim's part.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The shim's options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The shim.
    #[error("runtime handler {handler:?}: can't {step}")]
    Shim {
        /// The handler.
        handler: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: Box<ShimError>,
    },
    /// The terminal.
    #[error("runtime handler {handler:?} created the container, but it gets no terminal")]
    Terminal {
        /// The handler.
        handler: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl CreateError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Prepare(error) => error.kind(),
            Self::Shim { source, .. } => kind(source),
            Self::Options(_) => ErrorKind::Invalid,
            Self::Terminal { .. } => ErrorKind::Internal,
        }
    }
}

/// What the job takes over from the keeper.
pub struct Inherited<'a> {
    /// The call.
    pub create: &'a CreateContainer,
    /// The host's cgroups.
    pub cgroups: &'a Hierarchies,
    /// The container's cgroup.
    pub cgroup: &'a Path,
    /// The shim's mount namespace.
    pub mounts: &'a OwnedFd,
    /// The FIFOs.
    pub streams: &'a Fifos,
    /// Where the master end of its terminal goes, if it is to have one.
    pub terminal: Option<OwnedFd>,
    /// Its place in the queue at the shim.
    pub turn: super::Turn,
    /// Path of the PID namespace to join instead of the spec's (mode TARGET).
    pub pid_namespace: Option<PathBuf>,
}

/// The FIFOs of a container's streams; an empty path is none.
#[derive(Debug, Clone, Default)]
pub struct Fifos {
    /// Standard input.
    pub stdin: PathBuf,
    /// Standard output; a terminal's.
    pub stdout: PathBuf,
    /// Standard error.
    pub stderr: PathBuf,
}

/// Creates the container. Runs in a job.
///
/// # Errors
/// [`CreateError`].
pub fn create(
    shim: &Shim,
    running: &Running,
    inherited: Inherited<'_>,
) -> Result<CreateContainerResult, CreateError> {
    let until = Instant::now() + shim.create_timeout;
    let create = inherited.create;
    let mut spec = oci::read(create)?;
    let dir = Path::new(&create.dir);

    let namespace = |e| PrepareError::from(creator::CreateError::Namespace(e));
    enter(inherited.mounts).map_err(namespace)?;
    let pid_namespace = inherited.pid_namespace.as_deref();
    let user = oci::prepare(&mut spec, &shim.handler, create, pid_namespace, None, true)?;
    annotate(&mut spec, shim);
    if create.tty
        && let Some(process) = spec.process_mut()
    {
        process.set_terminal(Some(true));
    }
    creator::write_spec(&dir.join("config.json"), &spec).map_err(PrepareError::from)?;

    match run(shim, running, inherited, dir, (user.uid, user.gid), until) {
        Ok(pid) => Ok(user.created(pid)),
        Err(CreateError::Shim { source, .. })
            if oci::command_failure(&source.to_string()).is_some() =>
        {
            // Found now, and told when the container is started, as by those who find it then.
            Ok(CreateContainerResult {
                cannot_run: source.to_string(),
                ..user.created(0)
            })
        }
        Err(error) => Err(error),
    }
}

fn run(
    shim: &Shim,
    running: &Running,
    inherited: Inherited<'_>,
    dir: &Path,
    owner: (u32, u32),
    until: Instant,
) -> Result<i32, CreateError> {
    let create = inherited.create;
    let failed = |step: &'static str| {
        move |source: ShimError| CreateError::Shim {
            handler: shim.handler.clone(),
            step,
            source: source.into(),
        }
    };
    let left = || until.saturating_duration_since(Instant::now());
    let options = shim.options(create.systemd, owner)?;
    // It says where the pod's shim is, or starts another that belongs to it.
    let address = shim
        .program
        .start(&create.id, dir, options.as_ref(), left())
        .map_err(failed("find the pod's shim"))?;
    let mut task =
        Task::connect(&address, super::CONNECT).map_err(failed("call the pod's shim"))?;
    if address.socket != running.address.socket {
        let _ = task.shutdown(&create.id, true, super::CONNECT);
        return Err(failed("find the pod's shim")(ShimError::Protocol {
            method: "start".to_owned(),
            problem: format!(
                "it started another shim, at {}, and did not take the one at {}",
                address.socket, running.address.socket
            ),
        }));
    }
    let (bundle, streams) = (text(dir), inherited.streams);
    let paths = [&streams.stdin, &streams.stdout, &streams.stderr].map(|p| text(p));
    let call = Create {
        id: &create.id,
        bundle: &bundle,
        rootfs: Vec::new(),
        terminal: create.tty,
        stdin: &paths[0],
        stdout: &paths[1],
        stderr: &paths[2],
    };
    // Its streams are open before the shim opens them, so that it never waits.
    let terminal = match &inherited.terminal {
        None => None,
        Some(socket) => {
            let no_terminal = |source| CreateError::Terminal {
                handler: shim.handler.clone(),
                source,
            };
            let terminal = Terminal::open(&streams.stdin, &streams.stdout).map_err(no_terminal)?;
            Some((terminal, socket))
        }
    };
    super::turn_of(&inherited.turn, "Create", until, shim.create_timeout)
        .map_err(failed("create the container"))?;
    let pid = task
        .create(&call, options.as_ref(), left())
        .map_err(failed("create the container"))?;
    drop(inherited.turn);
    if let Some((terminal, socket)) = terminal {
        let process = Process::init(&create.id);
        relay::leave(terminal, socket, running, process).map_err(|source| {
            CreateError::Terminal {
                handler: shim.handler.clone(),
                source,
            }
        })?;
    }
    // A virtual machine's is not the container's, and must never get its signals.
    let pid = i32::try_from(pid).unwrap_or(0);
    let here = inherited.cgroups.pids(inherited.cgroup).contains(&pid);
    Ok(if here { pid } else { 0 })
}

/// What tells a shim that containers belong together, in the words of containerd and of CRI-O.
fn annotate(spec: &mut Spec, shim: &Shim) {
    let mut all = spec.annotations().clone().unwrap_or_default();
    for (key, value) in [
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri.sandbox-id", &shim.pod),
        ("io.kubernetes.cri-o.ContainerType", "container"),
        ("io.kubernetes.cri-o.SandboxID", &shim.pod),
    ] {
        all.insert(key.to_owned(), value.to_owned());
    }
    spec.set_annotations(Some(all));
}
