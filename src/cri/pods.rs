//! Pod sandboxes: RunPodSandbox, StopPodSandbox, RemovePodSandbox, PodSandboxStatus, ListPodSandbox.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::json;
use slipway_proto::cri;

use super::containers::container_status;
use super::filter::{pod_fits, pod_state};
use crate::pod::sandbox::Sizes;
use crate::pod::state::PodStage;
use crate::pod::{Node, Pod, PodError, now};

/// What a request calls its pod, for the log.
pub fn full_name(request: &cri::RunPodSandboxRequest) -> String {
    let metadata = request.config.as_ref().and_then(|c| c.metadata.as_ref());
    metadata
        .map(|m| format!("{}/{}", m.namespace, m.name))
        .unwrap_or_default()
}

pub async fn run(
    node: &Arc<Node>,
    request: cri::RunPodSandboxRequest,
) -> Result<cri::RunPodSandboxResponse, PodError> {
    let pod_sandbox_id = node.run_pod(request).await?;
    Ok(cri::RunPodSandboxResponse { pod_sandbox_id })
}

pub async fn stop(
    node: &Arc<Node>,
    request: cri::StopPodSandboxRequest,
) -> Result<cri::StopPodSandboxResponse, PodError> {
    node.stop_pod(&request.pod_sandbox_id).await?;
    Ok(cri::StopPodSandboxResponse {})
}

pub async fn update(
    node: &Arc<Node>,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<cri::UpdatePodSandboxResourcesResponse, PodError> {
    let sizes = Sizes {
        overhead: request.overhead,
        resources: request.resources,
    };
    node.resize_pod(&request.pod_sandbox_id, sizes).await?;
    Ok(cri::UpdatePodSandboxResourcesResponse {})
}

pub async fn remove(
    node: &Arc<Node>,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, PodError> {
    node.remove_pod(&request.pod_sandbox_id).await?;
    Ok(cri::RemovePodSandboxResponse {})
}

pub fn list(node: &Node, request: &cri::ListPodSandboxRequest) -> cri::ListPodSandboxResponse {
    cri::ListPodSandboxResponse {
        items: chosen(node, request.filter.as_ref())
            .iter()
            .map(|pod| listed(pod))
            .collect(),
    }
}

/// The pods that pass the filter, as they are when they are reached.
pub fn stream(
    node: &Node,
    request: cri::StreamPodSandboxesRequest,
) -> impl Iterator<Item = cri::PodSandbox> + Send + 'static {
    let found = chosen(node, request.filter.as_ref());
    found.into_iter().map(|pod| listed(&pod))
}

fn chosen(node: &Node, filter: Option<&cri::PodSandboxFilter>) -> Vec<Arc<Pod>> {
    let mut found = node.pods.all();
    found.retain(|pod| pod_fits(filter, pod.id(), pod.stage(), &pod.record.config.labels));
    found
}

fn listed(pod: &Pod) -> cri::PodSandbox {
    cri::PodSandbox {
        id: pod.id().to_owned(),
        metadata: Some(pod.metadata()),
        state: pod_state(pod.stage()) as i32,
        created_at: pod.record.created_at,
        labels: pod.record.config.labels.clone(),
        annotations: pod.record.config.annotations.clone(),
        runtime_handler: pod.record.handler.clone(),
    }
}

pub async fn status(
    node: &Node,
    request: &cri::PodSandboxStatusRequest,
) -> Result<cri::PodSandboxStatusResponse, PodError> {
    let pod = node.pod(&request.pod_sandbox_id)?;
    let info = if request.verbose {
        info(node, &pod).await
    } else {
        HashMap::new()
    };
    Ok(cri::PodSandboxStatusResponse {
        status: Some(pod_status(&pod, pod.stage())),
        info,
        // For the evented PLEG, which puts them beside the events.
        containers_statuses: newest_first(
            node.containers_of_pod(&pod)
                .iter()
                .map(|c| container_status(c, c.status()))
                .collect(),
        ),
        timestamp: now(),
    })
}

/// With the evented PLEG, the kubelet takes the first status of a name for the present one, and does not sort.
pub fn newest_first(mut statuses: Vec<cri::ContainerStatus>) -> Vec<cri::ContainerStatus> {
    statuses.sort_by_key(|status| std::cmp::Reverse(status.created_at));
    statuses
}

/// A pod's status on the wire.
pub fn pod_status(pod: &Pod, stage: PodStage) -> cri::PodSandboxStatus {
    let config = &pod.record.config;
    let security = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref());
    let options = security
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default();
    // A stopped pod has given its addresses back; they may be another's by now.
    let ips = if stage == PodStage::Ready {
        pod.record.ips.as_slice()
    } else {
        &[]
    };
    let (ip, additional_ips) = match ips.split_first() {
        Some((first, more)) => (
            first.to_string(),
            more.iter()
                .map(|ip| cri::PodIp { ip: ip.to_string() })
                .collect(),
        ),
        None => (String::new(), Vec::new()),
    };
    cri::PodSandboxStatus {
        id: pod.id().to_owned(),
        metadata: Some(pod.metadata()),
        state: pod_state(stage) as i32,
        created_at: pod.record.created_at,
        network: Some(cri::PodSandboxNetworkStatus { ip, additional_ips }),
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(options),
            }),
        }),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        runtime_handler: pod.record.handler.clone(),
    }
}

/// What `crictl inspectp` shows beside the status.
async fn info(node: &Node, pod: &Pod) -> HashMap<String, String> {
    let record = &pod.record;
    let networks: Vec<_> = node
        .cni
        .cached(pod.id())
        .map(|result| result.networks)
        .unwrap_or_default()
        .iter()
        .map(|at| {
            let result = at.result.to_version(at.result.version());
            json!({ "network": at.network, "ifname": at.ifname, "result": result })
        })
        .collect();
    let info = json!({
        "runtime": record.runtime,
        "bootId": record.boot_id,
        "stage": pod.stage().as_str(),
        "directory": pod.dir,
        "keeperPid": pod.keeper_pid().await,
        "cgroup": record.cgroup,
        "namespaces": record.namespaces,
        "cniResult": networks,
    });
    HashMap::from([
        ("info".to_owned(), info.to_string()),
        ("phases".to_owned(), json!(record.phases).to_string()),
    ])
}
