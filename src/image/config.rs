//! Settings of the image store and of the registries it pulls from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of an [`ImageStore`](crate::ImageStore).
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Where images live; durable storage.
    pub root: PathBuf,
    /// How registries are reached.
    pub registry: RegistryConfig,
    /// How many layers are downloaded at the same time, over all pulls. At least 1. One registry gets two
    /// thirds of them.
    pub max_parallel_downloads: usize,
    /// A transfer that brings next to nothing (less than 64 KiB) for this long is broken off and resumed.
    pub pull_progress_timeout: Duration,
    /// The platform whose image is taken from a multi-platform index.
    pub platform: Platform,
    /// Images that the kubelet must not remove: normalised or short names; a trailing `*` matches
    /// any ending, `*word*` any name with the word in it.
    pub pinned: Vec<String>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/slipway"),
            registry: RegistryConfig::default(),
            max_parallel_downloads: 6,
            pull_progress_timeout: Duration::from_secs(60),
            platform: Platform::host(),
            pinned: Vec::new(),
        }
    }
}

/// How registries are reached.
///
/// A registry is reached over HTTPS. A loopback address (`localhost`, `127.0.0.0/8`, `::1`) may
/// speak plain HTTP, which is tried first there; hosts in [`insecure`](Self::insecure) may too, but
/// HTTPS is tried first. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` of the environment are honoured.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Registries (`host` or `host:port`) that may be spoken to without TLS.
    pub insecure: Vec<String>,
    /// PEM files of further certificate authorities, beside the system's
    /// (`SSL_CERT_FILE`/`SSL_CERT_DIR` name other ones).
    pub ca_files: Vec<PathBuf>,
    /// For a registry's host, mirrors (`host` or `host:port`) that are asked first, in this order.
    /// They never see the registry's credentials.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// How long a connection may take to come up.
    pub connect_timeout: Duration,
    /// How long one request for a document (manifest, token, configuration) may take in all.
    pub request_timeout: Duration,
    /// How often in a row a broken transfer is resumed without getting any further.
    pub retries: u32,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            insecure: Vec::new(),
            ca_files: Vec::new(),
            mirrors: BTreeMap::new(),
            connect_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(60),
            retries: 5,
        }
    }
}

/// An operating system, architecture and variant, in Go's names as the image specification wants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// For example `linux`.
    pub os: String,
    /// For example `amd64`.
    pub architecture: String,
    /// For example `v8`.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform this binary was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// How well an image of this platform runs here: `None` not at all, smaller is better.
    ///
    /// Variants: an exact match is best; a missing variant means the architecture's default (`v8`
    /// on arm64, `v7` on arm); lower arm variants and lower amd64 levels run too, higher ones don't.
    pub fn rank(&self, os: &str, architecture: &str, variant: Option<&str>) -> Option<u32> {
        if os != self.os || canonical(architecture) != canonical(&self.architecture) {
            return None;
        }
        let level = |variant: Option<&str>| -> Option<u32> {
            match variant.filter(|v| !v.is_empty()) {
                None => Some(match canonical(&self.architecture) {
                    "arm64" => 8,
                    "arm" => 7,
                    _ => 1,
                }),
                // `v8.2` and the like count by their major number.
                Some(text) => text
                    .trim_start_matches('v')
                    .split('.')
                    .next()
                    .and_then(|number| number.parse().ok()),
            }
        };
        let (own, other) = (level(self.variant.as_deref()), level(variant));
        match (own, other) {
            (Some(own), Some(other)) if other <= own => Some(own - other),
            (Some(_), Some(_)) => None,
            _ => (self.variant.as_deref() == variant).then_some(0),
        }
    }
}

/// One name per architecture: `uname`'s names appear in images, too.
fn canonical(architecture: &str) -> &str {
    match architecture {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "i386" => "386",
        other => other,
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(architecture: &str, variant: Option<&str>) -> Platform {
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
        }
    }

    #[test]
    fn variants_are_ranked() {
        let arm64 = platform("arm64", Some("v8"));
        assert_eq!(arm64.rank("linux", "arm64", None), Some(0));
        assert_eq!(arm64.rank("linux", "aarch64", Some("v8")), Some(0));
        assert_eq!(arm64.rank("linux", "arm64", Some("v9")), None);
        let arm = platform("arm", Some("v7"));
        assert_eq!(arm.rank("linux", "arm", Some("v6")), Some(1));
        assert_eq!(arm.rank("linux", "arm", Some("v8")), None);
        let amd64 = platform("amd64", None);
        assert_eq!(amd64.rank("linux", "amd64", None), Some(0));
        assert_eq!(amd64.rank("linux", "amd64", Some("v1")), Some(0));
        assert_eq!(amd64.rank("linux", "amd64", Some("v3")), None);
        assert_eq!(amd64.rank("windows", "amd64", None), None);
        assert_eq!(amd64.rank("linux", "arm64", None), None);
        assert_eq!(amd64.rank("linux", "amd64", Some("strange")), None);
    }
}
