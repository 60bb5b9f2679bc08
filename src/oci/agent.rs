//! The agent of a seccomp profile with `SCMP_ACT_NOTIFY`: it is given the descriptor by which it decides the calls
//! (config-linux.md, "Container process state").

use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxSeccompAction, Spec};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use slipway_runtime::listener;

use crate::create::connect;
use crate::record::OCI_VERSION;
use crate::{OciError, Result};

/// An agent.
#[derive(Debug, Clone)]
pub struct Agent {
    path: PathBuf,
    metadata: Option<String>,
}

impl Agent {
    /// The agent of a specification; none when its profile leaves nothing to one.
    ///
    /// # Errors
    /// [`OciError::Spec`] when one is needed and not named.
    pub fn of(spec: &Spec) -> Result<Option<Self>> {
        let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
        let Some(profile) = profile else {
            return Ok(None);
        };
        let mut entries = profile.syscalls().iter().flatten();
        if !entries.any(|e| e.action() == LinuxSeccompAction::ScmpActNotify) {
            return Ok(None);
        }
        let path = profile.listener_path().clone();
        let path = path.filter(|p| !p.as_os_str().is_empty()).ok_or_else(|| {
            let reason = "SCMP_ACT_NOTIFY needs the path of the agent's socket here";
            OciError::spec("linux.seccomp.listenerPath", reason)
        })?;
        Ok(Some(Self {
            path,
            metadata: profile.listener_metadata().clone(),
        }))
    }

    /// Takes the listener of the process at the other end of `line`, gives it to the agent, and lets the process go on.
    /// `state` is made of the process's number.
    ///
    /// # Errors
    /// [`OciError`]; the process can only be ended then.
    pub fn serve(
        &self,
        line: &OwnedFd,
        state: impl FnOnce(i32) -> serde_json::Value,
    ) -> Result<()> {
        let (descriptor, pid) = listener::take(line)
            .map_err(OciError::system("take the listener of the seccomp filter"))?;
        let mut message = serde_json::json!({
            "ociVersion": OCI_VERSION, "fds": ["seccompFd"], "pid": pid, "state": state(pid),
        });
        if let Some(metadata) = &self.metadata {
            message["metadata"] = metadata.as_str().into();
        }
        let failed = OciError::file("give the listener to the seccomp agent at", &self.path);
        let agent = UnixStream::from(connect(&self.path)?);
        send(&agent, &descriptor, message.to_string().as_bytes()).map_err(&failed)?;
        listener::taken(line).map_err(OciError::system(
            "let the process go on under its seccomp filter",
        ))
    }
}

fn send(mut agent: &UnixStream, descriptor: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(
        agent,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    // It went with the first bytes.
    agent.write_all(&bytes[sent..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(action: &str, path: Option<&str>) -> Spec {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "m",
            "syscalls": [{"names": ["mkdir"], "action": action}],
        }}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn an_agent_is_there_for_what_is_left_to_it() {
        let agent = Agent::of(&spec("SCMP_ACT_NOTIFY", Some("/run/agent")))
            .unwrap()
            .unwrap();
        assert_eq!(
            (agent.path.to_str(), agent.metadata.as_deref()),
            (Some("/run/agent"), Some("m"))
        );
        assert!(
            Agent::of(&spec("SCMP_ACT_ERRNO", Some("/run/agent")))
                .unwrap()
                .is_none()
        );
        let error = Agent::of(&spec("SCMP_ACT_NOTIFY", None))
            .unwrap_err()
            .to_string();
        assert!(error.contains("listenerPath"), "{error}");
    }
}
