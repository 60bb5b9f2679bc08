//! What can go wrong with a pod or a container, and what class of failure that is.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use slipway_proto::keeper::ErrorKind as KeeperKind;
use slipway_runtime::client::ClientError;

/// The class of a [`PodError`], named after the gRPC codes that `src/cri` maps it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request can never work.
    InvalidArgument,
    /// There is no such object.
    NotFound,
    /// The name belongs to another object.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// Disk, memory or a limit is exhausted.
    ResourceExhausted,
    /// It took too long.
    DeadlineExceeded,
    /// A later attempt may succeed.
    Unavailable,
    /// Not built yet, or not on this machine.
    Unimplemented,
    /// The image's failures have classes of their own.
    Image(slipway_image::ErrorKind),
    /// A defect or a failure of the machine.
    Internal,
}

/// A failure of an operation on pods and containers.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// No URL for a stream.
    #[error("can't give a URL for a stream")]
    Stream(#[source] slipway_stream::StreamError),
    /// No pod of this id.
    #[error("there is no pod sandbox {id:?}")]
    NoPod {
        /// The id as asked.
        id: String,
    },
    /// No container of this id.
    #[error("there is no container {id:?}")]
    NoContainer {
        /// The id as asked.
        id: String,
    },
    /// An abbreviated id that fits several objects.
    #[error("id {id:?} is ambiguous: it fits {matches} {what}s; give more of it")]
    Ambiguous {
        /// `pod sandbox` or `container`.
        what: &'static str,
        /// The id as asked.
        id: String,
        /// How many fit.
        matches: usize,
    },
    /// The name is held by an object that its client knows of, or by another request.
    #[error(
        "the {what} name {name:?} is taken by {what} {id}; remove that one or use another attempt number"
    )]
    NameTaken {
        /// `pod sandbox` or `container`.
        what: &'static str,
        /// The full name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// A request with a bad value.
    #[error("{0}")]
    Invalid(String),
    /// A configuration that can't become an OCI specification.
    #[error("can't assemble {what}")]
    Spec {
        /// The container or pod.
        what: String,
        /// The cause.
        #[source]
        source: slipway_spec::SpecError,
    },
    /// The pod is not ready.
    #[error("pod sandbox {id} is not ready ({state}); run a new one")]
    PodNotReady {
        /// The pod.
        id: String,
        /// What it is instead.
        state: &'static str,
    },
    /// The container is in another state than the call needs.
    #[error("container {id} is {state}, but {needs}")]
    WrongState {
        /// The container.
        id: String,
        /// What it is.
        state: &'static str,
        /// What the call needs, as a clause.
        needs: &'static str,
    },
    /// A pod without anything to be checkpointed.
    #[error("no container of pod sandbox {id} is running")]
    NothingRuns {
        /// The pod.
        id: String,
    },
    /// There is no checkpoint.
    #[error("there is no checkpoint {}", path.display())]
    NoCheckpoint {
        /// Where it should be.
        path: PathBuf,
    },
    /// A checkpoint that can't be used.
    #[error("the checkpoint {what} can't be restored: {reason}")]
    Checkpoint {
        /// Its path or image.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint whose image is not here.
    #[error(
        "the checkpoint {checkpoint} can't be restored: the image {image:?} that its container had is not here ({reason}); \
         pull or import it"
    )]
    NoBaseImage {
        /// Its path or image.
        checkpoint: String,
        /// The image.
        image: String,
        /// Why it could not be pulled.
        reason: String,
    },
    /// The handler is not configured.
    #[error("runtime handler {handler:?} is not configured; known are {known}")]
    UnknownHandler {
        /// As asked.
        handler: String,
        /// The names that would do.
        known: String,
    },
    /// The handler's runtime is missing or does not answer.
    #[error("runtime handler {handler:?} can't be used: {reason}; slipway check says what to do")]
    HandlerUnusable {
        /// The handler.
        handler: String,
        /// Why.
        reason: String,
    },
    /// A container with less memory than its runtime needs.
    #[error(
        "the memory limit of container {id}, {limit} bytes, is less than runtime handler {handler:?} can work with \
         (runtimes.{handler}.minimum_memory = {minimum} bytes)"
    )]
    TooLittleMemory {
        /// The container.
        id: String,
        /// Its limit.
        limit: i64,
        /// The handler.
        handler: String,
        /// The least.
        minimum: u64,
    },
    /// A user namespace where there can be none.
    #[error(
        "pod sandbox {id}: runtime handler {runtime:?} has no user namespaces {why}. \
         Run the pod without (hostUsers: true)"
    )]
    NoUserNamespaces {
        /// The pod's id.
        id: String,
        /// The handler.
        runtime: String,
        /// The end of a sentence.
        why: String,
    },
    /// A feature that is not there yet.
    #[error("{0}")]
    Unsupported(String),
    /// The keeper could not do it.
    #[error("can't {action} {what}")]
    Keeper {
        /// The verb.
        action: &'static str,
        /// Pod or container, with its id; what is tried again and again under new ids, with its name.
        what: String,
        /// The cause.
        #[source]
        source: ClientError,
    },
    /// An NRI plugin, or what plugins make of it together.
    #[error("can't {what}")]
    Plugin {
        /// The verb and the pod or container.
        what: String,
        /// The cause.
        #[source]
        source: slipway_nri::NriError,
    },
    /// The image.
    #[error("can't {action} image {image:?}")]
    Image {
        /// The verb.
        action: &'static str,
        /// The image.
        image: String,
        /// The cause.
        #[source]
        source: slipway_image::ImageError,
    },
    /// The network.
    #[error("can't {action} the network of pod sandbox {id}")]
    Network {
        /// The verb.
        action: &'static str,
        /// The pod.
        id: String,
        /// The cause.
        #[source]
        source: slipway_network::NetworkError,
    },
    /// A DNS setting or host name.
    #[error("the DNS settings of the pod can't be used")]
    Dns(#[source] slipway_network::DnsError),
    /// The seccomp profile.
    #[error("the seccomp profile {profile} of {container} can't be used")]
    Seccomp {
        /// The container, by its name.
        container: String,
        /// Its name or path.
        profile: String,
        /// The cause.
        #[source]
        source: slipway_seccomp::SeccompError,
    },
    /// A class of block I/O.
    #[error("{container} can't be in its block I/O class")]
    BlockIo {
        /// The container, by its name.
        container: String,
        /// The cause.
        #[source]
        source: super::block_io::BlockIoError,
    },
    /// A CDI device that is not known.
    #[error("{container} can't have its CDI devices")]
    Cdi {
        /// The container, by its name.
        container: String,
        /// The cause.
        #[source]
        source: slipway_cdi::CdiError,
    },
    /// A CDI device that this host does not have.
    #[error("{container} can't have its CDI devices")]
    CdiEdits {
        /// The container, by its name.
        container: String,
        /// The cause.
        #[source]
        source: slipway_cdi::EditsError,
    },
    /// A local file operation.
    #[error("can't {action} {}", path.display())]
    File {
        /// The verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A record that can't be read or written.
    #[error("the record {} can't be used: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An exec ran out of its time.
    #[error(
        "the command in container {id} did not end within {timeout:?} and was killed with all its children"
    )]
    ExecTimeout {
        /// The container.
        id: String,
        /// The limit.
        timeout: Duration,
    },
    /// The host did not answer while a container was being assembled.
    #[error(
        "{container} could not be assembled within {timeout:?}; a mount's source may be on a file system that does not answer"
    )]
    Hung {
        /// The container, by its name.
        container: String,
        /// The limit.
        timeout: Duration,
    },
    /// A process outlived SIGKILL.
    #[error(
        "container {id} did not end within {waited:?} of SIGKILL; a process of it may hang in the kernel (state D), see cgroup {cgroup}"
    )]
    Unkillable {
        /// The container.
        id: String,
        /// How long we waited.
        waited: Duration,
        /// Where its processes are.
        cgroup: String,
    },
    /// Several steps of an undoing failed; all were tried.
    #[error("{what} could not be undone completely: {}", problems.join("; "))]
    Incomplete {
        /// What was undone.
        what: String,
        /// Every failed step.
        problems: Vec<String>,
    },
    /// The failure of an operation that several callers waited for.
    #[error(transparent)]
    Shared(#[from] Arc<PodError>),
    /// A task of ours ended without a result.
    #[error(
        "{what} ended without a result; this is a defect of Slipway or the daemon is going down"
    )]
    Lost {
        /// The operation.
        what: &'static str,
    },
}

