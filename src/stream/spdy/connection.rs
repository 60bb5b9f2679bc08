//! A connection whose streams the peer opens.

use super::decode::{Decoder, Event};
use super::frame::{
    Encoder, Frame, FrameError, INITIAL_WINDOW, MAX_31, SETTING_INITIAL_WINDOW, goaway, reset,
};
use super::state::{Outgoing, Shared};
use super::stream::Stream;
use crate::activity::Activity;
use crate::peer::Peer;
use crate::pipe::{PipeWriter, pipe};
use bytes::BytesMut;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

/// Data frames that wait to be written.
const DATA_QUEUE: usize = 8;
/// Control frames that wait to be written.
const CONTROL_QUEUE: usize = 1024;
const READ_BUFFER: usize = 32 * 1024;
/// What is written at once.
const WRITE_BATCH: usize = 64 * 1024;
/// When what was received is given back to the peer's windows, which we opened to 2^31 - 1.
const WINDOW_REFILL: u32 = 1 << 30;
/// How long the peer may take to close after we have.
const LINGER: Duration = Duration::from_secs(5);

/// What a connection may use.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Streams that are open at once.
    pub(crate) streams: usize,
    /// Time without a frame.
    pub(crate) idle: Duration,
}

/// The server's end of a SPDY/3.1 connection.
pub(crate) struct Connection {
    opened: mpsc::Receiver<Stream>,
    shared: Arc<Shared>,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

impl Connection {
    /// Begins to read and write. `gone` fires when the peer goes, breaks the protocol or is idle.
    pub(crate) fn start<T>(io: T, peer: Peer, limits: Limits, gone: CancellationToken) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (input, output) = tokio::io::split(io);
        let (control, control_queue) = mpsc::channel(CONTROL_QUEUE);
        let (data, data_queue) = mpsc::channel(DATA_QUEUE);
        let (opener, opened) = mpsc::channel(limits.streams);
        let shared = Arc::new(Shared::new(control, data, gone));
        let activity = Activity::new();
        // A peer with windows may fill them; one without skips these frames.
        shared.control(Frame::Settings(vec![(SETTING_INITIAL_WINDOW, MAX_31)]));
        shared.control(Frame::WindowUpdate {
            id: 0,
            delta: MAX_31 - INITIAL_WINDOW,
        });
        let writer = Writer {
            output,
            control: control_queue,
            data: data_queue,
            activity: activity.clone(),
        };
        let reader = Reader {
            shared: shared.clone(),
            peer,
            opener,
            limit: limits.streams,
            received: HashMap::new(),
            activity: activity.clone(),
        };
        Self {
            opened,
            reader: spawn(reader.run(input)),
            writer: spawn(writer.run(shared.clone(), limits.idle)),
            shared,
        }
    }

    /// The next stream that the peer opens; `None` when there will be none any more.
    pub(crate) async fn open(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Says goodbye after all that was written, and waits until it is on its way and the peer has
    /// closed.
    pub(crate) async fn finish(self) {
        let last_good = {
            let mut state = self.shared.lock();
            state.closing = true;
            state.last
        };
        let frame = Frame::GoAway {
            last_good,
            status: goaway::OK,
        };
        // They fail if the connection has ended.
        let _ = self.shared.data.send(Outgoing::Frame(frame)).await;
        let _ = self.shared.data.send(Outgoing::Close).await;
        self.end().await;
    }

    /// Waits for what is being written. Closing while the peer still sends would reset the
    /// connection, and the peer might lose what is on its way; so the rest is read for a while.
    async fn end(self) {
        drop(self.opened);
        let _ = self.writer.await;
        let _ = tokio::time::timeout(LINGER, self.reader).await;
    }
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    let handle: JoinHandle<()> = tokio::spawn(task);
    AbortOnDropHandle::new(handle)
}

struct Reader {
    shared: Arc<Shared>,
    peer: Peer,
    opener: mpsc::Sender<Stream>,
    limit: usize,
    /// What came since the peer's windows were refilled, by stream; 0 is the connection.
    received: HashMap<u32, u32>,
    activity: Activity,
}

impl Reader {
    async fn run(mut self, input: impl AsyncRead + Unpin) {
        let mut input = input;
        if let Err(error) = self.read(&mut input).await {
            debug!(%error, "a SPDY client broke the protocol");
            self.shared.lock().closing = true;
            let last_good = self.shared.lock().last;
            self.shared.close_with(Frame::GoAway {
                last_good,
                status: goaway::PROTOCOL_ERROR,
            });
            self.shared.gone.cancel();
            self.shared.fail_all();
            // What is left unread would reset the connection before the peer has seen why.
            let mut rest = tokio::io::sink();
            let drain = tokio::io::copy(&mut input, &mut rest);
            let _ = tokio::time::timeout(LINGER, drain).await;
        }
        self.shared.gone.cancel();
        self.shared.fail_all();
    }

