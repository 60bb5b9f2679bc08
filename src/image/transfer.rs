//! The transfer of one blob: bounded, and resumed when it breaks.
//!
//! What arrives is handed on at once, through a short channel, to the blocking thread that unpacks
//! it. A transfer that breaks goes on with a range request where it stopped, so that the receiver
//! never notices.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE};
use tokio::sync::mpsc;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::meter::LayerMeter;
use crate::registry::{self, Repository};

/// Chunks that may wait for the unpacking thread; each is what one read from the network gave.
pub(crate) const CHANNEL: usize = 16;
/// However often progress is made in between, a transfer is not resumed more often than this.
const MAX_RESUMES: u32 = 100;
/// A transfer must bring as many bytes in the time that the configuration gives it to make progress.
const LEAST: u64 = 64 << 10;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Transfers a blob of `size` bytes into `sink`. Ends early, without an error, when the receiver is
/// gone, which knows why; also while the registry keeps us waiting.
pub(crate) async fn transfer(
    repository: &Repository,
    digest: &Digest,
    size: u64,
    sink: &mpsc::Sender<Bytes>,
    meter: &LayerMeter<'_>,
) -> Result<(), ImageError> {
    tokio::select! {
        result = send(repository, digest, size, sink, meter) => result,
        () = sink.closed() => Ok(()),
    }
}

async fn send(
    repository: &Repository,
    digest: &Digest,
    size: u64,
    sink: &mpsc::Sender<Bytes>,
    meter: &LayerMeter<'_>,
) -> Result<(), ImageError> {
    let mut transfer = Transfer {
        repository,
        digest,
        size,
        done: 0,
        sink,
        meter,
    };
    let (mut resumes, mut fruitless) = (0, 0);
    let mut pause = FIRST_PAUSE;
    // A blob without a byte needs no request.
    while transfer.done < size {
        let before = transfer.done;
        let reason = match transfer.attempt().await {
            Ok(Step::Finished) => return Ok(()),
            Ok(Step::Cut(error)) => error,
            Err(error) => return Err(error),
        };
        if transfer.done - before >= LEAST {
            (fruitless, pause) = (0, FIRST_PAUSE);
        } else {
            fruitless += 1;
        }
        resumes += 1;
        if fruitless > repository.retries() || resumes > MAX_RESUMES {
            return Err(reason.unwrap_or_else(|| ImageError::SizeMismatch {
                what: format!("layer {digest}"),
                expected: size,
                actual: transfer.done,
            }));
        }
        tracing::info!(layer = %digest, at = transfer.done, size, "transfer broke off and is resumed");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(())
}

enum Step {
    /// All bytes are handed on, or nobody wants them any more.
    Finished,
    /// It broke off: with an error, or at an end that came too early.
    Cut(Option<ImageError>),
}

struct Transfer<'a> {
    repository: &'a Repository,
    digest: &'a Digest,
    size: u64,
    done: u64,
    sink: &'a mpsc::Sender<Bytes>,
    meter: &'a LayerMeter<'a>,
}

impl Transfer<'_> {
    async fn attempt(&mut self) -> Result<Step, ImageError> {
        let mut response = match self.repository.blob(self.digest, self.done).await {
            Ok(response) => response,
            Err(error) if registry::is_passing(&error) => return Ok(Step::Cut(Some(error))),
            // In the middle of a transfer, a registry that is gone may be back soon.
            Err(error @ ImageError::Unreachable { .. }) if self.done > 0 => {
                return Ok(Step::Cut(Some(error)));
            }
            Err(error) => return Err(error),
        };
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        // A server may answer a range request with everything.
        let mut skip = if partial { 0 } else { self.done };
        if partial {
            self.check_range(
                registry::header(response.headers(), CONTENT_RANGE.as_str()).as_deref(),
            )?;
        }
        let expected = if partial {
            self.size - self.done
        } else {
            self.size
        };
        let announced = registry::header(response.headers(), CONTENT_LENGTH.as_str());
        if let Some(announced) = announced.and_then(|text| text.parse::<u64>().ok())
            && announced != expected
        {
            let actual = announced.saturating_add(self.size - expected);
            return Err(self.wrong_size(actual));
        }
        // Only the time that is spent on waiting for the registry counts, not that of unpacking.
        let (mut brought, mut waited) = (0, Duration::ZERO);
        let allowed = self.repository.progress_timeout();
        loop {
            let began = Instant::now();
            let left = allowed.saturating_sub(waited);
            let next = tokio::time::timeout(left, response.chunk()).await;
            waited += began.elapsed();
            let mut chunk = match next {
                Err(_) if brought >= LEAST => {
                    (brought, waited) = (0, Duration::ZERO);
                    continue;
                }
                Err(_) => return Ok(Step::Cut(Some(self.too_slow(brought, allowed)))),
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => return Ok(Step::Cut(None)),
                Ok(Err(error)) => {
                    let what = format!("layer {}", self.digest);
                    let error = registry::unreachable(&self.repository.host, &what, error);
                    return Ok(Step::Cut(Some(error)));
                }
            };
            brought += chunk.len() as u64;
            let skipped = skip.min(chunk.len() as u64);
            chunk.advance(
                usize::try_from(skipped)
                    .unwrap_or(usize::MAX)
                    .min(chunk.len()),
            );
            skip -= skipped;
            if chunk.is_empty() {
                continue;
            }
            let length = chunk.len() as u64;
            if self.done + length > self.size {
                return Err(self.wrong_size(self.done + length));
            }
            if self.sink.send(chunk).await.is_err() {
                return Ok(Step::Finished);
            }
            self.done += length;
            self.meter.downloaded(self.done);
            if self.done == self.size {
                return Ok(Step::Finished);
            }
        }
    }

    fn check_range(&self, range: Option<&str>) -> Result<(), ImageError> {
        let start = range
            .and_then(|text| text.strip_prefix("bytes "))
            .and_then(|text| text.split('-').next())
            .and_then(|text| text.parse::<u64>().ok());
        if start == Some(self.done) {
            return Ok(());
        }
        Err(ImageError::BadResponse {
            host: self.repository.host.clone(),
            what: format!("layer {}", self.digest),
            reason: format!(
                "bytes from {} on were asked for, it sent {range:?}",
                self.done
            ),
            status: None,
        })
    }

    fn too_slow(&self, brought: u64, within: Duration) -> ImageError {
        ImageError::BadResponse {
            host: self.repository.host.clone(),
            what: format!("layer {}", self.digest),
            reason: format!("it sent {brought} bytes only in {within:?}"),
            status: None,
        }
    }

    fn wrong_size(&self, actual: u64) -> ImageError {
        ImageError::SizeMismatch {
            what: format!("layer {}", self.digest),
            expected: self.size,
            actual,
        }
    }
}

/// The receiving end, for a blocking thread. The stream ends when the sender is gone; whether it
/// was complete is for the digest to say.
pub(crate) struct ChannelReader {
    source: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl ChannelReader {
    pub(crate) fn new(source: mpsc::Receiver<Bytes>) -> Self {
        Self {
            source,
            current: Bytes::new(),
        }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.source.blocking_recv() {
                Some(chunk) => self.current = chunk,
                None => return Ok(0),
            }
        }
        let length = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
