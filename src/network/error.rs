//! What can go wrong between a pod and its network.

use crate::attachment::RecordError;
use crate::name::NameError;
use crate::plugin::{PluginError, Verb};
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// One plugin's failure, with all that an operator needs to find it.
#[derive(Debug, Error)]
#[error("CNI {} by plugin {plugin:?} of network {network:?} ({}) failed", verb.as_str(), file.display())]
pub struct StepError {
    /// What was asked.
    pub verb: Verb,
    /// The plugin's type.
    pub plugin: String,
    /// The network's name.
    pub network: String,
    /// The network's configuration file.
    pub file: PathBuf,
    /// What the plugin did instead.
    #[source]
    pub source: PluginError,
}

/// Failures of a walk that goes on after a failure.
#[derive(Debug)]
pub struct StepErrors(pub Vec<StepError>);

impl StepErrors {
    pub(crate) fn none_or(errors: Vec<StepError>) -> Result<(), Self> {
        if errors.is_empty() {
            Ok(())
        } else {
            Err(Self(errors))
        }
    }
}

impl std::error::Error for StepErrors {}

impl fmt::Display for StepErrors {
    /// Several errors have no single chain, so each one is written out with its causes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { "; " };
            write!(f, "{separator}{}", Chain(error))?;
        }
        Ok(())
    }
}

/// An error and its causes on one line.
pub(crate) struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Why a pod could not be attached, detached or checked.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// No network is configured.
    #[error("the pod network is not ready: {0}")]
    NotReady(String),
    /// A name that must not reach a plugin.
    #[error("the pod can't be attached to the network as it is named")]
    Name(#[from] NameError),
    /// A namespace's path that can't be passed to a plugin.
    #[error("the network namespace {} can't be passed to a plugin: its path must be absolute and UTF-8", .0.display())]
    Netns(PathBuf),
    /// The pod is attached already.
    #[error("pod {0} is attached to the network already: detach it before it is attached anew")]
    AlreadyAttached(String),
    /// There is no complete attachment to check.
    #[error("pod {0} is not attached to the network")]
    NotAttached(String),
    /// ADD failed. What had been done was undone, unless `cleanup` says otherwise; then the
    /// attachment stays on record, so that a later [`del`](crate::Cni::del) tries again.
    #[error("cannot attach pod {id} to the network{}", undone(cleanup.as_ref()))]
    Attach {
        /// The pod.
        id: String,
        /// The failed step.
        #[source]
        source: Box<StepError>,
        /// What failed while undoing.
        cleanup: Option<StepErrors>,
    },
    /// The plugins said that all is well, and gave the pod no address. It stays on record for a
    /// [`del`](crate::Cni::del).
    #[error(
        "network {networks} gave pod {id} no address on its interface {ifname}: \
         see what its plugins answer to ADD, and its \"ipam\""
    )]
    NoAddress {
        /// The pod.
        id: String,
        /// The networks' names.
        networks: String,
        /// The interface that addresses were looked for on.
        ifname: String,
    },
    /// One or more steps of DEL failed; all others were run. The attachment stays on record.
    #[error("cannot detach pod {id} from the network")]
    Detach {
        /// The pod.
        id: String,
        /// Every failed step.
        #[source]
        source: StepErrors,
    },
    /// CHECK found the attachment damaged.
    #[error("the network attachment of pod {id} is not as it should be")]
    Check {
        /// The pod.
        id: String,
        /// Every failed step.
        #[source]
        source: StepErrors,
    },
    /// Garbage collection failed in part.
    #[error("cannot collect the network's garbage: {}", .0.join("; "))]
    Gc(Vec<String>),
    /// The record of an attachment could not be kept.
    #[error("cannot keep the record of pod {id}'s network attachment")]
    Record {
        /// The pod.
        id: String,
        /// The cause.
        #[source]
        source: Box<RecordError>,
    },
    /// The work was cut off, as the daemon is going down.
    #[error("the network operation was cut off before its end")]
    CutOff(#[source] tokio::task::JoinError),
}

fn undone(cleanup: Option<&StepErrors>) -> String {
    cleanup.map_or_else(String::new, |e| {
        format!(" (and undoing what was done failed too: {e})")
    })
}
