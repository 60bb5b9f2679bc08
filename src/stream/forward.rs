//! Ports of a pod, over either protocol.

use crate::peer::Peer;
use crate::pipe::{PipeReader, pipe};
use crate::protocol::Encoding;
use crate::spdy::{self, Limits, Stream};
use crate::status::Chain;
use crate::ws::{self, Codec};
use crate::{Backend, Config};
use std::collections::HashMap;
use std::future::pending;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes, join, split};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Connections that one client may have at once, two streams each.
const MAX_CONNECTIONS: usize = 256;
/// Ports that a client may name beforehand: each takes two of 255 channels.
pub(crate) const MAX_PORTS: usize = 127;
const COPY: usize = 32 * 1024;

/// Where the ports are.
pub(crate) struct Pod<B> {
    pub(crate) id: String,
    pub(crate) backend: Arc<B>,
}

impl<B> Clone for Pod<B> {
    fn clone(&self) -> Self {
        Self {
            id: self.id.clone(),
            backend: self.backend.clone(),
        }
    }
}

impl<B: Backend> Pod<B> {
    fn failure(&self, port: u16, error: &(dyn std::error::Error + 'static)) -> String {
        let (id, error) = (&self.id, Chain(error));
        format!("error forwarding port {port} to pod {id}, uid : {error}")
    }
}

/// Serves a SPDY connection: each forwarded connection is a pair of streams.
pub(crate) async fn serve_spdy<B: Backend>(
    io: impl AsyncRead + AsyncWrite + Send + 'static,
    peer: Peer,
    pod: Pod<B>,
    config: &Config,
    gone: CancellationToken,
) {
    let limits = Limits {
        streams: 2 * MAX_CONNECTIONS,
        idle: config.idle_timeout,
    };
    let mut connection = spdy::Connection::start(io, peer, limits, gone.clone());
    let mut pairs: HashMap<String, Half> = HashMap::new();
    // Dropped with the client, and with it the connections into the pod.
    let mut forwards = JoinSet::new();
    loop {
        let deadline = pairs.values().map(|half| half.deadline).min();
        tokio::select! {
            () = gone.cancelled() => break,
            stream = connection.open() => {
                let Some(stream) = stream else { break };
                let deadline = Instant::now() + config.creation_timeout;
                if let Some(pair) = pair(&mut pairs, stream, deadline) {
                    forwards.spawn(forward_pair(pod.clone(), pair));
                }
            }
            () = at(deadline) => {
                let now = Instant::now();
                for (request, half) in pairs.extract_if(|_, half| half.deadline <= now) {
                    debug!(request, "a client created one of two port-forward streams");
                    forwards.spawn(expire(half));
                }
            }
            Some(_) = forwards.join_next() => {}
        }
    }
    drop(forwards);
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), connection.finish()).await;
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

/// One of two streams, waiting for the other.
struct Half {
    is_data: bool,
    stream: Stream,
    deadline: Instant,
}

struct Pair {
    port: u16,
    data: Stream,
    error: Stream,
}

/// Takes a stream, and gives the pair that it completes.
fn pair(halves: &mut HashMap<String, Half>, stream: Stream, deadline: Instant) -> Option<Pair> {
    let port = |stream: &Stream| match stream.headers.get("port").map(str::parse) {
        Some(Ok(port @ 1u16..)) => Some(port),
        _ => None,
    };
    let is_data = match stream.headers.get("streamtype") {
        Some("data") => true,
        Some("error") => false,
        _ => {
            stream.refuse();
            return None;
        }
    };
    if port(&stream).is_none() {
        stream.refuse();
        return None;
    }
    let request = match stream.headers.get("requestid") {
        Some(request) if !request.is_empty() => request.to_owned(),
        // Old clients create the error stream and then the data stream, without a word about it.
        _ => stream
            .id
            .saturating_sub(if is_data { 2 } else { 0 })
            .to_string(),
    };
    match halves.remove(&request) {
        None => {
            stream.accept();
            let half = Half {
                is_data,
                stream,
                deadline,
            };
            halves.insert(request, half);
            None
        }
        Some(half) if half.is_data == is_data => {
            stream.refuse();
            halves.insert(request, half);
            None
        }
        Some(half) => {
            stream.accept();
            let (data, error) = if is_data {
                (stream, half.stream)
            } else {
                (half.stream, stream)
            };
            let port = port(&data)?;
            Some(Pair { port, data, error })
        }
    }
}

