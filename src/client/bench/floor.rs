//! The floor: what the kernel alone needs to start a command in namespaces, cgroups and a root of its own.
//!
//! Measured from the first cgroup directory to the success of `execve`, which is what a pod's start is to
//! the kubelet: directories in every cgroup hierarchy, `clone3` with new mount, UTS, IPC and PID (and
//! network) namespaces, the child's way into the cgroups, an overlay with `/proc`, `pivot_root`, `execve`.
//! The cgroups are entered by the ways that don't wait for an RCU grace period in the kernel, as a write to
//! `cgroup.procs` does for some ms: v2 by `CLONE_INTO_CGROUP`, v1 by the `tasks` file. The same without
//! cgroups is measured beside it. There is no seccomp filter, no capability change, no log and no record:
//! nothing of a runtime.
//!
//! # The unsafe part
//! `clone3` without `CLONE_VM` is a fork. The process that calls it may have threads, so that the child
//! runs on a snapshot in which any lock may be held forever. Invariant: **between `clone3` and
//! `execve` or `_exit` the child makes system calls only, on memory prepared before** — it allocates
//! nothing, takes no lock, unwinds nowhere. [`Child::run`] is all that it does.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

use crate::error::ClientError;

/// From the kernel's `linux/sched.h`; libc's constant has lost its 33rd bit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Steps of the child, by the number it sends when one fails.
const STEPS: [&str; 9] = [
    "entering a cgroup",
    "setting the host name",
    "making mounts private",
    "mounting the overlay",
    "mounting /proc",
    "entering the new root",
    "pivot_root",
    "detaching the old root",
    "execve",
];

/// How the container's root is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    Overlay,
    /// Where the temporary directory can't hold an overlay's upper directory.
    Bind,
}

/// Starts a command over and over.
#[derive(Debug)]
pub struct Floor {
    rootfs: PathBuf,
    command: CString,
    /// Mount points of all cgroup hierarchies, and whether each is v2.
    hierarchies: Vec<(PathBuf, bool)>,
    scratch: PathBuf,
    root: Root,
    starts: u64,
}

fn c_string(bytes: &[u8]) -> Result<CString, ClientError> {
    CString::new(bytes).map_err(|_| ClientError::Usage("a path holds a NUL byte".to_owned()))
}

fn c_path(path: &Path) -> Result<CString, ClientError> {
    c_string(path.as_os_str().as_bytes())
}

fn file_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> ClientError + use<> {
    let path = path.to_owned();
    move |source| ClientError::File {
        what,
        path: path.clone(),
        source,
    }
}

impl Floor {
    /// Prepares starts of `command` in `rootfs`, and tries one.
    ///
    /// # Errors
    /// [`ClientError`] naming the step that the machine doesn't allow.
    pub fn new(rootfs: &Path, command: &str, cgroups: bool) -> Result<Floor, ClientError> {
        let scratch =
            std::env::temp_dir().join(format!("slipway-bench-floor-{}", std::process::id()));
        fs::create_dir_all(&scratch).map_err(file_error("cannot make", &scratch))?;
        let mut floor = Floor {
            rootfs: rootfs.to_owned(),
            command: c_string(command.as_bytes())?,
            hierarchies: if cgroups { hierarchies()? } else { Vec::new() },
            scratch,
            root: Root::Overlay,
            starts: 0,
        };
        if let Err(error) = floor.once(true) {
            if !error.to_string().contains(STEPS[3]) {
                return Err(error);
            }
            eprintln!(
                "slipway: the floor uses a bind mount, because {} fails",
                STEPS[3]
            );
            floor.root = Root::Bind;
            floor.once(true)?;
        }
        Ok(floor)
    }

