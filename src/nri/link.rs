//! The connection to one plugin: calls to it, and calls from it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::NriError;
use crate::frame;
use crate::rpc::{self, Message, Request, Response, Status};

/// Messages that wait for a plugin to read.
const QUEUE: usize = 16;
/// Calls of a plugin that are worked on at a time.
const CALLS: usize = 8;

/// What answers a plugin's calls.
pub type Answer = Arc<
    dyn Fn(String, Bytes) -> BoxFuture<'static, Result<Vec<u8>, Status>> + Send + Sync + 'static,
>;

/// A connection to a plugin; clones are the same one. Closed when the last goes, or by [`Link::close`].
#[derive(Clone)]
pub struct Link(Arc<Shared>);

struct Shared {
    pending: Mutex<HashMap<u32, oneshot::Sender<Response>>>,
    /// The next stream, and the way out: streams must come in their order.
    out: tokio::sync::Mutex<(u32, mpsc::Sender<BytesMut>)>,
    closed: CancellationToken,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl Link {
    /// Begins to speak.
    pub fn new(socket: UnixStream, answer: Answer) -> Self {
        let (read, write) = socket.into_split();
        let (out, queue) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let link = Self(Arc::new(Shared {
            pending: Mutex::default(),
            out: tokio::sync::Mutex::new((1, out.clone())),
            closed: closed.clone(),
        }));
        tokio::spawn(send(write, queue, closed.clone()));
        let shared = Arc::downgrade(&link.0);
        tokio::spawn(async move {
            let take = |stream, response| {
                let Some(shared) = shared.upgrade() else {
                    return;
                };
                // Nobody waits for an answer that comes too late.
                if let Some(caller) = shared.pending.lock().remove(&stream) {
                    let _ = caller.send(response);
                }
            };
            let end = tokio::select! {
                () = closed.cancelled() => Ok(()),
                end = receive(read, take, answer, out) => end,
            };
            if let Err(error) = end {
                tracing::warn!(%error, "an NRI plugin is cut off");
            }
            closed.cancel();
            if let Some(shared) = shared.upgrade() {
                shared.pending.lock().clear();
            }
        });
        link
    }

    /// Calls a method of the plugin.
    ///
    /// # Errors
    /// [`NriError::Timeout`], [`NriError::Closed`], [`NriError::TooLong`], [`NriError::Protocol`]; and, in the
    /// inner result, the plugin's own failure.
    pub async fn call<M: prost::Message + Default>(
        &self,
        method: &'static str,
        message: &impl prost::Message,
        timeout: Duration,
    ) -> Result<Result<M, Status>, NriError> {
        let late = || NriError::Timeout { method, timeout };
        let call = self.exchange(method, message.encode_to_vec(), timeout);
        let answer = tokio::time::timeout(timeout, call)
            .await
            .map_err(|_| late())??;
        match answer.status {
            Some(status) if status.code != rpc::code::OK => Ok(Err(status)),
            _ => M::decode(answer.payload).map(Ok).map_err(|e| {
                NriError::Protocol(format!("its answer to {method} can't be read: {e}"))
            }),
        }
    }

    async fn exchange(
        &self,
        method: &'static str,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> Result<Response, NriError> {
        let (caller, answer) = oneshot::channel();
        let request = Request {
            service: rpc::PLUGIN_SERVICE.to_owned(),
            method: method.to_owned(),
            payload: payload.into(),
            timeout_nano: i64::try_from(timeout.as_nanos()).unwrap_or(0),
        };
        let stream = {
            let mut out = self.0.out.lock().await;
            let stream = out.0;
            let message = Message::Request(stream, request).encode()?;
            let mut frames = BytesMut::with_capacity(message.len() + 16);
            frame::write(&mut frames, frame::PLUGIN, &message);
            self.0.pending.lock().insert(stream, caller);
            // What is closed already clears nothing any more.
            let sent = !self.0.closed.is_cancelled() && out.1.send(frames).await.is_ok();
            if !sent {
                self.0.pending.lock().remove(&stream);
                return Err(NriError::Closed);
            }
            out.0 = stream.wrapping_add(2);
            stream
        };
        let _forget = Forget(&self.0.pending, stream);
        tokio::select! {
            answer = answer => answer.map_err(|_| NriError::Closed),
            () = self.0.closed.cancelled() => Err(NriError::Closed),
        }
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    /// Whether it has ended.
    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Is done when it has ended; does not keep it open.
    pub fn closed(&self) -> CancellationToken {
        self.0.closed.clone()
    }
}

/// A call that is given up is not waited for any more.
struct Forget<'a>(&'a Mutex<HashMap<u32, oneshot::Sender<Response>>>, u32);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

async fn send(
    mut to: OwnedWriteHalf,
    mut queue: mpsc::Receiver<BytesMut>,
    closed: CancellationToken,
) {
    loop {
        let frames = tokio::select! {
            () = closed.cancelled() => return,
            frames = queue.recv() => frames,
        };
        let Some(frames) = frames else { return };
        let written = tokio::select! {
            () = closed.cancelled() => return,
            written = to.write_all(&frames) => written,
        };
        if written.is_err() {
            closed.cancel();
            return;
        }
    }
}

async fn receive(
    mut from: OwnedReadHalf,
    take: impl Fn(u32, Response),
    answer: Answer,
    out: mpsc::Sender<BytesMut>,
) -> Result<(), NriError> {
    let mut frames = frame::Reader::default();
    let (mut answers, mut calls) = (rpc::Reader::default(), rpc::Reader::default());
    let turns = Arc::new(Semaphore::new(CALLS));
    loop {
        while let Some((connection, payload)) = frames.next()? {
            match connection {
                frame::PLUGIN => answers.feed(&payload),
                frame::RUNTIME => calls.feed(&payload),
                _ => continue,
            }
            while let Some(message) = answers.next()? {
                match message {
                    Message::Response(stream, response) => take(stream, response),
                    Message::Request(..) => {
                        let what = "a call on the plugin's own connection";
                        return Err(NriError::Protocol(what.to_owned()));
                    }
                }
            }
            while let Some(message) = calls.next()? {
                let Message::Request(stream, request) = message else {
                    let what = "an answer to a call that nobody made";
                    return Err(NriError::Protocol(what.to_owned()));
                };
                // One too many is answered here: who calls faster than it reads is read no faster.
                let Ok(turn) = turns.clone().try_acquire_owned() else {
                    let what =
                        format!("{CALLS} calls are worked on already; wait for their answers");
                    let refused = Status::new(rpc::code::RESOURCE_EXHAUSTED, what);
                    respond(stream, Err(refused), &out).await;
                    continue;
                };
                let (answer, out) = (answer.clone(), out.clone());
                tokio::spawn(async move {
                    let result = if request.service == rpc::RUNTIME_SERVICE {
                        answer(request.method, request.payload).await
                    } else {
                        let what = format!("there is no service {:?} here", request.service);
                        Err(Status::new(rpc::code::UNIMPLEMENTED, what))
                    };
                    respond(stream, result, &out).await;
                    drop(turn);
                });
            }
        }
        let buffer = frames.buffer();
        buffer.reserve(4096);
        let read = from.read_buf(buffer).await;
        match read {
            Ok(0) | Err(_) => return Ok(()),
            Ok(_) => {}
        }
    }
}

async fn respond(stream: u32, result: Result<Vec<u8>, Status>, out: &mpsc::Sender<BytesMut>) {
    let response = match result {
        Ok(payload) => Response {
            status: None,
            payload: payload.into(),
        },
        Err(status) => Response {
            status: Some(status),
            payload: Bytes::new(),
        },
    };
    let message = match Message::Response(stream, response).encode() {
        Ok(message) => message,
        Err(error) => {
            tracing::error!(%error, "an answer to an NRI plugin can't be sent");
            return;
        }
    };
    let mut frames = BytesMut::with_capacity(message.len() + 16);
    frame::write(&mut frames, frame::RUNTIME, &message);
    let _ = out.send(frames).await;
}
