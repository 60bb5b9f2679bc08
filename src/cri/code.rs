//! The one place where errors become gRPC codes.

use slipway_image::ErrorKind;
use tonic::{Code, Status};

use crate::pod::{Class, PodError};

/// More of a message than this helps nobody, and gRPC carries it in a header.
const LONGEST: usize = 4096;

/// The gRPC status of an error, with all its causes in the text.
pub fn status(error: &PodError) -> Status {
    let mut text = error.chain();
    if text.len() > LONGEST {
        let end = (0..=LONGEST)
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    Status::new(code(error.class()), text)
}

fn code(class: Class) -> Code {
    match class {
        Class::InvalidArgument => Code::InvalidArgument,
        Class::NotFound => Code::NotFound,
        Class::AlreadyExists => Code::AlreadyExists,
        Class::FailedPrecondition => Code::FailedPrecondition,
        Class::ResourceExhausted => Code::ResourceExhausted,
        Class::DeadlineExceeded => Code::DeadlineExceeded,
        Class::Unavailable => Code::Unavailable,
        Class::Unimplemented => Code::Unimplemented,
        Class::Internal => Code::Internal,
        Class::Image(kind) => image_code(kind),
    }
}

fn image_code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Unauthenticated => Code::Unauthenticated,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::DataLoss => Code::DataLoss,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::Cancelled => Code::Cancelled,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn errors_have_their_code_and_name_their_causes() {
        let error = PodError::NoPod { id: "abc".into() };
        assert_eq!(status(&error).code(), Code::NotFound);
        assert!(status(&error).message().contains("abc"));
        let shared = PodError::Shared(Arc::new(error));
        assert_eq!(status(&shared).code(), Code::NotFound);
        let file = PodError::File {
            action: "write",
            path: "/x".into(),
            source: std::io::Error::from_raw_os_error(28),
        };
        assert_eq!(status(&file).code(), Code::ResourceExhausted);
        assert!(status(&file).message().contains("No space left"));
    }

    #[test]
    fn messages_are_bounded() {
        let error = PodError::Invalid("é".repeat(10_000));
        assert!(status(&error).message().len() < LONGEST + 8);
    }
}
