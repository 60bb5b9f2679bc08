//! What NRI plugins change about a container, laid over its plan.
//!
//! All that the protocol knows is either done or refused by name; nothing is dropped.

mod limits;
mod process;

use crate::error::{Result, SpecError, quoted};
use crate::{ContainerPlan, HostFacts, SeccompChoice, mounts, paths, sysctl};
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxMemoryPolicy, LinuxNamespace,
    LinuxNamespaceType, LinuxNetDevice, Mount, Spec,
};
use serde_json::{Value, json};
use slipway_proto::nri;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub use limits::limits_of;

/// Where a seccomp policy comes from, for messages.
const POLICY: &str = "the policy of an NRI plugin";

/// Lays the adjustments over the plan. CDI devices, which stand in files of the host, are left to the caller.
///
/// # Errors
/// [`SpecError`], naming the adjustment; the plan is of no use then.
pub fn adjust(
    plan: &mut ContainerPlan,
    wish: &nri::ContainerAdjustment,
    host: &HostFacts,
) -> Result<()> {
    let mut annotations = plan.spec.annotations().clone().unwrap_or_default();
    for (key, value) in &wish.annotations {
        match key.strip_prefix('-') {
            Some(key) => drop(annotations.remove(key)),
            None => drop(annotations.insert(key.clone(), value.clone())),
        }
    }
    plan.spec.set_annotations(Some(annotations));
    process::adjust(plan, wish)?;
    process::hooks(&mut plan.spec, wish.hooks.as_ref())?;
    let mut linux = plan.spec.linux().clone().unwrap_or_default();
    if let Some(wish) = &wish.linux {
        namespaces(&mut linux, &wish.namespaces)?;
        sysctls(&mut linux, &wish.sysctl)?;
        net_devices(&mut linux, &wish.net_devices)?;
        memory_policy(&mut linux, wish.memory_policy.as_ref())?;
        devices(&mut linux, &wish.devices)?;
        limits::adjust(plan, &mut linux, wish.resources.as_ref(), host)?;
        if let Some(score) = wish.oom_score_adj {
            let fits = i32::try_from(score.value)
                .ok()
                .filter(|s| (-1000..=1000).contains(s));
            let fits = fits.ok_or_else(|| {
                let what = format!(
                    "{} is not possible; it must be between -1000 and 1000",
                    score.value
                );
                SpecError::invalid("adjust.linux.oom_score_adj", what)
            })?;
            plan.create.oom_score_adj = fits;
            plan.resources.oom_score_adj = fits.into();
        }
        if !wish.cgroups_path.is_empty() {
            let what = "the container's cgroup stays below its pod's, where the kubelet and its accounting \
                        look for it";
            return Err(SpecError::unsupported("adjust.linux.cgroups_path", what));
        }
        if let Some(policy) = &wish.seccomp_policy {
            plan.seccomp = SeccompChoice::Localhost {
                path: POLICY.into(),
                json: seccomp(policy)?,
            };
        }
        // There is none that could be removed.
        let rdt = wish.rdt.as_ref().filter(|rdt| {
            rdt.clos_id.is_some() || rdt.schemata.is_some() || rdt.enable_monitoring.is_some()
        });
        if rdt.is_some() {
            let what = "resource control groups (RDT) are not there in this version";
            return Err(SpecError::unsupported("adjust.linux.rdt", what));
        }
    }
    plan.spec.set_linux(Some(linux));
    all_mounts(plan, &wish.mounts)?;
    plan.create.spec = serde_json::to_vec(&plan.spec).map_err(|e| {
        SpecError::invalid(
            "adjust",
            format!("can't be written as an OCI specification: {e}"),
        )
    })?;
    Ok(())
}

/// A name that the OCI specification's type knows.
fn named<T: serde::de::DeserializeOwned>(field: &str, name: &str) -> Result<T> {
    serde_json::from_value(Value::from(name))
        .map_err(|_| SpecError::invalid(field, format!("there is no {}", quoted(name))))
}

fn namespaces(linux: &mut Linux, wish: &[nri::LinuxNamespace]) -> Result<()> {
    let mut all = linux.namespaces().clone().unwrap_or_default();
    for namespace in wish {
        let field = "adjust.linux.namespaces";
        let kind = namespace.r#type.as_str();
        let (kind, remove) = kind
            .strip_prefix('-')
            .map_or((kind, false), |kind| (kind, true));
        let typ: LinuxNamespaceType = named(field, kind)?;
        use LinuxNamespaceType as Kind;
        if !matches!(typ, Kind::Network | Kind::Ipc | Kind::Uts | Kind::Cgroup) {
            let what = format!(
                "the {kind} namespace can't be adjusted, as the container's supervision rests on it; network, \
                 ipc, uts and cgroup can"
            );
            return Err(SpecError::unsupported(field, what));
        }
        all.retain(|other| other.typ() != typ);
        if !remove {
            let mut new = LinuxNamespace::default();
            new.set_typ(typ);
            if !namespace.path.is_empty() {
                paths::absolute(field, &namespace.path)?;
                new.set_path(Some(namespace.path.clone().into()));
            }
            all.push(new);
        }
    }
    linux.set_namespaces(Some(all));
    Ok(())
}

