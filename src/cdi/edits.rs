//! Edits of a container's OCI specification.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{
    Hook, HookBuilder, Hooks, Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType,
    LinuxIntelRdt, LinuxNetDevice, Mount, Process, Spec,
};

use crate::file::{CdiFile, CdiHook, CdiMount, ContainerEdits, DeviceNode, IntelRdt};

/// What devices need in a container. A file's own edits come once, before those of its devices.
#[derive(Debug, Clone, Default)]
pub struct Edits {
    /// The file's path, for messages; the file; the index of the device, or the file's own edits.
    parts: Vec<(PathBuf, Arc<CdiFile>, Option<usize>)>,
}

/// Why a container can't have a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CDI device {device} of {}: {reason}", file.display())]
pub struct EditsError {
    /// The device, or the kind when all of its devices have the edit.
    pub device: String,
    /// The file that says so.
    pub file: PathBuf,
    /// What is wrong.
    pub reason: String,
}

impl Edits {
    pub(crate) fn add(&mut self, path: &Path, file: &Arc<CdiFile>, device: usize) {
        let has = |this: &Self, part| {
            this.parts
                .iter()
                .any(|(_, other, at)| Arc::ptr_eq(other, file) && *at == part)
        };
        for part in [None, Some(device)] {
            if !has(self, part) {
                self.parts.push((path.to_owned(), Arc::clone(file), part));
            }
        }
    }

    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Applies the edits to a specification. Later ones win, over earlier ones and over what it had: variables by
    /// name, device nodes and mounts by path. Looks at the host's device files, so it may block.
    ///
    /// Additional groups go to `process.user.additionalGids`.
    ///
    /// # Errors
    /// [`EditsError`] for what is not there on this host; the specification is then half edited.
    pub fn apply(&self, spec: &mut Spec) -> Result<(), EditsError> {
        for (path, file, at) in &self.parts {
            let (device, edits) = match at.and_then(|at| file.devices.get(at)) {
                Some(device) => (
                    format!("{}={}", file.kind, device.name),
                    &device.container_edits,
                ),
                None => (file.kind.clone(), &file.container_edits),
            };
            apply(edits, spec).map_err(|reason| EditsError {
                device,
                file: path.clone(),
                reason,
            })?;
        }
        Ok(())
    }
}

fn apply(edits: &ContainerEdits, spec: &mut Spec) -> Result<(), String> {
    let mut process: Process = spec.process().clone().unwrap_or_default();
    let mut env = process.env().clone().unwrap_or_default();
    for variable in &edits.env {
        let name = variable.split_once('=').map_or("", |(name, _)| name);
        env.retain(|other| other.split_once('=').is_none_or(|(other, _)| other != name));
        env.push(variable.clone());
    }
    process.set_env(Some(env));
    let mut user = process.user().clone();
    let mut groups = user.additional_gids().clone().unwrap_or_default();
    // Group 0 is what a missing number looks like in the reference implementation.
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        if !groups.contains(gid) {
            groups.push(*gid);
        }
    }
    user.set_additional_gids((!groups.is_empty()).then_some(groups));
    process.set_user(user);
    spec.set_process(Some(process));

    let mut linux = spec.linux().clone().unwrap_or_default();
    for node in &edits.device_nodes {
        let (device, source) = device(node)?;
        allow(&mut linux, &device, &node.permissions);
        if node.path.starts_with("/dev") {
            let mut devices = linux.devices().clone().unwrap_or_default();
            devices.retain(|other| *other.path() != node.path);
            devices.push(device);
            linux.set_devices(Some(devices));
        } else {
            // The runtime makes nodes below /dev only.
            let options = ["bind", "rprivate", "nosuid", "noexec"].map(str::to_owned);
            insert(spec, bind(&node.path, &source, options.to_vec()));
        }
    }
    for device in &edits.net_devices {
        let mut all: HashMap<String, LinuxNetDevice> =
            linux.net_devices().clone().unwrap_or_default();
        let mut inside = LinuxNetDevice::default();
        inside.set_name(Some(device.name.clone()));
        all.insert(device.host_interface_name.clone(), inside);
        linux.set_net_devices(Some(all));
    }
    if let Some(rdt) = &edits.intel_rdt {
        linux.set_intel_rdt(Some(intel_rdt(rdt)));
    }
    spec.set_linux(Some(linux));
    for mount in &edits.mounts {
        insert(spec, bound(mount)?);
    }
    for hook in &edits.hooks {
        add_hook(spec, hook)?;
    }
    Ok(())
}

