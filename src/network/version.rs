//! CNI specification versions: which ones we speak and what each one can do.

use std::fmt;

/// A version of the CNI specification that this crate speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // The names say it all.
pub enum SpecVersion {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl SpecVersion {
    /// Every version, oldest first.
    pub const ALL: [SpecVersion; 7] = [
        SpecVersion::V0_1_0,
        SpecVersion::V0_2_0,
        SpecVersion::V0_3_0,
        SpecVersion::V0_3_1,
        SpecVersion::V0_4_0,
        SpecVersion::V1_0_0,
        SpecVersion::V1_1_0,
    ];

    /// The version with exactly this name; `None` for one that we don't speak.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.as_str() == text)
    }

    /// The version as it stands in a configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// CHECK exists, and DEL gets the previous result (since 0.4.0).
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// STATUS and GC exist (since 1.1.0).
    pub fn has_status_and_gc(self) -> bool {
        self >= Self::V1_1_0
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The supported versions as one text, for messages.
pub(crate) fn supported() -> String {
    SpecVersion::ALL.map(SpecVersion::as_str).join(", ")
}

/// Major, minor and patch of a version text, to compare versions that we don't speak.
pub(crate) fn parts(text: &str) -> Option<(u32, u32, u32)> {
    let mut it = text.split('.').map(|p| p.parse::<u32>().ok());
    let version = (it.next()??, it.next()??, it.next()??);
    it.next().is_none().then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_parses_back_and_is_ordered() {
        for pair in SpecVersion::ALL.windows(2) {
            assert!(pair[0] < pair[1]);
            assert!(parts(pair[0].as_str()) < parts(pair[1].as_str()));
        }
        for version in SpecVersion::ALL {
            assert_eq!(SpecVersion::parse(version.as_str()), Some(version));
        }
        for bad in ["", "1", "1.0", "1.0.0 ", "v1.0.0", "2.0.0", "1.0.0.0"] {
            assert_eq!(SpecVersion::parse(bad), None, "{bad}");
        }
    }
}
