//! Why a configuration can't be honoured.

use std::fmt;
use std::path::PathBuf;

/// Which of the gRPC codes an error stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecErrorKind {
    /// The request can never work: `INVALID_ARGUMENT`.
    Invalid,
    /// The request is right, but this version can't do it: `UNIMPLEMENTED`.
    Unsupported,
    /// The request is right, but this host or this pod is not in the state for it: `FAILED_PRECONDITION`.
    FailedPrecondition,
}

/// Why a configuration can't be honoured: names the field and says what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SpecError {
    kind: SpecErrorKind,
    field: String,
    reason: String,
}

/// The module's own result.
pub(crate) type Result<T> = std::result::Result<T, SpecError>;

impl SpecError {
    pub(crate) fn invalid(field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::Invalid, field, reason)
    }

    pub(crate) fn unsupported(field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::Unsupported, field, reason)
    }

    pub(crate) fn precondition(field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::FailedPrecondition, field, reason)
    }

    fn new(kind: SpecErrorKind, field: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            kind,
            field: field.into(),
            reason: reason.to_string(),
        }
    }

    /// The gRPC code this stands for.
    pub fn kind(&self) -> SpecErrorKind {
        self.kind
    }

    /// The field of the CRI message, dotted, with the index of a list's entry.
    pub fn field(&self) -> &str {
        &self.field
    }
}

/// Text from outside, quoted and bounded for a message.
pub(crate) fn quoted(text: &str) -> String {
    const LONGEST: usize = 200;
    if text.chars().count() <= LONGEST {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(LONGEST).collect();
    format!("{head:?}…")
}

/// A path from outside, likewise.
pub(crate) fn quoted_path(path: impl Into<PathBuf>) -> String {
    quoted(&path.into().to_string_lossy())
}
