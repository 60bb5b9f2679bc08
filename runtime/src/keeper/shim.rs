//! The pod's shim in its keeper: started when the pod's network is there, watched until its end, and what is different about
//! containers that it makes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use slipway_proto::keeper::{
    CreateContainer, CreateContainerResult, Empty, Error as WireError, ErrorKind, Exec as ExecCall,
    Runtime, StartSandbox, StartSandboxResult, response::Result as Answer,
};
use slipway_shim::events::{Event, Receiver};
use slipway_shim::{Process, Task, wait_answer};

use super::container::not_found;
use super::exec::{complete, kill_tree_of};
use super::job::{Origin, Purpose};
use super::oci::Driver;
use super::output::Streams;
use super::{Keeper, Source, wire_error};
use crate::cgroup::Hierarchies;
use crate::confine::chain;
use crate::creator::Stdio;
use crate::oci::{CommandError, Removed};
use crate::removal::RemovalError;
use crate::shim::{self, Fifos, Running, Session, Shim};
use crate::{cgroup, descriptor, oci, resize};

/// Exit code of a container whose end nobody can tell.
const UNKNOWN: i32 = 255;
/// How much is kept of what the shim logs, in bytes: the last of it.
const LONGEST_LOG: usize = 2048;

/// The pod's shim.
pub(super) struct PodShim {
    shim: Shim,
    /// Once it runs, and until it is gone.
    running: Option<Running>,
    /// Its mount namespace.
    mounts: Option<OwnedFd>,
    /// The connection on which the ends of containers are waited for.
    link: Option<(Task, u64)>,
    /// Whose end is waited for, by the number of the call.
    waits: HashMap<u32, String>,
    /// Where it delivers events.
    events: (UnixListener, u64),
    deliveries: HashMap<u64, (UnixStream, Receiver)>,
    log: (File, u64),
    logged: Vec<u8>,
}

/// What the keeper knows of a container that the shim makes.
pub(super) struct ShimContainer {
    fifos: Fifos,
    /// The other ends of its FIFOs, until the shim has opened them.
    held: Vec<OwnedFd>,
    /// Who waits for StartContainer.
    pub(super) starting: Option<u64>,
    /// Why its command can't be executed.
    pub(super) cannot_run: Option<String>,
    /// The shim has told of an OOM kill.
    pub(super) oom: bool,
}

/// A command that the shim runs.
pub(super) struct ShimExec {
    /// Who waits for it.
    pub(super) connection: u64,
    container: String,
    /// When this is closed, the job knows that nobody waits any more.
    _held: OwnedFd,
}

/// What a job needs to call the shim for a container.
pub(super) struct Call {
    pub(super) shim: Shim,
    pub(super) running: Option<Running>,
    pub(super) mounts: Option<OwnedFd>,
}

impl Call {
    /// The shim, which runs.
    pub(super) fn running(&self) -> Result<&Running, WireError> {
        self.running
            .as_ref()
            .ok_or_else(|| gone(&self.shim.handler))
    }
}

fn gone(handler: &str) -> WireError {
    wire_error(
        ErrorKind::WrongState,
        format!("the shim of runtime handler {handler:?} that served the pod is gone"),
    )
}

impl ShimContainer {
    pub(super) fn new() -> Self {
        Self {
            fifos: Fifos::default(),
            held: Vec::new(),
            starting: None,
            cannot_run: None,
            oom: false,
        }
    }

