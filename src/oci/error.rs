//! What can go wrong, in words that callers of OCI runtimes look for: containerd's shim and podman know "does not exist",
//! "container not running" and the kernel's own words.

use std::io;
use std::path::{Path, PathBuf};

use slipway_runtime::creator::CreateError;
use slipway_runtime::freezer::FreezeError;
use slipway_runtime::removal::RemovalError;
use slipway_runtime::resize::ResizeError;

use crate::hooks::HookError;
use crate::record::Status;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// A name that can't be a container's.
    #[error(
        "{0:?} can't be a container's id: it takes letters, digits and the characters _ + - . (not only dots), \
         1024 at most"
    )]
    Id(String),
    /// No such container.
    #[error("container {id:?} does not exist in {}", root.display())]
    NotFound {
        /// The id.
        id: String,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// The id is taken.
    #[error("container with id {id:?} exists already; delete it first ({})", dir.display())]
    Exists {
        /// The id.
        id: String,
        /// Its directory.
        dir: PathBuf,
    },
    /// The container is in a state in which this can't be done.
    #[error("can't {what} container {id:?}: it is {status}")]
    State {
        /// What was asked for.
        what: &'static str,
        /// The id.
        id: String,
        /// What it is.
        status: Status,
    },
    /// Nobody is there to get a signal.
    #[error("container not running: {id:?} is {status}")]
    NotRunning {
        /// The id.
        id: String,
        /// What it is.
        status: Status,
    },
    /// Another command works on the container.
    #[error("container {0:?} is busy: another command has worked on it for too long")]
    Busy(String),
    /// A container that was made without a process.
    #[error("container {0:?} can't be started: its config.json has no process")]
    NoProcess(String),
    /// A file.
    #[error("can't {step} {}", path.display())]
    File {
        /// What was attempted.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file with something else in it than JSON of its kind.
    #[error("{} is no {kind}: at {at}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// Where in it.
        at: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A specification that asks for what can't be, or isn't supported.
    #[error("config.json: {field}: {reason}")]
    Spec {
        /// Where.
        field: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// An argument.
    #[error("{option}: {reason}")]
    Argument {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The seccomp profile.
    #[error("config.json: linux.seccomp")]
    Seccomp(#[source] slipway_seccomp::SeccompError),
    /// The cgroup has others in it.
    #[error("cgroup {} is not empty: processes {pids:?} are in it; choose another linux.cgroupsPath", cgroup.display())]
    CgroupTaken {
        /// The cgroup.
        cgroup: PathBuf,
        /// Who is in it.
        pids: Vec<i32>,
    },
    /// The cgroup.
    #[error("can't {step} cgroup {}", cgroup.display())]
    Cgroup {
        /// What was attempted.
        step: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A step of the operating system's.
    #[error("can't {step}")]
    System {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The creator, or the container's init, told why it can't go on.
    #[error("can't {what} container {id:?}: {reason}")]
    Container {
        /// What was asked for.
        what: &'static str,
        /// The id.
        id: String,
        /// In its own words.
        reason: String,
    },
    /// The process of an exec could not be run.
    #[error("can't exec in container {id:?}: {reason}")]
    Exec {
        /// The id.
        id: String,
        /// In its own words.
        reason: String,
        /// What a shell would exit with.
        code: u8,
    },
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Taking a container apart.
    #[error(transparent)]
    Removal(#[from] RemovalError),
    /// New limits.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The freezer.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Making it.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A command that other runtimes have.
    #[error("{what} is not supported by this runtime; {instead}")]
    Unsupported {
        /// The command.
        what: &'static str,
        /// What can be done.
        instead: &'static str,
    },
}

impl OciError {
    /// A failed step on a file, for `map_err`.
    pub(crate) fn file(step: &'static str, path: impl AsRef<Path>) -> impl Fn(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File {
            step,
            path: path.clone(),
            source,
        }
    }

    /// A failed step, for `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::System {
            step,
            source: source.into(),
        }
    }

    /// One of the errors that making a container knows.
    pub(crate) fn from_create(error: impl Into<CreateError>) -> Self {
        Self::Create(error.into())
    }

    /// Something wrong with the specification.
    pub(crate) fn spec(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Spec {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// What the command exits with.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Exec { code, .. } => *code,
            _ => 1,
        }
    }
}
