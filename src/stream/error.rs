//! What can go wrong with a stream.

use std::path::PathBuf;
use thiserror::Error;

/// Why a URL was not given, the server did not start, or a session failed.
///
/// The text of an error that a [`Backend`](crate::Backend) returns is shown to the person at the
/// other end of the session.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The request contradicts itself or lacks something.
    #[error("{0}")]
    InvalidRequest(String),
    /// More URLs were asked for than may wait to be used.
    #[error(
        "maximum number of in-flight requests exceeded: {0} streaming URLs wait to be used; each one lapses unless it is used soon"
    )]
    TooManyInFlight(usize),
    /// There is no such container or pod.
    #[error("{0}")]
    NotFound(String),
    /// The container or pod is not in a state to be streamed with.
    #[error("{0}")]
    NotRunning(String),
    /// The backend failed.
    #[error("{0}")]
    Failed(String),
    /// The operating system has no random numbers to make a token of.
    #[error("cannot make a streaming token")]
    Random(#[source] getrandom::Error),
    /// The server's address can't be listened on.
    #[error("cannot listen for streaming connections on {address}")]
    Listen {
        /// The configured address.
        address: std::net::SocketAddr,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A certificate or key can't be read or used.
    #[error("cannot serve streams with TLS: {}: {reason}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("stream input or output failed")]
    Io(#[from] std::io::Error),
}
