//! ContainerStats, ListContainerStats, PodSandboxStats, ListPodSandboxStats.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use slipway_observe::cgroup::Usage;
use slipway_observe::network::Interface;
use slipway_observe::{Pressure, Stall};
use slipway_proto::{cri, wire};

use super::filter::{container_stats_fit, pod_stats_fit};
use crate::pod::stats::{ContainerSample, PodSample, SHARED};
use crate::pod::{Container, Node, Pod, PodError};

/// What CNI is asked to call a pod's first interface.
const DEFAULT_INTERFACE: &str = "eth0";
/// Bytes that the statistics of most containers take up on the wire.
const ROOM: usize = 1024;

pub async fn container(
    node: &Arc<Node>,
    request: cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, PodError> {
    let container = node.container(&request.container_id)?;
    let stats = of_containers(node, vec![container]);
    Ok(cri::ContainerStatsResponse {
        stats: stats.into_iter().next(),
    })
}

pub async fn list_containers(
    node: &Arc<Node>,
    request: cri::ListContainerStatsRequest,
) -> Result<cri::ListContainerStatsResponse, PodError> {
    let found = chosen_containers(node, request.filter.as_ref());
    let place = place(node);
    let encode = move |sample: ContainerSample| {
        let mut stats = Vec::with_capacity(ROOM);
        put_container(1, &sample, &place, &mut stats);
        stats
    };
    let age = age(request.filter.is_none_or(|f| f == Default::default()));
    let all = node.sample_containers(found, age, encode);
    Ok(cri::ListContainerStatsResponse {
        encoded: all.concat(),
        ..Default::default()
    })
}

pub async fn pod(
    node: &Arc<Node>,
    request: cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, PodError> {
    let pod = node.pod(&request.pod_sandbox_id)?;
    let stats = of_pods(node, vec![pod]);
    Ok(cri::PodSandboxStatsResponse {
        stats: stats.into_iter().next(),
    })
}

pub async fn list_pods(
    node: &Arc<Node>,
    request: cri::ListPodSandboxStatsRequest,
) -> Result<cri::ListPodSandboxStatsResponse, PodError> {
    let found = chosen_pods(node, request.filter.as_ref());
    let place = place(node);
    let encode = move |sample: ContainerSample| {
        let mut stats = Vec::with_capacity(ROOM);
        put_container(5, &sample, &place, &mut stats);
        stats
    };
    let mut answer = cri::ListPodSandboxStatsResponse::default();
    let age = age(request.filter.is_none_or(|f| f == Default::default()));
    for sample in node.sample_pods(found, age, encode) {
        put_pod(&sample, &mut answer.encoded);
    }
    Ok(answer)
}

/// The containers that are asked for.
pub fn chosen_containers(
    node: &Node,
    filter: Option<&cri::ContainerStatsFilter>,
) -> Vec<Arc<Container>> {
    let mut found = node.containers.all();
    found.retain(|c| {
        let labels = &c.record.config.labels;
        container_stats_fit(filter, c.id(), &c.record.pod_id, labels)
    });
    found
}

/// The pods that are asked for.
pub fn chosen_pods(node: &Node, filter: Option<&cri::PodSandboxStatsFilter>) -> Vec<Arc<Pod>> {
    let mut found = node.pods.all();
    found.retain(|pod| pod_stats_fit(filter, pod.id(), &pod.record.config.labels));
    found
}

/// How old a sample may be: who asks for certain containers or pods is told how they are now.
fn age(all: bool) -> Duration {
    if all { SHARED } else { Duration::ZERO }
}

/// Statistics of these containers, as they are now.
pub fn of_containers(node: &Node, containers: Vec<Arc<Container>>) -> Vec<cri::ContainerStats> {
    let place = place(node);
    let tell = move |sample: ContainerSample| container_stats(&sample, &place);
    node.sample_containers(containers, Duration::ZERO, tell)
}

/// Statistics of these pods, as they are now.
pub fn of_pods(node: &Node, pods: Vec<Arc<Pod>>) -> Vec<cri::PodSandboxStats> {
    let place = place(node);
    let tell = move |sample: ContainerSample| container_stats(&sample, &place);
    let samples = node.sample_pods(pods, Duration::ZERO, tell);
    samples.into_iter().map(pod_stats).collect()
}

/// The file system of writable layers, called as in ImageFsInfo.
fn place(node: &Node) -> cri::FilesystemIdentifier {
    let mountpoint = node.config().state_root.to_string_lossy().into_owned();
    cri::FilesystemIdentifier { mountpoint }
}

fn container_stats(
    sample: &ContainerSample,
    place: &cri::FilesystemIdentifier,
) -> cri::ContainerStats {
    let container = &sample.container;
    let config = &container.record.config;
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.id().to_owned(),
            metadata: Some(container.metadata()),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        ..measured_container(sample, place)
    }
}

/// Appends [`container_stats`] as a field of a message.
fn put_container(
    tag: u32,
    sample: &ContainerSample,
    place: &cri::FilesystemIdentifier,
    out: &mut Vec<u8>,
) {
    let config = &sample.container.record.config;
    wire::nested(tag, out, |out| {
        wire::nested(1, out, |out| {
            wire::string(1, &sample.container.record.id, out);
            wire::message(2, config.metadata.as_ref(), out);
            wire::strings(3, &config.labels, out);
            wire::strings(4, &config.annotations, out);
        });
        measured_container(sample, place).encode_raw(out);
    });
}

/// All but whose it is.
fn measured_container(
    sample: &ContainerSample,
    place: &cri::FilesystemIdentifier,
) -> cri::ContainerStats {
    let usage = sample.usage.as_ref();
    cri::ContainerStats {
        attributes: None,
        cpu: usage.and_then(|u| cpu(u, sample.nano_cores)),
        memory: usage.and_then(memory),
        writable_layer: sample.layer.map(|layer| cri::FilesystemUsage {
            timestamp: layer.at,
            fs_id: Some(place.clone()),
            used_bytes: number(layer.usage.bytes),
            inodes_used: number(layer.usage.inodes),
        }),
        swap: usage.and_then(swap),
        io: usage.and_then(io),
    }
}

fn pod_stats(mut sample: PodSample<cri::ContainerStats>) -> cri::PodSandboxStats {
    let config = &sample.pod.record.config;
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: sample.pod.id().to_owned(),
            metadata: Some(sample.pod.metadata()),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            containers: std::mem::take(&mut sample.containers),
            ..measured_pod(&sample)
        }),
        windows: None,
    }
}