    /// One start; what it made is removed after the time is taken.
    ///
    /// # Errors
    /// [`ClientError::Helper`] with the step that failed and why.
    pub fn once(&mut self, host_network: bool) -> Result<Duration, ClientError> {
        self.starts += 1;
        let name = format!("slipway-bench-{}-{}", std::process::id(), self.starts);
        let directory = self.scratch.join(&name);
        let cgroups: Vec<(PathBuf, bool)> = self
            .hierarchies
            .iter()
            .map(|(point, v2)| (point.join(&name), *v2))
            .collect();
        let started = self.start(&directory, &cgroups, host_network);
        let result = started.and_then(|(took, pid)| wait_for_success(pid).map(|()| took));
        let mut cleaned = Ok(());
        for (cgroup, _) in &cgroups {
            if let Err(e) = fs::remove_dir(cgroup)
                && e.kind() != io::ErrorKind::NotFound
            {
                cleaned = Err(file_error("cannot remove the cgroup", cgroup)(e));
            }
        }
        if directory.exists() {
            fs::remove_dir_all(&directory).map_err(file_error("cannot remove", &directory))?;
        }
        result.and_then(|took| cleaned.map(|()| took))
    }

    fn start(
        &self,
        directory: &Path,
        cgroups: &[(PathBuf, bool)],
        host_network: bool,
    ) -> Result<(Duration, libc::pid_t), ClientError> {
        // Text is made ready outside of the measured time: a runtime's text is not the kernel's work.
        let text = |path: PathBuf| c_path(&path);
        let tasks = cgroups
            .iter()
            .filter(|(_, v2)| !v2)
            .map(|(cgroup, _)| text(cgroup.join("tasks")))
            .collect::<Result<_, _>>()?;
        let merged = directory.join("merged");
        let path = |leaf: &str| directory.join(leaf).to_string_lossy().into_owned();
        let lower = self.rootfs.to_string_lossy().into_owned();
        let options = format!(
            "lowerdir={lower},upperdir={},workdir={}",
            path("upper"),
            path("work")
        );
        let (reader, writer) = pipe()?;
        let mut flags =
            libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID;
        if !host_network {
            flags |= libc::CLONE_NEWNET;
        }
        let child = Child {
            tasks,
            root: self.root,
            source: c_path(&self.rootfs)?,
            options: c_string(options.as_bytes())?,
            proc: text(merged.join("proc"))?,
            merged: text(merged.clone())?,
            command: self.command.clone(),
            report: writer.as_raw_fd(),
        };

        let began = Instant::now();
        let mut unified = None;
        for (cgroup, v2) in cgroups {
            make_cgroup(cgroup)?;
            if *v2 {
                unified = Some(fs::File::open(cgroup).map_err(file_error("cannot open", cgroup))?);
            }
        }
        fs::create_dir(directory).map_err(file_error("cannot make", directory))?;
        for leaf in ["upper", "work", "merged"] {
            let leaf = directory.join(leaf);
            fs::create_dir(&leaf).map_err(file_error("cannot make", &leaf))?;
        }
        let pid = child.fork(flags as u64, unified.as_ref())?;
        drop(writer);
        // Ends when execve closes the child's end, or holds the failed step and its errno.
        let mut answer = Vec::new();
        let read = fs::File::from(reader).read_to_end(&mut answer);
        let took = began.elapsed();
        match (read, answer.as_slice()) {
            (Ok(_), []) => Ok((took, pid)),
            (Ok(_), [step, errno @ ..]) => {
                let _ = wait_for_success(pid);
                let errno = errno.try_into().map_or(0, i32::from_ne_bytes);
                let step = STEPS
                    .get(usize::from(*step))
                    .copied()
                    .unwrap_or("an unknown step");
                let cause = io::Error::from_raw_os_error(errno);
                Err(ClientError::Helper {
                    what: "floor".to_owned(),
                    message: format!("{step}: {cause}"),
                })
            }
            (Err(source), _) => {
                let _ = wait_for_success(pid);
                Err(ClientError::System {
                    what: "cannot read from the child",
                    source,
                })
            }
        }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// The mount points of all cgroup hierarchies, and whether each is v2.
fn hierarchies() -> Result<Vec<(PathBuf, bool)>, ClientError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(file_error("cannot read", path))?;
    let mut found = Vec::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let kind = right.split(' ').next().unwrap_or_default();
        if let ("cgroup" | "cgroup2", Some(point)) = (kind, left.split(' ').nth(4)) {
            found.push((PathBuf::from(point), kind == "cgroup2"));
        }
    }
    Ok(found)
}

