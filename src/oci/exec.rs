//! Another process in a container that is there: born in its PID namespace and cgroup, confined as its init is.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use liboci_cli::Exec;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use oci_spec::runtime::{Process as OciProcess, Spec};
use rustix::event::{PollFd, PollFlags, poll};
use slipway_runtime::cgroup::Hierarchies;
use slipway_runtime::confine::{Confinement, SETUP_FAILED};
use slipway_runtime::creator::{is_pipe, report, set_oom_score};
use slipway_runtime::ids::IdMaps;
use slipway_runtime::terminal::Terminal;
use slipway_runtime::{descriptor, listener, sys};

use crate::agent::Agent;
use crate::console::Console;
use crate::record::{Container, Status};
use crate::{
    Context, OciError, Result, create, foreground, hooks, namespaces, process_file, shared_mounts,
};

/// Runs a process in a container; unless detached, waits for its end. Returns the exit code.
///
/// # Errors
/// [`OciError`].
pub fn exec(context: &Context, args: &Exec) -> Result<u8> {
    let id = args.container_id.as_str();
    let container = Container::open(context, id)?;
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let status = container.status(&cgroups);
    let possible = match status {
        Status::Created | Status::Running => true,
        Status::Paused => args.ignore_paused,
        Status::Creating | Status::Stopped => false,
    };
    let (Some(init), Some(pid), true) = (
        container.init(),
        container.record.init.map(|init| init.pid),
        possible,
    ) else {
        return Err(OciError::State {
            what: "exec in",
            id: id.to_owned(),
            status,
        });
    };
    let spec = container.spec()?;
    let process = process_file::process(&spec, args)?;
    create::keep_descriptors(context, args.preserve_fds)?;
    let (socket, console) = console(&process, args)?;
    let mut confinement = confinement(&spec, &process, pid)?;
    let mut agent = None;
    if let Some(asked) = Agent::of(&spec)? {
        let (ours, theirs) = listener::line().map_err(OciError::system("make a socket"))?;
        confinement = confinement.with_listener(theirs);
        let state = hooks::state(&container.record, status, Some(pid));
        agent = Some((asked, ours, state));
    }
    let session = Session {
        confinement,
        agent,
        root: match shared_mounts::shared(&spec) {
            true => {
                let root = PathBuf::from(format!("/proc/{pid}/root"));
                let opened = shared_mounts::open_root(&root);
                Some(opened.map_err(OciError::file("open", &root))?)
            }
            false => None,
        },
        args: process
            .args()
            .iter()
            .flatten()
            .map(|a| a.clone().into_bytes())
            .collect(),
        cgroup: cgroup(&container.record.cgroup, args.cgroup.as_deref())?,
        score: create::process_of(&spec)?.oom_score_adj(),
        ids: IdMaps::of_spec(&spec),
        new_keyring: container.record.new_keyring,
        preserve_fds: args.preserve_fds,
        socket,
        init,
        pid,
        process,
    };
    let child = session.start(&cgroups, id)?;
    if let Some(file) = &args.pid_file
        && let Err(error) = create::write_pid(file, child)
    {
        sys::kill_child(child);
        return Err(error);
    }
    if args.detach {
        return Ok(0);
    }
    foreground::stay(child, &foreground::Signals::block()?, console)
}

fn console(process: &OciProcess, args: &Exec) -> Result<(Option<OwnedFd>, Option<Console>)> {
    let refused = |reason: &str| {
        Err(OciError::Argument {
            option: "--console-socket",
            reason: reason.to_owned(),
        })
    };
    match (process.terminal() == Some(true), &args.console_socket) {
        (false, None) => Ok((None, None)),
        (false, Some(_)) => refused("the process has no terminal (--tty, or its terminal)"),
        (true, Some(path)) => Ok((Some(create::connect(path)?), None)),
        (true, None) if args.detach => refused("nobody is there to serve the terminal"),
        (true, None) => {
            let (theirs, console) = Console::new()?;
            Ok((Some(theirs), Some(console)))
        }
    }
}

