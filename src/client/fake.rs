//! A CRI runtime in this process, for tests: it keeps books, runs nothing, and fails on request.
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::stream::Empty;
use slipway_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use slipway_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use slipway_proto::cri::*;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::{Service, http};
use tonic::{Code, Request, Response, Status};

use crate::Global;

/// What the runtime is to do.
#[derive(Debug, Clone, Default)]
pub struct Script {
    /// Containers end with this code when they are started; without one they run until stopped.
    pub exit_code: Option<i32>,
    /// What stands in a container's log once it was started.
    pub log: String,
    /// RPCs that are answered with an error, nothing done.
    pub fail: HashMap<&'static str, Code>,
    /// RunPodSandbox makes a pod, and answers with an error.
    pub lose_pod: bool,
}

/// A container in the books.
#[derive(Debug, Clone)]
pub struct FakeContainer {
    /// Its pod.
    pub pod: String,
    /// Its configuration.
    pub config: ContainerConfig,
    /// Its state.
    pub state: ContainerState,
    /// Its exit code.
    pub exit_code: i32,
}

/// The books.
#[derive(Debug, Default)]
pub struct State {
    /// What to do.
    pub script: Script,
    /// Pods by id, and whether they are ready.
    pub pods: BTreeMap<String, (PodSandboxConfig, bool)>,
    /// Containers by id.
    pub containers: BTreeMap<String, FakeContainer>,
    /// Images present.
    pub images: Vec<String>,
    /// Names of the RPCs that were called.
    pub calls: Vec<&'static str>,
    next: u64,
}

/// A runtime that listens on a socket; ends when dropped.
#[derive(Debug)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    server: tokio::task::JoinHandle<()>,
    dir: tempfile::TempDir,
}

#[derive(Debug, Clone)]
struct Face(Arc<Mutex<State>>);

impl Fake {
    /// Starts a runtime.
    pub fn start(script: Script) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("cri.sock")).unwrap();
        let state = Arc::new(Mutex::new(State {
            script,
            ..State::default()
        }));
        let runtime = RuntimeServiceServer::new(Face(state.clone()));
        let image = ImageServiceServer::new(Face(state.clone()));
        let both = tower::service_fn(move |request: http::Request<tonic::body::Body>| {
            let (mut runtime, mut image) = (runtime.clone(), image.clone());
            async move {
                if request
                    .uri()
                    .path()
                    .starts_with("/runtime.v1.ImageService/")
                {
                    image.call(request).await
                } else {
                    runtime.call(request).await
                }
            }
        });
        let incoming = UnixListenerStream::new(listener);
        let server = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .serve_with_incoming(both, incoming)
                .await
                .unwrap();
        });
        Fake { state, server, dir }
    }

    /// The books.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A directory that lives as long as the runtime.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The socket.
    pub fn endpoint(&self) -> String {
        format!("unix://{}", self.dir.path().join("cri.sock").display())
    }

    /// Options that lead to this runtime.
    pub fn global(&self) -> Global {
        Global {
            runtime_endpoint: self.endpoint(),
            image_endpoint: None,
            timeout: Duration::from_secs(10),
        }
    }

    /// Whether no pod and no container is left.
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.pods.is_empty() && state.containers.is_empty()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Face {
    fn call(&self, name: &'static str) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.0.lock().unwrap();
        state.calls.push(name);
        match state.script.fail.get(name) {
            Some(&code) => Err(Status::new(code, format!("{name} was told to fail"))),
            None => Ok(state),
        }
    }
}

impl State {
    fn id(&mut self) -> String {
        self.next += 1;
        format!("{:064x}", self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn container(&mut self, id: &str) -> Result<&mut FakeContainer, Status> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Status::not_found(format!("no container {id}")))
    }
}