/// The node, and the host's device file that it stands for.
fn device(node: &DeviceNode) -> Result<(LinuxDevice, PathBuf), String> {
    let source = node.host_path.clone().unwrap_or_else(|| node.path.clone());
    let found = fs::metadata(&source);
    let given = match node.r#type.as_str() {
        "b" => Some(LinuxDeviceType::B),
        "c" => Some(LinuxDeviceType::C),
        "u" => Some(LinuxDeviceType::U),
        "p" => Some(LinuxDeviceType::P),
        _ => None,
    };
    let complete = given == Some(LinuxDeviceType::P) || (given.is_some() && node.major != 0);
    // A file that says everything needs no device on the host, as long as it is a node that we make.
    let found = match found {
        Err(_) if complete && node.path.starts_with("/dev") => None,
        found => Some(found.map_err(|e| {
            let shown = source.display();
            format!("can't look at device {shown}: {e}; is the driver loaded?")
        })?),
    };
    let mut device = LinuxDevice::default();
    device.set_path(node.path.clone());
    let (mut major, mut minor) = (node.major, node.minor);
    let mut kind = given;
    if let Some(found) = &found {
        let own = match found.file_type() {
            t if t.is_char_device() => LinuxDeviceType::C,
            t if t.is_block_device() => LinuxDeviceType::B,
            t if t.is_fifo() => LinuxDeviceType::P,
            _ => return Err(format!("{} is not a device", source.display())),
        };
        let same = given.is_none_or(|given| {
            given == own || (given == LinuxDeviceType::U && own == LinuxDeviceType::C)
        });
        if !same {
            return Err(format!(
                "{} is not of type {:?}",
                source.display(),
                node.r#type
            ));
        }
        kind = kind.or(Some(own));
        if major == 0 && own != LinuxDeviceType::P {
            major = rustix::fs::major(found.rdev()).into();
            minor = rustix::fs::minor(found.rdev()).into();
        }
    }
    let host = |of: fn(&fs::Metadata) -> u32| found.as_ref().map(of);
    device
        .set_typ(kind.unwrap_or(LinuxDeviceType::C))
        .set_major(major)
        .set_minor(minor)
        .set_file_mode(
            node.file_mode
                .or(host(|f| f.mode() & 0o7777))
                .or(Some(0o666)),
        )
        .set_uid(node.uid.or(host(MetadataExt::uid)))
        .set_gid(node.gid.or(host(MetadataExt::gid)));
    Ok((device, source))
}

/// Lets the device through the device cgroup.
fn allow(linux: &mut Linux, device: &LinuxDevice, permissions: &str) {
    let kind = match device.typ() {
        LinuxDeviceType::P => return,
        LinuxDeviceType::U => LinuxDeviceType::C,
        kind => kind,
    };
    let access = if permissions.is_empty() {
        "rwm"
    } else {
        permissions
    };
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(kind))
        .set_major(Some(device.major()))
        .set_minor(Some(device.minor()))
        .set_access(Some(access.to_owned()));
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(rule);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
}

fn bind(place: &Path, source: &Path, options: Vec<String>) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(place.to_owned())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options));
    mount
}

