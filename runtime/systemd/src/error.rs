//! What goes wrong between us and systemd.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why systemd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// PID 1 is something else.
    #[error("systemd is not PID 1 of this machine; set cgroup.driver to \"cgroupfs\"")]
    NotRunning,
    /// Nothing answers on the sockets that systemd listens on.
    #[error("can't reach systemd at {} to {action} {unit}", address.display())]
    Connect {
        /// `start`, `stop`, ...
        action: &'static str,
        /// The unit that it was about.
        unit: String,
        /// The last socket that was tried.
        address: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The answer, or the end of the job, did not come in time.
    #[error(
        "systemd did not {action} {unit} within {waited:?} (asked at {}); see systemctl list-jobs",
        address.display()
    )]
    Timeout {
        /// What was asked.
        action: &'static str,
        /// Of which unit.
        unit: String,
        /// The socket that was used.
        address: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// systemd said no.
    #[error("systemd does not {action} {unit}: {message} ({name})")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// Of which unit.
        unit: String,
        /// The error's D-Bus name.
        name: String,
        /// Its text.
        message: String,
    },
    /// A unit of this name is there already, and it is not ours.
    #[error(
        "systemd has a unit {unit} already (it is {state}); stop it, or remove the container it is of"
    )]
    Exists {
        /// The unit.
        unit: String,
        /// Its state.
        state: String,
    },
    /// The job ended, but not well.
    #[error(
        "systemd could not {action} {unit}: its job ended with {result:?}; see journalctl -u {unit}"
    )]
    Job {
        /// What was asked.
        action: &'static str,
        /// Of which unit.
        unit: String,
        /// The job's result: `failed`, `timeout`, `canceled`, `dependency`, ...
        result: String,
    },
    /// What came is no D-Bus.
    #[error("{} does not speak D-Bus as systemd does: {reason}", address.display())]
    Protocol {
        /// The socket.
        address: PathBuf,
        /// What is wrong.
        reason: String,
    },
}