macro_rules! absent {
    ($($name:ident($request:ty) -> $response:ty;)*) => {
        $(
            fn $name<'life0, 'async_trait>(
                &'life0 self,
                _: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'async_trait>>
            where
                'life0: 'async_trait,
                Self: 'async_trait,
            {
                Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
            }
        )*
    };
}

type Nothing<T> = Empty<Result<T, Status>>;

#[tonic::async_trait]
impl RuntimeService for Face {
    type StreamPodSandboxesStream = Nothing<StreamPodSandboxesResponse>;
    type StreamContainersStream = Nothing<StreamContainersResponse>;
    type StreamContainerStatsStream = Nothing<StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Nothing<StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Nothing<ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Nothing<StreamPodSandboxMetricsResponse>;

    async fn version(
        &self,
        _: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        drop(self.call("Version")?);
        Ok(Response::new(VersionResponse {
            runtime_name: "fake".into(),
            runtime_version: "1".into(),
            ..Default::default()
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let mut state = self.call("RunPodSandbox")?;
        let config = request.into_inner().config.unwrap();
        let id = state.id();
        state.pods.insert(id.clone(), (config, true));
        if state.script.lose_pod {
            return Err(Status::deadline_exceeded("lost"));
        }
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        let mut state = self.call("StopPodSandbox")?;
        let id = request.into_inner().pod_sandbox_id;
        if let Some(pod) = state.pods.get_mut(&id) {
            pod.1 = false;
        }
        for container in state.containers.values_mut().filter(|c| c.pod == id) {
            container.state = ContainerState::ContainerExited;
        }
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        let mut state = self.call("RemovePodSandbox")?;
        let id = request.into_inner().pod_sandbox_id;
        if state.pods.get(&id).is_some_and(|pod| pod.1) {
            return Err(Status::failed_precondition("the pod is ready"));
        }
        state.pods.remove(&id);
        state.containers.retain(|_, container| container.pod != id);
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let state = self.call("PodSandboxStatus")?;
        let id = request.into_inner().pod_sandbox_id;
        let (config, _) = state
            .pods
            .get(&id)
            .ok_or_else(|| Status::not_found("no pod"))?;
        Ok(Response::new(PodSandboxStatusResponse {
            status: Some(PodSandboxStatus {
                id,
                metadata: config.metadata.clone(),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let state = self.call("ListPodSandbox")?;
        let wanted = request
            .into_inner()
            .filter
            .unwrap_or_default()
            .label_selector;
        let items = state
            .pods
            .iter()
            .filter(|(_, pod)| {
                wanted
                    .iter()
                    .all(|(key, value)| pod.0.labels.get(key) == Some(value))
            })
            .map(|(id, pod)| PodSandbox {
                id: id.clone(),
                metadata: pod.0.metadata.clone(),
                state: i32::from(!pod.1),
                labels: pod.0.labels.clone(),
                ..Default::default()
            })
            .collect();
        Ok(Response::new(ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let mut state = self.call("CreateContainer")?;
        let request = request.into_inner();
        let container = FakeContainer {
            pod: request.pod_sandbox_id,
            config: request.config.unwrap(),
            state: ContainerState::ContainerCreated,
            exit_code: 0,
        };
        let id = state.id();
        state.containers.insert(id.clone(), container);
        Ok(Response::new(CreateContainerResponse { container_id: id }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        let mut state = match self.call("StartContainer") {
            Ok(state) => state,
            Err(status) => {
                let mut state = self.0.lock().unwrap();
                let exit_code = state.script.exit_code.unwrap_or(0);
                let container = state.container(&id)?;
                container.state = ContainerState::ContainerExited;
                container.exit_code = exit_code;
                return Err(status);
            }
        };
        let Script { log, exit_code, .. } = state.script.clone();
        let container = state.container(&id)?.clone();
        let directory = state.pods[&container.pod].0.log_directory.clone();
        std::fs::write(Path::new(&directory).join(&container.config.log_path), log)?;
        let container = state.container(&id)?;
        container.state = match exit_code {
            Some(code) => {
                container.exit_code = code;
                ContainerState::ContainerExited
            }
            None => ContainerState::ContainerRunning,
        };
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        let mut state = self.call("StopContainer")?;
        let container = state.container(&request.into_inner().container_id)?;
        container.state = ContainerState::ContainerExited;
        container.exit_code = 143;
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let mut state = self.call("RemoveContainer")?;
        state.containers.remove(&request.into_inner().container_id);
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_container_stats(
        &self,
        _: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        drop(self.call("ListContainerStats")?);
        Ok(Response::new(ListContainerStatsResponse::default()))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let state = self.call("ListContainers")?;
        let containers = state
            .containers
            .iter()
            .map(|(id, container)| Container {
                id: id.clone(),
                pod_sandbox_id: container.pod.clone(),
                metadata: container.config.metadata.clone(),
                state: container.state.into(),
                ..Default::default()
            })
            .collect();
        Ok(Response::new(ListContainersResponse {
            containers,
            ..Default::default()
        }))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        let mut state = self.call("ContainerStatus")?;
        let id = request.into_inner().container_id;
        let container = state.container(&id)?.clone();
        let directory = state.pods[&container.pod].0.log_directory.clone();
        Ok(Response::new(ContainerStatusResponse {
            status: Some(ContainerStatus {
                id,
                state: container.state.into(),
                exit_code: container.exit_code,
                log_path: format!("{directory}/{}", container.config.log_path),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        let mut state = self.call("ExecSync")?;
        let request = request.into_inner();
        state.container(&request.container_id)?;
        let exit_code = if request.cmd[0] == "true" { 0 } else { 7 };
        Ok(Response::new(ExecSyncResponse {
            exit_code,
            ..Default::default()
        }))
    }

    absent! {
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(StreamContainersRequest) -> Self::StreamContainersStream;
        stream_container_stats(StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
        get_container_events(GetEventsRequest) -> Self::GetContainerEventsStream;
        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        exec(ExecRequest) -> ExecResponse;
        attach(AttachRequest) -> AttachResponse;
        port_forward(PortForwardRequest) -> PortForwardResponse;
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        status(StatusRequest) -> StatusResponse;
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse;
        restore_pod(RestorePodRequest) -> RestorePodResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
    }
}

fn image(name: &str) -> Image {
    Image {
        id: format!("sha256:{:0>64}", name.len()),
        repo_tags: vec![name.into()],
        ..Default::default()
    }
}

#[tonic::async_trait]
impl ImageService for Face {
    type StreamImagesStream = Nothing<StreamImagesResponse>;

    async fn list_images(
        &self,
        _: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let state = self.call("ListImages")?;
        let images = state.images.iter().map(|name| image(name)).collect();
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let state = self.call("ImageStatus")?;
        let name = request.into_inner().image.unwrap().image;
        let found = state.images.iter().map(|have| image(have));
        let image = found
            .into_iter()
            .find(|i| i.id == name || i.repo_tags[0] == name);
        Ok(Response::new(ImageStatusResponse {
            image,
            ..Default::default()
        }))
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let mut state = self.call("PullImage")?;
        let name = request.into_inner().image.unwrap().image;
        let image_ref = image(&name).id;
        state.images.push(name);
        Ok(Response::new(PullImageResponse { image_ref }))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        let mut state = self.call("RemoveImage")?;
        let name = request.into_inner().image.unwrap().image;
        state
            .images
            .retain(|have| *have != name && image(have).id != name);
        Ok(Response::new(RemoveImageResponse {}))
    }

    absent! {
        stream_images(StreamImagesRequest) -> Self::StreamImagesStream;
        image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }
}
