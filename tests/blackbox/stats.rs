//! Statistics and metrics of pods and containers, and the Stream calls.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tonic::{Code, Status};

use crate::harness::*;

tests![
    a_busy_container_is_measured,
    memory_and_its_limit,
    the_writable_layer,
    what_has_ended_uses_nothing,
    filters_of_statistics,
    those_who_ask_for_all_at_once_share_samples,
    a_pod_on_a_network_is_measured,
    a_pod_on_the_nodes_network,
    metrics_have_the_labels_of_their_descriptors,
    streams_say_what_lists_say,
    statistics_of_what_comes_and_goes,
];

impl Daemon {
    async fn container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let request = cri::ListContainerStatsRequest { filter };
        Ok(self
            .runtime()
            .list_container_stats(request)
            .await?
            .into_inner()
            .stats)
    }

    async fn pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>, Status> {
        let request = cri::ListPodSandboxStatsRequest { filter };
        Ok(self
            .runtime()
            .list_pod_sandbox_stats(request)
            .await?
            .into_inner()
            .stats)
    }

    async fn metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let request = cri::ListPodSandboxMetricsRequest {};
        Ok(self
            .runtime()
            .list_pod_sandbox_metrics(request)
            .await?
            .into_inner()
            .pod_metrics)
    }
}

/// ContainerStats.
pub async fn stats(container: &Container) -> Result<cri::ContainerStats> {
    let request = cri::ContainerStatsRequest {
        container_id: container.id.clone(),
    };
    let answer = container.daemon.runtime().container_stats(request).await?;
    answer.into_inner().stats.context("no stats")
}

/// A container's writable layer. One that was never counted may be absent on a busy machine: a call waits for a tenth
/// of a second only.
pub async fn counted_layer(container: &Container) -> Result<cri::FilesystemUsage> {
    eventually("the layer to be counted", seconds(10), || async {
        Ok(stats(container).await?.writable_layer)
    })
    .await
}

/// A number that must be there.
pub fn value(number: Option<cri::UInt64Value>) -> u64 {
    number.expect("a number").value
}

fn ids(stats: &[cri::ContainerStats]) -> BTreeSet<String> {
    let attributes = stats.iter().map(|s| s.attributes.clone().unwrap());
    attributes.map(|a| a.id).collect()
}

/// What two answers about the same containers have in common: whose they are, and what they tell.
fn outlines(stats: &[cri::ContainerStats]) -> BTreeMap<String, impl PartialEq + std::fmt::Debug> {
    let outline = |s: &cri::ContainerStats| {
        let attributes = s.attributes.clone().unwrap();
        let told = (
            s.cpu.is_some(),
            s.memory.is_some(),
            s.swap.is_some(),
            s.io.is_some(),
        );
        (attributes.id.clone(), (attributes, told))
    };
    stats.iter().map(outline).collect()
}

