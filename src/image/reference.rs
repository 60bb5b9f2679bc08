//! Image references: `[host[:port]/]path[:tag][@digest]`, normalised as Docker does.

use std::fmt;

use crate::digest::Digest;
use crate::error::ImageError;

/// A longer one is no reference; this bounds the work of parsing.
const MAX_LENGTH: usize = 4096;
/// The specification's bound for the path.
const MAX_NAME: usize = 255;
/// The registry of names that don't say one.
const HUB: &str = "docker.io";

/// A normalised image reference: with its registry, and with either a tag or a digest.
///
/// `busybox` is `docker.io/library/busybox:latest`. A reference with both a tag and a digest is one
/// by digest, as in other container runtimes: the digest says which image, the tag is decoration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageName {
    registry: String,
    repository: String,
    version: Version,
}

/// What selects an image within its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Version {
    Tag(String),
    Digest(Digest),
}

impl ImageName {
    /// Parses and normalises a reference.
    ///
    /// # Errors
    /// [`ImageError::InvalidReference`].
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        Self::split(text).map_err(|reason| ImageError::InvalidReference {
            reference: text.chars().take(300).collect(),
            reason,
        })
    }

    /// The grammar of the distribution project's reference package. (oci-spec has a parser, too, but
    /// it doesn't know registries by IPv6 address.)
    fn split(text: &str) -> Result<Self, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!("it is longer than {MAX_LENGTH} bytes"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon in front of a slash is a port's.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(format!(
                "{tag:?} is no tag: 1 to 128 letters, digits, `_`, `.` and `-`"
            ));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path),
            _ => (HUB, name),
        };
        let registry = if registry == "index.docker.io" {
            HUB
        } else {
            registry
        };
        check_registry(registry)?;
        // What `sha256:<hex>` would name here is somebody else's image on the hub.
        if name == "sha256"
            && digest.is_none()
            && tag.is_some_and(|tag| tag.len() == 64 && tag.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err("it is an image's id; pull the image by its name".to_owned());
        }
        if path.len() == 64 && path.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(
                "a name of 64 hexadecimal digits would be mistaken for an image's id".to_owned(),
            );
        }
        let repository = if registry == HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if repository.len() > MAX_NAME {
            return Err(format!("its path is longer than {MAX_NAME} bytes"));
        }
        if let Some(part) = repository.split('/').find(|part| !is_component(part)) {
            return Err(format!(
                "{part:?} is no part of a path: lower-case letters and digits, separated by `.`, `_`, `__` or `-`"
            ));
        }
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            version: match digest {
                Some(digest) => Version::Digest(digest),
                None => Version::Tag(tag.unwrap_or("latest").to_owned()),
            },
        })
    }

    /// The registry's host and port, for example `docker.io`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path in the registry, for example `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Registry and repository, for example `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The tag, when this is no reference by digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// The digest, when this is a reference by digest.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        }
    }

    /// The reference by digest of the same repository.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Version::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Version::Digest(digest) => {
                write!(f, "{}/{}@{digest}", self.registry, self.repository)
            }
        }
    }
}

/// Whether the first part of a name is a registry's host rather than a part of the path.
fn is_registry(part: &str) -> bool {
    part == "localhost"
        || part.contains(['.', ':'])
        || part.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(text: &str) -> Result<(), String> {
    let bad = || format!("{text:?} is no registry's `host` or `host:port`");
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            (None, rest)
        }
        None => {
            let at = text.find(':').unwrap_or(text.len());
            (Some(&text[..at]), &text[at..])
        }
    };
    if let Some(host) = host {
        let label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !host.split('.').all(label) {
            return Err(bad());
        }
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok(()),
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok() => {
            Ok(())
        }
        _ => Err(bad()),
    }
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&text.len())
        && word(text.as_bytes()[0])
        && text
            .bytes()
            .all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends =
        bytes.first().is_some_and(|b| letter(*b)) && bytes.last().is_some_and(|b| letter(*b));
    ends && text
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|separator| {
            matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_normalised() {
        let hex = "f".repeat(64);
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".into()),
            ("index.docker.io/a/b", "docker.io/a/b:latest".into()),
            ("localhost/x", "localhost/x:latest".into()),
            ("localhost:5000/x:y", "localhost:5000/x:y".into()),
            ("[::1]:5000/x:y", "[::1]:5000/x:y".into()),
            ("r.example/a/b/c", "r.example/a/b/c:latest".into()),
            ("foo/bar", "docker.io/foo/bar:latest".into()),
            ("Foo/bar", "Foo/bar:latest".into()),
            ("test.com:5000", "docker.io/library/test.com:5000".into()),
            (
                "a__b/c-d--e.f:V1.0_x-y",
                "docker.io/a__b/c-d--e.f:V1.0_x-y".into(),
            ),
            (
                &format!("r.example/a:tag@sha256:{hex}"),
                format!("r.example/a@sha256:{hex}"),
            ),
        ] {
            assert_eq!(ImageName::parse(text).unwrap().to_string(), expected);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let long = "a".repeat(5000);
        let id = format!("sha256:{}", "0a".repeat(32));
        for text in [
            &id,
            "",
            " ",
            ":tag",
            "UPPER",
            "a//b",
            "a b",
            "x@sha256:12",
            "../x",
            "x:",
            "x\n",
            "http://r/x",
            "x@md5:00",
            "-x",
            &long,
        ] {
            let error = ImageName::parse(text).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidArgument, "{text}");
        }
    }
}