    /// Makes the FIFOs of a container's streams. The keeper's ends are as those of pipes; the others are held until the shim has opened
    /// them, so that their end is not seen before their beginning.
    pub(super) fn streams(&mut self, create: &CreateContainer) -> io::Result<(Stdio, Streams)> {
        let dir = PathBuf::from(&create.dir);
        let fifo = |name: &str| -> io::Result<PathBuf> {
            let path = dir.join(name);
            let _ = std::fs::remove_file(&path);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
            Ok(path)
        };
        let mut ours = Streams::default();
        if create.tty {
            self.fifos.stdin = fifo("stdin")?;
            self.fifos.stdout = fifo("stdout")?;
            let (socket, theirs) = UnixStream::pair()?;
            socket.set_nonblocking(true)?;
            ours.terminal = Some(socket.into());
            return Ok((Stdio::Terminal(theirs.into()), ours));
        }
        self.fifos.stdout = fifo("stdout")?;
        self.fifos.stderr = fifo("stderr")?;
        let (read, stdout) = descriptor::fifo(&self.fifos.stdout)?;
        ours.stdout = Some(read);
        let (read, stderr) = descriptor::fifo(&self.fifos.stderr)?;
        ours.stderr = Some(read);
        let mut stdin = None;
        if create.stdin {
            self.fifos.stdin = fifo("stdin")?;
            let (read, write) = descriptor::fifo(&self.fifos.stdin)?;
            // Who attaches writes as to a pipe.
            rustix::fs::fcntl_setfl(&write, rustix::fs::OFlags::empty())?;
            self.held.push(read.try_clone()?);
            (stdin, ours.stdin) = (Some(read), Some(write));
        }
        self.held.push(stdout.try_clone()?);
        self.held.push(stderr.try_clone()?);
        Ok((
            Stdio::Pipes {
                stdin,
                stdout,
                stderr,
            },
            ours,
        ))
    }

    pub(super) fn fifos(&self) -> Fifos {
        self.fifos.clone()
    }
}

impl Keeper {
    pub(super) fn start_sandbox(&mut self, connection: u64, call: StartSandbox) {
        if let Err(error) = self.begin_sandbox(connection, call) {
            self.reply(connection, Err(error));
        }
    }

    fn begin_sandbox(&mut self, connection: u64, call: StartSandbox) -> Result<(), WireError> {
        if self.shim.is_some() {
            let message = "the pod's sandbox is started already";
            return Err(wire_error(ErrorKind::AlreadyExists, message));
        }
        let settings = call.runtime.clone().unwrap_or_default();
        let failed = |step: &str, e: &dyn std::fmt::Display| {
            let message = format!("can't start the sandbox: {step}: {e}");
            wire_error(ErrorKind::Internal, message)
        };
        let cgroup = self.sandbox.cgroup.clone();
        let cgroup = cgroup.ok_or_else(|| failed("look for its cgroup", &"it has none"))?;
        let pod = self
            .prepare_shim(&settings)
            .map_err(|e| failed("prepare it", &e))?;
        let shim = pod.shim.clone();
        self.shim = Some(pod);
        let namespaces = self.sandbox.result.clone();
        let pod_dir = self.pod_dir.clone();
        let run_root = self.run_root();
        let origin = Origin {
            namespaces: libc::CLONE_NEWNS as u64,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Sandbox, connection, origin, move || {
            let start = shim::Start {
                call: &call,
                namespaces: &namespaces,
                cgroup: &cgroup,
                pod_dir: &pod_dir,
                run_root: &run_root,
            };
            shim::start(&shim, &start)
                .map(Answer::StartSandbox)
                .map_err(|e| wire_error(e.kind(), chain(&e)))
        });
        let mounts = job.and_then(|pid| File::open(format!("/proc/{pid}/ns/mnt")));
        match mounts {
            Ok(mounts) => {
                if let Some(pod) = &mut self.shim {
                    pod.mounts = Some(mounts.into());
                }
                Ok(())
            }
            Err(e) => {
                self.drop_shim();
                Err(failed("fork", &e))
            }
        }
    }

    /// <run root>/pods/<id>
    pub(super) fn run_root(&self) -> PathBuf {
        let root = self.pod_dir.ancestors().nth(2);
        root.unwrap_or(&self.pod_dir).to_owned()
    }

