//! What can go wrong with an image, and what kind of failure that is for the caller.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The class of an [`ImageError`], so that a caller can map it to its own status codes in one place.
///
/// The names follow the gRPC status codes, because the CRI is where these errors end up, but this
/// crate does not depend on gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is wrong: a reference that does not parse, a layer that tries to escape.
    InvalidArgument,
    /// The image, or the platform of it, does not exist.
    NotFound,
    /// The registry wants credentials, or refused the ones it was given.
    Unauthenticated,
    /// The registry knows who asks and refuses.
    PermissionDenied,
    /// The registry cannot be reached or does not behave like one; a later attempt may succeed.
    Unavailable,
    /// What arrived is not what was announced: wrong digest, wrong length, broken archive.
    DataLoss,
    /// The disk is full or a bound was exceeded.
    ResourceExhausted,
    /// The image is in use, or of a form that cannot be run here.
    FailedPrecondition,
    /// The work was called off.
    Cancelled,
    /// A local failure: the file system or the metadata store.
    Internal,
}

/// A failure of an image operation. It is cheap to clone, because concurrent pulls of one image
/// share their result.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// No image of this name or id is in the store.
    #[error("image {name:?} is not present; pull or import it first")]
    NotFound {
        /// The name or id that was looked for.
        name: String,
    },
    /// The reference is not of the form `[host[:port]/]path[:tag][@digest]`.
    #[error("image reference {reference:?} is not valid: {reason}")]
    InvalidReference {
        /// The text that was given.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The registry answered that it has no such repository, tag, digest or blob.
    #[error("registry {host} has no {what}")]
    Absent {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The registry wants (other) credentials.
    #[error(
        "registry {host} refused access to {what}: {reason}; check the credentials for this registry"
    )]
    Unauthorized {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The registry's words.
        reason: String,
    },
    /// The registry understood who asks and refuses.
    #[error(
        "registry {host} denies access to {what}: {reason}; the account lacks the permission to pull it"
    )]
    Denied {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The registry's words.
        reason: String,
    },
    /// The credentials themselves can't be used.
    #[error("the credentials for registry {host} can't be used: {reason}")]
    BadCredentials {
        /// The registry.
        host: String,
        /// What is wrong with them; never the secret itself.
        reason: String,
    },
    /// No answer from the registry.
    #[error(
        "registry {host} can't be reached for {what}; check its address, the network and the proxy settings"
    )]
    Unreachable {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The cause.
        #[source]
        source: Arc<reqwest::Error>,
    },
    /// An answer that is no registry's, or one that says that the registry is ill.
    #[error("registry {host} gave a bad answer for {what}: {reason}")]
    BadResponse {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with the answer.
        reason: String,
        /// The answer's HTTP status, where that is what is wrong.
        status: Option<u16>,
    },
    /// A document larger than this store accepts.
    #[error("{what} is larger than the {limit} bytes that are accepted")]
    TooLarge {
        /// What was read.
        what: String,
        /// The bound, in bytes.
        limit: u64,
    },
    /// The content's digest is not the one it was asked for by.
    #[error(
        "{what} has digest {actual}, not {expected}; its source is damaged or lying, nothing of it was kept"
    )]
    DigestMismatch {
        /// What was read.
        what: String,
        /// The digest that was asked for.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// The content's length is not the announced one.
    #[error(
        "{what} has {actual} bytes, not the {expected} that its manifest says; nothing of it was kept"
    )]
    SizeMismatch {
        /// What was read.
        what: String,
        /// The announced length, in bytes.
        expected: u64,
        /// The length that came or was announced otherwise, in bytes.
        actual: u64,
    },
    /// A form of image that is not supported.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The image or document.
        what: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// An artifact where an image is needed.
    #[error(
        "it is an OCI artifact of type {kind:?}, which holds files and nothing to be run; mount it as an image volume"
    )]
    Artifact {
        /// Its type.
        kind: String,
    },
    /// A multi-platform image without this node's platform.
    #[error("{what} has no image for platform {platform}, only for {available}")]
    NoPlatform {
        /// The image.
        what: String,
        /// This node's platform.
        platform: String,
        /// The platforms it has.
        available: String,
    },
    /// A manifest, index or configuration that makes no sense.
    #[error("{what} is malformed: {reason}")]
    Malformed {
        /// The document.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A layer that tries to reach outside of its root, or holds what may not be unpacked.
    #[error("layer {layer} is refused because of its entry {entry:?}: {reason}")]
    LayerRefused {
        /// The layer's digest.
        layer: String,
        /// The entry's name in the archive.
        entry: String,
        /// Why.
        reason: String,
    },
    /// A layer whose archive or compression is broken.
    #[error("layer {layer} can't be unpacked: {reason}")]
    LayerCorrupt {
        /// The layer's digest.
        layer: String,
        /// What is wrong.
        reason: String,
    },
    /// A system call on an entry of a layer failed.
    #[error("layer {layer}: can't create entry {entry:?}")]
    LayerIo {
        /// The layer's digest.
        layer: String,
        /// The entry's name in the archive.
        entry: String,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// An archive or layout to import that is neither of the known forms.
    #[error("{} can't be imported: {reason}", path.display())]
    BadArchive {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A local file operation failed.
    #[error("can't {action} {}", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Arc<io::Error>,
    },
    /// The metadata store failed.
    #[error("can't {action} the image metadata in {}", path.display())]
    Database {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The store's file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Arc<redb::Error>,
    },
    /// A setting that can't be used.
    #[error("image configuration: {reason}")]
    Config {
        /// What is wrong and where.
        reason: String,
    },
    /// Containers use the image.
    #[error("image {id} is in use by {users} container(s); remove them first")]
    InUse {
        /// The image's id.
        id: String,
        /// How many leases are held.
        users: usize,
    },
    /// The pull was called off.
    #[error("the pull of {reference} was cancelled")]
    Cancelled {
        /// The image.
        reference: String,
    },
    /// A task of ours ended without a result; that is a defect.
    #[error("{what} ended without a result; this is a defect of Slipway")]
    Lost {
        /// The work.
        what: String,
    },
}

impl ImageError {
    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::Absent { .. } | Self::NoPlatform { .. } => {
                ErrorKind::NotFound
            }
            Self::InvalidReference { .. }
            | Self::LayerRefused { .. }
            | Self::BadArchive { .. }
            | Self::BadCredentials { .. } => ErrorKind::InvalidArgument,
            Self::Unauthorized { .. } => ErrorKind::Unauthenticated,
            Self::Denied { .. } => ErrorKind::PermissionDenied,
            Self::Unreachable { .. } | Self::BadResponse { .. } => ErrorKind::Unavailable,
            Self::DigestMismatch { .. }
            | Self::SizeMismatch { .. }
            | Self::Malformed { .. }
            | Self::LayerCorrupt { .. } => ErrorKind::DataLoss,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Unsupported { .. } | Self::Artifact { .. } | Self::InUse { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::LayerIo { source, .. } | Self::Io { source, .. } => io_kind(source),
            Self::Database { source, .. } => match source.as_ref() {
                redb::Error::Io(source) => io_kind(source),
                _ => ErrorKind::Internal,
            },
            Self::Config { .. } => ErrorKind::FailedPrecondition,
            Self::Lost { .. } => ErrorKind::Internal,
        }
    }

    /// An [`ImageError::Io`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_path_buf(),
            source: Arc::new(source),
        }
    }

    /// The error and its causes in one line, for logs and for status messages.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// A full disk or quota is a matter of resources, whatever the system call was.
fn io_kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ErrorKind::ResourceExhausted
        }
        _ => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_resource_exhausted() {
        let full = io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let error = ImageError::io("write", Path::new("/x"), full);
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(error.chain().contains("No space left"), "{}", error.chain());
    }
}
