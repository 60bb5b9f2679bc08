//! Exec, Attach and PortForward: what is at the container's end of a stream.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use slipway_proto::keeper;
use slipway_runtime::descriptor::{Descriptor, pipe};
use slipway_runtime::terminal;
use slipway_stream::{
    AttachRequest, Backend, ExecRequest, ExitStatus, Input, Output, PortStream, Resizes, SessionIo,
    StreamError,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::container::Container;
use super::error::{Class, PodError, chain};
use super::lifecycle::not_ready;
use super::node::Node;
use super::sandbox::Pod;
use super::state::PodStage;

/// How much of an output may wait for a reader, in bytes: what the kernel lets an ordinary user have.
const WAITING: usize = 1 << 20;
/// Bytes moved at a time.
const CHUNK: usize = 32 << 10;
/// How long a connection to a port of a pod may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The sessions of a node's containers.
pub struct Sessions(pub Arc<Node>);

impl Backend for Sessions {
    async fn exec(&self, request: ExecRequest, io: SessionIo) -> Result<ExitStatus, StreamError> {
        let container = self.0.running(&request.container_id).map_err(told)?;
        let gone = io.gone.clone();
        let work = async {
            if request.tty {
                exec_on_terminal(&container, request, io).await
            } else {
                exec_on_pipes(&container, request, io).await
            }
        };
        // Dropping the call makes the keeper end the command.
        tokio::select! {
            result = work => result.map(ExitStatus),
            () = gone.cancelled() => Err(StreamError::Failed("the client has gone".to_owned())),
        }
    }

    async fn attach(&self, request: AttachRequest, io: SessionIo) -> Result<(), StreamError> {
        let container = self.0.container(&request.container_id).map_err(told)?;
        let gone = io.gone.clone();
        tokio::select! {
            result = attach(&container, request, io) => result,
            () = gone.cancelled() => Ok(()),
        }
    }

    async fn port_forward(&self, pod_id: &str, port: u16) -> Result<PortStream, StreamError> {
        let pod = self.0.ready_pod(pod_id).map_err(told)?;
        let netns = PathBuf::from(&pod.record.namespaces.network);
        let driver = pod.record.driver.as_ref();
        let sandbox = driver.is_some_and(|d| d.pod_sandbox) || self.0.has_machine(&pod);
        let stream = match connect(netns, port).await {
            // Its network stack, loopback interface and all, may be the sandbox's own: then only who comes from outside
            // reaches it.
            Err(e) if sandbox && e.kind() == io::ErrorKind::ConnectionRefused => {
                from_outside(&pod.record.ips, port).await.map_err(|_| e)
            }
            connected => connected,
        };
        let stream =
            stream.map_err(|e| failed(&format!("connect to port {port} of pod {pod_id}"), &e))?;
        Ok(Box::new(stream))
    }
}

impl Node {
    /// A pod that is ready.
    ///
    /// # Errors
    /// For one that is not.
    pub fn ready_pod(&self, id: &str) -> Result<Arc<Pod>, PodError> {
        let pod = self.pod(id)?;
        match pod.stage() {
            PodStage::Ready => Ok(pod),
            _ => Err(not_ready(&pod)),
        }
    }

    /// A container that a command can be executed in.
    ///
    /// # Errors
    /// For one that does not run.
    pub fn running(&self, id: &str) -> Result<Arc<Container>, PodError> {
        let container = self.container(id)?;
        container.must_run()?;
        Ok(container)
    }
}

fn told(error: PodError) -> StreamError {
    let text = chain(&error);
    match error.class() {
        Class::NotFound => StreamError::NotFound(text),
        Class::FailedPrecondition => StreamError::NotRunning(text),
        _ => StreamError::Failed(text),
    }
}

fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> StreamError {
    StreamError::Failed(format!("can't {what}: {}", chain(error)))
}

fn call_of(container: &Container, request: ExecRequest) -> keeper::Exec {
    keeper::Exec {
        container_id: container.id().to_owned(),
        args: (request.command.into_iter())
            .map(String::into_bytes)
            .collect(),
        timeout_ms: 0,
        tty: request.tty,
    }
}

async fn exec_on_pipes(
    container: &Container,
    request: ExecRequest,
    io: SessionIo,
) -> Result<i32, StreamError> {
    let no_pipe = |e: io::Error| failed("make a pipe", &e);
    let (stdin, input) = match io.stdin {
        Some(from) => {
            let (read, write) = pipe().map_err(no_pipe)?;
            let write = Descriptor::new(write).map_err(no_pipe)?;
            (read, Some((from, write)))
        }
        None => (null().map_err(no_pipe)?, None),
    };
    let (out_read, stdout) = output().map_err(no_pipe)?;
    let (err_read, stderr) = output().map_err(no_pipe)?;
    let ended = CancellationToken::new();
    let run = async {
        let result = container
            .keeper
            .exec(
                call_of(container, request),
                &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            )
            .await;
        // Ours were the last ends outside the command; from here on only its children hold any.
        drop((stdin, stdout, stderr));
        ended.cancel();
        result
    };
    let give = async {
        if let Some((from, to)) = input {
            copy_input(from, to).await;
        }
        // Standard input has ended, which ends nothing else.
        std::future::pending::<()>().await;
    };
    let take = async {
        tokio::join!(
            run,
            copy_output(out_read, io.stdout, &ended),
            copy_output(err_read, io.stderr, &ended),
        )
        .0
    };
    let result = tokio::select! {
        result = take => result,
        () = give => return Err(StreamError::Failed("the input outlived the command".to_owned())),
    };
    result
        .map(|r| r.exit_code)
        .map_err(|e| failed("execute the command", &e))
}

async fn exec_on_terminal(
    container: &Container,
    request: ExecRequest,
    io: SessionIo,
) -> Result<i32, StreamError> {
    let no_socket = |e: io::Error| failed("make a socket", &e);
    let (ours, theirs) = UnixStream::pair().map_err(no_socket)?;
    let theirs = OwnedFd::from(theirs.into_std().map_err(no_socket)?);
    let ended = CancellationToken::new();
    let run = async {
        let result = container
            .keeper
            .exec(call_of(container, request), &[theirs.as_fd()])
            .await;
        drop(theirs);
        ended.cancel();
        result
    };
    let serve = async {
        let master = tokio::select! {
            master = receive(&ours) => master.ok(),
            // It could not be executed, or was over before we looked.
            () = ended.cancelled() => terminal::receive(&ours).ok(),
        };
        if let Some(master) = master.and_then(|m| Descriptor::new(m).ok()) {
            serve_terminal(master, io, &ended).await;
        }
    };
    let (result, ()) = tokio::join!(run, serve);
    result
        .map(|r| r.exit_code)
        .map_err(|e| failed("execute the command", &e))
}

/// Moves bytes and sizes between a client and a terminal until the command has ended.
async fn serve_terminal(master: Descriptor, io: SessionIo, ended: &CancellationToken) {
    let (Ok(input), Ok(sizes)) = (master.try_clone(), master.try_clone()) else {
        return;
    };
    let resizes = io.resizes.clone();
    let give = async {
        if let Some(from) = io.stdin {
            copy_typed(from, input, resizes).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = copy_output(master, io.stdout, ended) => {}
        () = give => {}
        () = follow_sizes(io.resizes, sizes) => {}
    }
}

async fn attach(
    container: &Container,
    request: AttachRequest,
    io: SessionIo,
) -> Result<(), StreamError> {
    let no_pipe = |e: io::Error| failed("make a pipe", &e);
    let (out_read, stdout) = output().map_err(no_pipe)?;
    let (err_read, stderr) = output().map_err(no_pipe)?;
    let (ours, theirs) = UnixStream::pair().map_err(no_pipe)?;
    let theirs = theirs.into_std().map_err(no_pipe)?;
    let call = keeper::Attach {
        container_id: container.id().to_owned(),
        stdout: request.stdout,
        stderr: request.stderr,
    };
    container
        .keeper
        .attach(call, stdout.as_fd(), stderr.as_fd(), theirs.as_fd())
        .await
        .map_err(|e| failed("attach to the container", &e))?;
    drop((stdout, stderr, theirs));
    // It was sent before the answer, or will never be.
    let input = terminal::receive(&ours).ok();
    let input = input.and_then(|fd| Descriptor::new(fd).ok());
    let config = &container.record.config;
    // Of a terminal only: a second handle on a pipe would keep it open after the client's input has ended.
    let terminal = input.as_ref().filter(|_| config.tty);
    let terminal = terminal.and_then(|t| t.try_clone().ok());
    let resizes = io.resizes.clone();
    let give = async {
        if let (Some(from), Some(to)) = (io.stdin, input) {
            if config.tty {
                copy_typed(from, to, resizes).await;
            } else {
                copy_input(from, to).await;
            }
            if config.stdin_once
                && let Err(e) = container.keeper.close_stdin(container.id()).await
            {
                tracing::warn!(
                    container = container.id(),
                    error = chain(&e),
                    "can't close its standard input"
                );
            }
        }
        std::future::pending::<()>().await;
    };
    let sizes = async {
        match terminal {
            Some(terminal) => follow_sizes(io.resizes, terminal).await,
            None => std::future::pending().await,
        }
    };
    // The keeper closes its ends when the container ends.
    let never = CancellationToken::new();
    let take = async {
        tokio::join!(
            copy_output(out_read, io.stdout, &never),
            copy_output(err_read, io.stderr, &never),
            container.exited(),
        );
    };
    tokio::select! {
        () = take => {}
        () = give => {}
        () = sizes => {}
    }
    Ok(())
}

/// Copies until the client's input ends or nobody takes it any more.
async fn copy_input(mut from: Input, mut to: Descriptor) {
    // What fails here shows at the other streams.
    let _ = tokio::io::copy(&mut from, &mut to).await;
}

/// Likewise to a terminal, which has the size that the client told before each piece.
async fn copy_typed(mut from: Input, mut to: Descriptor, mut sizes: Resizes) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if let Some(size) = sizes.latest() {
            let _ = terminal::resize(&to, size.width, size.height);
        }
        // What fails here shows at the other streams.
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Copies until the end of the pipe or terminal; once `ended`, only what is in it. Without a client's end it
/// is emptied all the same, so that nobody waits for room.
async fn copy_output(mut from: Descriptor, mut to: Option<Output>, ended: &CancellationToken) {
    let mut buffer = vec![0; CHUNK];
    let mut rest = WAITING;
    loop {
        let read = tokio::select! {
            biased;
            () = ended.cancelled() => match from.try_read(&mut buffer) {
                // Children of the command may go on writing.
                Ok(n) if rest > 0 => { rest = rest.saturating_sub(n); Ok(n) }
                _ => return,
            },
            read = from.read(&mut buffer) => read,
        };
        let Ok(n @ 1..) = read else { return };
        if let Some(client) = &mut to
            && client.write_all(&buffer[..n]).await.is_err()
        {
            to = None;
        }
    }
}

/// Passes the sizes of the client's terminal on, for ever.
async fn follow_sizes(mut sizes: Resizes, terminal: Descriptor) {
    while let Some(size) = sizes.next().await {
        let _ = terminal::resize(&terminal, size.width, size.height);
    }
    std::future::pending().await
}

async fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    socket
        .async_io(tokio::io::Interest::READABLE, || terminal::receive(socket))
        .await
}

/// A pipe with room for what a client has not taken yet.
fn output() -> io::Result<(Descriptor, OwnedFd)> {
    let (read, write) = pipe()?;
    // Fewer when the kernel is short of them.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, WAITING);
    Ok((Descriptor::new(read)?, write))
}

fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::open("/dev/null")?.into())
}

