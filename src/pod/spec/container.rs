//! Containers.

use crate::cgroup::{CgroupDriver, PodCgroup};
use crate::error::{Result, SpecError};
use crate::mounts::Circumstances;
use crate::paths;
use crate::sandbox::is_privileged;
use crate::sources::security;
use crate::{
    ContainerInput, ContainerPlan, apparmor, capabilities, devices, hidden, logpath, mounts,
    namespaces, process, resources, selinux, signal,
};
use oci_spec::runtime::{Linux, LinuxCapabilities, LinuxNamespaceType, Process, Root, Spec, User};
use slipway_proto::cri::NamespaceMode;
use slipway_proto::keeper;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// The specification's version: nothing newer is used in it.
const OCI_VERSION: &str = "1.0.2";
/// Each may become a mount.
const MOST_VOLUMES: usize = 256;

/// Checks a container's configuration and translates it.
///
/// # Errors
/// [`SpecError`] naming the field.
pub fn container(input: &ContainerInput<'_>) -> Result<ContainerPlan> {
    let (config, image, host) = (input.config, input.image, input.host);
    let name = config
        .metadata
        .as_ref()
        .map(|m| m.name.as_str())
        .unwrap_or_default();
    if name.is_empty() {
        return Err(SpecError::invalid(
            "metadata.name",
            "a container must have a name",
        ));
    }
    let security = security(config);
    let privileged = security.is_some_and(|s| s.privileged);
    if privileged && !is_privileged(input.sandbox_config) {
        let what = "the pod was not made to have privileged containers; make it with \
                    linux.security_context.privileged";
        return Err(SpecError::invalid(
            "linux.security_context.privileged",
            what,
        ));
    }
    let mut warnings = Vec::new();
    let pod = namespaces::of_pod(input.sandbox_config)?;
    // Hides the host's tree; on v1, and for privileged containers, the peers don't.
    let own_cgroup = host.cgroup_v2 && !privileged;
    let namespaces = namespaces::of_container(security, pod, input.namespaces, own_cgroup)?;
    let linux = config.linux.as_ref();
    let pids = input.options.pids_limit;
    let limits = resources::of_container(
        linux.and_then(|l| l.resources.as_ref()),
        pids,
        host,
        &mut warnings,
    )?;
    let capabilities = capabilities::of_container(
        security,
        &input.options.default_capabilities,
        &host.capabilities,
        &mut warnings,
    )?;
    let all_devices = (privileged && !input.options.privileged_without_host_devices)
        .then_some(input.sources.all_devices.as_slice());
    let own_mounts: Vec<_> = (config.mounts.iter())
        .map(|mount| paths::clean(&mount.container_path))
        .collect();
    let devices = devices::of_container(
        &config.devices,
        &input.sources.devices,
        all_devices,
        &own_mounts,
    )?;
    let readonly_rootfs = security.is_some_and(|s| s.readonly_rootfs);
    let at = Circumstances {
        privileged,
        readonly_rootfs,
        host_ipc: pod.ipc == NamespaceMode::Node,
        host_network: pod.network == NamespaceMode::Node,
        users: pod.users,
    };
    let mut mounts = mounts::of_container(input, at)?;
    mounts.list.extend(devices.mounts);
    let (masked, readonly) = hidden::hidden(security)?;
    let of_host = |kind| {
        let mut own = namespaces.list.iter();
        !own.any(|namespace| namespace.typ() == kind)
    };
    let labels = selinux::labels(
        security,
        input.sandbox_config,
        input.selinux_level,
        of_host(LinuxNamespaceType::Pid) || of_host(LinuxNamespaceType::Ipc),
        host.selinux.as_ref(),
    )?;
    let hostname = match input.sandbox_config.hostname.as_str() {
        "" => &host.hostname,
        name => name,
    };
    let env = process::environment(config, image, hostname, &mut warnings)?;
    let working_dir = process::working_dir(config, image)?;

    let mut oci_process = Process::default();
    oci_process
        .set_terminal(config.tty.then_some(true))
        // The creator resolves the user in the root file system.
        .set_user(User::default())
        .set_args(Some(process::arguments(config, image)?))
        .set_env(Some(
            env.iter()
                .filter_map(|e| String::from_utf8(e.clone()).ok())
                .collect(),
        ))
        .set_cwd(working_dir.clone().into())
        .set_capabilities(Some(capabilities.clone()))
        .set_rlimits(None)
        .set_no_new_privileges(Some(security.is_some_and(|s| s.no_new_privs)))
        .set_apparmor_profile(apparmor::profile(
            security,
            &input.sources.apparmor,
            input.options,
            &mut warnings,
        )?)
        .set_selinux_label(labels.as_ref().map(|l| l.process.clone()))
        // The keeper's, who knows what the kernel lets it set.
        .set_oom_score_adj(None);

    let mut oci_resources = limits.oci;
    oci_resources.set_devices(Some(devices.rules));
    let pod_cgroup = input
        .sandbox_config
        .linux
        .as_ref()
        .map(|l| l.cgroup_parent.as_str());
    let pod_cgroup = PodCgroup::new(
        pod_cgroup.unwrap_or_default(),
        input.pod_id,
        input.options.cgroups(input.host),
    )?;
    let mut oci_linux = Linux::default();
    oci_linux
        .set_namespaces(Some(namespaces.list))
        .set_cgroups_path(Some(pod_cgroup.container(input.id).into()))
        .set_resources(Some(oci_resources))
        .set_devices((!devices.nodes.is_empty()).then_some(devices.nodes))
        .set_uid_mappings(pod.users.map(|users| vec![users.uids]))
        .set_gid_mappings(pod.users.map(|users| vec![users.gids]))
        .set_seccomp(None)
        .set_rootfs_propagation(mounts.rootfs_propagation.map(str::to_owned))
        .set_masked_paths((!masked.is_empty()).then_some(masked))
        .set_readonly_paths((!readonly.is_empty()).then_some(readonly))
        .set_mount_label(labels.map(|l| l.file));

    let mut root = Root::default();
    root.set_path(input.container_dir.join("rootfs"))
        .set_readonly(Some(readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts.list))
        .set_process(Some(oci_process))
        .set_hostname(None)
        .set_domainname(None)
        .set_hooks(None)
        .set_annotations(Some(annotations(input, name)))
        .set_linux(Some(oci_linux));

    let log_directory = &input.sandbox_config.log_directory;
    let log_path = logpath::file(log_directory, &config.log_path, &mut warnings)?;
    let image_signal = image.stop_signal().as_deref();
    let stop_signal = signal::stop(config.stop_signal, image_signal, &mut warnings)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let json = serde_json::to_vec(&spec).map_err(|e| {
        SpecError::invalid(
            "config",
            format!("can't be written as an OCI specification: {e}"),
        )
    })?;
    let create = keeper::CreateContainer {
        id: input.id.to_owned(),
        dir: text(input.container_dir),
        spec: json,
        overlay: None,
        user: Some(process::user(security, image)?),
        env,
        seccomp: Vec::new(),
        log_path: log_path.as_deref().map(text).unwrap_or_default(),
        pid_target: namespaces.pid_target,
        oom_score_adj: limits.oom_score_adj,
        working_dir,
        recursive_read_only: mounts.recursive_read_only,
        tty: config.tty,
        stdin: config.stdin,
        systemd: input.options.cgroup_driver == CgroupDriver::Systemd,
        image_volumes: mounts.image_volumes,
        volumes: volumes(image, &mut warnings)?,
        runtime: None,
        restore: None,
    };
    Ok(ContainerPlan {
        create,
        spec,
        relabel: mounts.relabel,
        seccomp: input.sources.seccomp.clone(),
        bounding: bounding(&capabilities),
        stop_signal,
        resources: limits.effective,
        mounts: config.mounts.clone(),
        log_path,
        warnings,
    })
}

