//! Images from files: OCI image layouts (as a directory or in a tar archive) and archives of
//! `docker save`. Everything is verified as if it came from a registry.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tokio::task::JoinSet;

use crate::artifact::{self, Form};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::Image;
use crate::import::source::Source;
use crate::layers::Expected;
use crate::manifest::{
    self, ConfigFile, Descriptor, Document, IndexEntry, MAX_CONFIG, MAX_MANIFEST,
};
use crate::pull::MAX_DEPTH;
use crate::reference::ImageName;
use crate::store::{ImageStore, Inner, NewImage};

mod source;

/// Annotations that hold an image's name in a layout's index; the first that is there counts.
const FULL_NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// One image of the file, with where its parts are.
struct Found {
    /// A name with a tag, if the file says one.
    name: Option<ImageName>,
    /// The digest that the name stands for; `docker save` knows none.
    top: Option<Digest>,
    documents: Vec<(Digest, Vec<u8>)>,
    config: Vec<u8>,
    /// Base first.
    layers: Vec<Blob>,
    artifact: Option<String>,
    id: Digest,
    more_names: Vec<ImageName>,
}

/// A file that becomes a layer.
struct Blob {
    file: String,
    expected: Expected,
}

impl ImageStore {
    /// Imports every image in `path` that is for this platform: an OCI image layout, an archive of
    /// one, or an archive of `docker save`; archives may be compressed. `tag` names the image, which
    /// must then be the only one; otherwise the names in the file count, if there are any.
    ///
    /// # Errors
    /// [`ImageError::BadArchive`] when it is none of these; everything that [`pull`](Self::pull) says
    /// of layers and manifests.
    pub async fn import(
        &self,
        path: &Path,
        tag: Option<&str>,
    ) -> Result<Vec<Arc<Image>>, ImageError> {
        let tag = tag.map(ImageName::parse).transpose()?;
        if let Some(name) = &tag
            && name.tag().is_none()
        {
            return Err(ImageError::InvalidReference {
                reference: name.to_string(),
                reason: "an image can be given a tag, not a digest".to_owned(),
            });
        }
        let what = format!("the import of {}", path.display());
        let inner = Arc::clone(&self.inner);
        let opened = path.to_path_buf();
        let (source, mut found) = self
            .inner
            .blocking(what.clone(), move || {
                let source = Source::open(&opened, &inner.root.join("staging"))?;
                let found = images(&source, &inner)?;
                Ok((Arc::new(source), found))
            })
            .await?;
        if let Some(name) = tag {
            let [image] = found.as_mut_slice() else {
                return Err(ImageError::BadArchive {
                    path: path.to_path_buf(),
                    reason: format!(
                        "it holds {} images, so one tag can't name them; import it without",
                        found.len()
                    ),
                });
            };
            image.name = Some(name);
            image.more_names.clear();
        }
        let mut imported = Vec::with_capacity(found.len());
        for image in found {
            imported.push(import_one(&self.inner, &source, image, &what).await?);
        }
        Ok(imported)
    }
}

