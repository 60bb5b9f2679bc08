//! The bundle: the whole OCI specification, as a runtime of others is to read it.
//!
//! What the native path keeps out of the specification, because [`crate::confine`] does it, is put in here: the user that
//! was found in the image, the environment, the score for the OOM killer. The seccomp profile is in it already, in the
//! OCI's form.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use libcontainer::rootfs::utils::is_bind;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxNamespaceType, Mount, Process, Spec,
    UserBuilder,
};
use rustix::fs::StatVfsMountFlags;
use slipway_proto::keeper::CreateContainer;

use crate::confine::chain;
use crate::ids::IdMaps;
use crate::mapped::{attach, tree};
use crate::propagation::{self, make_place};
use crate::sys;
use crate::user::Resolved;

/// Why a specification could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// JSON is text.
    #[error(
        "the value of the environment variable {name} is not UTF-8, and runtime handler {handler:?} gets its \
         configuration as text; use another value, or a handler of type \"native\""
    )]
    Environment {
        /// The variable.
        name: String,
        /// The handler.
        handler: String,
    },
    /// The specification lacks something that every container has.
    #[error("the container's OCI spec has no {0}")]
    Incomplete(&'static str),
    /// A part of it can't be made.
    #[error("can't complete the container's OCI spec: {0}")]
    Build(String),
    /// Hooks that nobody would run.
    #[error(
        "runtime handler {handler:?} runs no {stage} hooks, and the container has some: it has no such place in the \
         container's sandbox"
    )]
    Hooks {
        /// The handler.
        handler: String,
        /// Their stage.
        stage: &'static str,
    },
    /// A cgroup that systemd could not make.
    #[error("cgroup {} is no scope in a slice of systemd's", .0.display())]
    NoScope(PathBuf),
    /// A mount's propagation.
    #[error("can't set the propagation of a mount")]
    Propagation(#[source] io::Error),
    /// A mount whose options hold for all that is mounted below it.
    #[error("can't mount {} with its options for all below it", path.display())]
    Recursive {
        /// The source.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What is known of a container once its root file system is mounted.
pub struct Known<'a> {
    /// The handler, for messages.
    pub handler: &'a str,
    /// The call.
    pub create: &'a CreateContainer,
    /// Whom it runs as.
    pub user: &'a Resolved,
    /// Where its root file system is mounted; `None`: the spec says it already.
    pub rootfs: Option<&'a Path>,
    /// The PID namespace to join instead of the spec's (mode TARGET).
    pub pid_namespace: Option<&'a Path>,
    /// The score for the OOM killer that this process was given.
    pub oom_score_adj: Option<i32>,
}

/// Completes a specification.
///
/// # Errors
/// [`BundleError`].
pub fn complete(spec: &mut Spec, known: &Known<'_>) -> Result<(), BundleError> {
    let process = spec.process().as_ref();
    let process = process.ok_or(BundleError::Incomplete("process"))?;
    let process = process_of(process.clone(), known)?;
    spec.set_process(Some(process));
    if let (Some(root), Some(rootfs)) = (spec.root_mut().as_mut(), known.rootfs) {
        root.set_path(rootfs.to_owned());
    }
    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(BundleError::Incomplete("linux"))?;
    // libcontainer's own word is taken for the whole tree; elsewhere it is the one mount's without the r.
    let propagation = linux
        .rootfs_propagation()
        .clone()
        .map(|word| match word.as_str() {
            "shared" | "slave" | "private" => format!("r{word}"),
            _ => word,
        });
    linux.set_rootfs_propagation(propagation);
    if known.create.systemd {
        let path = linux.cgroups_path().clone().unwrap_or_default();
        let unit = scope(&path).ok_or_else(|| BundleError::NoScope(path.clone()))?;
        linux.set_cgroups_path(Some(unit.into()));
    }
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        if namespace.typ() == LinuxNamespaceType::Pid
            && let Some(path) = known.pid_namespace
        {
            namespace.set_path(Some(path.to_owned()));
        }
        // Opened by this process, and to be found by another.
        let own = namespace
            .path()
            .as_ref()
            .and_then(|p| p.strip_prefix("/proc/self").ok());
        if let Some(own) = own {
            let path = Path::new("/proc")
                .join(std::process::id().to_string())
                .join(own);
            namespace.set_path(Some(path));
        }
    }
    Ok(())
}

