//! Restoring a container from a checkpoint, by criu: prepared when the container is created ([`prepare`]), done when it
//! is started ([`run`]). Both run in jobs of the keeper's.
//!
//! criu makes processes as its images say; so what they say is compared with the container's configuration first, and
//! what is more is refused. criu itself runs in the container's cgroup, in the pod's namespaces, and in a mount
//! namespace in which the container's root file system is mounted: what it makes is born there, and whatever is killed
//! when, nothing is left but processes in the container's cgroup.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use slipway_proto::keeper::{CreateContainer, CreateContainerResult, Criu, ErrorKind, Restore};

use crate::cgroup::Hierarchies;
use crate::checkpoint::{DELETED_FILES, DESCRIPTORS, IMAGES, ROOTFS_DIFF};
use crate::confine::Confinement;
use crate::creator::{self, CreateError, Stdio};
use crate::criu::image::{self, Inventory, Process};
use crate::criu::{self, CriuError, rpc};
use crate::ids::IdMaps;
use crate::rootfs;
use crate::writable_layer::apply::{self, ApplyError};
use crate::{image_volume, limits, propagation, scope, terminal, user, wire};

mod mounts;
mod namespaces;
mod privilege;

/// Where the names of terminals begin.
const TERMINALS: &str = "/dev/pts/";
/// criu's log of a restore.
const LOG: &str = "restore.log";
/// The largest list of deleted files, in bytes.
const LARGEST_LIST: u64 = 32 << 20;
/// What criu's images may be called, up to the first `-` or `.`; others are those of namespaces and kernels' tables that a
/// container's restore must not touch.
const IMAGE_NAMES: [&str; 34] = [
    "cgroup",
    "core",
    "cpuinfo",
    "descriptors",
    "fdinfo",
    "fifo",
    "filelocks",
    "files",
    "fs",
    "ghost",
    "ids",
    "inventory",
    "ipcns",
    "memfd",
    "mm",
    "mountpoints",
    "netns",
    "pagemap",
    "pages",
    "pidfd",
    "pipes",
    "pstree",
    "remap",
    "seccomp",
    "sk",
    "stats",
    "tcp",
    "timens",
    "tmpfs",
    "tty",
    "utsns",
    "eventpoll",
    "inotify",
    "signal",
];

/// Why criu's images can't be restored.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// A file is damaged.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// They want what they must not have.
    #[error("{0}")]
    Refused(String),
}

fn refused(reason: impl Into<String>) -> ImagesError {
    ImagesError::Refused(reason.into())
}

/// Why a container can't be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// As for any other container.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// criu's images.
    #[error("the checkpoint can't be restored")]
    Images(#[from] ImagesError),
    /// The writable layer.
    #[error(transparent)]
    Layer(#[from] ApplyError),
    /// What the configuration asks for.
    #[error("a container that is restored from a checkpoint {0}")]
    Configuration(&'static str),
    /// A file of the checkpoint's.
    #[error("can't {action} {}", path.display())]
    File {
        /// The verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A namespace or mount.
    #[error("can't {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// criu.
    #[error(transparent)]
    Criu(#[from] CriuError),
}

impl RestoreError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Create(e) => e.kind(),
            Self::Images(_)
            | Self::Configuration(_)
            | Self::Layer(ApplyError::Archive(_) | ApplyError::Entry { .. }) => ErrorKind::Invalid,
            Self::Layer(ApplyError::Late) | Self::Criu(CriuError::Late { .. }) => {
                ErrorKind::TimedOut
            }
            Self::Criu(CriuError::Start { .. }) => ErrorKind::Unsupported,
            Self::Criu(_) => ErrorKind::WrongState,
            Self::File { .. } | Self::Step { .. } | Self::Layer(ApplyError::File { .. }) => {
                ErrorKind::Internal
            }
        }
    }
}

/// What both parts start from.
pub struct Inherited<'a> {
    /// The call.
    pub create: &'a CreateContainer,
    /// Its part about the checkpoint.
    pub restore: &'a Restore,
    /// The host's cgroups; the container's own exists, unless systemd is to make it.
    pub cgroups: &'a Hierarchies,
    /// The container's cgroup.
    pub cgroup: &'a Path,
    /// The container's ends of its standard streams.
    pub stdio: &'a Stdio,
}

