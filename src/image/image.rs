//! What a caller sees of the store: images, their layers, the space they take.

use std::path::PathBuf;

/// The execution parameters of an image: entry point, command, environment, user, working
/// directory, stop signal, volumes, labels, exposed ports (image specification, "Image
/// Configuration").
pub type ImageConfig = oci_spec::image::Config;

/// An image that is present, verified and unpacked.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `sha256:` and the digest of the image's configuration: the one identifier of this image.
    pub id: String,
    /// Normalised names with a tag, sorted.
    pub repo_tags: Vec<String>,
    /// Normalised names with a manifest's or index's digest, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes of the configuration and the compressed layers.
    pub size_bytes: u64,
    /// The configuration's user, unless empty: `uid`, `name`, `uid:gid`, …
    pub user: Option<String>,
    /// The configuration's execution parameters.
    pub config: ImageConfig,
    /// For example `amd64`; as the image says it.
    pub architecture: String,
    /// For example `linux`; as the image says it.
    pub os: String,
    /// For example `v8`.
    pub variant: Option<String>,
    /// When it was made, in RFC 3339, as the image says it.
    pub created: Option<String>,
    /// The layers to be stacked, base first. What is below a layer that hides everything is left out.
    pub layers: Vec<LayerRef>,
    /// The type of an OCI artifact, which holds files to be mounted and nothing to be run; `None`: an image. Its id
    /// is its manifest's digest.
    pub artifact: Option<String>,
    /// Whether the configuration says that this image must not be collected.
    pub pinned: bool,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LayerRef {
    /// The digest of the layer's uncompressed archive.
    pub diff_id: String,
    /// The directory that holds the unpacked layer, with whiteouts and opaque directories in
    /// overlayfs' form. It must not be written to; lower layers of many containers share it.
    pub path: PathBuf,
}

/// The space that images take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    /// The directory that holds the images.
    pub mountpoint: PathBuf,
    /// Bytes, as summed up when the layers were unpacked (blocks of 4 KiB).
    pub used_bytes: u64,
    /// Inodes, as counted when the layers were unpacked.
    pub inodes_used: u64,
}
