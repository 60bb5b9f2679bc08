//! A container in its keeper: from create over start to exit.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::{ContainerState as OciState, Hook, LinuxResources, Spec, State};
use slipway_proto::keeper::{
    ContainerState, CreateContainer, CreateContainerResult, Empty, Error as WireError, ErrorKind,
    Phase, UpdateContainer, response::Result as Answer,
};

use super::attach::Readers;
use super::job::{Origin, Purpose, done};
use super::oci::Driver;
use super::output::{Output, Streams, pipe};
use super::restore::Pending;
use super::{Keeper, Source, now_ns, wire_error};
use crate::confine::{Confinement, chain};
use crate::creator::{self, Inherited};
use crate::hooks::{self, Hooks};
use crate::ids::IdMaps;
use crate::log::{LogFile, Stream};
use crate::user::Resolved;
use crate::{cgroup, oci, resize, sys};

/// A container.
pub(super) struct Container {
    /// Directory under the pod's run directory.
    pub(super) dir: PathBuf,
    pub(super) cgroup: PathBuf,
    /// Who made it.
    pub(super) driver: Driver,
    pub(super) state: ContainerState,
    /// Process id of the creator while it works.
    pub(super) creator: Option<i32>,
    /// The init.
    pub(super) pidfd: Option<OwnedFd>,
    /// What exec sessions are confined with; known once created.
    pub(super) confinement: Option<Confinement>,
    /// Ids of the user namespace that it is in, if that is not the host's.
    pub(super) ids: Option<IdMaps>,
    pub(super) oom_score_adj: i32,
    pub(super) own_pid_namespace: bool,
    /// How many OOM kills hit exec sessions: they are not what ends the container.
    pub(super) oom_kills_of_execs: u64,
    /// The call as it came; needed until the container is created.
    pub(super) create: Option<CreateContainer>,
    /// A terminal is its output and its input; it is here, and has no `stderr`.
    pub(super) stdout: Option<Output>,
    pub(super) stderr: Option<Output>,
    /// The write end of its standard input, while that is open.
    pub(super) stdin: Option<OwnedFd>,
    /// Where the init sends the master end of its terminal.
    pub(super) terminal: Option<OwnedFd>,
    pub(super) readers: Readers,
    pub(super) log: LogFile,
    pub(super) start: Option<Start>,
    pub(super) poststart: Option<PostStart>,
    /// What it is to be restored from; until its start.
    pub(super) restore: Option<Pending>,
    /// Process id of the job that restores it.
    pub(super) restoring: Option<i32>,
    /// Set by DeleteContainer: exit is no longer worth an answer to anybody.
    pub(super) deleting: bool,
}

/// The pipe on which the init tells of a failed execve.
pub(super) struct Start {
    pipe: OwnedFd,
    token: u64,
    /// Who waits for StartContainer.
    connection: Option<u64>,
    message: Vec<u8>,
}

/// The hooks that are run when the command has been executed.
pub(super) struct PostStart {
    list: Vec<Hook>,
    state: State,
}

impl PostStart {
    fn of(spec: &Spec, create: &CreateContainer) -> Option<Self> {
        let list = spec.hooks().as_ref()?.poststart().clone();
        let dir = Path::new(&create.dir);
        Some(Self {
            list: list.filter(|list| !list.is_empty())?,
            state: hooks::state(spec, &create.id, dir, OciState::Running, 0),
        })
    }
}

impl Container {
    pub(super) fn pid(&self) -> Option<i32> {
        Some(self.state.pid).filter(|p| *p > 0)
    }

    pub(super) fn is_creating(&self) -> bool {
        self.creator.is_some()
    }

    /// Whether its init may be a child of this process already without being known.
    pub(super) fn is_becoming(&self) -> bool {
        self.is_creating() || self.restoring.is_some()
    }

    pub(super) fn state(&self) -> &ContainerState {
        &self.state
    }

    pub(super) fn has_exited(&self) -> bool {
        self.state.phase() == Phase::Exited
    }

    pub(super) fn is_running(&self) -> bool {
        self.state.phase() == Phase::Running
    }

