//! What makes a process the container's: user, groups, capabilities, seccomp, limits, and at last execve.
//!
//! A container's init (through libcontainer's `Executor`) and every exec session go through the one
//! [`Confinement::enter`], so that an exec session is confined exactly as the init is.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use caps::{CapSet, Capability};
use libcontainer::capabilities::CapabilityExt;
use oci_spec::runtime::{Capability as OciCapability, Linux, Process};
use slipway_seccomp::Filter;

use crate::listener;
use crate::priorities::Priorities;
use crate::sys;
use crate::user::Resolved;

/// Exit code for a command that does not exist.
pub const NOT_FOUND: i32 = 127;
/// Exit code for a command that can't be executed.
pub const NOT_EXECUTABLE: i32 = 126;
/// Exit code for a process that could not be set up.
pub const SETUP_FAILED: i32 = 128;

/// File system type of procfs.
const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Why a process never became the container's.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A step before execve failed.
    #[error("can't {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The working directory can't be entered.
    #[error("can't enter the working directory {dir}")]
    WorkingDir {
        /// The directory.
        dir: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The command does not exist or can't be executed.
    #[error("can't execute {command}")]
    Execute {
        /// As given.
        command: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl ConfineError {
    /// The exit code that shells and container runtimes give this failure.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Execute { source, .. } if source.raw_os_error() == Some(libc::ENOENT) => {
                NOT_FOUND
            }
            Self::Execute { .. } => NOT_EXECUTABLE,
            _ => SETUP_FAILED,
        }
    }

    /// The failure and its causes in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat their source's text.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// Every capability that is known here, by its number and name.
pub fn capabilities() -> Vec<(u8, String)> {
    let mut all: Vec<_> = caps::all()
        .into_iter()
        .map(|capability| (capability.index(), capability.to_string()))
        .collect();
    all.sort_unstable();
    all
}

/// Asks the kernel for an SELinux label of what is executed next (proc_pid_attr(5)). The file must be procfs's: a
/// container may have put another in its place (CVE-2019-16884).
fn label_next(label: &str) -> io::Result<()> {
    let file = File::options().write(true).open("/proc/self/attr/exec")?;
    if rustix::fs::fstatfs(&file)?.f_type as u64 != PROC_SUPER_MAGIC {
        return Err(io::Error::other(
            "/proc/self/attr/exec is not on a proc file system",
        ));
    }
    (&file).write_all(label.as_bytes())
}

/// How the processes of one container are confined.
#[derive(Debug, Clone)]
pub struct Confinement {
    user: Resolved,
    umask: u32,
    bounding: HashSet<Capability>,
    effective: HashSet<Capability>,
    permitted: HashSet<Capability>,
    inheritable: HashSet<Capability>,
    ambient: HashSet<Capability>,
    no_new_privileges: bool,
    seccomp: Option<Filter>,
    /// Where the listener of a filter that notifies is told of.
    line: Option<Arc<OwnedFd>>,
    rlimits: Vec<(u32, u64, u64)>,
    priorities: Priorities,
    apparmor: Option<String>,
    selinux: Option<String>,
    working_dir: CString,
    env: Vec<CString>,
}

/// See [`Confinement::bounds`]. Capabilities are bits.
#[derive(Debug)]
pub struct Bounds<'a> {
    /// Who it begins as.
    pub user: &'a Resolved,
    /// The bounding set.
    pub bounding: u64,
    /// What can be permitted, effective and ambient.
    pub held: u64,
    /// What can be inheritable.
    pub inheritable: u64,
    /// Whether it must have no_new_privs.
    pub no_new_privileges: bool,
    /// The filter that it must have.
    pub seccomp: Option<&'a Filter>,
    /// `apparmor:PROFILE` or `selinux:LABEL`.
    pub lsm: Option<String>,
}

