//! From the kubelet's configuration to what a keeper needs: the daemon's settings and the pod's state go
//! to `slipway-spec`, the chosen seccomp profile to `slipway-seccomp`.

use std::path::Path;
use std::sync::Arc;

use slipway_config::{CgroupDriver, Config, MissingMountSource};
use slipway_image::Image;
use slipway_proto::{cri, keeper};
use slipway_seccomp::{SeccompError, Source};
use slipway_spec::{
    ContainerInput, ContainerPlan, PodFiles, SandboxPlan, SeccompChoice, SpecOptions,
};

use super::block_io;
use super::error::{PodError, file};
use super::files::{HOSTNAME, HOSTS, RESOLV_CONF};
use super::names::title;
use super::node::Node;
use super::record::PodRecord;
use super::relabel;
use super::sandbox::Pod;

/// A container, ready for its keeper but for its root file system.
pub struct Assembled {
    /// The call.
    pub create: keeper::CreateContainer,
    /// Everything else that was decided.
    pub plan: ContainerPlan,
    /// Its cgroup, absolute in the hierarchy.
    pub cgroup: String,
}

/// Checks a pod's configuration.
///
/// # Errors
/// [`PodError::Spec`], naming the field.
pub fn pod(node: &Node, id: &str, config: &cri::PodSandboxConfig) -> Result<SandboxPlan, PodError> {
    let options = options(&node.config());
    let plan = slipway_spec::sandbox(config, id, &options, &node.host).map_err(|source| {
        PodError::Spec {
            what: format!("pod sandbox {id}"),
            source,
        }
    })?;
    for warning in &plan.warnings {
        tracing::warn!(pod = id, warning);
    }
    Ok(plan)
}

/// Checks a container's configuration, translates it and compiles its seccomp filter. Looks at the mounts'
/// sources, so it blocks for as long as a dead network file system does.
///
/// # Errors
/// [`PodError::Spec`], naming the field; [`PodError::Seccomp`]; [`PodError::File`] for a source that can't be
/// relabelled.
pub fn container(
    node: &Node,
    pod: &Pod,
    id: &str,
    config: &cri::ContainerConfig,
    image: &Arc<Image>,
) -> Result<Assembled, PodError> {
    let failed = |source| PodError::Spec {
        what: title(config),
        source,
    };
    let config_now = node.config();
    let mut options = options(&config_now);
    if let Some(handler) = pod.record.handler(&config_now) {
        options.privileged_without_host_devices = handler.privileged_without_host_devices;
        options
            .allowed_annotations
            .clone_from(&handler.allowed_annotations);
        if let Some(profile) = &handler.seccomp_profile {
            options.seccomp_profile = Some(profile.clone());
        }
    }
    let sources = slipway_spec::survey(config, &options).map_err(failed)?;
    let names = &pod.record.namespaces;
    let namespaces = keeper::SetupSandboxResult {
        network: names.network.clone(),
        ipc: names.ipc.clone(),
        uts: names.uts.clone(),
        pid: names.pid.clone(),
        user: names.user.clone(),
        made_cgroup: pod.record.made_cgroup,
    };
    let mut plan = slipway_spec::container(&ContainerInput {
        id,
        pod_id: pod.id(),
        sandbox_config: &pod.record.config,
        namespaces: &namespaces,
        selinux_level: pod.record.selinux_level.as_deref(),
        config,
        image: &image.config,
        image_name: config.image.as_ref().map_or("", |image| &image.image),
        container_dir: &pod.container_dir(id),
        files: &pod_files(&pod.dir),
        sources: &sources,
        options: &options,
        host: &node.host,
    })
    .map_err(failed)?;
    for warning in &plan.warnings {
        tracing::warn!(pod = pod.id(), container = id, warning);
    }
    super::cdi::inject(&node.cdi(), config, &mut plan)?;
    super::hooks::inject(&node.hooks(), id, &pod.record, config, &mut plan)?;
    let classes = config_now.pod.blockio_config_file.as_deref();
    block_io::inject(classes, &pod.record.config, config, &mut plan)
        .map_err(|source| no_class(config, source))?;
    slipway_spec::check_labels(&plan).map_err(failed)?;
    let linux = plan.spec.linux().as_ref();
    if let Some(label) = linux.and_then(|l| l.mount_label().as_ref()) {
        for path in &plan.relabel {
            relabel::relabel(path, label).map_err(file("label", path))?;
        }
    }
    enough_memory(&config_now, pod, id, plan.resources.memory_limit_in_bytes)?;
    let create = for_keeper(node, &pod.record, config, &mut plan)?;
    let linux = plan.spec.linux().as_ref();
    let cgroup = linux.and_then(|l| l.cgroups_path().as_ref());
    let cgroup = cgroup
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(Assembled {
        create,
        plan,
        cgroup,
    })
}

