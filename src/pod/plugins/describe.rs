//! Pods and containers in NRI's words.

use std::collections::BTreeMap;

use oci_spec::runtime::Spec;
use slipway_image::Image;
use slipway_nri::api;
use slipway_proto::cri;
use slipway_spec::ContainerPlan;

use crate::pod::container::Container;
use crate::pod::record::PodRecord;
use crate::pod::state::Stage;

/// A pod. It has no process of its own that a plugin could look at.
pub fn pod(record: &PodRecord) -> api::PodSandbox {
    let (config, metadata) = (
        &record.config,
        record.config.metadata.clone().unwrap_or_default(),
    );
    let linux = config.linux.clone().unwrap_or_default();
    let own = &record.namespaces;
    let namespaces = [
        ("network", &own.network),
        ("ipc", &own.ipc),
        ("uts", &own.uts),
        ("pid", &own.pid),
    ];
    api::PodSandbox {
        id: record.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: config.labels.clone().into_iter().collect(),
        annotations: config.annotations.clone().into_iter().collect(),
        runtime_handler: record.handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(resources),
            pod_resources: linux.resources.as_ref().map(resources),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path: record.cgroup.clone(),
            namespaces: (namespaces.into_iter())
                .filter(|(_, path)| !path.is_empty())
                .map(|(kind, path)| api::LinuxNamespace {
                    r#type: kind.to_owned(),
                    path: path.clone(),
                })
                .collect(),
            resources: None,
        }),
        pid: 0,
        ips: record.ips.iter().map(ToString::to_string).collect(),
    }
}

/// A container that is to be created.
pub fn new_container(
    pod: &PodRecord,
    id: &str,
    config: &cri::ContainerConfig,
    plan: &ContainerPlan,
    image: &Image,
) -> api::Container {
    let mut container = of_spec(id, config, &plan.spec, &plan.resources);
    container.pod_sandbox_id.clone_from(&pod.id);
    // The specification is text; what is not, a plugin can't see.
    container.env = (plan.create.env.iter())
        .filter_map(|entry| String::from_utf8(entry.clone()).ok())
        .collect();
    if let Some(linux) = &mut container.linux {
        let score = plan.create.oom_score_adj;
        linux.oom_score_adj = Some(api::OptionalInt {
            value: score.into(),
        });
    }
    if let Some(user) = &plan.create.user {
        // Checked when the plan was made. A name is resolved in the image, later.
        let id = |id: i64| u32::try_from(id).unwrap_or_default();
        container.user = user.run_as_user.map(|uid| api::User {
            uid: id(uid),
            gid: user.run_as_group.map(id).unwrap_or_default(),
            additional_gids: user.supplemental_groups.iter().copied().map(id).collect(),
        });
    }
    let asked = config.image.as_ref().map(|image| image.image.clone());
    container.image = Some(api::Image {
        name: asked.unwrap_or_default(),
        digest: image
            .repo_digests
            .first()
            .map(|d| digest(d))
            .unwrap_or_default(),
        config_digest: image.id.clone(),
    });
    container
}

/// A container that there is. Its specification is read from its directory; what can't be read is left out.
pub fn container(pod: &PodRecord, container: &Container) -> api::Container {
    let (record, status) = (&container.record, container.status());
    let spec = std::fs::read(container.dir.join(slipway_runtime::SPEC_FILE));
    let spec: Spec = (spec.ok())
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let limits = container.resources();
    let mut described = of_spec(container.id(), &record.config, &spec, &limits);
    described.pod_sandbox_id.clone_from(&pod.id);
    if let Some(linux) = &mut described.linux {
        linux.oom_score_adj = Some(api::OptionalInt {
            value: limits.oom_score_adj,
        });
    }
    described.state = match status.stage {
        Stage::Created => api::ContainerState::ContainerCreated,
        Stage::Running => api::ContainerState::ContainerRunning,
        Stage::Exited => api::ContainerState::ContainerStopped,
    }
    .into();
    described.pid = status.pid.try_into().unwrap_or_default();
    described.created_at = status.created_at;
    described.started_at = status.started_at;
    described.finished_at = status.finished_at;
    described.exit_code = status.exit_code;
    status.reason().clone_into(&mut described.status_reason);
    described.status_message = status.message;
    described.user = Some(api::User {
        uid: record.uid,
        gid: record.gid,
        additional_gids: record.groups.clone(),
    });
    described.image = Some(api::Image {
        name: record.image_name.clone(),
        digest: digest(&record.image_ref),
        config_digest: record.image_id.clone(),
    });
    described
}

/// The digest behind a reference; nothing where there is none.
fn digest(reference: &str) -> String {
    let digest = reference.split_once('@').map(|(_, digest)| digest);
    digest.unwrap_or_default().to_owned()
}

/// What specification and configuration say.
fn of_spec(
    id: &str,
    config: &cri::ContainerConfig,
    spec: &Spec,
    limits: &cri::LinuxContainerResources,
) -> api::Container {
    let metadata = config.metadata.clone().unwrap_or_default();
    let process = spec.process().as_ref();
    let mut annotations: BTreeMap<_, _> = spec
        .annotations()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    for (key, value) in &config.annotations {
        annotations
            .entry(key.clone())
            .or_insert_with(|| value.clone());
    }
    let mounts = spec.mounts().iter().flatten().map(|mount| api::Mount {
        destination: mount.destination().to_string_lossy().into_owned(),
        r#type: mount.typ().clone().unwrap_or_default(),
        source: (mount.source().as_ref())
            .map(|source| source.to_string_lossy().into_owned())
            .unwrap_or_default(),
        options: mount.options().clone().unwrap_or_default(),
    });
    let rlimits = process.and_then(|p| p.rlimits().as_ref());
    api::Container {
        id: id.to_owned(),
        name: metadata.name,
        labels: config.labels.clone().into_iter().collect(),
        annotations,
        args: process.and_then(|p| p.args().clone()).unwrap_or_default(),
        env: process.and_then(|p| p.env().clone()).unwrap_or_default(),
        mounts: mounts.collect(),
        hooks: spec.hooks().as_ref().map(hooks),
        linux: Some(linux(config, spec, limits)),
        rlimits: (rlimits.into_iter().flatten())
            .map(|limit| api::PosixRlimit {
                r#type: limit.typ().to_string(),
                hard: limit.hard(),
                soft: limit.soft(),
            })
            .collect(),
        ..Default::default()
    }
}

