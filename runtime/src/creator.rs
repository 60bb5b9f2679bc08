//! The creator: a short-lived fork of the keeper that mounts the root file system, resolves the user and
//! calls libcontainer, so that a slow mount or a crash in there never stops the keeper.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use oci_spec::runtime::{
    ContainerState, Hook, LinuxNamespaceType, PosixRlimit, Process, Spec, State, UserBuilder,
};
use slipway_proto::keeper::{CreateContainer, CreateContainerResult, ErrorKind};
use slipway_seccomp::Filter;
use slipway_systemd::SystemdError;

use crate::bundle::{Bundle, Step};
use crate::cgroup::Hierarchies;
use crate::cgroup_view::{CGROUP_ROOT, View};
use crate::confine::{Confinement, SETUP_FAILED, chain};
use crate::detach::Kept;
use crate::hook_output::Complaints;
use crate::hooks::{self, HookError};
use crate::ids::IdMaps;
use crate::image_volume::{self, ImageVolumeError};
use crate::init::{self, Init};
use crate::labels::Label;
use crate::limits::{self, LimitError};
use crate::mapped::{self, MappedError};
use crate::own_dev::OwnDev;
use crate::places::PlaceError;
use crate::rootfs::{self, RootfsError};
use crate::scope::{self, ScopeError};
use crate::terminal::Terminal;
use crate::user::{self, UserError};
use crate::users::Users;
use crate::{cgroup_view, detach, labels, own_dev, places, propagation, stage, sys, volumes};

/// Subdirectory of a container's directory that libcontainer keeps its state in.
pub const LIBCONTAINER_ROOT: &str = "libcontainer";

/// File in a container's directory that holds its OCI spec as the daemon assembled it.
pub const SPEC_FILE: &str = "spec.json";