/// Capabilities that gVisor's kernel does not know, and has nothing of what they are for.
const UNKNOWN: [Capability; 3] = [
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Takes out of a specification what a container in gVisor's sandbox does not have, and would be refused for: its processes
/// are none of the host's, so no label of SELinux is theirs, and newer capabilities are unknown there.
///
/// # Errors
/// [`BundleError::Hooks`] for what it would pass over in silence.
pub fn for_sandbox(spec: &mut Spec, handler: &str) -> Result<(), BundleError> {
    let hooks = spec.hooks().clone().unwrap_or_default();
    for (stage, list) in [
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
    ] {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(BundleError::Hooks {
                handler: handler.to_owned(),
                stage,
            });
        }
    }
    if let Some(process) = spec.process_mut() {
        process.set_selinux_label(None);
        let known = process.capabilities().clone().map(known_capabilities);
        process.set_capabilities(known);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_mount_label(None);
        // It would make that cgroup, of which it was told to leave all alone.
        linux.set_cgroups_path(None);
    }
    Ok(())
}

/// Arranges mounts as youki takes them, whose library is the native path's, too: it knows one propagation for all of them,
/// by the four words that the specification has.
///
/// # Errors
/// [`BundleError::Propagation`].
pub fn for_youki(spec: &mut Spec, aside: &Path) -> Result<(), BundleError> {
    // What it opens more than is wanted has nobody on the other side: it is a copy that was bound aside.
    let opened = propagation::arrange(spec, aside);
    opened.map(drop).map_err(BundleError::Propagation)
}

fn known_capabilities(all: LinuxCapabilities) -> LinuxCapabilities {
    let known = |set: &Option<Capabilities>| {
        let set = set.clone();
        set.map(|set| set.into_iter().filter(|c| !UNKNOWN.contains(c)).collect())
    };
    let mut kept = LinuxCapabilities::default();
    kept.set_bounding(known(all.bounding()))
        .set_effective(known(all.effective()))
        .set_permitted(known(all.permitted()))
        .set_inheritable(known(all.inheritable()))
        .set_ambient(known(all.ambient()));
    kept
}

fn process_of(mut process: Process, known: &Known<'_>) -> Result<Process, BundleError> {
    let build = |e: oci_spec::OciSpecError| BundleError::Build(chain(&e));
    let user = UserBuilder::default()
        .uid(known.user.uid)
        .gid(known.user.gid)
        .additional_gids(known.user.groups.clone())
        .umask(process.user().umask().unwrap_or(0o022))
        .build()
        .map_err(build)?;
    let mut env = Vec::new();
    for variable in &known.create.env {
        let text = std::str::from_utf8(variable).map_err(|_| BundleError::Environment {
            name: String::from_utf8_lossy(
                variable.split(|b| *b == b'=').next().unwrap_or_default(),
            )
            .into_owned(),
            handler: known.handler.to_owned(),
        })?;
        env.push(text.to_owned());
    }
    if !env.iter().any(|e| e.starts_with("HOME=") && e.len() > 5) {
        env.retain(|e| !e.starts_with("HOME="));
        env.push(format!("HOME={}", known.user.home));
    }
    process
        .set_user(user)
        .set_env(Some(env))
        .set_oom_score_adj(known.oom_score_adj);
    if process.no_new_privileges() == Some(false) {
        // It says the same as nothing, and youki 0.7 loads seccomp filters too late when there is a word at all.
        process.set_no_new_privileges(None);
    }
    Ok(process)
}