impl Inherited<'_> {
    fn dir(&self) -> &Path {
        Path::new(&self.create.dir)
    }

    fn images(&self) -> PathBuf {
        Path::new(&self.restore.dir).join(IMAGES)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.restore.timeout_ms)
    }

    fn spec(&self) -> Result<Spec, RestoreError> {
        Ok(serde_json::from_slice(&self.create.spec).map_err(CreateError::Spec)?)
    }

    fn bounding(&self, spec: &Spec) -> Result<u64, RestoreError> {
        let nobody = user::Resolved {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: String::new(),
        };
        Ok(creator::confinement(self.create, spec, nobody)?
            .bounds()
            .bounding)
    }

    /// Mounts the root file system and the images that are volumes, in this process's own mount namespace.
    fn mount(&self) -> Result<(PathBuf, OwnedFd), RestoreError> {
        let target = self.dir().join("rootfs");
        fs::create_dir_all(&target).map_err(file("create", &target))?;
        if let Some(overlay) = &self.create.overlay {
            // A mark of volatile overlays, which forbids to mount them again; nothing was lost since.
            let mark = Path::new(&overlay.work).join("work/incompat/volatile");
            match fs::remove_dir_all(&mark) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(file("remove", &mark)(e));
                }
                _ => {}
            }
            rootfs::mount_overlay(overlay, &target, None).map_err(CreateError::from)?;
        }
        image_volume::mount_all(self.create, self.dir(), None).map_err(CreateError::from)?;
        let root = rootfs::open_root(&target).map_err(CreateError::from)?;
        Ok((target, root))
    }
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::File {
        action,
        path,
        source,
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> RestoreError {
    move |source| RestoreError::Step {
        step,
        source: source.into(),
    }
}

/// Checks a checkpoint against the container's configuration, puts the writable layer back and sets the limits. There
/// is no process afterwards.
///
/// # Errors
/// [`RestoreError`].
pub fn prepare(inherited: &Inherited<'_>) -> Result<CreateContainerResult, RestoreError> {
    let Inherited {
        create, restore, ..
    } = inherited;
    let spec = inherited.spec()?;
    check_configuration(create, &spec)?;
    creator::write_private(&inherited.dir().join(creator::SPEC_FILE), &create.spec)?;
    if let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref())
        && !create.systemd
    {
        limits::apply(inherited.cgroups, inherited.cgroup, resources).map_err(CreateError::from)?;
    }
    let images = inherited.images();
    check_terminal(create, &read_descriptors(&images.join(DESCRIPTORS))?)?;
    let inventory: Inventory =
        image::read_one(&images.join("inventory.img")).map_err(ImagesError::from)?;
    let processes: Vec<Process> =
        image::read(&images.join("pstree.img")).map_err(ImagesError::from)?;
    namespaces::set(&images, &inventory, &processes)?;
    check_names(&images)?;

    own_mounts()?;
    let (_, root) = inherited.mount()?;
    let deadline = inherited.deadline();
    let dir = Path::new(&restore.dir);
    apply::remove_all(&root, &deleted_files(dir)?, deadline)?;
    let diff = dir.join(ROOTFS_DIFF);
    match File::open(&diff) {
        Ok(archive) => apply::unpack(
            &root,
            io::BufReader::with_capacity(256 << 10, archive),
            deadline,
        )?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(file("open", &diff)(e)),
    }
    let user = user::resolve(
        root.as_fd(),
        create.user.as_ref().unwrap_or(&Default::default()),
    )
    .map_err(CreateError::from)?;
    let confinement: Confinement = creator::confinement(create, &spec, user)?;
    let bounds = confinement.bounds();
    privilege::check(&images, &processes, &bounds)?;
    let cgroups = (inherited.cgroups, inherited.cgroup);
    let plan = mounts::plan(&images, &processes, &spec, &root, cgroups, bounds.bounding)?;
    for (place, source) in &plan.places {
        let is_file = |source: &PathBuf| source.metadata().is_ok_and(|found| !found.is_dir());
        let is_file = source.as_ref().is_some_and(is_file);
        apply::make_place(&root, place, is_file)?;
    }
    if !create.working_dir.is_empty() {
        rootfs::make_dir(&root, Path::new(&create.working_dir), None).map_err(CreateError::from)?;
    }
    Ok(confinement.user().created(0))
}

