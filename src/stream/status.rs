//! How a session ended, as clients read it.

use crate::{ExitStatus, StreamError};
use serde::Serialize;

/// The part of Kubernetes' `metav1.Status` that remote commands use.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub(crate) struct Status {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Cause {
    reason: &'static str,
    message: String,
}

impl Status {
    pub(crate) fn success() -> Self {
        Self {
            status: "Success",
            message: None,
            reason: None,
            details: None,
            code: None,
        }
    }

    pub(crate) fn failure(what: &str, error: &StreamError) -> Self {
        let error = Chain(error);
        Self {
            status: "Failure",
            message: Some(format!("Internal error occurred: {what}: {error}")),
            reason: Some("InternalError"),
            code: Some(500),
            ..Self::success()
        }
    }

    pub(crate) fn exit(exit: ExitStatus) -> Self {
        // Clients read 8 bits; no failure may become a success on the way.
        let code = match exit.0 {
            0 => return Self::success(),
            code if code & 0xff == 0 => 255,
            code => code & 0xff,
        };
        let cause = Cause {
            reason: "ExitCode",
            message: code.to_string(),
        };
        Self {
            status: "Failure",
            message: Some(format!(
                "command terminated with non-zero exit code: exit status {code}"
            )),
            reason: Some("NonZeroExitCode"),
            details: Some(Details {
                causes: vec![cause],
            }),
            ..Self::success()
        }
    }

    /// For protocols since v4.
    pub(crate) fn json(&self) -> Vec<u8> {
        // There is nothing in a status that can't be written.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// For protocols before v4, which say nothing of success.
    pub(crate) fn text(&self) -> Vec<u8> {
        self.message.clone().unwrap_or_default().into_bytes()
    }
}

/// An error and its causes on one line.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_read_as_kubernetes_writes_them() {
        assert_eq!(Status::success().json(), br#"{"status":"Success"}"#);
        assert_eq!(Status::success().text(), b"");
        assert_eq!(
            String::from_utf8(Status::exit(ExitStatus(7)).json()).unwrap(),
            r#"{"status":"Failure","message":"command terminated with non-zero exit code: exit status 7","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#
        );
        let error = StreamError::Io(std::io::Error::other("boom"));
        let status = Status::failure("error executing command in container", &error);
        assert_eq!(
            String::from_utf8(status.json()).unwrap(),
            r#"{"status":"Failure","message":"Internal error occurred: error executing command in container: stream input or output failed: boom","reason":"InternalError","code":500}"#
        );
    }

    #[test]
    fn no_failure_becomes_a_success() {
        assert_eq!(Status::exit(ExitStatus(0)), Status::success());
        assert_eq!(Status::exit(ExitStatus(256)), Status::exit(ExitStatus(255)));
        assert_eq!(Status::exit(ExitStatus(-1)), Status::exit(ExitStatus(255)));
    }
}
