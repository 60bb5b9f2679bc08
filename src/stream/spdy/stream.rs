//! One stream of a connection.

use super::frame::{Frame, reset};
use super::headers::Headers;
use super::state::{Outgoing, Shared};
use crate::pipe::{PipeReader, closed};
use bytes::Bytes;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;
use tokio_util::sync::PollSender;

/// The most that goes into one data frame.
const CHUNK: usize = 32 * 1024;

/// A stream that the peer opened. It is open until it is closed or reset explicitly, or its
/// connection ends.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) reader: PipeReader,
    pub(super) shared: Arc<Shared>,
}

impl Stream {
    /// Takes the stream: a peer sends nothing before that.
    pub(crate) fn accept(&self) {
        self.shared.control(Frame::SynReply {
            id: self.id,
            headers: Headers::default(),
            fin: false,
        });
    }

    /// Refuses the stream.
    pub(crate) fn refuse(self) {
        self.shared.reset_by_peer(self.id);
        self.shared.reset(self.id, reset::REFUSED_STREAM);
    }

    /// The parts: what comes, what goes, and the end.
    pub(crate) fn split(self) -> (PipeReader, StreamWriter, Closer) {
        let sender = PollSender::new(self.shared.data.clone());
        let closer = Closer {
            id: self.id,
            shared: self.shared.clone(),
        };
        let writer = StreamWriter {
            id: self.id,
            shared: self.shared,
            sender,
        };
        (self.reader, writer, closer)
    }
}

/// Ends a stream, whoever has its writer.
pub(crate) struct Closer {
    id: u32,
    shared: Arc<Shared>,
}

impl Closer {
    /// Says, after all that was written, that there is no more.
    pub(crate) async fn finish(&self) {
        if self.shared.lock().close_local(self.id) {
            let fin = Outgoing::Data {
                id: self.id,
                bytes: Bytes::new(),
                fin: true,
            };
            // It fails if the connection has ended.
            let _ = self.shared.data.send(fin).await;
        }
    }

    /// Ends both directions at once, after what was written. Nothing happens if they have ended.
    pub(crate) async fn reset(&self) {
        let stream = self.shared.lock().streams.remove(&self.id);
        if let Some(stream) = stream {
            stream.end();
            let frame = Frame::RstStream {
                id: self.id,
                status: reset::CANCEL,
            };
            let _ = self.shared.data.send(Outgoing::Frame(frame)).await;
        }
    }
}

/// Writes data frames. Dropping it does not end the stream.
pub(crate) struct StreamWriter {
    id: u32,
    shared: Arc<Shared>,
    sender: PollSender<Outgoing>,
}

impl AsyncWrite for StreamWriter {
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
        // The lock is held until the bytes are in the queue, so that nothing follows a FIN.
        let mut state = this.shared.lock();
        let length = match state.take_window(this.id, bytes.len().min(CHUNK), context) {
            Some(0) => {
                this.sender.abort_send();
                return Poll::Pending;
            }
            Some(length) => length,
            None => {
                this.sender.abort_send();
                return Poll::Ready(Err(closed()));
            }
        };
        let data = Outgoing::Data {
            id: this.id,
            bytes: Bytes::copy_from_slice(&bytes[..length]),
            fin: false,
        };
        this.sender.send_item(data).map_err(|_| closed())?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(this.sender.poll_reserve(context)).map_err(|_| closed())?;
        let mut state = this.shared.lock();
        if !state.close_local(this.id) {
            this.sender.abort_send();
            return Poll::Ready(Ok(()));
        }
        let fin = Outgoing::Data {
            id: this.id,
            bytes: Bytes::new(),
            fin: true,
        };
        this.sender.send_item(fin).map_err(|_| closed())?;
        Poll::Ready(Ok(()))
    }
}
