//! What the tests of several modules need: archives of any shape, and a registry that can lie.

use std::io::Write as _;

use crate::digest::Digest;

pub(crate) mod registry;

/// Whether device nodes, owners and trusted attributes can be made here.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: needs root for device nodes, owners and trusted attributes");
    }
    root
}

/// Builds tar archives, also such as no honest tool would write.
#[derive(Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    pub(crate) fn raw(
        mut self,
        kind: u8,
        name: &[u8],
        link: &[u8],
        mode: u32,
        data: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_ustar();
        let name = &name[..name.len().min(100)];
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.as_old_mut().linkflag = [kind];
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        header
            .set_device_major(if matches!(kind, b'3' | b'4') { 1 } else { 0 })
            .unwrap();
        header
            .set_device_minor(if matches!(kind, b'3' | b'4') { 3 } else { 0 })
            .unwrap();
        self = self.header(header);
        self.data(data)
    }

    pub(crate) fn header(mut self, mut header: tar::Header) -> Self {
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self
    }

    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(b'0', name.as_bytes(), b"", 0o644, data)
    }

    pub(crate) fn dir(self, name: &str, mode: u32) -> Self {
        self.raw(b'5', name.as_bytes(), b"", mode, b"")
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(b'2', name.as_bytes(), target.as_bytes(), 0o777, b"")
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(b'1', name.as_bytes(), target.as_bytes(), 0o644, b"")
    }

    /// PAX records for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(text, "{length} {key}=").unwrap();
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        self.raw(b'x', b"PaxHeaders", b"", 0o644, &text)
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// Bytes that don't compress, always the same for the same seed.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect()
}

/// An image as a registry or a layout holds it.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) config: Vec<u8>,
    /// Blobs, base first.
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
}

impl TestImage {
    /// From uncompressed archives; the n-th is compressed with the n-th of gzip, zstd and nothing.
    pub(crate) fn new(archives: &[Vec<u8>], user: &str) -> Self {
        let diff_ids: Vec<String> = archives
            .iter()
            .map(|archive| Digest::of(archive).to_string())
            .collect();
        let config = serde_json::json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": ["/bin/sh"], "User": user, "Env": ["A=B"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string()
        .into_bytes();
        let layers: Vec<Vec<u8>> = archives
            .iter()
            .enumerate()
            .map(|(index, archive)| match index % 3 {
                0 => gzip(archive),
                1 => zstd(archive),
                _ => archive.clone(),
            })
            .collect();
        let manifest = Self::manifest(&config, &layers);
        Self {
            config,
            layers,
            manifest,
        }
    }

    /// One small layer that holds `text`.
    pub(crate) fn small(text: &str) -> Self {
        Self::new(&[Tar::default().file("file", text.as_bytes()).finish()], "")
    }

    pub(crate) fn manifest(config: &[u8], layers: &[Vec<u8>]) -> Vec<u8> {
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                serde_json::json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": Digest::of(layer).to_string(),
                    "size": layer.len(),
                })
            })
            .collect();
        serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(config).to_string(),
                "size": config.len(),
            },
            "layers": layers,
        })
        .to_string()
        .into_bytes()
    }

    pub(crate) fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }

    pub(crate) fn digest(&self) -> String {
        Digest::of(&self.manifest).to_string()
    }
}

/// The platform of the test images.
pub(crate) fn platform() -> crate::Platform {
    crate::Platform {
        os: "linux".into(),
        architecture: "amd64".into(),
        variant: None,
    }
}

/// Writes an OCI image layout with images under their `org.opencontainers.image.ref.name`.
pub(crate) fn write_layout(dir: &std::path::Path, images: &[(&str, &TestImage)]) {
    for (name, bytes) in layout_files(images) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// The files of an OCI image layout, by name.
pub(crate) fn layout_files(images: &[(&str, &TestImage)]) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![(
        "oci-layout".to_owned(),
        br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
    )];
    let mut entries = Vec::new();
    for (name, image) in images {
        for blob in image.layers.iter().chain([&image.config, &image.manifest]) {
            files.push((
                format!("blobs/sha256/{}", Digest::of(blob).hex()),
                blob.clone(),
            ));
        }
        entries.push(serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest(),
            "size": image.manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": name },
        }));
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": entries });
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    files
}
