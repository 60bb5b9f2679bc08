//! A CDI file: parsed and checked.

use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use crate::name::{check_device, check_kind};

/// A larger file is no CDI file.
const MAX_FILE: u64 = 8 << 20;

/// The versions of the specification that are known.
const VERSIONS: [&str; 8] = [
    "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0",
];

/// Why a file is passed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CDI file {}: {reason}", path.display())]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// What a file says of one kind of devices.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CdiFile {
    pub cdi_version: String,
    pub kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    pub devices: Vec<Device>,
    #[serde(default)]
    pub container_edits: ContainerEdits,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Device {
    pub name: String,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
    pub container_edits: ContainerEdits,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct ContainerEdits {
    pub env: Vec<String>,
    pub device_nodes: Vec<DeviceNode>,
    pub net_devices: Vec<NetDevice>,
    pub hooks: Vec<CdiHook>,
    pub mounts: Vec<CdiMount>,
    pub intel_rdt: Option<IntelRdt>,
    #[serde(rename = "additionalGids")]
    pub additional_gids: Vec<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct DeviceNode {
    pub path: PathBuf,
    pub host_path: Option<PathBuf>,
    pub r#type: String,
    pub major: i64,
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct NetDevice {
    pub host_interface_name: String,
    pub name: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct CdiHook {
    pub hook_name: String,
    pub path: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct CdiMount {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    pub options: Vec<String>,
    pub r#type: String,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct IntelRdt {
    #[serde(rename = "closID")]
    pub clos_id: String,
    pub l3_cache_schema: String,
    pub mem_bw_schema: String,
    pub schemata: Vec<String>,
    pub enable_monitoring: bool,
    /// Before 1.1.
    #[serde(rename = "enableCMT")]
    pub enable_cmt: bool,
    /// Before 1.1.
    #[serde(rename = "enableMBM")]
    pub enable_mbm: bool,
}

impl CdiFile {
    /// Reads a file. JSON is YAML, too.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let read = || {
            let found = std::fs::metadata(path)?;
            if !found.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            if found.len() > MAX_FILE {
                return Err(io::Error::other("it is larger than 8 MiB"));
            }
            std::fs::read_to_string(path)
        };
        let failed = |reason: String| FileError {
            path: path.to_owned(),
            reason,
        };
        let text = read().map_err(|e| failed(format!("can't read it: {e}")))?;
        let parsed = if path.extension().is_some_and(|e| e == "json") {
            Self::from_json(&text)
        } else {
            Self::from_yaml(&text)
        };
        parsed.map_err(failed)
    }

    pub fn from_json(text: &str) -> Result<Self, String> {
        serde_json::from_str::<Self>(text)
            .map_err(|e| e.to_string())?
            .checked()
    }

    pub fn from_yaml(text: &str) -> Result<Self, String> {
        serde_yaml_ng::from_str::<Self>(text)
            .map_err(|e| e.to_string())?
            .checked()
    }

    fn checked(self) -> Result<Self, String> {
        let version = self.cdi_version.strip_prefix('v');
        if !VERSIONS.contains(&version.unwrap_or(&self.cdi_version)) {
            return Err(format!(
                "cdiVersion {:?} is not known; known are {}",
                self.cdi_version,
                VERSIONS.join(", ")
            ));
        }
        check_kind(&self.kind).map_err(|reason| format!("kind {:?}: {reason}", self.kind))?;
        self.container_edits
            .check()
            .map_err(|e| format!("containerEdits: {e}"))?;
        if self.devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        let mut names = HashSet::new();
        for device in &self.devices {
            let within = |reason: String| format!("device {:?}: {reason}", device.name);
            check_device(&device.name).map_err(|reason| within(reason.to_owned()))?;
            if !names.insert(&device.name) {
                return Err(within("it stands there twice".to_owned()));
            }
            if device.container_edits == ContainerEdits::default() {
                return Err(within("its containerEdits are empty".to_owned()));
            }
            device.container_edits.check().map_err(within)?;
        }
        Ok(self)
    }
}

const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

fn absolute(what: &str, path: &Path) -> Result<(), String> {
    let up = |part| matches!(part, std::path::Component::ParentDir);
    if path.is_absolute() && !path.components().any(up) && !path.to_string_lossy().contains('\0') {
        return Ok(());
    }
    Err(format!(
        "{what} {:?} must be an absolute path without \"..\"",
        path.display().to_string()
    ))
}

fn variables(env: &[String]) -> Result<(), String> {
    let bad = |v: &&String| v.split_once('=').is_none_or(|(k, _)| k.is_empty()) || v.contains('\0');
    match env.iter().find(bad) {
        Some(variable) => Err(format!("env {variable:?} must be NAME=value")),
        None => Ok(()),
    }
}

impl ContainerEdits {
    fn check(&self) -> Result<(), String> {
        variables(&self.env)?;
        for node in &self.device_nodes {
            absolute("deviceNodes.path", &node.path)?;
            if let Some(path) = &node.host_path {
                absolute("deviceNodes.hostPath", path)?;
            }
            let path = node.path.display();
            if !["", "b", "c", "u", "p"].contains(&node.r#type.as_str()) {
                return Err(format!(
                    "deviceNodes {path}: type {:?} must be b, c, u or p",
                    node.r#type
                ));
            }
            if !node.permissions.chars().all(|c| "rwm".contains(c)) {
                return Err(format!(
                    "deviceNodes {path}: permissions {:?} must be made of r, w and m",
                    node.permissions
                ));
            }
            let number = |n: i64| (0..=i64::from(u32::MAX)).contains(&n);
            if !number(node.major) || !number(node.minor) {
                return Err(format!("deviceNodes {path}: major and minor can't be that"));
            }
        }
        for device in &self.net_devices {
            let good = |name: &str| {
                (1..16).contains(&name.len())
                    && !name.contains(['/', ':'])
                    && !name.chars().any(|c| c.is_whitespace() || c.is_control())
                    && name != "."
                    && name != ".."
            };
            if !good(&device.host_interface_name) || !good(&device.name) {
                return Err(format!(
                    "netDevices: {:?} as {:?} must be names of interfaces",
                    device.host_interface_name, device.name
                ));
            }
        }
        for hook in &self.hooks {
            if !HOOKS.contains(&hook.hook_name.as_str()) {
                return Err(format!(
                    "hookName {:?} must be one of {}",
                    hook.hook_name,
                    HOOKS.join(", ")
                ));
            }
            absolute("hooks.path", &hook.path)?;
            variables(&hook.env).map_err(|e| format!("hooks {}: {e}", hook.path.display()))?;
            if hook.timeout.is_some_and(|seconds| seconds < 0) {
                return Err(format!("hooks {}: negative timeout", hook.path.display()));
            }
        }
        for mount in &self.mounts {
            absolute("mounts.containerPath", &mount.container_path)?;
            if mount.container_path.components().count() < 2 {
                return Err("mounts.containerPath can't be the root".to_owned());
            }
            if mount.host_path.as_os_str().is_empty() {
                return Err("mounts.hostPath is missing".to_owned());
            }
        }
        if let Some(rdt) = &self.intel_rdt
            && (rdt.clos_id.len() >= 4096
                || [".", ".."].contains(&rdt.clos_id.as_str())
                || rdt.clos_id.contains(['/', '\n']))
        {
            return Err(format!("intelRdt.closID {:?} can't be a name", rdt.clos_id));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(edits: &str) -> Result<CdiFile, String> {
        CdiFile::from_json(&format!(
            r#"{{"cdiVersion":"0.6.0","kind":"v.com/c","devices":[{{"name":"d","containerEdits":{edits}}}]}}"#
        ))
    }

    #[test]
    fn every_field_is_known() {
        let text = r#"
cdiVersion: 1.1.0
kind: vendor.com/gpu
annotations: {a: b}
containerEdits:
  env: [A=1]
devices:
- name: "0"
  annotations: {c: d}
  containerEdits:
    env: [B=]
    deviceNodes:
    - {path: /dev/x, hostPath: /dev/y, type: c, major: 1, minor: 3, fileMode: 438, permissions: rw, uid: 1, gid: 2}
    netDevices:
    - {hostInterfaceName: eth7, name: net0}
    hooks:
    - {hookName: createContainer, path: /bin/h, args: [h, x], env: [E=f], timeout: 3}
    mounts:
    - {hostPath: /a, containerPath: /b, options: [ro, rbind], type: bind}
    intelRdt: {closID: x, l3CacheSchema: l, memBwSchema: m, enableCMT: true, enableMBM: false, schemata: [a], enableMonitoring: true}
    additionalGids: [44]
"#;
        let file = CdiFile::from_yaml(text).unwrap();
        let edits = &file.devices[0].container_edits;
        assert_eq!(edits.device_nodes[0].file_mode, Some(0o666));
        assert_eq!(edits.hooks[0].timeout, Some(3));
        assert_eq!(edits.additional_gids, [44]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (edits, word) in [
            (r#"{}"#, "empty"),
            (r#"{"env":["A"]}"#, "env"),
            (r#"{"env":["=x"]}"#, "env"),
            (r#"{"surprise":1}"#, "surprise"),
            (r#"{"deviceNodes":[{"path":"dev/x"}]}"#, "path"),
            (r#"{"deviceNodes":[{"path":"/dev/../x"}]}"#, "path"),
            (r#"{"deviceNodes":[{"path":"/dev/x","type":"z"}]}"#, "type"),
            (
                r#"{"deviceNodes":[{"path":"/dev/x","permissions":"rx"}]}"#,
                "permissions",
            ),
            (r#"{"deviceNodes":[{"path":"/dev/x","major":-1}]}"#, "major"),
            (
                r#"{"hooks":[{"hookName":"later","path":"/x"}]}"#,
                "hookName",
            ),
            (r#"{"hooks":[{"hookName":"poststop","path":"x"}]}"#, "path"),
            (
                r#"{"hooks":[{"hookName":"poststop","path":"/x","timeout":-1}]}"#,
                "timeout",
            ),
            (
                r#"{"mounts":[{"hostPath":"/x","containerPath":"/"}]}"#,
                "root",
            ),
            (r#"{"mounts":[{"containerPath":"/x"}]}"#, "hostPath"),
            (
                r#"{"netDevices":[{"hostInterfaceName":"a/b","name":"x"}]}"#,
                "netDevices",
            ),
            (r#"{"intelRdt":{"closID":"../x"}}"#, "closID"),
        ] {
            let error = with(edits).expect_err(edits);
            assert!(error.contains(word), "{edits}: {error}");
        }
        for (text, word) in [
            ("", "EOF"),
            (
                r#"{"cdiVersion":"9.0.0","kind":"v/c","devices":[]}"#,
                "9.0.0",
            ),
            (r#"{"cdiVersion":"0.6.0","kind":"v","devices":[]}"#, "kind"),
            (
                r#"{"cdiVersion":"0.6.0","kind":"v/c","devices":[]}"#,
                "no devices",
            ),
        ] {
            let error = CdiFile::from_json(text).expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = CdiFile::from_yaml(&text);
            let _ = CdiFile::from_json(&text);
            let _ = with(&text);
        }
    }
}