fn confinement(spec: &Spec, process: &OciProcess, pid: i32) -> Result<Confinement> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let user = create::user_of(process, &root)?;
    let seccomp = match create::seccomp(spec)?.as_slice() {
        [] => None,
        bytes => Some(slipway_seccomp::Filter::from_bytes(bytes).map_err(OciError::Seccomp)?),
    };
    let env = process.env().iter().flatten();
    let env = env.map(|entry| entry.clone().into_bytes()).collect();
    let linux = spec.linux().as_ref();
    Ok(Confinement::new(process, linux, user, env, seccomp))
}

/// The cgroup of an exec: the container's, or one below it.
fn cgroup(own: &Path, below: Option<&str>) -> Result<PathBuf> {
    let below = Path::new(below.unwrap_or("/"));
    let below = below.strip_prefix("/").unwrap_or(below);
    if below
        .components()
        .any(|part| !matches!(part, Component::Normal(_)))
    {
        return Err(OciError::Argument {
            option: "--cgroup",
            reason: format!("{} leads out of the container's", below.display()),
        });
    }
    Ok(match below.as_os_str().is_empty() {
        true => own.to_owned(),
        false => own.join(below),
    })
}

/// All that the child needs.
struct Session {
    confinement: Confinement,
    /// Who decides calls that the seccomp filter leaves open, the socket on which the child tells how, and the container's
    /// state.
    agent: Option<(Agent, OwnedFd, serde_json::Value)>,
    /// The container's root, if its mount namespace leads to another.
    root: Option<OwnedFd>,
    args: Vec<Vec<u8>>,
    cgroup: PathBuf,
    score: Option<i32>,
    ids: Option<IdMaps>,
    new_keyring: bool,
    preserve_fds: i32,
    socket: Option<OwnedFd>,
    init: OwnedFd,
    pid: i32,
    process: OciProcess,
}

impl Session {
    /// Forks the process, and waits until it has become what was asked for. Returns its number.
    fn start(&self, cgroups: &Hierarchies, id: &str) -> Result<i32> {
        let failed = |what: &str, e: &dyn std::fmt::Display| OciError::Exec {
            id: id.to_owned(),
            reason: format!("can't {what}: {e}"),
            code: 255,
        };
        let (setup, setup_write) = descriptor::pipe().map_err(OciError::system("make a pipe"))?;
        if namespaces::differs(self.pid, "pid") {
            // For children only.
            setns(&self.init, CloneFlags::CLONE_NEWPID)
                .map_err(|e| failed("join its PID namespace", &e))?;
        }
        let child = match self
            .fork(cgroups)
            .map_err(|e| failed("fork into its cgroup", &e))?
        {
            sys::Forked::Parent(pid) => pid,
            sys::Forked::Child => self.become_it(cgroups, &setup_write),
        };
        drop(setup_write);
        if let Some((agent, line, state)) = &self.agent
            && asks(line, &setup).map_err(|e| failed("hear from it", &e))?
            && let Err(error) = agent.serve(line, |_| state.clone())
        {
            sys::kill_child(child);
            sys::wait_child(child);
            return Err(error);
        }
        let mut told = Vec::new();
        let heard = File::from(setup).read_to_end(&mut told);
        if let Some((code, reason)) = told.split_first() {
            sys::wait_child(child);
            return Err(OciError::Exec {
                id: id.to_owned(),
                reason: String::from_utf8_lossy(reason).into_owned(),
                code: *code,
            });
        }
        heard.map_err(|e| failed("hear from it", &e))?;
        Ok(child)
    }