fn make_cgroup(path: &Path) -> Result<(), ClientError> {
    fs::create_dir(path).map_err(file_error("cannot make the cgroup", path))?;
    // A v1 cpuset takes no process before it has CPUs and memory nodes.
    for leaf in ["cpuset.cpus", "cpuset.mems"] {
        let own = path.join(leaf);
        let Ok(value) = fs::read(&own) else {
            return Ok(());
        };
        let parent = path.parent().unwrap_or(path).join(leaf);
        if value.iter().all(u8::is_ascii_whitespace)
            && let Ok(value) = fs::read(parent)
            && !value.is_empty()
        {
            fs::write(&own, value).map_err(file_error("cannot write", &own))?;
        }
    }
    Ok(())
}

fn pipe() -> Result<(OwnedFd, OwnedFd), ClientError> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| ClientError::System {
        what: "cannot make a pipe",
        source: e.into(),
    })
}

fn wait_for_success(pid: libc::pid_t) -> Result<(), ClientError> {
    use nix::sys::wait::{WaitStatus, waitpid};
    let failed = |message: String| ClientError::Helper {
        what: "floor".to_owned(),
        message,
    };
    match waitpid(nix::unistd::Pid::from_raw(pid), None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        Ok(status) => Err(failed(format!("its command ended with {status:?}"))),
        Err(e) => Err(failed(format!("waiting for its command: {e}"))),
    }
}

/// All that the child needs, made before it exists.
struct Child {
    /// The v1 cgroups' files.
    tasks: Vec<CString>,
    root: Root,
    source: CString,
    options: CString,
    merged: CString,
    proc: CString,
    command: CString,
    report: RawFd,
}