fn sysctls(linux: &mut Linux, wish: &BTreeMap<String, String>) -> Result<()> {
    let set: HashMap<String, String> = (wish.iter())
        .filter(|(key, _)| !key.starts_with('-'))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if set.is_empty() {
        // A container has none but the pod's, which stay.
        return Ok(());
    }
    let own = |kind| linux.namespaces().iter().flatten().any(|n| n.typ() == kind);
    let (network, ipc) = (
        own(LinuxNamespaceType::Network),
        own(LinuxNamespaceType::Ipc),
    );
    let checked = sysctl::collect(&set, &BTreeMap::new(), network, ipc)?;
    linux.set_sysctl(Some(checked));
    Ok(())
}

fn net_devices(linux: &mut Linux, wish: &BTreeMap<String, nri::LinuxNetDevice>) -> Result<()> {
    let mut all = HashMap::new();
    for (host, inside) in wish.iter().filter(|(host, _)| !host.starts_with('-')) {
        let field = format!("adjust.linux.net_devices[{}]", quoted(host));
        for name in [host, &inside.name]
            .into_iter()
            .filter(|name| !name.is_empty())
        {
            let good = name.len() < 16
                && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
            if !good || name == "." || name == ".." {
                let what = format!("{} is no name of an interface", quoted(name));
                return Err(SpecError::invalid(field, what));
            }
        }
        let mut device = LinuxNetDevice::default();
        device.set_name(Some(inside.name.clone()).filter(|name| !name.is_empty()));
        all.insert(host.clone(), device);
    }
    if all.is_empty() {
        return Ok(());
    }
    let own = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|n| n.typ() == LinuxNamespaceType::Network);
    if !own {
        let what = "the container is in the host's network, where the interfaces are already";
        return Err(SpecError::invalid("adjust.linux.net_devices", what));
    }
    linux.set_net_devices(Some(all));
    Ok(())
}

fn memory_policy(linux: &mut Linux, wish: Option<&nri::LinuxMemoryPolicy>) -> Result<()> {
    let Some(wish) = wish else { return Ok(()) };
    let field = "adjust.linux.memory_policy";
    let unknown = |what: &str, n: i32| SpecError::invalid(field, format!("there is no {what} {n}"));
    let mode = nri::MpolMode::try_from(wish.mode).map_err(|_| unknown("mode", wish.mode))?;
    let mut policy = LinuxMemoryPolicy::default();
    policy
        .set_mode(named(field, mode.as_str_name())?)
        .set_nodes(Some(wish.nodes.clone()).filter(|nodes| !nodes.is_empty()));
    let mut flags = Vec::new();
    for flag in &wish.flags {
        let flag = nri::MpolFlag::try_from(*flag).map_err(|_| unknown("flag", *flag))?;
        flags.push(named(field, flag.as_str_name())?);
    }
    policy.set_flags((!flags.is_empty()).then_some(flags));
    linux.set_memory_policy(Some(policy));
    Ok(())
}

fn devices(linux: &mut Linux, wish: &[nri::LinuxDevice]) -> Result<()> {
    if wish.is_empty() {
        return Ok(());
    }
    let mut nodes = linux.devices().clone().unwrap_or_default();
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    for device in wish {
        let field = "adjust.linux.devices";
        let path = device.path.as_str();
        let (path, remove) = path
            .strip_prefix('-')
            .map_or((path, false), |path| (path, true));
        paths::absolute(field, path)?;
        let place = paths::clean(path);
        if let Some(at) = nodes.iter().position(|node| *node.path() == place) {
            let old = nodes.remove(at);
            let same = |rule: &LinuxDeviceCgroup| {
                rule.allow()
                    && rule.typ() == Some(old.typ())
                    && (rule.major(), rule.minor()) == (Some(old.major()), Some(old.minor()))
            };
            rules.retain(|rule| !same(rule));
        }
        if remove {
            continue;
        }
        if !place.starts_with("/dev") || place == Path::new("/dev") {
            let what = format!(
                "{} lies outside /dev, where no node can be made; mount it",
                quoted(path)
            );
            return Err(SpecError::unsupported(field, what));
        }
        mounts::free_in_dev(field, &place)?;
        let kind: LinuxDeviceType = match device.r#type.as_str() {
            "c" | "u" => LinuxDeviceType::C,
            "b" => LinuxDeviceType::B,
            other => {
                let what = format!(
                    "{}: there is no device type {}; use c or b",
                    quoted(path),
                    quoted(other)
                );
                return Err(SpecError::invalid(field, what));
            }
        };
        let mode = device.file_mode.map(|mode| mode.value);
        let may = |bits: u32| mode.is_none_or(|mode| mode & bits != 0);
        let access: String = [(may(0o444), 'r'), (may(0o222), 'w'), (true, 'm')]
            .iter()
            .filter_map(|(may, letter)| may.then_some(*letter))
            .collect();
        let mut node = LinuxDevice::default();
        node.set_path(place)
            .set_typ(kind)
            .set_major(device.major)
            .set_minor(device.minor)
            .set_file_mode(Some(mode.unwrap_or(0o666)))
            .set_uid(device.uid.map(|uid| uid.value))
            .set_gid(device.gid.map(|gid| gid.value));
        nodes.push(node);
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(kind))
            .set_major(Some(device.major))
            .set_minor(Some(device.minor))
            .set_access(Some(access));
        rules.push(rule);
    }
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    linux.set_devices((!nodes.is_empty()).then_some(nodes));
    Ok(())
}