impl PodError {
    /// The class of this failure.
    pub fn class(&self) -> Class {
        match self {
            Self::NoPod { .. } | Self::NoContainer { .. } | Self::NoCheckpoint { .. } => {
                Class::NotFound
            }
            Self::Checkpoint { .. } => Class::InvalidArgument,
            Self::Ambiguous { .. } | Self::Invalid(_) | Self::Dns(_) | Self::Seccomp { .. } => {
                Class::InvalidArgument
            }
            Self::UnknownHandler { .. } | Self::TooLittleMemory { .. } => Class::InvalidArgument,
            Self::NameTaken { .. } => Class::AlreadyExists,
            Self::Spec { source, .. } => spec_class(source),
            Self::PodNotReady { .. }
            | Self::WrongState { .. }
            | Self::NothingRuns { .. }
            | Self::NoBaseImage { .. }
            | Self::NoUserNamespaces { .. }
            | Self::HandlerUnusable { .. }
            | Self::Plugin { .. } => Class::FailedPrecondition,
            Self::Unsupported(_) => Class::Unimplemented,
            Self::Cdi { source, .. } => match source {
                slipway_cdi::CdiError::Name(_) => Class::InvalidArgument,
                _ => Class::FailedPrecondition,
            },
            Self::CdiEdits { .. } | Self::BlockIo { .. } => Class::FailedPrecondition,
            Self::Keeper { source, .. } => keeper_class(source),
            Self::Image { source, .. } => Class::Image(source.kind()),
            Self::Network { source, .. } => match source {
                slipway_network::NetworkError::NotReady(_) => Class::Unavailable,
                slipway_network::NetworkError::Name(_) => Class::InvalidArgument,
                _ => Class::Internal,
            },
            Self::File { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    Class::ResourceExhausted
                }
                _ => Class::Internal,
            },
            Self::ExecTimeout { .. } | Self::Hung { .. } | Self::Unkillable { .. } => {
                Class::DeadlineExceeded
            }
            Self::Shared(error) => error.class(),
            Self::Stream(slipway_stream::StreamError::TooManyInFlight(_)) => {
                Class::ResourceExhausted
            }
            Self::Record { .. } | Self::Incomplete { .. } | Self::Lost { .. } => Class::Internal,
            Self::Stream(_) => Class::Internal,
        }
    }

    /// The error and its causes on one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn keeper_class(error: &ClientError) -> Class {
    match error.kind() {
        KeeperKind::NotFound => Class::NotFound,
        KeeperKind::AlreadyExists => Class::AlreadyExists,
        KeeperKind::Invalid => Class::InvalidArgument,
        KeeperKind::WrongState | KeeperKind::CannotRun => Class::FailedPrecondition,
        KeeperKind::Unsupported => Class::Unimplemented,
        KeeperKind::TimedOut => Class::DeadlineExceeded,
        KeeperKind::Internal => match error {
            ClientError::Gone { .. } => Class::Unavailable,
            _ => Class::Internal,
        },
    }
}

fn spec_class(error: &slipway_spec::SpecError) -> Class {
    use slipway_spec::SpecErrorKind;
    match error.kind() {
        SpecErrorKind::Invalid => Class::InvalidArgument,
        SpecErrorKind::Unsupported => Class::Unimplemented,
        SpecErrorKind::FailedPrecondition => Class::FailedPrecondition,
    }
}

/// Attaches the action and the path to an I/O error.
pub(crate) fn file(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(std::io::Error) -> PodError {
    let path = path.into();
    move |source| PodError::File {
        action,
        path,
        source,
    }
}
