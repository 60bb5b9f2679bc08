//! Images: references, registries, layers.
//!
//! [`ImageStore`] is the whole of it: it pulls images from registries (OCI and Docker), imports
//! archives, unpacks every layer into a directory of its own for overlayfs to stack, and removes
//! them again. Nothing becomes visible before its digests are verified, and whatever instruction the
//! process dies at, the next start finds whole images only.
//!
//! This crate knows nothing of pods, of the CRI's messages or of gRPC.
#![forbid(unsafe_code)]

mod artifact;
mod blobs;
mod config;
mod credentials;
mod database;
mod decompress;
mod digest;
mod error;
mod image;
mod import;
mod inflight;
mod layers;
mod manifest;
mod meter;
mod progress;
mod pull;
mod reference;
mod registry;
#[cfg(test)]
mod scenarios;
mod state;
mod store;
mod tarball;
#[cfg(test)]
mod testing;
mod transfer;
mod trees;
mod turns;
mod unpack;

pub use config::{Platform, RegistryConfig, StoreConfig};
pub use credentials::Credentials;
pub use digest::Digest;
pub use error::{ErrorKind, ImageError};
pub use image::{FsInfo, Image, ImageConfig, LayerRef};
pub use progress::{LayerProgress, LayerStatus, ProgressSender, PullProgress};
pub use reference::ImageName;
pub use store::{ImageLease, ImageStore};
