//! The daemon's side: asking the zygote for keepers, and keepers for everything else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use slipway_proto::keeper::{
    self as proto, ContainerState, CreateContainerResult, ErrorKind, ExecResult, HelloResult,
    Request, Response, SetupSandboxResult, SnapshotResult, request::Call,
    response::Result as Answer,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use crate::descriptor::pipe;
use crate::placement::Placement;
use crate::wire;
use crate::zygote::{ZygoteError, ZygoteProcess};

/// Name of a keeper's socket in its pod's run directory.
pub const KEEPER_SOCKET: &str = "keeper.sock";

/// Why a call to a keeper or to the zygote failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The keeper answered with an error; its text is for a person.
    #[error("{message}")]
    Keeper {
        /// Class of the failure.
        kind: ErrorKind,
        /// What was attempted, on what, the cause.
        message: String,
    },
    /// Nobody listens at the keeper's socket: the keeper has died (or never lived).
    #[error("the keeper of pod {pod} is gone")]
    Gone {
        /// Pod id.
        pod: String,
        /// What connecting or reading said.
        #[source]
        source: io::Error,
    },
    /// The keeper did not answer in time.
    #[error("the keeper of pod {pod} did not answer {call} within {timeout:?}")]
    Timeout {
        /// Pod id.
        pod: String,
        /// The call.
        call: &'static str,
        /// Deadline of the call.
        timeout: Duration,
    },
    /// The answer does not belong to the call.
    #[error("the keeper of pod {pod} answered {call} with something else")]
    Protocol {
        /// Pod id.
        pod: String,
        /// The call.
        call: &'static str,
    },
    /// The zygote could not fork a keeper.
    #[error("can't start a keeper for pod {pod}")]
    Zygote {
        /// Pod id.
        pod: String,
        /// The cause.
        #[source]
        source: ZygoteError,
    },
    /// The socket of a new keeper could not be made.
    #[error("can't make the keeper socket in {dir}")]
    Socket {
        /// The pod's run directory.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl ClientError {
    /// The class of failure: what a keeper said, or [`ErrorKind::Internal`] / [`ErrorKind::TimedOut`].
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Keeper { kind, .. } => *kind,
            Self::Timeout { .. } => ErrorKind::TimedOut,
            _ => ErrorKind::Internal,
        }
    }
}

/// Output of [`Keeper::exec_sync`].
#[derive(Debug, Clone, Default)]
pub struct ExecOutput {
    /// At most the limit that was asked for, in bytes.
    pub stdout: Vec<u8>,
    /// Likewise.
    pub stderr: Vec<u8>,
    /// Exit status, or 128 + signal; 126 or 127 when the command can't be run.
    pub exit_code: i32,
    /// The time limit passed, and the whole exec was killed.
    pub timed_out: bool,
}

/// Starts keepers. One per daemon; cheap to share behind an `Arc`.
#[derive(Debug)]
pub struct Keepers {
    zygote: ZygoteProcess,
}

impl Keepers {
    /// Starts the zygote: a copy of this binary in a sealed memfd, exec-ed as `slipway zygote`.
    ///
    /// # Errors
    /// When the copy can't be made or executed.
    pub fn launch() -> Result<Self, ZygoteError> {
        Ok(Self {
            zygote: ZygoteProcess::launch()?,
        })
    }

    /// Says where keepers are to be; see [`ZygoteProcess::place`].
    ///
    /// # Errors
    /// [`ZygoteError`].
    pub async fn place(&self, placement: Placement) -> Result<(), ZygoteError> {
        self.zygote.place(placement).await
    }

    /// Forks a keeper for a new pod, whose run directory exists; `cgroup`: in a leaf of this cgroup (v2).
    ///
    /// # Errors
    /// [`ClientError::Socket`] or [`ClientError::Zygote`].
    pub async fn spawn(
        &self,
        pod_id: &str,
        pod_dir: &Path,
        cgroup: Option<&str>,
    ) -> Result<Keeper, ClientError> {
        let keeper = Keeper::at(pod_id, pod_dir);
        let mut tried_before = false;
        loop {
            let listener = keeper.listen().map_err(|source| ClientError::Socket {
                dir: pod_dir.to_owned(),
                source,
            })?;
            let spawned = self
                .zygote
                .spawn_keeper(pod_id, pod_dir, listener.as_fd(), cgroup)
                .await;
            match spawned {
                Ok(_) => return Ok(keeper),
                // A zygote that died may have forked before: the next keeper gets a socket of its own, and
                // one that nobody calls ends by itself.
                Err(ZygoteError::Lost(_)) if !tried_before => tried_before = true,
                Err(source) => {
                    return Err(ClientError::Zygote {
                        pod: pod_id.to_owned(),
                        source,
                    });
                }
            }
        }
    }
}

