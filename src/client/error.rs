//! What can go wrong in the client.
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::quantity::QuantityError;

/// A command's failure. Outer texts don't repeat their source; [`report`] prints the whole chain.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The endpoint's text can't be used.
    #[error("'{0}' is not an endpoint: write unix:///run/slipway/slipway.sock or a path")]
    Endpoint(String),
    /// Nobody answers at the endpoint.
    #[error(
        "cannot connect to the runtime at {endpoint}: is it running (slipway serve)? \
         Another socket is named with --runtime-endpoint or CONTAINER_RUNTIME_ENDPOINT"
    )]
    Connect {
        /// The endpoint as used.
        endpoint: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The endpoint didn't answer in time.
    #[error("the runtime at {endpoint} took the connection but did not answer within {limit:?}")]
    ConnectTimeout {
        /// The endpoint as used.
        endpoint: String,
        /// The deadline.
        limit: Duration,
    },
    /// An RPC was answered with an error.
    #[error("{call}: {:?}: {}", status.code(), status.message())]
    Rpc {
        /// Name of the RPC.
        call: &'static str,
        /// The answer. Not a source: its text is part of this one.
        status: Box<tonic::Status>,
    },
    /// An answer lacks something that the CRI requires.
    #[error("{call}: the runtime's answer lacks {what}")]
    Answer {
        /// Name of the RPC.
        call: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// No pod, container or image of that name.
    #[error("there is no {kinds} '{id}' (see slipway ps -a, slipway pods and slipway images)")]
    NotFound {
        /// What was looked for, as a phrase.
        kinds: &'static str,
        /// The id or name.
        id: String,
    },
    /// More than one object fits.
    #[error("'{id}' fits {count} objects: write more of the id")]
    Ambiguous {
        /// The id or name.
        id: String,
        /// How many fit.
        count: usize,
    },
    /// The container or pod runs, and removing it wasn't forced.
    #[error("{0} is running: stop it first, or remove it with --force")]
    Running(String),
    /// Something on the command line can't be used.
    #[error("{0}")]
    Usage(String),
    /// An amount on the command line can't be used.
    #[error(transparent)]
    Quantity(#[from] QuantityError),
    /// A file or directory of ours.
    #[error("{what} {}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A system facility.
    #[error("{what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Standard output or error can't be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    /// The image is absent and pulling wasn't allowed.
    #[error("image {0} is not present, and --pull never forbids pulling it")]
    ImageAbsent(String),
    /// The user or the system asked us to end.
    #[error("interrupted by {0}")]
    Interrupted(&'static str),
    /// Several objects of one command failed; each has been reported already.
    #[error("{0} of {1} failed")]
    Some(usize, usize),
    /// A benchmark's helper process.
    #[error("the {what} benchmark's helper failed: {message}")]
    Helper {
        /// Which.
        what: String,
        /// What it said.
        message: String,
    },
    /// A defect of ours.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ClientError {
    /// Whether the reader of our output went away, which is no failure worth a message.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, ClientError::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }

    /// The gRPC code, when a runtime answered with one.
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            ClientError::Rpc { status, .. } => Some(status.code()),
            _ => None,
        }
    }
}

/// The error with its chain of causes, on one line.
pub fn report(error: &ClientError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their source's text; once is enough.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
