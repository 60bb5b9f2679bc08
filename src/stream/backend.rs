//! What the streaming server needs from a container runtime.

use crate::StreamError;
use crate::resize::Source;
use std::future::Future;
use std::sync::{Arc, Weak};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What does the work at the container's end of a stream.
///
/// Implement the methods as `async fn`. Each call belongs to one client; calls run concurrently.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a container until it ends, and says how.
    ///
    /// Everything written to [`SessionIo::stdout`] and [`stderr`](SessionIo::stderr) before this
    /// returns reaches the client before the exit status does, so copy until the command's output
    /// ends, then return. When [`SessionIo::gone`] fires, end the command and return soon.
    fn exec(
        &self,
        request: ExecRequest,
        io: SessionIo,
    ) -> impl Future<Output = Result<ExitStatus, StreamError>> + Send;

    /// Connects a client to a running container's streams until the container ends or the client
    /// has gone (see [`SessionIo::gone`]). The container goes on after the client.
    fn attach(
        &self,
        request: AttachRequest,
        io: SessionIo,
    ) -> impl Future<Output = Result<(), StreamError>> + Send;

    /// Connects to a TCP port inside a pod's network namespace. The server copies in both
    /// directions, ending each on its own: [`AsyncWrite::poll_shutdown`] has to half-close.
    fn port_forward(
        &self,
        pod_id: &str,
        port: u16,
    ) -> impl Future<Output = Result<PortStream, StreamError>> + Send;
}

/// Both directions of a connection into a pod.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection into a pod, such as a boxed [`tokio::net::TcpStream`].
pub type PortStream = Box<dyn Duplex>;
/// Bytes from the client.
pub type Input = Box<dyn AsyncRead + Send + Unpin>;
/// Bytes to the client.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// A command to run in a container, and which of its streams the client wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container.
    pub container_id: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Run it on a terminal. Its stderr is then its stdout, so `stderr` has to be false.
    pub tty: bool,
    /// The client sends stdin.
    pub stdin: bool,
    /// The client wants stdout.
    pub stdout: bool,
    /// The client wants stderr.
    pub stderr: bool,
}

/// A container to attach to, and which of its streams the client wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container.
    pub container_id: String,
    /// The container has a terminal. `stderr` has to be false then.
    pub tty: bool,
    /// The client sends stdin.
    pub stdin: bool,
    /// The client wants stdout.
    pub stdout: bool,
    /// The client wants stderr.
    pub stderr: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(
    /// The exit code; 128 + n if signal n killed it. Clients read it as 8 bits, so only those are
    /// sent.
    pub i32,
);

/// The size of a client's terminal, in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The client's end of an exec or attach session.
pub struct SessionIo {
    /// What the client types; `None` if it sends nothing. Ends when the client closes its stdin; fails
    /// when the client has gone or gives the stream up.
    pub stdin: Option<Input>,
    /// To the client's stdout; `None` if it wants none. Writing waits while the client is slow, and
    /// fails when it has gone.
    pub stdout: Option<Output>,
    /// To the client's stderr; `None` if it wants none.
    pub stderr: Option<Output>,
    /// The sizes of the client's terminal.
    pub resizes: Resizes,
    /// Fires when the client has gone, the connection was idle for too long, or the server shuts
    /// down: whoever works for this session should stop.
    pub gone: CancellationToken,
}

/// The sizes that a client's terminal takes. Of sizes that come faster than they are read, only the
/// last is kept.
#[derive(Debug, Clone)]
pub struct Resizes {
    sizes: watch::Receiver<Option<TerminalSize>>,
    source: Weak<Source>,
}

impl Resizes {
    pub(crate) fn new(
        sizes: watch::Receiver<Option<TerminalSize>>,
        source: Option<&Arc<Source>>,
    ) -> Self {
        Self {
            sizes,
            source: source.map(Arc::downgrade).unwrap_or_default(),
        }
    }

    /// Waits for the next size. `None` when there will be none any more; then don't ask again.
    /// Safe to use in `select!`.
    pub async fn next(&mut self) -> Option<TerminalSize> {
        self.sizes.changed().await.ok()?;
        *self.sizes.borrow_and_update()
    }

    /// The newest size that has come, unless it was told. Asked before each piece of input is handed on, it
    /// keeps the order in which the client sent both.
    pub fn latest(&mut self) -> Option<TerminalSize> {
        if let Some(source) = self.source.upgrade() {
            source.catch_up();
        }
        if !self.sizes.has_changed().unwrap_or(false) {
            return None;
        }
        *self.sizes.borrow_and_update()
    }
}

impl ExecRequest {
    pub(crate) fn validate(&self) -> Result<(), StreamError> {
        validate(&self.container_id, self.wanted())?;
        if self.command.is_empty() {
            return Err(StreamError::InvalidRequest("missing required cmd".into()));
        }
        Ok(())
    }

    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            tty: self.tty,
        }
    }
}

impl AttachRequest {
    pub(crate) fn validate(&self) -> Result<(), StreamError> {
        validate(&self.container_id, self.wanted())
    }

    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            tty: self.tty,
        }
    }
}

/// Which streams a session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

fn validate(container_id: &str, wanted: Wanted) -> Result<(), StreamError> {
    let problem = if container_id.is_empty() {
        "missing required container_id"
    } else if wanted.tty && wanted.stderr {
        "tty and stderr cannot both be true"
    } else if !wanted.stdin && !wanted.stdout && !wanted.stderr {
        "one of stdin, stdout, or stderr must be set"
    } else {
        return Ok(());
    };
    Err(StreamError::InvalidRequest(problem.into()))
}
