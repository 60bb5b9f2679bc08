//! What is common to all calls: a span, its outcome, its time.

use std::time::Instant;

use tonic::{Response, Status};
use tracing::Span;

use super::code;
use crate::memory;
use crate::pod::PodError;

/// Whether a call changes something, and so is worth a line at the normal level.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It changes something.
    Change,
    /// It only looks.
    Look,
}

/// Runs a call within the current span and logs how it ended.
pub async fn call<T, F>(kind: Kind, work: F) -> Result<Response<T>, Status>
where
    F: Future<Output = Result<T, PodError>>,
{
    let begin = Instant::now();
    let result = work.await;
    if kind == Kind::Change {
        memory::effort();
    }
    let micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    match result {
        Ok(answer) => {
            // What a change brought about is told where it happens.
            tracing::debug!(micros, "done");
            Ok(Response::new(answer))
        }
        Err(error) => {
            let status = code::status(&error);
            let code = status.code();
            match kind {
                Kind::Change => tracing::warn!(micros, ?code, error = status.message(), "failed"),
                Kind::Look => tracing::debug!(micros, ?code, error = status.message(), "failed"),
            }
            Err(status)
        }
    }
}

/// The span of a call about a pod.
pub fn pod_span(method: &'static str, pod: &str) -> Span {
    tracing::info_span!("cri", method, pod)
}

/// The span of a call about a container.
pub fn container_span(method: &'static str, container: &str) -> Span {
    tracing::info_span!("cri", method, container)
}

/// The span of a call about an image.
pub fn image_span(method: &'static str, image: &str) -> Span {
    tracing::info_span!("cri", method, image)
}

/// The span of a call about the node.
pub fn node_span(method: &'static str) -> Span {
    tracing::info_span!("cri", method)
}