/// A scope of systemd's in the form that runtimes want: `slice:prefix:name`, of which they make
/// `prefix-name.scope`. Without a prefix they take the name as it is.
fn scope(cgroup: &Path) -> Option<String> {
    let name = cgroup.file_name()?.to_str()?.strip_suffix(".scope")?;
    let slice = match cgroup.parent()? {
        root if root == Path::new("/") => "-.slice",
        parent => parent
            .file_name()?
            .to_str()
            .filter(|name| name.ends_with(".slice"))?,
    };
    // The container's id, which has no dash in it, is last.
    let (prefix, name) = name.rsplit_once('-').unwrap_or(("", name));
    Some(format!("{slice}:{prefix}:{name}"))
}

/// `mount_setattr(2)`'s attributes by the options that name them for whole trees.
const RECURSIVE: [(&str, &str, u64); 5] = [
    ("rro", "ro", 1),
    ("rnosuid", "nosuid", 2),
    ("rnodev", "nodev", 4),
    ("rnoexec", "noexec", 8),
    ("rnosymfollow", "nosymfollow", 0x20_0000),
];

/// Binds the sources whose options hold for all that is mounted below them aside, with those options set, and points
/// the spec's mounts at that: so it depends on no runtime whether they hold. (Some that don't know them pass them over.)
///
/// # Errors
/// [`BundleError::Recursive`].
pub fn arrange_recursive(spec: &mut Spec, aside: &Path) -> Result<(), BundleError> {
    for (n, entry) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let options = entry.options().clone().unwrap_or_default();
        let asked = |name: &str| options.iter().any(|o| o == name);
        let attributes = RECURSIVE.iter().filter(|(name, ..)| asked(name));
        let attributes = attributes.fold(0, |all, (.., attribute)| all | attribute);
        if attributes == 0 || !is_bind(entry) {
            continue;
        }
        let source = entry.source().clone().unwrap_or_default();
        let at = aside.join(n.to_string());
        set_aside(&source, &at, attributes).map_err(|e| BundleError::Recursive {
            path: source.clone(),
            source: e,
        })?;
        point_at(entry, &at, options);
    }
    Ok(())
}

/// Binds aside the sources that show the host's cgroups, and points the spec's mounts at that.
///
/// # Errors
/// [`BundleError::Recursive`].
pub fn arrange_cgroups(spec: &mut Spec, aside: &Path) -> Result<(), BundleError> {
    for (n, entry) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let source = entry.source().clone().unwrap_or_default();
        // sysfs has no owners to be mapped; whoever finds that out is to name this path.
        let refused = IdMaps::of_mount(entry).is_some() && source.starts_with("/sys");
        if !is_bind(entry) || !shows_cgroups(&source) || refused {
            continue;
        }
        let at = aside.join(n.to_string());
        set_aside(&source, &at, 0).map_err(|e| BundleError::Recursive {
            path: source.clone(),
            source: e,
        })?;
        entry.set_source(Some(at));
    }
    Ok(())
}

/// Whether the host's cgroups, which are hidden afterwards, are to be seen in it.
fn shows_cgroups(source: &Path) -> bool {
    source.starts_with("/sys") || Path::new("/sys").starts_with(source)
}

/// What a mount has for good in the eyes of a user namespace's root, whoever binds it: in statfs(2)'s words, in a runtime's,
/// and what says the contrary.
const LOCKED: [(StatVfsMountFlags, &str, &str); 4] = [
    (StatVfsMountFlags::RDONLY, "ro", "rw"),
    (StatVfsMountFlags::NOSUID, "nosuid", "suid"),
    (StatVfsMountFlags::NODEV, "nodev", "dev"),
    (StatVfsMountFlags::NOEXEC, "noexec", "exec"),
];