impl Confinement {
    /// From the process and Linux sections of an OCI spec, the resolved user, the environment as raw bytes and the
    /// compiled seccomp filter. HOME is set from the user when the environment has none.
    pub fn new(
        process: &Process,
        linux: Option<&Linux>,
        user: Resolved,
        env: Vec<Vec<u8>>,
        seccomp: Option<Filter>,
    ) -> Self {
        let set = |list: Option<&HashSet<OciCapability>>| -> HashSet<Capability> {
            list.into_iter()
                .flatten()
                .map(CapabilityExt::to_cap)
                .collect()
        };
        let capabilities = process.capabilities().as_ref();
        let sets =
            |pick: fn(&oci_spec::runtime::LinuxCapabilities) -> &Option<HashSet<OciCapability>>| {
                set(capabilities.and_then(|c| pick(c).as_ref()))
            };
        let mut env: Vec<CString> = env
            .into_iter()
            .filter_map(|e| CString::new(e).ok())
            .collect();
        let has_home = |e: &CString| e.as_bytes().starts_with(b"HOME=") && e.as_bytes().len() > 5;
        if !env.iter().any(has_home) {
            env.retain(|e| !e.as_bytes().starts_with(b"HOME="));
            env.extend(CString::new(format!("HOME={}", user.home)));
        }
        Self {
            umask: process.user().umask().unwrap_or(0o022),
            bounding: sets(|c| c.bounding()),
            effective: sets(|c| c.effective()),
            permitted: sets(|c| c.permitted()),
            inheritable: sets(|c| c.inheritable()),
            ambient: sets(|c| c.ambient()),
            no_new_privileges: process.no_new_privileges() == Some(true),
            seccomp,
            line: None,
            rlimits: process
                .rlimits()
                .iter()
                .flatten()
                .map(|r| (r.typ() as u32, r.soft(), r.hard()))
                .collect(),
            priorities: Priorities::new(process, linux),
            apparmor: process.apparmor_profile().clone().filter(|p| !p.is_empty()),
            selinux: process.selinux_label().clone().filter(|l| !l.is_empty()),
            working_dir: CString::new(process.cwd().as_os_str().as_bytes()).unwrap_or_default(),
            env,
            user,
        }
    }

    /// The same for a process on a terminal, which has to know what kind that is.
    #[must_use]
    pub fn on_terminal(&self) -> Self {
        let mut other = self.clone();
        if !other.env.iter().any(|e| e.as_bytes().starts_with(b"TERM=")) {
            other.env.push(c"TERM=xterm".to_owned());
        }
        other
    }

    /// The same for a process whose filter leaves calls to somebody else: the listener goes to `line`, the process's end
    /// of a [`listener::line`].
    #[must_use]
    pub fn with_listener(mut self, line: OwnedFd) -> Self {
        self.line = Some(Arc::new(line));
        self
    }

    /// Whether the process's filter leaves calls to somebody else. Such a process must be confined before anybody is told
    /// that it is there, so that somebody can be asked.
    pub fn notifies(&self) -> bool {
        self.line.is_some()
    }

    /// The user that the processes run as.
    pub fn user(&self) -> &Resolved {
        &self.user
    }

