//! ExecSync and ReopenContainerLog: neither takes a lock that a stop holds.

use std::sync::Arc;
use std::time::Duration;

use slipway_proto::keeper::ErrorKind;
use slipway_runtime::client::ExecOutput;

use super::error::PodError;
use super::node::Node;

/// Exit code of a command that was not found (POSIX shell).
const NOT_FOUND: i32 = 127;
/// Exit code of a command that was found but can't be executed.
const NOT_EXECUTABLE: i32 = 126;

impl Node {
    /// Runs a command in a container and collects its output.
    ///
    /// A command that can't be run is no error: its exit code is 126 or 127, and the reason stands at the end
    /// of its standard error.
    ///
    /// # Errors
    /// [`PodError::ExecTimeout`]; unless the container runs.
    pub async fn exec_sync(
        self: &Arc<Self>,
        id: &str,
        command: Vec<String>,
        timeout: i64,
    ) -> Result<ExecOutput, PodError> {
        let container = self.container(id)?;
        if command.is_empty() {
            return Err(PodError::Invalid("ExecSync needs a command".to_owned()));
        }
        if let Some(arg) = command.iter().find(|arg| arg.contains('\0')) {
            return Err(PodError::Invalid(format!(
                "ExecSync: argument {arg:?} holds a NUL byte"
            )));
        }
        let timeout = u64::try_from(timeout).map_err(|_| {
            PodError::Invalid(format!(
                "ExecSync: timeout {timeout} must not be negative; 0 is none"
            ))
        })?;
        container.must_run()?;
        let timeout = Some(timeout).filter(|s| *s > 0).map(Duration::from_secs);
        let limit = usize::try_from(self.config().limits.exec_output.bytes()).unwrap_or(usize::MAX);
        let args = command.into_iter().map(String::into_bytes).collect();
        let result = container
            .keeper
            .exec_sync(container.id(), args, timeout, limit)
            .await;
        match (result, timeout) {
            (Ok(output), Some(timeout)) if output.timed_out => Err(PodError::ExecTimeout {
                id: container.id().to_owned(),
                timeout,
            }),
            (Ok(output), _) => Ok(output),
            (Err(e), _) if e.kind() == ErrorKind::CannotRun => Ok(cannot_run(&e.to_string())),
            (Err(source), _) => Err(PodError::Keeper {
                action: "execute a command in",
                what: format!("container {}", container.id()),
                source,
            }),
        }
    }

    /// Reopens a container's log file, whatever its state.
    ///
    /// # Errors
    /// For an unknown container, or what opening says.
    pub async fn reopen_log(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        container
            .keeper
            .reopen_log(container.id())
            .await
            .map_err(|source| PodError::Keeper {
                action: "reopen the log of",
                what: format!("container {}", container.id()),
                source,
            })
    }
}

fn cannot_run(message: &str) -> ExecOutput {
    let not_found = message.contains("No such file") || message.contains("not found");
    ExecOutput {
        stderr: format!("{message}\n").into_bytes(),
        exit_code: if not_found { NOT_FOUND } else { NOT_EXECUTABLE },
        ..ExecOutput::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_run_has_the_shells_exit_codes() {
        assert_eq!(
            cannot_run("can't execute \"x\": No such file or directory").exit_code,
            127
        );
        let denied = cannot_run("can't execute \"/etc/passwd\": Permission denied");
        assert_eq!(denied.exit_code, 126);
        assert!(denied.stderr.ends_with(b"Permission denied\n"));
    }
}
