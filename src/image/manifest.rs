//! Manifests, indexes and image configurations: OCI image specification 1.1 and Docker's image
//! manifest version 2, schema 2.

use oci_spec::image::Config;
use serde::Deserialize;

use crate::artifact::{Form, Part};
use crate::config::Platform;
use crate::digest::Digest;
use crate::error::ImageError;

/// A larger manifest is refused. The distribution specification asks for at least 4 MiB.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// A larger image configuration is refused.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// More layers than any file system can stack are refused.
const MAX_LAYERS: usize = 500;

/// The annotation of a file's name.
const TITLE: &str = "org.opencontainers.image.title";
/// The media types of images' configurations. Old tools had none, or none of their own.
const IMAGE_CONFIGS: [&str; 4] = [
    "",
    "application/octet-stream",
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// The annotation of an attestation in an index.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// The media types that a manifest request accepts.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// A reference to a blob or manifest.
#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) media_type: String,
    /// What a file of this content is to be called.
    pub(crate) title: Option<String>,
}

/// A document that a manifest request may answer.
#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Index),
}

/// The manifest of one image or artifact.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Base first.
    pub(crate) layers: Vec<Descriptor>,
    /// The type of an artifact; `None`: an image.
    pub(crate) artifact: Option<String>,
}

/// Manifests of one image for several platforms.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) entries: Vec<IndexEntry>,
}

/// One line of an index. Its digest is parsed when the line is used: those for other platforms may be
/// of algorithms that we don't know.
#[derive(Debug, Clone)]
pub(crate) struct IndexEntry {
    descriptor: RawDescriptor,
    pub(crate) platform: Option<Platform>,
    /// In a layout's index, they hold the image's name.
    pub(crate) annotations: std::collections::HashMap<String, String>,
}

/// The parts of an image configuration that matter here. Fields we don't use (history, vendor
/// extensions) are not parsed, so that they can't make an image unusable.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    pub(crate) created: Option<String>,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) variant: Option<String>,
    #[serde(default)]
    pub(crate) config: Option<Config>,
    rootfs: RootFs,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

/// Any of the documents, as the wire has it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: Option<u64>,
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    artifact_type: Option<String>,
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: Option<std::collections::HashMap<String, String>>,
}

#[derive(Debug, Clone, Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
}

impl RawDescriptor {
    fn check(&self, what: &str) -> Result<Descriptor, ImageError> {
        Ok(Descriptor {
            digest: Digest::parse(&self.digest).map_err(|reason| malformed(what, reason))?,
            size: self.size,
            media_type: self.media_type.clone(),
            title: self
                .annotations
                .as_ref()
                .and_then(|all| all.get(TITLE).cloned()),
        })
    }
}

fn malformed(what: &str, reason: impl Into<String>) -> ImageError {
    ImageError::Malformed {
        what: what.to_owned(),
        reason: reason.into(),
    }
}

/// Parses what a manifest request answered. `what` names it in errors, `content_type` is the
/// answer's.
pub(crate) fn parse(
    bytes: &[u8],
    content_type: Option<&str>,
    what: &str,
) -> Result<Document, ImageError> {
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| malformed(what, format!("not a manifest: {error}")))?;
    let media_type = raw.media_type.as_deref().or(content_type).unwrap_or("");
    if raw.schema_version == Some(1)
        || raw.fs_layers.is_some()
        || media_type.contains("manifest.v1") && media_type.contains("docker")
    {
        return Err(ImageError::Unsupported {
            what: what.to_owned(),
            reason: "it is in Docker's schema 1, which is obsolete; rebuild or re-push the image \
                     with a current tool"
                .to_owned(),
        });
    }
    match (raw.manifests, raw.layers) {
        // An ambiguous document could mean different images to different readers (CVE-2021-41190).
        (Some(_), Some(_)) => Err(malformed(what, "it is both a manifest and an index")),
        (Some(manifests), None) => {
            if raw.config.is_some() {
                return Err(malformed(what, "it is both a manifest and an index"));
            }
            let entry = |mut raw: RawDescriptor| IndexEntry {
                platform: raw.platform.take().map(|platform| Platform {
                    os: platform.os,
                    architecture: platform.architecture,
                    variant: platform.variant,
                }),
                annotations: raw.annotations.take().unwrap_or_default(),
                descriptor: raw,
            };
            let entries = manifests.into_iter().map(entry).collect();
            Ok(Document::Index(Index { entries }))
        }
        (None, Some(layers)) => {
            let config = raw
                .config
                .ok_or_else(|| malformed(what, "it has no configuration"))?
                .check(what)?;
            if layers.len() > MAX_LAYERS {
                return Err(malformed(
                    what,
                    format!("it has more than {MAX_LAYERS} layers"),
                ));
            }
            let layers = layers
                .iter()
                .map(|layer| layer.check(what))
                .collect::<Result<Vec<_>, _>>()?;
            let is_image = IMAGE_CONFIGS.contains(&config.media_type.as_str());
            let artifact = (!is_image).then(|| {
                let own = raw.artifact_type.filter(|kind| !kind.is_empty());
                own.unwrap_or_else(|| config.media_type.clone())
            });
            let encrypted = |layer: &&Descriptor| layer.media_type.ends_with("+encrypted");
            let odd = |layer: &&Descriptor| match is_image {
                true => !is_layer(&layer.media_type),
                false => encrypted(layer),
            };
            if let Some(layer) = layers.iter().find(odd) {
                let why = match encrypted(&layer) {
                    true => "is encrypted; decrypt it before pushing it",
                    false => "is no file system layer; only container images can be run",
                };
                return Err(ImageError::Unsupported {
                    what: what.to_owned(),
                    reason: format!("it holds a {:?}, which {why}", layer.media_type),
                });
            }
            Ok(Document::Manifest(Manifest {
                config,
                layers,
                artifact,
            }))
        }
        (None, None) => Err(malformed(what, "it has neither layers nor manifests")),
    }
}