    /// The most that a process of the container's can have without having got it from somebody else.
    pub fn bounds(&self) -> Bounds<'_> {
        let bits = |set: &HashSet<Capability>| set.iter().fold(0, |all, cap| all | cap.bitmask());
        let bounding = bits(&self.bounding);
        let is_root = self.user.uid == 0;
        // Executing a program gives root all that bounds it, others only what is ambient.
        let held = match is_root {
            true => bounding,
            false => bits(&self.ambient),
        };
        Bounds {
            user: &self.user,
            bounding,
            inheritable: held | bits(&self.inheritable),
            held,
            no_new_privileges: self.no_new_privileges,
            seccomp: self.seccomp.as_ref(),
            lsm: match (&self.apparmor, &self.selinux) {
                (Some(profile), _) => Some(format!("apparmor:{profile}")),
                (None, Some(label)) => Some(format!("selinux:{label}")),
                (None, None) => None,
            },
        }
    }

    /// Raises hard limits as far as is wanted. For a process that is about to enter a user namespace, in which
    /// nobody may.
    pub fn raise_limits(&self) {
        for (resource, _, hard) in &self.rlimits {
            sys::raise_hard_limit(*resource, *hard);
        }
    }

    /// Takes the scheduler, priorities, memory policy and personality that the container's processes have. For an exec
    /// session, in the container's cgroup and not yet in its namespaces; an init gets them from libcontainer.
    ///
    /// # Errors
    /// The step, and what the kernel says.
    pub fn prioritise(&self) -> Result<(), (&'static str, io::Error)> {
        self.priorities.take()
    }

    /// Becomes the container's process and executes `args`, in the container's namespaces and root
    /// already. Returns only on failure, when the process is fit for nothing but exiting.
    pub fn enter(&self, args: &[Vec<u8>]) -> ConfineError {
        match self.drop_privileges() {
            Ok(()) => self.execute(args),
            Err(e) => e,
        }
    }

    /// The first part of [`Confinement::enter`]: all but the execution.
    ///
    /// # Errors
    /// [`ConfineError`].
    pub fn drop_privileges(&self) -> Result<(), ConfineError> {
        let step =
            |step: &'static str| move |source: io::Error| ConfineError::Step { step, source };
        let cap_step = |step: &'static str| {
            move |e: caps::errors::CapsError| ConfineError::Step {
                step,
                source: io::Error::other(e.to_string()),
            }
        };
        sys::reset_signals();
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(self.umask));
        for (resource, soft, hard) in &self.rlimits {
            sys::set_rlimit(*resource, *soft, *hard).map_err(step("set a resource limit"))?;
        }
        if let Some(profile) = &self.apparmor {
            libcontainer::apparmor::apply_profile(profile).map_err(|e| ConfineError::Step {
                step: "apply the AppArmor profile",
                source: io::Error::other(chain(&e)),
            })?;
        }
        if let Some(label) = &self.selinux {
            label_next(label).map_err(step("set the SELinux label"))?;
        }
        // As root first: the user may not be able to pass a parent directory; as the user below where root
        // is the one who may not (a root-squashing NFS).
        let entered = self.enter_working_dir();

        // What is bounded away can't come back through a set-uid program; needs CAP_SETPCAP, so it is first.
        for cap in caps::read(None, CapSet::Bounding).map_err(cap_step("read the capabilities"))? {
            if !self.bounding.contains(&cap) {
                caps::drop(None, CapSet::Bounding, cap)
                    .map_err(cap_step("drop a capability from the bounding set"))?;
            }
        }
        sys::prctl(libc::PR_SET_KEEPCAPS, 1).map_err(step("keep capabilities"))?;
        sys::set_ids(self.user.uid, self.user.gid, &self.user.groups)
            .map_err(step("set user and groups"))?;
        sys::prctl(libc::PR_SET_KEEPCAPS, 0).map_err(step("keep capabilities"))?;
        // A change of the user id cleared the effective set; the rest of the way needs it.
        let held =
            caps::read(None, CapSet::Permitted).map_err(cap_step("read the capabilities"))?;
        caps::set(None, CapSet::Effective, &held).map_err(cap_step("raise capabilities"))?;
        if entered.is_err() {
            self.enter_working_dir()?;
        }
        let ours = |wanted: &HashSet<Capability>| wanted.intersection(&held).copied().collect();
        let inheritable: HashSet<_> = ours(&self.inheritable);
        caps::set(None, CapSet::Inheritable, &inheritable)
            .map_err(cap_step("set the inheritable capabilities"))?;
        // Kernels from before ambient capabilities have no set to clear.
        let _ = caps::clear(None, CapSet::Ambient);
        for cap in ours(&self.ambient).intersection(&inheritable) {
            caps::raise(None, CapSet::Ambient, *cap)
                .map_err(cap_step("set the ambient capabilities"))?;
        }
        if self.no_new_privileges {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(step("set no_new_privs"))?;
        }
        // While CAP_SYS_ADMIN is still held: without no_new_privs the kernel demands it. What follows are
        // three calls that every useful profile allows: capset twice, and execve.
        if let Some(filter) = &self.seccomp {
            match &self.line {
                None => slipway_seccomp::load(filter).map_err(step("load the seccomp filter"))?,
                Some(line) => {
                    let listener = slipway_seccomp::load_with_listener(filter)
                        .map_err(step("load the seccomp filter"))?;
                    listener::hand_over(line, &listener)
                        .map_err(step("hand over the listener of its seccomp filter"))?;
                }
            }
        }
        let effective: HashSet<_> = ours(&self.effective);
        let permitted: HashSet<_> = ours(&self.permitted);
        caps::set(None, CapSet::Effective, &effective)
            .map_err(cap_step("set the effective capabilities"))?;
        caps::set(None, CapSet::Permitted, &permitted)
            .map_err(cap_step("set the permitted capabilities"))?;
        Ok(())
    }

    fn enter_working_dir(&self) -> Result<(), ConfineError> {
        let dir = || String::from_utf8_lossy(self.working_dir.as_bytes()).into_owned();
        let failed = |source| ConfineError::WorkingDir { dir: dir(), source };
        rustix::process::chdir(self.working_dir.as_c_str()).map_err(|e| failed(e.into()))?;
        // A directory outside the root (reached through a leaked descriptor, CVE-2024-21626) has no path.
        let here = rustix::process::getcwd(Vec::new()).map_err(|e| failed(e.into()))?;
        if !here.as_bytes().starts_with(b"/") {
            return Err(failed(io::Error::other(
                "it is outside the container's root",
            )));
        }
        Ok(())
    }

    /// Looks for the command as [`Confinement::enter`] will, from within the container's root: so that one that is not
    /// there is told of before anything waits for it. Whether this user may execute it shows only then.
    ///
    /// # Errors
    /// [`ConfineError::Execute`].
    pub fn look_for(&self, args: &[Vec<u8>]) -> Result<(), ConfineError> {
        let command = args.first().map_or(&b""[..], Vec::as_slice);
        let missing = |place: &str, number| ConfineError::Execute {
            command: format!("{:?}{place}", String::from_utf8_lossy(command)),
            source: io::Error::from_raw_os_error(number),
        };
        let dir = Path::new(OsStr::from_bytes(self.working_dir.as_bytes()));
        let look = |candidate: &Path| match std::fs::metadata(dir.join(candidate)) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => Ok(()),
            Ok(_) => Err(libc::EACCES),
            Err(e) => Err(e.raw_os_error().unwrap_or(libc::ENOENT)),
        };
        if command.contains(&b'/') {
            let found = look(Path::new(OsStr::from_bytes(command)));
            return found.map_err(|number| missing("", number));
        }
        let mut denied = false;
        for place in self.path().split(|b| *b == b':') {
            let candidate = Path::new(OsStr::from_bytes(place)).join(OsStr::from_bytes(command));
            match look(&candidate) {
                Ok(()) => return Ok(()),
                Err(number) => denied |= number == libc::EACCES,
            }
        }
        Err(match denied {
            true => missing("", libc::EACCES),
            false => missing(", executable file not found in $PATH", libc::ENOENT),
        })
    }

    /// Where commands without a slash are looked for.
    fn path(&self) -> &[u8] {
        self.env
            .iter()
            .find_map(|e| e.as_bytes().strip_prefix(b"PATH="))
            .unwrap_or(b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    }

    /// The second part of [`Confinement::enter`]. As execvp(3) does it, but with the container's PATH, and without handing scripts to a shell.
    pub fn execute(&self, args: &[Vec<u8>]) -> ConfineError {
        let command = args.first().cloned().unwrap_or_default();
        let failed = |source| ConfineError::Execute {
            command: format!("{:?}", String::from_utf8_lossy(&command)),
            source,
        };
        let Ok(argv) = args
            .iter()
            .map(|a| CString::new(a.as_slice()))
            .collect::<Result<Vec<_>, _>>()
        else {
            return failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an argument has a NUL byte",
            ));
        };
        if command.is_empty() {
            return failed(io::Error::from_raw_os_error(libc::ENOENT));
        }
        if command.contains(&b'/') {
            return failed(sys::execve(&argv[0], &argv, &self.env));
        }
        let mut denied = None;
        for dir in self.path().split(|b| *b == b':') {
            let dir = if dir.is_empty() { &b"."[..] } else { dir };
            let candidate = Path::new(OsStr::from_bytes(dir)).join(OsStr::from_bytes(&command));
            let Ok(candidate) = CString::new(candidate.as_os_str().as_bytes()) else {
                continue;
            };
            let error = sys::execve(&candidate, &argv, &self.env);
            match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                Some(libc::EACCES) => denied = Some(error),
                _ => return failed(error),
            }
        }
        // "No such file" alone would leave open where it was looked for.
        denied.map_or_else(
            || ConfineError::Execute {
                command: format!(
                    "{:?}, which is not in the container's PATH",
                    String::from_utf8_lossy(&command)
                ),
                source: io::Error::from_raw_os_error(libc::ENOENT),
            },
            failed,
        )
    }
}
