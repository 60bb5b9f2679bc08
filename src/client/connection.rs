//! A connection to a CRI socket, and a method for each RPC the client uses.
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use slipway_proto::admin;
use slipway_proto::admin::admin_client::AdminClient;
use slipway_proto::cri::image_service_client::ImageServiceClient;
use slipway_proto::cri::runtime_service_client::RuntimeServiceClient;
use slipway_proto::cri::*;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::Global;
use crate::error::ClientError;

/// Whole answers (ExecSync carries up to 16 MiB per stream) must fit.
const MAX_MESSAGE: usize = 64 << 20;
/// Bytes that may be under way to us before we have taken them.
const WINDOW: u32 = 1 << 20;
/// How long a runtime may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A connected runtime and the image service that belongs to it.
#[derive(Debug, Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    image: ImageServiceClient<Channel>,
    /// Where images are.
    channel: Channel,
    timeout: Duration,
}

/// The socket's path of an endpoint (`unix:///path`, `unix:/path` or `/path`).
///
/// # Errors
/// [`ClientError::Endpoint`] for other schemes and for relative paths behind a scheme.
pub fn socket_path(endpoint: &str) -> Result<PathBuf, ClientError> {
    let path = match endpoint.split_once(':') {
        Some(("unix", rest)) => rest.strip_prefix("//").unwrap_or(rest),
        _ => endpoint,
    };
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(ClientError::Endpoint(endpoint.to_owned()))
    }
}

async fn connect_channel(endpoint: &str, limit: Duration) -> Result<Channel, ClientError> {
    let path = socket_path(endpoint)?;
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Connect {
        endpoint: endpoint.to_owned(),
        source,
    };
    // Tried first by hand: its error (no such file, permission denied, refused) is the plain one.
    UnixStream::connect(&path)
        .await
        .map_err(|e| failed(e.into()))?;
    let limit = limit.min(CONNECT_LIMIT);
    // Lists of hundreds of containers come in one piece, without waiting for us to make room (as for grpc-go, which
    // widens its windows by itself).
    let target = Endpoint::from_static("http://localhost")
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let connecting =
        target.connect_with_connector(tower::service_fn(move |_: Uri| open(path.clone())));
    match tokio::time::timeout(limit, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(e)) => Err(failed(e.into())),
        Err(_) => Err(ClientError::ConnectTimeout {
            endpoint: endpoint.to_owned(),
            limit,
        }),
    }
}

async fn open(path: impl AsRef<Path>) -> std::io::Result<TokioIo<UnixStream>> {
    UnixStream::connect(path).await.map(TokioIo::new)
}