    fn fork(&self, cgroups: &Hierarchies) -> io::Result<sys::Forked> {
        let into = |cgroup: &Path| {
            let dir = cgroups.open_v2(cgroup)?;
            sys::clone_process(&sys::CloneOptions {
                cgroup: dir.as_ref().map(|fd| fd.as_fd()),
                ..Default::default()
            })
        };
        match into(&self.cgroup) {
            // The container has made cgroups of its own below it, and nobody can be in it itself any more: where its
            // init is, there is room.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid))?;
                let own = text.lines().find_map(|line| line.strip_prefix("0::"));
                into(Path::new(own.ok_or(e)?))
            }
            other => other,
        }
    }

    fn become_it(&self, cgroups: &Hierarchies, setup: &OwnedFd) -> ! {
        sys::reset_signals();
        if let Err((step, error)) = self.join(cgroups) {
            let text = format!("can't {step}: {error}");
            report(setup.as_raw_fd(), SETUP_FAILED, &text);
            sys::exit_now(SETUP_FAILED);
        }
        let error = self.confinement.enter(&self.args);
        report(setup.as_raw_fd(), error.exit_code(), &error.chain());
        sys::exit_now(error.exit_code())
    }

    fn join(&self, cgroups: &Hierarchies) -> std::result::Result<(), (&'static str, io::Error)> {
        let affinity = self.process.exec_cpu_affinity().as_ref();
        if let Some(cpus) = affinity.and_then(|a| a.initial().as_deref()) {
            set_affinity(cpus).map_err(|e| ("set its initial CPU affinity", e))?;
        }
        cgroups
            .join_v1(&self.cgroup)
            .map_err(|e| ("join the container's cgroup", e))?;
        if let Some(cpus) = affinity.and_then(|a| a.cpu_affinity_final().as_deref()) {
            set_affinity(cpus).map_err(|e| ("set its CPU affinity", e))?;
        }
        self.confinement.prioritise()?;
        if let Some(score) = self.score {
            set_oom_score(score);
        }
        self.own_pipes();
        self.confinement.raise_limits();
        namespaces::enter(self.pid, &self.init)
            .map_err(|e| ("join the container's namespaces", io::Error::other(e)))?;
        if let Some(root) = &self.root {
            shared_mounts::take_root(root).map_err(|e| ("enter the container's root", e))?;
        }
        nix::unistd::setsid().map_err(|e| ("make a session", e.into()))?;
        if self.new_keyring {
            // A kernel without keys has none to hide.
            let _ = sys::new_session_keyring();
        }
        if let Some(socket) = &self.socket {
            Terminal::open(self.confinement.user().uid)
                .and_then(|terminal| terminal.take(socket.as_fd()))
                .map_err(|e| ("open a terminal in the container", e))?;
        }
        let kept = u32::try_from(self.preserve_fds).unwrap_or(0) + create::listen_fds();
        sys::cloexec_from(3 + kept);
        Ok(())
    }

    /// A process that is not root could not open /dev/stdout otherwise.
    fn own_pipes(&self) {
        if self.socket.is_some() {
            return;
        }
        let uid = self.confinement.user().uid;
        let uid = self.ids.as_ref().map_or(Some(uid), |ids| ids.host_uid(uid));
        let uid = uid.map(rustix::fs::Uid::from_raw);
        let streams = [
            io::stdin().as_fd().try_clone_to_owned(),
            io::stdout().as_fd().try_clone_to_owned(),
            io::stderr().as_fd().try_clone_to_owned(),
        ];
        for stream in streams.iter().flatten().filter(|fd| is_pipe(fd)) {
            let _ = rustix::fs::fchown(stream, uid, None);
        }
    }
}

/// Waits until the child asks for its agent, or tells why it does not get that far: then there is none to be asked.
fn asks(line: &OwnedFd, setup: &OwnedFd) -> io::Result<bool> {
    loop {
        let mut fds = [line, setup].map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => return Ok(fds[0].revents().contains(PollFlags::IN)),
        }
    }
}

/// Lets this process run on these CPUs only, given as `0-2,4`.
fn set_affinity(cpus: &str) -> io::Result<()> {
    let invalid = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{cpus:?} is no list of CPUs"),
        )
    };
    let mut set = CpuSet::new();
    for item in cpus
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
    {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| text.parse::<usize>().map_err(|_| invalid());
        for cpu in number(first)?..=number(last)?.min(CpuSet::count()) {
            set.set(cpu).map_err(|_| invalid())?;
        }
    }
    Ok(sched_setaffinity(nix::unistd::Pid::this(), &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_cgroups_are_below_the_containers() {
        let own = Path::new("/a/c");
        assert_eq!(cgroup(own, None).unwrap(), own);
        assert_eq!(cgroup(own, Some("/")).unwrap(), own);
        assert_eq!(cgroup(own, Some("/x/y")).unwrap(), Path::new("/a/c/x/y"));
        for bad in ["..", "/x/../../y"] {
            assert!(cgroup(own, Some(bad)).is_err(), "{bad}");
        }
    }
}
