//! A remote command or an attachment, over either protocol.

use crate::backend::Wanted;
use crate::peer::Peer;
use crate::pipe::pipe;
use crate::protocol::{Encoding, Version};
use crate::resize::ResizeWatch;
use crate::spdy::{self, Closer, Limits, Stream};
use crate::status::Status;
use crate::ws::{self, Codec};
use crate::{AttachRequest, Backend, Config, ExecRequest, Input, Output, SessionIo, StreamError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Streams that a SPDY client may open for a command: it needs 5 at most.
const MAX_STREAMS: usize = 8;
/// How long a client that seems to have gone may take what is left for it.
const FAREWELL: Duration = Duration::from_secs(5);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: usize = 4;

/// What to do in the container.
pub(crate) enum Job {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

impl Job {
    fn wanted(&self) -> Wanted {
        match self {
            Self::Exec(request) => request.wanted(),
            Self::Attach(request) => request.wanted(),
        }
    }

    /// Does it, and says how it ended. A backend that doesn't end after its client is dropped.
    async fn run<B: Backend>(self, backend: &B, io: SessionIo, grace: Duration) -> Status {
        let gone = io.gone.clone();
        let work = async {
            match self {
                Self::Exec(request) => match backend.exec(request, io).await {
                    Ok(exit) => Status::exit(exit),
                    Err(error) => Status::failure("error executing command in container", &error),
                },
                Self::Attach(request) => match backend.attach(request, io).await {
                    Ok(()) => Status::success(),
                    Err(error) => Status::failure("error attaching to container", &error),
                },
            }
        };
        tokio::select! {
            status = work => status,
            () = async { gone.cancelled().await; sleep(grace).await } => {
                let error = StreamError::Failed("the session was cut off".into());
                Status::failure("error streaming", &error)
            }
        }
    }
}

/// Serves a session over SPDY.
pub(crate) async fn serve_spdy<B: Backend>(
    io: impl AsyncRead + AsyncWrite + Send + 'static,
    peer: Peer,
    version: Version,
    job: Job,
    (backend, config): (&B, &Config),
    gone: CancellationToken,
) {
    let limits = Limits {
        streams: MAX_STREAMS,
        idle: config.idle_timeout,
    };
    let mut connection = spdy::Connection::start(io, peer, limits, gone.clone());
    let mut streams = Streams::default();
    let deadline = Instant::now() + config.creation_timeout;
    let expected = Expected::of(job.wanted(), version);
    let complete = timeout_at(deadline, streams.collect(&mut connection, expected));
    let complete = tokio::select! {
        complete = complete => complete.unwrap_or_else(|_| {
            Err(StreamError::Failed("timed out waiting for client to create streams".into()))
        }),
        () = gone.cancelled() => Err(StreamError::Failed("the client has gone".into())),
    };
    let mut closers = Vec::new();
    let (error_writer, error_closer) = match streams.error.take() {
        Some(stream) => {
            let (_, writer, closer) = stream.split();
            (Some(writer), Some(closer))
        }
        None => (None, None),
    };
    let status = match complete {
        Err(error) => {
            debug!(%error, "a streaming session did not come about");
            Status::failure("error streaming", &error)
        }
        Ok(()) => {
            let stdin = streams.stdin.take().map(|stream| {
                let (reader, _, closer) = stream.split();
                closers.push(closer);
                Box::new(reader) as Input
            });
            if version == Version::V1 {
                // Its clients wait for that.
                for closer in &closers {
                    closer.finish().await;
                }
            }
            let output = |stream: Stream, closers: &mut Vec<Closer>| {
                let (_, writer, closer) = stream.split();
                closers.push(closer);
                Box::new(writer) as Output
            };
            let stdout = streams.stdout.take().map(|s| output(s, &mut closers));
            let stderr = streams.stderr.take().map(|s| output(s, &mut closers));
            let resize = streams.resize.take().map(|stream| {
                let (reader, _, closer) = stream.split();
                closers.push(closer);
                reader
            });
            let watch = ResizeWatch::start(resize);
            let io = SessionIo {
                stdin,
                stdout,
                stderr,
                resizes: watch.resizes.clone(),
                gone: gone.clone(),
            };
            job.run(backend, io, config.cancel_grace).await
        }
    };
    let farewell = async {
        // Whoever still holds a writer can't use it any more: the status is the last word.
        for closer in &closers {
            closer.finish().await;
        }
        if let (Some(mut writer), Some(closer)) = (error_writer, error_closer) {
            // It fails if the client has gone.
            let _ = writer.write_all(&text(&status, version)).await;
            closer.finish().await;
        }
        connection.finish().await;
    };
    bounded(farewell, &gone).await;
}

/// Waits as long as the client reads, but not for long if it has gone.
async fn bounded(farewell: impl Future<Output = ()>, gone: &CancellationToken) {
    if gone.is_cancelled() {
        let _ = timeout(FAREWELL, farewell).await;
    } else {
        // `gone` fires also when everything is done, so it can't shorten the time from here on; the
        // idle timeout does.
        farewell.await;
    }
}

fn text(status: &Status, version: Version) -> Vec<u8> {
    if version.status_is_json() {
        status.json()
    } else {
        status.text()
    }
}

/// The streams that a client is to open.
#[derive(Clone, Copy)]
struct Expected {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    resize: bool,
}

impl Expected {
    fn of(wanted: Wanted, version: Version) -> Self {
        Self {
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
            resize: wanted.tty && version.resizes(),
        }
    }

    fn count(self) -> usize {
        let streams = [self.stdin, self.stdout, self.stderr, self.resize];
        1 + streams.into_iter().filter(|expected| *expected).count()
    }
}

#[derive(Default)]
struct Streams {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
    count: usize,
}

impl Streams {
    /// Takes streams until all are there: those that are expected, or, as the Go servers have it, as
    /// many as are expected.
    async fn collect(
        &mut self,
        connection: &mut spdy::Connection,
        expected: Expected,
    ) -> Result<(), StreamError> {
        while !self.has(expected) && self.count < expected.count() {
            let Some(stream) = connection.open().await else {
                return Err(StreamError::Failed("the client has gone".into()));
            };
            let place = match stream.headers.get("streamtype") {
                Some("error") => &mut self.error,
                Some("stdin") => &mut self.stdin,
                Some("stdout") => &mut self.stdout,
                Some("stderr") => &mut self.stderr,
                Some("resize") => &mut self.resize,
                _ => {
                    stream.refuse();
                    continue;
                }
            };
            if place.is_some() {
                stream.refuse();
                continue;
            }
            stream.accept();
            *place = Some(stream);
            self.count += 1;
        }
        Ok(())
    }

    fn has(&self, expected: Expected) -> bool {
        self.error.is_some()
            && self.stdin.is_some() >= expected.stdin
            && self.stdout.is_some() >= expected.stdout
            && self.stderr.is_some() >= expected.stderr
            && self.resize.is_some() >= expected.resize
    }
}

/// Serves a session over WebSocket.
pub(crate) async fn serve_ws<B: Backend>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: Peer,
    (version, encoding): (Version, Encoding),
    job: Job,
    (backend, config): (&B, &Config),
    gone: CancellationToken,
) {
    let wanted = job.wanted();
    let (stdin_in, stdin_out) = wanted.stdin.then(pipe).unzip();
    let (resize_in, resize_out) = pipe();
    let mut inputs = vec![stdin_in, None, None, None, None];
    inputs[RESIZE] = Some(resize_in);
    debug_assert_eq!(usize::from(STDIN), 0);
    let codec = Codec {
        encoding,
        closes: version == Version::V5,
    };
    let socket = ws::start(io).await;
    let channels = ws::Channels::start(
        socket,
        codec,
        inputs,
        peer,
        config.idle_timeout,
        gone.clone(),
    );
    // An empty message tells the client that the session has begun.
    let first = match wanted {
        _ if wanted.stdout => STDOUT,
        _ if wanted.stderr => STDERR,
        _ => ERROR,
    };
    channels.send(first, &[]).await;
    let watch = ResizeWatch::start(Some(resize_out));
    let output =
        |wanted: bool, channel| wanted.then(|| Box::new(channels.writer(channel)) as Output);
    let io = SessionIo {
        stdin: stdin_out.map(|reader| Box::new(reader) as Input),
        stdout: output(wanted.stdout, STDOUT),
        stderr: output(wanted.stderr, STDERR),
        resizes: watch.resizes.clone(),
        gone: gone.clone(),
    };
    let status = job.run(backend, io, config.cancel_grace).await;
    channels.end_writers();
    let farewell = async {
        let text = text(&status, version);
        if !text.is_empty() {
            channels.send(ERROR, &text).await;
        }
        channels.finish().await;
    };
    bounded(farewell, &gone).await;
}