/// Has criu restore the processes. Returns the init's process id; it is this process's child, and the keeper's when this
/// one has ended.
///
/// # Errors
/// [`RestoreError`]; processes may be left in the cgroup.
pub fn run(inherited: &Inherited<'_>) -> Result<i32, RestoreError> {
    let Inherited {
        create,
        restore,
        cgroups,
        cgroup,
        ..
    } = inherited;
    let deadline = inherited.deadline();
    let spec = inherited.spec()?;
    let criu = restore.criu.clone().unwrap_or_default();
    if create.systemd {
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        scope::enter(cgroups, cgroup, &create.id, resources).map_err(CreateError::from)?;
        if let Some(resources) = resources {
            limits::apply(cgroups, cgroup, resources).map_err(CreateError::from)?;
        }
    }
    cgroups
        .join_v1(cgroup)
        .map_err(step("join the container's cgroup"))?;
    join_namespaces(&spec)?;
    own_mounts()?;
    let (target, root) = inherited.mount()?;
    let images = inherited.images();
    let inventory: Inventory =
        image::read_one(&images.join("inventory.img")).map_err(ImagesError::from)?;
    let processes: Vec<Process> =
        image::read(&images.join("pstree.img")).map_err(ImagesError::from)?;
    let bounding = inherited.bounding(&spec)?;
    let plan = mounts::plan(
        &images,
        &processes,
        &spec,
        &root,
        (cgroups, cgroup),
        bounding,
    )?;
    drop(root);

    let plan = staged(plan, &inherited.dir().join("restore"))?;
    let streams = Streams::new(inherited.stdio, &images.join(DESCRIPTORS))?;
    let pid = ask(
        &criu,
        &plan,
        &target,
        inherited,
        &inventory,
        &streams,
        lsm(create, &spec)?,
        deadline,
    )?;
    // criu gives them what they had; another pod's is another.
    for pid in cgroups.pids(cgroup) {
        if pid != std::process::id().cast_signed() {
            let _ = fs::write(
                format!("/proc/{pid}/oom_score_adj"),
                create.oom_score_adj.to_string(),
            );
        }
    }
    Ok(pid)
}

fn lsm(create: &CreateContainer, spec: &Spec) -> Result<Option<String>, RestoreError> {
    let nobody = user::Resolved {
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        home: String::new(),
    };
    Ok(creator::confinement(create, spec, nobody)?.bounds().lsm)
}

#[allow(clippy::too_many_arguments)] // One call.
fn ask(
    criu: &Criu,
    plan: &mounts::Plan,
    target: &Path,
    inherited: &Inherited<'_>,
    inventory: &Inventory,
    streams: &Streams,
    lsm_profile: Option<String>,
    deadline: Instant,
) -> Result<i32, RestoreError> {
    let open = |path: &Path| {
        File::open(path)
            .map(OwnedFd::from)
            .map_err(file("open", path))
    };
    let create = inherited.create;
    let work = Path::new(&inherited.restore.dir);
    let (images_dir, work_dir) = (open(&inherited.images())?, open(work)?);
    let closed = inventory.tcp_close == Some(true) || !criu.tcp_established;
    let external = plan
        .external
        .iter()
        .map(|(key, path)| format!("mnt[{key}]:{}", path.display()));
    let options = rpc::Options {
        images_dir_fd: images_dir.as_raw_fd(),
        work_dir_fd: Some(work_dir.as_raw_fd()),
        root: Some(target.to_string_lossy().into_owned()),
        ext_unix_sk: Some(true),
        tcp_established: Some(!closed),
        tcp_close: Some(closed),
        file_locks: Some(true),
        log_level: Some(4),
        log_file: Some(LOG.to_owned()),
        // Its terminal comes that way.
        notify_scripts: Some(create.tty),
        manage_cgroups: Some(true),
        manage_cgroups_mode: Some(rpc::CgroupMode::Ignore as i32),
        external: external.collect(),
        // Or else criu would be told how it ended, if that is soon.
        rst_sibling: Some(true),
        inherit_fd: streams.keys(),
        orphan_pts_master: Some(true),
        lsm_profile,
        ..rpc::Options::default()
    };
    let inherit = streams.descriptors();
    let call = criu::Call {
        criu: Path::new(&criu.path),
        kind: rpc::Kind::Restore,
        options: Some(options),
        inherit: &inherit,
        deadline,
        log: Some(work.join(LOG)),
    };
    let done = criu::run(call, |_| {})?;
    streams.hand_over(inherited.stdio, done.terminal.as_ref())?;
    let pid = done.response.restore.map_or(0, |restored| restored.pid);
    match pid {
        1.. => Ok(pid),
        _ => Err(RestoreError::Step {
            step: "learn from criu what it has restored",
            source: io::ErrorKind::InvalidData.into(),
        }),
    }
}