/// The volumes that the image declares, without those that are no place for one: each once, an outer one before those
/// in it.
fn volumes(image: &oci_spec::image::Config, warnings: &mut Vec<String>) -> Result<Vec<String>> {
    let declared = image.volumes().as_deref().unwrap_or_default();
    let field = "volumes of the image";
    if declared.len() > MOST_VOLUMES {
        let what = format!("{} are too many; at most {MOST_VOLUMES}", declared.len());
        return Err(SpecError::invalid(field, what));
    }
    let mut volumes = BTreeSet::new();
    for path in declared {
        // As Docker has it, they are meant from the root.
        let path = format!("/{}", path.trim_start_matches('/'));
        match paths::absolute(field, &path) {
            Ok(()) => drop(volumes.insert(paths::clean(&path))),
            Err(e) => warnings.push(format!("{e}; there is no such volume in the container")),
        }
    }
    volumes.remove(Path::new("/"));
    let volumes = volumes.into_iter();
    Ok(volumes.map(|v| v.to_string_lossy().into_owned()).collect())
}

fn bounding(capabilities: &LinuxCapabilities) -> oci_spec::runtime::Capabilities {
    capabilities.bounding().clone().unwrap_or_default()
}

/// Who this is, in the words that tools know from containerd. The CRI's own annotations are not for the
/// runtime, as some change what it does: but for those of the pod that the handler lets through.
fn annotations(input: &ContainerInput<'_>, name: &str) -> HashMap<String, String> {
    let pod = input.sandbox_config.metadata.clone().unwrap_or_default();
    let allowed = |key: &&String| {
        let mut beginnings = input.options.allowed_annotations.iter();
        beginnings.any(|beginning| key.starts_with(beginning.as_str()))
    };
    let of_pod = input.sandbox_config.annotations.iter();
    let of_pod = of_pod.filter(|(key, _)| allowed(key));
    let of_pod = of_pod.map(|(key, value)| (key.clone(), value.clone()));
    let own = [
        ("container-type", "container"),
        ("container-name", name),
        ("image-name", input.image_name),
        ("sandbox-id", input.pod_id),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value.to_owned()));
    // Who it is stays ours to say.
    of_pod.chain(own).collect()
}