/// Tells a client that the second stream did not come in time.
async fn expire(half: Half) {
    let (_, mut writer, closer) = half.stream.split();
    if !half.is_data {
        let _ = writer.write_all(b"timed out waiting for streams").await;
        closer.finish().await;
    }
    closer.reset().await;
}

/// Forwards one connection.
async fn forward_pair<B: Backend>(pod: Pod<B>, pair: Pair) {
    let (reader, writer, data) = pair.data.split();
    let (_, mut error_writer, error) = pair.error.split();
    let mut client = join(reader, writer);
    let result = match pod.backend.port_forward(&pod.id, pair.port).await {
        Ok(mut port) => copy_bidirectional_with_sizes(&mut client, &mut port, COPY, COPY)
            .await
            .map(|_| ())
            .map_err(|error| pod.failure(pair.port, &error)),
        Err(error) => Err(pod.failure(pair.port, &error)),
    };
    if let Err(text) = result {
        debug!(pod = pod.id, text, "a port-forward connection failed");
        // It fails if the client has gone or has closed the stream.
        let _ = error_writer.write_all(text.as_bytes()).await;
        error.finish().await;
        data.reset().await;
    } else {
        data.finish().await;
        error.finish().await;
    }
    // The client closes its half of both; of the error stream it often doesn't.
    error.reset().await;
}

/// Serves a WebSocket with two channels for each port.
pub(crate) async fn serve_ws<B: Backend>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: Peer,
    encoding: Encoding,
    ports: Vec<u16>,
    pod: Pod<B>,
    config: &Config,
    gone: CancellationToken,
) {
    let mut inputs = Vec::new();
    let mut readers = Vec::new();
    for _ in &ports {
        let (writer, reader) = pipe();
        inputs.extend([Some(writer), None]);
        readers.push(reader);
    }
    let codec = Codec {
        encoding,
        closes: false,
    };
    let socket = ws::start(io).await;
    let idle = config.idle_timeout;
    let channels = ws::Channels::start(socket, codec, inputs, peer, idle, gone.clone());
    let mut forwards = JoinSet::new();
    for (n, (port, reader)) in ports.into_iter().zip(readers).enumerate() {
        let Ok(data) = u8::try_from(2 * n) else { break };
        channels.send(data, &port.to_le_bytes()).await;
        channels.send(data + 1, &port.to_le_bytes()).await;
        let (writer, error) = (channels.writer(data), channels.writer(data + 1));
        forwards.spawn(forward_channels(pod.clone(), port, reader, writer, error));
    }
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {
            channels.finish().await;
        }
        () = gone.cancelled() => {
            drop(forwards);
            let _ = tokio::time::timeout(std::time::Duration::from_secs(5), channels.finish()).await;
        }
    }
}

/// Forwards one port. The client can't end its direction alone, so the pod's end is the end.
async fn forward_channels<B: Backend>(
    pod: Pod<B>,
    port: u16,
    mut reader: PipeReader,
    mut writer: impl AsyncWrite + Unpin,
    mut error: impl AsyncWrite + Unpin,
) {
    let result = match pod.backend.port_forward(&pod.id, port).await {
        Ok(stream) => {
            let (mut from_pod, mut to_pod) = split(stream);
            let upload = async {
                let _ = tokio::io::copy(&mut reader, &mut to_pod).await;
                let _ = to_pod.shutdown().await;
                pending::<()>().await;
            };
            let download = tokio::io::copy(&mut from_pod, &mut writer);
            tokio::select! {
                result = download => result
                    .map(|_| ())
                    .map_err(|error| pod.failure(port, &error)),
                () = upload => Ok(()),
            }
        }
        Err(error) => Err(pod.failure(port, &error)),
    };
    if let Err(text) = result {
        debug!(pod = pod.id, text, "a port-forward connection failed");
        let _ = error.write_all(text.as_bytes()).await;
    }
}