impl Child {
    fn fork(&self, flags: u64, cgroup: Option<&fs::File>) -> Result<libc::pid_t, ClientError> {
        let argv = [self.command.as_ptr(), ptr::null()];
        let envp = [c"PATH=/usr/bin:/bin".as_ptr(), ptr::null()];
        // SAFETY: clone_args is plain integers, for which zero is a value.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = flags;
        args.exit_signal = libc::SIGCHLD as u64;
        if let Some(cgroup) = cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: args outlives the call and its size is given. Without CLONE_VM and with no stack named,
        // the child goes on with a copy of this memory, as after fork; the module's invariant covers it.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const args,
                size_of::<libc::clone_args>(),
            )
        };
        match pid {
            // SAFETY: we are the child, and both arrays end with a null pointer.
            0 => unsafe { self.run(&argv, &envp) },
            pid if pid > 0 => Ok(pid as libc::pid_t),
            _ => Err(ClientError::System {
                what: "clone3 failed",
                source: io::Error::last_os_error(),
            }),
        }
    }

    /// # Safety
    /// Only for the child of [`Child::fork`]; `argv` and `envp` end with a null pointer.
    unsafe fn run(&self, argv: &[*const libc::c_char], envp: &[*const libc::c_char]) -> ! {
        // SAFETY: system calls on C strings that live in self, see the module's invariant. libc's thin
        // wrappers neither allocate nor lock.
        unsafe {
            for tasks in &self.tasks {
                let fd = libc::open(tasks.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                // "0" is the writer itself.
                self.check(0, fd >= 0 && libc::write(fd, c"0".as_ptr().cast(), 1) == 1);
                libc::close(fd);
            }
            let name = c"bench";
            self.check(1, libc::sethostname(name.as_ptr(), name.count_bytes()) == 0);
            let private = libc::MS_REC | libc::MS_PRIVATE;
            self.mount(2, None, c"/", None, private, None);
            match self.root {
                Root::Overlay => {
                    let kind = c"overlay";
                    self.mount(
                        3,
                        Some(kind),
                        &self.merged,
                        Some(kind),
                        0,
                        Some(&self.options),
                    );
                }
                Root::Bind => {
                    self.mount(
                        3,
                        Some(&self.source),
                        &self.merged,
                        None,
                        libc::MS_BIND,
                        None,
                    );
                }
            }
            let safe = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            self.mount(4, Some(c"proc"), &self.proc, Some(c"proc"), safe, None);
            self.check(5, libc::chdir(self.merged.as_ptr()) == 0);
            let dot = c".".as_ptr();
            self.check(6, libc::syscall(libc::SYS_pivot_root, dot, dot) == 0);
            self.check(
                7,
                libc::umount2(dot, libc::MNT_DETACH) == 0 && libc::chdir(c"/".as_ptr()) == 0,
            );
            libc::execve(argv[0], argv.as_ptr(), envp.as_ptr());
            self.check(8, false);
            libc::_exit(127)
        }
    }

    /// # Safety
    /// Only for the child.
    unsafe fn mount(
        &self,
        step: u8,
        source: Option<&CStr>,
        target: &CStr,
        kind: Option<&CStr>,
        flags: libc::c_ulong,
        data: Option<&CStr>,
    ) {
        let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
        // SAFETY: all pointers are null or C strings that outlive the call.
        unsafe {
            let (source, kind) = (pointer(source), pointer(kind));
            let result = libc::mount(source, target.as_ptr(), kind, flags, pointer(data).cast());
            self.check(step, result == 0);
        }
    }

    /// Goes on if a step was done; otherwise tells its number and errno, and ends.
    ///
    /// # Safety
    /// Only for the child.
    unsafe fn check(&self, step: u8, done: bool) {
        if done {
            return;
        }
        // SAFETY: errno's address is valid in every thread; the buffer lives on the stack.
        unsafe {
            let errno = (*libc::__errno_location()).to_ne_bytes();
            let answer = [step, errno[0], errno[1], errno[2], errno[3]];
            libc::write(self.report, answer.as_ptr().cast(), answer.len());
            libc::_exit(127)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A root file system that holds one static binary.
    fn rootfs() -> Option<tempfile::TempDir> {
        let busybox = ["/usr/bin/busybox", "/bin/busybox"]
            .into_iter()
            .find(|p| Path::new(p).exists())?;
        let dir = tempfile::tempdir().unwrap();
        for leaf in ["bin", "proc"] {
            fs::create_dir(dir.path().join(leaf)).unwrap();
        }
        fs::copy(busybox, dir.path().join("bin/true")).unwrap();
        fs::set_permissions(
            dir.path().join("bin/true"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        Some(dir)
    }

    #[test]
    fn starts_are_timed_and_leave_nothing() {
        let Some(rootfs) = rootfs() else {
            println!("SKIPPED: no busybox on this machine");
            return;
        };
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: namespaces and cgroups need root");
            return;
        }
        let mut floor = match Floor::new(rootfs.path(), "/bin/true", true) {
            Ok(floor) => floor,
            Err(ClientError::File { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) =>
            {
                println!("SKIPPED: cgroups can't be made here: {source}");
                return;
            }
            Err(error) => panic!("{}", crate::report(&error)),
        };
        for host_network in [true, false] {
            let took = floor.once(host_network).unwrap();
            assert!(
                took > Duration::from_micros(50) && took < Duration::from_secs(10),
                "{took:?}"
            );
        }
        assert_eq!(fs::read_dir(&floor.scratch).unwrap().count(), 0);
        let prefix = format!("slipway-bench-{}-", std::process::id());
        for (hierarchy, _) in &floor.hierarchies {
            for entry in fs::read_dir(hierarchy).unwrap() {
                let name = entry.unwrap().file_name();
                assert!(!name.to_string_lossy().starts_with(&prefix), "{name:?}");
            }
        }
        floor.command = c"/bin/absent".to_owned();
        let text = floor.once(true).unwrap_err().to_string();
        assert!(
            text.contains("execve") && text.contains("No such file"),
            "{text}"
        );
    }
}
