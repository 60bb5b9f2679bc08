//! The pod's own namespaces, its shared memory and, for a shared PID namespace, its init.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use slipway_proto::keeper::{SetupSandbox, SetupSandboxResult};

use crate::cgroup::Hierarchies;
use crate::ids::{self, IdMaps};
use crate::scope::{self, ScopeError};
use crate::{loopback, sys};

/// Why a sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A namespace was refused.
    #[error("can't make the pod's {what} namespace")]
    Namespace {
        /// Which.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A user namespace was refused.
    #[error("can't make the pod's user namespace: {hint}")]
    Users {
        /// What to look at.
        hint: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A namespace can't be pinned.
    #[error("can't pin the namespace at {}", path.display())]
    Pin {
        /// The bind mount.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A sysctl was refused by the kernel.
    #[error(
        "can't set the sysctl {name} to {value:?}: check its name and value against this kernel"
    )]
    Sysctl {
        /// Dotted name.
        name: String,
        /// Wanted value.
        value: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The loopback interface stays down.
    #[error(transparent)]
    Loopback(#[from] loopback::LoopbackError),
    /// systemd did not make the pod's slice.
    #[error("can't make the pod's slice")]
    Slice(#[source] ScopeError),
    /// A step of the set-up failed.
    #[error("can't {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Makes what [`SetupSandbox`] asks for except the PID namespace, which needs the others ([`start_init`]). Runs in a forked child: the namespaces
/// stay with the bind mounts when it exits.
///
/// # Errors
/// [`SandboxError`]; what was made until then is removed by [`remove`].
pub fn make(
    setup: &SetupSandbox,
    cgroups: &Hierarchies,
) -> Result<SetupSandboxResult, SandboxError> {
    let step = |step: &'static str| move |source: io::Error| SandboxError::Step { step, source };
    let mut result = SetupSandboxResult::default();
    let users = setup.users.as_ref().map(IdMaps::of_pod);
    let users = users.transpose().map_err(users_refused)?;
    // Without any, containers would run without limits and without a device filter, and nobody would know.
    if !setup.cgroup.is_empty() && cgroups.is_empty() {
        let cause =
            "there is no cgroup file system below /sys/fs/cgroup; mount it, and run slipway check";
        return Err(step("make the pod's cgroup")(io::Error::other(cause)));
    }
    if setup.systemd {
        // What systemd does not know of must not be made in its part of the tree.
        result.made_cgroup =
            scope::make_slice(cgroups, Path::new(&setup.cgroup)).map_err(SandboxError::Slice)?;
    } else if !setup.cgroup.is_empty() {
        result.made_cgroup = cgroups
            .ensure(Path::new(&setup.cgroup))
            .map_err(step("make the pod's cgroup"))?;
    }
    if setup.shm_bytes > 0 && !setup.shm_dir.is_empty() {
        fs::create_dir_all(&setup.shm_dir).map_err(step("make the directory of /dev/shm"))?;
        let mut options = format!("mode=1777,size={}", setup.shm_bytes);
        if let Some(ids) = &users {
            let (uid, gid) = ids.root().map_err(users_refused)?;
            options.push_str(&format!(",uid={uid},gid={gid}"));
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(
            Some("shm"),
            setup.shm_dir.as_str(),
            Some("tmpfs"),
            flags,
            Some(options.as_str()),
        )
        .map_err(|e| step("mount the pod's /dev/shm")(e.into()))?;
    }
    let ns_dir = Path::new(&setup.ns_dir);
    fs::create_dir_all(ns_dir).map_err(step("make the directory of the pod's namespaces"))?;
    match &users {
        Some(ids) => make_owned(setup, ids, ns_dir, &mut result)?,
        None => {
            for (flag, what, path) in wanted(setup, &mut result) {
                unshare(flag).map_err(|e| SandboxError::Namespace {
                    what,
                    source: e.into(),
                })?;
                *path = pin(
                    Path::new(&format!("/proc/self/ns/{what}")),
                    &ns_dir.join(what),
                )?;
            }
        }
    }
    configure(setup)?;
    Ok(result)
}

/// The namespaces that the pod is to have of its own, but for those of users and processes, and where they are put
/// down.
fn wanted<'a>(
    setup: &SetupSandbox,
    result: &'a mut SetupSandboxResult,
) -> impl Iterator<Item = (CloneFlags, &'static str, &'a mut String)> {
    let all = [
        (
            setup.new_network,
            CloneFlags::CLONE_NEWNET,
            "net",
            &mut result.network,
        ),
        (
            setup.new_ipc,
            CloneFlags::CLONE_NEWIPC,
            "ipc",
            &mut result.ipc,
        ),
        (
            setup.new_uts,
            CloneFlags::CLONE_NEWUTS,
            "uts",
            &mut result.uts,
        ),
    ];
    let wanted = all.into_iter().filter(|(wanted, ..)| *wanted);
    wanted.map(|(_, flag, what, path)| (flag, what, path))
}

/// Makes the pod's user namespace and, owned by it, the others, and becomes its root in all of them: so its sysctls
/// and its host name are set by whom they belong to. (The host's root is nobody in there: an IPC namespace's
/// sysctls, for one, are not its to write.)
///
/// One after the other: what is made in a user namespace that has no ids yet, such as a network's files in sysfs,
/// belongs to the host's root for ever.
fn make_owned(
    setup: &SetupSandbox,
    ids: &IdMaps,
    ns_dir: &Path,
    result: &mut SetupSandboxResult,
) -> Result<(), SandboxError> {
    let users = ids::namespace(ids).map_err(users_refused)?;
    let place = PathBuf::from(format!("/proc/self/fd/{}", users.as_raw_fd()));
    result.user = pin(&place, &ns_dir.join("user"))?;
    let names = wanted(setup, &mut SetupSandboxResult::default())
        .map(|(_, what, _)| what)
        .collect();
    // From within, nothing can be mounted outside.
    let outside = Outside::start(ns_dir, names).map_err(users_refused)?;
    nix::sched::setns(users, CloneFlags::CLONE_NEWUSER).map_err(|e| users_refused(e.into()))?;
    sys::set_ids(0, 0, &[]).map_err(users_refused)?;
    for (flag, what, path) in wanted(setup, result) {
        unshare(flag).map_err(|e| SandboxError::Namespace {
            what,
            source: e.into(),
        })?;
        *path = ns_dir.join(what).to_string_lossy().into_owned();
    }
    outside.pin(ns_dir)
}

/// A child that stays in the host's user namespace, and pins this process's namespaces when it is told to.
struct Outside {
    tell: OwnedFd,
    answer: OwnedFd,
    pid: i32,
    names: Vec<&'static str>,
}

impl Outside {
    fn start(ns_dir: &Path, names: Vec<&'static str>) -> io::Result<Self> {
        use rustix::pipe::{PipeFlags, pipe_with};
        let (told, tell) = pipe_with(PipeFlags::CLOEXEC)?;
        let (answer, says) = pipe_with(PipeFlags::CLOEXEC)?;
        let parent = std::process::id().cast_signed();
        match sys::clone_process(&sys::CloneOptions::default())? {
            sys::Forked::Child => {
                drop((tell, answer));
                if sys::die_with(parent).is_err()
                    || !matches!(rustix::io::read(&told, &mut [0]), Ok(1))
                {
                    sys::exit_now(1);
                }
                for (n, what) in (0u8..).zip(&names) {
                    let namespace = PathBuf::from(format!("/proc/{parent}/ns/{what}"));
                    if let Err(SandboxError::Pin { source, .. }) =
                        pin(&namespace, &ns_dir.join(what))
                    {
                        let error = source.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
                        let _ = rustix::io::write(&says, &[&[n], error.as_slice()].concat());
                        sys::exit_now(1);
                    }
                }
                let _ = rustix::io::write(&says, b".");
                sys::exit_now(0)
            }
            sys::Forked::Parent(pid) => Ok(Self {
                tell,
                answer,
                pid,
                names,
            }),
        }
    }

    /// Has the namespaces pinned that this process is in now.
    fn pin(self, ns_dir: &Path) -> Result<(), SandboxError> {
        let failed = |n: usize, source| SandboxError::Pin {
            path: ns_dir.join(self.names.get(n).copied().unwrap_or_default()),
            source,
        };
        let mut answer = Vec::new();
        let asked = rustix::io::write(&self.tell, b".").map_err(io::Error::from);
        let told = asked.and_then(|_| {
            File::from(self.answer.try_clone()?)
                .take(5)
                .read_to_end(&mut answer)
        });
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
        told.map_err(|e| failed(0, e))?;
        match answer.as_slice() {
            [b'.'] => Ok(()),
            [n, error @ ..] => {
                let error = error.try_into().map_or(libc::EIO, i32::from_ne_bytes);
                Err(failed(usize::from(*n), io::Error::from_raw_os_error(error)))
            }
            [] => Err(failed(0, io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn users_refused(source: io::Error) -> SandboxError {
    let hint = match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EUSERS) => {
            "there are as many as user.max_user_namespaces and its kin allow; raise these sysctls"
        }
        Some(libc::EINVAL | libc::ENOSYS) => "this kernel has none; run slipway check",
        Some(libc::EPERM) => {
            "it is not permitted; are all of the host's ids this daemon's to give (/proc/self/uid_map)? \
             Run slipway check"
        }
        _ => "run slipway check",
    };
    SandboxError::Users { hint, source }
}

/// Sets up the namespaces that this process is in by now.
fn configure(setup: &SetupSandbox) -> Result<(), SandboxError> {
    if setup.new_network {
        loopback::bring_loopback_up()?;
    }
    if setup.new_uts && !setup.hostname.is_empty() {
        nix::unistd::sethostname(&setup.hostname).map_err(|e| SandboxError::Step {
            step: "set the pod's host name",
            source: e.into(),
        })?;
    }
    for (name, value) in &setup.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).map_err(|source| SandboxError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

/// Starts the pod's init in a new PID namespace and the pod's other ones, `made`, and pins the former. Runs
/// in the keeper, which is its parent, and returns when the init is confined: before that no container may
/// see it.
///
/// # Errors
/// [`SandboxError`].
pub fn start_init(
    setup: &SetupSandbox,
    made: &SetupSandboxResult,
) -> Result<(i32, String), SandboxError> {
    let refused = |source| SandboxError::Namespace {
        what: "pid",
        source,
    };
    let options = sys::CloneOptions {
        new_namespaces: libc::CLONE_NEWPID as u64,
        ..Default::default()
    };
    let (ready, confined) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| refused(e.into()))?;
    let pid = match made.user.as_str() {
        "" => match sys::clone_process(&options).map_err(refused)? {
            sys::Forked::Child => pod_init(others(made), confined),
            sys::Forked::Parent(pid) => pid,
        },
        users => start_owned(users, &options, made, &confined).map_err(refused)?,
    };
    drop(confined);
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/pid"));
    let pinned = await_init(&ready)
        .map_err(|source| SandboxError::Step {
            step: "confine the pod's init",
            source,
        })
        .and_then(|()| pin(&namespace, &Path::new(&setup.ns_dir).join("pid")));
    match pinned {
        Ok(path) => Ok((pid, path)),
        Err(e) => {
            sys::kill_child(pid);
            Err(e)
        }
    }
}

/// As [`start_init`], with a PID namespace that the pod's user namespace `users` owns: whoever makes it has to be in
/// there, which the keeper can't be. So a child goes, and what it makes becomes the keeper's child.
fn start_owned(
    users: &str,
    options: &sys::CloneOptions<'_>,
    made: &SetupSandboxResult,
    confined: &OwnedFd,
) -> io::Result<i32> {
    let (answer, says) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Child => {
            // From within, their paths lead nowhere.
            let others = others(made);
            let enter = || -> io::Result<(sys::Forked, OwnedFd)> {
                let confined = confined.try_clone()?;
                nix::sched::setns(File::open(users)?, CloneFlags::CLONE_NEWUSER)?;
                sys::set_ids(0, 0, &[])?;
                let forked = sys::clone_process(&sys::CloneOptions {
                    sibling: true,
                    ..*options
                })?;
                Ok((forked, confined))
            };
            let number = match enter() {
                Ok((sys::Forked::Child, confined)) => pod_init(others, confined),
                Ok((sys::Forked::Parent(pid), _)) => pid,
                Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
            };
            let _ = rustix::io::write(&says, &number.to_ne_bytes());
            sys::exit_now(0)
        }
        sys::Forked::Parent(go_between) => {
            drop(says);
            let mut number = [0; 4];
            let told = File::from(answer).read_exact(&mut number);
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(go_between), None);
            told?;
            match i32::from_ne_bytes(number) {
                pid if pid > 0 => Ok(pid),
                error => Err(io::Error::from_raw_os_error(-error)),
            }
        }
    }
}

/// Waits for one byte and the end of the pipe. An init that fails ends, and with it the pipe.
fn await_init(ready: &OwnedFd) -> io::Result<()> {
    let mut told = Vec::new();
    File::from(ready.try_clone()?).read_to_end(&mut told)?;
    match told.as_slice() {
        [_] => Ok(()),
        _ => Err(io::Error::other("it ended early")),
    }
}

fn pin(namespace: &Path, at: &Path) -> Result<String, SandboxError> {
    let failed = |source: io::Error| SandboxError::Pin {
        path: at.to_owned(),
        source,
    };
    File::create(at).map_err(failed)?;
    mount(
        Some(namespace),
        at,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(|e| failed(e.into()))?;
    Ok(at.to_string_lossy().into_owned())
}

/// Takes the bind mounts and the shared memory of a sandbox away. What is not there is no error.
pub fn remove(ns_dir: &Path, shm_dir: Option<&Path>) {
    let names = ["net", "ipc", "uts", "pid", "user"].map(|n| ns_dir.join(n));
    for path in names.iter().map(PathBuf::as_path).chain(shm_dir) {
        // Detached: a process that still has it open does not keep the pod.
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
    for path in &names {
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_dir(ns_dir);
}

/// PID 1 of a pod's shared PID namespace: reaps, and does nothing else.
///
/// Containers in that namespace see it, so it must lead nowhere: it has an empty root file system, no
/// capabilities, no descriptors, no namespace that the pod has not, no system calls but those it waits with,
/// and no way to get any privilege. A container that may trace it gains nothing by that.
fn pod_init(others: io::Result<Vec<(File, CloneFlags)>>, confined: OwnedFd) -> ! {
    sys::reset_signals();
    let code = match others.and_then(|others| confine_pod_init(others, confined)) {
        Ok(_signals) => loop {
            while sys::collect_child().is_some() {}
            sys::wait_for_child_signal();
        },
        Err(_) => 1,
    };
    sys::exit_now(code)
}

/// The pod's namespaces but for those of users and processes, opened.
fn others(made: &SetupSandboxResult) -> io::Result<Vec<(File, CloneFlags)>> {
    let all = [
        (&made.network, CloneFlags::CLONE_NEWNET),
        (&made.ipc, CloneFlags::CLONE_NEWIPC),
        (&made.uts, CloneFlags::CLONE_NEWUTS),
    ];
    let own = all.into_iter().filter(|(path, _)| !path.is_empty());
    own.map(|(path, kind)| Ok((File::open(path)?, kind)))
        .collect()
}

fn confine_pod_init(others: Vec<(File, CloneFlags)>, confined: OwnedFd) -> io::Result<OwnedFd> {
    let kept = others.iter().map(|(file, _)| file.as_raw_fd());
    sys::close_all_but(&kept.chain([confined.as_raw_fd()]).collect::<Vec<_>>());
    nix::unistd::setsid()?;
    let filter = init_filter()?;
    for (namespace, kind) in others {
        nix::sched::setns(namespace, kind)?;
    }
    // Before the root goes: the descriptor is not used, but SIGCHLD gets blocked for sigwait.
    let signals = sys::child_signals()?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // Any directory will do as a mount point: only this namespace sees what is mounted on it.
    mount(
        Some("none"),
        "/proc",
        Some("tmpfs"),
        flags,
        Some("size=0,mode=555"),
    )?;
    nix::unistd::chdir("/proc")?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags,
        None::<&str>,
    )?;
    for fd in 0..3 {
        let _ = nix::unistd::close(fd);
    }
    sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    for set in [
        caps::CapSet::Ambient,
        caps::CapSet::Effective,
        caps::CapSet::Inheritable,
        caps::CapSet::Permitted,
    ] {
        let _ = caps::clear(None, set);
    }
    // SAFETY: PR_SET_NAME reads a NUL-terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"slipway-init".as_ptr()) };
    // After the capabilities went: the kernel forgets the wish with the credentials.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64)?;
    rustix::io::write(&confined, b"1")?;
    slipway_seccomp::load(&filter)?;
    drop(confined);
    Ok(signals)
}

/// Lets nothing pass but what the pod's init waits and ends with, and closes its pipe with.
fn init_filter() -> io::Result<slipway_seccomp::Filter> {
    use oci_spec::runtime::{LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder};
    let calls = [
        "wait4",
        "rt_sigtimedwait",
        "rt_sigreturn",
        "restart_syscall",
        "close",
        "exit",
        "exit_group",
    ];
    let allowed = LinuxSyscallBuilder::default()
        .names(calls.map(str::to_owned))
        .action(LinuxSeccompAction::ScmpActAllow)
        .build();
    let profile = allowed.and_then(|allowed| {
        LinuxSeccompBuilder::default()
            .default_action(LinuxSeccompAction::ScmpActErrno)
            .syscalls([allowed])
            .build()
    });
    let profile = profile.map_err(io::Error::other)?;
    slipway_seccomp::compile(&profile, &Default::default()).map_err(io::Error::other)
}
