//! A container's namespaces, as the command line has to see to them: the user namespace that is made for the container or
//! joined, and going in for hooks.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{
    LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceType, Spec,
};
use slipway_runtime::ids::{self, IdMaps};
use slipway_runtime::sys;

use crate::{OciError, Result};

const FIELD: &str = "linux.namespaces";
/// CLONE_NEWTIME, for which the C library has no name yet.
const TIME: CloneFlags = CloneFlags::from_bits_retain(0x80);

/// The specification's namespaces.
pub fn list(spec: &Spec) -> &[LinuxNamespace] {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces.map_or(&[], Vec::as_slice)
}

/// Whether the container has a namespace of this type that is not its caller's.
pub fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    list(spec).iter().any(|n| n.typ() == kind)
}

/// Whether the container has a new namespace of this type.
pub fn has_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    list(spec)
        .iter()
        .any(|n| n.typ() == kind && n.path().is_none())
}

/// Refuses what config-linux.md refuses: a type twice, and a path to something else than a namespace of its type.
/// An empty path is none.
///
/// # Errors
/// [`OciError::Spec`].
pub fn check(spec: &mut Spec) -> Result<()> {
    let linux = spec.linux_mut().as_mut();
    let namespaces = linux.and_then(|l| l.namespaces_mut().as_mut());
    let mut seen = HashSet::new();
    for (n, namespace) in namespaces.into_iter().flatten().enumerate() {
        let field = format!("{FIELD}[{n}]");
        let kind = namespace.typ();
        if !seen.insert(kind) {
            return Err(OciError::spec(
                field,
                format!("there are two of type {kind}"),
            ));
        }
        let path = namespace
            .path()
            .clone()
            .filter(|p| !p.as_os_str().is_empty());
        if let Some(path) = &path {
            let found = kind_of(path)
                .map_err(|e| OciError::spec(&field, format!("{}: {e}", path.display())))?;
            if found != Some(flag(kind).bits()) {
                let reason = format!("{} is no namespace of type {kind}", path.display());
                return Err(OciError::spec(field, reason));
            }
        }
        namespace.set_path(path);
    }
    if has(spec, LinuxNamespaceType::User) && !has_new(spec, LinuxNamespaceType::Mount) {
        let reason = "with a user namespace, a container needs a mount namespace of its own, too: add \
                      {\"type\": \"mount\"} without a path";
        return Err(OciError::spec(FIELD, reason));
    }
    Ok(())
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => TIME,
    }
}

/// What kind of a namespace a file is; none for another file.
fn kind_of(path: &Path) -> io::Result<Option<i32>> {
    sys::namespace_kind(fs::File::open(path)?.as_fd())
}

/// Sees to the container's user namespace: makes a new one with the specification's ids, and reads the ids of one that is
/// joined. The specification has a path and ids afterwards, as a pod's container has them.
///
/// What is returned must live until the container is created.
///
/// # Errors
/// [`OciError`].
pub fn users(spec: &mut Spec) -> Result<Option<OwnedFd>> {
    if !has(spec, LinuxNamespaceType::User) {
        return Ok(None);
    }
    let namespace = match has_new(spec, LinuxNamespaceType::User) {
        true => make(spec)?,
        false => join(spec)?,
    };
    let maps = IdMaps::of_spec(spec);
    if let Some(Err(_)) = maps.map(|maps| maps.root()) {
        let reason = "id 0 of the container must be mapped: its root file system is made by it";
        return Err(OciError::spec("linux.uidMappings", reason));
    }
    let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let linux = spec.linux_mut().as_mut();
    for entry in linux
        .and_then(|l| l.namespaces_mut().as_mut())
        .into_iter()
        .flatten()
    {
        if entry.typ() == LinuxNamespaceType::User {
            entry.set_path(Some(path.clone().into()));
        }
    }
    Ok(Some(namespace))
}

fn make(spec: &Spec) -> Result<OwnedFd> {
    let maps = IdMaps::of_spec(spec).ok_or_else(|| {
        let reason = "a new user namespace needs linux.uidMappings and linux.gidMappings";
        OciError::spec(FIELD, reason)
    })?;
    ids::namespace(&maps).map_err(|e| {
        let reason = format!("the kernel refuses a user namespace with these ids: {e}");
        OciError::spec("linux.uidMappings", reason)
    })
}

