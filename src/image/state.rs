//! The store's state in memory: what is visible, what is used, what may be removed. No I/O happens
//! under its lock, so that listing never waits.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::database::{ImageRecord, LayerRecord};
use crate::digest::Digest;
use crate::image::Image;
use crate::reference::ImageName;

/// Ids can be shortened down to this many digits.
const MIN_PREFIX: usize = 3;

/// An image and who uses it.
pub(crate) struct Entry {
    pub(crate) record: ImageRecord,
    pub(crate) image: Arc<Image>,
    /// Leases that containers hold.
    pub(crate) leases: usize,
}

/// A complete layer.
pub(crate) struct Layer {
    pub(crate) record: LayerRecord,
    /// Whether the record is in the database.
    pub(crate) durable: bool,
    /// Directories the layer's archive didn't name, but needs; their attributes are to be taken
    /// from a lower layer when the image is put together.
    pub(crate) implied: Vec<Vec<u8>>,
}

/// Everything there is.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) images: BTreeMap<String, Entry>,
    pub(crate) layers: HashMap<Digest, Layer>,
    /// Layers that pulls in progress rely on, with the number of those pulls.
    pub(crate) holds: HashMap<Digest, usize>,
}

impl State {
    /// The id of the image that a name, an id or the beginning of an id means.
    pub(crate) fn find(&self, text: &str) -> Option<&str> {
        let hex = text.strip_prefix("sha256:");
        let full = match hex {
            Some(_) => text.to_owned(),
            None => format!("sha256:{text}"),
        };
        if let Some((id, _)) = self
            .images
            .get_key_value(&full)
            .or_else(|| self.images.get_key_value(text))
        {
            return Some(id);
        }
        if hex.is_none()
            && let Ok(name) = ImageName::parse(text)
            && let Some(id) = self.find_name(&name)
        {
            return Some(id);
        }
        self.find_prefix(hex.unwrap_or(text))
    }

    fn find_name(&self, name: &ImageName) -> Option<&str> {
        let full = name.to_string();
        let matches: &dyn Fn(&ImageRecord) -> bool = match name.digest() {
            None => &|record| record.tags.contains(&full),
            Some(digest) => {
                let (digest, prefix) = (digest.to_string(), format!("{}@", name.name()));
                &move |record| {
                    record.digests.contains(&full)
                        // The manifest for this platform behind an index is the same image, too.
                        || (record.manifests.contains(&digest)
                            && record.digests.iter().any(|known| known.starts_with(&prefix)))
                }
            }
        };
        self.images
            .iter()
            .find(|(_, entry)| matches(&entry.record))
            .map(|(id, _)| id.as_str())
    }

    fn find_prefix(&self, hex: &str) -> Option<&str> {
        if hex.len() < MIN_PREFIX || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let start = format!("sha256:{hex}");
        let mut matching = self
            .images
            .range(start.clone()..)
            .map(|(id, _)| id.as_str())
            .take_while(|id| id.starts_with(&start));
        match (matching.next(), matching.next()) {
            (Some(id), None) => Some(id),
            _ => None,
        }
    }

    /// Layers that neither an image nor a pull in progress needs.
    pub(crate) fn orphans(&self) -> Vec<Digest> {
        let used: HashSet<&str> = self
            .images
            .values()
            .flat_map(|entry| entry.record.diff_ids.iter().map(String::as_str))
            .collect();
        self.layers
            .keys()
            .filter(|id| !self.holds.contains_key(*id) && !used.contains(id.to_string().as_str()))
            .cloned()
            .collect()
    }

    /// The layers of an image that are seen, base first: from the last one on that hides all below.
    pub(crate) fn seen<'a>(&self, diff_ids: &'a [Digest]) -> &'a [Digest] {
        let opaque = |id| self.layers.get(id).is_some_and(|layer| layer.record.opaque);
        let first = diff_ids.iter().rposition(opaque).unwrap_or(0);
        &diff_ids[first..]
    }

    /// Every blob that an image needs.
    pub(crate) fn blobs(&self) -> HashSet<Digest> {
        self.images
            .values()
            .flat_map(|entry| {
                std::iter::once(&entry.record.id).chain(entry.record.manifests.iter())
            })
            .filter_map(|text| Digest::parse(text).ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(images: &[(&str, &[&str], &[&str])]) -> State {
        let mut state = State::default();
        for (id, tags, digests) in images {
            let record = ImageRecord {
                tags: tags.iter().map(|t| (*t).to_owned()).collect(),
                digests: digests.iter().map(|t| (*t).to_owned()).collect(),
                manifests: vec![format!("sha256:{}", "c".repeat(64))],
                ..ImageRecord::new((*id).to_owned())
            };
            let image = Arc::new(Image {
                id: record.id.clone(),
                repo_tags: record.tags.clone(),
                repo_digests: record.digests.clone(),
                size_bytes: 0,
                user: None,
                config: Default::default(),
                architecture: String::new(),
                os: String::new(),
                variant: None,
                created: None,
                artifact: None,
                layers: Vec::new(),
                pinned: false,
            });
            state.images.insert(
                record.id.clone(),
                Entry {
                    record,
                    image,
                    leases: 0,
                },
            );
        }
        state
    }

    #[test]
    fn every_kind_of_name_is_found() {
        let one = format!("sha256:abc1{}", "0".repeat(60));
        let two = format!("sha256:abc2{}", "0".repeat(60));
        let digest = format!("r.example/x@sha256:{}", "d".repeat(64));
        let state = state(&[
            (&one, &["docker.io/library/busybox:latest"], &[&digest]),
            (
                &two,
                &["r.example/x:1", "docker.io/library/abc2:latest"],
                &[],
            ),
        ]);
        let find = |text: &str| state.find(text);
        assert_eq!(find(&one), Some(one.as_str()));
        assert_eq!(find(&one[7..]), Some(one.as_str()));
        assert_eq!(find("abc1"), Some(one.as_str()));
        assert_eq!(find("sha256:abc1"), Some(one.as_str()));
        assert_eq!(find("abc"), None, "ambiguous");
        assert_eq!(find("ab"), None, "too short");
        assert_eq!(find("busybox"), Some(one.as_str()));
        assert_eq!(find("docker.io/busybox"), Some(one.as_str()));
        assert_eq!(find("busybox:1"), None);
        assert_eq!(find(&digest), Some(one.as_str()));
        assert_eq!(find(&digest.replace('@', ":tag@")), Some(one.as_str()));
        assert_eq!(find(&digest.replace("/x@", "/y@")), None);
        let platform = format!("r.example/x@sha256:{}", "c".repeat(64));
        assert_eq!(find(&platform), Some(one.as_str()));
        assert_eq!(find("r.example/x:1"), Some(two.as_str()));
        assert_eq!(find("abc2"), Some(two.as_str()));
        for nonsense in ["", ":", "@", "sha256:", "../..", "SHA256:ABC"] {
            assert_eq!(find(nonsense), None, "{nonsense}");
        }
    }
}
