//! Waiting for a container's end without a poll loop.
//!
//! The CRI has no call that waits. The runtimes tell the process id of the container's init in the
//! verbose status, and the kernel tells the end of a process through a pidfd; only a runtime that hides
//! the process id is asked again and again.
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use slipway_proto::cri::{ContainerState, ContainerStatus, ContainerStatusRequest};
use tokio::io::unix::AsyncFd;

use crate::connection::Cri;
use crate::error::ClientError;

/// Between questions to a runtime that doesn't tell the process id.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// How long a runtime may take to notice that its container's process has ended.
const NOTICE_LIMIT: Duration = Duration::from_secs(30);

/// The container's status and the process id that the verbose info may hold.
///
/// # Errors
/// [`ClientError::Rpc`] or [`ClientError::Answer`].
pub async fn status(cri: &Cri, id: &str) -> Result<(ContainerStatus, Option<i32>), ClientError> {
    let request = ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: true,
    };
    let response = cri.container_status(request).await?;
    let pid = process_id(&response.info);
    let status = response.status.ok_or(ClientError::Answer {
        call: "ContainerStatus",
        what: "a status",
    })?;
    Ok((status, pid))
}

/// The container's process id in a verbose status: `pid` in its own right or inside a JSON value.
pub fn process_id(info: &std::collections::HashMap<String, String>) -> Option<i32> {
    let direct = info.get("pid").and_then(|text| text.parse().ok());
    let nested = || {
        info.values()
            .filter_map(|text| serde_json::from_str::<serde_json::Value>(text).ok())
            .find_map(|value| value.get("pid").and_then(serde_json::Value::as_i64))
            .and_then(|pid| i32::try_from(pid).ok())
    };
    direct.or_else(nested).filter(|&pid| pid > 0)
}

fn ended(status: &ContainerStatus) -> bool {
    !matches!(
        status.state(),
        ContainerState::ContainerRunning | ContainerState::ContainerCreated
    )
}

/// Waits until a started container has ended, and gives its last status.
///
/// # Errors
/// [`ClientError::Rpc`] when the runtime can't be asked any more.
pub async fn exit(cri: &Cri, id: &str) -> Result<ContainerStatus, ClientError> {
    loop {
        let (current, pid) = status(cri, id).await?;
        if ended(&current) {
            return Ok(current);
        }
        let Some(process) = pid.and_then(open_process) else {
            tokio::time::sleep(ASK_AGAIN).await;
            continue;
        };
        // The id may have been another process's by the time it was opened: it is the container's
        // if the runtime says the same again.
        let (current, again) = status(cri, id).await?;
        if ended(&current) {
            return Ok(current);
        }
        if again != pid {
            continue;
        }
        process
            .readable()
            .await
            .map(drop)
            .map_err(|source| ClientError::System {
                what: "cannot wait for the container's process",
                source,
            })?;
        return noticed(cri, id).await;
    }
}

fn open_process(pid: i32) -> Option<AsyncFd<OwnedFd>> {
    let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
    #[allow(
        deprecated,
        reason = "unsound only for types whose descriptor changes; OwnedFd's can't"
    )]
    let process = AsyncFd::with_interest(fd, tokio::io::Interest::READABLE);
    process.ok()
}

/// The process has ended: asks until the runtime has noticed too, which is a matter of milliseconds.
async fn noticed(cri: &Cri, id: &str) -> Result<ContainerStatus, ClientError> {
    let deadline = tokio::time::Instant::now() + NOTICE_LIMIT;
    let mut pause = Duration::from_millis(1);
    loop {
        let (current, _) = status(cri, id).await?;
        if ended(&current) || tokio::time::Instant::now() > deadline {
            return Ok(current);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(ASK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_ids_in_all_forms() {
        let info = |key: &str, text: &str| [(key.to_owned(), text.to_owned())].into();
        assert_eq!(process_id(&info("pid", "12")), Some(12));
        assert_eq!(
            process_id(&info("info", r#"{"pid": 12, "x": {}}"#)),
            Some(12)
        );
        assert_eq!(process_id(&info("info", r#"{"pid": 0}"#)), None);
        assert_eq!(process_id(&info("info", r#"{"pid": 99999999999}"#)), None);
        assert_eq!(process_id(&info("info", "rubbish")), None);
        assert_eq!(process_id(&info("other", "[1]")), None);
    }
}