    fn prepare_shim(&mut self, settings: &Runtime) -> io::Result<PodShim> {
        let bundle = self.pod_dir.join(shim::BUNDLE);
        std::fs::create_dir_all(&bundle)?;
        let log = bundle.join(shim::LOG);
        let _ = std::fs::remove_file(&log);
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU)?;
        let log = shim::both_ends(&log)?;
        // sun_path holds 108 bytes, and others must find it.
        let dir = OwnedFd::from(File::open(&self.pod_dir)?);
        let _ = std::fs::remove_file(self.pod_dir.join(shim::EVENTS));
        let path = oci::short_path(&dir, shim::EVENTS);
        let events = UnixListener::bind(&path)?;
        events.set_nonblocking(true)?;
        let events_token = self.watch(&events, Source::ShimEvents)?;
        let log_token = self.watch(&log, Source::ShimLog)?;
        self.shim_dir = Some(dir);
        Ok(PodShim {
            shim: Shim::new(settings, &self.pod_id, PathBuf::from(path)),
            running: None,
            mounts: None,
            link: None,
            waits: HashMap::new(),
            events: (events, events_token),
            deliveries: HashMap::new(),
            log: (log, log_token),
            logged: Vec::new(),
        })
    }

    fn drop_shim(&mut self) {
        if let Some(pod) = self.shim.take() {
            self.forget(&pod.events.0, pod.events.1);
            self.forget(&pod.log.0, pod.log.1);
            for (token, (stream, _)) in &pod.deliveries {
                self.forget(stream, *token);
            }
            if let Some((task, token)) = &pod.link {
                self.forget(task, *token);
            }
        }
        self.shim_dir = None;
    }

    pub(super) fn sandbox_started(&mut self, connection: u64, answer: Result<Answer, WireError>) {
        let answer = answer.and_then(|answer| match answer {
            Answer::StartSandbox(made) => {
                self.link_shim(&made).map(|()| Answer::StartSandbox(made))
            }
            other => Ok(other),
        });
        let answer = answer.map_err(|mut error| {
            self.read_shim_log();
            let said = self.shim_said();
            if !said.is_empty() && !error.message.contains(&said) {
                error.message.push_str(&format!("; the shim's log: {said}"));
            }
            error
        });
        if answer.is_err() && !self.tearing_down() {
            // The caller will have the pod taken down; a second try finds nothing in its way.
            self.drop_shim();
        }
        self.reply(connection, answer);
    }

    /// Connects to a shim that runs, and waits for its end and for that of its sandbox.
    fn link_shim(&mut self, made: &StartSandboxResult) -> Result<(), WireError> {
        let Some(pod) = &self.shim else {
            return Ok(());
        };
        let handler = pod.shim.handler.clone();
        let failed = |e: &dyn std::fmt::Display| {
            let message = format!("can't follow the shim of runtime handler {handler:?}: {e}");
            wire_error(ErrorKind::Internal, message)
        };
        let running = Running::of(&made.address, made.version, made.pid, made.sandbox_api);
        let running = running.ok_or_else(|| failed(&"it speaks another version"))?;
        let mut task = running.connect().map_err(|e| failed(&e))?;
        // The end of one that has the sandbox API is that of the shim.
        let mut waits = HashMap::new();
        if !made.sandbox_api {
            let number = task
                .send_wait(Process::init(&self.pod_id))
                .map_err(|e| failed(&e))?;
            waits.insert(number, self.pod_id.clone());
        }
        let token = self
            .watch(&task, Source::ShimLink)
            .map_err(|e| failed(&e))?;
        if let Some(pod) = &mut self.shim {
            (pod.running, pod.waits) = (Some(running), waits);
            pod.link = Some((task, token));
        }
        Ok(())
    }

    /// What is needed to have the shim do something.
    pub(super) fn shim_call(&self) -> Result<Call, WireError> {
        let pod = self.shim.as_ref().ok_or_else(|| {
            let message = "the pod's sandbox was not started, which its runtime handler needs";
            wire_error(ErrorKind::WrongState, message)
        })?;
        let mounts = pod.mounts.as_ref().map(OwnedFd::try_clone).transpose();
        let mounts = mounts.map_err(|e| wire_error(ErrorKind::Internal, e.to_string()))?;
        Ok(Call {
            shim: pod.shim.clone(),
            running: pod.running.clone(),
            mounts,
        })
    }

    /// A container was made, maybe by the shim.
    pub(super) fn follow_made(
        &mut self,
        id: &str,
        made: &CreateContainerResult,
    ) -> Result<(), WireError> {
        let container = self.containers.get_mut(id);
        let of_shim = container.is_some_and(|c| c.driver.shim().is_some());
        // Of one whose command is not there, there is nothing to wait for.
        match of_shim && made.cannot_run.is_empty() {
            true => self.follow_container(id),
            false => Ok(()),
        }
    }

    /// A container of the shim's is removed: if its end was not seen yet, it was this.
    pub(super) fn end_of_shim(&mut self, id: &str) {
        let container = self.containers.get_mut(id);
        if container.is_some_and(|c| c.driver.shim().is_some()) {
            self.shim_exited(id, 128 + libc::SIGKILL);
        }
    }

    /// All that the shim made is gone with its pod.
    pub(super) fn end_all_of_shim(&mut self) {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.end_of_shim(&id);
        }
    }

    fn follow_container(&mut self, id: &str) -> Result<(), WireError> {
        let Some(pod) = &mut self.shim else {
            return Ok(());
        };
        let Some((task, _)) = &mut pod.link else {
            return Err(gone(&pod.shim.handler));
        };
        let number = task
            .send_wait(Process::init(id))
            .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))?;
        pod.waits.insert(number, id.to_owned());
        Ok(())
    }

    /// The shim has something to say, or is gone.
    pub(super) fn shim_readable(&mut self) {
        let Some(pod) = &mut self.shim else { return };
        let Some((task, _)) = &mut pod.link else {
            return;
        };
        let mut ended = Vec::new();
        let mut broken = task.client().receive("Wait").err();
        loop {
            match task.client().next("Wait") {
                Ok(Some((number, result))) => {
                    if let Some(id) = pod.waits.remove(&number) {
                        let exit = wait_answer(result);
                        let code = exit.map(|e| i32::try_from(e.code).unwrap_or(UNKNOWN));
                        ended.push((id, code.unwrap_or(UNKNOWN)));
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    broken = Some(e);
                    break;
                }
            }
        }
        for (id, code) in ended {
            if id == self.pod_id {
                self.shim_lost("its sandbox has ended");
            } else {
                self.reap_container(&id, code);
            }
        }
        if broken.is_some() {
            self.shim_lost("it has ended");
        }
    }

    /// A container has ended: when the shim has forgotten it, all of its output is there.
    fn reap_container(&mut self, id: &str, code: i32) {
        // The cgroup goes with what the shim knows of it: its count is taken down first.
        if let Some(cgroup) = self.containers.get(id).map(|c| c.cgroup.clone()) {
            self.oom_kills(id, &cgroup);
        }
        let reaped = self.shim_call().ok().and_then(|call| {
            let running = call.running?;
            let own = id.to_owned();
            let purpose = Purpose::Reap(id.to_owned(), code);
            let job = self.start_job(purpose, 0, Origin::default(), move || {
                shim::reap(&running, &own)
                    .map(|()| Answer::Empty(Empty {}))
                    .map_err(|e| wire_error(shim::kind(&e), chain(&e)))
            });
            job.ok()
        });
        if reaped.is_none() {
            self.shim_exited(id, code);
        }
    }

    /// A container of the shim's has ended, and nothing more comes of it.
    pub(super) fn shim_exited(&mut self, id: &str, code: i32) {
        let open = self.containers.get(id).is_some_and(|c| !c.has_exited());
        if open {
            self.release_fifos(id);
            self.container_exited(id, code);
        }
    }

    fn release_fifos(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id)
            && let Some(own) = container.driver.shim()
        {
            own.held.clear();
        }
    }

    /// The shim is gone, or what it made for the pod: nothing of the pod can be used any more.
    fn shim_lost(&mut self, why: &str) {
        let Some(pod) = &mut self.shim else { return };
        let Some((task, token)) = pod.link.take() else {
            return;
        };
        pod.running = None;
        pod.waits.clear();
        self.forget(&task, token);
        drop(task);
        self.read_shim_log();
        if self.tearing_down() {
            return;
        }
        self.kill_makers();
        let said = self.shim_said();
        let Some(pod) = &self.shim else { return };
        let mut message = format!("the shim of runtime handler {:?}: {why}", pod.shim.handler);
        if !said.is_empty() {
            message.push_str(&format!("; its log: {said}"));
        }
        let shim = pod.shim.clone();
        let mounts = pod.mounts.as_ref().and_then(|m| m.try_clone().ok());
        let mut doomed = Vec::new();
        for (id, container) in &mut self.containers {
            if !container.has_exited() && container.driver.shim().is_some() {
                container.state.message.clone_from(&message);
                doomed.push((id.clone(), container.dir.clone(), container.cgroup.clone()));
            }
        }
        let (cgroups, pod_dir) = (self.cgroups.clone(), self.pod_dir.clone());
        let pod_cgroup = self.sandbox.cgroup.clone();
        let keep: Vec<_> = mounts.iter().map(AsRawFd::as_raw_fd).collect();
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Clear, 0, origin, move || {
            let pod = (pod_dir.as_path(), pod_cgroup.as_deref());
            shim::clear(&shim, mounts.as_ref(), &cgroups, &doomed, pod);
            Ok(Answer::Empty(Empty {}))
        });
        if job.is_err() {
            self.shim_cleared();
        }
    }

    /// What the shim has left is removed.
    pub(super) fn shim_cleared(&mut self) {
        let mut lost = Vec::new();
        for (id, container) in &mut self.containers {
            let open = !container.has_exited() && !container.is_creating();
            if open && container.driver.shim().is_some() {
                lost.push(id.clone());
            }
        }
        for id in lost {
            self.shim_exited(&id, UNKNOWN);
        }
        self.doomed = true;
    }

    pub(super) fn begin_shim_start(&mut self, connection: u64, id: &str) -> Result<(), WireError> {
        let call = self.shim_call()?;
        self.may_start(id)?;
        let running = call.running()?.clone();
        let own_id = id.to_owned();
        self.start_in_job(connection, id, move || {
            shim::start_container(&running, &own_id).map_err(|e| {
                let kind = match oci::command_failure(&e.to_string()) {
                    Some(_) => ErrorKind::CannotRun,
                    None => shim::kind(&e),
                };
                wire_error(kind, chain(&e))
            })
        })
    }

    /// The shim has opened a container's streams by now, if it ever will.
    pub(super) fn shim_started(&mut self, id: &str) {
        self.release_fifos(id);
    }

    /// Has the shim send a signal. SIGKILL is sent directly, too, and does not wait. False when there is no shim to ask.
    pub(super) fn signal_by_shim(
        &mut self,
        connection: u64,
        id: &str,
        signal: i32,
        all: bool,
    ) -> bool {
        let Some(container) = self.containers.get_mut(id) else {
            return false;
        };
        if container.driver.shim().is_none() || container.is_creating() || container.has_exited() {
            return false;
        }
        let init = container.pidfd.as_ref().and_then(|p| p.try_clone().ok());
        let cgroup = container.cgroup.clone();
        if signal == libc::SIGKILL {
            if let Some(init) = &init {
                cgroup::send(init, signal);
            }
            if all {
                self.cgroups.signal_all(&cgroup, signal);
            }
            self.end_without_init(id);
        }
        let Ok(Call {
            running: Some(running),
            ..
        }) = self.shim_call()
        else {
            return false;
        };
        let (id, cgroups) = (id.to_owned(), self.cgroups.clone());
        let keep: Vec<_> = init.iter().map(AsRawFd::as_raw_fd).collect();
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Kill, connection, origin, move || {
            if shim::kill(&running, &id, signal, all).is_err() {
                if let Some(init) = &init {
                    cgroup::send(init, signal);
                }
                if all {
                    cgroups.signal_all(&cgroup, signal);
                }
            }
            Ok(Answer::Empty(Empty {}))
        });
        job.is_ok()
    }

    pub(super) fn begin_shim_exec(
        &mut self,
        connection: u64,
        call: &ExecCall,
        stdio: Vec<OwnedFd>,
    ) -> Result<(), WireError> {
        complete(call, &stdio)?;
        let id = call.container_id.clone();
        let container = self.containers.get(&id).ok_or_else(|| not_found(&id))?;
        if !container.is_running() {
            return Err(wire_error(
                ErrorKind::WrongState,
                format!("can't exec in container {id}: it is not running"),
            ));
        }
        let (dir, cgroup) = (container.dir.clone(), container.cgroup.clone());
        let shim = self.shim_call()?;
        let running = shim.running()?.clone();
        let failed = |e: io::Error| {
            let message = format!("can't exec in container {id}: {e}");
            wire_error(ErrorKind::Internal, message)
        };
        let (caller, held) = descriptor::pipe().map_err(failed)?;
        let mut keep = oci::descriptors(&stdio);
        keep.push(caller.as_raw_fd());
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let timeout = (call.timeout_ms > 0).then(|| Duration::from_millis(call.timeout_ms));
        let (args, tty, own_id) = (call.args.clone(), call.tty, id.clone());
        let (cgroups, shim) = (self.cgroups.clone(), shim.shim);
        let job = self.start_job(Purpose::ShimExec, connection, origin, move || {
            let session = Session {
                id: &own_id,
                dir: &dir,
                args: &args,
                tty,
                stdio: &stdio,
                timeout,
                caller: &caller,
                // In a virtual machine the number is another's.
                kill_tree: &|pid| {
                    if cgroups.pids(&cgroup).contains(&pid) {
                        kill_tree_of(pid);
                    }
                },
            };
            shim::exec(&shim, &running, &session)
                .map(Answer::Exec)
                .map_err(|e| wire_error(e.kind(), format!("can't exec: {}", chain(&e))))
        });
        let pid = job.map_err(failed)?;
        let exec = ShimExec {
            connection,
            container: id,
            _held: held,
        };
        self.shim_execs.insert(pid, exec);
        Ok(())
    }

    /// What the shim ran has ended. If it was for want of memory, that is not what ends the container.
    pub(super) fn shim_exec_ended(&mut self, job: i32, answer: &Result<Answer, WireError>) {
        let Some(exec) = self.shim_execs.remove(&job) else {
            return;
        };
        if let Ok(Answer::Exec(end)) = answer
            && end.exit_code == 128 + libc::SIGKILL
            && let Some(container) = self.containers.get_mut(&exec.container)
        {
            let kills = self.cgroups.oom_kills(&container.cgroup);
            container.oom_kills_of_execs = kills.min(container.oom_kills_of_execs + 1);
        }
    }

    /// A container's input is closed for good: the shim may hold it open, too.
    pub(super) fn close_stdin_by_shim(&mut self, id: &str) {
        let of_shim = self
            .containers
            .get_mut(id)
            .is_some_and(|c| c.driver.shim().is_some());
        if !of_shim {
            return;
        }
        if let Ok(Call {
            running: Some(running),
            ..
        }) = self.shim_call()
        {
            let id = id.to_owned();
            // Nobody waits for it: the FIFO's end says the same.
            let _ = self.start_job(Purpose::Kill, 0, Origin::default(), move || {
                let _ = shim::close_stdin(&running, &id);
                Ok(Answer::Empty(Empty {}))
            });
        }
    }

    pub(super) fn shim_delivers(&mut self) {
        while let Some((stream, _)) = self
            .shim
            .as_ref()
            .and_then(|pod| pod.events.0.accept().ok())
        {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let Ok(token) = self.watch(&stream, Source::ShimDelivery) else {
                return;
            };
            if let Some(pod) = &mut self.shim {
                pod.deliveries.insert(token, (stream, Receiver::default()));
            }
        }
    }

    pub(super) fn shim_delivery(&mut self, token: u64) {
        let mut buffer = [0; 16 << 10];
        let Some((stream, receiver)) = self
            .shim
            .as_mut()
            .and_then(|p| p.deliveries.get_mut(&token))
        else {
            self.sources.remove(&token);
            return;
        };
        let taken = match rustix::io::read(&*stream, &mut buffer) {
            Ok(0) => Err(String::new()),
            Ok(n) => receiver.feed(&buffer[..n]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(e) => Err(e.to_string()),
        };
        let written = taken.and_then(|(answers, events)| {
            stream.write_all(&answers).map_err(|e| e.to_string())?;
            Ok(events)
        });
        match written {
            Ok(events) => {
                for Event::Oom { id } in events {
                    // Of a process on the host its cgroup says more.
                    let container = self.containers.get_mut(&id).filter(|c| c.pid().is_none());
                    if let Some(own) = container.and_then(|c| c.driver.shim()) {
                        own.oom = true;
                    }
                }
            }
            // It connects again.
            Err(_) => {
                if let Some((stream, _)) =
                    self.shim.as_mut().and_then(|p| p.deliveries.remove(&token))
                {
                    self.forget(&stream, token);
                }
            }
        }
    }

    pub(super) fn read_shim_log(&mut self) {
        let Some(pod) = &mut self.shim else { return };
        let mut buffer = [0; 16 << 10];
        // A shim that writes without end must not keep everybody else waiting.
        for _ in 0..16 {
            match rustix::io::read(&pod.log.0, &mut buffer) {
                Ok(n) if n > 0 => {
                    pod.logged.extend_from_slice(&buffer[..n]);
                    let beyond = pod.logged.len().saturating_sub(LONGEST_LOG);
                    pod.logged.drain(..beyond);
                }
                _ => return,
            }
        }
    }

    /// The last errors of the shim's log.
    fn shim_said(&self) -> String {
        let logged = self.shim.as_ref().map(|pod| pod.logged.as_slice());
        let text = String::from_utf8_lossy(logged.unwrap_or_default());
        let bad = |line: &&str| {
            [
                "level=error",
                "level=fatal",
                "panic",
                "\"level\":\"error\"",
                "ERRO",
            ]
            .iter()
            .any(|word| line.contains(word))
        };
        let lines: Vec<&str> = text.lines().filter(bad).collect();
        let last = lines.len().saturating_sub(3);
        lines[last..].join("; ")
    }
}