    /// What its input is written to: its pipe, or the master end of its terminal.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        let terminal = self.stdout.as_ref().filter(|o| o.terminal);
        let terminal = terminal.map(|o| o.pipe.as_fd());
        self.stdin.as_ref().map(AsFd::as_fd).or(terminal)
    }

    pub(super) fn has_output(&self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout.is_some(),
            Stream::Stderr => self.stderr.is_some(),
        }
    }

    pub(super) fn output(&mut self, stream: Stream) -> &mut Option<Output> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

impl Keeper {
    pub(super) fn create_container(&mut self, connection: u64, create: CreateContainer) {
        if let Err(error) = self.begin_create(connection, create) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_create(&mut self, connection: u64, create: CreateContainer) -> Result<(), WireError> {
        let internal = |what: &str, e: &dyn std::fmt::Display| {
            wire_error(ErrorKind::Internal, format!("can't {what}: {e}"))
        };
        let id = create.id.clone();
        if self.containers.contains_key(&id) {
            return Err(wire_error(
                ErrorKind::AlreadyExists,
                format!("container {id} exists"),
            ));
        }
        let spec: Spec = serde_json::from_slice(&create.spec)
            .map_err(|e| wire_error(ErrorKind::Invalid, format!("can't read the OCI spec: {e}")))?;
        let cgroup = spec
            .linux()
            .as_ref()
            .and_then(|l| l.cgroups_path().clone())
            .filter(|p| p.is_absolute())
            .ok_or_else(|| {
                wire_error(
                    ErrorKind::Invalid,
                    "the OCI spec has no absolute linux.cgroupsPath",
                )
            })?;
        let pod_cgroup = self.sandbox.cgroup.clone().unwrap_or_default();
        let pod = oci::Pod {
            id: &self.pod_id,
            cgroup: &pod_cgroup,
            systemd: create.systemd,
        };
        let mut driver = Driver::of(&create, &pod)?;
        let pid_namespace = match create.pid_target.as_str() {
            "" => None,
            target => Some(self.pid_namespace_of(target)?),
        };
        let (control, pid_namespace) = match self.enter_sandbox(&mut driver, &spec, &id)? {
            Some((control, pids)) => (Some(control), Some(pid_namespace.unwrap_or(pids))),
            None => (None, pid_namespace),
        };
        driver.call_pids(pid_namespace.as_deref());
        let log_path = Some(Path::new(&create.log_path)).filter(|p| !p.as_os_str().is_empty());
        let log = LogFile::open(log_path).map_err(|e| {
            wire_error(
                ErrorKind::Invalid,
                format!("can't open the log {}: {e}", create.log_path),
            )
        })?;

        let (start_read, start_write) = pipe(true).map_err(|e| internal("make a pipe", &e))?;
        let by_shim = match &driver {
            Driver::Shim(_) => {
                let turn = self
                    .turn(super::shim::Step::Make)
                    .map_err(|e| internal("make a socket", &e))?;
                Some((self.shim_call()?, turn))
            }
            _ => None,
        };
        let (stdio, ours) = match &mut driver {
            Driver::Shim(own) => own.streams(&create),
            _ => Streams::new(&create),
        }
        .map_err(|e| internal("make the standard streams", &e))?;
        if create.restore.is_some() {
            return self.begin_prepare(connection, create, &spec, (cgroup, log), (stdio, ours));
        }
        let mut keep = stdio.descriptors();
        if let Some((call, turn)) = &by_shim {
            keep.extend(call.mounts.as_ref().map(AsRawFd::as_raw_fd));
            keep.push(turn.descriptor());
        }
        keep.extend(control.as_ref().map(AsRawFd::as_raw_fd));
        keep.push(start_write.as_raw_fd());
        // The creator is born in the container's cgroup (v2), so that nothing has to be migrated. A scope of
        // systemd's can only be made around it, when it is there.
        let born_in = match (&mut driver, create.systemd) {
            (Driver::Oci(oci), systemd) => self.birthplace(oci, &cgroup, systemd),
            // The shim has the runtime make it.
            (Driver::Shim(_), _) | (Driver::Native, true) => Ok(None),
            (Driver::Native, false) => self
                .cgroups
                .ensure(&cgroup)
                .and_then(|_| self.cgroups.open_v2(&cgroup)),
        };
        let job = born_in.and_then(|born_in| {
            let (create, start) = (&create, start_write.as_fd());
            let (cgroups, cgroup) = (self.cgroups.clone(), cgroup.as_path());
            // <run root>/pods/<id>
            let run_root = self.run_root();
            let origin = Origin {
                keep: &keep,
                cgroup: born_in.as_ref().map(AsFd::as_fd),
                ..Origin::default()
            };
            let runtime = driver.runtime();
            let fifos = driver.shim().map(|own| own.fifos());
            self.start_job(Purpose::Create(id.clone()), connection, origin, move || {
                if let (Some((call, turn)), Some(fifos)) = (by_shim, fifos) {
                    return super::shim::create(
                        (&call, turn),
                        create,
                        (&cgroups, cgroup),
                        &fifos,
                        stdio,
                        pid_namespace,
                    );
                }
                if let Some(runtime) = runtime {
                    let inherited = oci::Inherited {
                        create,
                        run_root: &run_root,
                        cgroups: &cgroups,
                        stdio,
                        pid_namespace,
                        control,
                    };
                    return oci::create(&runtime, inherited)
                        .map(Answer::CreateContainer)
                        .map_err(|e| wire_error(e.kind(), chain(&e)));
                }
                let inherited = Inherited {
                    create,
                    run_root: &run_root,
                    cgroups: &cgroups,
                    cgroup,
                    stdio,
                    start_pipe: start,
                    pid_namespace,
                    bundle: None,
                };
                creator::create(inherited)
                    .map(Answer::CreateContainer)
                    .map_err(|e| wire_error(e.kind(), chain(&e)))
            })
        });
        let creator = match job {
            Ok(pid) => pid,
            Err(e) => {
                if !create.systemd {
                    let _ = self.cgroups.remove(&cgroup);
                }
                return Err(internal("start the creator in the container's cgroup", &e));
            }
        };
        let container = Container {
            dir: PathBuf::from(&create.dir),
            cgroup,
            driver,
            state: ContainerState {
                id: id.clone(),
                ..ContainerState::default()
            },
            creator: Some(creator),
            pidfd: None,
            confinement: None,
            ids: IdMaps::of_spec(&spec),
            // A runtime of others runs its own.
            poststart: match &create.runtime {
                None => PostStart::of(&spec, &create),
                Some(_) => None,
            },
            oom_score_adj: create.oom_score_adj,
            own_pid_namespace: creator::has_own_pid_namespace(&spec)
                && create.pid_target.is_empty(),
            oom_kills_of_execs: 0,
            create: Some(create),
            stdout: None,
            stderr: None,
            stdin: ours.stdin,
            terminal: ours.terminal,
            readers: Readers::default(),
            log,
            start: Some(Start {
                pipe: start_read,
                token: 0,
                connection: None,
                message: Vec::new(),
            }),
            restore: None,
            restoring: None,
            deleting: false,
        };
        self.enter(container, ours.stdout, ours.stderr);
        Ok(())
    }

    /// Takes up a container that is being created.
    pub(super) fn enter(
        &mut self,
        mut container: Container,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) {
        let id = container.state.id.clone();
        for (pipe, stream) in [(stdout, Stream::Stdout), (stderr, Stream::Stderr)] {
            let watched = pipe.map(|pipe| self.watch_output(&id, pipe, stream, false));
            match watched.transpose() {
                Ok(output) => *container.output(stream) = output,
                // Without its end: the creator's answer undoes all of it.
                Err(_) => container.creator.into_iter().for_each(sys::kill_child),
            }
        }
        self.containers.insert(id, container);
    }

    fn pid_namespace_of(&self, target: &str) -> Result<PathBuf, WireError> {
        let container = self.containers.get(target).ok_or_else(|| {
            wire_error(
                ErrorKind::NotFound,
                format!("target container {target} is not in this pod"),
            )
        })?;
        let pid = container
            .pid()
            .filter(|_| container.is_running())
            .ok_or_else(|| {
                wire_error(
                    ErrorKind::WrongState,
                    format!("target container {target} is not running"),
                )
            })?;
        if let Some(name) = container.driver.pids() {
            return Ok(name.to_owned());
        }
        Ok(PathBuf::from(format!("/proc/{pid}/ns/pid")))
    }

    /// The creator has answered.
    pub(super) fn container_made(
        &mut self,
        id: &str,
        connection: u64,
        answer: Result<Answer, WireError>,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            // Deleted meanwhile.
            let error = wire_error(
                ErrorKind::NotFound,
                format!("container {id} was deleted while it was created"),
            );
            return self.reply(connection, Err(error));
        };
        container.creator = None;
        let create = container.create.take();
        let answer = self.with_last_words(id, answer);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let made = answer.and_then(|answer| match (answer, create) {
            (Answer::CreateContainer(made), Some(create)) => {
                adopt(container, &create, &made).map(|()| made)
            }
            _ => Err(wire_error(
                ErrorKind::Internal,
                "the creator gave another call's answer",
            )),
        });
        let made = made.and_then(|made| match self.follow_made(id, &made) {
            Ok(()) => Ok(made),
            Err(e) => Err(e),
        });
        let made = made.and_then(|made| match self.take_terminal_of(id, &made) {
            Ok(()) => Ok(made),
            Err(e) => Err(wire_error(
                ErrorKind::Internal,
                format!("can't take over the container's terminal: {e}"),
            )),
        });
        match made {
            Ok(made) => {
                let state = self.containers.get(id).map(|c| c.state.clone());
                state.iter().for_each(|state| self.publish(state));
                if let Some(code) = self.unclaimed.remove(&made.pid) {
                    self.container_exited(id, code);
                }
                self.reply(connection, Ok(Answer::CreateContainer(made)));
            }
            Err(error) => {
                let purpose = Purpose::Undo(id.to_owned(), error.message.clone(), error.kind);
                self.drop_io(id);
                if self.begin_delete(id, connection, purpose).is_err() {
                    self.reply(connection, Err(error));
                }
            }
        }
        self.forget_unclaimed();
    }

