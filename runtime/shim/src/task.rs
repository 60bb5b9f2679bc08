//! The task API: containers and the processes in them.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::mount::Mount;

use crate::client::{Client, answer};
use crate::error::ShimError;
use crate::options::Options;
use crate::program::{Address, Version};

/// Names of the types that travel as JSON.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub code: u32,
}

/// Which process is meant: an exec of a container's, or, with an empty name, the container itself.
#[derive(Debug, Clone, Copy)]
pub struct Process<'a> {
    /// The container.
    pub id: &'a str,
    /// Name of the exec.
    pub exec: &'a str,
}

impl<'a> Process<'a> {
    /// A container's init.
    pub fn init(id: &'a str) -> Self {
        Self { id, exec: "" }
    }
}

/// A container to be made.
#[derive(Debug, Clone, Default)]
pub struct Create<'a> {
    /// Its name.
    pub id: &'a str,
    /// The bundle.
    pub bundle: &'a str,
    /// What is to be mounted at `rootfs` in the bundle; nothing, if it is mounted already.
    pub rootfs: Vec<Mount>,
    /// On a terminal, which `stdin` and `stdout` lead to.
    pub terminal: bool,
    /// FIFOs; empty: none.
    pub stdin: &'a str,
    /// FIFO.
    pub stdout: &'a str,
    /// FIFO.
    pub stderr: &'a str,
}

/// A command to be run in a container.
#[derive(Debug, Clone, Default)]
pub struct Exec<'a> {
    /// The container.
    pub id: &'a str,
    /// A name for it.
    pub exec: &'a str,
    /// On a terminal, which `stdin` and `stdout` lead to.
    pub terminal: bool,
    /// FIFOs; empty: none.
    pub stdin: &'a str,
    /// FIFO.
    pub stdout: &'a str,
    /// FIFO.
    pub stderr: &'a str,
    /// The OCI specification's process, as JSON.
    pub process: Vec<u8>,
}

/// What a container uses, as its runtime tells it.
#[derive(Debug, Clone, PartialEq)]
pub enum Metrics {
    /// Of cgroup v1.
    V1(Box<containerd_shim_protos::cgroups::metrics::Metrics>),
    /// Of cgroup v2.
    V2(Box<containerd_shim_protos::cgroups_v2::metrics::Metrics>),
}

/// Memory of a container, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// Its limit; `None`: none.
    pub limit: Option<u64>,
    /// Page cache that has not been used lately.
    pub inactive_file: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Page faults, a count.
    pub page_faults: u64,
    /// Those that had to wait for a disk.
    pub major_page_faults: u64,
    /// Swap.
    pub swap: u64,
    /// The limit of swap alone; `None`: none.
    pub swap_limit: Option<u64>,
}

impl Metrics {
    /// By the type's name, which may be a URL.
    fn of(any: &Any) -> Result<Self, ShimError> {
        let failed = |problem: String| ShimError::Protocol {
            method: "Stats".to_owned(),
            problem,
        };
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        let parsed = match name {
            "io.containerd.cgroups.v1.Metrics" => {
                Message::parse_from_bytes(&any.value).map(|m| Self::V1(Box::new(m)))
            }
            "io.containerd.cgroups.v2.Metrics" => {
                Message::parse_from_bytes(&any.value).map(|m| Self::V2(Box::new(m)))
            }
            other => return Err(failed(format!("statistics of the type {other:?}"))),
        };
        parsed.map_err(|e| failed(e.to_string()))
    }

    /// CPU time in nanoseconds.
    pub fn cpu_nanoseconds(&self) -> u64 {
        match self {
            Self::V1(m) => m.cpu.usage.total,
            Self::V2(m) => m.cpu.usage_usec.saturating_mul(1000),
        }
    }