/// Makes a container what NRI plugins want it to be.
///
/// # Errors
/// [`PodError::Spec`], naming the adjustment; [`PodError::Seccomp`].
pub fn adjusted(
    node: &Node,
    pod: &Pod,
    id: &str,
    config: &cri::ContainerConfig,
    mut ready: Assembled,
    wish: &slipway_nri::api::ContainerAdjustment,
) -> Result<Assembled, PodError> {
    if *wish == Default::default() {
        return Ok(ready);
    }
    let warned = ready.plan.warnings.len();
    slipway_spec::adjust(&mut ready.plan, wish, &node.host).map_err(|source| PodError::Spec {
        what: format!("what NRI plugins want of {}", title(config)),
        source,
    })?;
    let limits = wish
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    if let Some(class) = limits.and_then(|limits| limits.blockio_class.as_ref()) {
        let config_now = node.config();
        let classes = config_now.pod.blockio_config_file.as_deref();
        let plan = &mut ready.plan;
        let inject = || block_io::inject_class(classes, "an NRI plugin", &class.value, plan);
        tokio::task::block_in_place(inject).map_err(|source| no_class(config, source))?;
    }
    if !wish.cdi_devices.is_empty() {
        let names: Vec<_> = wish.cdi_devices.iter().map(|d| d.name.clone()).collect();
        let plan = &mut ready.plan;
        // It reads files, and this is one of the runtime's threads.
        let inject = || super::cdi::inject_named(&node.cdi(), config, &names, plan);
        tokio::task::block_in_place(inject)?;
    }
    for warning in ready.plan.warnings.iter().skip(warned) {
        tracing::warn!(container = id, warning);
    }
    ready.create = for_keeper(node, &pod.record, config, &mut ready.plan)?;
    Ok(ready)
}

fn no_class(config: &cri::ContainerConfig, source: block_io::BlockIoError) -> PodError {
    PodError::BlockIo {
        container: title(config),
        source,
    }
}

/// The call for the keeper: with the seccomp profile compiled, or, for a runtime of others, in the specification.
fn for_keeper(
    node: &Node,
    pod: &PodRecord,
    config: &cri::ContainerConfig,
    plan: &mut ContainerPlan,
) -> Result<keeper::CreateContainer, PodError> {
    let Some(driver) = &pod.driver else {
        let mut create = plan.create.clone();
        create.seccomp = seccomp(config, plan, |source, plan| {
            node.seccomp.get(source, &plan.bounding)
        })?
        .map_or_else(Vec::new, |filter| filter.to_bytes());
        return Ok(create);
    };
    let profile = seccomp(config, plan, |source, plan| {
        slipway_seccomp::resolve(source, &plan.bounding)
    })?;
    if let Some(linux) = plan.spec.linux_mut() {
        linux.set_seccomp(profile);
    }
    let mut create = plan.create.clone();
    create.spec = serde_json::to_vec(&plan.spec)
        .map_err(|e| PodError::Invalid(format!("the specification can't be written: {e}")))?;
    create.runtime = Some(driver.for_keeper(&pod.runtime, &node.config()));
    Ok(create)
}

fn seccomp<T>(
    config: &cri::ContainerConfig,
    plan: &ContainerPlan,
    made: impl FnOnce(Source<'_>, &ContainerPlan) -> Result<T, SeccompError>,
) -> Result<Option<T>, PodError> {
    let (source, profile) = match &plan.seccomp {
        SeccompChoice::Unconfined => return Ok(None),
        SeccompChoice::RuntimeDefault => (Source::RuntimeDefault, "RuntimeDefault".to_owned()),
        SeccompChoice::Localhost { path, json } => {
            (Source::Localhost(json), path.display().to_string())
        }
    };
    let made = made(source, plan).map_err(|source| PodError::Seccomp {
        container: title(config),
        profile,
        source,
    })?;
    Ok(Some(made))
}

/// Refuses a memory limit with which the pod's runtime can't work.
///
/// # Errors
/// [`PodError::TooLittleMemory`].
pub fn enough_memory(config: &Config, pod: &Pod, id: &str, limit: i64) -> Result<(), PodError> {
    let handler = pod.record.handler(config);
    let minimum = handler.and_then(|handler| handler.minimum_memory);
    let minimum = minimum.map_or(0, |size| size.bytes());
    if limit > 0 && limit.unsigned_abs() < minimum {
        return Err(PodError::TooLittleMemory {
            id: id.to_owned(),
            limit,
            handler: pod.record.runtime.clone(),
            minimum,
        });
    }
    Ok(())
}

fn pod_files(dir: &Path) -> PodFiles {
    PodFiles {
        resolv_conf: Some(dir.join(RESOLV_CONF)),
        hosts: Some(dir.join(HOSTS)),
        hostname: Some(dir.join(HOSTNAME)),
        shm: Some(dir.join("shm")),
    }
}

fn options(config: &Config) -> SpecOptions {
    SpecOptions {
        run_root: config.run_root.clone(),
        cgroup_driver: match config.cgroup.driver {
            CgroupDriver::Cgroupfs => slipway_spec::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => slipway_spec::CgroupDriver::Systemd,
        },
        default_sysctls: config.pod.default_sysctls.clone(),
        default_capabilities: config.pod.default_capabilities.clone(),
        pids_limit: config.pod.pids_limit,
        shm_bytes: config.pod.shm_size.bytes(),
        create_missing_sources: config.pod.missing_mount_source == MissingMountSource::Create,
        apparmor_profile: config.pod.apparmor_profile.clone(),
        seccomp_profile: config.pod.seccomp_profile.clone(),
        seccomp_dir: config.pod.seccomp_dir.clone(),
        // The handler's, which only a container has.
        privileged_without_host_devices: false,
        allowed_annotations: Vec::new(),
    }
}
