//! Terminal sizes, as clients send them: JSON objects one after the other.

use crate::pipe::PipeReader;
use crate::{Resizes, TerminalSize};
use parking_lot::Mutex;
use serde_json::Deserializer;
use serde_json::error::Category;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// The longest object that is waited for.
const MAX_OBJECT: usize = 4096;

/// Takes sizes out of a stream of bytes.
#[derive(Debug, Default)]
pub struct ResizeDecoder {
    buffer: Vec<u8>,
    broken: bool,
}

impl ResizeDecoder {
    /// Adds bytes, and gives the last size that is complete with them: those before it are out of
    /// date. After something that isn't a size there are no more.
    pub fn push(&mut self, bytes: &[u8]) -> Option<TerminalSize> {
        if self.broken {
            return None;
        }
        let mut last = None;
        for part in bytes.chunks(MAX_OBJECT) {
            self.buffer.extend_from_slice(part);
            let mut sizes = Deserializer::from_slice(&self.buffer).into_iter::<TerminalSize>();
            loop {
                match sizes.next() {
                    Some(Ok(size)) => last = Some(size),
                    None => break,
                    Some(Err(error)) => {
                        self.broken = error.classify() != Category::Eof;
                        break;
                    }
                }
            }
            let used = sizes.byte_offset();
            self.buffer.drain(..used);
            if self.broken || self.buffer.len() > MAX_OBJECT {
                self.broken = true;
                self.buffer = Vec::new();
                break;
            }
        }
        last
    }
}

/// Where the sizes of one client come from.
#[derive(Debug)]
pub(crate) struct Source {
    input: Mutex<Decoding>,
    sizes: watch::Sender<Option<TerminalSize>>,
}

#[derive(Debug)]
struct Decoding {
    input: PipeReader,
    decoder: ResizeDecoder,
}

impl Source {
    /// Takes what has come already.
    pub(crate) fn catch_up(&self) {
        // The lock is held to the end: sizes are told in the order in which they came.
        let mut input = self.input.lock();
        let bytes = input.input.take();
        self.tell(&mut input, &bytes);
    }

    fn tell(&self, input: &mut Decoding, bytes: &[u8]) {
        if let Some(size) = input.decoder.push(bytes) {
            self.sizes.send_replace(Some(size));
        }
    }

    /// Reads to the end.
    fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut input = self.input.lock();
        let mut buffer = [0; 1024];
        loop {
            let mut read = ReadBuf::new(&mut buffer);
            let result = ready!(Pin::new(&mut input.input).poll_read(context, &mut read));
            if result.is_err() || read.filled().is_empty() {
                return Poll::Ready(());
            }
            self.tell(&mut input, read.filled());
        }
    }
}

/// Watches what a client says about its terminal, as long as it lives.
pub(crate) struct ResizeWatch {
    pub(crate) resizes: Resizes,
    _task: AbortOnDropHandle<()>,
}

impl ResizeWatch {
    /// Without an input, or after its end, there are just no more sizes; the session goes on.
    pub(crate) fn start(input: Option<PipeReader>) -> Self {
        let (sizes, receiver) = watch::channel(None);
        let decoder = ResizeDecoder::default();
        let source = input.map(|input| {
            let input = Mutex::new(Decoding { input, decoder });
            Arc::new(Source {
                input,
                sizes: sizes.clone(),
            })
        });
        let resizes = Resizes::new(receiver, source.as_ref());
        let task = tokio::spawn(async move {
            // The sender is kept: its end would be the end of all sizes.
            let _sizes = sizes;
            if let Some(source) = &source {
                poll_fn(|context| source.poll(context)).await;
            }
            pending().await
        });
        Self {
            resizes,
            _task: AbortOnDropHandle::new(task),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: u16, height: u16) -> Option<TerminalSize> {
        Some(TerminalSize { width, height })
    }

    #[test]
    fn sizes_come_in_any_pieces() {
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(br#"{"Width":80,"#), None);
        assert_eq!(decoder.push(b"\"Height\":24}\n"), size(80, 24));
        let storm = br#"{"Width":1,"Height":2}{"Width":3,"Height":4} {"Wid"#;
        assert_eq!(decoder.push(storm), size(3, 4));
        assert_eq!(decoder.push(br#"th":5,"Height":6}"#), size(5, 6));
        assert_eq!(decoder.push(b""), None);
    }

    #[test]
    fn what_is_no_size_ends_it() {
        for bad in ["nonsense", r#"{"Width":-1}"#, r#"{"Width":70000}"#, "7"] {
            let mut decoder = ResizeDecoder::default();
            let both = format!(r#"{{"Width":80,"Height":24}}{bad}"#);
            assert_eq!(decoder.push(both.as_bytes()), size(80, 24), "{bad}");
            decoder.push(b" ");
            assert_eq!(decoder.push(br#"{"Width":1,"Height":1}"#), None, "{bad}");
        }
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(&[b'['; 100_000]), None);
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(&vec![b' '; 100_000]), None);
        assert_eq!(decoder.push(br#"{"Width":1,"Height":1}"#), size(1, 1));
        assert!(decoder.buffer.len() <= MAX_OBJECT);
    }

    #[tokio::test]
    async fn what_came_before_is_told_before() {
        let (writer, reader) = crate::pipe::pipe();
        let watch = ResizeWatch::start(Some(reader));
        let mut resizes = watch.resizes.clone();
        assert_eq!(resizes.latest(), None);
        // The task has had no chance to run.
        writer.write(br#"{"Width":80,"Height":24}"#).await;
        assert_eq!(resizes.latest(), size(80, 24));
        assert_eq!(resizes.latest(), None);
        writer.write(br#"{"Width":90,"Height":25}"#).await;
        assert_eq!(resizes.next().await, size(90, 25));
        writer.finish();
        drop(watch);
        assert_eq!(resizes.next().await, None);
        assert_eq!(resizes.latest(), None);
        let none = ResizeWatch::start(None);
        assert_eq!(none.resizes.clone().latest(), None);
    }
}
