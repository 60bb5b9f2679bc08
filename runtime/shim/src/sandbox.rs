//! The sandbox API, of shims that make more of a pod than its containers: a virtual machine, for one.

use std::collections::BTreeMap;
use std::time::Duration;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
};

use crate::client::Client;
use crate::error::ShimError;
use crate::options::Options;
use crate::program::Address;

const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// A sandbox to be made.
#[derive(Debug, Clone, Default)]
pub struct CreateSandbox<'a> {
    /// Its name: the pod's id.
    pub id: &'a str,
    /// Its bundle.
    pub bundle: &'a str,
    /// Path of its network namespace, which is configured already; empty: the host's.
    pub network: &'a str,
    /// What the pod is, and how large it may become.
    pub annotations: BTreeMap<String, String>,
}

/// Asks for the end of a sandbox on a connection that has other uses, too, without waiting for it:
/// [`wait_answer`](crate::wait_answer) reads what comes under the number.
///
/// # Errors
/// [`ShimError`].
pub fn send_wait_sandbox(client: &mut Client, id: &str) -> Result<u32, ShimError> {
    let mut request = WaitSandboxRequest::new();
    request.sandbox_id = id.to_owned();
    client.send(SERVICE, "WaitSandbox", &request, Duration::ZERO)
}

/// The sandbox API of a shim.
#[derive(Debug)]
pub struct Sandbox {
    client: Client,
}

impl Sandbox {
    /// Connects.
    ///
    /// # Errors
    /// [`ShimError::Connect`].
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, ShimError> {
        Client::new(address, timeout).map(|client| Self { client })
    }

    fn call<A: Message>(
        &mut self,
        method: &str,
        request: &impl Message,
        timeout: Duration,
    ) -> Result<A, ShimError> {
        self.client.call(SERVICE, method, request, timeout)
    }

    /// Prepares the sandbox. The first call to a shim; one without this API says so
    /// ([`ShimError::is_unimplemented`]).
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn create(
        &mut self,
        sandbox: &CreateSandbox<'_>,
        options: Option<&Options>,
        timeout: Duration,
    ) -> Result<(), ShimError> {
        let mut request = CreateSandboxRequest::new();
        request.sandbox_id = sandbox.id.to_owned();
        request.bundle_path = sandbox.bundle.to_owned();
        request.netns_path = sandbox.network.to_owned();
        let annotations = sandbox.annotations.iter();
        request.annotations = annotations.map(|(k, v)| (k.clone(), v.clone())).collect();
        request.options = options.map(Options::any).into();
        self.call("CreateSandbox", &request, timeout)
            .map(|_: CreateSandboxResponse| ())
    }

    /// Starts the sandbox; its process id.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn start(&mut self, id: &str, timeout: Duration) -> Result<u32, ShimError> {
        let mut request = StartSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        let started: StartSandboxResponse = self.call("StartSandbox", &request, timeout)?;
        Ok(started.pid)
    }

    /// The state of the sandbox, in the shim's words, and its process id.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn status(&mut self, id: &str, timeout: Duration) -> Result<(String, u32), ShimError> {
        let mut request = SandboxStatusRequest::new();
        request.sandbox_id = id.to_owned();
        let status: SandboxStatusResponse = self.call("SandboxStatus", &request, timeout)?;
        Ok((status.state, status.pid))
    }

    /// Whether the sandbox answers.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn ping(&mut self, id: &str, timeout: Duration) -> Result<(), ShimError> {
        let mut request = PingRequest::new();
        request.sandbox_id = id.to_owned();
        self.call("PingSandbox", &request, timeout)
            .map(|_: PingResponse| ())
    }

    /// Stops the sandbox with all that is in it.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn stop(&mut self, id: &str, timeout: Duration) -> Result<(), ShimError> {
        let mut request = StopSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        request.timeout_secs = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        self.call("StopSandbox", &request, timeout)
            .map(|_: StopSandboxResponse| ())
    }

    /// Ends the shim, which may do so without an answer.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn shutdown(&mut self, id: &str, timeout: Duration) -> Result<(), ShimError> {
        let mut request = ShutdownSandboxRequest::new();
        request.sandbox_id = id.to_owned();
        match self.call::<ShutdownSandboxResponse>("ShutdownSandbox", &request, timeout) {
            Ok(_) | Err(ShimError::Closed { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
