//! A WebSocket whose messages belong to channels.

use super::channel::{Codec, Inbound, payload};
use crate::activity::Activity;
use crate::peer::Peer;
use crate::pipe::{PipeWriter, closed};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use parking_lot::Mutex;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::{CancellationToken, PollSender};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

/// Messages that wait to be written.
const QUEUE: usize = 8;
/// The most that goes into one message.
const CHUNK: usize = 32 * 1024;
/// How long the client may take to close after we have.
const LINGER: Duration = Duration::from_secs(5);

/// The server's end of a connection with channels.
pub(crate) struct Channels {
    shared: Arc<Shared>,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

struct Shared {
    codec: Codec,
    /// No channel may be written to any more.
    ended: Mutex<bool>,
    data: mpsc::Sender<Message>,
    gone: CancellationToken,
}

impl Channels {
    /// Begins to read and write. What comes on channel n goes into the nth of `inputs`. `gone`
    /// fires when the client goes, breaks the protocol or is idle.
    pub(crate) fn start<T>(
        socket: WebSocketStream<T>,
        codec: Codec,
        inputs: Vec<Option<PipeWriter>>,
        peer: Peer,
        idle: Duration,
        gone: CancellationToken,
    ) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sink, stream) = socket.split();
        let (data, data_queue) = mpsc::channel(QUEUE);
        let (goodbye, goodbye_queue) = mpsc::channel(1);
        let activity = Activity::new();
        let shared = Arc::new(Shared {
            codec,
            ended: Mutex::new(false),
            data,
            gone: gone.clone(),
        });
        let reader = Reader {
            codec,
            inputs,
            peer,
            gone: gone.clone(),
            activity: activity.clone(),
        };
        let writer = write(sink, data_queue, goodbye_queue, activity, idle, gone);
        Self {
            shared,
            reader: AbortOnDropHandle::new(tokio::spawn(reader.run(stream, goodbye))),
            writer: AbortOnDropHandle::new(tokio::spawn(writer)),
        }
    }

    /// Writes to a channel.
    pub(crate) fn writer(&self, channel: u8) -> ChannelWriter {
        ChannelWriter {
            channel,
            shared: self.shared.clone(),
            sender: PollSender::new(self.shared.data.clone()),
        }
    }

    /// Sends one message as it is, even an empty one.
    pub(crate) async fn send(&self, channel: u8, data: &[u8]) {
        let message = self.shared.codec.write(channel, data);
        // It fails if the connection has ended.
        let _ = self.shared.data.send(message).await;
    }

    /// No [`ChannelWriter`] can write any more.
    pub(crate) fn end_writers(&self) {
        *self.shared.ended.lock() = true;
    }

    /// Closes after all that was written, and waits until the client has closed too.
    pub(crate) async fn finish(self) {
        self.end_writers();
        let _ = self.shared.data.send(close(CloseCode::Normal, "")).await;
        let _ = self.writer.await;
        let _ = tokio::time::timeout(LINGER, self.reader).await;
    }
}

fn close(code: CloseCode, reason: &'static str) -> Message {
    Message::Close(Some(CloseFrame {
        code,
        reason: reason.into(),
    }))
}

struct Reader {
    codec: Codec,
    inputs: Vec<Option<PipeWriter>>,
    peer: Peer,
    gone: CancellationToken,
    activity: Activity,
}

impl Reader {
    async fn run<T>(
        self,
        mut stream: SplitStream<WebSocketStream<T>>,
        goodbye: mpsc::Sender<Message>,
    ) where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let error = self.read(&mut stream).await;
        self.gone.cancel();
        self.inputs.iter().flatten().for_each(PipeWriter::fail);
        if let Some((code, reason)) = error {
            debug!(reason, "a WebSocket client broke the protocol");
            let _ = goodbye.try_send(close(code, reason));
            let drain = async { while let Some(Ok(_)) = stream.next().await {} };
            let _ = tokio::time::timeout(LINGER, drain).await;
        }
    }

    /// Reads to the end, and says what to tell a client that broke the protocol.
    async fn read<T>(
        &self,
        stream: &mut SplitStream<WebSocketStream<T>>,
    ) -> Option<(CloseCode, &'static str)>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            let message = match stream.next().await? {
                Ok(message) => message,
                Err(Error::Capacity(_)) => return Some((CloseCode::Size, "message too large")),
                Err(Error::Utf8(_)) => return Some((CloseCode::Invalid, "text is not UTF-8")),
                Err(Error::Protocol(_)) => return Some((CloseCode::Protocol, "protocol error")),
                Err(_) => return None,
            };
            self.activity.touch();
            if message.is_close() {
                self.gone.cancel();
                continue;
            }
            let Some(bytes) = payload(message) else {
                continue;
            };
            match self.codec.read(&bytes) {
                Inbound::Data(channel, data) => {
                    if let Some(Some(input)) = self.inputs.get(usize::from(channel)) {
                        self.write(input, &data).await;
                    }
                }
                Inbound::Close(channel) => match self.inputs.get(usize::from(channel)) {
                    Some(Some(input)) => input.finish(),
                    Some(None) => {}
                    None => return Some((CloseCode::Protocol, "no such channel")),
                },
                Inbound::Nothing => {}
                Inbound::Malformed => return Some((CloseCode::Protocol, "malformed message")),
            }
        }
    }

    /// Hands bytes on. While nobody takes them the connection isn't read, and so wouldn't be seen
    /// to close.
    async fn write(&self, input: &PipeWriter, bytes: &[u8]) {
        tokio::select! {
            biased;
            () = input.write(bytes) => {}
            () = self.peer.closed() => self.gone.cancel(),
        }
    }
}

async fn write<T>(
    mut sink: SplitSink<WebSocketStream<T>, Message>,
    mut data: mpsc::Receiver<Message>,
    mut goodbye: mpsc::Receiver<Message>,
    activity: Activity,
    idle: Duration,
    gone: CancellationToken,
) where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let timer = activity.clone();
    let work = async {
        let mut open = true;
        while open {
            let mut next = tokio::select! {
                biased;
                Some(next) = goodbye.recv() => next,
                Some(next) = data.recv() => next,
                else => return,
            };
            loop {
                open = !next.is_close();
                if sink.feed(next).await.is_err() {
                    return;
                }
                match data.try_recv() {
                    Ok(more) if open => next = more,
                    _ => break,
                }
            }
            if sink.flush().await.is_err() {
                return;
            }
            activity.touch();
        }
    };
    let idle = tokio::select! {
        () = work => false,
        () = timer.idle_for(idle) => true,
    };
    if idle {
        debug!("a streaming connection was idle for too long");
        let bye = sink.send(close(CloseCode::Away, "idle for too long"));
        let _ = tokio::time::timeout(LINGER, bye).await;
    }
    gone.cancel();
}

/// Writes messages of one channel. Dropping it says nothing to the client: there is no message for
/// that.
pub(crate) struct ChannelWriter {
    channel: u8,
    shared: Arc<Shared>,
    sender: PollSender<Message>,
}

impl AsyncWrite for ChannelWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let this = &mut *self;
        ready!(this.sender.poll_reserve(context)).map_err(|_| closed())?;
        let ended = this.shared.ended.lock();
        if *ended || (this.shared.gone.is_cancelled() && this.shared.data.is_closed()) {
            this.sender.abort_send();
            return Poll::Ready(Err(closed()));
        }
        let length = bytes.len().min(CHUNK);
        let message = this.shared.codec.write(this.channel, &bytes[..length]);
        this.sender.send_item(message).map_err(|_| closed())?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
