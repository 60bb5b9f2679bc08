//! What can go wrong with a shim.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a shim could not be started or called.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The program can't be executed.
    #[error("can't run the shim {}; see slipway check", program.display())]
    NotRun {
        /// The program.
        program: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The program failed.
    #[error(
        "{} {command} failed with {status}{}",
        program.display(),
        if said.is_empty() { " and said nothing".to_owned() } else { format!(": {said}") }
    )]
    Failed {
        /// The program.
        program: PathBuf,
        /// Its command.
        command: &'static str,
        /// How it ended.
        status: String,
        /// Its own words; may be empty.
        said: String,
    },
    /// The program did not end in time.
    #[error(
        "{} {command} did not end within {timeout:?} and was killed{}",
        program.display(),
        if said.is_empty() { String::new() } else { format!("; it said: {said}") }
    )]
    Hangs {
        /// The program.
        program: PathBuf,
        /// Its command.
        command: &'static str,
        /// How long it had.
        timeout: Duration,
        /// Its own words; may be empty.
        said: String,
    },
    /// The program's answer is not one.
    #[error("{} {command} answered {answer:?}, {problem}", program.display())]
    Answer {
        /// The program.
        program: PathBuf,
        /// Its command.
        command: &'static str,
        /// What it said, shortened.
        answer: String,
        /// What is wrong with that.
        problem: String,
    },
    /// There is nobody at the address.
    #[error("can't connect to the shim at {address}")]
    Connect {
        /// The address.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error(
        "the shim closed the connection while {method} was waited for: it has ended, or crashed"
    )]
    Closed {
        /// The call.
        method: String,
    },
    /// The connection failed.
    #[error("can't call {method} of the shim")]
    Connection {
        /// The call.
        method: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No answer came.
    #[error("the shim did not answer {method} within {timeout:?}")]
    TimedOut {
        /// The call.
        method: String,
        /// How long it had.
        timeout: Duration,
    },
    /// The shim says no.
    #[error("{message}")]
    Refused {
        /// The call.
        method: String,
        /// The code, of gRPC's.
        code: i32,
        /// The shim's words.
        message: String,
    },
    /// What came is no message of the protocol's.
    #[error("the shim answered {method} with something that can't be read: {problem}")]
    Protocol {
        /// The call.
        method: String,
        /// What is wrong.
        problem: String,
    },
}

impl ShimError {
    /// Whether the shim does not know what it was asked for: a container, or a whole service.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 5, .. })
    }

    /// Whether the shim does not have the call, or the whole service. Go's server says so by UNIMPLEMENTED, the Rust one by
    /// INVALID_ARGUMENT or NOT_FOUND with the path.
    pub fn is_unimplemented(&self) -> bool {
        match self {
            Self::Refused { code: 12, .. } => true,
            Self::Refused {
                code: 3 | 5,
                message,
                ..
            } => [
                "does not exist",
                "not supported",
                "not implemented",
                "unknown service",
            ]
            .iter()
            .any(|words| message.contains(words)),
            _ => false,
        }
    }

    /// Whether time ran out.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::TimedOut { .. } | Self::Hangs { .. } | Self::Refused { code: 4, .. }
        )
    }

    /// Whether nobody answers any more.
    pub fn is_gone(&self) -> bool {
        matches!(
            self,
            Self::Closed { .. } | Self::Connect { .. } | Self::Connection { .. }
        )
    }
}