    /// Memory in use.
    pub fn memory(&self) -> Memory {
        // No limit is a very large one, in whole pages on v1, or nothing at all.
        let limited = |limit: u64| Some(limit).filter(|l| *l != 0 && *l < i64::MAX as u64 - 65_535);
        match self {
            Self::V1(m) => {
                let memory = &m.memory;
                let limit = limited(memory.usage.limit);
                let swap = &memory.swap;
                Memory {
                    usage: memory.usage.usage,
                    limit,
                    inactive_file: memory.total_inactive_file,
                    rss: memory.total_rss,
                    cache: memory.total_cache,
                    mapped_file: memory.total_mapped_file,
                    page_faults: memory.total_pg_fault,
                    major_page_faults: memory.total_pg_maj_fault,
                    // Memory and swap together, there.
                    swap: swap.usage.saturating_sub(memory.usage.usage),
                    swap_limit: limited(swap.limit).map(|l| l.saturating_sub(limit.unwrap_or(l))),
                }
            }
            Self::V2(m) => {
                let memory = &m.memory;
                Memory {
                    usage: memory.usage,
                    limit: limited(memory.usage_limit),
                    inactive_file: memory.inactive_file,
                    rss: memory.anon,
                    cache: memory.file,
                    mapped_file: memory.file_mapped,
                    page_faults: memory.pgfault,
                    major_page_faults: memory.pgmajfault,
                    swap: memory.swap_usage,
                    swap_limit: limited(memory.swap_limit),
                }
            }
        }
    }

    /// Number of processes.
    pub fn pids(&self) -> u64 {
        match self {
            Self::V1(m) => m.pids.current,
            Self::V2(m) => m.pids.current,
        }
    }
}

/// The task API of a shim.
#[derive(Debug)]
pub struct Task {
    client: Client,
    service: &'static str,
}

fn service(version: Version) -> &'static str {
    match version {
        Version::V2 => "containerd.task.v2.Task",
        Version::V3 => "containerd.task.v3.Task",
    }
}

impl Task {
    /// Connects.
    ///
    /// # Errors
    /// [`ShimError::Connect`].
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, ShimError> {
        Ok(Self {
            client: Client::new(address, timeout)?,
            service: service(address.version),
        })
    }

    fn call<A: Message>(
        &mut self,
        method: &str,
        request: &impl Message,
        timeout: Duration,
    ) -> Result<A, ShimError> {
        self.client.call(self.service, method, request, timeout)
    }

    /// The connection, to wait for what has been asked with [`Task::send_wait`].
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Makes a container; the process id of its init.
    ///
    /// # Errors
    /// [`ShimError`]; what the runtime says is in [`ShimError::Refused`].
    pub fn create(
        &mut self,
        create: &Create<'_>,
        options: Option<&Options>,
        timeout: Duration,
    ) -> Result<u32, ShimError> {
        let mut request = CreateTaskRequest::new();
        request.id = create.id.to_owned();
        request.bundle = create.bundle.to_owned();
        request.rootfs.clone_from(&create.rootfs);
        request.terminal = create.terminal;
        request.stdin = create.stdin.to_owned();
        request.stdout = create.stdout.to_owned();
        request.stderr = create.stderr.to_owned();
        request.options = options.map(Options::any).into();
        let made: CreateTaskResponse = self.call("Create", &request, timeout)?;
        Ok(made.pid)
    }