    async fn read(&mut self, input: &mut (impl AsyncRead + Unpin)) -> Result<(), FrameError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        loop {
            while let Some(event) = decoder.decode(&mut buffer)? {
                self.activity.touch();
                match event {
                    Event::Data { id, bytes, fin } => self.data(id, &bytes, fin).await,
                    Event::Frame(frame) => self.frame(frame),
                }
            }
            buffer.reserve(READ_BUFFER);
            match input.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => {}
            }
        }
    }

    async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let pipe = {
            let state = self.shared.lock();
            match state.streams.get(&id) {
                Some(stream) if !stream.remote_closed => Some(stream.pipe.clone()),
                // A frame that crossed our RST_STREAM, or what the peer's FIN made nonsense.
                _ if id <= state.last => None,
                _ => {
                    drop(state);
                    return self.shared.reset(id, reset::INVALID_STREAM);
                }
            }
        };
        self.refill(0, bytes.len());
        let Some(pipe) = pipe else { return };
        self.write(&pipe, bytes).await;
        if fin {
            self.received.remove(&id);
            self.shared.finished_by_peer(id);
        } else {
            self.refill(id, bytes.len());
        }
    }

    /// Hands bytes on. While nobody takes them the connection isn't read, and so wouldn't be seen
    /// to close.
    async fn write(&self, pipe: &PipeWriter, bytes: &[u8]) {
        tokio::select! {
            biased;
            () = pipe.write(bytes) => {}
            () = self.peer.closed() => self.shared.gone.cancel(),
        }
    }

    fn refill(&mut self, id: u32, length: usize) {
        let received = self.received.entry(id).or_default();
        *received += length as u32;
        if *received >= WINDOW_REFILL {
            let delta = std::mem::take(received);
            self.shared.control(Frame::WindowUpdate { id, delta });
        }
    }

    fn frame(&mut self, frame: Frame) {
        match frame {
            Frame::SynStream {
                id,
                headers,
                fin,
                unidirectional,
            } => self.open(id, headers, fin, unidirectional),
            Frame::RstStream { id, .. } => {
                self.received.remove(&id);
                self.shared.reset_by_peer(id);
            }
            Frame::Settings(entries) => {
                for (id, value) in entries {
                    if id == SETTING_INITIAL_WINDOW {
                        self.shared.set_initial_window(value);
                    }
                }
            }
            // Even pings would be answers to ours, of which there are none.
            Frame::Ping(id) if id % 2 == 1 => self.shared.control(Frame::Ping(id)),
            Frame::WindowUpdate { id, delta } => self.shared.window_update(id, delta),
            Frame::GoAway { .. } => self.shared.lock().closing = true,
            Frame::Headers { id, fin: true, .. } => self.shared.finished_by_peer(id),
            Frame::Ping(_) | Frame::SynReply { .. } | Frame::Headers { .. } => {}
        }
    }

    fn open(&self, id: u32, headers: super::Headers, fin: bool, unidirectional: bool) {
        let mut state = self.shared.lock();
        if id.is_multiple_of(2) || id <= state.last {
            drop(state);
            return self.shared.reset(id, reset::PROTOCOL_ERROR);
        }
        state.last = id;
        let full = state.closing || state.streams.len() >= self.limit;
        if full || unidirectional {
            drop(state);
            return self.shared.reset(id, reset::REFUSED_STREAM);
        }
        let (writer, reader) = pipe();
        if fin {
            writer.finish();
        }
        state.insert(id, writer, fin);
        drop(state);
        let stream = Stream {
            id,
            headers,
            reader,
            shared: self.shared.clone(),
        };
        if let Err(error) = self.opener.try_send(stream) {
            error.into_inner().refuse();
        }
    }
}

struct Writer<T> {
    output: T,
    control: mpsc::Receiver<Outgoing>,
    data: mpsc::Receiver<Outgoing>,
    activity: Activity,
}

impl<T: AsyncWrite + Unpin> Writer<T> {
    async fn run(mut self, shared: Arc<Shared>, idle: Duration) {
        let activity = self.activity.clone();
        tokio::select! {
            () = self.write() => {}
            () = activity.idle_for(idle) => {
                debug!("a streaming connection was idle for too long");
                let bye = Frame::GoAway { last_good: shared.lock().last, status: goaway::OK };
                let mut out = BytesMut::new();
                Encoder::default().encode(&bye, &mut out);
                let _ = tokio::time::timeout(LINGER, self.output.write_all(&out)).await;
            }
        }
        // The peer may still send, but nothing can be answered: what is there ends.
        shared.gone.cancel();
        shared.fail_all();
        self.control.close();
        self.data.close();
        let _ = tokio::time::timeout(LINGER, self.output.shutdown()).await;
    }

    /// Writes until told to close, or the peer can't be written to.
    async fn write(&mut self) {
        let mut encoder = Encoder::default();
        let mut out = BytesMut::new();
        let mut open = true;
        while open {
            let next = tokio::select! {
                biased;
                Some(next) = self.control.recv() => next,
                Some(next) = self.data.recv() => next,
                else => return,
            };
            open = put(&mut encoder, next, &mut out);
            while open && out.len() < WRITE_BATCH {
                let Ok(next) = self.control.try_recv().or_else(|_| self.data.try_recv()) else {
                    break;
                };
                open = put(&mut encoder, next, &mut out);
            }
            if self.output.write_all(&out).await.is_err() || self.output.flush().await.is_err() {
                return;
            }
            self.activity.touch();
            out.clear();
        }
    }
}

/// Encodes what is to be written. False if nothing comes after it.
fn put(encoder: &mut Encoder, next: Outgoing, out: &mut BytesMut) -> bool {
    match next {
        Outgoing::Frame(frame) => encoder.encode(&frame, out),
        Outgoing::Data { id, bytes, fin } => Encoder::encode_data(id, &bytes, fin, out),
        Outgoing::Close => return false,
    }
    true
}
