//! Pulls that go well, names, removal, leases, restarts, sharing and cancellation.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_listed_and_removed() {
    let registry = FakeRegistry::start().await;
    let image = large_image();
    let reference = registry.add("a/b", "test", &image);
    let fixture = Fixture::new();
    let progress = crate::ProgressSender::default();
    let mut watched = progress.subscribe();
    let pulled = fixture
        .store
        .pull(&reference, None, Some(progress))
        .await
        .unwrap();
    let repository = reference.trim_end_matches(":test");
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.repo_tags, std::slice::from_ref(&reference));
    assert_eq!(
        pulled.repo_digests,
        [format!("{repository}@{}", image.digest())]
    );
    assert_eq!(pulled.user.as_deref(), Some("1003:group"));
    assert_eq!(
        pulled.config.cmd().as_deref(),
        Some(&["/bin/sh".to_owned()][..])
    );
    let blobs: usize = image.layers.iter().map(Vec::len).sum();
    assert_eq!(pulled.size_bytes, (blobs + image.config.len()) as u64);
    assert_eq!(pulled.layers.len(), 3);
    for (index, layer) in pulled.layers.iter().enumerate() {
        let noise = noise(1 << 20, index as u64 + 1);
        assert_eq!(fs::read(layer.path.join("d/noise")).unwrap(), noise);
    }
    let last = watched.borrow_and_update().clone();
    assert!(
        last.layers
            .iter()
            .all(|layer| layer.status == LayerStatus::Done && layer.downloaded == layer.total)
    );
    assert!(
        last.layers
            .iter()
            .all(|layer| layer.unpacked == (1 << 20) + 1)
    );
    // Three layers of a root, a directory, a large and a small file.
    let info = fixture.store.fs_info();
    assert_eq!(
        (info.inodes_used, info.used_bytes),
        (12, 3 * (2 * 4096 + (1 << 20) + 4096))
    );

    for name in [
        &reference,
        &pulled.id,
        &pulled.id[7..],
        &pulled.id[7..20],
        &pulled.repo_digests[0],
    ] {
        assert_eq!(
            fixture.store.resolve(name).as_ref(),
            Some(&pulled),
            "{name}"
        );
    }
    assert_eq!(fixture.store.list(), std::slice::from_ref(&pulled));

    let fixture = fixture.reopen().await;
    assert_eq!(fixture.store.list(), std::slice::from_ref(&pulled));
    assert_eq!(fixture.store.fs_info(), info);
    fixture.store.remove(&reference).await.unwrap();
    assert_eq!(fixture.store.resolve(&pulled.id), None);
    fixture.store.remove(&reference).await.unwrap();
    fixture.store.remove(&pulled.id).await.unwrap();
    fixture.assert_clean().await;
    fixture.reopen().await.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_and_short_names() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::small("digest");
    let by_tag = registry.add("x", "latest", &image);
    let repository = by_tag.trim_end_matches(":latest").to_owned();
    let by_digest = format!("{repository}@{}", image.digest());
    let fixture = Fixture::new();
    let pulled = fixture.pull(&by_digest).await.unwrap();
    assert!(pulled.repo_tags.is_empty());
    assert_eq!(pulled.repo_digests, std::slice::from_ref(&by_digest));
    fixture.store.remove(&by_digest).await.unwrap();
    // A tag beside a digest is decoration.
    let pulled = fixture
        .pull(&by_digest.replace('@', ":other@"))
        .await
        .unwrap();
    assert!(pulled.repo_tags.is_empty());
    // No tag is `latest`; the digest reference stays.
    let pulled = fixture.pull(&repository).await.unwrap();
    assert_eq!(pulled.repo_tags, [by_tag]);
    assert_eq!(pulled.repo_digests, [by_digest]);
    assert_eq!(fixture.store.resolve(&repository), Some(pulled));
    assert_eq!(fixture.store.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_with_many_tags_is_removed_at_once() {
    let (one, two) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::small("pause");
    let fixture = Fixture::new();
    let mut names = vec![
        one.add("p", "1", &image),
        one.add("p", "2", &image),
        two.add("q", "3", &image),
    ];
    for name in &names {
        assert_eq!(fixture.pull(name).await.unwrap().id, image.id());
    }
    names.sort();
    let found = fixture.store.resolve(&names[1]).unwrap();
    assert_eq!(found.repo_tags, names);
    assert_eq!(found.repo_digests.len(), 2);
    // The layer was here after the first pull.
    assert_eq!(two.count("/blobs/"), 0);
    // Five at once, as critest does.
    let removals: Vec<_> = (0..5)
        .map(|_| {
            let (store, id) = (fixture.store.clone(), found.id.clone());
            tokio::spawn(async move {
                store.remove(&id).await.unwrap();
                assert_eq!(store.resolve(&id), None);
            })
        })
        .collect();
    for removal in removals {
        removal.await.unwrap();
    }
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_leaves_the_old_image_its_digest() {
    let registry = FakeRegistry::start().await;
    let fixture = Fixture::new();
    let shared = Tar::default().file("shared", b"shared").finish();
    let image = |text: &str| {
        TestImage::new(
            &[
                shared.clone(),
                Tar::default().file("own", text.as_bytes()).finish(),
            ],
            "",
        )
    };
    let (old, new) = (image("old"), image("new"));
    let name = registry.add("m", "t", &old);
    fixture.pull(&name).await.unwrap();
    registry.add("m", "t", &new);
    fixture.pull(&name).await.unwrap();
    let old_now = fixture.store.resolve(&old.id()).unwrap();
    assert!(old_now.repo_tags.is_empty());
    assert_eq!(old_now.repo_digests.len(), 1);
    assert_eq!(fixture.store.resolve(&name).unwrap().id, new.id());
    let fixture = fixture.reopen().await;
    assert!(
        fixture
            .store
            .resolve(&old.id())
            .unwrap()
            .repo_tags
            .is_empty()
    );
    // The shared layer goes with its last image.
    fixture.store.remove(&new.id()).await.unwrap();
    fixture.store.idle().await;
    for layer in &old_now.layers {
        assert!(layer.path.is_dir());
    }
    fixture.store.remove(&old.id()).await.unwrap();
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_keeps_the_image() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::small("leased");
    let name = registry.add("l", "t", &image);
    let fixture = Fixture::new();
    assert_eq!(
        fixture.store.lease(&name).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    fixture.pull(&name).await.unwrap();
    let first = fixture.store.lease(&image.id()).unwrap();
    let second = fixture.store.lease(&name).unwrap();
    // A pull in between keeps the count.
    fixture.pull(&name).await.unwrap();
    drop(first);
    let error = fixture.store.remove(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("1 container"), "{error}");
    assert!(second.image().layers[0].path.is_dir());
    drop(second);
    fixture.store.remove(&name).await.unwrap();
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_what_is_here_writes_nothing() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::small("same");
    let name = registry.add("same", "t", &image);
    let other = registry.add("same", "other", &image);
    let fixture = Fixture::new();
    let first = fixture.pull(&name).await.unwrap();
    let again = fixture.pull(&name).await.unwrap();
    assert!(Arc::ptr_eq(&first, &again), "it was published again");
    // Another name is a change, and so is a blob that needs to be made good.
    let named = fixture.pull(&other).await.unwrap();
    assert_eq!(named.repo_tags.len(), 2);
    let blob = fixture
        .dir
        .path()
        .join("blobs/sha256")
        .join(&image.digest()[7..]);
    fs::write(&blob, b"damaged").unwrap();
    fixture.pull(&name).await.unwrap();
    assert_eq!(fs::read(&blob).unwrap(), image.manifest);
}

/// Whatever stands in the way of the last step, nothing of the image stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_publication_leaves_no_blob() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::small("unpublished");
    let name = registry.add("unpublished", "t", &image);
    let fixture = Fixture::new();
    // A directory in the place of the manifest, which is written after the configuration.
    let blob = fixture
        .dir
        .path()
        .join("blobs/sha256")
        .join(&image.digest()[7..]);
    fs::create_dir_all(blob.join("x")).unwrap();
    fixture.pull(&name).await.unwrap_err();
    fs::remove_dir_all(&blob).unwrap();
    fixture.assert_clean().await;
    fixture.pull(&name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_are_one() {
    let registry = FakeRegistry::start().await;
    let image = large_image();
    let name = registry.add("c", "t", &image);
    let other = registry.add("other", "t", &image);
    let fixture = Fixture::new();
    let pulls: Vec<_> = [&name, &name, &name, &other]
        .into_iter()
        .map(|name| {
            let (store, name) = (fixture.store.clone(), name.clone());
            tokio::spawn(async move { store.pull(&name, None, None).await })
        })
        .collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap().id, image.id());
    }
    assert_eq!(registry.count("/c/manifests/"), 1);
    // Two references, but each layer came once.
    for layer in &image.layers {
        assert_eq!(registry.count(&Digest::of(layer).to_string()), 1);
    }
    assert_eq!(fixture.store.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_pull_leaves_nothing() {
    let registry = FakeRegistry::start().await;
    let image = large_image();
    let name = registry.add("d", "t", &image);
    let slow = Digest::of(&image.layers[1]).to_string();
    let blob = image.layers[1].clone();
    let (asked, mut was_asked) = tokio::sync::mpsc::unbounded_channel();
    registry.bend(move |request| {
        request.path.ends_with(&slow).then(|| {
            asked.send(()).unwrap();
            Reply {
                cut: Some(500_000),
                stall: true,
                ..Reply::new(200, blob.clone())
            }
        })
    });
    let fixture = Fixture::new();
    // At several moments: at once, and while a layer is half here.
    for wait in [false, true] {
        let (store, reference) = (fixture.store.clone(), name.clone());
        let pull = tokio::spawn(async move { store.pull(&reference, None, None).await });
        if wait {
            was_asked.recv().await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        pull.abort();
        assert!(pull.await.unwrap_err().is_cancelled());
        fixture.assert_clean().await;
    }
    // One of two who wait goes; the other one's pull goes on.
    registry.bend(|_| None);
    let (store, reference) = (fixture.store.clone(), name.clone());
    let stays = tokio::spawn(async move { store.pull(&reference, None, None).await });
    let goes = tokio::time::timeout(Duration::from_millis(1), fixture.pull(&name)).await;
    drop(goes);
    assert_eq!(stays.await.unwrap().unwrap().id, image.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_process_leaves_whole_images_only() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::small("survivor");
    let name = registry.add("s", "t", &image);
    let fixture = Fixture::new();
    let pulled = fixture.pull(&name).await.unwrap();
    // What a killed process can leave at any moment.
    let root = fixture.dir.path().to_path_buf();
    let foreign = "ab".repeat(32);
    for dir in [
        format!("layers/sha256/{foreign}/x"),
        "staging/layer-1-2/fs/etc".into(),
        "trash/1-2/deep/er".into(),
    ] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::write(root.join("blobs/sha256").join(&foreign), b"half").unwrap();
    fs::write(root.join("blobs/tmp-1-1"), b"half").unwrap();
    let fixture = fixture.reopen().await;
    fixture.store.idle().await;
    assert_eq!(fixture.store.list(), std::slice::from_ref(&pulled));
    // One layer, a configuration and a manifest.
    assert_eq!(fixture.files().len(), 3, "{:?}", fixture.files());
    // A layer that somebody removed makes its image unusable; it is forgotten and can be pulled again.
    fs::remove_dir_all(&pulled.layers[0].path).unwrap();
    let fixture = fixture.reopen().await;
    fixture.assert_clean().await;
    assert_eq!(fixture.pull(&name).await.unwrap().id, image.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platform_of_an_index_is_taken() {
    let registry = FakeRegistry::start().await;
    let (wanted, other) = (TestImage::small("amd64"), TestImage::small("arm64"));
    let name = registry.add("i", "unused", &wanted);
    registry.add("i", "unused2", &other);
    let entry = |manifest: &[u8], platform: serde_json::Value| serde_json::json!({ "digest": Digest::of(manifest).to_string(), "size": manifest.len(), "platform": platform });
    let index = |entries: Vec<serde_json::Value>| {
        serde_json::json!({ "schemaVersion": 2, "manifests": entries })
            .to_string()
            .into_bytes()
    };
    let inner = index(vec![
        entry(
            &other.manifest,
            serde_json::json!({ "os": "linux", "architecture": "arm64" }),
        ),
        entry(
            &wanted.manifest,
            serde_json::json!({ "os": "linux", "architecture": "amd64" }),
        ),
    ]);
    registry.manifest("i", "multi", &inner);
    let nested = index(vec![entry(
        &inner,
        serde_json::json!({ "os": "linux", "architecture": "amd64" }),
    )]);
    registry.manifest("i", "nested", &nested);
    let lying = index(vec![serde_json::json!({
        "digest": wanted.digest(),
        "size": wanted.manifest.len() - 1,
        "platform": { "os": "linux", "architecture": "amd64" },
    })]);
    registry.manifest("i", "lying", &lying);
    let lacking = index(vec![entry(
        &other.manifest,
        serde_json::json!({ "os": "linux", "architecture": "arm64" }),
    )]);
    registry.manifest("i", "lacking", &lacking);
    let fixture = Fixture::new();
    let name = |tag: &str| name.replace("unused", tag);
    for (tag, top) in [("multi", &inner), ("nested", &nested)] {
        let pulled = fixture.pull(&name(tag)).await.unwrap();
        assert_eq!(pulled.id, wanted.id());
        let digest = Digest::of(top).to_string();
        assert!(
            pulled
                .repo_digests
                .iter()
                .any(|known| known.ends_with(&digest))
        );
    }
    let error = fixture.pull(&name("lying")).await.unwrap_err();
    assert!(matches!(error, ImageError::SizeMismatch { .. }), "{error}");
    // The platform's own manifest names the image, too.
    let platform = name("x").replace(":x", &format!("@{}", wanted.digest()));
    assert_eq!(fixture.store.resolve(&platform).unwrap().id, wanted.id());
    let error = fixture.pull(&name("lacking")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("linux/arm64"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_first() {
    let (mirror, origin) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = TestImage::small("mirrored");
    let name = origin.add("m", "t", &image);
    mirror.add("m", "t", &image);
    let host = origin.address.to_string();
    let fixture = Fixture::with(|config| {
        let mirrors = vec![mirror.address.to_string()];
        config.registry.mirrors.insert(host.clone(), mirrors);
    });
    let credentials = crate::Credentials {
        registry_token: "secret".into(),
        ..Default::default()
    };
    let pulled = fixture
        .store
        .pull(&name, Some(credentials), None)
        .await
        .unwrap();
    assert_eq!(pulled.repo_tags, std::slice::from_ref(&name));
    assert!(origin.requests().is_empty());
    let asked = mirror.requests();
    assert!(
        asked
            .iter()
            .all(|request| !request.headers.contains_key("authorization"))
    );
    assert!(asked[0].path.contains("?ns="), "{}", asked[0].path);
    // A mirror that fails is passed over.
    fixture.store.remove(&name).await.unwrap();
    mirror.bend(|_| Some(Reply::new(404, "")));
    fixture.pull(&name).await.unwrap();
    assert!(!origin.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_images_say_so() {
    let registry = FakeRegistry::start().await;
    let names = [
        registry.add("pin/a", "1", &TestImage::small("a")),
        registry.add("free", "1", &TestImage::small("b")),
    ];
    let fixture =
        Fixture::with(|config| config.pinned = vec![format!("{}/pin/*", registry.address)]);
    assert!(fixture.pull(&names[0]).await.unwrap().pinned);
    assert!(!fixture.pull(&names[1]).await.unwrap().pinned);
    for (pattern, pinned) in [("*/other*", false), ("*/pin/*", true), ("*pin*", true)] {
        let fixture = Fixture::with(|config| config.pinned = vec![pattern.to_owned()]);
        let image = fixture.pull(&names[0]).await.unwrap();
        assert_eq!(image.pinned, pinned, "{pattern}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_an_opaque_root_is_the_lowest_that_is_seen() {
    let layer = |name: &str| Tar::default().file(name, b"");
    let layers = [
        layer("hidden").finish(),
        layer("hidden2").finish(),
        layer("base").file(".wh..wh..opq", b"").finish(),
        layer("top").finish(),
    ];
    let image = TestImage::new(&layers, "");
    let registry = FakeRegistry::start().await;
    let name = registry.add("opaque", "t", &image);
    let fixture = Fixture::new();
    let pulled = fixture.pull(&name).await.unwrap();
    let seen: Vec<String> = layers[2..]
        .iter()
        .map(|l| Digest::of(l).to_string())
        .collect();
    let found = |image: &Image| -> Vec<String> {
        image
            .layers
            .iter()
            .map(|layer| layer.diff_id.clone())
            .collect()
    };
    assert_eq!(found(&pulled), seen);
    // All of them are the image's, and a restart knows no less.
    let fixture = fixture.reopen().await;
    let again = fixture.store.resolve(&name).unwrap();
    assert_eq!(found(&again), seen);
    fixture.store.idle().await;
    assert_eq!(
        fs::read_dir(fixture.dir.path().join("layers/sha256"))
            .unwrap()
            .count(),
        4
    );
    fixture.store.remove(&name).await.unwrap();
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn implied_directories_look_like_those_below() {
    use std::os::unix::fs::MetadataExt as _;
    if !crate::testing::is_root() {
        return;
    }
    let base = Tar::default()
        .dir("./", 0o711)
        .dir("tmp", 0o1777)
        .dir("tmp/own", 0o700)
        .finish();
    let middle = Tar::default()
        .dir("./", 0o755)
        .file("unrelated", b"")
        .finish();
    let top = Tar::default()
        .file("tmp/own/new", b"")
        .file("fresh/new", b"")
        .finish();
    let image = TestImage::new(&[base, middle, top], "");
    let registry = FakeRegistry::start().await;
    let name = registry.add("implied", "t", &image);
    let fixture = Fixture::new();
    let pulled = fixture.pull(&name).await.unwrap();
    let mode = |name: &str| pulled.layers[2].path.join(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!(
        (mode("tmp"), mode("tmp/own"), mode("fresh"), mode(".")),
        (0o1777, 0o700, 0o755, 0o755)
    );
}
