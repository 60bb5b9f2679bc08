//! Reading a bundle (bundle.md, config.md): what its `config.json` says, checked and completed, so that from here on it
//! can be treated as the specification of a pod's container.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::rootfs::utils::is_bind;
use oci_spec::runtime::{
    Capability, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, Mount, Process, Spec,
};

use crate::record::parse;
use crate::{OciError, Result, namespaces};

const CONFIG: &str = "config.json";
/// Largest configuration that is read, in bytes.
const LARGEST: u64 = 16 << 20;

/// A bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory, absolute and without links.
    pub path: PathBuf,
    /// Its root file system, likewise.
    pub rootfs: PathBuf,
    /// Its configuration, checked and completed.
    pub spec: Spec,
    /// There is a process to start.
    pub has_process: bool,
    /// What it asks for and does not get.
    pub warnings: Vec<String>,
}

impl Bundle {
    /// Reads a bundle.
    ///
    /// # Errors
    /// [`OciError`], with the place in the configuration.
    pub fn load(path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).map_err(OciError::file("find the bundle", path))?;
        let config = path.join(CONFIG);
        let failed = OciError::file("read the bundle's", &config);
        if fs::metadata(&config).map_err(&failed)?.len() > LARGEST {
            return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
        }
        let bytes = fs::read(&config).map_err(&failed)?;
        let (mut spec, mut warnings) = parse_spec(&bytes, &config)?;
        check_version(spec.version())?;
        let rootfs = root(&spec, &path)?;
        let has_process = spec.process().is_some();
        process(&mut spec)?;
        if spec.linux().is_none() {
            return Err(OciError::spec("linux", "it is missing"));
        }
        namespaces::check(&mut spec)?;
        mounts(&mut spec, &path)?;
        linux(&mut spec)?;
        warnings.extend(ungranted(&spec));
        Ok(Self {
            path,
            rootfs,
            spec,
            has_process,
            warnings,
        })
    }
}

/// Capabilities that nobody knows are passed over, and told of (config.md, "POSIX process").
fn parse_spec(bytes: &[u8], path: &Path) -> Result<(Spec, Vec<String>)> {
    const KIND: &str = "OCI specification";
    let error = match parse(bytes, path, KIND) {
        Ok(spec) => return Ok((spec, Vec::new())),
        Err(error) => error,
    };
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(bytes) else {
        return Err(error);
    };
    let mut warnings = Vec::new();
    let sets = value
        .pointer_mut("/process/capabilities")
        .and_then(|sets| sets.as_object_mut());
    for list in sets
        .into_iter()
        .flat_map(|sets| sets.values_mut())
        .filter_map(|v| v.as_array_mut())
    {
        list.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known {
                warnings.push(format!("there is no capability {name}"));
            }
            known
        });
    }
    warnings.sort();
    warnings.dedup();
    match warnings.is_empty() {
        true => Err(error),
        false => Ok((parse(value.to_string().as_bytes(), path, KIND)?, warnings)),
    }
}

/// What this process can't give to another.
fn ungranted(spec: &Spec) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))?;
    let held = u64::from_str_radix(held.trim(), 16).ok()?;
    let wanted = spec
        .process()
        .as_ref()?
        .capabilities()
        .as_ref()?
        .bounding()
        .clone()?;
    let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
    let missing = |(number, name): &(u8, String)| {
        let short = name.trim_start_matches("CAP_");
        held & (1 << number) == 0 && wanted.iter().any(|w| w.trim_start_matches("CAP_") == short)
    };
    let all = slipway_runtime::confine::capabilities();
    let missing: Vec<String> = all
        .into_iter()
        .filter(missing)
        .map(|(_, name)| name)
        .collect();
    (!missing.is_empty()).then(|| format!("not held, and so not granted: {}", missing.join(", ")))
}

/// Semantic versioning: all of 1 are compatible, as far as they are known.
fn check_version(version: &str) -> Result<()> {
    let number = version.split(['-', '+']).next().unwrap_or_default();
    let parts: Vec<Option<u32>> = number.split('.').map(|part| part.parse().ok()).collect();
    match parts.as_slice() {
        [Some(1), Some(_), Some(_)] => Ok(()),
        _ => Err(OciError::spec(
            "ociVersion",
            format!("{version:?} is not supported; versions 1.0.0 to 1.2.x are"),
        )),
    }
}