    /// Starts what was made: a container, or an exec; its process id.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn start(&mut self, of: Process<'_>, timeout: Duration) -> Result<u32, ShimError> {
        let mut request = StartRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        let started: StartResponse = self.call("Start", &request, timeout)?;
        Ok(started.pid)
    }

    /// Prepares a command, which [`Task::start`] runs.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn exec(&mut self, exec: &Exec<'_>, timeout: Duration) -> Result<(), ShimError> {
        let mut request = ExecProcessRequest::new();
        request.id = exec.id.to_owned();
        request.exec_id = exec.exec.to_owned();
        request.terminal = exec.terminal;
        request.stdin = exec.stdin.to_owned();
        request.stdout = exec.stdout.to_owned();
        request.stderr = exec.stderr.to_owned();
        request.spec = Some(json(PROCESS, exec.process.clone())).into();
        self.call("Exec", &request, timeout).map(|_: Empty| ())
    }

    /// Sends a signal, to one process or to all of the container's.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn kill(
        &mut self,
        of: Process<'_>,
        signal: u32,
        all: bool,
        timeout: Duration,
    ) -> Result<(), ShimError> {
        let mut request = KillRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        request.signal = signal;
        request.all = all;
        self.call("Kill", &request, timeout).map(|_: Empty| ())
    }

    /// Forgets a process that has ended. The shim answers when all of its output has been handed on.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn delete(&mut self, of: Process<'_>, timeout: Duration) -> Result<Exit, ShimError> {
        let mut request = DeleteRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        let gone: DeleteResponse = self.call("Delete", &request, timeout)?;
        Ok(Exit {
            code: gone.exit_status,
        })
    }

    /// [`Task::delete`], without waiting for the answer.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn send_delete(&mut self, of: Process<'_>) -> Result<u32, ShimError> {
        let mut request = DeleteRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        self.client
            .send(self.service, "Delete", &request, Duration::ZERO)
    }

    /// Asks for the end of a process, without waiting for it: [`wait_answer`] reads what comes under the number.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn send_wait(&mut self, of: Process<'_>) -> Result<u32, ShimError> {
        let mut request = WaitRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        self.client
            .send(self.service, "Wait", &request, Duration::ZERO)
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn wait(&mut self, of: Process<'_>, timeout: Duration) -> Result<Exit, ShimError> {
        let mut request = WaitRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        let ended: WaitResponse = self.call("Wait", &request, timeout)?;
        Ok(Exit {
            code: ended.exit_status,
        })
    }

    /// Whether a process is running, and its end, if it has ended.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn state(&mut self, of: Process<'_>, timeout: Duration) -> Result<Option<Exit>, ShimError> {
        let mut request = StateRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        let state: StateResponse = self.call("State", &request, timeout)?;
        let ended = state.status.enum_value() == Ok(Status::STOPPED);
        Ok(ended.then_some(Exit {
            code: state.exit_status,
        }))
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn resize(
        &mut self,
        of: Process<'_>,
        (width, height): (u16, u16),
        timeout: Duration,
    ) -> Result<(), ShimError> {
        let mut request = ResizePtyRequest::new();
        request.id = of.id.to_owned();
        request.exec_id = of.exec.to_owned();
        request.width = width.into();
        request.height = height.into();
        self.call("ResizePty", &request, timeout).map(|_: Empty| ())
    }

    /// Closes a process's standard input.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn close_stdin(&mut self, of: Process<'_>, timeout: Duration) -> Result<(), ShimError> {
        self.call("CloseIO", &close_stdin_of(of), timeout)
            .map(|_: Empty| ())
    }

    /// [`Task::close_stdin`], without waiting for the answer.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn send_close_stdin(&mut self, of: Process<'_>) -> Result<u32, ShimError> {
        self.client
            .send(self.service, "CloseIO", &close_stdin_of(of), Duration::ZERO)
    }

    /// Changes limits: the OCI specification's resources, as JSON.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn update(
        &mut self,
        id: &str,
        resources: &[u8],
        timeout: Duration,
    ) -> Result<(), ShimError> {
        let mut request = UpdateTaskRequest::new();
        request.id = id.to_owned();
        request.resources = Some(json(RESOURCES, resources.to_vec())).into();
        self.call("Update", &request, timeout).map(|_: Empty| ())
    }

    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn pause(&mut self, id: &str, timeout: Duration) -> Result<(), ShimError> {
        let mut request = PauseRequest::new();
        request.id = id.to_owned();
        self.call("Pause", &request, timeout).map(|_: Empty| ())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn resume(&mut self, id: &str, timeout: Duration) -> Result<(), ShimError> {
        let mut request = ResumeRequest::new();
        request.id = id.to_owned();
        self.call("Resume", &request, timeout).map(|_: Empty| ())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn stats(&mut self, id: &str, timeout: Duration) -> Result<Metrics, ShimError> {
        let mut request = StatsRequest::new();
        request.id = id.to_owned();
        let stats: StatsResponse = self.call("Stats", &request, timeout)?;
        Metrics::of(&stats.stats.unwrap_or_default())
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn pids(&mut self, id: &str, timeout: Duration) -> Result<Vec<u32>, ShimError> {
        let mut request = PidsRequest::new();
        request.id = id.to_owned();
        let pids: PidsResponse = self.call("Pids", &request, timeout)?;
        Ok(pids.processes.iter().map(|p| p.pid).collect())
    }

    /// The process ids of the shim, and of a container's init; some shims know the first only by a container.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn pids_of(&mut self, id: &str, timeout: Duration) -> Result<(u32, u32), ShimError> {
        let mut request = ConnectRequest::new();
        request.id = id.to_owned();
        let known: ConnectResponse = self.call("Connect", &request, timeout)?;
        Ok((known.shim_pid, known.task_pid))
    }

    /// Asks the shim to end, if it has nothing left to do, or, if `now`, in any case. It may end without an answer.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn shutdown(&mut self, id: &str, now: bool, timeout: Duration) -> Result<(), ShimError> {
        let mut request = ShutdownRequest::new();
        request.id = id.to_owned();
        request.now = now;
        match self.call::<Empty>("Shutdown", &request, timeout) {
            Ok(_) | Err(ShimError::Closed { .. }) => Ok(()),
            // Go's server says so of all that is under way when it closes.
            Err(ShimError::Refused { message, .. }) if message.contains("ttrpc: closed") => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// What came for [`Task::send_wait`].
///
/// # Errors
/// [`ShimError`].
pub fn wait_answer(result: Result<Vec<u8>, (i32, String)>) -> Result<Exit, ShimError> {
    let ended: WaitResponse = answer("Wait", result)?;
    Ok(Exit {
        code: ended.exit_status,
    })
}

impl AsFd for Task {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

fn json(name: &str, value: Vec<u8>) -> Any {
    let mut any = Any::new();
    any.type_url = name.to_owned();
    any.value = value;
    any
}

fn close_stdin_of(process: Process<'_>) -> CloseIORequest {
    let mut request = CloseIORequest::new();
    request.id = process.id.to_owned();
    request.exec_id = process.exec.to_owned();
    request.stdin = true;
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_by_their_type() {
        let mut v2 = containerd_shim_protos::cgroups_v2::metrics::Metrics::new();
        v2.pids.mut_or_insert_default().current = 3;
        v2.cpu.mut_or_insert_default().usage_usec = 7;
        let mut any = json(
            "io.containerd.cgroups.v2.Metrics",
            v2.write_to_bytes().unwrap(),
        );
        let metrics = Metrics::of(&any).unwrap();
        assert_eq!((metrics.pids(), metrics.cpu_nanoseconds()), (3, 7000));
        assert_eq!(metrics.memory(), Memory::default());
        any.type_url = "type.googleapis.com/io.containerd.cgroups.v1.Metrics".into();
        assert!(matches!(Metrics::of(&any), Ok(Metrics::V1(_))));
        any.type_url = "x".into();
        assert!(Metrics::of(&any).unwrap_err().to_string().contains("\"x\""));
        any.type_url = "io.containerd.cgroups.v2.Metrics".into();
        any.value = vec![0xff];
        assert!(Metrics::of(&any).is_err());
    }

    fn packed(name: &str, message: &impl Message) -> Any {
        let name = format!("type.googleapis.com/{name}");
        json(&name, message.write_to_bytes().unwrap())
    }

    #[test]
    fn statistics_of_both_versions_say_the_same() {
        let mut v1 = containerd_shim_protos::cgroups::metrics::Metrics::new();
        v1.cpu
            .mut_or_insert_default()
            .usage
            .mut_or_insert_default()
            .total = 5_000;
        let memory = v1.memory.mut_or_insert_default();
        let usage = memory.usage.mut_or_insert_default();
        (usage.usage, usage.limit) = (300, 1000);
        let both = memory.swap.mut_or_insert_default();
        (both.usage, both.limit) = (320, 1500);
        (memory.total_inactive_file, memory.total_rss) = (100, 150);
        (memory.total_cache, memory.total_pg_fault) = (120, 7);
        let v1 = Metrics::of(&packed("io.containerd.cgroups.v1.Metrics", &v1)).unwrap();

        let mut v2 = containerd_shim_protos::cgroups_v2::metrics::Metrics::new();
        v2.cpu.mut_or_insert_default().usage_usec = 5;
        let memory = v2.memory.mut_or_insert_default();
        (memory.usage, memory.usage_limit) = (300, 1000);
        (memory.inactive_file, memory.anon) = (100, 150);
        (memory.file, memory.pgfault) = (120, 7);
        (memory.swap_usage, memory.swap_limit) = (20, 500);
        let v2 = Metrics::of(&packed("io.containerd.cgroups.v2.Metrics", &v2)).unwrap();
        assert_eq!(
            (v1.cpu_nanoseconds(), v1.memory()),
            (v2.cpu_nanoseconds(), v2.memory())
        );
        assert_eq!(v2.memory().limit, Some(1000));

        let mut unlimited = containerd_shim_protos::cgroups_v2::metrics::Metrics::new();
        unlimited.memory.mut_or_insert_default().usage_limit = u64::MAX;
        let any = packed("io.containerd.cgroups.v2.Metrics", &unlimited);
        assert_eq!(Metrics::of(&any).unwrap().memory(), Memory::default());
    }
}
