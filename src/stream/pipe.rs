//! A bounded pipe of bytes from a connection's reader to whoever reads one of its streams.

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, ReadBuf};

/// What a pipe holds before its writer waits.
pub(crate) const CAPACITY: usize = 128 * 1024;

/// Makes a pipe.
pub(crate) fn pipe() -> (PipeWriter, PipeReader) {
    let state = Arc::new(Mutex::new(State::default()));
    (PipeWriter(state.clone()), PipeReader(state))
}

/// What a write to a stream that has ended says.
pub(crate) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the stream is closed")
}

#[derive(Debug, Default)]
struct State {
    buffer: BytesMut,
    end: Option<End>,
    reader_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Finished,
    Failed,
}

/// The end that a connection writes to. There is one writing task for each pipe, but any holder may
/// end it.
#[derive(Clone)]
pub(crate) struct PipeWriter(Arc<Mutex<State>>);

/// The end that a session reads.
#[derive(Debug)]
pub(crate) struct PipeReader(Arc<Mutex<State>>);

impl PipeWriter {
    /// Puts bytes in, waiting for room. What nobody will read is dropped.
    pub(crate) async fn write(&self, mut bytes: &[u8]) {
        poll_fn(|context| self.poll_write(&mut bytes, context)).await;
    }

    fn poll_write(&self, bytes: &mut &[u8], context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.lock();
        if state.reader_gone || state.end.is_some() {
            return Poll::Ready(());
        }
        let room = CAPACITY.saturating_sub(state.buffer.len());
        let (now, later) = bytes.split_at(room.min(bytes.len()));
        if !now.is_empty() {
            state.buffer.extend_from_slice(now);
            *bytes = later;
            if let Some(reader) = state.reader.take() {
                reader.wake();
            }
        }
        if later.is_empty() {
            return Poll::Ready(());
        }
        state.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// The reader shall see an end after what is in the pipe.
    pub(crate) fn finish(&self) {
        self.end(End::Finished);
    }

    /// The reader shall see an error after what is in the pipe, unless the pipe is finished.
    pub(crate) fn fail(&self) {
        self.end(End::Failed);
    }

    fn end(&self, end: End) {
        let mut state = self.0.lock();
        state.end.get_or_insert(end);
        let wakers = [state.reader.take(), state.writer.take()];
        drop(state);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl PipeReader {
    /// Takes what is in the pipe now.
    pub(crate) fn take(&mut self) -> BytesMut {
        let mut state = self.0.lock();
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
        std::mem::take(&mut state.buffer)
    }
}

impl AsyncRead for PipeReader {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        let length = out.remaining().min(state.buffer.len());
        if length > 0 {
            out.put_slice(&state.buffer[..length]);
            state.buffer.advance(length);
            if state.buffer.is_empty() {
                // An idle stream holds no memory.
                state.buffer = BytesMut::new();
            }
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Ok(()));
        }
        match state.end {
            _ if out.remaining() == 0 => Poll::Ready(Ok(())),
            Some(End::Finished) => Poll::Ready(Ok(())),
            Some(End::Failed) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the client has gone or reset the stream",
            ))),
            None => {
                state.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.reader_gone = true;
        state.buffer = BytesMut::new();
        let writer = state.writer.take();
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;
    use tokio::time::timeout;

    #[tokio::test]
    async fn what_goes_in_comes_out_and_then_the_end() {
        let (writer, mut reader) = pipe();
        let sent: Vec<u8> = (0..CAPACITY * 3).map(|n| (n * 7 % 251) as u8).collect();
        let expected = sent.clone();
        let task = tokio::spawn(async move {
            writer.write(&sent).await;
            writer.finish();
            writer.fail();
            writer.write(b"too late").await;
        });
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_full_pipe_holds_its_writer_until_the_reader_reads_or_goes() {
        let (writer, mut reader) = pipe();
        writer.write(&vec![1; CAPACITY]).await;
        let blocked = Duration::from_millis(50);
        assert!(timeout(blocked, writer.write(b"x")).await.is_err());
        reader.read_exact(&mut [0; 1]).await.unwrap();
        timeout(blocked, writer.write(b"x")).await.unwrap();
        let write = tokio::spawn(async move { writer.write(&vec![2; CAPACITY]).await });
        tokio::time::sleep(blocked).await;
        assert!(!write.is_finished());
        drop(reader);
        write.await.unwrap();
    }

    #[tokio::test]
    async fn a_failed_pipe_gives_what_it_has_and_then_an_error() {
        let (writer, mut reader) = pipe();
        writer.write(b"last words").await;
        writer.fail();
        let mut got = Vec::new();
        let error = reader.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(got, b"last words");
    }
}