async fn import_one(
    inner: &Arc<Inner>,
    source: &Arc<Source>,
    found: Found,
    what: &str,
) -> Result<Arc<Image>, ImageError> {
    let diff_ids: Vec<_> = found
        .layers
        .iter()
        .map(|layer| layer.expected.diff_id.clone())
        .collect();
    let hold = Arc::new(inner.hold(&diff_ids));
    let mut size_bytes = found.config.len() as u64;
    let (mut tasks, tracker) = (JoinSet::new(), inner);
    for Blob { file, expected } in found.layers {
        size_bytes = size_bytes.saturating_add(match &expected.blob {
            Some((_, size)) => *size,
            None => source.size(&file)?,
        });
        let (inner, source, hold) = (Arc::clone(inner), Arc::clone(source), Arc::clone(&hold));
        let task = async move {
            let lock = inner.lock_layer(&expected.diff_id).await;
            if inner.has_layer(&expected.diff_id) {
                return Ok(());
            }
            let lost = || ImageError::Lost {
                what: format!("layer {}", expected.name()),
            };
            let _turn = inner.turns.local().await.ok_or_else(lost)?;
            let (worker, wanted) = (Arc::clone(&inner), expected.clone());
            let unpacking = inner.tasks.spawn_blocking(move || {
                let written = std::sync::atomic::AtomicU64::new(0);
                let stream = source.stream(&file)?;
                let result = worker.unpack_layer(stream, &wanted, &written);
                drop(lock);
                drop(hold);
                result
            });
            unpacking.await.map_err(|_| lost())?
        };
        // Tracked, because an aborted task lets go of its hold some time later.
        tasks.spawn(tracker.tasks.track_future(task));
    }
    while let Some(joined) = tasks.join_next().await {
        joined.map_err(|_| ImageError::Lost {
            what: what.to_owned(),
        })??;
    }
    let names: Vec<&ImageName> = found.name.iter().chain(&found.more_names).collect();
    let new = NewImage {
        id: found.id,
        config: found.config,
        artifact: found.artifact,
        manifests: found.documents,
        diff_ids,
        size_bytes,
        tags: names.iter().map(ToString::to_string).collect(),
        digests: match &found.top {
            Some(top) => names.iter().map(|name| name.with_digest(top)).collect(),
            None => Vec::new(),
        },
    };
    let publisher = Arc::clone(inner);
    inner
        .blocking(what.to_owned(), move || {
            let image = publisher.publish(&new);
            drop(hold);
            image
        })
        .await
}

/// What images a file holds, with their configurations read and verified.
fn images(source: &Source, inner: &Inner) -> Result<Vec<Found>, ImageError> {
    if source.has("index.json") && source.has("oci-layout") {
        return layout_images(source, inner);
    }
    if source.has("manifest.json") {
        return docker_images(source, inner);
    }
    Err(source.bad("it is neither an OCI image layout nor an archive of `docker save`"))
}

fn layout_images(source: &Source, inner: &Inner) -> Result<Vec<Found>, ImageError> {
    let what = format!("index.json of {}", source.path().display());
    let bytes = source.read("index.json", MAX_MANIFEST)?;
    let Document::Index(index) = manifest::parse(&bytes, None, &what)? else {
        return Err(source.bad("its index.json is no index"));
    };
    let fits = |entry: &&IndexEntry| match &entry.platform {
        None => entry.is_for_unknown_platform(),
        Some(own) => inner
            .platform
            .rank(&own.os, &own.architecture, own.variant.as_deref())
            .is_some(),
    };
    let entries: Vec<&IndexEntry> = index.entries.iter().filter(fits).collect();
    if entries.is_empty() {
        // Says which platforms there are.
        index.select(&inner.platform, &what)?;
    }
    entries
        .into_iter()
        .map(|entry| layout_image(source, inner, entry))
        .collect()
}

fn layout_image(source: &Source, inner: &Inner, entry: &IndexEntry) -> Result<Found, ImageError> {
    let name = layout_name(entry);
    let what = format!("index.json of {}", source.path().display());
    let mut descriptor = entry.descriptor(&what)?;
    let top = descriptor.digest.clone();
    let mut documents = Vec::new();
    for _ in 0..MAX_DEPTH {
        let what = format!(
            "manifest {} of {}",
            descriptor.digest,
            source.path().display()
        );
        let bytes = blob(source, &descriptor, MAX_MANIFEST, &what)?;
        let document = manifest::parse(&bytes, Some(&descriptor.media_type), &what)?;
        documents.push((descriptor.digest.clone(), bytes));
        let manifest = match document {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                descriptor = index.select(&inner.platform, &what)?.descriptor(&what)?;
                continue;
            }
        };
        let (id, config, parts) = match (&manifest.artifact, documents.last()) {
            (Some(_), Some((digest, bytes))) => {
                let parts = artifact::parts(&manifest, &what)?;
                (digest.clone(), bytes.clone(), parts)
            }
            _ => {
                let config = blob(source, &manifest.config, MAX_CONFIG, &what)?;
                let file = ConfigFile::parse(&config, &what)?;
                file.check_platform(&inner.platform, &what)?;
                let parts = file.parts(&manifest.layers, &what)?;
                (manifest.config.digest, config, parts)
            }
        };
        let layers = parts.into_iter().map(|part| Blob {
            file: blob_name(&part.blob.digest),
            expected: Expected {
                blob: Some((part.blob.digest, part.blob.size)),
                diff_id: part.layer,
                form: part.form,
            },
        });
        return Ok(Found {
            name,
            top: Some(top),
            documents,
            layers: layers.collect(),
            artifact: manifest.artifact,
            config,
            id,
            more_names: Vec::new(),
        });
    }
    Err(source.bad(format!("its indexes are nested more than {MAX_DEPTH} deep")))
}

