//! Containers: CreateContainer, StartContainer, StopContainer, RemoveContainer, ContainerStatus,
//! ListContainers.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message as _;
use serde_json::{Value, json};
use slipway_proto::{cri, wire};

use super::filter::{container_fits, container_state};
use super::signal;
use crate::pod::state::Status;
use crate::pod::{Container, Node, PodError};

pub async fn create(
    node: &Arc<Node>,
    request: cri::CreateContainerRequest,
) -> Result<cri::CreateContainerResponse, PodError> {
    let container_id = node.create_container(request).await?;
    Ok(cri::CreateContainerResponse { container_id })
}

pub async fn start(
    node: &Arc<Node>,
    request: cri::StartContainerRequest,
) -> Result<cri::StartContainerResponse, PodError> {
    node.start_container(&request.container_id).await?;
    Ok(cri::StartContainerResponse {})
}

pub async fn update(
    node: &Arc<Node>,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, PodError> {
    let linux = request.linux.ok_or_else(|| {
        PodError::Invalid("UpdateContainerResources needs linux resources".to_owned())
    })?;
    node.resize_container(&request.container_id, linux).await?;
    Ok(cri::UpdateContainerResourcesResponse {})
}

pub async fn stop(
    node: &Arc<Node>,
    request: cri::StopContainerRequest,
) -> Result<cri::StopContainerResponse, PodError> {
    node.stop_container(&request.container_id, request.timeout)
        .await?;
    Ok(cri::StopContainerResponse {})
}

pub async fn remove(
    node: &Arc<Node>,
    request: cri::RemoveContainerRequest,
) -> Result<cri::RemoveContainerResponse, PodError> {
    node.remove_container(&request.container_id).await?;
    Ok(cri::RemoveContainerResponse {})
}

pub fn list(node: &Node, request: &cri::ListContainersRequest) -> cri::ListContainersResponse {
    let mut answer = cri::ListContainersResponse::default();
    for container in chosen(node, request.filter.as_ref()) {
        wire::nested(1, &mut answer.encoded, |out| put_listed(&container, out));
    }
    answer
}

/// The containers that pass the filter, as they are when they are reached.
pub fn stream(
    node: &Node,
    request: cri::StreamContainersRequest,
) -> impl Iterator<Item = cri::Container> + Send + 'static {
    let found = chosen(node, request.filter.as_ref());
    found.into_iter().map(|container| listed(&container))
}

fn chosen(node: &Node, filter: Option<&cri::ContainerFilter>) -> Vec<Arc<Container>> {
    let mut found = node.containers.all();
    found.retain(|c| {
        let labels = &c.record.config.labels;
        container_fits(filter, c.id(), &c.record.pod_id, c.stage(), labels)
    });
    found
}

fn listed(c: &Container) -> cri::Container {
    cri::Container {
        id: c.id().to_owned(),
        pod_sandbox_id: c.record.pod_id.clone(),
        metadata: Some(c.metadata()),
        image: c.record.config.image.clone(),
        image_ref: c.record.image_ref.clone(),
        state: container_state(c.stage()) as i32,
        created_at: c.status().created_at,
        labels: c.record.config.labels.clone(),
        annotations: c.record.config.annotations.clone(),
        image_id: c.record.image_id.clone(),
    }
}

/// The bytes of [`listed`]: a kubelet asks for all of them each second.
fn put_listed(c: &Container, out: &mut Vec<u8>) {
    let status = c.status();
    let changing = cri::Container {
        state: container_state(status.stage) as i32,
        created_at: status.created_at,
        ..cri::Container::default()
    };
    let (record, config) = (&c.record, &c.record.config);
    wire::string(1, &record.id, out);
    wire::string(2, &record.pod_id, out);
    wire::message(3, config.metadata.as_ref(), out);
    wire::message(4, config.image.as_ref(), out);
    wire::string(5, &record.image_ref, out);
    changing.encode_raw(out);
    wire::strings(8, &config.labels, out);
    wire::strings(9, &config.annotations, out);
    wire::string(10, &record.image_id, out);
}

pub fn status(
    node: &Node,
    request: &cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, PodError> {
    let container = node.container(&request.container_id)?;
    let info = if request.verbose {
        info(node, &container)
    } else {
        HashMap::new()
    };
    Ok(cri::ContainerStatusResponse {
        status: Some(container_status(&container, container.status())),
        info,
    })
}

/// A container's status on the wire.
pub fn container_status(container: &Container, status: Status) -> cri::ContainerStatus {
    let record = &container.record;
    let image = record.config.image.clone().unwrap_or_default();
    cri::ContainerStatus {
        id: container.id().to_owned(),
        metadata: Some(container.metadata()),
        state: container_state(status.stage) as i32,
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        image: Some(cri::ImageSpec {
            image: record.image_name.clone(),
            ..image
        }),
        image_ref: record.image_ref.clone(),
        reason: status.reason().to_owned(),
        message: status.message,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.mounts.clone(),
        log_path: record.log_path.clone(),
        resources: Some(cri::ContainerResources {
            linux: Some(container.resources()),
            windows: None,
        }),
        image_id: record.image_id.clone(),
        user: Some(cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: record.uid.into(),
                gid: record.gid.into(),
                supplemental_groups: record.groups.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }),
        stop_signal: signal::on_wire(record.stop_signal) as i32,
    }
}

/// What `crictl inspect` shows beside the status.
fn info(node: &Node, container: &Container) -> HashMap<String, String> {
    let record = &container.record;
    let spec: Value = std::fs::read(container.dir.join(slipway_runtime::SPEC_FILE))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let info = json!({
        "sandboxID": record.pod_id,
        "pid": container.status().pid,
        "cgroup": record.cgroup,
        "directory": container.dir,
        "image": record.image_id,
        "runtimeSpec": spec,
    });
    // The start's own steps are told apart from the creation's by the method's name.
    let mut phases = record.phases.clone();
    for trace in node.traces.of_container(container.id()) {
        if trace.method != "CreateContainer" {
            phases.extend(trace.phases.into_iter().map(|mut phase| {
                phase.name = format!("{}.{}", trace.method, phase.name);
                phase
            }));
        }
    }
    HashMap::from([
        ("info".to_owned(), info.to_string()),
        ("phases".to_owned(), json!(phases).to_string()),
    ])
}