/// Connects to a port on a pod's loopback interface; an empty path is the host's network.
async fn connect(netns: PathBuf, port: u16) -> io::Result<tokio::net::TcpStream> {
    let (send, receive) = tokio::sync::oneshot::channel();
    // A thread of its own, which goes with the namespace that it joined.
    std::thread::Builder::new()
        .name("port-forward".to_owned())
        .spawn(move || {
            let joined = match netns.as_os_str().is_empty() {
                true => Ok(()),
                false => std::fs::File::open(&netns)
                    .and_then(|ns| Ok(setns(ns, CloneFlags::CLONE_NEWNET)?)),
            };
            let _ = send.send(joined.and_then(|()| connect_here(port)));
        })?;
    let stream = receive
        .await
        .map_err(|_| io::Error::other("the connecting thread died"))??;
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream)
}

/// Connects to a port at a pod's addresses, from the host.
async fn from_outside(addresses: &[IpAddr], port: u16) -> io::Result<tokio::net::TcpStream> {
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        let connecting = tokio::net::TcpStream::connect((*address, port));
        match tokio::time::timeout(CONNECT, connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(e)) => failure = e,
            Err(_) => failure = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failure)
}

fn connect_here(port: u16) -> io::Result<TcpStream> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&v4, CONNECT)
        .or_else(|first| TcpStream::connect_timeout(&v6, CONNECT).map_err(|_| first))
}