/// Why a container could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The spec is no OCI runtime spec.
    #[error("the container's OCI spec can't be read")]
    Spec(#[source] serde_json::Error),
    /// The spec lacks something that every container has.
    #[error("the container's OCI spec has no {0}")]
    Incomplete(&'static str),
    /// The seccomp filter is damaged.
    #[error("the container's seccomp filter can't be read")]
    Seccomp(#[source] slipway_seccomp::SeccompError),
    /// A mount namespace of its own was refused.
    #[error("can't make a mount namespace for the container")]
    Namespace(#[source] io::Error),
    /// The root file system.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The user.
    #[error(transparent)]
    User(#[from] UserError),
    /// The bundle can't be written.
    #[error("can't write {}", path.display())]
    Bundle {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The cgroup.
    #[error("can't {step} cgroup {}", cgroup.display())]
    Cgroup {
        /// What was attempted.
        step: &'static str,
        /// The cgroup.
        cgroup: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The image.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// An image as a volume.
    #[error(transparent)]
    ImageVolume(#[from] ImageVolumeError),
    /// The source of a mount over `/dev`.
    #[error("can't open the source of the mount on /dev")]
    OwnDev(#[source] io::Error),
    /// A mount's source.
    #[error("can't set the propagation of a mount")]
    Propagation(#[source] io::Error),
    /// A mount's owners.
    #[error(transparent)]
    Mapped(#[from] MappedError),
    /// What a container in a user namespace is made of.
    #[error("can't put down what the container in its user namespace is made of")]
    Stage(#[source] io::Error),
    /// The scope.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// The limits.
    #[error(transparent)]
    Limits(#[from] LimitError),
    /// libcontainer failed.
    #[error("{0}")]
    Libcontainer(String),
}

impl CreateError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Place(_)
            | Self::User(_)
            | Self::Spec(_)
            | Self::Incomplete(_)
            | Self::Seccomp(_) => ErrorKind::Invalid,
            Self::Rootfs(RootfsError::WorkingDir { .. }) | Self::Limits(_) => ErrorKind::Invalid,
            Self::Mapped(MappedError::NotPossible { .. }) => ErrorKind::Unsupported,
            Self::ImageVolume(ImageVolumeError::SubPath { .. }) => ErrorKind::Invalid,
            // systemd hung, or was not there: another attempt may succeed.
            Self::Scope(ScopeError::Systemd(SystemdError::Timeout { .. })) => ErrorKind::TimedOut,
            _ => ErrorKind::Internal,
        }
    }
}

/// What a container's standard streams are made of.
pub enum Stdio {
    /// The read end of its input, if that stays open, and the write ends of its outputs.
    Pipes {
        /// Read end.
        stdin: Option<OwnedFd>,
        /// Write end.
        stdout: OwnedFd,
        /// Write end.
        stderr: OwnedFd,
    },
    /// A terminal, whose master end goes through this socket.
    Terminal(OwnedFd),
}

impl Stdio {
    /// The descriptors that the creator must not close.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match self {
            Self::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                let all = stdin.iter().chain([stdout, stderr]);
                all.map(AsRawFd::as_raw_fd).collect()
            }
            Self::Terminal(socket) => vec![socket.as_raw_fd()],
        }
    }
}

/// What the creator takes over from the keeper.
pub struct Inherited<'a> {
    /// The call.
    pub create: &'a CreateContainer,
    /// The directory below which all pods' run directories are.
    pub run_root: &'a Path,
    /// The host's cgroups; the container's own exists, and in v2 the creator was born in it, unless systemd
    /// is to make it.
    pub cgroups: &'a Hierarchies,
    /// The container's cgroup.
    pub cgroup: &'a Path,
    /// The container's standard streams.
    pub stdio: Stdio,
    /// Where the init says that it could not execute its command; closed by a successful execve.
    pub start_pipe: BorrowedFd<'a>,
    /// Path of the PID namespace to join instead of the spec's (mode TARGET).
    pub pid_namespace: Option<PathBuf>,
    /// Set for a container of the OCI command line; then the call has no overlay and no user.
    pub bundle: Option<&'a Bundle>,
}

/// Creates the container. Runs in the creator process.
///
/// # Errors
/// [`CreateError`].
pub fn create(inherited: Inherited<'_>) -> Result<CreateContainerResult, CreateError> {
    let Inherited {
        create,
        run_root,
        cgroups,
        cgroup,
        stdio,
        start_pipe,
        mut pid_namespace,
        bundle,
    } = inherited;
    let mut spec: Spec = serde_json::from_slice(&create.spec).map_err(CreateError::Spec)?;
    let dir = Path::new(&create.dir);
    let target = bundle.map_or_else(|| dir.join("rootfs"), |b| b.rootfs.clone());
    // As it was asked for, for people to look at; what libcontainer gets says less.
    write_private(&dir.join(SPEC_FILE), &create.spec)?;
    hooks::leave_poststop(&spec, &create.id, dir).map_err(|source| CreateError::Bundle {
        path: dir.to_owned(),
        source,
    })?;
    let in_cgroup = |step| {
        move |source| CreateError::Cgroup {
            step,
            cgroup: cgroup.to_owned(),
            source,
        }
    };
    if create.systemd {
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        scope::enter(cgroups, cgroup, &create.id, resources)?;
    }
    if let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) {
        limits::apply(cgroups, cgroup, resources)?;
    }
    cgroups.join_v1(cgroup).map_err(in_cgroup("join"))?;

    // The container's own copy of the mount table: its root file system is mounted nowhere else, and goes
    // when the last process that sees it goes.
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|e| CreateError::Namespace(e.into()))?;
    let mut kept = match bundle {
        Some(_) => Kept::default(),
        None => detach::run_root(&mut spec, run_root, &dir.join("kept"))
            .map_err(CreateError::Namespace)?,
    };
    let users = match IdMaps::of_spec(&spec) {
        None => None,
        Some(ids) => {
            let target = pid_namespace.take();
            Some(Users::prepare(&mut spec, ids, &mut kept, target)?)
        }
    };
    let owner = users.as_ref().map(|users| users.root);
    fs::create_dir_all(&target).map_err(|source| CreateError::Bundle {
        path: target.clone(),
        source,
    })?;
    if let Some(overlay) = &create.overlay {
        let users = users.as_ref().map(|u| (u.namespace.as_fd(), u.root));
        rootfs::mount_overlay(overlay, &target, users)?;
    }
    let namespace = users.as_ref().map(|users| users.namespace.as_fd());
    image_volume::mount_all(create, dir, namespace)?;
    let root = rootfs::open_root(&target)?;
    let user = match bundle {
        Some(bundle) => bundle.user.clone(),
        None => user::resolve(
            root.as_fd(),
            create.user.as_ref().unwrap_or(&Default::default()),
        )?,
    };
    let user_uid = user.uid;
    if let Some(users) = &users {
        users.ids.check(&user)?;
        if bundle.is_none() {
            users.own_pod_files(&spec, dir)?;
        }
    }
    if !create.working_dir.is_empty() {
        rootfs::make_dir(&root, Path::new(&create.working_dir), owner)?;
    }
    volumes::arrange(&root, &target, &create.volumes, &mut spec, owner)?;
    places::secure(&root, &mut spec, owner)?;
    drop(root);

    let mut confinement = confinement(create, &spec, user)?;
    if let Some(line) = bundle.and_then(|b| b.listener.as_ref()) {
        let line = line.try_clone().map_err(|source| CreateError::Bundle {
            path: PathBuf::from("a socket"),
            source,
        })?;
        confinement = confinement.with_listener(line);
    }
    // A process that is not root could not open /dev/stdout otherwise: that opens the pipe's inode anew.
    let host_uid = rustix::fs::Uid::from_raw(user_uid);
    if let Stdio::Pipes {
        stdin,
        stdout,
        stderr,
    } = &stdio
    {
        // A bundle's streams are its caller's, and may be files.
        let ours = |fd: &&OwnedFd| bundle.is_none() || is_pipe(fd);
        for pipe in stdin.iter().chain([stdout, stderr]).filter(ours) {
            match &users {
                Some(users) => users.ids.own_pipe(pipe, user_uid),
                // The group is root's.
                None => {
                    let _ = rustix::fs::fchown(pipe, Some(host_uid), None);
                }
            }
        }
    }
    set_oom_score(create.oom_score_adj);

    let args = process_args(&spec)?;
    let hooked = spec.hooks().is_some();
    let start_hooks = StartHooks::take(&mut spec, create, dir);
    for_libcontainer(&mut spec, &target, pid_namespace.as_deref())?;
    let label = labels::take(&mut spec);
    let pod = users.as_ref().map(|u| (&u.ids, u.namespace.as_fd()));
    mapped::arrange(&mut spec, &dir.join("mapped"), pod)?;
    let own_dev = own_dev::take(&mut spec).map_err(CreateError::OwnDev)?;
    let view = cgroup_view::take(&mut spec, cgroups, cgroup)
        .map_err(in_cgroup("prepare the container's view of"))?;
    let propagation =
        propagation::arrange(&mut spec, &dir.join("mounts")).map_err(CreateError::Propagation)?;
    if users.is_some() {
        stage::set(&mut spec, &target, Path::new(CGROUP_ROOT), None).map_err(CreateError::Stage)?;
        // In there nobody may.
        confinement.raise_limits();
    }
    if hooked {
        // They look for it in their bundle.
        write_spec(&dir.join("config.json"), &spec)?;
    }

    let null = |write: bool| {
        let opened = File::options().read(!write).write(write).open("/dev/null");
        opened
            .map(OwnedFd::from)
            .map_err(|source| CreateError::Bundle {
                path: PathBuf::from("/dev/null"),
                source,
            })
    };
    let (terminal, stdin, stdout, stderr) = match stdio {
        Stdio::Pipes {
            stdin: Some(stdin),
            stdout,
            stderr,
        } => (None, stdin, stdout, stderr),
        Stdio::Pipes {
            stdin: None,
            stdout,
            stderr,
        } => (None, null(false)?, stdout, stderr),
        // The init opens its terminal when it is in its root.
        Stdio::Terminal(socket) => (
            Some(Rc::new(socket)),
            null(false)?,
            null(true)?,
            null(true)?,
        ),
    };
    // What hooks complain of, which would go nowhere otherwise.
    let complaints = spec.hooks().as_ref().and_then(|_| Complaints::collect());
    let (mut stderr, mut own_stderr) = (stderr, None);
    if let Some(shared) = complaints.as_ref().and_then(Complaints::share) {
        own_stderr = Some(Rc::new(std::mem::replace(&mut stderr, shared)));
    }
    let executor = Enter {
        confinement,
        start_hooks,
        own_stderr,
        args,
        propagation,
        view,
        own_dev,
        label,
        working_dir: PathBuf::from(&create.working_dir),
        terminal,
        start_pipe: start_pipe.as_raw_fd(),
        has_process: bundle.is_none_or(|b| b.has_process),
        entered: bundle.map(|b| b.entered.clone()),
        starting: bundle.map(|b| b.starting.clone()),
    };
    let user = executor.confinement.user().clone();
    let failed = |message: String| {
        let said = complaints.as_ref().map(Complaints::text);
        CreateError::Libcontainer(message + &said.unwrap_or_default())
    };
    let root = spec
        .root()
        .as_ref()
        .ok_or(CreateError::Incomplete("root"))?;
    let rootfs = fs::canonicalize(root.path()).map_err(|source| CreateError::Bundle {
        path: root.path().clone(),
        source,
    })?;
    let made = init::make(Init {
        id: &create.id,
        bundle: dir,
        state: dir.join(LIBCONTAINER_ROOT).join(&create.id),
        spec,
        rootfs,
        executor: Box::new(executor),
        stdio: [stdin, stdout, stderr],
        preserve_fds: bundle.map_or(0, |b| b.preserve_fds),
        no_pivot: bundle.is_some_and(|b| b.no_pivot),
    });
    let pid = made.map_err(|e| failed(chain(&e)))?;
    drop(kept);
    Ok(user.created(pid))
}

/// How the container's processes are confined; the keeper needs the same for exec sessions.
///
/// # Errors
/// [`CreateError`] for a spec or filter that can't be read.
pub fn confinement(
    create: &CreateContainer,
    spec: &Spec,
    user: user::Resolved,
) -> Result<Confinement, CreateError> {
    let process = spec
        .process()
        .as_ref()
        .ok_or(CreateError::Incomplete("process"))?;
    let seccomp = match create.seccomp.as_slice() {
        [] => None,
        bytes => Some(Filter::from_bytes(bytes).map_err(CreateError::Seccomp)?),
    };
    let (linux, env) = (spec.linux().as_ref(), create.env.clone());
    Ok(Confinement::new(process, linux, user, env, seccomp))
}

fn process_args(spec: &Spec) -> Result<Vec<Vec<u8>>, CreateError> {
    let process = spec
        .process()
        .as_ref()
        .ok_or(CreateError::Incomplete("process"))?;
    let args = process.args().as_ref().filter(|a| !a.is_empty());
    let args = args.ok_or(CreateError::Incomplete("process.args"))?;
    Ok(args.iter().map(|a| a.clone().into_bytes()).collect())
}

/// Takes out of the spec what [`Confinement`] does instead of libcontainer (see `libcontainer.md` in docs):
/// user, capabilities, no_new_privs, limits, LSM, seccomp.
fn for_libcontainer(
    spec: &mut Spec,
    rootfs: &Path,
    pid_namespace: Option<&Path>,
) -> Result<(), CreateError> {
    let invalid = |e: oci_spec::OciSpecError| CreateError::Libcontainer(chain(&e));
    let mut process: Process = spec
        .process()
        .clone()
        .ok_or(CreateError::Incomplete("process"))?;
    process
        .set_user(
            UserBuilder::default()
                .uid(0u32)
                .gid(0u32)
                .build()
                .map_err(invalid)?,
        )
        .set_capabilities(None)
        .set_no_new_privileges(None)
        .set_rlimits(None::<Vec<PosixRlimit>>)
        .set_oom_score_adj(None)
        // It would want a console socket; terminals are ours.
        .set_terminal(None)
        .set_apparmor_profile(None)
        .set_cwd(PathBuf::from("/"))
        // Never empty: libcontainer would ask the name service, inside the container's root.
        .set_env(Some(vec!["HOME=/".to_owned()]));
    spec.set_process(Some(process));
    if let Some(root) = spec.root_mut() {
        root.set_path(rootfs.to_owned());
    }
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or(CreateError::Incomplete("linux"))?;
    linux.set_seccomp(None);
    // The namespace has them already; it is joined.
    linux.set_uid_mappings(None).set_gid_mappings(None);
    if let Some(path) = pid_namespace
        && let Some(namespaces) = linux.namespaces_mut()
    {
        for namespace in namespaces {
            if namespace.typ() == LinuxNamespaceType::Pid {
                namespace.set_path(Some(path.to_owned()));
            }
        }
    }
    // Set already, see `limits`.
    linux.set_resources(None);
    Ok(())
}

/// Writes a specification.
///
/// # Errors
/// [`CreateError::Bundle`].
pub fn write_spec(path: &Path, spec: &Spec) -> Result<(), CreateError> {
    let bytes = serde_json::to_vec(spec).map_err(|e| CreateError::Bundle {
        path: path.to_owned(),
        source: e.into(),
    })?;
    write_private(path, &bytes)
}

/// Writes a file that only root may read: a spec holds the container's environment.
///
/// # Errors
/// [`CreateError::Bundle`].
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), CreateError> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(path).and_then(|mut f| f.write_all(bytes));
    written.map_err(|source| CreateError::Bundle {
        path: path.to_owned(),
        source,
    })
}

/// Sets this process's OOM score, which its children inherit. Below what is held it needs
/// CAP_SYS_RESOURCE; without that the score stays, as in the peers when they are restricted.
pub fn set_oom_score(wanted: i32) {
    let _ = fs::write("/proc/self/oom_score_adj", wanted.to_string());
}

/// The `startContainer` hooks, which the init runs in the container's root when it may go.
#[derive(Clone)]
struct StartHooks {
    list: Vec<Hook>,
    state: State,
    env: Vec<OsString>,
}

impl StartHooks {
    /// Takes them out of the spec: libcontainer would drop what they complain of, and take their failure for a
    /// start.
    fn take(spec: &mut Spec, create: &CreateContainer, dir: &Path) -> Option<Self> {
        let hooks = spec.hooks_mut().as_mut()?;
        let list = hooks.start_container_mut().take()?;
        #[allow(deprecated)]
        let others = [
            hooks.prestart(),
            hooks.create_runtime(),
            hooks.create_container(),
        ];
        if others
            .iter()
            .all(|list| list.iter().flatten().next().is_none())
        {
            spec.set_hooks(None);
        }
        let env = create.env.iter().cloned().map(OsString::from_vec);
        Some(Self {
            list,
            state: hooks::state(spec, &create.id, dir, ContainerState::Created, 0),
            env: env.collect(),
        })
    }

    fn run(&self) -> Result<(), HookError> {
        let mut state = self.state.clone();
        state.set_pid(Some(std::process::id().cast_signed()));
        let hooks = hooks::Hooks {
            when: "startContainer",
            list: &self.list,
            state: &state,
            env: &self.env,
        };
        hooks.run()
    }
}

/// What the container's init does when StartContainer lets it go.
#[derive(Clone)]
struct Enter {
    confinement: Confinement,
    start_hooks: Option<StartHooks>,
    /// The container's standard error, while that of its hooks is in its place.
    own_stderr: Option<Rc<OwnedFd>>,
    args: Vec<Vec<u8>>,
    /// Of mounts that libcontainer has opened more than they were to be.
    propagation: Vec<(PathBuf, MsFlags)>,
    view: Option<View>,
    own_dev: Option<OwnDev>,
    label: Option<Label>,
    /// To be made if it is missing; empty: none.
    working_dir: PathBuf,
    /// Where the master end of the container's terminal goes, if it has one.
    terminal: Option<Rc<OwnedFd>>,
    start_pipe: RawFd,
    /// There is a command.
    has_process: bool,
    /// What a bundle's init has to do besides.
    entered: Option<Step>,
    starting: Option<Step>,
}

impl Executor for Enter {
    fn exec(&self, _spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(Err(error)) = self.start_hooks.as_ref().map(StartHooks::run) {
            report(self.start_pipe, SETUP_FAILED, &chain(&error));
            sys::exit_now(SETUP_FAILED)
        }
        if let Some(Err(e)) = self.starting.as_ref().map(|step| step()) {
            report(self.start_pipe, SETUP_FAILED, &e.to_string());
            sys::exit_now(SETUP_FAILED);
        }
        let error = match self.confinement.notifies() {
            true => self.confinement.execute(&self.args),
            false => self.confinement.enter(&self.args),
        };
        report(self.start_pipe, error.exit_code(), &error.chain());
        sys::exit_now(error.exit_code())
    }

    /// The last step of the init before it waits for StartContainer: it is in the container's root, and has
    /// all its privileges.
    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        let failed = |step: &'static str| {
            move |e: io::Error| {
                ExecutorValidationError::ArgValidationError(format!("can't {step}: {e}"))
            }
        };
        if let Some(stderr) = &self.own_stderr {
            sys::dup_to(stderr, libc::STDERR_FILENO)
                .map_err(failed("open the container's standard error"))?;
        }
        init::set_propagation(&self.propagation)
            .map_err(failed("set the propagation of a mount"))?;
        let view = self.view.as_ref().map_or(Ok(()), View::show);
        view.map_err(failed("mount the container's view of its cgroups"))?;
        let own_dev = self.own_dev.as_ref().map_or(Ok(()), OwnDev::cover);
        own_dev.map_err(failed("mount the container's /dev"))?;
        let queues = self.label.as_ref().map_or(Ok(()), Label::queues);
        queues.map_err(failed("label the container's message queues"))?;
        if !self.working_dir.as_os_str().is_empty()
            && let Ok(root) = rootfs::open_root(Path::new("/"))
        {
            // In a volume it could not be made before. If it can't be now, entering it says why.
            let _ = rootfs::make_dir(&root, &self.working_dir, None);
        }
        if let Some(socket) = &self.terminal {
            let terminal = Terminal::open(self.confinement.user().uid)
                .map_err(failed("open the container's terminal"))?;
            terminal
                .show_as_console()
                .map_err(failed("mount the container's terminal on /dev/console"))?;
            terminal
                .take(socket.as_fd())
                .map_err(failed("take the container's terminal"))?;
        }
        let Some(entered) = &self.entered else {
            return Ok(());
        };
        // Callers of the command line expect it from create.
        let refused = ExecutorValidationError::ArgValidationError;
        if self.has_process {
            let found = self.confinement.look_for(&self.args);
            found.map_err(|e| refused(e.chain()))?;
        }
        entered().map_err(|e| refused(e.to_string()))?;
        if self.confinement.notifies() {
            let confined = self.confinement.drop_privileges();
            confined.map_err(|e| refused(e.chain()))?;
        }
        Ok(())
    }

    fn setup_envs(
        &self,
        _envs: std::collections::HashMap<String, String>,
    ) -> Result<(), ExecutorSetEnvsError> {
        // The environment is given to execve; this process's own has nothing to do with it.
        Ok(())
    }
}

