//! OCI artifacts (image specification 1.1, "Guidelines for Artifact Usage"): manifests whose configuration is no image's.
//! They can't be run, but mounted as volumes (KEP-4639).
//!
//! Each blob becomes a layer of its own, so that blobs arrive side by side, are verified and shared like an image's
//! layers, and go when nobody needs them any more. A blob that is a file system layer by its media type is unpacked;
//! any other is one file, as it came, called what `org.opencontainers.image.title` says.

use std::collections::BTreeSet;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{Descriptor, Manifest, is_layer};

/// The media type of what stands for nothing.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// More blobs than overlayfs can stack, above an empty directory.
const MAX_FILES: usize = 499;
/// The longest path of a file, in bytes.
const MAX_PATH: usize = 1024;
/// The longest name that file systems take, in bytes.
const MAX_NAME: usize = 255;

/// What a blob becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    /// The files of an image's layer, whose uncompressed digest is known.
    Layer,
    /// The files of an archive of which only the blob's digest is known.
    Tree,
    /// One file of this path, which is relative and has no `..`.
    File(String),
}

/// A blob of an image or artifact on its way to a layer's directory.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) blob: Descriptor,
    /// What the layer is known by: an image's diff ID, or a digest of what is made of which blob. The latter can't
    /// be that of any content that somebody has.
    pub(crate) layer: Digest,
    pub(crate) form: Form,
}

/// The parts of an artifact. `what` names it in errors.
///
/// # Errors
/// For names that can't be files' in one directory.
pub(crate) fn parts(manifest: &Manifest, what: &str) -> Result<Vec<Part>, ImageError> {
    let refused = |reason: String| ImageError::Malformed {
        what: what.to_owned(),
        reason,
    };
    let mut parts = Vec::new();
    let mut names = BTreeSet::new();
    for blob in &manifest.layers {
        if blob.media_type == EMPTY && blob.title.is_none() {
            continue;
        }
        let digest = &blob.digest;
        if is_layer(&blob.media_type) && !blob.media_type.is_empty() {
            parts.push(Part {
                layer: Digest::of(format!("slipway artifact tree\0{digest}").as_bytes()),
                blob: blob.clone(),
                form: Form::Tree,
            });
            continue;
        }
        let name = match &blob.title {
            Some(title) => title.clone(),
            // As podman calls it.
            None => digest.to_string().replace(':', "-"),
        };
        check(&name).map_err(|reason| refused(format!("its file {name:?} {reason}")))?;
        if !names.insert(name.clone()) {
            return Err(refused(format!("two of its files are called {name:?}")));
        }
        parts.push(Part {
            layer: Digest::of(format!("slipway artifact file\0{name}\0{digest}").as_bytes()),
            blob: blob.clone(),
            form: Form::File(name),
        });
    }
    for name in &names {
        let mut above = name.as_str();
        while let Some((parent, _)) = above.rsplit_once('/') {
            if names.contains(parent) {
                let reason =
                    format!("its file {parent:?} is the directory of its file {name:?}, too");
                return Err(refused(reason));
            }
            above = parent;
        }
    }
    if parts.len() > MAX_FILES {
        return Err(refused(format!("it has more than {MAX_FILES} files")));
    }
    Ok(parts)
}

/// Says what is wrong with a file's path, as the end of a sentence.
fn check(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("has no name".to_owned());
    }
    if name.starts_with('/') {
        return Err("has an absolute path".to_owned());
    }
    if name.len() > MAX_PATH {
        return Err(format!("has a path of more than {MAX_PATH} bytes"));
    }
    if name.chars().any(char::is_control) {
        return Err("has a control character in its name".to_owned());
    }
    for part in name.split('/') {
        match part {
            "" | "." | ".." => return Err(format!("has {part:?} in its path")),
            long if long.len() > MAX_NAME => {
                return Err(format!("has a name of more than {MAX_NAME} bytes"));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(layers: &[(&str, Option<&str>)]) -> Manifest {
        let blob = |(at, (media_type, title)): (usize, &(&str, Option<&str>))| Descriptor {
            digest: Digest::of(at.to_string().as_bytes()),
            size: 1,
            media_type: (*media_type).to_owned(),
            title: title.map(str::to_owned),
        };
        Manifest {
            config: blob((1000, &(EMPTY, None))),
            layers: layers.iter().enumerate().map(blob).collect(),
            artifact: Some("application/vnd.example".into()),
        }
    }

    #[test]
    fn blobs_become_files_and_layers_trees() {
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        let found = parts(
            &manifest(&[
                ("text/plain", Some("a.txt")),
                ("application/x.tar", Some("dir/b.tar")),
                (tar, Some("dir")),
                ("text/plain", None),
                (EMPTY, None),
                ("", Some(".wh.odd..")),
            ]),
            "x",
        )
        .unwrap();
        let hash = Digest::of(b"3").hex().to_owned();
        let forms: Vec<_> = found.iter().map(|p| p.form.clone()).collect();
        let file = |name: &str| Form::File(name.to_owned());
        assert_eq!(
            forms,
            [
                file("a.txt"),
                file("dir/b.tar"),
                Form::Tree,
                file(&format!("sha256-{hash}")),
                file(".wh.odd.."),
            ]
        );
        let layers: BTreeSet<_> = found.iter().map(|p| &p.layer).collect();
        assert_eq!(layers.len(), 5);
        assert!(found.iter().all(|p| p.layer != p.blob.digest));
        assert!(parts(&manifest(&[]), "x").unwrap().is_empty());
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "n".repeat(256);
        let deep = "d/".repeat(600) + "f";
        for (names, reason) in [
            (&[""][..], "has no name"),
            (&["/etc/passwd"], "absolute"),
            (&["../escape"], "\"..\""),
            (&["a/../../b"], "\"..\""),
            (&["a//b"], "\"\""),
            (&["a/"], "\"\""),
            (&["."], "\".\""),
            (&["a\nb"], "control character"),
            (&["a\0b"], "control character"),
            (&[&long], "255"),
            (&[&deep], "1024"),
            (&["a", "a"], "two of its files are called \"a\""),
            (&["a/b/c", "a"], "is the directory of its file"),
        ] {
            let layers: Vec<_> = names.iter().map(|n| ("text/plain", Some(*n))).collect();
            let error = parts(&manifest(&layers), "artifact x")
                .expect_err(reason)
                .to_string();
            assert!(
                error.contains(reason) && error.contains("artifact x"),
                "{error}"
            );
        }
        let many: Vec<String> = (0..500).map(|n| n.to_string()).collect();
        let many: Vec<_> = many
            .iter()
            .map(|n| ("text/plain", Some(n.as_str())))
            .collect();
        assert!(
            parts(&manifest(&many), "x")
                .unwrap_err()
                .to_string()
                .contains("499")
        );
    }
}