fn root(spec: &Spec, bundle: &Path) -> Result<PathBuf> {
    let root = spec.root().as_ref();
    let root = root.ok_or_else(|| OciError::spec("root", "it is missing"))?;
    let refused = |reason: String| OciError::spec("root.path", reason);
    if root.path().as_os_str().is_empty() {
        return Err(refused("it is empty".to_owned()));
    }
    let path = bundle.join(root.path());
    let found = fs::canonicalize(&path).map_err(|e| refused(format!("{}: {e}", path.display())))?;
    if !found.is_dir() {
        return Err(refused(format!("{} is no directory", found.display())));
    }
    if found == Path::new("/") {
        return Err(refused("the host's root can't be a container's".to_owned()));
    }
    Ok(found)
}

/// A container may be created without a process, and is never started then: one that waits takes its place.
fn process(spec: &mut Spec) -> Result<()> {
    let placeholder = || -> Option<Process> {
        let process = serde_json::json!({"args": ["/"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        serde_json::from_value(process).ok()
    };
    match spec.process() {
        Some(process) => check_process(process, "process"),
        None => {
            spec.set_process(placeholder());
            Ok(())
        }
    }
}

/// Checks a process, the container's or an exec's.
///
/// # Errors
/// [`OciError::Spec`].
pub fn check_process(process: &Process, field: &str) -> Result<()> {
    let refused =
        |name: &str, reason: String| Err(OciError::spec(format!("{field}.{name}"), reason));
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return refused("args", "there is no command to execute".to_owned());
    }
    if !process.cwd().is_absolute() {
        let cwd = process.cwd().display();
        return refused("cwd", format!("{cwd:?} is not absolute"));
    }
    if let Some(entry) = process.env().iter().flatten().find(|e| !e.contains('=')) {
        return refused("env", format!("{entry:?} is not NAME=value"));
    }
    let mut seen = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        if !seen.insert(limit.typ() as u32) {
            return refused("rlimits", format!("{:?} is there twice", limit.typ()));
        }
        if limit.soft() > limit.hard() {
            let reason = format!("the soft limit of {:?} is above the hard one", limit.typ());
            return refused("rlimits", reason);
        }
    }
    if process
        .apparmor_profile()
        .as_ref()
        .is_some_and(|p| !p.is_empty())
        && !apparmor()
    {
        return refused("apparmorProfile", "this host has no AppArmor".to_owned());
    }
    if process
        .selinux_label()
        .as_ref()
        .is_some_and(|l| !l.is_empty())
        && !selinux()
    {
        return refused("selinuxLabel", "this host has no SELinux".to_owned());
    }
    Ok(())
}

/// Whether AppArmor is on.
pub fn apparmor() -> bool {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|text| text.starts_with('Y'))
}

/// Whether SELinux is on.
pub fn selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