/// The policy as a profile's JSON: the OCI specification's form is one.
fn seccomp(policy: &nri::LinuxSeccomp) -> Result<Vec<u8>> {
    let field = "adjust.linux.seccomp_policy";
    if !policy.listener_path.is_empty() || !policy.listener_metadata.is_empty() {
        let what = "a listener for system calls is not there in this version";
        return Err(SpecError::unsupported(
            format!("{field}.listener_path"),
            what,
        ));
    }
    let args = |args: &[nri::LinuxSeccompArg]| -> Vec<Value> {
        args.iter()
            .map(|a| json!({"index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op}))
            .collect()
    };
    let syscall = |call: &nri::LinuxSyscall| {
        let mut entry =
            json!({"names": call.names, "action": call.action, "args": args(&call.args)});
        if let Some(errno) = call.errno_ret {
            entry["errnoRet"] = errno.value.into();
        }
        entry
    };
    let mut profile = json!({
        "defaultAction": policy.default_action,
        "architectures": policy.architectures,
        "flags": policy.flags,
        "syscalls": policy.syscalls.iter().map(syscall).collect::<Vec<_>>(),
    });
    if let Some(errno) = policy.default_errno {
        profile["defaultErrnoRet"] = errno.value.into();
    }
    serde_json::to_vec(&profile).map_err(|e| SpecError::invalid(field, e))
}

fn all_mounts(plan: &mut ContainerPlan, wish: &[nri::Mount]) -> Result<()> {
    if wish.is_empty() {
        return Ok(());
    }
    let mut all = plan.spec.mounts().clone().unwrap_or_default();
    for mount in wish {
        let field = "adjust.mounts";
        let at = mount.destination.as_str();
        let (at, remove) = at.strip_prefix('-').map_or((at, false), |at| (at, true));
        paths::absolute(field, at)?;
        let place = paths::clean(at);
        all.retain(|other| *other.destination() != place);
        let shown = place.to_string_lossy().into_owned();
        plan.create
            .recursive_read_only
            .retain(|other| *other != shown);
        if remove {
            continue;
        }
        mounts::coverable(field, &place, mount.r#type == "proc")?;
        let has = |name: &str| mount.options.iter().any(|option| option == name);
        let mut options = mount.options.clone();
        let bind = mount.r#type == "bind" || has("bind") || has("rbind");
        if bind {
            paths::absolute(&format!("{field}.source"), &mount.source)?;
            if !has("bind") && !has("rbind") {
                options.push("rbind".to_owned());
            }
        } else if mount.r#type.is_empty() {
            let what = format!(
                "the mount at {} has no type; use bind, or name a file system",
                quoted(at)
            );
            return Err(SpecError::invalid(field, what));
        }
        if has("rro") {
            plan.create.recursive_read_only.push(shown);
        }
        let kind = if bind { "bind" } else { mount.r#type.as_str() };
        let mut new = Mount::default();
        new.set_destination(place)
            .set_typ(Some(kind.to_owned()))
            .set_source(Some(mount.source.clone().into()))
            .set_options(Some(options));
        all.push(new);
    }
    // Those nearer to the root come first, so that none hides another.
    all.sort_by_key(|mount| mount.destination().components().count());
    plan.spec.set_mounts(Some(all));
    rootfs_propagation(&mut plan.spec);
    Ok(())
}

/// The root's propagation has to let through what its mounts are to get.
fn rootfs_propagation(spec: &mut Spec) {
    let has = |spec: &Spec, names: [&str; 2]| {
        let mounts = spec.mounts().iter().flatten();
        let mut options = mounts.flat_map(|mount| mount.options().iter().flatten());
        options.any(|option| names.contains(&option.as_str()))
    };
    let wanted = match (
        has(spec, ["shared", "rshared"]),
        has(spec, ["slave", "rslave"]),
    ) {
        (true, _) => "shared",
        (_, true) => "slave",
        _ => return,
    };
    if let Some(linux) = spec.linux_mut() {
        linux.set_rootfs_propagation(Some(wanted.to_owned()));
    }
}

#[cfg(test)]
mod tests;