    pub(super) fn start_container(&mut self, connection: u64, id: &str) {
        if let Err(error) = self.begin_start(connection, id) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_start(&mut self, connection: u64, id: &str) -> Result<(), WireError> {
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        if container.restore.is_some() {
            return self.begin_restore(connection, id);
        }
        let phase = container.state.phase();
        let ready = phase == Phase::Created && container.creator.is_none();
        if ready && container.driver.runtime().is_some() {
            return self.begin_oci_start(connection, id);
        }
        if ready && container.driver.shim().is_some() {
            return self.begin_shim_start(connection, id);
        }
        let waiting = container
            .start
            .as_ref()
            .is_some_and(|s| s.connection.is_none());
        let dir = container.dir.clone();
        let Some(mut start) = container.start.take_if(|_| ready && waiting) else {
            return Err(wire_error(
                ErrorKind::WrongState,
                format!(
                    "container {id} can't be started: it is {}",
                    phase.as_str_name()
                ),
            ));
        };
        let released = self
            .watch(&start.pipe, Source::Started(id.to_owned()))
            .and_then(|token| {
                start.token = token;
                start.connection = Some(connection);
                creator::release(&dir, id)
            });
        if released.is_err() {
            self.forget(&start.pipe, start.token);
            start.connection = None;
        }
        if let Some(container) = self.containers.get_mut(id) {
            container.start = Some(start);
        }
        released.map_err(|e| {
            wire_error(
                ErrorKind::Internal,
                format!("can't let its first process go: {e}"),
            )
        })
    }

    /// The start pipe tells something: a failed execve, or (at its end) a successful one.
    pub(super) fn started(&mut self, id: &str) {
        if self.read_start(id) {
            self.conclude_start(id);
        }
    }

    /// Reads what the start pipe holds; true at its end.
    fn read_start(&mut self, id: &str) -> bool {
        let start = self.containers.get_mut(id).and_then(|c| c.start.as_mut());
        let Some(start) = start else { return false };
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(&start.pipe, &mut buffer) {
                Ok(0) => return true,
                Ok(n) => start.message.extend_from_slice(&buffer[..n]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(_) => return true,
            }
        }
    }

    /// Answers StartContainer with what the start pipe told. Without a call for it there is nothing to say.
    fn conclude_start(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Some(start) = container.start.take() else {
            return;
        };
        if let Some(connection) = start.connection {
            let answer = match start.message.split_first() {
                Some((_, text)) => {
                    let message = String::from_utf8_lossy(text).into_owned();
                    container.state.cannot_run = true;
                    container.state.message.clone_from(&message);
                    Some(Err(wire_error(ErrorKind::CannotRun, message)))
                }
                None => {
                    container.state.set_phase(Phase::Running);
                    container.state.started_at = now_ns();
                    let state = container.state.clone();
                    let poststart = container.poststart.take();
                    self.publish(&state);
                    poststart.map_or(Some(Ok(done(Vec::new()))), |hooks| {
                        self.run_poststart(connection, state.pid, hooks)
                    })
                }
            };
            if let Some(answer) = answer {
                self.reply(connection, answer);
            }
        }
        self.forget(&start.pipe, start.token);
    }

    /// Runs the hooks in a job, which then answers the call; or says at once why it can't.
    fn run_poststart(
        &mut self,
        connection: u64,
        pid: i32,
        mut hooks: PostStart,
    ) -> Option<Result<Answer, WireError>> {
        hooks.state.set_pid(Some(pid));
        let job = self.start_job(
            Purpose::PostStart,
            connection,
            Origin::default(),
            move || {
                let hooks = Hooks {
                    when: "poststart",
                    list: &hooks.list,
                    state: &hooks.state,
                    env: &[],
                };
                let failures = hooks.run_each();
                Ok(done(failures.iter().map(|e| chain(e)).collect()))
            },
        );
        let warned = |e| Ok(done(vec![format!("can't run the poststart hooks: {e}")]));
        job.err().map(warned)
    }

    /// A container's init has ended.
    pub(super) fn container_exited(&mut self, id: &str, code: i32) {
        // A command can be over before its start has been answered. All that its init said is in the pipe
        // by now, though its end may not be: the creator, on its way out, can still hold the other side.
        self.read_start(id);
        self.conclude_start(id);
        self.ran_already(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let cgroup = container.cgroup.clone();
        if !container.own_pid_namespace {
            // In a shared PID namespace the kernel does not end the rest of the container.
            self.cgroups.signal_all(&cgroup, libc::SIGKILL);
        }
        let oom_kills = self.oom_kills(id, &cgroup);
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.pump_all(id, stream);
        }
        self.drop_io(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.pidfd = None;
        let state = &mut container.state;
        state.set_phase(Phase::Exited);
        state.pid = 0;
        state.exit_code = code;
        // A container may outlive the death of a child, and then it has completed all the same.
        let told = container.driver.told_of_oom();
        let oom_killed = told || oom_kills > container.oom_kills_of_execs;
        state.oom_killed = oom_killed && code != 0;
        state.finished_at = now_ns();
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let state = container.state.clone();
        if !container.deleting {
            write_exit_file(&self.pod_dir, &state);
        }
        self.publish(&state);
    }

    /// In a job: the kernel may take its time to reclaim memory below a lower limit.
    pub(super) fn update_container(&mut self, connection: u64, update: &UpdateContainer) {
        if let Err(error) = self.begin_update(connection, update) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_update(&mut self, connection: u64, update: &UpdateContainer) -> Result<(), WireError> {
        let id = update.id.as_str();
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        if container.is_becoming() || container.state.phase() == Phase::Exited {
            let message = format!("container {id} is neither created nor running");
            return Err(wire_error(ErrorKind::WrongState, message));
        }
        let resources: LinuxResources = serde_json::from_slice(&update.resources).map_err(|e| {
            wire_error(
                ErrorKind::Invalid,
                format!("can't read the new limits: {e}"),
            )
        })?;
        if let Some(pending) = container.restore.as_mut().filter(|r| r.create.systemd) {
            // systemd makes its scope when it is started, and then with these.
            pending.limit(&update.resources).map_err(|e| {
                wire_error(
                    ErrorKind::Internal,
                    format!("can't change the limits of container {id}: {e}"),
                )
            })?;
            self.reply(connection, Ok(Answer::Empty(Empty {})));
            return Ok(());
        }
        let (cgroups, cgroup) = (self.cgroups.clone(), container.cgroup.clone());
        let runtime = container.driver.runtime();
        let (id, dir) = (id.to_owned(), container.dir.clone());
        let in_sandbox = runtime.as_ref().is_some_and(|r| r.sandbox.is_some());
        if in_sandbox && cgroups.v2_dir(&cgroup).is_some_and(|dir| !dir.exists()) {
            // Limits of its own would have no effect there.
            self.reply(connection, Ok(Answer::Empty(Empty {})));
            return Ok(());
        }
        if matches!(container.driver, Driver::Shim(_)) {
            let mut call = self.shim_call()?;
            // The job does not keep it.
            call.mounts = None;
            let job = self.start_job(Purpose::Update, connection, Origin::default(), move || {
                super::shim::update(&call, &id, (&cgroups, &cgroup), &resources)
            });
            return job
                .map(drop)
                .map_err(|e| wire_error(ErrorKind::Internal, format!("can't fork: {e}")));
        }
        let job = self.start_job(Purpose::Update, connection, Origin::default(), move || {
            let tell = || match &runtime {
                // One with a sandbox has no limits of containers.
                Some(runtime) if runtime.sandbox.is_none() => {
                    oci::update(runtime, &cgroups, &id, &dir, &resources)
                }
                _ => Ok(()),
            };
            resize::update(&cgroups, &cgroup, &resources, tell)
                .map(|()| Answer::Empty(Empty {}))
                .map_err(|e| wire_error(e.kind(), chain(&e)))
        });
        job.map(drop)
            .map_err(|e| wire_error(ErrorKind::Internal, format!("can't fork: {e}")))
    }

    pub(super) fn signal_container(&mut self, connection: u64, id: &str, signal: i32, all: bool) {
        match self.begin_signal(connection, id, signal, all) {
            Ok(true) => {}
            Ok(false) => self.reply(connection, Ok(Answer::Empty(Empty {}))),
            Err(error) => self.reply(connection, Err(error)),
        }
    }

    /// True when the answer will come from a job.
    fn begin_signal(
        &mut self,
        connection: u64,
        id: &str,
        signal: i32,
        all: bool,
    ) -> Result<bool, WireError> {
        if !self.containers.contains_key(id) {
            return Err(not_found(id));
        }
        if !(1..=64).contains(&signal) {
            return Err(wire_error(
                ErrorKind::Invalid,
                format!("{signal} is no signal"),
            ));
        }
        if self.signal_by_runtime(connection, id, signal)
            || self.signal_by_shim(connection, id, signal, all)
        {
            return Ok(true);
        }
        let container = self.containers.get(id).ok_or_else(|| not_found(id))?;
        if let Some(pidfd) = &container.pidfd {
            cgroup::send(pidfd, signal);
        }
        if all && container.state.phase() != Phase::Exited {
            self.cgroups.signal_all(&container.cgroup, signal);
        }
        if signal == libc::SIGKILL {
            self.end_without_init(id);
            self.end_before_start(id);
        }
        Ok(false)
    }

    pub(super) fn delete_container(&mut self, connection: u64, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            self.reply(connection, Ok(Answer::Empty(Empty {})));
            return;
        };
        container.deleting = true;
        if let Some(creator) = container.creator {
            // Its caller is told that it was killed; what it made is removed below.
            sys::kill_child(creator);
        }
        container.restoring.into_iter().for_each(sys::kill_child);
        self.end_before_start(id);
        if let Err(e) = self.begin_delete(id, connection, Purpose::Delete(id.to_owned())) {
            let message = format!("can't delete container {id}: {e}");
            self.reply(connection, Err(wire_error(ErrorKind::Internal, message)));
        }
    }

    fn begin_delete(&mut self, id: &str, connection: u64, purpose: Purpose) -> std::io::Result<()> {
        let Some(container) = self.containers.get(id) else {
            return Ok(());
        };
        let (cgroups, cgroup) = (self.cgroups.clone(), container.cgroup.clone());
        let runtime = container.driver.runtime();
        let (id, dir) = (id.to_owned(), container.dir.clone());
        let pidfd = container
            .pidfd
            .as_ref()
            .map(|p| p.try_clone())
            .transpose()?;
        let of_shim = matches!(container.driver, Driver::Shim(_));
        let call = of_shim.then(|| self.shim_call().ok()).flatten();
        let mut keep: Vec<_> = pidfd.iter().map(AsRawFd::as_raw_fd).collect();
        let mounts = call.as_ref().and_then(|call| call.mounts.as_ref());
        keep.extend(mounts.map(AsRawFd::as_raw_fd));
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        self.start_job(purpose, connection, origin, move || {
            let container = oci::Removed {
                id: &id,
                dir: &dir,
                cgroup: &cgroup,
                init: pidfd.as_slice(),
            };
            let until = Instant::now() + oci::DELETE;
            if let Some(call) = call {
                return super::shim::remove(&call, &cgroups, &container, until)
                    .map(|()| Answer::Empty(Empty {}))
                    .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)));
            }
            let result = super::oci::remove(runtime.as_ref(), &cgroups, &container, until);
            result
                .map(|()| done(hooks::run_poststop(&dir)))
                .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))
        })?;
        Ok(())
    }

    pub(super) fn container_deleted(
        &mut self,
        id: &str,
        connection: u64,
        answer: Result<Answer, WireError>,
    ) {
        // Its init has ended before the job did: take its exit status first.
        self.reap();
        if answer.is_ok() {
            self.drop_io(id);
            self.conclude_start(id);
            self.end_without_init(id);
            self.end_of_shim(id);
            self.oom.delete(id);
            self.containers.remove(id);
        }
        self.reply(connection, answer);
    }
}