/// A pod's keeper. Holds no connection: every call opens its own, so a `Keeper` is just an address and
/// one call never waits for another.
#[derive(Debug, Clone)]
pub struct Keeper {
    pod_id: String,
    dir: PathBuf,
}

/// Deadline of calls that only touch the keeper's memory or signal processes.
const SHORT: Duration = Duration::from_secs(10);

impl Keeper {
    /// The keeper of the pod whose run directory is `dir`, which may have been started by an earlier daemon.
    pub fn at(pod_id: &str, dir: &Path) -> Self {
        Self {
            pod_id: pod_id.to_owned(),
            dir: dir.to_owned(),
        }
    }

    /// The pod's id.
    pub fn pod_id(&self) -> &str {
        &self.pod_id
    }

    /// Asks who the keeper is; the way to find out whether it lives.
    ///
    /// # Errors
    /// [`ClientError::Gone`] when it does not.
    pub async fn hello(&self) -> Result<HelloResult, ClientError> {
        match self
            .call("Hello", Call::Hello(proto::Hello {}), &[], Some(SHORT))
            .await?
        {
            Some(Answer::Hello(r)) => Ok(r),
            _ => Err(self.unexpected("Hello")),
        }
    }

    /// Makes the pod's namespaces and cgroup.
    ///
    /// # Errors
    /// As the keeper says; `Invalid` for a sysctl that the kernel refuses.
    pub async fn setup_sandbox(
        &self,
        setup: proto::SetupSandbox,
        timeout: Duration,
    ) -> Result<SetupSandboxResult, ClientError> {
        let call = Call::SetupSandbox(setup);
        match self.call("SetupSandbox", call, &[], Some(timeout)).await? {
            Some(Answer::SetupSandbox(r)) => Ok(r),
            _ => Err(self.unexpected("SetupSandbox")),
        }
    }

    /// Starts the pod's shim, when the pod's network is there.
    ///
    /// # Errors
    /// As the keeper says; nothing is left of the shim then.
    pub async fn start_sandbox(
        &self,
        start: proto::StartSandbox,
        timeout: Duration,
    ) -> Result<proto::StartSandboxResult, ClientError> {
        let call = Call::StartSandbox(start);
        match self.call("StartSandbox", call, &[], Some(timeout)).await? {
            Some(Answer::StartSandbox(r)) => Ok(r),
            _ => Err(self.unexpected("StartSandbox")),
        }
    }

    /// Creates a container; its init waits for [`Keeper::start`].
    ///
    /// # Errors
    /// As the keeper says. On an error nothing is left of the container, but after a timeout the keeper
    /// may still be working: [`Keeper::delete`] ends that.
    pub async fn create(
        &self,
        create: proto::CreateContainer,
        timeout: Duration,
    ) -> Result<CreateContainerResult, ClientError> {
        if (create.tty || create.stdin) && self.hello().await?.protocol < wire::SESSIONS {
            return Err(ClientError::Keeper {
                kind: ErrorKind::Unsupported,
                message:
                    "the pod's keeper is of an older version, which knows no terminals and no open \
                          standard input; make the pod anew"
                        .to_owned(),
            });
        }
        if create.restore.is_some() && self.hello().await?.protocol < wire::RESTORES {
            return Err(ClientError::Keeper {
                kind: ErrorKind::Unsupported,
                message: "the pod's keeper is of an older version, which restores no checkpoints; make the pod anew"
                    .to_owned(),
            });
        }
        let call = Call::CreateContainer(create);
        match self
            .call("CreateContainer", call, &[], Some(timeout))
            .await?
        {
            Some(Answer::CreateContainer(r)) => Ok(r),
            _ => Err(self.unexpected("CreateContainer")),
        }
    }

