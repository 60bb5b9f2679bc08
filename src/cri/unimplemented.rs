//! Calls that Slipway does not serve yet.

use tonic::{Response, Status};

/// The answer of a call that is not served yet.
#[allow(clippy::unnecessary_wraps)] // It is an answer like any other.
pub fn later<T>(method: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!(
        "{method} is not implemented in Slipway {} yet",
        crate::VERSION
    )))
}
