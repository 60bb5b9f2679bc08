//! Containers of other runtimes in their keeper: what is different about them.
//!
//! The seam is [`Driver`]: where the keeper makes, starts, signals, enters or removes a container, it asks who
//! made it. Everything else (streams, ends, OOM kills, events) is the same for all.

mod sandbox;

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use slipway_proto::keeper::{
    CreateContainer, CreateContainerResult, Empty, Error as WireError, ErrorKind, Exec as ExecCall,
    ExecResult, Phase, RuntimeKind, response::Result as Answer,
};

use super::container::{Container, not_found, write_exit_file};
use super::exec::{Exec, complete};
use super::job::{Origin, Purpose};
use super::shim::ShimContainer;
use super::{Keeper, now_ns, wire_error};
use crate::cgroup::{self, Hierarchies};
use crate::confine::chain;
use crate::creator;
use crate::log::Stream;
use crate::oci::{self, Pod, Removed, Runtime, Session};
use crate::removal::{self, RemovalError};
use crate::scope;

pub(super) use sandbox::OciSandbox;

/// Who makes a container.
pub(super) enum Driver {
    /// The keeper itself, by libcontainer.
    Native,
    /// A command-line runtime.
    Oci(Box<Oci>),
    /// The pod's shim.
    Shim(Box<ShimContainer>),
}

/// What the keeper knows of a container beside its runtime.
pub(super) struct Oci {
    runtime: Runtime,
    /// The cgroup (v2) in which the runtime that creates it was born, if that is not the container's.
    leaf: Option<PathBuf>,
    /// Who waits for StartContainer.
    starting: Option<u64>,
    /// Why its command can't be executed, as the runtime has found.
    cannot_run: Option<String>,
    /// What came from its standard error before it was made: the runtime's own.
    early: Option<Vec<u8>>,
    /// To its attendant, until it is started, of a container in a sandbox.
    control: Option<OwnedFd>,
    /// What its PID namespace is called, in a sandbox.
    pids: PathBuf,
    /// Its sandbox was ended for want of memory.
    oom: bool,
}

impl Driver {
    /// Who is to make a container of this pod.
    pub(super) fn of(create: &CreateContainer, pod: &Pod<'_>) -> Result<Self, WireError> {
        let Some(settings) = &create.runtime else {
            return Ok(Self::Native);
        };
        match settings.kind() {
            RuntimeKind::Native => Ok(Self::Native),
            RuntimeKind::Oci => Ok(Self::Oci(Box::new(Oci {
                runtime: Runtime::new(settings, pod),
                leaf: None,
                starting: None,
                cannot_run: None,
                early: Some(Vec::new()),
                control: None,
                pids: PathBuf::new(),
                oom: false,
            }))),
            RuntimeKind::ShimV2 => Ok(Self::Shim(Box::new(ShimContainer::new()))),
        }
    }

    /// The runtime, if it is another.
    pub(super) fn runtime(&self) -> Option<Runtime> {
        match self {
            Self::Native | Self::Shim(_) => None,
            Self::Oci(oci) => Some(oci.runtime.clone()),
        }
    }

    fn oci(&mut self) -> Option<&mut Oci> {
        match self {
            Self::Native | Self::Shim(_) => None,
            Self::Oci(oci) => Some(oci),
        }
    }

    /// Whether whoever sees it has told of an OOM kill.
    pub(super) fn told_of_oom(&self) -> bool {
        match self {
            Self::Native => false,
            Self::Oci(oci) => oci.oom,
            Self::Shim(own) => own.oom,
        }
    }

    /// Keeps what is known now of a container that was made.
    pub(super) fn made(&mut self, made: &CreateContainerResult) {
        let cannot_run = Some(made.cannot_run.clone()).filter(|text| !text.is_empty());
        match self {
            Self::Native => {}
            Self::Oci(oci) => (oci.cannot_run, oci.early) = (cannot_run, None),
            Self::Shim(own) => own.cannot_run = cannot_run,
        }
    }