/// Writes an exit code and a message to a start pipe.
pub fn report(pipe: RawFd, code: i32, message: &str) {
    let mut bytes = vec![code as u8];
    bytes.extend_from_slice(message.as_bytes());
    // SAFETY: the pipe was inherited for this purpose and is open until execve or exit.
    let pipe = unsafe { BorrowedFd::borrow_raw(pipe) };
    let _ = rustix::io::write(pipe, &bytes);
}

/// Whether a descriptor is a pipe's.
pub fn is_pipe(fd: &OwnedFd) -> bool {
    let kind = |mode| rustix::fs::FileType::from_raw_mode(mode);
    rustix::fs::fstat(fd).is_ok_and(|s| kind(s.st_mode) == rustix::fs::FileType::Fifo)
}

/// Lets a container's init go: libcontainer's start protocol, spoken without its `chdir`. `dir` is the container's.
///
/// # Errors
/// What connecting says: nobody listens any more once the init was let go.
pub fn release(dir: &Path, id: &str) -> io::Result<()> {
    let dir = dir.join(LIBCONTAINER_ROOT).join(id);
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
    let dir = rustix::fs::open(
        dir,
        flags | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    // Short whatever the run directory is: sun_path holds 108 bytes.
    let path = format!("/proc/self/fd/{}/notify.sock", dir.as_raw_fd());
    UnixStream::connect(path)?.write_all(b"start container")
}

/// The namespaces that a container's init has to itself, by the spec.
pub fn has_own_pid_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let own: HashSet<_> = namespaces
        .into_iter()
        .flatten()
        .filter(|n| n.path().is_none())
        .map(|n| n.typ())
        .collect();
    own.contains(&LinuxNamespaceType::Pid)
}