impl Driver {
    /// What is known of a container that the shim makes.
    pub(super) fn shim(&mut self) -> Option<&mut ShimContainer> {
        match self {
            Self::Shim(own) => Some(own),
            _ => None,
        }
    }
}

/// Has the shim make a container. Runs in a job.
pub(super) fn create(
    call: &Call,
    create: &CreateContainer,
    (cgroups, cgroup): (&Hierarchies, &Path),
    fifos: &Fifos,
    stdio: Stdio,
    pid_namespace: Option<PathBuf>,
) -> Result<Answer, WireError> {
    let running = call.running()?;
    let mounts = call
        .mounts
        .as_ref()
        .ok_or_else(|| gone(&call.shim.handler))?;
    // The others' descriptors stay open until the shim has opened the FIFOs.
    let (terminal, _others) = match stdio {
        Stdio::Terminal(socket) => (Some(socket), None),
        others @ Stdio::Pipes { .. } => (None, Some(others)),
    };
    let inherited = shim::Inherited {
        create,
        cgroups,
        cgroup,
        mounts,
        streams: fifos,
        terminal,
        pid_namespace,
    };
    shim::create(&call.shim, running, inherited)
        .map(Answer::CreateContainer)
        .map_err(|e| wire_error(e.kind(), chain(&e)))
}