/// A user namespace that is there has its ids.
fn join(spec: &mut Spec) -> Result<OwnedFd> {
    let path = list(spec)
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::User)
        .and_then(|n| n.path().clone())
        .unwrap_or_default();
    let failed = OciError::file("join the user namespace", &path);
    let namespace: OwnedFd = fs::File::open(&path).map_err(&failed)?.into();
    let maps = maps_of(&namespace).map_err(&failed)?;
    let [uids, gids] = maps.map(|text| parse_map(&text));
    let linux = spec.linux_mut().get_or_insert_default();
    linux
        .set_uid_mappings(Some(uids))
        .set_gid_mappings(Some(gids));
    Ok(namespace)
}

/// Reads the maps from a child that goes in: there is no other way to those of a namespace that nobody may be in.
fn maps_of(namespace: &OwnedFd) -> io::Result<[String; 2]> {
    use std::io::{Read as _, Write as _};
    let (read, write) = slipway_runtime::descriptor::pipe()?;
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Child => {
            let told = setns(namespace.as_fd(), CloneFlags::CLONE_NEWUSER)
                .map_err(io::Error::from)
                .and_then(|()| {
                    let [uids, gids] = ["uid_map", "gid_map"]
                        .map(|file| fs::read_to_string(format!("/proc/self/{file}")));
                    fs::File::from(write).write_all(format!("{}\0{}", uids?, gids?).as_bytes())
                });
            sys::exit_now(i32::from(told.is_err()))
        }
        sys::Forked::Parent(pid) => {
            drop(write);
            let mut text = String::new();
            let heard = fs::File::from(read).read_to_string(&mut text);
            let code = sys::wait_child(pid);
            heard?;
            match (code, text.split_once('\0')) {
                (0, Some((uids, gids))) => Ok([uids.to_owned(), gids.to_owned()]),
                _ => Err(io::Error::other("it can't be entered")),
            }
        }
    }
}

fn parse_map(text: &str) -> Vec<LinuxIdMapping> {
    let line = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        let mapping = LinuxIdMappingBuilder::default();
        let mapping = mapping.container_id(next()?).host_id(next()?).size(next()?);
        mapping.build().ok()
    };
    text.lines().filter_map(line).collect()
}

/// Whether a process has another namespace of a type than this one; `name` as in `/proc/<pid>/ns`.
pub fn differs(pid: i32, name: &str) -> bool {
    let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"));
    let ours = fs::read_link(format!("/proc/self/ns/{name}"));
    matches!((theirs, ours), (Ok(theirs), Ok(ours)) if theirs != ours)
}

/// Goes into the namespaces of a process, which is pinned: its number may be another one's for who is in its PID
/// namespace already. The PID namespace holds for children only.
///
/// # Errors
/// What failed, in words.
pub fn enter(pid: i32, process: &OwnedFd) -> std::result::Result<(), String> {
    let all = [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("net", CloneFlags::CLONE_NEWNET),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("time", TIME),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let mut flags = CloneFlags::empty();
    for (_, flag) in all.iter().filter(|(name, _)| differs(pid, name)) {
        flags |= *flag;
    }
    setns(process, flags).map_err(|e| e.to_string())?;
    if flags.contains(CloneFlags::CLONE_NEWUSER) {
        // The host's root is nobody in there.
        sys::set_ids(0, 0, &[]).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The number that a process has in its own PID namespace.
pub fn inner_pid(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: serde_json::Value) -> Spec {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn namespaces_are_what_they_say() {
        let good = serde_json::json!([
            {"type": "mount"}, {"type": "network", "path": "/proc/self/ns/net"}, {"type": "pid", "path": ""}
        ]);
        let mut good = spec(good);
        check(&mut good).unwrap();
        assert!(has_new(&good, LinuxNamespaceType::Pid));
        assert!(!has_new(&good, LinuxNamespaceType::Network));
        for (bad, word) in [
            (
                serde_json::json!([{"type": "mount"}, {"type": "mount"}]),
                "two",
            ),
            (
                serde_json::json!([{"type": "network", "path": "/proc/self/ns/uts"}]),
                "no namespace",
            ),
            (
                serde_json::json!([{"type": "network", "path": "/etc/passwd"}]),
                "no namespace",
            ),
            (
                serde_json::json!([{"type": "network", "path": "/no/where"}]),
                "No such file",
            ),
            (serde_json::json!([{"type": "user"}]), "mount namespace"),
        ] {
            let error = check(&mut spec(bad)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn maps_are_read() {
        let map = parse_map("         0     100000       1000\n      1000          7          1\n");
        assert_eq!(map.len(), 2);
        assert_eq!(
            (map[1].container_id(), map[1].host_id(), map[1].size()),
            (1000, 7, 1)
        );
    }
}
