//! The keeper: a pod's supervisor, a single-threaded event loop that outlives the daemon.
//!
//! It is the parent of every container's init and of every exec session, drains their output into log
//! files, knows their exit codes, and answers the daemon on `keeper.sock`. Whatever may take time or crash
//! (mounts, libcontainer, killing a cgroup) runs in a forked [`job`].

mod attach;
mod checkpoint;
mod connection;
mod container;
mod dispatch;
mod exec;
mod job;
mod oci;
mod oom;
mod output;
mod restore;
mod shim;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use slipway_proto::keeper::{
    Error as WireError, ErrorKind, Response, SetupSandbox, SetupSandboxResult,
    response::Result as Answer,
};

use crate::cgroup::Hierarchies;
use crate::sys;
use connection::Connection;
use container::Container;
use exec::Exec;
pub use exec::descendants;
use job::{Job, Purpose};
use oom::OomLedger;

/// File in a pod's run directory with its keeper's process id.
pub const PID_FILE: &str = "keeper.pid";

/// A keeper that was forked by a dying zygote, for a daemon that does not know of it, ends after this long.
const UNUSED: Duration = Duration::from_secs(60);

/// Whose readiness an epoll event tells.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Listener,
    Children,
    Connection,
    /// Output of a container.
    Output(String, crate::log::Stream),
    /// A container's init says that it can't execute its command, or has (end of file).
    Started(String),
    /// A job's result.
    Job(i32),
    /// The shim has answered.
    ShimLink,
    /// The shim connects.
    ShimEvents,
    /// The shim delivers an event.
    ShimDelivery,
    ShimLog,
    /// A job is through with its turn at the shim.
    ShimTurn,
    /// The init of a container that the shim has made is gone.
    ShimInit(String),
}

/// All that a keeper holds.
struct Keeper {
    pod_id: String,
    pod_dir: PathBuf,
    birth: Birth,
    epoll: OwnedFd,
    listener: UnixListener,
    children: OwnedFd,
    /// The keeper's own PID namespace, to come back to after an exec was born in a container's.
    own_pid_namespace: OwnedFd,
    cgroups: Hierarchies,
    sources: HashMap<u64, Source>,
    next_token: u64,
    connections: HashMap<u64, Connection>,
    containers: BTreeMap<String, Container>,
    jobs: HashMap<i32, Job>,
    execs: HashMap<i32, Exec>,
    /// Execs that a runtime is starting, by the job that has it do so.
    starting_execs: HashMap<i32, Exec>,
    /// What a runtime has all of the pod's containers run in, if it does.
    oci_sandbox: Option<oci::OciSandbox>,
    /// What the shim runs in containers, by the job.
    shim_execs: HashMap<i32, shim::ShimExec>,
    /// The shim that makes this pod's containers, if one does.
    shim: Option<shim::PodShim>,
    /// The pod's directory, as long as the shim finds it by its number.
    shim_dir: Option<OwnedFd>,
    /// Exit statuses of children that nobody claimed yet: a container's init may die before its creator's
    /// answer has been read.
    unclaimed: HashMap<i32, i32>,
    pod_init: Option<i32>,
    sandbox: Sandbox,
    oom: OomLedger,
    /// Set by Teardown: end once everything has been sent.
    ending: bool,
    /// The pod's init died: end once every container has.
    doomed: bool,
    /// When it ends if nobody has called it by then.
    unused_until: Option<Instant>,
    /// What the pod's init is made from, until the other namespaces are there.
    setup: Option<SetupSandbox>,
    /// Cgroups of ended exec sessions that could not be removed yet.
    stale_leaves: Vec<PathBuf>,
}

/// What SetupSandbox made, for Teardown to take away.
#[derive(Default)]
struct Sandbox {
    result: SetupSandboxResult,
    cgroup: Option<PathBuf>,
    ns_dir: Option<PathBuf>,
    shm_dir: Option<PathBuf>,
}

/// What a keeper inherits from the zygote beside its socket.
#[derive(Debug, Default)]
pub struct Birth {
    /// The pod's cgroup was made for it to be born in.
    pub made_cgroup: bool,
    /// Set when it is in its pod's cgroup: where it goes when that is to be removed.
    pub home: Option<PathBuf>,
}