    /// Who waits for StartContainer, of a container whose runtime is told to start it.
    fn starting(&mut self) -> Option<&mut Option<u64>> {
        match self {
            Self::Native => None,
            Self::Oci(oci) => Some(&mut oci.starting),
            Self::Shim(own) => Some(&mut own.starting),
        }
    }

    /// Why the command can't be executed, as the runtime has found.
    fn cannot_run(&mut self) -> Option<&mut Option<String>> {
        match self {
            Self::Native => None,
            Self::Oci(oci) => Some(&mut oci.cannot_run),
            Self::Shim(own) => Some(&mut own.cannot_run),
        }
    }

    /// Whether the runtime has found that the command can't be executed, and nobody has been told.
    fn never_runs(&self) -> bool {
        match self {
            Self::Native => false,
            Self::Oci(oci) => oci.cannot_run.is_some(),
            Self::Shim(own) => own.cannot_run.is_some(),
        }
    }
}

impl Container {
    /// The words that a runtime may have said so far; put back after use.
    pub(super) fn take_early(&mut self) -> Option<Vec<u8>> {
        self.driver.oci().and_then(|oci| oci.early.take())
    }

    pub(super) fn put_early(&mut self, early: Option<Vec<u8>>) {
        if let (Some(oci), Some(early)) = (self.driver.oci(), early) {
            oci.early = Some(early);
        }
    }
}

/// Removes a container, whoever made it. Runs in a job.
pub(super) fn remove(
    runtime: Option<&Runtime>,
    cgroups: &Hierarchies,
    container: &Removed<'_>,
    until: Instant,
) -> Result<(), RemovalError> {
    match runtime {
        Some(runtime) => runtime.remove(cgroups, container, until),
        None => {
            let state_dir = container.dir.join(creator::LIBCONTAINER_ROOT);
            removal::remove_container(cgroups, container.cgroup, container.init, &state_dir)
        }
    }
}

impl Keeper {
    /// Where the process is born that has a runtime create a container. On a hybrid host in the container's v2 cgroup:
    /// the runtime does not see that hierarchy, and what it makes inherits it. On pure v2 in a cgroup beside the
    /// keeper's, by which all of a runtime that hangs can be ended: it moves the init by itself, and some take only
    /// cgroups that nobody is in.
    pub(super) fn birthplace(
        &mut self,
        oci: &mut Oci,
        cgroup: &Path,
        systemd: bool,
    ) -> io::Result<Option<OwnedFd>> {
        if let Some(sandbox) = &oci.runtime.sandbox {
            // Its processes are in that one's; its own is for who looks for it there. systemd has no scope for nobody.
            let of_sandbox = sandbox.cgroup.clone();
            if !systemd {
                self.cgroups.ensure(cgroup)?;
            }
            return self.cgroups.open_v2(&of_sandbox);
        }
        if !systemd {
            self.cgroups.ensure(cgroup)?;
        }
        if !self.cgroups.unified() {
            return self.cgroups.open_v2(cgroup);
        }
        let (leaf, fd) = self.runtime_leaf().unzip();
        oci.leaf = leaf;
        Ok(fd)
    }

    /// A cgroup for a runtime's own processes on pure v2, which are not to be charged to a container. Without one they
    /// are ended by their process group alone.
    fn runtime_leaf(&mut self) -> Option<(PathBuf, OwnedFd)> {
        let own = scope::own_cgroup().ok()?;
        self.next_token += 1;
        // Other pods' keepers are in there, too.
        let name = format!("runtime-{}-{}", std::process::id(), self.next_token);
        self.cgroups.make_leaf(&own, &name).ok().flatten()
    }

    /// Ends what a runtime has left in its own cgroup.
    fn drop_leaf(&mut self, leaf: Option<PathBuf>) {
        if let Some(leaf) = leaf {
            let _ = std::fs::write(leaf.join("cgroup.kill"), "1");
            self.stale_leaves.push(leaf);
            self.tidy_leaves();
        }
    }