fn check_configuration(create: &CreateContainer, spec: &Spec) -> Result<(), RestoreError> {
    let no = |what| Err(RestoreError::Configuration(what));
    if !create.pid_target.is_empty() || !creator::has_own_pid_namespace(spec) {
        return no("needs a PID namespace of its own: its process ids may be taken in another");
    }
    if IdMaps::of_spec(spec).is_some() {
        return no("can't be in a user namespace");
    }
    let hooks = spec
        .hooks()
        .as_ref()
        .is_some_and(|hooks| *hooks != oci_spec::runtime::Hooks::default());
    if hooks {
        return no("can't have hooks (of CDI devices or NRI plugins): nothing runs them");
    }
    let mapped = |m: &oci_spec::runtime::Mount| IdMaps::of_mount(m).is_some();
    if spec.mounts().iter().flatten().any(mapped) {
        return no("can't have mounts whose owners are mapped");
    }
    Ok(())
}

/// What the checkpoint's standard streams were called.
fn read_descriptors(path: &Path) -> Result<Vec<String>, RestoreError> {
    let text = fs::read(path).map_err(file("read", path))?;
    let names = serde_json::from_slice(&text)
        .map_err(|e| refused(format!("{DESCRIPTORS} is no list of names: {e}")))?;
    Ok(names)
}

fn check_terminal(create: &CreateContainer, names: &[String]) -> Result<(), ImagesError> {
    let had = names.iter().any(|name| name.starts_with(TERMINALS));
    match (had, create.tty) {
        (true, false) => Err(refused(
            "its container had a terminal; restore it with a configuration that has one (tty)",
        )),
        (false, true) => Err(refused(
            "its container had no terminal, or none that was still open; restore it with a configuration that has none \
             (tty)",
        )),
        _ => Ok(()),
    }
}

fn check_names(images: &Path) -> Result<(), RestoreError> {
    for entry in fs::read_dir(images).map_err(file("list", images))? {
        let name = entry.map_err(file("list", images))?.file_name();
        let name = name.to_string_lossy();
        let kind = name.split(['-', '.']).next().unwrap_or_default();
        if !IMAGE_NAMES.contains(&kind) {
            return Err(refused(format!(
                "criu's image {name} can't be restored in a container"
            ))
            .into());
        }
    }
    Ok(())
}

fn deleted_files(dir: &Path) -> Result<Vec<String>, RestoreError> {
    let path = dir.join(DELETED_FILES);
    let text = match fs::metadata(&path) {
        Ok(metadata) if metadata.len() > LARGEST_LIST => {
            return Err(file("read", &path)(io::Error::other("it is too large")));
        }
        Ok(_) => fs::read(&path).map_err(file("read", &path))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(file("read", &path)(e)),
    };
    let list: Option<Vec<String>> = serde_json::from_slice(&text)
        .map_err(|e| refused(format!("{DELETED_FILES} is no list of paths: {e}")))?;
    Ok(list.unwrap_or_default())
}

/// Goes into a mount namespace that nothing gets out of.
fn own_mounts() -> Result<(), RestoreError> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace"))?;
    let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(step("make a mount namespace"))
}