/// Removes a container of the shim's, by force. Runs in a job.
pub(super) fn remove(
    call: &Call,
    cgroups: &Hierarchies,
    container: &Removed<'_>,
    until: Instant,
) -> Result<(), RemovalError> {
    let (running, mounts) = (call.running.as_ref(), call.mounts.as_ref());
    shim::remove(&call.shim, running, mounts, cgroups, container, until)
}

/// Changes the limits of a container. In a virtual machine they are the shim's alone; on the host the cgroup has them first,
/// and the runtime's record follows. Runs in a job.
pub(super) fn update(
    call: &Call,
    id: &str,
    (cgroups, cgroup): (&Hierarchies, &Path),
    resources: &LinuxResources,
) -> Result<Answer, WireError> {
    let running = call.running()?;
    let text = serde_json::to_vec(resources).unwrap_or_default();
    let told = || {
        shim::update(running, id, &text).map_err(|e| CommandError::Shim {
            handler: call.shim.handler.clone(),
            late: e.is_timeout(),
            said: chain(&e),
        })
    };
    let done = match cgroups.pids(cgroup).is_empty() {
        true => told().map_err(|e| wire_error(e.kind(), chain(&e))),
        false => resize::update(cgroups, cgroup, resources, told)
            .map_err(|e| wire_error(e.kind(), chain(&e))),
    };
    done.map(|()| Answer::Empty(Empty {}))
}

/// Ends the shim of a pod whose containers are gone, and leaves its mount namespace. Runs in a job.
pub(super) fn tear_down(
    call: &Call,
    pod_dir: &Path,
    cgroup: Option<&Path>,
    cgroups: &Hierarchies,
    until: Instant,
) -> Vec<String> {
    let pod = shim::Pod {
        dir: pod_dir,
        cgroup,
        mounts: call.mounts.as_ref(),
        keeper: nix::unistd::getppid().as_raw(),
    };
    let problems = shim::tear_down(&call.shim, call.running.as_ref(), &pod, cgroups, until);
    problems.iter().map(|e| chain(e)).collect()
}
