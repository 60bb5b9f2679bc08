//! What a look at the machine brought to light.

use serde::Serialize;

/// How good or bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Good to know; also: could not be found out.
    Info,
    /// Pods run, but something that can be asked for does not work or is weaker.
    Warn,
    /// Pods do not run, or not safely.
    Fail,
}

impl Status {
    /// The word in reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name for programs.
    pub id: String,
    /// What was looked at.
    pub what: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What it costs that this is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<String>,
    /// How to mend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn new(id: &str, what: &str, status: Status, found: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            what: what.to_owned(),
            status,
            found: found.into(),
            cost: None,
            fix: None,
        }
    }

    /// All is well.
    pub(crate) fn ok(id: &str, what: &str, found: impl Into<String>) -> Self {
        Self::new(id, what, Status::Ok, found)
    }

    /// Good to know.
    pub(crate) fn info(id: &str, what: &str, found: impl Into<String>) -> Self {
        Self::new(id, what, Status::Info, found)
    }

    /// Something is weaker than it could be.
    pub(crate) fn warn(id: &str, what: &str, found: impl Into<String>) -> Self {
        Self::new(id, what, Status::Warn, found)
    }

    /// Something indispensable is missing.
    pub(crate) fn fail(id: &str, what: &str, found: impl Into<String>) -> Self {
        Self::new(id, what, Status::Fail, found)
    }

    /// A probe that needs root.
    pub(crate) fn not_probed(id: &str, what: &str) -> Self {
        Self::info(id, what, "not tried: that takes root").fix("run slipway check as root")
    }

    /// With what it costs.
    #[must_use]
    pub(crate) fn cost(mut self, cost: impl Into<String>) -> Self {
        self.cost = Some(cost.into());
        self
    }

    /// With what mends it.
    #[must_use]
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

/// All that was found, subject by subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the order in which they are shown.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether nothing indispensable is missing.
    pub fn ok(&self) -> bool {
        self.count(Status::Fail) == 0
    }

    /// How many findings have this status.
    pub fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|f| f.status == status).count()
    }
}
