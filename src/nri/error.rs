//! What goes wrong with plugins, and what that means for the operation at hand.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// What an [`NriError`] means for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NriErrorKind {
    /// A plugin or a validator refused, or plugins contradict each other: the operation fails.
    Refused,
    /// The plugin does not keep to the protocol or does not answer; it is left out from now on.
    Broken,
    /// A setting, a directory or a socket.
    Setup,
}

/// A failure of a plugin, or of what it asks.
#[derive(Debug, thiserror::Error)]
pub enum NriError {
    /// The connection is gone.
    #[error("the connection to the plugin is closed")]
    Closed,
    /// The other side does not speak the protocol.
    #[error("the plugin breaks the protocol: {0}")]
    Protocol(String),
    /// No answer in time.
    #[error("no answer to {method} within {timeout:?}")]
    Timeout {
        /// The call.
        method: &'static str,
        /// The limit.
        timeout: Duration,
    },
    /// The plugin's own answer.
    #[error("NRI plugin {plugin} failed {method}: {message} (code {code})")]
    Answer {
        /// Who.
        plugin: String,
        /// The call.
        method: &'static str,
        /// gRPC code.
        code: i32,
        /// In its words.
        message: String,
    },
    /// Two plugins want different things.
    #[error(
        "NRI plugins {first} and {second} both set {field} of container {container}; only one of them may"
    )]
    Conflict {
        /// Who was first.
        first: String,
        /// Who came later.
        second: String,
        /// What.
        field: String,
        /// Whose.
        container: String,
    },
    /// A plugin asks for what makes no sense.
    #[error("NRI plugin {plugin}: {what}")]
    Senseless {
        /// Who.
        plugin: String,
        /// What.
        what: String,
    },
    /// A validator said no.
    #[error("the adjustments of container {container} were rejected by {validator}: {reason}")]
    Rejected {
        /// The container.
        container: String,
        /// Who.
        validator: String,
        /// In its words.
        reason: String,
    },
    /// A name or index that can't be.
    #[error("{0}")]
    Name(String),
    /// A message that is too long even in parts.
    #[error("{what} takes {length} bytes, more than a message may have ({limit})")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its size.
        length: usize,
        /// The most.
        limit: usize,
    },
    /// A file or socket.
    #[error("can't {action} {}", path.display())]
    File {
        /// The verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something that is no socket is there.
    #[error(
        "can't listen at {}: it is no socket; remove it, or set nri.socket_path to another path", path.display()
    )]
    NoSocket {
        /// What is there.
        path: PathBuf,
    },
    /// Another runtime listens there.
    #[error(
        "can't listen at {}: another runtime does; stop it, set nri.socket_path to another path, or \
         nri.connections to false", path.display()
    )]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// The node never came to rest for long enough to show it to a new plugin.
    #[error("the node was busy for {0:?}; connect again")]
    Busy(Duration),
}

impl NriError {
    /// What this means for the operation at hand.
    pub fn kind(&self) -> NriErrorKind {
        match self {
            Self::Closed | Self::Protocol(_) | Self::Timeout { .. } => NriErrorKind::Broken,
            Self::File { .. }
            | Self::NoSocket { .. }
            | Self::Taken { .. }
            | Self::Name(_)
            | Self::Busy(_) => NriErrorKind::Setup,
            _ => NriErrorKind::Refused,
        }
    }
}

/// Attaches action and path.
pub(crate) fn file(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> NriError {
    let path = path.into();
    move |source| NriError::File {
        action,
        path,
        source,
    }
}
