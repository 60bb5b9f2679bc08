use std::fs;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::testing::{Tar, TestImage, gzip, layout_files, noise, platform, write_layout, zstd};
use crate::{ErrorKind, ImageStore, StoreConfig};

struct Fixture {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            root: dir.path().join("store"),
            platform: platform(),
            ..StoreConfig::default()
        };
        let store = ImageStore::open(config).unwrap();
        Self { dir, store }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    async fn assert_clean(&self) {
        self.store.idle().await;
        for dir in ["staging", "trash", "layers/sha256", "blobs/sha256"] {
            let count = fs::read_dir(self.dir.path().join("store").join(dir))
                .unwrap()
                .count();
            assert_eq!(count, 0, "{dir}");
        }
    }
}

fn image() -> TestImage {
    let layer = |seed| Tar::default().file("noise", &noise(100_000, seed)).finish();
    TestImage::new(&[layer(1), layer(2), layer(3)], "")
}

fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    files
        .iter()
        .fold(Tar::default(), |tar, (name, bytes)| tar.file(name, bytes))
        .finish()
}

/// What `docker save` wrote before version 25, with a repeated layer as a symbolic link.
fn docker_save(tags: &[&str]) -> (Vec<u8>, String) {
    let one = Tar::default().file("one", b"one").finish();
    let image = TestImage::new(&[one.clone(), one.clone()], "www-data");
    let manifest = serde_json::json!([{
        "Config": "config.json",
        "RepoTags": tags,
        "Layers": ["aaa/layer.tar", "bbb/layer.tar"],
    }]);
    let tar = Tar::default()
        .file("config.json", &image.config)
        .file("aaa/layer.tar", &one)
        .symlink("bbb/layer.tar", "../aaa/layer.tar")
        .file("manifest.json", manifest.to_string().as_bytes())
        .finish();
    (tar, image.id())
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_and_archives_are_imported() {
    let fixture = Fixture::new();
    let image = image();
    let files = layout_files(&[("r.example/x:1", &image)]);
    let dir = fixture.dir.path().join("layout");
    write_layout(&dir, &[("r.example/x:1", &image)]);
    let sources = [
        dir,
        fixture.file("oci.tar", &tar(&files)),
        fixture.file("oci.tar.gz", &gzip(&tar(&files))),
        fixture.file("oci.tar.zst", &zstd(&tar(&files))),
    ];
    for source in sources {
        let imported = fixture.store.import(&source, None).await.unwrap();
        assert_eq!(imported.len(), 1);
        assert_eq!(imported[0].id, image.id());
        assert_eq!(imported[0].repo_tags, ["r.example/x:1"]);
        assert_eq!(
            imported[0].repo_digests,
            [format!("r.example/x@{}", image.digest())]
        );
        for (index, layer) in imported[0].layers.iter().enumerate() {
            assert_eq!(
                fs::read(layer.path.join("noise")).unwrap(),
                noise(100_000, index as u64 + 1)
            );
        }
        fixture.store.remove("r.example/x:1").await.unwrap();
        fixture.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_archives_are_imported() {
    let fixture = Fixture::new();
    let (archive, id) = docker_save(&["busybox:1", "r.example/b:2"]);
    for (name, bytes) in [("d.tar", archive.clone()), ("d.tar.gz", gzip(&archive))] {
        let imported = fixture
            .store
            .import(&fixture.file(name, &bytes), None)
            .await
            .unwrap();
        assert_eq!(imported[0].id, id);
        assert_eq!(
            imported[0].repo_tags,
            ["docker.io/library/busybox:1", "r.example/b:2"]
        );
        assert_eq!(imported[0].user.as_deref(), Some("www-data"));
        assert_eq!(imported[0].layers.len(), 2);
        assert!(imported[0].size_bytes > 0);
        fixture.store.remove("busybox:1").await.unwrap();
        fixture.assert_clean().await;
    }
    let imported = fixture
        .store
        .import(&fixture.dir.path().join("d.tar"), Some("mine"))
        .await
        .unwrap();
    assert_eq!(imported[0].repo_tags, ["docker.io/library/mine:latest"]);
    assert!(imported[0].repo_digests.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_images_and_bare_tags() {
    let fixture = Fixture::new();
    let (one, two) = (TestImage::small("one"), TestImage::small("two"));
    let file = fixture.file(
        "two.tar",
        &tar(&layout_files(&[
            ("latest", &one),
            ("r.example/two:2", &two),
        ])),
    );
    let error = fixture.store.import(&file, Some("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let imported = fixture.store.import(&file, None).await.unwrap();
    assert!(
        imported[0].repo_tags.is_empty(),
        "a bare tag names no image"
    );
    assert_eq!(imported[1].repo_tags, ["r.example/two:2"]);
    assert_eq!(fixture.store.list().len(), 2);
    let only = fixture.file("one.tar", &tar(&layout_files(&[("latest", &one)])));
    let imported = fixture
        .store
        .import(&only, Some("r.example/one:1"))
        .await
        .unwrap();
    assert_eq!(imported[0].repo_tags, ["r.example/one:1"]);
    let digest = format!("x@sha256:{}", "0".repeat(64));
    assert!(fixture.store.import(&only, Some(&digest)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_files_are_refused() {
    let fixture = Fixture::new();
    let image = image();
    let files = layout_files(&[("r.example/x:1", &image)]);
    let layer = format!("blobs/sha256/{}", Digest::of(&image.layers[1]).hex());
    let config = format!("blobs/sha256/{}", Digest::of(&image.config).hex());
    let without = |name: &str| {
        tar(&files
            .iter()
            .filter(|(n, _)| n != name)
            .cloned()
            .collect::<Vec<_>>())
    };
    let flipped = |name: &str| {
        let mut files = files.clone();
        let (_, bytes) = files.iter_mut().find(|(n, _)| n == name).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        tar(&files)
    };
    let (saved, _) = docker_save(&["x"]);
    let forged = Tar::default().file("one", b"two").finish();
    let saved_forged = Tar::default()
        .file(
            "config.json",
            &TestImage::new(&[Tar::default().file("one", b"one").finish()], "").config,
        )
        .file("layer.tar", &forged)
        .file(
            "manifest.json",
            br#"[{"Config":"config.json","RepoTags":null,"Layers":["layer.tar"]}]"#,
        )
        .finish();
    for (what, bytes, kind) in [
        ("nothing", Vec::new(), ErrorKind::InvalidArgument),
        ("noise", noise(10_000, 5), ErrorKind::InvalidArgument),
        (
            "another archive",
            Tar::default().file("x", b"x").finish(),
            ErrorKind::InvalidArgument,
        ),
        (
            "half of it",
            tar(&files)[..20_000].to_vec(),
            ErrorKind::InvalidArgument,
        ),
        (
            "half of a compressed one",
            gzip(&tar(&files))[..9000].to_vec(),
            ErrorKind::InvalidArgument,
        ),
        (
            "half of docker's",
            saved[..3000].to_vec(),
            ErrorKind::InvalidArgument,
        ),
        (
            "a missing layer",
            without(&layer),
            ErrorKind::InvalidArgument,
        ),
        (
            "a missing configuration",
            without(&config),
            ErrorKind::InvalidArgument,
        ),
        (
            "a flipped bit in a layer",
            flipped(&layer),
            ErrorKind::DataLoss,
        ),
        (
            "a flipped bit in the configuration",
            flipped(&config),
            ErrorKind::DataLoss,
        ),
        ("another layer", saved_forged, ErrorKind::DataLoss),
        (
            "a name that climbs",
            Tar::default()
                .file(
                    "manifest.json",
                    br#"[{"Config":"../../../../etc/passwd","RepoTags":null,"Layers":[]}]"#,
                )
                .finish(),
            ErrorKind::InvalidArgument,
        ),
    ] {
        let file = fixture.file("bad.tar", &bytes);
        let error = fixture.store.import(&file, None).await.expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {}", error.chain());
        assert!(fixture.store.list().is_empty());
        fixture.assert_clean().await;
    }
    let error = fixture
        .store
        .import(&fixture.dir.path().join("absent"), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no such file"), "{error}");
    // A directory whose manifest names files outside of it.
    let dir = fixture.dir.path().join("climbing");
    fs::create_dir(&dir).unwrap();
    fs::write(
        dir.join("manifest.json"),
        br#"[{"Config":"../bad.tar","RepoTags":null,"Layers":[]}]"#,
    )
    .unwrap();
    let error = fixture.store.import(&dir, None).await.unwrap_err();
    assert!(error.to_string().contains("outside"), "{error}");
}
