//! Exec sessions: one fork inside the keeper, born in the container's PID namespace and cgroup.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use rustix::pipe::PipeFlags;
use slipway_proto::keeper::{
    Error as WireError, ErrorKind, Exec as ExecCall, ExecResult, response::Result as Answer,
};

use super::container::{Container, not_found};
use super::oci::Driver;
use super::{Keeper, wire_error};
use crate::confine::{Confinement, SETUP_FAILED};
use crate::creator::{is_pipe, report, set_oom_score};
use crate::terminal::Terminal;
use crate::{cgroup, sys};

/// A running exec session.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) connection: u64,
    pub(super) container: String,
    /// Its own cgroup in the v2 hierarchy, if there is one: what makes it killable as a whole.
    pub(super) leaf: Option<PathBuf>,
    /// File with its number in the sandbox that it runs in, where the process here only stands for it.
    pub(super) inner: Option<PathBuf>,
    /// Where the child says that it could not be set up; none of a child that a runtime has made.
    pub(super) setup: Option<OwnedFd>,
    pub(super) deadline: Option<Instant>,
    pub(super) timed_out: bool,
}

impl Exec {
    /// Whether a runtime has started it in a sandbox, which it will tell presently.
    fn begun_inside(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.exists())
    }
}

impl Keeper {
    pub(super) fn exec(&mut self, connection: u64, call: &ExecCall, stdio: Vec<OwnedFd>) {
        if let Err(error) = self.begin_exec(connection, call, stdio) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_exec(
        &mut self,
        connection: u64,
        call: &ExecCall,
        stdio: Vec<OwnedFd>,
    ) -> Result<(), WireError> {
        self.tidy_leaves();
        let id = call.container_id.as_str();
        let failed = |what: &str, e: io::Error| {
            wire_error(
                ErrorKind::Internal,
                format!("can't exec in container {id}: {what}: {e}"),
            )
        };
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        if let Some(runtime) = container.driver.runtime() {
            return self.begin_oci_exec(connection, call, stdio, runtime);
        }
        if matches!(container.driver, Driver::Shim(_)) {
            return self.begin_shim_exec(connection, call, stdio);
        }
        let (Some(init), Some(confinement), true) = (
            &container.pidfd,
            &container.confinement,
            container.is_running(),
        ) else {
            return Err(wire_error(
                ErrorKind::WrongState,
                format!("can't exec in container {id}: it is not running"),
            ));
        };
        complete(call, &stdio)?;
        let (setup, setup_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|e| failed("make a pipe", e.into()))?;
        rustix::fs::fcntl_setfl(&setup, rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| failed("make a pipe", e.into()))?;
        self.next_token += 1;
        let leaf = self
            .cgroups
            .make_leaf(&container.cgroup, &format!("exec-{}", self.next_token))
            .map_err(|e| failed("make a cgroup", e))?;
        let options = sys::CloneOptions {
            cgroup: leaf.as_ref().map(|(_, fd)| std::os::fd::AsFd::as_fd(fd)),
            ..Default::default()
        };

        setns(init, CloneFlags::CLONE_NEWPID).map_err(|e| {
            if let Some((leaf, _)) = &leaf {
                let _ = std::fs::remove_dir(leaf);
            }
            wire_error(
                ErrorKind::WrongState,
                format!("can't exec in container {id}: its PID namespace is gone: {e}"),
            )
        })?;
        let forked = sys::clone_process(&options);
        if matches!(forked, Ok(sys::Forked::Child)) {
            sys::reset_signals();
            let kept = stdio.iter().chain([init, &setup_write]);
            let kept: Vec<_> = kept.map(AsRawFd::as_raw_fd).collect();
            sys::close_all_but(&kept);
            let joined = self.join(container, init, confinement, &stdio);
            if let Err((step, e)) = joined {
                report(
                    setup_write.as_raw_fd(),
                    SETUP_FAILED,
                    &format!("{step}: {e}"),
                );
                sys::exit_now(SETUP_FAILED);
            }
            let error = match call.tty {
                true => confinement.on_terminal().enter(&call.args),
                false => confinement.enter(&call.args),
            };
            // As a shell does it: the caller sees the text on standard error and the code.
            let text = format!("{}\n", error.chain());
            // SAFETY: descriptor 2 is the exec's standard error.
            let stderr = unsafe { std::os::fd::BorrowedFd::borrow_raw(2) };
            let _ = rustix::io::write(stderr, text.as_bytes());
            sys::exit_now(error.exit_code());
        }
        // Children are born in the keeper's own PID namespace again. Without that the next container would
        // start inside this one, so failing is no option: better no keeper than that.
        if let Err(e) = setns(&self.own_pid_namespace, CloneFlags::CLONE_NEWPID) {
            panic!("can't return to the keeper's PID namespace: {e}");
        }
        let leaf = leaf.map(|(path, _)| path);
        let pid = match forked {
            Ok(sys::Forked::Parent(pid)) => pid,
            Ok(sys::Forked::Child) => sys::exit_now(SETUP_FAILED),
            Err(e) => {
                if let Some(leaf) = &leaf {
                    let _ = std::fs::remove_dir(leaf);
                }
                return Err(failed("fork", e));
            }
        };
        let deadline =
            (call.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(call.timeout_ms));
        self.execs.insert(
            pid,
            Exec {
                connection,
                container: id.to_owned(),
                leaf,
                inner: None,
                setup: Some(setup),
                deadline,
                timed_out: false,
            },
        );
        Ok(())
    }

    /// Everything between fork and [`crate::confine::Confinement::enter`]; runs in the child.
    fn join(
        &self,
        container: &Container,
        init: &OwnedFd,
        confinement: &Confinement,
        stdio: &[OwnedFd],
    ) -> Result<(), (&'static str, io::Error)> {
        self.cgroups
            .join_v1(&container.cgroup)
            .map_err(|e| ("join the container's cgroup", e))?;
        confinement.prioritise()?;
        set_oom_score(container.oom_score_adj);
        let uid = confinement.user().uid;
        let ids = container.ids.as_ref();
        let host_uid = ids.map_or(Some(uid), |ids| ids.host_uid(uid));
        let host_uid = host_uid.map(rustix::fs::Uid::from_raw);
        let host_gid = ids.and_then(|ids| ids.host_gid(0));
        let host_gid = host_gid.map(rustix::fs::Gid::from_raw);
        let pipes = || stdio.iter().filter(|_| stdio.len() > 1);
        for fd in pipes() {
            // A process that is not root could not open /dev/stdout otherwise. As the host's root: in a user namespace
            // the pipe is nobody's.
            if is_pipe(fd) {
                let _ = rustix::fs::fchown(fd, host_uid, host_gid);
            }
        }
        let mut namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP;
        if container.ids.is_some() {
            namespaces |= CloneFlags::CLONE_NEWUSER;
            confinement.raise_limits();
        }
        setns(init, namespaces).map_err(|e| ("join the container's namespaces", e.into()))?;
        if container.ids.is_some() {
            // The host's root is nobody in there.
            sys::set_ids(0, 0, &[]).map_err(|e| ("become the pod's root", e))?;
        }
        nix::unistd::setsid().map_err(|e| ("make a session", e.into()))?;
        if let [socket] = stdio {
            Terminal::open(uid)
                .and_then(|terminal| terminal.take(socket.as_fd()))
                .map_err(|e| ("open a terminal in the container", e))?;
        }
        for (fd, to) in pipes().zip(0..) {
            sys::dup_to(fd, to).map_err(|e| ("set up standard streams", e))?;
        }
        sys::cloexec_all();
        Ok(())
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.execs
            .values()
            .chain(self.starting_execs.values())
            .filter(|e| !e.timed_out)
            .filter_map(|e| e.deadline)
            .min()
    }

    /// Kills the execs whose time is up.
    pub(super) fn expire_execs(&mut self) {
        let now = Instant::now();
        let late: Vec<i32> = self
            .execs
            .iter()
            .filter(|(_, e)| !e.timed_out && e.deadline.is_some_and(|d| d <= now))
            .map(|(pid, _)| *pid)
            .collect();
        for pid in late {
            if let Some(exec) = self.execs.get_mut(&pid) {
                exec.timed_out = true;
            }
            self.end_exec(pid);
        }
        for (pid, exec) in &mut self.starting_execs {
            if !exec.timed_out && exec.deadline.is_some_and(|d| d <= now) {
                exec.timed_out = true;
                if !exec.begun_inside() {
                    kill_tree(*pid, exec);
                }
            }
        }
    }

    /// Kills the execs whose caller has gone.
    pub(super) fn abandon_execs(&mut self, connection: u64) {
        let of_it = |(pid, exec): (&i32, &Exec)| (exec.connection == connection).then_some(*pid);
        let running: Vec<i32> = self.execs.iter().filter_map(of_it).collect();
        running.into_iter().for_each(|pid| self.end_exec(pid));
        for (pid, exec) in &self.starting_execs {
            if exec.connection == connection && !exec.begun_inside() {
                kill_tree(*pid, exec);
            }
        }
        // The jobs see it, and end what they run.
        self.shim_execs
            .retain(|_, exec| exec.connection != connection);
    }

    /// Kills a running exec, wherever it runs.
    pub(super) fn end_exec(&mut self, pid: i32) {
        if self.end_inside(pid) {
            return;
        }
        if let Some(exec) = self.execs.get(&pid) {
            kill_tree(pid, exec);
        }
    }

    /// Removes the cgroups of ended execs in which nobody is any more.
    pub(super) fn tidy_leaves(&mut self) {
        self.stale_leaves.retain(|leaf| {
            let removed = std::fs::remove_dir(leaf);
            removed.is_err_and(|e| e.kind() != io::ErrorKind::NotFound)
        });
    }

    pub(super) fn exec_exited(&mut self, pid: i32, code: i32) {
        let Some(exec) = self.execs.remove(&pid) else {
            return;
        };
        if exec.timed_out
            && let Some(leaf) = &exec.leaf
        {
            // What the first kill missed was born between the deadline and now.
            let _ = std::fs::write(leaf.join("cgroup.kill"), "1");
        }
        // While children of the exec live, or are about to die, it can't be removed.
        self.stale_leaves.extend(exec.leaf);
        self.tidy_leaves();
        if let Some(inner) = &exec.inner {
            let _ = std::fs::remove_file(inner);
        }
        if code == 128 + libc::SIGKILL
            && let Some(container) = self.containers.get_mut(&exec.container)
        {
            // One is the exec's own; of a cgroup that is killed as a whole there are more.
            let kills = self.cgroups.oom_kills(&container.cgroup);
            container.oom_kills_of_execs = kills.min(container.oom_kills_of_execs + 1);
        }
        let mut buffer = [0; 1024];
        let told = exec
            .setup
            .as_ref()
            .map(|setup| rustix::io::read(setup, &mut buffer));
        let answer = match told {
            Some(Ok(n)) if n > 1 => Err(wire_error(
                ErrorKind::Internal,
                format!("can't exec: {}", String::from_utf8_lossy(&buffer[1..n])),
            )),
            _ => Ok(Answer::Exec(ExecResult {
                exit_code: code,
                timed_out: exec.timed_out,
            })),
        };
        self.reply(exec.connection, answer);
    }
}

/// Whether a call is one that can be done.
pub(super) fn complete(call: &ExecCall, stdio: &[OwnedFd]) -> Result<(), WireError> {
    if stdio.len() != if call.tty { 1 } else { 3 } {
        return Err(wire_error(
            ErrorKind::Invalid,
            "an exec needs three descriptors (stdin, stdout, stderr), or on a terminal one (a socket)",
        ));
    }
    if call.args.is_empty() {
        return Err(wire_error(ErrorKind::Invalid, "an exec needs a command"));
    }
    Ok(())
}

/// Kills an exec with all that it started, also what left its session or lost its parent.
pub(super) fn kill_tree(pid: i32, exec: &Exec) {
    let killed = exec
        .leaf
        .as_ref()
        .is_some_and(|leaf| std::fs::write(leaf.join("cgroup.kill"), "1").is_ok());
    if killed {
        // A privileged one may have left its cgroup. Last, for it is its end that the caller waits for.
        signal(pid, libc::SIGKILL);
        return;
    }
    kill_tree_of(pid);
}

/// Kills a process and all that it started, as far as that can be told by who is whose parent.
pub(super) fn kill_tree_of(pid: i32) {
    // Without a v2 hierarchy (or before Linux 5.14): the process group and all descendants. Stopped first,
    // so that none forks away while the tree is read.
    let mut seen = Vec::new();
    loop {
        let fresh: Vec<i32> = descendants(pid)
            .into_iter()
            .filter(|p| !seen.contains(p))
            .collect();
        if fresh.is_empty() {
            break;
        }
        for pid in fresh {
            signal(pid, libc::SIGSTOP);
            seen.push(pid);
        }
    }
    signal(-pid, libc::SIGKILL);
    for pid in seen {
        signal(pid, libc::SIGKILL);
    }
}

fn signal(pid: i32, signal: i32) {
    if pid > 0 {
        if let Some(process) = cgroup::pin(pid) {
            cgroup::send(&process, signal);
        }
    } else if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

/// A process and all below it.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(pid) = found.get(at).copied() {
        at += 1;
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        found.extend(
            children
                .split_whitespace()
                .filter_map(|p| p.parse::<i32>().ok()),
        );
    }
    found
}