/// A bare tag in the annotation names no image; only whole names count.
fn layout_name(entry: &IndexEntry) -> Option<ImageName> {
    let text = entry.annotations.get(FULL_NAME).or_else(|| {
        entry
            .annotations
            .get(REF_NAME)
            .filter(|text| text.contains(['/', ':']))
    })?;
    ImageName::parse(text)
        .ok()
        .filter(|name| name.tag().is_some())
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn blob(
    source: &Source,
    descriptor: &Descriptor,
    limit: u64,
    what: &str,
) -> Result<Vec<u8>, ImageError> {
    let digest = &descriptor.digest;
    let bytes = source.read(&blob_name(digest), limit)?;
    digest
        .check(&bytes)
        .map_err(|actual| ImageError::DigestMismatch {
            what: format!("{what}, file {}", blob_name(digest)),
            expected: digest.to_string(),
            actual: actual.to_string(),
        })?;
    if bytes.len() as u64 != descriptor.size {
        return Err(ImageError::SizeMismatch {
            what: format!("{what}, file {}", blob_name(digest)),
            expected: descriptor.size,
            actual: bytes.len() as u64,
        });
    }
    Ok(bytes)
}

/// One image in the `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn docker_images(source: &Source, inner: &Inner) -> Result<Vec<Found>, ImageError> {
    let bytes = source.read("manifest.json", MAX_MANIFEST)?;
    let saved: Vec<SavedImage> = serde_json::from_slice(&bytes).map_err(|error| {
        source.bad(format!(
            "its manifest.json is not one of `docker save`: {error}"
        ))
    })?;
    let mut images: HashMap<Digest, Found> = HashMap::new();
    let mut order = Vec::new();
    for saved in saved {
        let what = format!("image {} of {}", saved.config, source.path().display());
        let config = source.read(&saved.config, MAX_CONFIG)?;
        let file = ConfigFile::parse(&config, &what)?;
        file.check_platform(&inner.platform, &what)?;
        let diff_ids = file.diff_ids(saved.layers.len(), &what)?;
        let mut names = saved
            .repo_tags
            .unwrap_or_default()
            .iter()
            .map(|tag| ImageName::parse(tag))
            .collect::<Result<Vec<_>, _>>()?;
        names.retain(|name| name.tag().is_some());
        let id = Digest::of(&config);
        order.push(id.clone());
        let image = images.entry(id.clone()).or_insert_with(|| Found {
            name: None,
            top: None,
            documents: Vec::new(),
            config,
            layers: (saved.layers.into_iter().zip(diff_ids))
                .map(|(file, diff_id)| Blob {
                    file,
                    expected: Expected {
                        blob: None,
                        diff_id,
                        form: Form::Layer,
                    },
                })
                .collect(),
            artifact: None,
            id,
            more_names: Vec::new(),
        });
        image.more_names.extend(names);
    }
    Ok(order.iter().filter_map(|id| images.remove(id)).collect())
}

#[cfg(test)]
mod tests;
