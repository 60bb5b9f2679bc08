//! The RuntimeService: which call is answered where.

use std::sync::Arc;

use slipway_proto::cri;
use slipway_proto::cri::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::call::{Kind, call, container_span, node_span, pod_span};
use super::session::{self, Streams};
use super::stream::{self, Batches};
use super::{containers, events, exec, info, metrics, pods, stats};
use crate::pod::Node;

/// The RuntimeService.
#[derive(Clone)]
pub struct Runtime(pub Arc<Node>, pub Arc<Streams>);

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _: Request<cri::VersionRequest>,
    ) -> Result<Response<cri::VersionResponse>, Status> {
        let span = node_span("Version");
        call(Kind::Look, async move { Ok(info::version()) })
            .instrument(span)
            .await
    }

    async fn status(
        &self,
        request: Request<cri::StatusRequest>,
    ) -> Result<Response<cri::StatusResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("Status");
        call(Kind::Look, async move { Ok(info::status(node, &r).await) })
            .instrument(span)
            .await
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Result<Response<cri::RuntimeConfigResponse>, Status> {
        let node = &self.0;
        let span = node_span("RuntimeConfig");
        call(Kind::Look, async move { Ok(info::runtime_config(node)) })
            .instrument(span)
            .await
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<cri::UpdateRuntimeConfigResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("UpdateRuntimeConfig");
        call(
            Kind::Change,
            async move { info::update_runtime_config(node, r) },
        )
        .instrument(span)
        .await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Result<Response<cri::RunPodSandboxResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("RunPodSandbox", &pods::full_name(&r));
        call(Kind::Change, async move { pods::run(node, r).await })
            .instrument(span)
            .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Result<Response<cri::StopPodSandboxResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("StopPodSandbox", &r.pod_sandbox_id);
        call(Kind::Change, async move { pods::stop(node, r).await })
            .instrument(span)
            .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Result<Response<cri::RemovePodSandboxResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("RemovePodSandbox", &r.pod_sandbox_id);
        call(Kind::Change, async move { pods::remove(node, r).await })
            .instrument(span)
            .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Result<Response<cri::PodSandboxStatusResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("PodSandboxStatus", &r.pod_sandbox_id);
        call(Kind::Look, async move { pods::status(node, &r).await })
            .instrument(span)
            .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Result<Response<cri::ListPodSandboxResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("ListPodSandbox");
        call(Kind::Look, async move { Ok(pods::list(node, &r)) })
            .instrument(span)
            .await
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Result<Response<cri::CreateContainerResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("CreateContainer", &r.pod_sandbox_id);
        call(
            Kind::Change,
            async move { containers::create(node, r).await },
        )
        .instrument(span)
        .await
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Result<Response<cri::StartContainerResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("StartContainer", &r.container_id);
        call(
            Kind::Change,
            async move { containers::start(node, r).await },
        )
        .instrument(span)
        .await
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Result<Response<cri::StopContainerResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("StopContainer", &r.container_id);
        call(Kind::Change, async move { containers::stop(node, r).await })
            .instrument(span)
            .await
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Result<Response<cri::RemoveContainerResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("RemoveContainer", &r.container_id);
        call(
            Kind::Change,
            async move { containers::remove(node, r).await },
        )
        .instrument(span)
        .await
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Result<Response<cri::ListContainersResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("ListContainers");
        call(Kind::Look, async move { Ok(containers::list(node, &r)) })
            .instrument(span)
            .await
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("ContainerStatus", &r.container_id);
        call(Kind::Look, async move { containers::status(node, &r) })
            .instrument(span)
            .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Result<Response<cri::ReopenContainerLogResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("ReopenContainerLog", &r.container_id);
        call(Kind::Look, async move { exec::reopen_log(node, r).await })
            .instrument(span)
            .await
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Result<Response<cri::ExecSyncResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("ExecSync", &r.container_id);
        call(Kind::Look, async move { exec::sync(node, r).await })
            .instrument(span)
            .await
    }

    // What later issues bring.

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Result<Response<cri::UpdateContainerResourcesResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("UpdateContainerResources", &r.container_id);
        call(
            Kind::Change,
            async move { containers::update(node, r).await },
        )
        .instrument(span)
        .await
    }

    async fn exec(
        &self,
        request: Request<cri::ExecRequest>,
    ) -> Result<Response<cri::ExecResponse>, Status> {
        let r = request.into_inner();
        let (node, streams) = (&self.0, &self.1);
        let span = container_span("Exec", &r.container_id);
        call(Kind::Look, async move { session::exec(node, streams, r) })
            .instrument(span)
            .await
    }

    async fn attach(
        &self,
        request: Request<cri::AttachRequest>,
    ) -> Result<Response<cri::AttachResponse>, Status> {
        let r = request.into_inner();
        let (node, streams) = (&self.0, &self.1);
        let span = container_span("Attach", &r.container_id);
        call(Kind::Look, async move { session::attach(node, streams, r) })
            .instrument(span)
            .await
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Result<Response<cri::PortForwardResponse>, Status> {
        let r = request.into_inner();
        let (node, streams) = (&self.0, &self.1);
        let span = pod_span("PortForward", &r.pod_sandbox_id);
        call(Kind::Look, async move {
            session::port_forward(node, streams, r)
        })
        .instrument(span)
        .await
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Result<Response<cri::ContainerStatsResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("ContainerStats", &r.container_id);
        call(Kind::Look, async move { stats::container(node, r).await })
            .instrument(span)
            .await
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Result<Response<cri::ListContainerStatsResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("ListContainerStats");
        call(
            Kind::Look,
            async move { stats::list_containers(node, r).await },
        )
        .instrument(span)
        .await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Result<Response<cri::PodSandboxStatsResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("PodSandboxStats", &r.pod_sandbox_id);
        call(Kind::Look, async move { stats::pod(node, r).await })
            .instrument(span)
            .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Result<Response<cri::ListPodSandboxStatsResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("ListPodSandboxStats");
        call(Kind::Look, async move { stats::list_pods(node, r).await })
            .instrument(span)
            .await
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Result<Response<cri::CheckpointContainerResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = container_span("CheckpointContainer", &r.container_id);
        call(Kind::Change, async move {
            node.checkpoint_container(&r.container_id, &r.location, r.timeout)
                .await?;
            Ok(cri::CheckpointContainerResponse {})
        })
        .instrument(span)
        .await
    }

    async fn checkpoint_pod(
        &self,
        request: Request<cri::CheckpointPodRequest>,
    ) -> Result<Response<cri::CheckpointPodResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("CheckpointPod", &r.pod_sandbox_id);
        call(Kind::Change, async move {
            node.checkpoint_pod(r).await?;
            Ok(cri::CheckpointPodResponse {})
        })
        .instrument(span)
        .await
    }

    async fn restore_pod(
        &self,
        request: Request<cri::RestorePodRequest>,
    ) -> Result<Response<cri::RestorePodResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = node_span("RestorePod");
        call(Kind::Change, async move { node.restore_pod(r).await })
            .instrument(span)
            .await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Result<Response<cri::ListMetricDescriptorsResponse>, Status> {
        let span = node_span("ListMetricDescriptors");
        call(Kind::Look, async move { Ok(metrics::descriptors()) })
            .instrument(span)
            .await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<cri::ListPodSandboxMetricsResponse>, Status> {
        let node = &self.0;
        let span = node_span("ListPodSandboxMetrics");
        call(Kind::Look, async move { metrics::list(node).await })
            .instrument(span)
            .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<cri::UpdatePodSandboxResourcesResponse>, Status> {
        let r = request.into_inner();
        let node = &self.0;
        let span = pod_span("UpdatePodSandboxResources", &r.pod_sandbox_id);
        call(Kind::Change, async move { pods::update(node, r).await })
            .instrument(span)
            .await
    }

    type StreamPodSandboxesStream = Batches<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let r = request.into_inner();
        let node = self.0.clone();
        let span = node_span("StreamPodSandboxes");
        call(Kind::Look, async move {
            Ok(stream::of(pods::stream(&node, r), |pod_sandboxes| {
                cri::StreamPodSandboxesResponse { pod_sandboxes }
            }))
        })
        .instrument(span)
        .await
    }

    type StreamContainersStream = Batches<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let r = request.into_inner();
        let node = self.0.clone();
        let span = node_span("StreamContainers");
        call(Kind::Look, async move {
            Ok(stream::of(containers::stream(&node, r), |containers| {
                cri::StreamContainersResponse { containers }
            }))
        })
        .instrument(span)
        .await
    }

    type StreamContainerStatsStream = Batches<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let r = request.into_inner();
        let node = self.0.clone();
        let span = node_span("StreamContainerStats");
        call(Kind::Look, async move {
            let found = stats::chosen_containers(&node, r.filter.as_ref());
            let measure = move |group| {
                let node = node.clone();
                async move { Ok(stats::of_containers(&node, group)) }
            };
            Ok(stream::measured(found, measure, |container_stats| {
                cri::StreamContainerStatsResponse { container_stats }
            }))
        })
        .instrument(span)
        .await
    }

    type StreamPodSandboxStatsStream = Batches<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let r = request.into_inner();
        let node = self.0.clone();
        let span = node_span("StreamPodSandboxStats");
        call(Kind::Look, async move {
            let found = stats::chosen_pods(&node, r.filter.as_ref());
            let measure = move |group| {
                let node = node.clone();
                async move { Ok(stats::of_pods(&node, group)) }
            };
            Ok(stream::measured(found, measure, |pod_sandbox_stats| {
                cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }
            }))
        })
        .instrument(span)
        .await
    }

    type GetContainerEventsStream = Batches<cri::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let node = &self.0;
        let span = node_span("GetContainerEvents");
        call(Kind::Look, async move { Ok(events::follow(node)) })
            .instrument(span)
            .await
    }

    type StreamPodSandboxMetricsStream = Batches<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let node = self.0.clone();
        let span = node_span("StreamPodSandboxMetrics");
        call(Kind::Look, async move {
            let found = node.pods.all();
            let measure = move |group| {
                let node = node.clone();
                async move { Ok(metrics::of_pods(&node, group)) }
            };
            Ok(stream::measured(found, measure, |pod_sandbox_metrics| {
                cri::StreamPodSandboxMetricsResponse {
                    pod_sandbox_metrics,
                }
            }))
        })
        .instrument(span)
        .await
    }
}