/// Runs a keeper until its pod is torn down.
pub fn main(pod_id: &str, pod_dir: &Path, listener: OwnedFd, birth: Birth) -> ! {
    let log = pod_dir.join("keeper.log");
    let id = pod_id.to_owned();
    // Nobody reads a keeper's standard error.
    std::panic::set_hook(Box::new(move |info| {
        let _ = std::fs::write(&log, format!("keeper of pod {id}: {info}\n"));
    }));
    let code = match Keeper::new(pod_id, pod_dir, listener, birth).and_then(|mut k| k.run()) {
        Ok(()) => 0,
        Err(e) => {
            let _ = std::fs::write(
                pod_dir.join("keeper.log"),
                format!("keeper of {pod_id}: {e}\n"),
            );
            1
        }
    };
    sys::exit_now(code)
}

impl Keeper {
    fn new(pod_id: &str, pod_dir: &Path, listener: OwnedFd, birth: Birth) -> io::Result<Self> {
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        // Whatever a container's tree leaves behind outside its PID namespace comes to this process.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let children = sys::child_signals()?;
        // Readers of a container's output come and go.
        sys::ignore_broken_pipes();
        let mut keeper = Self {
            pod_id: pod_id.to_owned(),
            pod_dir: pod_dir.to_owned(),
            birth,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            listener,
            children,
            own_pid_namespace: std::fs::File::open("/proc/self/ns/pid")?.into(),
            cgroups: Hierarchies::detect()?,
            sources: HashMap::new(),
            next_token: 0,
            connections: HashMap::new(),
            containers: BTreeMap::new(),
            jobs: HashMap::new(),
            execs: HashMap::new(),
            starting_execs: HashMap::new(),
            oci_sandbox: None,
            shim_execs: HashMap::new(),
            shim: None,
            shim_dir: None,
            unclaimed: HashMap::new(),
            pod_init: None,
            sandbox: Sandbox::default(),
            oom: OomLedger::default(),
            ending: false,
            doomed: false,
            unused_until: Some(Instant::now() + UNUSED),
            setup: None,
            stale_leaves: Vec::new(),
        };
        let token = keeper.token(Source::Listener);
        epoll::add(
            &keeper.epoll,
            &keeper.listener,
            EventData::new_u64(token),
            EventFlags::IN,
        )?;
        let token = keeper.token(Source::Children);
        epoll::add(
            &keeper.epoll,
            &keeper.children,
            EventData::new_u64(token),
            EventFlags::IN,
        )?;
        Ok(keeper)
    }

    fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(16);
        while !self.finished() {
            let deadlines = self.next_deadline().into_iter().chain(self.unused_until);
            let deadlines = deadlines.chain(self.next_question());
            let timeout = deadlines.min().map(|at| {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, so that the deadline has passed when the wait ends.
                left + Duration::from_millis(1)
            });
            let timeout = timeout.and_then(|t| rustix::event::Timespec::try_from(t).ok());
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                let token = event.data.u64();
                // A source may have gone while an earlier event of this round was handled.
                if let Some(source) = self.sources.get(&token).cloned() {
                    self.handle(token, source, event.flags);
                }
            }
            self.expire_execs();
            self.ask_for_ends();
        }
        Ok(())
    }

    fn finished(&self) -> bool {
        if self
            .unused_until
            .is_some_and(|until| until <= Instant::now())
        {
            return true;
        }
        let over = self.doomed && self.jobs.is_empty();
        let over = over && self.containers.values().all(Container::has_exited);
        (self.ending || over) && self.connections.values().all(Connection::is_flushed)
    }

    fn handle(&mut self, token: u64, source: Source, flags: EventFlags) {
        match source {
            Source::Listener => self.accept(),
            Source::Children => self.reap(),
            Source::Connection => self.serve_connection(token, flags),
            Source::Output(id, stream) => self.pump(&id, stream),
            Source::Started(id) => self.started(&id),
            Source::Job(pid) => self.job_readable(pid),
            Source::ShimLink => self.shim_readable(),
            Source::ShimEvents => self.shim_delivers(),
            Source::ShimDelivery => self.shim_delivery(token),
            Source::ShimLog => self.read_shim_log(),
            Source::ShimTurn => self.turn_over(token),
            Source::ShimInit(id) => self.init_gone(&id, token),
        }
    }

    /// A token for a source; epoll events carry it.
    fn token(&mut self, source: Source) -> u64 {
        self.next_token += 1;
        self.sources.insert(self.next_token, source);
        self.next_token
    }

    /// Watches a descriptor for input. The registration ends when the descriptor is closed, and with
    /// [`Keeper::forget`].
    fn watch(&mut self, fd: impl AsFd, source: Source) -> io::Result<u64> {
        let token = self.token(source);
        match epoll::add(&self.epoll, fd, EventData::new_u64(token), EventFlags::IN) {
            Ok(()) => Ok(token),
            Err(e) => {
                self.sources.remove(&token);
                Err(e.into())
            }
        }
    }

    fn forget(&mut self, fd: impl AsFd, token: u64) {
        // Closing alone would not do: forked children may hold the same description open.
        let _ = epoll::delete(&self.epoll, fd);
        self.sources.remove(&token);
    }

    fn reap(&mut self) {
        let mut buffer = [0u8; 1024];
        while rustix::io::read(&self.children, &mut buffer).is_ok_and(|n| n > 0) {}
        while let Some((pid, code)) = sys::collect_child() {
            self.child_exited(pid, code);
        }
        self.tidy_leaves();
    }

    fn child_exited(&mut self, pid: i32, code: i32) {
        if self.jobs.contains_key(&pid) {
            self.job_exited(pid, code);
        } else if self.execs.contains_key(&pid) {
            self.exec_exited(pid, code);
        } else if let Some(id) = self.container_of(pid) {
            // What the shim makes is its child, and comes here only when the shim is gone.
            let of_shim = self
                .containers
                .get_mut(&id)
                .is_some_and(|c| c.driver.shim().is_some());
            if !of_shim {
                self.container_exited(&id, code);
            }
        } else if self.is_oci_sandbox(pid) {
            self.oci_sandbox_lost(code);
        } else if self.pod_init == Some(pid) {
            self.pod_init = None;
            self.init_lost();
        } else if self.expects_children() {
            self.unclaimed.insert(pid, code);
        }
    }

    /// Whether a child may turn up of which nobody knows yet whose it is.
    fn expects_children(&self) -> bool {
        !self.starting_execs.is_empty() || self.containers.values().any(Container::is_becoming)
    }

    /// Process ids are used again: an end that nobody claimed must not become another's.
    fn forget_unclaimed(&mut self) {
        if !self.expects_children() {
            self.unclaimed.clear();
        }
    }

    /// The init of the shared PID namespace is dead, and with it everything that was in there: the pod is
    /// of no use any more. The keeper ends once the ends of its containers are on record; the daemon takes
    /// its death for the pod's.
    fn init_lost(&mut self) {
        if self.tearing_down() {
            return;
        }
        self.doomed = true;
        self.kill_makers();
        self.end_unrestored();
        let alive = self.containers.values().filter(|c| !c.has_exited());
        for cgroup in alive.map(|c| c.cgroup.clone()).collect::<Vec<_>>() {
            self.cgroups.signal_all(&cgroup, libc::SIGKILL);
        }
    }

    fn tearing_down(&self) -> bool {
        self.ending || self.jobs.values().any(|j| j.purpose == Purpose::Teardown)
    }

    /// Ends the jobs that make something.
    fn kill_makers(&self) {
        let making = |job: &Job| {
            matches!(
                job.purpose,
                Purpose::Create(_)
                    | Purpose::Setup
                    | Purpose::Checkpoint
                    | Purpose::Restore(_)
                    | Purpose::Start(_)
                    | Purpose::Exec
                    | Purpose::Sandbox
                    | Purpose::ShimExec
            )
        };
        for (pid, _) in self.jobs.iter().filter(|(_, job)| making(job)) {
            sys::kill_child(*pid);
        }
    }

    fn container_of(&self, pid: i32) -> Option<String> {
        self.containers
            .iter()
            .find(|(_, c)| c.pid() == Some(pid))
            .map(|(id, _)| id.clone())
    }

    /// Sends the answer to a call; a caller that has gone is no error.
    fn reply(&mut self, connection: u64, answer: Result<Answer, WireError>) {
        let response = match answer {
            Ok(result) => Response {
                error: None,
                result: Some(result),
            },
            Err(error) => Response {
                error: Some(error),
                result: None,
            },
        };
        if let Some(c) = self.connections.get_mut(&connection) {
            c.queue(&crate::wire::frame(&response));
        }
        self.flush(connection);
    }
}

fn wire_error(kind: ErrorKind, message: impl Into<String>) -> WireError {
    WireError {
        kind: kind as i32,
        message: message.into(),
    }
}

/// Nanoseconds since the epoch.
fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