    /// The answer of the job that had a runtime create a container, with what that said on the container's standard
    /// error, if that is all that it said.
    pub(super) fn with_last_words(
        &mut self,
        id: &str,
        answer: Result<Answer, WireError>,
    ) -> Result<Answer, WireError> {
        let Some(container) = self.containers.get_mut(id) else {
            return answer;
        };
        let Some(oci) = container.driver.oci() else {
            return answer;
        };
        let leaf = oci.leaf.take();
        self.drop_leaf(leaf);
        answer.map_err(|mut error| {
            self.pump_all(id, Stream::Stderr);
            let early = self.containers.get_mut(id).and_then(Container::take_early);
            let early = String::from_utf8_lossy(&early.unwrap_or_default()).into_owned();
            let words = oci::words("", &early);
            let more = oci::beyond(&error.message, &early);
            if let (false, Some(before)) = (
                words.is_empty(),
                error.message.strip_suffix("and said nothing"),
            ) {
                error.message = format!("{before}and said: {words}");
            } else if !more.is_empty() {
                error.message.push_str(&format!("; it wrote: {more}"));
            }
            error
        })
    }

    /// Takes over the terminal of a container that was made, unless there is none for want of an init.
    pub(super) fn take_terminal_of(
        &mut self,
        id: &str,
        made: &CreateContainerResult,
    ) -> io::Result<()> {
        // One that is restored gets it when it is started.
        let restored = self.containers.get(id).is_some_and(|c| c.restore.is_some());
        match made.cannot_run.as_str() {
            "" if !restored => self.take_terminal(id),
            _ => Ok(()),
        }
    }

    pub(super) fn begin_oci_start(&mut self, connection: u64, id: &str) -> Result<(), WireError> {
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        let dir = container.dir.clone();
        let Some(oci) = container.driver.oci() else {
            return Ok(());
        };
        let (runtime, own_id) = (oci.runtime.clone(), id.to_owned());
        if runtime.sandbox.is_some() {
            return self.begin_attended_start(connection, id);
        }
        self.may_start(id)?;
        let cgroups = self.cgroups.clone();
        self.start_in_job(connection, id, &[], move || {
            oci::simple(&runtime, &cgroups, &["start", &own_id], &dir, oci::START).map_err(|e| {
                let kind = match oci::command_failure(e.said()) {
                    Some(_) => ErrorKind::CannotRun,
                    None => e.kind(),
                };
                wire_error(kind, chain(&e))
            })
        })
    }

    /// Refuses to start a container that is being started, or whose runtime has found no command for it.
    pub(super) fn may_start(&mut self, id: &str) -> Result<(), WireError> {
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        if container.driver.starting().is_some_and(|s| s.is_some()) {
            let message = format!("container {id} can't be started: it is being started");
            return Err(wire_error(ErrorKind::WrongState, message));
        }
        if let Some(said) = container.driver.cannot_run().and_then(Option::take) {
            let code = oci::command_failure(&said).unwrap_or(crate::confine::NOT_EXECUTABLE);
            self.never_ran(id, code, &said);
            return Err(wire_error(ErrorKind::CannotRun, said));
        }
        Ok(())
    }

    /// Has a container started by its runtime; [`Keeper::start_done`] hears of it.
    pub(super) fn start_in_job(
        &mut self,
        connection: u64,
        id: &str,
        keep: &[RawFd],
        start: impl FnOnce() -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let waits = |keeper: &mut Self, waiting: Option<u64>| {
            let container = keeper.containers.get_mut(id);
            if let Some(starting) = container.and_then(|c| c.driver.starting()) {
                *starting = waiting;
            }
        };
        waits(self, Some(connection));
        let purpose = Purpose::Start(id.to_owned());
        let origin = Origin {
            keep,
            ..Origin::default()
        };
        let job = self.start_job(purpose, connection, origin, || {
            start().map(|()| Answer::Empty(Empty {}))
        });
        job.map(drop).map_err(|e| {
            waits(self, None);
            wire_error(
                ErrorKind::Internal,
                format!("can't start container {id}: can't fork: {e}"),
            )
        })
    }