/// Goes into the namespaces that the container shares with its pod, and into a cgroup namespace of its own, if it is to
/// have one. The container's cgroup must have been entered.
fn join_namespaces(spec: &Spec) -> Result<(), RestoreError> {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let mut opened = Vec::new();
    let mut own = CloneFlags::empty();
    for namespace in namespaces.into_iter().flatten() {
        let flag = match namespace.typ() {
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            // criu's to make.
            LinuxNamespaceType::Pid | LinuxNamespaceType::Mount => continue,
            _ => {
                return Err(RestoreError::Configuration(
                    "can't be in a user or time namespace",
                ));
            }
        };
        match namespace.path() {
            Some(path) => opened.push((flag, File::open(path).map_err(file("open", path))?)),
            None => own |= flag,
        }
    }
    for (flag, namespace) in opened {
        nix::sched::setns(namespace, flag).map_err(step("enter the pod's namespaces"))?;
    }
    nix::sched::unshare(own).map_err(step("make the container's namespaces"))
}

/// Binds everything external aside, each shared with nobody yet: what was another mount's slave is made the slave of its
/// source, which has to be one that can have slaves, and the root of a mount. They end with this process.
fn staged(mut plan: mounts::Plan, aside: &Path) -> Result<mounts::Plan, RestoreError> {
    let empty = aside.join("empty");
    for (n, (_, source)) in plan.external.iter_mut().enumerate() {
        let at = aside.join(n.to_string());
        if source.as_os_str().is_empty() {
            fs::create_dir_all(&empty).map_err(file("create", &empty))?;
            source.clone_from(&empty);
        }
        propagation::make_place(source, &at).map_err(file("make a place for", source))?;
        let none: Option<&str> = None;
        mount(Some(&*source), &at, none, MsFlags::MS_BIND, none)
            .and_then(|()| mount(none, &at, none, MsFlags::MS_PRIVATE, none))
            .and_then(|()| mount(none, &at, none, MsFlags::MS_SHARED, none))
            .map_err(|e| file("bind", source)(e.into()))?;
        *source = at;
    }
    Ok(plan)
}

/// Standard streams: what they were called, and what they are now.
struct Streams(Vec<(String, OwnedFd)>);

impl Streams {
    fn new(stdio: &Stdio, descriptors: &Path) -> Result<Self, RestoreError> {
        let Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        } = stdio
        else {
            // criu makes it anew, in the container.
            return Ok(Self(Vec::new()));
        };
        let names = read_descriptors(descriptors)?;
        let dup = |fd: &OwnedFd| fd.try_clone().map_err(step("copy a standard stream"));
        let mut streams = Vec::new();
        let mut known = HashSet::new();
        for (n, name) in names.iter().take(3).enumerate() {
            let inode = name
                .strip_prefix("pipe:[")
                .and_then(|rest| rest.strip_suffix(']'));
            if inode.is_none_or(|inode| inode.parse::<u32>().is_err()) || !known.insert(name) {
                continue;
            }
            let now = match (n, stdin) {
                (0, Some(stdin)) => dup(stdin)?,
                // It was open, and is not to be any more: its end is read.
                (0, None) => crate::descriptor::pipe().map_err(step("make a pipe"))?.0,
                (1, _) => dup(stdout)?,
                _ => dup(stderr)?,
            };
            streams.push((name.clone(), now));
        }
        Ok(Self(streams))
    }

    /// Sends the terminal that criu has made to the keeper.
    fn hand_over(&self, stdio: &Stdio, terminal: Option<&OwnedFd>) -> Result<(), RestoreError> {
        let Stdio::Terminal(socket) = stdio else {
            return Ok(());
        };
        let terminal = terminal
            .ok_or_else(|| refused("none of its processes has the container's terminal open"))?;
        terminal::number(terminal)
            .and_then(|_| wire::send_with_fds(socket, b"t", &[terminal.as_fd()]))
            .map(drop)
            .map_err(step("take over the terminal that criu has made"))
    }

    fn keys(&self) -> Vec<rpc::InheritFd> {
        let key = |(key, fd): &(String, OwnedFd)| rpc::InheritFd {
            key: key.clone(),
            fd: fd.as_raw_fd(),
        };
        self.0.iter().map(key).collect()
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.0.iter().map(|(_, fd)| fd.as_raw_fd()).collect()
    }
}