/// Appends [`pod_stats`] as an object of a list. The containers are fields of what the pod uses.
fn put_pod(sample: &PodSample<Vec<u8>>, out: &mut Vec<u8>) {
    let config = &sample.pod.record.config;
    wire::nested(1, out, |out| {
        wire::nested(1, out, |out| {
            wire::string(1, &sample.pod.record.id, out);
            wire::message(2, config.metadata.as_ref(), out);
            wire::strings(3, &config.labels, out);
            wire::strings(4, &config.annotations, out);
        });
        wire::nested(2, out, |out| {
            measured_pod(sample).encode_raw(out);
            for container in &sample.containers {
                out.extend_from_slice(container);
            }
        });
    });
}

/// All but its containers.
fn measured_pod<C>(sample: &PodSample<C>) -> cri::LinuxPodSandboxStats {
    let usage = sample.usage.as_ref();
    cri::LinuxPodSandboxStats {
        cpu: usage.and_then(|u| cpu(u, sample.nano_cores)),
        memory: usage.and_then(memory),
        network: sample.interfaces.as_deref().and_then(network),
        process: sample.processes.map(|count| cri::ProcessUsage {
            timestamp: slipway_observe::now(),
            process_count: number(count),
        }),
        containers: Vec::new(),
        io: usage.and_then(io),
    }
}