    /// Starts a created container; returns once its execve succeeded.
    ///
    /// # Errors
    /// `CannotRun` when the command can't be executed (the container is then exited), `WrongState`,
    /// `NotFound`.
    pub async fn start(&self, id: &str, timeout: Duration) -> Result<(), ClientError> {
        let call = Call::StartContainer(proto::StartContainer { id: id.to_owned() });
        self.call("StartContainer", call, &[], Some(timeout))
            .await
            .map(drop)
    }

    /// Sends a signal to a container's init, or (`all`) to every process in it. A container that has
    /// exited is no error.
    ///
    /// # Errors
    /// `NotFound` for an unknown container.
    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), ClientError> {
        let call = Call::Signal(proto::Signal {
            id: id.to_owned(),
            signal,
            all,
        });
        self.call("Signal", call, &[], Some(SHORT)).await.map(drop)
    }

    /// Runs a command in a container with the given streams, until it ends: standard input, output and error,
    /// or, on a terminal, one non-blocking socket for [`crate::terminal::receive`].
    ///
    /// # Errors
    /// `CannotRun` (message names the command), `WrongState`, `NotFound`.
    pub async fn exec(
        &self,
        exec: proto::Exec,
        stdio: &[BorrowedFd<'_>],
    ) -> Result<ExecResult, ClientError> {
        // The keeper kills it when its time is up; this is for a keeper that does not.
        let limit = Some(exec.timeout_ms).filter(|ms| *ms > 0);
        let limit = limit.map(|ms| Duration::from_millis(ms) + SHORT);
        match self.call("Exec", Call::Exec(exec), stdio, limit).await? {
            Some(Answer::Exec(r)) => Ok(r),
            _ => Err(self.unexpected("Exec")),
        }
    }

    /// Runs a command and collects its output, at most `limit` bytes of each stream. Ends when the
    /// command's own process ends, whoever still holds its pipes.
    ///
    /// # Errors
    /// As [`Keeper::exec`].
    pub async fn exec_sync(
        &self,
        container_id: &str,
        args: Vec<Vec<u8>>,
        timeout: Option<Duration>,
        limit: usize,
    ) -> Result<ExecOutput, ClientError> {
        let gone = |source| ClientError::Gone {
            pod: self.pod_id.clone(),
            source,
        };
        let null = std::fs::File::open("/dev/null").map_err(gone)?;
        let (out_read, out_write) = pipe().map_err(gone)?;
        let (err_read, err_write) = pipe().map_err(gone)?;
        let exec = proto::Exec {
            container_id: container_id.to_owned(),
            args,
            timeout_ms: timeout.map_or(0, |t| (t.as_millis() as u64).max(1)),
            tty: false,
        };
        let mut stdout = Capture::new(out_read, limit).map_err(gone)?;
        let mut stderr = Capture::new(err_read, limit).map_err(gone)?;
        let call = async {
            let result = self
                .exec(exec, &[null.as_fd(), out_write.as_fd(), err_write.as_fd()])
                .await;
            // Ours were the last ends outside the exec; from here on only its children hold any.
            drop((out_write, err_write));
            result
        };
        tokio::pin!(call);
        let result = loop {
            tokio::select! {
                result = &mut call => break result,
                () = stdout.read_some(), if !stdout.done => {}
                () = stderr.read_some(), if !stderr.done => {}
            }
        };
        // The process has ended: what it wrote is in the pipes, so what can be read without waiting is all.
        stdout.drain();
        stderr.drain();
        let result = result?;
        Ok(ExecOutput {
            stdout: stdout.kept,
            stderr: stderr.kept,
            exit_code: result.exit_code,
            timed_out: result.timed_out,
        })
    }

    /// Reads along with a container's output, into the given write ends of pipes. What its input is written to,
    /// or the master end of its terminal, comes through `socket`, if it has either.
    ///
    /// # Errors
    /// `WrongState` unless it is created or running, `NotFound`; `Unsupported` by a keeper of an older version.
    pub async fn attach(
        &self,
        attach: proto::Attach,
        stdout: BorrowedFd<'_>,
        stderr: BorrowedFd<'_>,
        socket: BorrowedFd<'_>,
    ) -> Result<(), ClientError> {
        let call = Call::Attach(attach);
        self.call("Attach", call, &[stdout, stderr, socket], Some(SHORT))
            .await
            .map(drop)
    }

    /// Closes a container's standard input for good.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn close_stdin(&self, id: &str) -> Result<(), ClientError> {
        let call = Call::CloseStdin(proto::CloseStdin { id: id.to_owned() });
        self.call("CloseStdin", call, &[], Some(SHORT))
            .await
            .map(drop)
    }

    /// Changes a container's limits to what `resources` (OCI LinuxResources as JSON) names; all or nothing.
    ///
    /// # Errors
    /// `WrongState` when more memory is in use than the new limit allows, or the container has ended;
    /// `Invalid` for what the kernel refuses; `Unsupported` by a keeper of an older version.
    pub async fn update(
        &self,
        id: &str,
        resources: Vec<u8>,
        timeout: Duration,
    ) -> Result<(), ClientError> {
        let call = Call::UpdateContainer(proto::UpdateContainer {
            id: id.to_owned(),
            resources,
        });
        self.call("UpdateContainer", call, &[], Some(timeout))
            .await
            .map(drop)
    }

    /// Takes one consistent checkpoint of running containers into the directories that `checkpoint` names. Given
    /// up when this future is dropped.
    ///
    /// # Errors
    /// `WrongState` when one does not run or holds something that can't be dumped, `TimedOut`, `NotFound`;
    /// `Unsupported` without criu, and by a keeper of an older version. All containers go on running.
    pub async fn checkpoint(&self, checkpoint: proto::Checkpoint) -> Result<(), ClientError> {
        // The keeper gives up when its time is over; this is for a keeper that does not.
        let limit = Duration::from_millis(checkpoint.timeout_ms) + SHORT;
        let call = Call::Checkpoint(checkpoint);
        self.call("Checkpoint", call, &[], Some(limit))
            .await
            .map(drop)
    }

    /// Reopens a container's log file; works whatever the container's state.
    ///
    /// # Errors
    /// `NotFound`, or what opening the file says.
    pub async fn reopen_log(&self, id: &str) -> Result<(), ClientError> {
        let call = Call::ReopenLog(proto::ReopenLog { id: id.to_owned() });
        self.call("ReopenLog", call, &[], Some(SHORT))
            .await
            .map(drop)
    }

    /// Kills what is left of a container and removes its cgroup and run-time state. Idempotent.
    ///
    /// # Errors
    /// When a process survives SIGKILL or the cgroup can't be removed.
    pub async fn delete(&self, id: &str, timeout: Duration) -> Result<(), ClientError> {
        let call = Call::DeleteContainer(proto::DeleteContainer { id: id.to_owned() });
        self.call("DeleteContainer", call, &[], Some(timeout))
            .await
            .map(drop)
    }

    /// The state of everything the keeper holds.
    ///
    /// # Errors
    /// [`ClientError::Gone`] when the keeper is dead.
    pub async fn snapshot(&self) -> Result<SnapshotResult, ClientError> {
        match self
            .call(
                "Snapshot",
                Call::Snapshot(proto::Snapshot {}),
                &[],
                Some(SHORT),
            )
            .await?
        {
            Some(Answer::Snapshot(r)) => Ok(r),
            _ => Err(self.unexpected("Snapshot")),
        }
    }

    /// Opens the stream of state changes: first every container as it is, then each change.
    ///
    /// # Errors
    /// [`ClientError::Gone`] when the keeper is dead.
    pub async fn subscribe(&self) -> Result<Events, ClientError> {
        let mut stream = self.connect().await?;
        let request = Request {
            call: Some(Call::Subscribe(proto::Subscribe {})),
        };
        stream
            .write_all(&wire::frame(&request))
            .await
            .map_err(|source| self.gone(source))?;
        Ok(Events {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Kills every container and the pod's init, removes namespaces and cgroups, ends the keeper. A
    /// keeper that is gone is no error: what it left is then removed by the caller.
    ///
    /// # Errors
    /// As the keeper says.
    pub async fn teardown(&self, timeout: Duration) -> Result<(), ClientError> {
        let call = Call::Teardown(proto::Teardown {});
        match self.call("Teardown", call, &[], Some(timeout)).await {
            Ok(_) | Err(ClientError::Gone { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn listen(&self) -> io::Result<UnixListener> {
        let path = self.socket_path()?;
        match std::fs::remove_file(&path.1) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => UnixListener::bind(&path.1),
        }
    }

    /// A path to the socket that fits `sun_path` (108 bytes) wherever the run root is, with the
    /// directory descriptor that keeps it valid.
    fn socket_path(&self) -> io::Result<(OwnedFd, PathBuf)> {
        use std::os::fd::AsRawFd;
        let dir = rustix::fs::open(
            &self.dir,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{KEEPER_SOCKET}", dir.as_raw_fd()));
        Ok((dir, path))
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let (_dir, path) = self.socket_path().map_err(|source| self.gone(source))?;
        UnixStream::connect(path)
            .await
            .map_err(|source| self.gone(source))
    }

    async fn call(
        &self,
        name: &'static str,
        call: Call,
        fds: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
    ) -> Result<Option<Answer>, ClientError> {
        let request = wire::frame(&Request { call: Some(call) });
        if request.len() > wire::MAX_MESSAGE {
            // The keeper would hang up in the middle of it.
            return Err(ClientError::Keeper {
                kind: ErrorKind::Invalid,
                message: format!(
                    "{name} takes {} bytes, of {} at most: command, environment, mounts and annotations are too large",
                    request.len(),
                    wire::MAX_MESSAGE
                ),
            });
        }
        let round = async {
            let mut stream = self.connect().await?;
            let answer: Response = async {
                send_all(&mut stream, &request, fds).await?;
                receive(&mut stream).await
            }
            .await
            .map_err(|source| self.gone(source))?;
            if let Some(Answer::Warned(warned)) = &answer.result {
                for warning in &warned.warnings {
                    tracing::warn!(pod = self.pod_id, call = name, warning);
                }
            }
            match answer.error {
                Some(error) => Err(ClientError::Keeper {
                    kind: error.kind(),
                    message: error.message,
                }),
                None => Ok(answer.result),
            }
        };
        match timeout {
            None => round.await,
            Some(timeout) => tokio::time::timeout(timeout, round)
                .await
                .unwrap_or_else(|_| {
                    Err(ClientError::Timeout {
                        pod: self.pod_id.clone(),
                        call: name,
                        timeout,
                    })
                }),
        }
    }

    fn gone(&self, source: io::Error) -> ClientError {
        ClientError::Gone {
            pod: self.pod_id.clone(),
            source,
        }
    }

    fn unexpected(&self, call: &'static str) -> ClientError {
        ClientError::Protocol {
            pod: self.pod_id.clone(),
            call,
        }
    }
}

/// State changes of a pod's containers, in order.
#[derive(Debug)]
pub struct Events {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Events {
    /// The next change; `None` when the keeper has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<ContainerState> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<4>() {
                let len = wire::announced_len(*head).ok()?;
                if self.buffer.len() >= 4 + len {
                    let state = wire::decode(&self.buffer[4..4 + len]).ok()?;
                    self.buffer.drain(..4 + len);
                    return Some(state);
                }
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }
}

pub(crate) async fn send_all(
    stream: &mut UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            wire::send_with_fds(&*stream, bytes, fds)
        })
        .await?;
    stream.write_all(&bytes[sent..]).await
}

pub(crate) async fn receive<M: Message + Default>(stream: &mut UnixStream) -> io::Result<M> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; wire::announced_len(head)?];
    stream.read_exact(&mut body).await?;
    wire::decode(&body)
}

/// Reads a pipe, keeping the first `limit` bytes and dropping the rest, so that the writer never blocks.
struct Capture {
    pipe: tokio::net::unix::pipe::Receiver,
    kept: Vec<u8>,
    limit: usize,
    done: bool,
}

impl Capture {
    fn new(pipe: OwnedFd, limit: usize) -> io::Result<Self> {
        let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe)?;
        Ok(Self {
            pipe,
            kept: Vec::new(),
            limit,
            done: false,
        })
    }

    async fn read_some(&mut self) {
        match self.pipe.readable().await {
            Ok(()) => self.drain(),
            Err(_) => self.done = true,
        }
    }

    /// Reads until the pipe is empty, at its end, or a bound is reached: a child that writes without end
    /// must not keep one call busy for ever.
    fn drain(&mut self) {
        let mut buffer = [0u8; 16 << 10];
        for _ in 0..64 {
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => self.done = true,
                Ok(n) => {
                    let room = self.limit.saturating_sub(self.kept.len());
                    self.kept.extend_from_slice(&buffer[..n.min(room)]);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.done = true,
            }
            return;
        }
    }
}