/// Says of bind mounts what their sources are, which a runtime in a user namespace could not take from them: those that
/// remount what they have bound, with the options that they are told and no others, are refused that (runc before 1.2).
///
/// # Errors
/// [`BundleError::Recursive`].
pub fn keep_locked(spec: &mut Spec) -> Result<(), BundleError> {
    for entry in spec.mounts_mut().iter_mut().flatten() {
        if !is_bind(entry) {
            continue;
        }
        let source = entry.source().clone().unwrap_or_default();
        let held = rustix::fs::statvfs(&source).map_err(|e| BundleError::Recursive {
            path: source.clone(),
            source: e.into(),
        })?;
        let options = entry.options().clone().unwrap_or_default();
        entry.set_options(Some(with_locked(options, held.f_flag)));
    }
    Ok(())
}

fn with_locked(mut options: Vec<String>, held: StatVfsMountFlags) -> Vec<String> {
    for (flag, option, contrary) in LOCKED {
        if held.contains(flag) {
            options.retain(|o| o != contrary);
            if !options.iter().any(|o| o == option) {
                options.push(option.to_owned());
            }
        }
    }
    options
}

fn set_aside(source: &Path, at: &Path, attributes: u64) -> io::Result<()> {
    use std::os::fd::AsFd as _;
    let found = tree(source, true)?;
    if attributes != 0 {
        sys::mount_setattr(found.as_fd(), &sys::mount_attr(attributes, 0), true)?;
    }
    make_place(
        Path::new(&format!("/proc/self/fd/{}", found.as_raw_fd())),
        at,
    )?;
    attach(&found, at)
}