#[allow(clippy::unnecessary_wraps)] // The messages want options.
fn number(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn cpu(usage: &Usage, nano_cores: Option<u64>) -> Option<cri::CpuUsage> {
    Some(cri::CpuUsage {
        timestamp: usage.at,
        usage_core_nano_seconds: number(usage.cpu?),
        usage_nano_cores: nano_cores.and_then(number),
        psi: usage.cpu_pressure.as_ref().map(psi),
    })
}

fn memory(usage: &Usage) -> Option<cri::MemoryUsage> {
    let memory = usage.memory?;
    Some(cri::MemoryUsage {
        timestamp: usage.at,
        working_set_bytes: number(memory.working_set()),
        available_bytes: memory.available().and_then(number),
        usage_bytes: number(memory.usage),
        rss_bytes: number(memory.rss),
        page_faults: number(memory.page_faults),
        major_page_faults: number(memory.major_page_faults),
        psi: usage.memory_pressure.as_ref().map(psi),
    })
}

fn swap(usage: &Usage) -> Option<cri::SwapUsage> {
    let swap = usage.swap?;
    Some(cri::SwapUsage {
        timestamp: usage.at,
        swap_available_bytes: swap.available().and_then(number),
        swap_usage_bytes: number(swap.usage),
    })
}

fn io(usage: &Usage) -> Option<cri::IoUsage> {
    Some(cri::IoUsage {
        timestamp: usage.at,
        psi: Some(psi(usage.io_pressure.as_ref()?)),
    })
}

fn psi(pressure: &Pressure) -> cri::PsiStats {
    let data = |stall: Stall| cri::PsiData {
        // The kernel counts microseconds, the CRI nanoseconds.
        total: stall.total.saturating_mul(1000),
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    cri::PsiStats {
        full: Some(data(pressure.full)),
        some: Some(data(pressure.some)),
    }
}

/// The interface of the pod's first network is its default one. None without any interface: the kubelet (1.36)
/// reads through the default one unchecked, and dies of one that is not there.
fn network(interfaces: &[Interface]) -> Option<cri::NetworkUsage> {
    let usage = |interface: &Interface| cri::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: number(interface.rx.bytes),
        rx_errors: number(interface.rx.errors),
        tx_bytes: number(interface.tx.bytes),
        tx_errors: number(interface.tx.errors),
    };
    let default = interfaces
        .iter()
        .position(|i| i.name == DEFAULT_INTERFACE)
        .unwrap_or(0);
    let default_interface = Some(usage(interfaces.get(default)?));
    let others = interfaces.iter().enumerate();
    Some(cri::NetworkUsage {
        timestamp: slipway_observe::now(),
        default_interface,
        interfaces: others
            .filter(|(at, _)| *at != default)
            .map(|(_, interface)| usage(interface))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_interface_is_told_apart() {
        let named = |name: &str| Interface {
            name: name.to_owned(),
            ..Interface::default()
        };
        let split = |names: &[&str]| {
            let list: Vec<_> = names.iter().map(|n| named(n)).collect();
            let usage = network(&list).unwrap();
            let default = usage.default_interface.map(|i| i.name).unwrap_or_default();
            let others: Vec<_> = usage.interfaces.into_iter().map(|i| i.name).collect();
            (default, others)
        };
        let own = str::to_owned;
        assert_eq!(split(&["net1", "eth0"]), (own("eth0"), vec![own("net1")]));
        assert_eq!(split(&["a", "b"]), (own("a"), vec![own("b")]));
        assert_eq!(network(&[]), None);
    }

    #[test]
    fn pressure_is_in_nanoseconds_and_what_is_not_told_is_absent() {
        let usage = Usage {
            at: 5,
            cpu: Some(7),
            io_pressure: Some(Pressure {
                some: Stall {
                    total: 3,
                    ..Stall::default()
                },
                ..Pressure::default()
            }),
            ..Usage::default()
        };
        let total = io(&usage).unwrap().psi.unwrap().some.unwrap().total;
        assert_eq!(total, 3000);
        let cpu = cpu(&usage, None).unwrap();
        assert_eq!(cpu.usage_core_nano_seconds, number(7));
        assert_eq!((cpu.usage_nano_cores, cpu.psi), (None, None));
        assert_eq!((memory(&usage), swap(&usage)), (None, None));
    }
}