fn bound(mount: &CdiMount) -> Result<Mount, String> {
    let mut options = mount.options.clone();
    let binds = options.iter().any(|o| o == "bind" || o == "rbind");
    if ["", "bind", "none"].contains(&mount.r#type.as_str()) {
        if !binds {
            options.push("rbind".to_owned());
        }
        if !mount.host_path.is_absolute() {
            let path = mount.host_path.display();
            return Err(format!("mounts.hostPath {path} must be absolute"));
        }
        fs::metadata(&mount.host_path).map_err(|e| {
            let path = mount.host_path.display();
            format!("can't mount {path}: {e}; does the vendor's file fit this node?")
        })?;
        return Ok(bind(&mount.container_path, &mount.host_path, options));
    }
    let mut other = bind(&mount.container_path, &mount.host_path, options);
    other.set_typ(Some(mount.r#type.clone()));
    Ok(other)
}

/// Puts a mount in the place of one on the same path, or before those that it would cover.
fn insert(spec: &mut Spec, mount: Mount) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.retain(|other| other.destination() != mount.destination());
    let at = mounts
        .iter()
        .position(|other| other.destination().starts_with(mount.destination()));
    mounts.insert(at.unwrap_or(mounts.len()), mount);
    spec.set_mounts(Some(mounts));
}

fn intel_rdt(rdt: &IntelRdt) -> LinuxIntelRdt {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let mut out = LinuxIntelRdt::default();
    out.set_clos_id(text(&rdt.clos_id))
        .set_l3_cache_schema(text(&rdt.l3_cache_schema))
        .set_mem_bw_schema(text(&rdt.mem_bw_schema))
        .set_schemata((!rdt.schemata.is_empty()).then(|| rdt.schemata.clone()))
        .set_enable_monitoring(
            (rdt.enable_monitoring || rdt.enable_cmt || rdt.enable_mbm).then_some(true),
        );
    out
}

fn add_hook(spec: &mut Spec, hook: &CdiHook) -> Result<(), String> {
    let path = hook.path.display();
    // In the container's root, a startContainer hook's; looked up when it runs.
    if hook.hook_name != "startContainer"
        && let Err(e) = fs::metadata(&hook.path)
    {
        return Err(format!("can't run its {} hook {path}: {e}", hook.hook_name));
    }
    let mut built = HookBuilder::default().path(hook.path.clone());
    if !hook.args.is_empty() {
        built = built.args(hook.args.clone());
    }
    if !hook.env.is_empty() {
        built = built.env(hook.env.clone());
    }
    // Zero is what the reference implementation takes for none.
    if let Some(seconds) = hook.timeout.filter(|seconds| *seconds > 0) {
        built = built.timeout(seconds);
    }
    let built = built.build().map_err(|e| format!("hook {path}: {e}"))?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let with = |list: &Option<Vec<Hook>>| {
        let mut list = list.clone().unwrap_or_default();
        list.push(built);
        Some(list)
    };
    place(&mut hooks, &hook.hook_name, with);
    spec.set_hooks(Some(hooks));
    Ok(())
}

#[allow(deprecated)] // `prestart` is still what vendors' files name.
fn place(
    hooks: &mut Hooks,
    name: &str,
    with: impl FnOnce(&Option<Vec<Hook>>) -> Option<Vec<Hook>>,
) {
    match name {
        "prestart" => drop(hooks.set_prestart(with(hooks.prestart()))),
        "createRuntime" => drop(hooks.set_create_runtime(with(hooks.create_runtime()))),
        "createContainer" => drop(hooks.set_create_container(with(hooks.create_container()))),
        "poststart" => drop(hooks.set_poststart(with(hooks.poststart()))),
        "poststop" => drop(hooks.set_poststop(with(hooks.poststop()))),
        _ => drop(hooks.set_start_container(with(hooks.start_container()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(edits: &str, spec: serde_json::Value) -> Result<serde_json::Value, EditsError> {
        let text = format!(
            r#"{{"cdiVersion":"1.1.0","kind":"v.com/c","containerEdits":{{"env":["ALL=1"]}},
                "devices":[{{"name":"d","containerEdits":{edits}}}]}}"#
        );
        let file = Arc::new(CdiFile::from_json(&text).expect("a good file"));
        let mut all = Edits::default();
        all.add(Path::new("/etc/cdi/x.json"), &file, 0);
        all.add(Path::new("/etc/cdi/x.json"), &file, 0);
        assert_eq!(all.parts.len(), 2, "each once");
        let mut spec: Spec = serde_json::from_value(spec).expect("a spec");
        all.apply(&mut spec)?;
        Ok(serde_json::to_value(spec).expect("json"))
    }

    fn plain() -> serde_json::Value {
        serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["A=old", "K=v"]},
            "mounts": [{"destination": "/proc"}, {"destination": "/usr/lib"}, {"destination": "/x"}],
            "linux": {},
        })
    }

    #[test]
    fn every_kind_of_edit() {
        let edits = r#"{"env":["A=new"],"additionalGids":[0,44,44],
            "deviceNodes":[{"path":"/dev/v/null","hostPath":"/dev/null","permissions":"r","gid":7},{"path":"/opt/zero","hostPath":"/dev/zero"}],
            "netDevices":[{"hostInterfaceName":"e7","name":"n0"}],
            "mounts":[{"hostPath":"/etc","containerPath":"/usr"},{"hostPath":"/etc","containerPath":"/x","options":["ro","bind"]}],
            "hooks":[{"hookName":"createContainer","path":"/bin/sh","args":["sh","-c","true"],"timeout":2}],
            "intelRdt":{"closID":"gold"}}"#;
        let spec = edited(edits, plain()).unwrap();
        let env = serde_json::json!(["K=v", "ALL=1", "A=new"]);
        assert_eq!(spec["process"]["env"], env);
        assert_eq!(
            spec["process"]["user"]["additionalGids"],
            serde_json::json!([44])
        );
        let node = &spec["linux"]["devices"][0];
        assert_eq!((&node["major"], &node["minor"]), (&1.into(), &3.into()));
        assert_eq!(
            (&node["path"], &node["gid"]),
            (&"/dev/v/null".into(), &7.into())
        );
        let rule = &spec["linux"]["resources"]["devices"][0];
        assert_eq!((&rule["access"], &rule["minor"]), (&"r".into(), &3.into()));
        let places = spec["mounts"].as_array().unwrap().iter();
        let places: Vec<_> = places.map(|m| m["destination"].as_str().unwrap()).collect();
        assert_eq!(places, ["/proc", "/usr", "/usr/lib", "/opt/zero", "/x"]);
        assert_eq!(spec["linux"]["intelRdt"]["closID"], "gold");
        assert_eq!(spec["linux"]["netDevices"]["e7"]["name"], "n0");
        assert_eq!(spec["hooks"]["createContainer"][0]["timeout"], 2);
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (edits, words) in [
            (
                r#"{"deviceNodes":[{"path":"/dev/no-such"}]}"#,
                "/dev/no-such",
            ),
            (
                r#"{"deviceNodes":[{"path":"/dev/x","hostPath":"/etc/passwd"}]}"#,
                "not a device",
            ),
            (
                r#"{"deviceNodes":[{"path":"/dev/null","type":"b"}]}"#,
                "not of type",
            ),
            (
                r#"{"mounts":[{"hostPath":"/no/such","containerPath":"/x"}]}"#,
                "/no/such",
            ),
            (
                r#"{"hooks":[{"hookName":"prestart","path":"/no/such"}]}"#,
                "/no/such",
            ),
            (
                r#"{"hooks":[{"hookName":"poststop","path":"/no/hook"}]}"#,
                "poststop",
            ),
        ] {
            let error = edited(edits, plain()).expect_err(edits).to_string();
            for word in [words, "v.com/c=d", "/etc/cdi/x.json"] {
                assert!(error.contains(word), "{edits}: {error}");
            }
        }
        // All is said: no device file is needed.
        edited(
            r#"{"deviceNodes":[{"path":"/dev/q","type":"c","major":9,"minor":1}]}"#,
            plain(),
        )
        .unwrap();
    }
}