/// Takes over a container that its creator has made.
fn adopt(
    container: &mut Container,
    create: &CreateContainer,
    made: &CreateContainerResult,
) -> Result<(), WireError> {
    let invalid = |e: &dyn std::fmt::Display| wire_error(ErrorKind::Internal, e.to_string());
    let spec: Spec = serde_json::from_slice(&create.spec).map_err(|e| invalid(&e))?;
    let user = Resolved {
        uid: made.uid,
        gid: made.gid,
        groups: made.groups.clone(),
        home: made.home.clone(),
    };
    if matches!(container.driver, Driver::Native) {
        let confinement = creator::confinement(create, &spec, user).map_err(|e| invalid(&e))?;
        container.confinement = Some(confinement);
    }
    container.driver.made(made);
    // One that is to be restored has no process yet.
    container.pidfd = (made.pid > 0).then(|| cgroup::pin(made.pid)).flatten();
    container.state.pid = made.pid;
    container.state.created_at = now_ns();
    Ok(())
}

/// Leaves the exit status where a daemon finds it when this keeper is gone too.
pub(super) fn write_exit_file(pod_dir: &Path, state: &ContainerState) {
    let record = serde_json::json!({
        "id": state.id,
        "exit_code": state.exit_code,
        "started_at": state.started_at,
        "finished_at": state.finished_at,
        "oom_killed": state.oom_killed,
        "cannot_run": state.cannot_run,
        "message": state.message,
    });
    let dir = pod_dir.join("exits");
    let partial = dir.join(format!("{}.partial", state.id));
    let _ = std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::write(&partial, record.to_string()))
        .and_then(|()| std::fs::rename(&partial, dir.join(format!("{}.json", state.id))));
}

pub(super) fn not_found(id: &str) -> WireError {
    wire_error(
        ErrorKind::NotFound,
        format!("container {id} is not in this pod"),
    )
}