fn mounts(spec: &mut Spec, bundle: &Path) -> Result<()> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let [uids, gids] = match spec.linux() {
        Some(linux) => [linux.uid_mappings().clone(), linux.gid_mappings().clone()],
        None => [None, None],
    };
    for (n, mount) in mounts.iter_mut().enumerate() {
        let field = format!("mounts[{n}]");
        // Relative ones are allowed in old specifications, and are below the root.
        let destination = Path::new("/").join(mount.destination());
        mount.set_destination(destination);
        match is_bind(mount) {
            true => source(mount, bundle, &field)?,
            // It is only for people; libcontainer wants one.
            false if mount.source().is_none() => {
                let kind = mount.typ().clone().unwrap_or_else(|| "none".to_owned());
                mount.set_source(Some(kind.into()));
            }
            false => {}
        }
        let has = |name: &str| mount.options().iter().flatten().any(|o| o == name);
        if mount.uid_mappings().is_none() && (has("idmap") || has("ridmap")) {
            if uids.is_none() {
                let reason =
                    "idmap without uidMappings means those of the container, which has none";
                return Err(OciError::spec(field, reason));
            }
            mount
                .set_uid_mappings(uids.clone())
                .set_gid_mappings(gids.clone());
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn source(mount: &mut Mount, bundle: &Path, field: &str) -> Result<()> {
    let source = mount.source().clone().filter(|s| !s.as_os_str().is_empty());
    let field = format!("{field}.source");
    let source = source.ok_or_else(|| OciError::spec(&field, "a bind mount needs one"))?;
    let source = bundle.join(source);
    if let Err(e) = fs::metadata(&source) {
        return Err(OciError::spec(field, format!("{}: {e}", source.display())));
    }
    mount.set_source(Some(source));
    Ok(())
}

fn linux(spec: &mut Spec) -> Result<()> {
    let Some(linux) = spec.linux_mut().as_mut() else {
        return Ok(());
    };
    if linux.intel_rdt().is_some() {
        return Err(OciError::spec("linux.intelRdt", "it is not supported"));
    }
    if let Some(name) = linux.rootfs_propagation()
        && !["shared", "slave", "private", "unbindable"].contains(&name.trim_start_matches('r'))
    {
        let reason = format!("{name:?} is none of shared, slave, private, unbindable");
        return Err(OciError::spec("linux.rootfsPropagation", reason));
    }
    for (n, device) in linux.devices().iter().flatten().enumerate() {
        if !device.path().starts_with("/dev") {
            let reason = format!(
                "{} is not below /dev, where alone devices are made",
                device.path().display()
            );
            return Err(OciError::spec(format!("linux.devices[{n}].path"), reason));
        }
    }
    // What no rule allows is denied, as in runc, also where there is no rule at all.
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = vec![deny_all()?];
    rules.extend(resources.devices().iter().flatten().cloned());
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

fn deny_all() -> Result<LinuxDeviceCgroup> {
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm");
    rule.build()
        .map_err(|e| OciError::spec("linux.resources.devices", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(change: impl FnOnce(&mut serde_json::Value)) -> Result<Bundle> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let mut spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        change(&mut spec);
        fs::write(dir.path().join(CONFIG), spec.to_string()).unwrap();
        Bundle::load(dir.path())
    }

    #[test]
    fn a_small_bundle_is_completed() {
        let bundle = load(|spec| {
            spec["mounts"] = serde_json::json!([
                {"destination": "tmp", "type": "tmpfs"},
                {"destination": "/b", "source": "rootfs", "options": ["bind"]},
            ]);
        })
        .unwrap();
        let mounts = bundle.spec.mounts().clone().unwrap();
        assert_eq!(mounts[0].destination(), Path::new("/tmp"));
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("tmpfs")));
        assert!(mounts[1].source().as_ref().unwrap().is_absolute());
        let linux = bundle.spec.linux().clone().unwrap();
        let rules = linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .clone()
            .unwrap();
        assert!(rules.len() == 1 && !rules[0].allow());
        assert!(bundle.has_process);
        assert!(
            !load(|spec| spec["process"] = serde_json::Value::Null)
                .unwrap()
                .has_process
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Change = fn(&mut serde_json::Value);
        let odd = load(|s| {
            s["process"]["capabilities"] = serde_json::json!({"bounding": ["CAP_KILL", "CAP_ODD"]})
        });
        assert!(odd.unwrap().warnings.iter().any(|w| w.contains("CAP_ODD")));
        let bad: [(Change, &str); 13] = [
            (|s| s["ociVersion"] = "2.0.0".into(), "ociVersion"),
            (|s| s["ociVersion"] = "1".into(), "ociVersion"),
            (|s| s["root"]["path"] = "nowhere".into(), "root.path"),
            (|s| s["root"]["path"] = "config.json".into(), "root.path"),
            (|s| s["root"] = serde_json::Value::Null, "root"),
            (
                |s| s["process"]["args"] = serde_json::json!([]),
                "process.args",
            ),
            (|s| s["process"]["cwd"] = "here".into(), "process.cwd"),
            (
                |s| s["process"]["env"] = serde_json::json!(["X"]),
                "process.env",
            ),
            (
                |s| {
                    let limit = serde_json::json!({"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1});
                    s["process"]["rlimits"] = serde_json::json!([limit, limit]);
                },
                "process.rlimits",
            ),
            (|s| s["linux"] = serde_json::Value::Null, "linux"),
            (
                |s| s["mounts"] = serde_json::json!([{"destination": "/x", "type": "bind", "source": "/no/where"}]),
                "mounts[0].source",
            ),
            (
                |s| s["linux"]["rootfsPropagation"] = "sideways".into(),
                "rootfsPropagation",
            ),
            (|s| s["mounts"] = "x".into(), "mounts"),
        ];
        for (change, word) in bad {
            let error = slipway_runtime::confine::chain(&load(change).unwrap_err());
            assert!(error.contains(word), "{word}: {error}");
        }
        assert!(Bundle::load(Path::new("/no/bundle")).is_err());
    }
}
