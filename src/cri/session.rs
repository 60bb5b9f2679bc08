//! Exec, Attach and PortForward: answered with a URL of the streaming server.

use slipway_proto::cri;
use slipway_stream::{AttachRequest, ExecRequest, StreamError, StreamServer};

use crate::pod::{Node, PodError, Sessions};

/// The server, as the CRI's face sees it.
pub type Streams = StreamServer<Sessions>;

pub fn exec(
    node: &Node,
    streams: &Streams,
    request: cri::ExecRequest,
) -> Result<cri::ExecResponse, PodError> {
    let container = node.running(&request.container_id)?;
    if let Some(arg) = request.cmd.iter().find(|arg| arg.contains('\0')) {
        return Err(PodError::Invalid(format!(
            "Exec: argument {arg:?} holds a NUL byte"
        )));
    }
    let url = streams.exec_url(ExecRequest {
        container_id: container.id().to_owned(),
        command: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    });
    Ok(cri::ExecResponse {
        url: url.map_err(refused)?,
    })
}

pub fn attach(
    node: &Node,
    streams: &Streams,
    request: cri::AttachRequest,
) -> Result<cri::AttachResponse, PodError> {
    let container = node.running(&request.container_id)?;
    let url = streams.attach_url(AttachRequest {
        container_id: container.id().to_owned(),
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    });
    Ok(cri::AttachResponse {
        url: url.map_err(refused)?,
    })
}

pub fn port_forward(
    node: &Node,
    streams: &Streams,
    request: cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, PodError> {
    let pod = node.ready_pod(&request.pod_sandbox_id)?;
    let ports = request.port.iter().map(|port| {
        u16::try_from(*port)
            .map_err(|_| PodError::Invalid(format!("PortForward: {port} is not a port")))
    });
    let ports = ports.collect::<Result<_, _>>()?;
    let url = streams.port_forward_url(pod.id(), ports);
    Ok(cri::PortForwardResponse {
        url: url.map_err(refused)?,
    })
}

fn refused(error: StreamError) -> PodError {
    match error {
        StreamError::InvalidRequest(what) => PodError::Invalid(what),
        error => PodError::Stream(error),
    }
}