/// The annotations of a manifest or index; none of a document that can't be understood.
pub(crate) fn annotations(bytes: &[u8]) -> std::collections::HashMap<String, String> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<std::collections::HashMap<String, String>>,
    }
    let annotated = serde_json::from_slice::<Annotated>(bytes).ok();
    annotated.and_then(|a| a.annotations).unwrap_or_default()
}

/// Whether a media type is a file system layer's. Unknown ones of the container vendors are let
/// through, because the content is sniffed and verified anyway; artifacts and encrypted layers not.
pub(crate) fn is_layer(media_type: &str) -> bool {
    if media_type.ends_with("+encrypted") {
        return false;
    }
    media_type.is_empty()
        || media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.")
        || media_type.starts_with("application/vnd.docker.container.image.rootfs.")
}

impl IndexEntry {
    /// What the line refers to.
    pub(crate) fn descriptor(&self, what: &str) -> Result<Descriptor, ImageError> {
        self.descriptor.check(what)
    }

    /// Whether this may be an image for any platform, which only its configuration tells: it names
    /// none, and is neither an artifact nor an attestation.
    pub(crate) fn is_for_unknown_platform(&self) -> bool {
        self.platform.is_none()
            && self
                .descriptor
                .artifact_type
                .as_deref()
                .unwrap_or_default()
                .is_empty()
            && !self.annotations.contains_key(REFERENCE_TYPE)
    }
}

impl Index {
    /// The entry for `platform`: the best rank, then the first. An entry without a platform is taken
    /// when none is for this one; its configuration says later whether it was right. Artifacts and
    /// attestations (`unknown/unknown`) are never taken.
    pub(crate) fn select(
        &self,
        platform: &Platform,
        what: &str,
    ) -> Result<&IndexEntry, ImageError> {
        let best = self
            .entries
            .iter()
            .filter_map(|entry| {
                let own = entry.platform.as_ref()?;
                let rank = platform.rank(&own.os, &own.architecture, own.variant.as_deref())?;
                Some((rank, entry))
            })
            .min_by_key(|(rank, _)| *rank);
        if let Some((_, entry)) = best {
            return Ok(entry);
        }
        let mut entries = self.entries.iter();
        if let Some(entry) = entries.find(|entry| entry.is_for_unknown_platform()) {
            return Ok(entry);
        }
        let mut available: Vec<String> = self
            .entries
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .filter(|platform| platform.os != "unknown")
            .map(ToString::to_string)
            .collect();
        available.dedup();
        available.truncate(20);
        Err(ImageError::NoPlatform {
            what: what.to_owned(),
            platform: platform.to_string(),
            available: if available.is_empty() {
                "none".to_owned()
            } else {
                available.join(", ")
            },
        })
    }
}

impl ConfigFile {
    /// Parses an image configuration.
    pub(crate) fn parse(bytes: &[u8], what: &str) -> Result<Self, ImageError> {
        serde_json::from_slice(bytes)
            .map_err(|error| malformed(what, format!("not an image configuration: {error}")))
    }

    /// What is made of an image's layers.
    pub(crate) fn parts(&self, layers: &[Descriptor], what: &str) -> Result<Vec<Part>, ImageError> {
        let diff_ids = self.diff_ids(layers.len(), what)?;
        let parts = layers.iter().zip(diff_ids).map(|(blob, layer)| Part {
            blob: blob.clone(),
            layer,
            form: Form::Layer,
        });
        Ok(parts.collect())
    }

    /// The diff IDs, base first; as many as the manifest has layers.
    pub(crate) fn diff_ids(&self, layers: usize, what: &str) -> Result<Vec<Digest>, ImageError> {
        let diff_ids = self.rootfs.diff_ids.as_deref().unwrap_or_default();
        if diff_ids.len() != layers {
            return Err(malformed(
                what,
                format!(
                    "its configuration lists {} layers and its manifest {layers}",
                    diff_ids.len()
                ),
            ));
        }
        diff_ids
            .iter()
            .map(|id| Digest::parse(id).map_err(|reason| malformed(what, reason)))
            .collect()
    }

    /// An image for another platform can't run here.
    pub(crate) fn check_platform(&self, platform: &Platform, what: &str) -> Result<(), ImageError> {
        // Images built from scratch by simple tools leave the fields empty.
        let os = if self.os.is_empty() {
            &platform.os
        } else {
            &self.os
        };
        let (architecture, variant) = if self.architecture.is_empty() {
            (&platform.architecture, None)
        } else {
            (&self.architecture, self.variant.as_deref())
        };
        if platform.rank(os, architecture, variant).is_some() {
            return Ok(());
        }
        Err(ImageError::NoPlatform {
            what: what.to_owned(),
            platform: platform.to_string(),
            available: Platform {
                os: os.clone(),
                architecture: architecture.clone(),
                variant: self.variant.clone(),
            }
            .to_string(),
        })
    }
}

#[cfg(test)]
mod tests;
