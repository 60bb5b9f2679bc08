//! The node: Version, Status, RuntimeConfig, UpdateRuntimeConfig.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use slipway_config::CgroupDriver;
use slipway_network::NetworkStatus;
use slipway_proto::cri;

use crate::pod::{Node, PodError};

/// Version of the CRI that is served.
const API_VERSION: &str = "v1";
/// Version of the kubelet's own protocol; the same in every runtime.
const KUBE_API_VERSION: &str = "0.1.0";

pub fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        version: KUBE_API_VERSION.to_owned(),
        runtime_name: "slipway".to_owned(),
        runtime_version: crate::VERSION.to_owned(),
        runtime_api_version: API_VERSION.to_owned(),
    }
}

/// How long the first Status waits for runtimes of others to say what they can do. The kubelet sends pods by that.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

pub async fn status(node: &Node, request: &cri::StatusRequest) -> cri::StatusResponse {
    let condition = |kind: &str, problem: Option<(String, String)>| {
        let status = problem.is_none();
        let (reason, message) = problem.unwrap_or_default();
        cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            reason,
            message,
        }
    };
    let network = match node.cni.status() {
        NetworkStatus::Ready { .. } => None,
        NetworkStatus::NotReady { reason, message } => Some((reason, message)),
    };
    let runtimes = node.runtimes();
    // A program that was installed or replaced since is seen with the next call.
    let asked = node.tasks.spawn(runtimes.clone().ask_all());
    if runtimes.unasked() {
        let _ = tokio::time::timeout(FIRST_ANSWER, asked).await;
    }
    let runtime_handlers = runtimes
        .list()
        .into_iter()
        .map(|(name, handler)| {
            let features = handler.features();
            let features = Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: features.recursive_read_only_mounts,
                user_namespaces: features.user_namespaces,
            });
            cri::RuntimeHandler { name, features }
        })
        .collect();
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", None),
                condition("NetworkReady", network),
            ],
        }),
        info: if request.verbose {
            info(node)
        } else {
            HashMap::new()
        },
        runtime_handlers,
        features: Some(cri::RuntimeFeatures {
            // Groups are set by this very process's children; no kernel lacks that.
            supplemental_groups_policy: true,
            user_namespaces_host_network: node.features.user_namespaces,
            // nodev, noexec and nosuid for whole trees are set by the call that makes them read-only.
            mount_options: node.features.recursive_read_only_mounts,
        }),
    }
}

/// What `crictl info` shows beside the conditions.
fn info(node: &Node) -> HashMap<String, String> {
    let config = node.config();
    let network = match node.cni.status() {
        NetworkStatus::Ready { network } => json!({ "ready": true, "network": network }),
        NetworkStatus::NotReady { message, .. } => json!({ "ready": false, "message": message }),
    };
    let mut shown = json!(*config);
    // Where other programs look for what is on this node's disks.
    shown["stateDir"] = json!(config.state_root);
    let cdi = node.cdi().inventory();
    let rejected: Vec<_> = cdi.rejected.iter().map(ToString::to_string).collect();
    let cdi = json!({ "devices": cdi.devices, "conflicts": cdi.conflicts, "rejected": rejected });
    let handlers = node.runtimes().list().into_iter();
    let handlers = handlers.filter(|(name, _)| !name.is_empty());
    let handlers: HashMap<_, _> = handlers.map(|(name, h)| (name, h.report())).collect();
    let text = |value: serde_json::Value| value.to_string();
    HashMap::from([
        ("config".to_owned(), text(shown)),
        ("network".to_owned(), text(network)),
        ("cdi".to_owned(), text(cdi)),
        (
            "hooks".to_owned(),
            text(json!(node.hooks().now().inventory())),
        ),
        ("runtimes".to_owned(), text(json!(handlers))),
        ("podCidr".to_owned(), text(json!(*node.pod_cidr.read()))),
        ("version".to_owned(), text(json!(crate::VERSION))),
    ])
}

pub fn runtime_config(node: &Node) -> cri::RuntimeConfigResponse {
    let cgroup_driver = match node.config().cgroup.driver {
        CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
        CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
    };
    cri::RuntimeConfigResponse {
        linux: Some(cri::LinuxRuntimeConfiguration {
            cgroup_driver: cgroup_driver as i32,
        }),
    }
}

/// Pod addresses are CNI's matter; the range is only kept for the operator.
pub fn update_runtime_config(
    node: &Node,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<cri::UpdateRuntimeConfigResponse, PodError> {
    let network = request.runtime_config.and_then(|c| c.network_config);
    if let Some(network) = network {
        tracing::info!(
            pod_cidr = network.pod_cidr,
            "pod network range as the kubelet says"
        );
        *node.pod_cidr.write() = network.pod_cidr;
    }
    Ok(cri::UpdateRuntimeConfigResponse {})
}