    /// A runtime has started a container, or failed to.
    pub(super) fn start_done(&mut self, id: &str, answer: Result<Answer, WireError>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(connection) = container.driver.starting().and_then(Option::take) else {
            return;
        };
        self.shim_started(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        match &answer {
            Ok(_) => self.runs(id),
            Err(error) => container.state.message.clone_from(&error.message),
        }
        self.attendant_answered(id, answer.as_ref().err());
        self.never_ran_by_shim(id, answer.as_ref().err());
        self.reply(connection, answer);
    }

    fn runs(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.state.phase() != Phase::Created {
            return;
        }
        container.state.set_phase(Phase::Running);
        container.state.started_at = now_ns();
        let state = container.state.clone();
        self.publish(&state);
    }

    /// A container that ends while its runtime starts it has run: its end is to be seen after its start.
    pub(super) fn ran_already(&mut self, id: &str) {
        let container = self.containers.get_mut(id);
        let starting = container.and_then(|container| container.driver.starting());
        if starting.is_some_and(|starting| starting.is_some()) {
            self.runs(id);
        }
    }

    /// A container whose command can't be executed has exited without ever running.
    pub(super) fn never_ran(&mut self, id: &str, code: i32, message: &str) {
        if let Some(container) = self.containers.get_mut(id) {
            container.state.cannot_run = true;
            message.clone_into(&mut container.state.message);
        }
        self.exited_without_init(id, code);
    }

    fn exited_without_init(&mut self, id: &str, code: i32) {
        self.drop_io(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.state.set_phase(Phase::Exited);
        container.state.exit_code = code;
        container.state.finished_at = now_ns();
        let state = container.state.clone();
        write_exit_file(&self.pod_dir, &state);
        self.publish(&state);
    }

    /// Nothing ends of a container that has no init; its end must be seen all the same.
    pub(super) fn end_without_init(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let created = container.state.phase() == Phase::Created && !container.is_creating();
        let never = container.driver.never_runs();
        if created && never {
            self.exited_without_init(id, 128 + libc::SIGKILL);
        }
    }

    /// Has the runtime send a signal, which may be more than one to the init: a virtual machine's does not know it. SIGKILL
    /// never waits for a runtime. False when it is to be sent directly.
    pub(super) fn signal_by_runtime(&mut self, connection: u64, id: &str, signal: i32) -> bool {
        let Some(container) = self.containers.get(id) else {
            return false;
        };
        let (Some(runtime), true) = (container.driver.runtime(), container.is_running()) else {
            return false;
        };
        if runtime.sandbox.is_some() {
            return self.signal_inside(connection, id, signal, &runtime);
        }
        if signal == libc::SIGKILL {
            return false;
        }
        let Some(Ok(init)) = container.pidfd.as_ref().map(OwnedFd::try_clone) else {
            return false;
        };
        let (dir, cgroups, id) = (container.dir.clone(), self.cgroups.clone(), id.to_owned());
        let keep = oci::descriptors(std::slice::from_ref(&init));
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Kill, connection, origin, move || {
            let number = signal.to_string();
            let args = ["kill", &id, &number];
            if oci::simple(&runtime, &cgroups, &args, &dir, oci::KILL).is_err() {
                cgroup::send(&init, signal);
            }
            Ok(Answer::Empty(Empty {}))
        });
        job.is_ok()
    }

    /// The container that a command is to be executed in, if that can be done.
    pub(super) fn executes(
        &self,
        call: &ExecCall,
        stdio: &[OwnedFd],
    ) -> Result<&Container, WireError> {
        complete(call, stdio)?;
        let id = &call.container_id;
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        if !container.is_running() {
            let message = format!("can't exec in container {id}: it is not running");
            return Err(wire_error(ErrorKind::WrongState, message));
        }
        Ok(container)
    }

    pub(super) fn begin_oci_exec(
        &mut self,
        connection: u64,
        call: &ExecCall,
        stdio: Vec<OwnedFd>,
        runtime: Runtime,
    ) -> Result<(), WireError> {
        let id = call.container_id.clone();
        let container = self.executes(call, &stdio)?;
        let (dir, cgroup) = (container.dir.clone(), container.cgroup.clone());
        let oom_score_adj = container.oom_score_adj;
        let sandbox = runtime.sandbox.clone();
        let leaf = match (&sandbox, self.cgroups.unified()) {
            (Some(sandbox), _) => {
                // No leaf, but where it is born; what it starts in the sandbox is not seen from here.
                let born_in = self.cgroups.open_v2(&sandbox.cgroup).map_err(|e| {
                    let message = format!("can't exec in container {id}: join the sandbox: {e}");
                    wire_error(ErrorKind::Internal, message)
                })?;
                born_in.map(|fd| (PathBuf::new(), fd))
            }
            (None, true) => self.runtime_leaf(),
            (None, false) => {
                self.next_token += 1;
                let name = format!("exec-{}", self.next_token);
                let made = self.cgroups.make_leaf(&cgroup, &name);
                made.map_err(|e| {
                    let message = format!("can't exec in container {id}: make a cgroup: {e}");
                    wire_error(ErrorKind::Internal, message)
                })?
            }
        };
        let limit = (call.timeout_ms > 0).then(|| Duration::from_millis(call.timeout_ms));
        let keep = oci::descriptors(&stdio);
        let origin = Origin {
            keep: &keep,
            cgroup: leaf.as_ref().map(|(_, fd)| fd.as_fd()),
            ..Origin::default()
        };
        let (cgroups, args, tty) = (self.cgroups.clone(), call.args.clone(), call.tty);
        let own_id = id.clone();
        let (own_dir, in_sandbox) = (dir.clone(), sandbox.clone());
        let job = self.start_job(Purpose::Exec, connection, origin, move || {
            if let Some(sandbox) = &in_sandbox
                && let Err(e) = cgroups.join_v1(&sandbox.cgroup)
            {
                let message = format!("can't exec: join the sandbox: {e}");
                return Err(wire_error(ErrorKind::Internal, message));
            }
            let session = Session {
                id: &own_id,
                dir: &dir,
                cgroup: &cgroup,
                args: &args,
                tty,
                stdio: &stdio,
                timeout: oci::EXEC,
                oom_score_adj,
            };
            match oci::exec(&runtime, &cgroups, &session) {
                Ok(Ok(pid)) => Ok(Answer::CreateContainer(CreateContainerResult {
                    pid,
                    ..Default::default()
                })),
                Ok(Err(exit_code)) => Ok(Answer::Exec(ExecResult {
                    exit_code,
                    timed_out: false,
                })),
                Err(e) => Err(wire_error(e.kind(), format!("can't exec: {}", chain(&e)))),
            }
        });
        let leaf = leaf.map(|(path, _)| path).filter(|_| sandbox.is_none());
        let pid = match job {
            Ok(pid) => pid,
            Err(e) => {
                self.drop_leaf(leaf);
                let message = format!("can't exec in container {id}: fork: {e}");
                return Err(wire_error(ErrorKind::Internal, message));
            }
        };
        let exec = Exec {
            connection,
            container: id,
            leaf,
            inner: sandbox.map(|_| oci::inner_file(&own_dir, pid)),
            setup: None,
            deadline: limit.map(|limit| Instant::now() + limit),
            timed_out: false,
        };
        self.starting_execs.insert(pid, exec);
        Ok(())
    }

    /// A runtime has started an exec, or failed to.
    pub(super) fn exec_started(&mut self, job: i32, answer: Result<Answer, WireError>) {
        let Some(exec) = self.starting_execs.remove(&job) else {
            return;
        };
        let answer = match answer {
            Ok(Answer::CreateContainer(made)) => {
                let gone = !self.connections.contains_key(&exec.connection);
                let unwanted = exec.timed_out || gone;
                self.execs.insert(made.pid, exec);
                if unwanted {
                    self.end_exec(made.pid);
                }
                if let Some(code) = self.unclaimed.remove(&made.pid) {
                    self.exec_exited(made.pid, code);
                }
                self.forget_unclaimed();
                return;
            }
            // It was killed for that.
            _ if exec.timed_out => Ok(Answer::Exec(ExecResult {
                exit_code: 128 + libc::SIGKILL,
                timed_out: true,
            })),
            answer => answer,
        };
        self.drop_leaf(exec.leaf);
        self.forget_unclaimed();
        self.reply(exec.connection, answer);
    }
}