fn hooks(hooks: &oci_spec::runtime::Hooks) -> api::Hooks {
    let list = |list: &Option<Vec<oci_spec::runtime::Hook>>| {
        let hooks = list.iter().flatten().map(|hook| api::Hook {
            path: hook.path().to_string_lossy().into_owned(),
            args: hook.args().clone().unwrap_or_default(),
            env: hook.env().clone().unwrap_or_default(),
            timeout: hook.timeout().map(|value| api::OptionalInt { value }),
        });
        hooks.collect()
    };
    #[allow(deprecated)] // What a plugin was told it could add it shall see.
    let prestart = list(hooks.prestart());
    api::Hooks {
        prestart,
        create_runtime: list(hooks.create_runtime()),
        create_container: list(hooks.create_container()),
        start_container: list(hooks.start_container()),
        poststart: list(hooks.poststart()),
        poststop: list(hooks.poststop()),
    }
}

fn linux(
    config: &cri::ContainerConfig,
    spec: &Spec,
    limits: &cri::LinuxContainerResources,
) -> api::LinuxContainer {
    let Some(linux) = spec.linux() else {
        return api::LinuxContainer {
            resources: Some(resources(limits)),
            ..Default::default()
        };
    };
    let namespaces = linux
        .namespaces()
        .iter()
        .flatten()
        .map(|namespace| api::LinuxNamespace {
            r#type: namespace.typ().to_string(),
            path: (namespace.path().as_ref())
                .map(|path| path.to_string_lossy().into_owned())
                .unwrap_or_default(),
        });
    let devices = linux
        .devices()
        .iter()
        .flatten()
        .map(|device| api::LinuxDevice {
            path: device.path().to_string_lossy().into_owned(),
            r#type: device.typ().as_str().to_owned(),
            major: device.major(),
            minor: device.minor(),
            file_mode: device
                .file_mode()
                .map(|value| api::OptionalFileMode { value }),
            uid: device.uid().map(|value| api::OptionalUInt32 { value }),
            gid: device.gid().map(|value| api::OptionalUInt32 { value }),
        });
    let mut all = resources(limits);
    if let Some(oci) = linux.resources() {
        all.pids = (oci.pids().as_ref()).map(|pids| api::LinuxPids {
            limit: pids.limit(),
        });
        let rules = oci
            .devices()
            .iter()
            .flatten()
            .map(|rule| api::LinuxDeviceCgroup {
                allow: rule.allow(),
                r#type: rule
                    .typ()
                    .map(|typ| typ.as_str().to_owned())
                    .unwrap_or_default(),
                major: rule.major().map(|value| api::OptionalInt64 { value }),
                minor: rule.minor().map(|value| api::OptionalInt64 { value }),
                access: rule.access().clone().unwrap_or_default(),
            });
        all.devices = rules.collect();
    }
    let net_devices = linux.net_devices().iter().flatten().map(|(host, device)| {
        let name = device.name().clone().unwrap_or_default();
        (host.clone(), api::LinuxNetDevice { name })
    });
    api::LinuxContainer {
        namespaces: namespaces.collect(),
        devices: devices.collect(),
        resources: Some(all),
        cgroups_path: (linux.cgroups_path().as_ref())
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        seccomp_profile: Some(seccomp_profile(config)),
        sysctl: linux
            .sysctl()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        net_devices: net_devices.collect(),
        ..Default::default()
    }
}

fn seccomp_profile(config: &cri::ContainerConfig) -> api::SecurityProfile {
    use api::security_profile::ProfileType;
    use cri::security_profile::ProfileType as Asked;
    let security = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref());
    let privileged = security.is_some_and(|s| s.privileged);
    let profile = security.and_then(|s| s.seccomp.clone());
    let kind = match profile.as_ref().map(cri::SecurityProfile::profile_type) {
        _ if privileged => ProfileType::Unconfined,
        Some(Asked::RuntimeDefault) => ProfileType::RuntimeDefault,
        Some(Asked::Localhost) => ProfileType::Localhost,
        Some(Asked::Unconfined) | None => ProfileType::Unconfined,
    };
    api::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: profile.map(|p| p.localhost_ref).unwrap_or_default(),
    }
}

/// Limits: those that are set.
pub fn resources(cri: &cri::LinuxContainerResources) -> api::LinuxResources {
    let int = |value: i64| (value != 0).then_some(api::OptionalInt64 { value });
    let uint = |value: i64| {
        let value = u64::try_from(value).ok().filter(|value| *value != 0);
        value.map(|value| api::OptionalUInt64 { value })
    };
    api::LinuxResources {
        memory: Some(api::LinuxMemory {
            limit: int(cri.memory_limit_in_bytes),
            swap: int(cri.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(api::LinuxCpu {
            shares: uint(cri.cpu_shares),
            quota: int(cri.cpu_quota),
            period: uint(cri.cpu_period),
            cpus: cri.cpuset_cpus.clone(),
            mems: cri.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: (cri.hugepage_limits.iter())
            .map(|limit| api::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        unified: cri.unified.clone().into_iter().collect(),
        ..Default::default()
    }
}