/// The options that hold for the tree already hold for the mount itself, too, and runtimes that remount it must say so.
fn point_at(entry: &mut Mount, at: &Path, options: Vec<String>) {
    let mut kept: Vec<String> = Vec::new();
    for option in options {
        let plain = RECURSIVE.iter().find(|(name, ..)| *name == option);
        let option = plain.map_or(option, |(_, plain, _)| (*plain).to_owned());
        if !kept.contains(&option) {
            kept.push(option);
        }
    }
    entry
        .set_source(Some(at.to_owned()))
        .set_options(Some(kept));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known<'a>(create: &'a CreateContainer, user: &'a Resolved) -> Known<'a> {
        Known {
            handler: "crun",
            create,
            user,
            rootfs: Some(Path::new("/b/rootfs")),
            pid_namespace: None,
            oom_score_adj: Some(7),
        }
    }

    fn spec() -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "x"},
            "process": {"cwd": "/", "args": ["a"], "user": {"uid": 0, "gid": 0}},
            "linux": {
                "cgroupsPath": "/a.slice/a-b.slice/slipway-0123.scope",
                "rootfsPropagation": "shared",
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/self/fd/9"}],
            },
        }))
        .unwrap()
    }

    fn user() -> Resolved {
        Resolved {
            uid: 5,
            gid: 6,
            groups: vec![6, 7],
            home: "/home/x".to_owned(),
        }
    }

    #[test]
    fn youki_gets_the_specifications_own_words() {
        let mut spec = spec();
        let process = spec.process().clone().map(|mut p| {
            p.set_no_new_privileges(Some(false));
            p
        });
        spec.set_process(process);
        let (create, user) = (CreateContainer::default(), user());
        complete(&mut spec, &known(&create, &user)).unwrap();
        let word = |spec: &Spec| spec.linux().clone().unwrap().rootfs_propagation().clone();
        assert_eq!(word(&spec).as_deref(), Some("rshared"));
        for_youki(&mut spec, Path::new("/nowhere")).unwrap();
        assert_eq!(word(&spec).as_deref(), Some("shared"));
        assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), None);
    }

    #[test]
    fn a_specification_is_completed() {
        let create = CreateContainer {
            env: vec![b"A=1".to_vec(), b"HOME=".to_vec()],
            systemd: true,
            ..Default::default()
        };
        let (mut spec, user) = (spec(), user());
        let mut known = known(&create, &user);
        known.pid_namespace = Some(Path::new("/proc/3/ns/pid"));
        complete(&mut spec, &known).unwrap();
        let process = spec.process().clone().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (5, 6));
        assert_eq!(
            process.user().additional_gids().as_deref(),
            Some(&[6, 7][..])
        );
        let env = process.env().clone().unwrap();
        assert_eq!(env, ["A=1", "HOME=/home/x"]);
        assert_eq!(process.oom_score_adj(), Some(7));
        let linux = spec.linux().clone().unwrap();
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(Path::new("a-b.slice:slipway:0123"))
        );
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("rshared"));
        let namespaces = linux.namespaces().clone().unwrap();
        assert_eq!(
            namespaces[0].path().as_deref(),
            Some(Path::new("/proc/3/ns/pid"))
        );
        let own = format!("/proc/{}/fd/9", std::process::id());
        assert_eq!(namespaces[1].path().as_deref(), Some(Path::new(&own)));
        assert_eq!(spec.root().clone().unwrap().path(), Path::new("/b/rootfs"));
    }

    #[test]
    fn a_sandbox_is_not_told_what_it_does_not_know() {
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"cwd": "/", "args": ["a"], "user": {"uid": 0, "gid": 0}, "selinuxLabel": "a:b:c:s0",
                "capabilities": {"bounding": ["CAP_BPF", "CAP_CHOWN", "CAP_PERFMON"]}},
            "linux": {"mountLabel": "a:b:c:s0", "cgroupsPath": "/a"},
        }))
        .unwrap();
        for_sandbox(&mut spec, "runsc").unwrap();
        let process = spec.process().clone().unwrap();
        assert_eq!(process.selinux_label(), &None);
        let capabilities = process.capabilities().clone().unwrap();
        assert_eq!(
            capabilities.bounding(),
            &Some([Capability::Chown].into_iter().collect())
        );
        assert_eq!(capabilities.ambient(), &None);
        let linux = spec.linux().clone().unwrap();
        assert_eq!((linux.mount_label(), linux.cgroups_path()), (&None, &None));
        // What would never be done is refused.
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "hooks": {"createRuntime": [{"path": "/a"}], "createContainer": [{"path": "/b"}]},
        }))
        .unwrap();
        let error = for_sandbox(&mut spec, "runsc").unwrap_err().to_string();
        assert!(error.contains("createContainer"), "{error}");
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_by_name() {
        let create = CreateContainer {
            env: vec![b"RAW=\xff".to_vec()],
            ..Default::default()
        };
        let user = user();
        let error = complete(&mut spec(), &known(&create, &user)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("RAW") && text.contains("crun"), "{text}");
    }

    #[test]
    fn scopes() {
        for (path, form) in [
            (
                "/k.slice/k-p.slice/slipway-ab.scope",
                Some("k-p.slice:slipway:ab"),
            ),
            ("/k.slice/cri-x-ab.scope", Some("k.slice:cri-x:ab")),
            ("/slipway-ab.scope", Some("-.slice:slipway:ab")),
            ("/k.slice/ab", None),
            ("/k/slipway-ab.scope", None),
        ] {
            assert_eq!(scope(Path::new(path)).as_deref(), form, "{path}");
        }
    }

    #[test]
    fn what_a_source_has_is_said_of_its_mount() {
        let options = ["rbind", "rw", "noexec", "dev"].map(str::to_owned).to_vec();
        let held =
            StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOEXEC | StatVfsMountFlags::NOSUID;
        let all = with_locked(options, held);
        assert_eq!(all, ["rbind", "noexec", "dev", "ro", "nosuid"]);
    }

    #[test]
    fn what_holds_for_the_tree_is_said_of_the_mount() {
        let mut entry = Mount::default();
        let options = ["rbind", "ro", "rro", "rnodev"].map(str::to_owned).to_vec();
        point_at(&mut entry, Path::new("/aside/1"), options);
        assert_eq!(entry.options().clone().unwrap(), ["rbind", "ro", "nodev"]);
    }
}