async fn a_busy_container_is_measured(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let busy = pod
        .run(&["sh", "-c", "while :; do :; done"], |c| {
            c.labels.insert("k".into(), "v".into());
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            (resources.cpu_quota, resources.cpu_period) = (20_000, 100_000);
        })
        .await?;
    let first = stats(&busy).await?;
    let attributes = first.attributes.unwrap();
    assert_eq!(attributes.id, busy.id);
    assert_eq!(attributes.metadata, busy.config.metadata);
    assert_eq!(attributes.labels, busy.config.labels);
    let cpu = first.cpu.unwrap();
    assert!(cpu.timestamp > 0);
    assert_eq!(cpu.usage_nano_cores, None, "there is one sample only");
    // A second caller at once changes nothing for the first.
    let second = stats(&busy).await?.cpu.unwrap();
    // Unless this machine is so slow that there is a rate between the two.
    if second.timestamp - cpu.timestamp < 100_000_000 {
        assert_eq!(second.usage_nano_cores, None);
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let later = stats(&busy).await?.cpu.unwrap();
    let used = value(later.usage_core_nano_seconds) - value(cpu.usage_core_nano_seconds);
    assert!(used > 10_000_000, "{used} ns in more than a second");
    let cores = value(later.usage_nano_cores);
    assert!(
        (1..300_000_000).contains(&cores),
        "{cores} nanocores where a fifth of a core is allowed"
    );
    // Pressure is told where the kernel has it.
    let pressure = daemon_pressure();
    assert_eq!(later.psi.is_some(), pressure);
    if let Some(psi) = later.psi {
        assert!(psi.some.unwrap().total > 0, "it was throttled");
    }
    Ok(())
}

fn daemon_pressure() -> bool {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .any(|dir| std::fs::read_to_string(format!("{dir}/cpu.pressure")).is_ok())
}

async fn memory_and_its_limit(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    const LIMIT: u64 = 100 << 20;
    let limited = pod
        .run(&["sh", "-c", "probe eat 30; sleep 1000"], |c| {
            let linux = c.linux.get_or_insert_default();
            linux
                .resources
                .get_or_insert_default()
                .memory_limit_in_bytes = LIMIT as i64;
        })
        .await?;
    let free = pod.sleeper().await?;
    let memory = stats(&limited).await?.memory.unwrap();
    let (usage, set) = (value(memory.usage_bytes), value(memory.working_set_bytes));
    assert!(memory.timestamp > 0 && 0 < set && set <= usage && usage < LIMIT);
    assert_eq!(value(memory.available_bytes), LIMIT - set);
    assert!(value(memory.rss_bytes) <= usage);
    assert!(value(memory.page_faults) > 0);
    assert!(value(memory.major_page_faults) <= value(memory.page_faults));
    let memory = stats(&free).await?.memory.unwrap();
    assert_eq!(
        memory.available_bytes, None,
        "without a limit nothing is left of it"
    );
    Ok(())
}

async fn the_writable_layer(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let script = "mkdir /d; head -c 3145728 /dev/zero > /d/f; ln /d/f /d/g; echo done; sleep 1000";
    let writer = pod.run(&["sh", "-c", script], |_| {}).await?;
    writer.says("done").await?;
    let layer = counted_layer(&writer).await?;
    assert!(layer.timestamp > 0);
    let bytes = value(layer.used_bytes);
    assert!((3 << 20..4 << 20).contains(&bytes), "{bytes}");
    let inodes = value(layer.inodes_used);
    assert!((3..20).contains(&inodes), "{inodes}");
    let mount = layer.fs_id.unwrap().mountpoint;
    assert!(std::path::Path::new(&mount).is_dir(), "{mount}");
    let request = cri::ImageFsInfoRequest {};
    let info = daemon.images().image_fs_info(request).await?.into_inner();
    let place = info.container_filesystems[0].fs_id.clone().unwrap();
    assert_eq!(place.mountpoint, mount, "the same file system has one name");
    Ok(())
}

async fn what_has_ended_uses_nothing(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let created = pod.create(&["sleep", "1000"], |_| {}).await?;
    let ended = pod.run(&["true"], |_| {}).await?;
    ended.exited().await?;
    let of_created = stats(&created).await?;
    assert!(of_created.cpu.is_some() && of_created.memory.is_some());
    let of_ended = stats(&ended).await?;
    assert_eq!(of_ended.attributes.unwrap().id, ended.id);
    assert!(of_ended.cpu.is_none() && of_ended.memory.is_none());
    // What it wrote is still there.
    counted_layer(&ended).await?;
    pod.stop().await?;
    let stopped = daemon.pod_stats(None).await?.remove(0).linux.unwrap();
    assert!(stopped.cpu.is_none() && stopped.network.is_none());
    assert_eq!(stopped.containers.len(), 2);
    ended.remove().await?;
    let gone = cri::ContainerStatsRequest {
        container_id: ended.id.clone(),
    };
    refused(
        daemon.runtime().container_stats(gone).await,
        Code::NotFound,
        &[&ended.id],
    );
    let gone = cri::PodSandboxStatsRequest {
        pod_sandbox_id: "nobody".into(),
    };
    refused(
        daemon.runtime().pod_sandbox_stats(gone).await,
        Code::NotFound,
        &["nobody"],
    );
    Ok(())
}

async fn filters_of_statistics(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let labelled =
        |c: &mut cri::PodSandboxConfig| drop(c.labels.insert("tier".into(), "front".into()));
    let pods = [daemon.pod(labelled).await?, daemon.pod(|_| {}).await?];
    let mut containers = Vec::new();
    for (pod, colour) in [(&pods[0], "red"), (&pods[0], "blue"), (&pods[1], "red")] {
        let paint =
            |c: &mut cri::ContainerConfig| drop(c.labels.insert("colour".into(), colour.into()));
        containers.push(pod.run(&["sleep", "1000"], paint).await?);
    }
    let filter = |id: &str, pod: &str, labels: &[(&str, &str)]| cri::ContainerStatsFilter {
        id: id.to_owned(),
        pod_sandbox_id: pod.to_owned(),
        label_selector: labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
    };
    let red = &[("colour", "red")][..];
    let cases = [
        (None, vec![0, 1, 2]),
        (Some(filter("", "", &[])), vec![0, 1, 2]),
        (Some(filter(&containers[1].id, "", &[])), vec![1]),
        (Some(filter(&containers[1].id[..13], "", &[])), vec![1]),
        (Some(filter("", &pods[0].id, &[])), vec![0, 1]),
        (Some(filter("", "", red)), vec![0, 2]),
        (Some(filter("", &pods[1].id, red)), vec![2]),
        (Some(filter(&containers[1].id, "", red)), vec![]),
        (Some(filter("", "", &[("colour", "green")])), vec![]),
        (Some(filter("nobody", "", &[])), vec![]),
    ];
    for (filter, expected) in cases {
        let expected: BTreeSet<_> = expected
            .iter()
            .map(|n: &usize| containers[*n].id.clone())
            .collect();
        let found = daemon.container_stats(filter.clone()).await?;
        assert_eq!(ids(&found), expected, "{filter:?}");
    }
    let of_pods = |id: &str, labels: &[(&str, &str)]| cri::PodSandboxStatsFilter {
        id: id.to_owned(),
        label_selector: filter("", "", labels).label_selector,
    };
    for (filter, expected) in [
        (None, 2),
        (Some(of_pods(&pods[1].id[..13], &[])), 1),
        (Some(of_pods("", &[("tier", "front")])), 1),
        (Some(of_pods(&pods[1].id, &[("tier", "front")])), 0),
    ] {
        let found = daemon.pod_stats(filter.clone()).await?;
        assert_eq!(found.len(), expected, "{filter:?}");
    }
    Ok(())
}

async fn those_who_ask_for_all_at_once_share_samples(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod
        .run(&["sleep", "1000"], |c| {
            let linux = c.linux.get_or_insert_default();
            let resources = linux.resources.get_or_insert_default();
            resources.memory_limit_in_bytes = 64 << 20;
        })
        .await?;
    let taken = |stats: &cri::ContainerStats| stats.cpu.as_ref().unwrap().timestamp;
    let all = || async { anyhow::Ok(daemon.container_stats(None).await?.remove(0)) };
    let only = |id: &str| {
        Some(cri::ContainerStatsFilter {
            id: id.to_owned(),
            ..Default::default()
        })
    };
    // On a busy machine half a second may pass between any two calls.
    eventually("calls close to each other", seconds(20), || async {
        let first = all().await?;
        let again = daemon.container_stats(Some(Default::default())).await?;
        let of_pod = daemon.pod_stats(None).await?.remove(0).linux.unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        if now.as_nanos() as i64 - taken(&first) >= 500_000_000 {
            return Ok(None);
        }
        assert_eq!(again[0].cpu, first.cpu);
        assert_eq!(again[0].memory, first.memory);
        assert_eq!(of_pod.containers[0].memory, first.memory);
        assert!(
            of_pod.cpu.unwrap().timestamp > taken(&first),
            "the pod's own"
        );
        Ok(Some(()))
    })
    .await?;
    // Who names it is told how it is now, and the next who ask for all are told the same.
    let before = taken(&all().await?);
    let named = daemon.container_stats(only(&container.id)).await?.remove(0);
    assert!(taken(&named) > before);
    let before = taken(&all().await?);
    assert!(taken(&stats(&container).await?) > before);
    // A limit counts at once.
    all().await?;
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    daemon.runtime().update_container_resources(request).await?;
    let last = all().await?;
    let available = value(last.memory.unwrap().available_bytes);
    assert!(available <= 32 << 20, "{available}");
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(taken(&all().await?) > last.cpu.unwrap().timestamp);
    // An end does, too.
    all().await?;
    container.stop(0).await?;
    assert_eq!(all().await?.memory, None);
    Ok(())
}

async fn a_pod_on_a_network_is_measured(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(config::own_network).await?;
    let container = pod.sleeper().await?;
    let ask = || async {
        let request = cri::PodSandboxStatsRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        let answer = daemon.runtime().pod_sandbox_stats(request).await?;
        answer.into_inner().stats.context("no stats")
    };
    let before = ask().await?;
    let attributes = before.attributes.unwrap();
    assert_eq!(
        (attributes.id, attributes.metadata),
        (pod.id.clone(), pod.config.metadata.clone())
    );
    let linux = before.linux.unwrap();
    let before = linux.network.unwrap().default_interface.unwrap();
    assert_eq!(before.name, "eth0");
    assert!(value(linux.process.unwrap().process_count) >= 1);
    assert!(linux.cpu.is_some() && linux.memory.is_some());
    assert_eq!(linux.containers.len(), 1);
    let host = format!("10.{}.{}.1", 100 + env.number / 250, env.number % 250);
    container
        .exec_output(&["ping", "-c", "3", "-i", "0.2", &host])
        .await?;
    let network = ask().await?.linux.unwrap().network.unwrap();
    let after = network.default_interface.unwrap();
    assert!(value(after.tx_bytes) >= value(before.tx_bytes) + 3 * 84);
    assert!(value(after.rx_bytes) >= value(before.rx_bytes) + 3 * 84);
    assert!(network.interfaces.is_empty(), "no loopback");
    let admin = pod
        .run(&["ip", "link", "delete", "eth0"], |c| {
            container_security(c).capabilities = Some(cri::Capability {
                add_capabilities: vec!["NET_ADMIN".into()],
                ..cri::Capability::default()
            });
        })
        .await?;
    assert_eq!(admin.exited().await?.exit_code, 0);
    // A kubelet reads through a default interface unchecked.
    assert_eq!(ask().await?.linux.unwrap().network, None);
    Ok(())
}

async fn a_pod_on_the_nodes_network(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pod(|_| {}).await?;
    let stats = daemon.pod_stats(None).await?.remove(0).linux.unwrap();
    assert!(
        stats.network.is_none(),
        "the node's traffic is not the pod's"
    );
    assert!(stats.cpu.is_some());
    Ok(())
}

async fn metrics_have_the_labels_of_their_descriptors(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let request = cri::ListMetricDescriptorsRequest {};
    let answer = daemon.runtime().list_metric_descriptors(request).await?;
    let descriptors = answer.into_inner().descriptors;
    let keys: BTreeMap<_, _> = descriptors
        .into_iter()
        .map(|d| {
            assert!(!d.help.is_empty(), "{}", d.name);
            (d.name, d.label_keys)
        })
        .collect();
    let pod = daemon.pod(config::own_network).await?;
    let container = pod
        .run(&["sh", "-c", "while :; do :; done"], |c| {
            let linux = c.linux.get_or_insert_default();
            let r = linux.resources.get_or_insert_default();
            (r.cpu_quota, r.cpu_period, r.cpu_shares) = (10_000, 50_000, 512);
            r.memory_limit_in_bytes = 64 << 20;
        })
        .await?;
    let stopped = daemon.pod(|_| {}).await?;
    stopped.stop().await?;
    // A busy machine may leave it within its quota for a while.
    let throttled = || async {
        let mut all = daemon.metrics().await?;
        assert_eq!(all.len(), 1, "a stopped pod has none");
        let measured = all.remove(0);
        let own = measured.container_metrics.first();
        let metrics = own.into_iter().flat_map(|own| &own.metrics);
        let mut count = metrics.filter(|m| m.name == "container_cpu_cfs_throttled_periods_total");
        let seen = count.any(|m| value(m.value) > 0);
        Ok(seen.then_some(measured))
    };
    let measured = eventually("throttled periods", Duration::from_secs(30), throttled).await?;
    assert_eq!(measured.pod_sandbox_id, pod.id);
    assert_eq!(measured.container_metrics[0].container_id, container.id);
    let own = measured.container_metrics[0].metrics.clone();
    for metric in measured.metrics.iter().chain(&own) {
        let keys = keys.get(&metric.name).expect(&metric.name);
        assert_eq!(keys.len(), metric.label_values.len(), "{}", metric.name);
        assert!(
            metric.timestamp > 0 && metric.value.is_some(),
            "{}",
            metric.name
        );
    }
    let read = |name: &str| {
        let found = own.iter().find(|m| m.name == name).expect(name);
        value(found.value)
    };
    for (name, expected) in [
        ("container_spec_cpu_quota", 10_000),
        ("container_spec_cpu_period", 50_000),
        ("container_spec_cpu_shares", 512),
        ("container_spec_memory_limit_bytes", 64 << 20),
        ("container_processes", 1),
        ("container_threads", 1),
        ("container_oom_events_total", 0),
    ] {
        assert_eq!(read(name), expected, "{name}");
    }
    for name in [
        "container_cpu_cfs_periods_total",
        "container_cpu_cfs_throttled_periods_total",
        "container_file_descriptors",
        "container_fs_inodes_total",
        "container_fs_limit_bytes",
        "container_last_seen",
        "container_memory_usage_bytes",
        "container_memory_max_usage_bytes",
        "container_start_time_seconds",
        "container_ulimits_soft",
    ] {
        assert!(read(name) > 0, "{name}");
    }
    let metadata = pod.config.metadata.clone().unwrap();
    let name = container.config.metadata.clone().unwrap().name;
    let labels: BTreeMap<_, _> = keys["container_memory_rss"]
        .iter()
        .zip(
            &own.iter()
                .find(|m| m.name == "container_memory_rss")
                .unwrap()
                .label_values,
        )
        .collect();
    assert_eq!(labels[&"namespace".to_owned()], &metadata.namespace);
    assert_eq!(labels[&"pod".to_owned()], &metadata.name);
    assert_eq!(labels[&"container".to_owned()], &name);
    Ok(())
}

async fn collect<T>(mut stream: tonic::Streaming<T>) -> Result<Vec<T>, Status> {
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

async fn streams_say_what_lists_say(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let mut client = daemon.runtime();
    let empty = client.stream_containers(cri::StreamContainersRequest::default());
    assert!(collect(empty.await?.into_inner()).await?.is_empty());
    let label = |c: &mut cri::PodSandboxConfig| drop(c.labels.insert("n".into(), "1".into()));
    let pods = [daemon.pod(label).await?, daemon.pod(|_| {}).await?];
    for pod in &pods {
        pod.sleeper().await?;
        pod.create(&["true"], |_| {}).await?;
    }
    let listed = client
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await?;
    let streamed = client
        .stream_pod_sandboxes(cri::StreamPodSandboxesRequest::default())
        .await?;
    let streamed = collect(streamed.into_inner()).await?;
    let streamed: Vec<_> = streamed.into_iter().flat_map(|m| m.pod_sandboxes).collect();
    assert_eq!(streamed, listed.into_inner().items);
    let filter = cri::PodSandboxFilter {
        label_selector: [("n".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let request = cri::StreamPodSandboxesRequest {
        filter: Some(filter),
    };
    let some = collect(client.stream_pod_sandboxes(request).await?.into_inner()).await?;
    assert_eq!(some[0].pod_sandboxes[0].id, pods[0].id);

    let filter = cri::ContainerFilter {
        pod_sandbox_id: pods[1].id.clone(),
        ..Default::default()
    };
    for (filter, expected) in [(None, 4), (Some(filter), 2)] {
        let request = cri::ListContainersRequest {
            filter: filter.clone(),
        };
        let listed = client.list_containers(request).await?.into_inner();
        let request = cri::StreamContainersRequest { filter };
        let streamed = client.stream_containers(request).await?;
        let streamed = collect(streamed.into_inner()).await?;
        let streamed: Vec<_> = streamed.into_iter().flat_map(|m| m.containers).collect();
        assert_eq!(streamed, listed.containers);
        assert_eq!(streamed.len(), expected);
    }

    let streamed = client
        .stream_container_stats(cri::StreamContainerStatsRequest::default())
        .await?;
    let streamed = collect(streamed.into_inner()).await?;
    let streamed: Vec<_> = streamed
        .into_iter()
        .flat_map(|m| m.container_stats)
        .collect();
    let listed = daemon.container_stats(None).await?;
    assert_eq!(ids(&streamed), ids(&listed));
    assert_eq!(outlines(&streamed), outlines(&listed));

    let streamed = client
        .stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest::default())
        .await?;
    let streamed = collect(streamed.into_inner()).await?;
    let mut streamed: Vec<_> = streamed
        .into_iter()
        .flat_map(|m| m.pod_sandbox_stats)
        .collect();
    let mut listed = daemon.pod_stats(None).await?;
    assert_eq!((streamed.len(), listed.len()), (2, 2));
    for stats in [&mut streamed, &mut listed] {
        stats.sort_by_key(|s| s.attributes.as_ref().unwrap().id.clone());
    }
    for (streamed, listed) in streamed.iter().zip(&listed) {
        assert_eq!(streamed.attributes, listed.attributes);
        let (streamed, listed) = (streamed.linux.as_ref(), listed.linux.as_ref());
        let (streamed, listed) = (streamed.unwrap(), listed.unwrap());
        assert_eq!(outlines(&streamed.containers), outlines(&listed.containers));
        let count = |s: &cri::LinuxPodSandboxStats| s.process.as_ref().unwrap().process_count;
        assert_eq!(count(streamed), count(listed));
        assert!(listed.cpu.is_some() && listed.memory.is_some());
        assert_eq!(streamed.io.is_some(), listed.io.is_some());
    }

    let streamed = client
        .stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {})
        .await?;
    let streamed = collect(streamed.into_inner()).await?;
    let count: usize = streamed.iter().map(|m| m.pod_sandbox_metrics.len()).sum();
    assert_eq!(count, 2);

    let listed = daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?;
    let streamed = daemon
        .images()
        .stream_images(cri::StreamImagesRequest::default())
        .await?;
    let streamed = collect(streamed.into_inner()).await?;
    let streamed: Vec<_> = streamed.into_iter().flat_map(|m| m.images).collect();
    assert_eq!(streamed, listed.into_inner().images);
    Ok(())
}

async fn statistics_of_what_comes_and_goes(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(config::own_network).await?;
    let work = async {
        for _ in 0..8 {
            let container = pod.sleeper().await?;
            container.stop(0).await?;
            container.remove().await?;
        }
        pod.stop().await?;
        pod.remove().await?;
        anyhow::Ok(())
    };
    tokio::pin!(work);
    let mut asked = 0;
    loop {
        tokio::select! {
            done = &mut work => { done?; break }
            answer = async {
                daemon.container_stats(None).await?;
                daemon.pod_stats(None).await?;
                daemon.metrics().await
            } => { answer?; asked += 1 }
        }
    }
    assert!(asked > 0);
    assert!(daemon.container_stats(None).await?.is_empty());
    Ok(())
}