macro_rules! rpcs {
    ($($(#[$doc:meta])* $client:ident $method:ident $name:literal ($request:ty) -> $response:ty;)*) => {
        impl Cri {
            $(
                $(#[$doc])*
                #[doc = concat!("Calls `", $name, "`.")]
                ///
                /// # Errors
                /// [`ClientError::Rpc`] with the runtime's code and text, also when the deadline passes.
                pub async fn $method(&self, request: $request) -> Result<$response, ClientError> {
                    let mut request = tonic::Request::new(request);
                    request.set_timeout(self.timeout);
                    let answer = self.$client.clone().$method(request).await;
                    answer.map(tonic::Response::into_inner).map_err(|status| ClientError::Rpc {
                        call: $name,
                        status: Box::new(status),
                    })
                }
            )*
        }
    };
}

rpcs! {
    runtime version "Version" (VersionRequest) -> VersionResponse;
    runtime run_pod_sandbox "RunPodSandbox" (RunPodSandboxRequest) -> RunPodSandboxResponse;
    runtime stop_pod_sandbox "StopPodSandbox" (StopPodSandboxRequest) -> StopPodSandboxResponse;
    runtime remove_pod_sandbox "RemovePodSandbox" (RemovePodSandboxRequest) -> RemovePodSandboxResponse;
    runtime pod_sandbox_status "PodSandboxStatus" (PodSandboxStatusRequest) -> PodSandboxStatusResponse;
    runtime list_pod_sandbox "ListPodSandbox" (ListPodSandboxRequest) -> ListPodSandboxResponse;
    runtime create_container "CreateContainer" (CreateContainerRequest) -> CreateContainerResponse;
    runtime start_container "StartContainer" (StartContainerRequest) -> StartContainerResponse;
    runtime stop_container "StopContainer" (StopContainerRequest) -> StopContainerResponse;
    runtime remove_container "RemoveContainer" (RemoveContainerRequest) -> RemoveContainerResponse;
    runtime list_containers "ListContainers" (ListContainersRequest) -> ListContainersResponse;
    runtime container_status "ContainerStatus" (ContainerStatusRequest) -> ContainerStatusResponse;
    runtime list_container_stats "ListContainerStats" (ListContainerStatsRequest) -> ListContainerStatsResponse;
    runtime list_pod_sandbox_stats "ListPodSandboxStats" (ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
    runtime exec_sync "ExecSync" (ExecSyncRequest) -> ExecSyncResponse;
    image list_images "ListImages" (ListImagesRequest) -> ListImagesResponse;
    image image_status "ImageStatus" (ImageStatusRequest) -> ImageStatusResponse;
    image pull_image "PullImage" (PullImageRequest) -> PullImageResponse;
    image remove_image "RemoveImage" (RemoveImageRequest) -> RemoveImageResponse;
}

impl Cri {
    /// Pulls an image through Slipway's own call, which tells how far it is: `progress` gets each event.
    ///
    /// # Errors
    /// [`ClientError::Rpc`]; `Unimplemented` from every other runtime.
    pub async fn pull_with_progress(
        &self,
        request: admin::PullImageRequest,
        progress: impl Fn(&admin::PullImageEvent),
    ) -> Result<String, ClientError> {
        let failed = |status| ClientError::Rpc {
            call: "PullImage",
            status: Box::new(status),
        };
        let mut request = tonic::Request::new(request);
        request.set_timeout(self.timeout);
        let mut admin = AdminClient::new(self.channel.clone());
        let answer = admin.pull_image(request).await.map_err(failed)?;
        let mut events = answer.into_inner();
        let mut reference = String::new();
        while let Some(event) = events.message().await.map_err(failed)? {
            progress(&event);
            reference = event.image_ref;
        }
        Ok(reference)
    }

    /// Connects as the command line says.
    ///
    /// # Errors
    /// [`ClientError::Connect`] and its like, naming the socket.
    pub async fn connect(global: &Global) -> Result<Cri, ClientError> {
        // A variable that is set to nothing means nothing.
        let image = global
            .image_endpoint
            .as_deref()
            .filter(|endpoint| !endpoint.is_empty());
        let runtime = match global.runtime_endpoint.as_str() {
            "" => crate::DEFAULT_ENDPOINT,
            endpoint => endpoint,
        };
        Cri::open(runtime, image, global.timeout).await
    }

    /// Connects to a runtime, and to another socket for images when one is given; `timeout` is the
    /// deadline of each call.
    ///
    /// # Errors
    /// [`ClientError::Connect`] and its like, naming the socket.
    pub async fn open(
        runtime: &str,
        image: Option<&str>,
        timeout: Duration,
    ) -> Result<Cri, ClientError> {
        let channel = connect_channel(runtime, timeout).await?;
        let images = match image {
            Some(image) if image != runtime => connect_channel(image, timeout).await?,
            _ => channel.clone(),
        };
        Ok(Cri {
            runtime: RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
            image: ImageServiceClient::new(images.clone()).max_decoding_message_size(MAX_MESSAGE),
            channel: images,
            timeout,
        })
    }

    /// The same connection with another deadline per call.
    pub fn with_timeout(&self, timeout: Duration) -> Cri {
        Cri {
            timeout,
            ..self.clone()
        }
    }

    /// The deadline of a call.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for text in ["unix:///run/x.sock", "unix:/run/x.sock", "/run/x.sock"] {
            assert_eq!(
                socket_path(text).unwrap(),
                Path::new("/run/x.sock"),
                "{text}"
            );
        }
        for text in ["", "tcp://1.2.3.4:5", "x.sock", "unix://x.sock", "http://x"] {
            assert!(socket_path(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_missing_socket_is_named_with_the_cause() {
        let error = Cri::open("unix:///nonexistent/x.sock", None, Duration::from_secs(1))
            .await
            .unwrap_err();
        let text = crate::report(&error);
        assert!(text.contains("unix:///nonexistent/x.sock"), "{text}");
        assert!(text.contains("No such file"), "{text}");
        assert!(text.contains("--runtime-endpoint"), "{text}");
    }
}
