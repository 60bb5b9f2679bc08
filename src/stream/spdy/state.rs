//! What a connection's reader, writer and streams share.

use super::frame::{Frame, INITIAL_WINDOW, MAX_31, reset};
use crate::pipe::PipeWriter;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::task::{Context, Waker};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Something to write.
pub(super) enum Outgoing {
    Frame(Frame),
    Data {
        id: u32,
        bytes: Bytes,
        fin: bool,
    },
    /// Nothing comes after this.
    Close,
}

/// A connection, as its parts see it.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Overtakes data. Bounded, and never waited for: a peer that makes us answer more than it
    /// reads loses its connection.
    control: mpsc::Sender<Outgoing>,
    /// Stays in order.
    pub(super) data: mpsc::Sender<Outgoing>,
    /// Fires when the peer has gone.
    pub(super) gone: CancellationToken,
}

/// Streams and windows.
pub(super) struct State {
    pub(super) streams: HashMap<u32, StreamState>,
    /// The last stream that the peer opened.
    pub(super) last: u32,
    /// No stream is taken any more.
    pub(super) closing: bool,
    /// Whether the peer has windows for streams, and for the connection.
    stream_windows: bool,
    connection_windows: bool,
    initial_window: i64,
    connection_window: i64,
}

/// A stream that isn't closed from both ends.
pub(super) struct StreamState {
    pub(super) pipe: PipeWriter,
    /// The peer sends nothing more.
    pub(super) remote_closed: bool,
    /// We send nothing more.
    pub(super) local_closed: bool,
    /// What we may send; counted from the start, heeded once the peer turns out to have windows.
    window: i64,
    /// Who waits for the window.
    waiting: Option<Waker>,
}

impl Shared {
    pub(super) fn new(
        control: mpsc::Sender<Outgoing>,
        data: mpsc::Sender<Outgoing>,
        gone: CancellationToken,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                streams: HashMap::new(),
                last: 0,
                closing: false,
                stream_windows: false,
                connection_windows: false,
                initial_window: i64::from(INITIAL_WINDOW),
                connection_window: i64::from(INITIAL_WINDOW),
            }),
            control,
            data,
            gone,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Sends a control frame ahead of all data.
    pub(super) fn control(&self, frame: Frame) {
        if self.control.try_send(Outgoing::Frame(frame)).is_err() {
            self.gone.cancel();
        }
    }

    /// Sends a last frame ahead of all data, and nothing else.
    pub(super) fn close_with(&self, frame: Frame) {
        self.control(frame);
        if self.control.try_send(Outgoing::Close).is_err() {
            self.gone.cancel();
        }
    }

    pub(super) fn reset(&self, id: u32, status: u32) {
        self.control(Frame::RstStream { id, status });
    }

    /// The peer has gone: whoever reads or waits learns of it.
    pub(super) fn fail_all(&self) {
        let streams = std::mem::take(&mut self.lock().streams);
        for stream in streams.into_values() {
            stream.end();
        }
    }

    /// The peer's RST_STREAM.
    pub(super) fn reset_by_peer(&self, id: u32) {
        let stream = self.lock().streams.remove(&id);
        if let Some(stream) = stream {
            stream.end();
        }
    }

    /// The peer's FIN.
    pub(super) fn finished_by_peer(&self, id: u32) {
        let mut state = self.lock();
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.remote_closed = true;
            stream.pipe.finish();
            if stream.local_closed {
                state.streams.remove(&id);
            }
        }
    }

    /// The peer's SETTINGS: the window that each stream begins with.
    pub(super) fn set_initial_window(&self, value: u32) {
        let mut state = self.lock();
        let value = i64::from(value & MAX_31);
        let change = value - state.initial_window;
        state.initial_window = value;
        state.stream_windows = true;
        for stream in state.streams.values_mut() {
            stream.window += change;
            stream.wake();
        }
    }

    /// The peer's WINDOW_UPDATE.
    pub(super) fn window_update(&self, id: u32, delta: u32) {
        let mut state = self.lock();
        let limit = i64::from(MAX_31);
        if id == 0 {
            state.connection_windows = true;
            state.connection_window = (state.connection_window + i64::from(delta)).min(limit);
            state.streams.values_mut().for_each(StreamState::wake);
            return;
        }
        state.stream_windows = true;
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.window += i64::from(delta);
            if stream.window > limit {
                let stream = state.streams.remove(&id);
                drop(state);
                if let Some(stream) = stream {
                    stream.end();
                }
                return self.reset(id, reset::FLOW_CONTROL_ERROR);
            }
        }
        // That windows are heeded from now on concerns every stream.
        state.streams.values_mut().for_each(StreamState::wake);
    }
}

impl State {
    pub(super) fn insert(&mut self, id: u32, pipe: PipeWriter, fin: bool) {
        let stream = StreamState {
            pipe,
            remote_closed: fin,
            local_closed: false,
            window: self.initial_window,
            waiting: None,
        };
        self.streams.insert(id, stream);
    }

    /// How many of `wanted` bytes may be sent on a stream, and takes them from the windows. 0: the
    /// caller is woken when there may be more. `None`: the stream is closed.
    pub(super) fn take_window(
        &mut self,
        id: u32,
        wanted: usize,
        context: &Context<'_>,
    ) -> Option<usize> {
        let stream = self.streams.get_mut(&id)?;
        if stream.local_closed {
            return None;
        }
        let mut allowed = i64::try_from(wanted).unwrap_or(i64::MAX);
        if self.stream_windows {
            allowed = allowed.min(stream.window);
        }
        if self.connection_windows {
            allowed = allowed.min(self.connection_window);
        }
        if allowed <= 0 {
            stream.waiting = Some(context.waker().clone());
            return Some(0);
        }
        stream.window -= allowed;
        self.connection_window -= allowed;
        usize::try_from(allowed).ok()
    }

    /// We send nothing more on a stream; whether we had yet to say so.
    pub(super) fn close_local(&mut self, id: u32) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        if stream.local_closed {
            return false;
        }
        stream.local_closed = true;
        stream.wake();
        if stream.remote_closed {
            self.streams.remove(&id);
        }
        true
    }
}

impl StreamState {
    fn wake(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            waiting.wake();
        }
    }

    pub(super) fn end(mut self) {
        self.pipe.fail();
        self.wake();
    }
}
