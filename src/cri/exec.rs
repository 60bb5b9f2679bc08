//! ExecSync and ReopenContainerLog.

use std::sync::Arc;

use slipway_proto::cri;

use crate::pod::{Node, PodError};

pub async fn sync(
    node: &Arc<Node>,
    request: cri::ExecSyncRequest,
) -> Result<cri::ExecSyncResponse, PodError> {
    let output = node
        .exec_sync(&request.container_id, request.cmd, request.timeout)
        .await?;
    Ok(cri::ExecSyncResponse {
        stdout: output.stdout,
        stderr: output.stderr,
        exit_code: output.exit_code,
    })
}

pub async fn reopen_log(
    node: &Arc<Node>,
    request: cri::ReopenContainerLogRequest,
) -> Result<cri::ReopenContainerLogResponse, PodError> {
    node.reopen_log(&request.container_id).await?;
    Ok(cri::ReopenContainerLogResponse {})
}
