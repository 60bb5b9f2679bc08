//! The pod's shim in its keeper: started when the pod's network is there, watched until its end, and what is different about
//! containers that it makes.

mod ends;
mod events;
mod exec;
mod turns;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use oci_spec::runtime::LinuxResources;
use slipway_proto::keeper::{
    CreateContainer, Empty, Error as WireError, ErrorKind, Runtime, RuntimeKind, StartSandbox,
    StartSandboxResult, response::Result as Answer,
};
use slipway_shim::events::Receiver;
use slipway_shim::{Process, Task, send_wait_sandbox};

use super::job::{Origin, Purpose};
use super::oci::Driver;
use super::output::Streams;
use super::{Keeper, Source, wire_error};
use crate::cgroup::Hierarchies;
use crate::confine::chain;
use crate::creator::Stdio;
use crate::oci::{CommandError, Removed};
use crate::removal::RemovalError;
use crate::shim::{self, Fifos, Running, Shim, Turn};
use crate::{cgroup, descriptor, oci, resize};

/// Exit code of a container whose end nobody can tell.
const UNKNOWN: i32 = shim::UNKNOWN.cast_signed();

pub(super) use exec::ShimExec;
pub(super) use turns::Step;
use turns::Turns;

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
    /// Whose turn it is to have it make something.
    turns: Turns,
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
    /// Its init, as long as it is seen to live.
    process: Option<(OwnedFd, u64)>,
    /// When the shim is asked how it ended, of which it should have told by then.
    ask_at: Option<Instant>,
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
            process: None,
            ask_at: None,
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
        if settings.kind() == RuntimeKind::Oci {
            return self.begin_oci_sandbox(connection, call);
        }
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
        let cgroups = self.cgroups.clone();
        let origin = Origin {
            namespaces: libc::CLONE_NEWNS as u64,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Sandbox, connection, origin, move || {
            let start = shim::Start {
                call: &call,
                namespaces: &namespaces,
                cgroup: &cgroup,
                cgroups: &cgroups,
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
            turns: Turns::default(),
            log: (log, log_token),
            logged: Vec::new(),
        })
    }

    fn drop_shim(&mut self) {
        self.end_turns();
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
        if self.oci_sandbox.is_some() {
            return self.oci_sandbox_started(connection, answer);
        }
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
        // A shim may outlive its sandbox, such as a virtual machine that is killed.
        let number = match made.sandbox_api {
            true => send_wait_sandbox(task.client(), &self.pod_id),
            false => task.send_wait(Process::init(&self.pod_id)),
        };
        let number = number.map_err(|e| failed(&e))?;
        let waits = HashMap::from([(number, self.pod_id.clone())]);
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

    pub(super) fn begin_shim_start(&mut self, connection: u64, id: &str) -> Result<(), WireError> {
        let call = self.shim_call()?;
        self.may_start(id)?;
        let running = call.running()?.clone();
        let own_id = id.to_owned();
        let turn = self.turn(Step::Start).map_err(|e| {
            let message = format!("can't start container {id}: {e}");
            wire_error(ErrorKind::Internal, message)
        })?;
        let keep = [turn.descriptor()];
        self.start_in_job(connection, id, &keep, move || {
            shim::start_container(&running, &own_id, turn).map_err(|e| {
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
}

impl Driver {
    /// When its shim is to be asked for an end.
    fn ask_at(&self) -> Option<Instant> {
        match self {
            Self::Shim(own) => own.ask_at,
            _ => None,
        }
    }

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
    (call, turn): (&Call, Turn),
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
        turn,
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
