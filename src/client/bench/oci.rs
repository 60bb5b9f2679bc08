//! A bare OCI runtime: `run` of a bundle with the namespaces and mounts of a pod's container, to the exit
//! of its command; and its `create` and `start` alone, which are what a CRI runtime has it do.
use std::io::{Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::helper::spec_file;
use crate::error::ClientError;

/// Where the v2 side of a hybrid cgroup layout is mounted.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// A runtime with its two bundles (the node's network, a network of its own).
#[derive(Debug)]
pub struct Oci {
    binary: String,
    /// What is below each container's root file system.
    lower: PathBuf,
    scratch: PathBuf,
    starts: u64,
}

impl Oci {
    /// Writes the bundles and prepares this process's mounts for the runtime. `like`: a directory with the
    /// specifications of containers, to be given what those are given.
    ///
    /// # Errors
    /// [`ClientError::File`] or [`ClientError::System`].
    pub fn new(
        binary: &str,
        rootfs: &Path,
        command: &str,
        like: Option<&Path>,
    ) -> Result<Oci, ClientError> {
        own_mounts()?;
        let name = format!("slipway-bench-oci-{}", std::process::id());
        let scratch = std::env::temp_dir().join(name);
        let oci = Oci {
            binary: binary.to_owned(),
            lower: rootfs.to_owned(),
            scratch,
            starts: 0,
        };
        for (network, host) in [("host", true), ("new", false)] {
            let bundle = oci.scratch.join(network);
            let failed = |source| ClientError::File {
                what: "cannot write the bundle",
                path: bundle.clone(),
                source,
            };
            std::fs::create_dir_all(&bundle).map_err(failed)?;
            let own = config(&oci.rootfs(), command, host);
            let config = match like.map(|dir| dir.join(spec_file(host))) {
                // The networks that are not measured have none.
                Some(path) if path.exists() => as_in(read_json(&path)?, &own),
                _ => own,
            };
            std::fs::write(bundle.join("config.json"), config.to_string()).map_err(failed)?;
        }
        Ok(oci)
    }

    /// One `run`, from the start of the runtime's process to its end, and one `create` with `start`.
    ///
    /// # Errors
    /// [`ClientError::Helper`] with the runtime's own words.
    pub fn once(&mut self, host_network: bool) -> Result<Vec<Duration>, ClientError> {
        let bundle = self.scratch.join(if host_network { "host" } else { "new" });
        let bundle = bundle.to_string_lossy();
        let id = self.next_id();
        let fresh = self.fresh()?;
        let run = self.command(&["run", "--bundle", &bundle, &id])?;
        drop(fresh);
        let id = self.next_id();
        let _fresh = self.fresh()?;
        let made = self
            .command(&["create", "--bundle", &bundle, &id])
            .and_then(|create| Ok(create + self.command(&["start", &id])?));
        // Also of one that was only half made.
        let deleted = self.command(&["delete", "--force", &id]);
        let made = made?;
        deleted?;
        Ok(vec![run, made])
    }

    fn rootfs(&self) -> PathBuf {
        self.scratch.join("rootfs")
    }

    /// A root file system that nobody has written to, as a container of a pod gets: what a runtime makes in it would be there
    /// the next time.
    fn fresh(&self) -> Result<Mounted, ClientError> {
        let failed = |source: std::io::Error| ClientError::System {
            what: "cannot mount an overlay over the root file system",
            source,
        };
        let layer = self.scratch.join("layer");
        let _ = std::fs::remove_dir_all(&layer);
        let (upper, work) = (layer.join("upper"), layer.join("work"));
        for dir in [&upper, &work, &self.rootfs()] {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.lower.display(),
            upper.display(),
            work.display()
        );
        let (flags, none) = (MsFlags::empty(), None::<&str>);
        mount(
            Some("overlay"),
            &self.rootfs(),
            Some("overlay"),
            flags,
            Some(options.as_str()),
        )
        .and_then(|()| mount(none, &self.rootfs(), none, MsFlags::MS_PRIVATE, none))
        .map_err(|e| failed(e.into()))?;
        Ok(Mounted(self.rootfs()))
    }

    fn next_id(&mut self) -> String {
        self.starts += 1;
        format!("slipway-bench-{}-{}", std::process::id(), self.starts)
    }

    /// One command, and how long it took.
    fn command(&self, arguments: &[&str]) -> Result<Duration, ClientError> {
        let failed = |message: String| ClientError::Helper {
            what: self.binary.clone(),
            message,
        };
        // A container that goes on holds it open, so it is no pipe.
        let mut said = tempfile(&self.scratch).map_err(|e| failed(e.to_string()))?;
        let stderr = said.try_clone().map_err(|e| failed(e.to_string()))?;
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(self.scratch.join("state"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let began = Instant::now();
        let status = command.status().map_err(|e| failed(e.to_string()))?;
        let took = began.elapsed();
        if status.success() {
            return Ok(took);
        }
        let mut text = String::new();
        let _ = said
            .rewind()
            .and_then(|()| said.read_to_string(&mut text).map(drop));
        Err(failed(format!(
            "{}: {status}: {}",
            arguments.first().copied().unwrap_or_default(),
            text.trim()
        )))
    }
}

/// Unmounted when it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A file without a name.
fn tempfile(dir: &Path) -> std::io::Result<std::fs::File> {
    std::fs::create_dir_all(dir)?;
    let path = dir.join("stderr");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

impl Drop for Oci {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

fn read_json(path: &Path) -> Result<Value, ClientError> {
    let failed = |source: std::io::Error| ClientError::File {
        what: "cannot read a container's OCI spec",
        path: path.to_owned(),
        source,
    };
    let text = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|e| failed(e.into()))
}

/// Mounts of our own. crun refuses a hybrid layout in which a controller sits on the v2 side: there it doesn't see that side.
fn own_mounts() -> Result<(), ClientError> {
    let failed = |e: nix::Error| ClientError::System {
        what: "cannot make mounts that only the OCI runtime sees",
        source: e.into(),
    };
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed)?;
    let controllers = std::fs::read_to_string(Path::new(UNIFIED).join("cgroup.controllers"));
    match controllers.is_ok_and(|text| !text.trim().is_empty()) {
        true => umount2(UNIFIED, MntFlags::MNT_DETACH).map_err(failed),
        false => Ok(()),
    }
}

/// A container's specification for one beside it: with a root file system, a command and a cgroup of its own. Namespaces that
/// only the runtime can name (by its own process) it gets new.
fn as_in(mut spec: Value, own: &Value) -> Value {
    spec["root"]["path"] = own["root"]["path"].clone();
    spec["process"]["args"] = own["process"]["args"].clone();
    spec["process"]["terminal"] = json!(false);
    // Slipway's own plan leaves it to whoever sees the image's files.
    if !spec["process"]["user"].is_object() {
        spec["process"]["user"] = own["process"]["user"].clone();
    }
    spec["linux"]["cgroupsPath"] = own["linux"]["cgroupsPath"].clone();
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        let nowhere = |path: &Value| path.as_str().is_some_and(|p| p.starts_with("/proc/"));
        if nowhere(&namespace["path"])
            && let Some(fields) = namespace.as_object_mut()
        {
            fields.remove("path");
        }
    }
    spec
}

fn config(rootfs: &Path, command: &str, host_network: bool) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    let mut namespaces = vec![
        json!({"type": "pid"}),
        json!({"type": "ipc"}),
        json!({"type": "uts"}),
        json!({"type": "mount"}),
    ];
    if !host_network {
        namespaces.push(json!({"type": "network"}));
    }
    let mount = |to: &str, kind: &str, options: &str| {
        let options: Vec<&str> = options.split(',').collect();
        json!({"destination": to, "type": kind, "source": kind, "options": options})
    };
    let linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": format!("/slipway-bench-oci-{}", std::process::id()),
        "resources": {"devices": [{"allow": false, "access": "rwm"}]},
        "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
            "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    });
    json!({
        "ociVersion": "1.0.2",
        "hostname": "bench",
        "root": {"path": rootfs, "readonly": false},
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": [command],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "noNewPrivileges": false,
        },
        "mounts": [
            mount("/proc", "proc", "nosuid,noexec,nodev"),
            mount("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
            mount("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
            mount("/dev/shm", "tmpfs", "nosuid,noexec,nodev,mode=1777,size=65536k"),
            mount("/dev/mqueue", "mqueue", "nosuid,noexec,nodev"),
            mount("/sys", "sysfs", "nosuid,noexec,nodev,ro"),
        ],
        "linux": linux,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_differ_in_the_network_only() {
        let host = config(Path::new("/r"), "/bin/true", true);
        let mut new = config(Path::new("/r"), "/bin/true", false);
        assert_ne!(host, new);
        new["linux"]["namespaces"].as_array_mut().unwrap().pop();
        assert_eq!(host, new);
    }

    #[test]
    fn a_bundle_goes_by_a_container() {
        let spec = json!({
            "root": {"path": "/run/x", "readonly": true},
            "process": {"args": ["sh"], "env": ["A=1"], "terminal": true, "user": {"uid": 7}},
            "mounts": [{"destination": "/etc/hosts", "source": "/run/hosts"}],
            "linux": {
                "cgroupsPath": "/kubepods/x",
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                "namespaces": [{"type": "pid", "path": "/proc/self/ns/pid"}, {"type": "ipc", "path": "/run/ns/ipc"}],
            },
        });
        let own = config(Path::new("/r"), "/bin/true", true);
        let made = as_in(spec.clone(), &own);
        assert_eq!(made["root"], json!({"path": "/r", "readonly": true}));
        assert_eq!(made["process"]["args"], json!(["/bin/true"]));
        assert_eq!(made["process"]["env"], spec["process"]["env"]);
        assert_eq!(made["process"]["user"]["uid"], 7);
        assert_eq!(made["mounts"], spec["mounts"]);
        let linux = &made["linux"];
        assert_eq!(linux["seccomp"], spec["linux"]["seccomp"]);
        assert_eq!(linux["cgroupsPath"], own["linux"]["cgroupsPath"]);
        let namespaces = json!([{"type": "pid"}, {"type": "ipc", "path": "/run/ns/ipc"}]);
        assert_eq!(linux["namespaces"], namespaces);
    }

    #[test]
    fn a_runtime_that_fails_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("runtime");
        std::fs::write(&binary, "#!/bin/sh\necho sorry >&2\nexit 3\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&binary, mode).unwrap();
        let scratch = dir.path().join("scratch");
        let oci = Oci {
            binary: binary.to_string_lossy().into_owned(),
            lower: dir.path().to_owned(),
            scratch,
            starts: 0,
        };
        let text = crate::report(&oci.command(&["run"]).unwrap_err());
        assert!(text.contains("sorry") && text.contains('3'), "{text}");
    }
}
