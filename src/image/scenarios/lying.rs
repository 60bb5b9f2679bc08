//! Registries that are ill or lie. Whatever they do, the pull ends with an error of the right class
//! that names the thing, and nothing of it stays.

use super::*;

type Bend = Box<dyn Fn(&crate::testing::registry::Request) -> Option<Reply> + Send + Sync>;

/// Answers the blob of `layer` with `reply`.
fn for_layer(layer: &[u8], reply: impl Fn(&[u8]) -> Reply + Send + Sync + 'static) -> Bend {
    let (digest, layer) = (Digest::of(layer).to_string(), layer.to_vec());
    Box::new(move |request| request.path.ends_with(&digest).then(|| reply(&layer)))
}

fn for_manifests(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Bend {
    Box::new(move |request| request.path.contains("/manifests/").then(&reply))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_is_noticed() {
    let image = large_image();
    let layer = image.layers[1].clone();
    let html = "<!DOCTYPE html><html>Please log in</html>";
    let other = gzip(&Tar::default().file("other", &noise(1 << 20, 9)).finish());
    let same_size = {
        let mut other = layer.clone();
        let middle = other.len() / 2;
        other[middle] ^= 1;
        other
    };
    // The same content, but other bytes: gzip's header holds a time that nobody looks at.
    let gzipped = image.layers[0].clone();
    let same_content = {
        let mut other = gzipped.clone();
        other[4] ^= 1;
        other
    };
    let gzipped_digest = Digest::of(&gzipped).to_string();
    let config_name = Digest::of(&image.config).to_string();
    let digest = Digest::of(&layer).to_string();
    let cases: Vec<(&str, Bend, ErrorKind, String)> = vec![
        (
            "other bytes of the same content",
            for_layer(&gzipped, move |_| Reply::new(200, same_content.clone())),
            ErrorKind::DataLoss,
            gzipped_digest,
        ),
        (
            "a flipped bit",
            for_layer(&layer, move |_| Reply::new(200, same_size.clone())),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "another layer",
            for_layer(&layer, move |_| Reply::new(200, other.clone())),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "a short length",
            for_layer(&layer, |layer| Reply::new(200, &layer[..1000])),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "an end that comes early",
            for_layer(&layer, |layer| Reply {
                unsized_body: true,
                cut: Some(1000),
                ..Reply::new(200, layer)
            }),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "a body that is too long",
            for_layer(&layer, |layer| Reply {
                unsized_body: true,
                ..Reply::new(200, [layer, b"x"].concat())
            }),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "an endless body",
            for_layer(&layer, |layer| Reply {
                endless: true,
                ..Reply::new(200, &layer[..10_000])
            }),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "a page for a layer",
            for_layer(&layer, move |_| Reply::new(200, html)),
            ErrorKind::DataLoss,
            digest.clone(),
        ),
        (
            "no such blob",
            for_layer(&layer, |_| Reply::new(404, "")),
            ErrorKind::NotFound,
            digest.clone(),
        ),
        (
            "an ill registry",
            for_layer(&layer, |_| Reply::new(503, "busy")),
            ErrorKind::Unavailable,
            "503".into(),
        ),
        (
            "a page for a manifest",
            for_manifests(move || {
                Reply::new(200, html).header("content-type", "text/html; charset=utf-8")
            }),
            ErrorKind::Unavailable,
            "web page".into(),
        ),
        (
            "rubbish for a manifest",
            for_manifests(|| Reply::new(200, "rubbish")),
            ErrorKind::DataLoss,
            "image 127.0.0.1".into(),
        ),
        (
            "a manifest of another digest",
            for_manifests(|| {
                Reply::new(200, "{}").header("docker-content-digest", &Digest::of(b"").to_string())
            }),
            ErrorKind::DataLoss,
            "digest".into(),
        ),
        (
            "an endless manifest",
            for_manifests(|| Reply {
                endless: true,
                ..Reply::new(200, "[[[[[[[[".repeat(1000))
            }),
            ErrorKind::ResourceExhausted,
            "4194304".into(),
        ),
        (
            "a manifest of schema 1",
            for_manifests(|| Reply::new(200, r#"{"schemaVersion":1,"fsLayers":[]}"#)),
            ErrorKind::FailedPrecondition,
            "schema 1".into(),
        ),
        (
            "no such manifest",
            for_manifests(|| Reply::new(404, "<html>")),
            ErrorKind::NotFound,
            "a/b:t".into(),
        ),
        (
            "too many requests",
            for_manifests(|| Reply::new(429, "").header("retry-after", "77")),
            ErrorKind::Unavailable,
            "77".into(),
        ),
        (
            "an ill registry",
            for_manifests(|| Reply::new(500, "")),
            ErrorKind::Unavailable,
            "500".into(),
        ),
        (
            "denial",
            for_manifests(|| {
                Reply::new(
                    403,
                    r#"{"errors":[{"code":"DENIED","message":"not\nyou"}]}"#,
                )
            }),
            ErrorKind::PermissionDenied,
            "not you".into(),
        ),
        (
            "a wrong configuration",
            Box::new(move |request| {
                request
                    .path
                    .ends_with(&config_name)
                    .then(|| Reply::new(200, "{}"))
            }),
            ErrorKind::DataLoss,
            "configuration".into(),
        ),
    ];
    let registry = FakeRegistry::start().await;
    let name = registry.add("a/b", "t", &image);
    let fixture = Fixture::new();
    for (what, bend, kind, part) in cases {
        registry.bend(bend);
        let error = fixture.pull(&name).await.expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {}", error.chain());
        assert!(error.chain().contains(&part), "{what}: {}", error.chain());
        fixture.assert_clean().await;
    }
    registry.bend(|_| None);
    fixture.pull(&name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn content_must_be_what_the_configuration_says() {
    let registry = FakeRegistry::start().await;
    let fixture = Fixture::new();
    // The blob is the one of the manifest, but its content is not the configuration's.
    let honest = TestImage::small("honest");
    let forged = gzip(&Tar::default().file("file", b"forged").finish());
    let manifest = TestImage::manifest(&honest.config, std::slice::from_ref(&forged));
    let image = TestImage {
        layers: vec![forged],
        manifest,
        ..honest
    };
    let name = registry.add("forged", "t", &image);
    let error = fixture.pull(&name).await.unwrap_err();
    assert!(
        matches!(&error, ImageError::DigestMismatch { what, .. } if what.contains("content")),
        "{error}"
    );
    fixture.assert_clean().await;
    // As many layers in both.
    let mut image = TestImage::small("count");
    image.manifest = TestImage::manifest(
        &image.config,
        &[image.layers[0].clone(), image.layers[0].clone()],
    );
    let name = registry.add("count", "t", &image);
    assert_eq!(
        fixture.pull(&name).await.unwrap_err().kind(),
        ErrorKind::DataLoss
    );
    // Not an archive at all.
    let image = TestImage::new(&[noise(5000, 7)], "");
    let name = registry.add("noise", "t", &image);
    let error = fixture.pull(&name).await.unwrap_err();
    assert!(matches!(error, ImageError::LayerCorrupt { .. }), "{error}");
    // A layer that climbs.
    let climbing = Tar::default()
        .file("ok", b"ok")
        .file("../../../../evil", b"evil")
        .finish();
    let image = TestImage::new(&[Tar::default().file("fine", b"").finish(), climbing], "");
    let name = registry.add("climbing", "t", &image);
    let error = fixture.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("../../../../evil"), "{error}");
    fixture.assert_clean().await;
    // Another platform's image.
    let mut image = TestImage::small("other");
    image.config = String::from_utf8(image.config)
        .unwrap()
        .replace("amd64", "s390x")
        .into_bytes();
    image.manifest = TestImage::manifest(&image.config, &image.layers);
    let name = registry.add("platform", "t", &image);
    let error = fixture.pull(&name).await.unwrap_err();
    assert!(matches!(error, ImageError::NoPlatform { .. }), "{error}");
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_transfers_are_resumed() {
    let registry = FakeRegistry::start().await;
    let image = large_image();
    let name = registry.add("r", "t", &image);
    let blobs: Vec<(String, Vec<u8>)> = image
        .layers
        .iter()
        .map(|layer| (Digest::of(layer).to_string(), layer.clone()))
        .collect();
    let served = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&served);
    registry.bend(move |request| {
        let (index, (_, blob)) = blobs
            .iter()
            .enumerate()
            .find(|(_, (digest, _))| request.path.ends_with(digest))?;
        counted.fetch_add(1, Ordering::Relaxed);
        // One layer from a server that resumes, one from a server that starts over, one with errors
        // of the server in between.
        let mut reply = match index {
            1 => Reply::new(200, blob.clone()),
            _ => ranged(request, blob),
        };
        let from = blob.len() - if index == 1 { 0 } else { reply.body.len() };
        if index == 2 && from > 0 && counted.load(Ordering::Relaxed).is_multiple_of(2) {
            return Some(Reply::new(502, "bad gateway"));
        }
        // Each time 400 kB further; then the connection is cut.
        let reach = match index {
            1 => 400_000 * counted.load(Ordering::Relaxed),
            _ => 400_000,
        };
        if reach < reply.body.len() {
            reply.cut = Some(reach);
        }
        Some(reply)
    });
    let fixture = Fixture::new();
    let pulled = fixture.pull(&name).await.unwrap();
    for (index, layer) in pulled.layers.iter().enumerate() {
        assert_eq!(
            fs::read(layer.path.join("d/noise")).unwrap(),
            noise(1 << 20, index as u64 + 1)
        );
    }
    assert!(served.load(Ordering::Relaxed) > 6);
    let ranges = registry
        .requests()
        .iter()
        .filter(|request| request.headers.contains_key("range"))
        .count();
    assert!(ranges >= 4, "{ranges}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_transfer_is_broken_off() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[Tar::default().file("f", &noise(200_000, 4)).finish()], "");
    let name = registry.add("silent", "t", &image);
    let digest = Digest::of(&image.layers[0]).to_string();
    let blob = image.layers[0].clone();
    let attempts = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&attempts);
    let bend_silent = move |always: bool| {
        let (digest, blob, counted) = (digest.clone(), blob.clone(), Arc::clone(&counted));
        move |request: &crate::testing::registry::Request| {
            if !request.path.ends_with(&digest) {
                return None;
            }
            let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
            (first || always).then(|| Reply {
                cut: Some(if first { 1000 } else { 0 }),
                stall: true,
                ..ranged(request, &blob)
            })
        }
    };
    registry.bend(bend_silent(false));
    let fixture = Fixture::with(|config| config.pull_progress_timeout = Duration::from_millis(300));
    fixture.pull(&name).await.unwrap();
    assert_eq!(attempts.load(Ordering::Relaxed), 2);
    fixture.store.remove(&name).await.unwrap();
    registry.bend(bend_silent(true));
    let error = fixture.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
    fixture.assert_clean().await;
}

/// What can't be unpacked is said at once, not when the registry is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_layer_ends_its_transfer() {
    let registry = FakeRegistry::start().await;
    let layer = Tar::default()
        .file("../x", b"evil")
        .file("rest", &noise(1 << 20, 5))
        .finish();
    let image = TestImage::new(&[layer], "");
    let name = registry.add("stalled", "t", &image);
    registry.bend(for_layer(&image.layers[0], |layer| Reply {
        cut: Some(500_000),
        stall: true,
        ..Reply::new(200, layer)
    }));
    let fixture = Fixture::with(|config| config.pull_progress_timeout = Duration::from_secs(600));
    let error = fixture.pull(&name).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::InvalidArgument,
        "{}",
        error.chain()
    );
    assert!(error.to_string().contains("../x"), "{error}");
    fixture.assert_clean().await;
}

/// A byte now and then is no progress, and no reason to wait for an error's words.
#[tokio::test(flavor = "multi_thread")]
async fn a_dripping_registry_is_given_up() {
    let registry = FakeRegistry::start().await;
    let image = TestImage::new(&[Tar::default().file("f", &noise(200_000, 4)).finish()], "");
    let name = registry.add("drip", "t", &image);
    let fixture = Fixture::with(|config| {
        config.pull_progress_timeout = Duration::from_millis(300);
        config.registry.request_timeout = Duration::from_millis(500);
    });
    for status in [200, 403] {
        registry.bend(for_layer(&image.layers[0], move |layer| Reply {
            drip: Some(Duration::from_millis(20)),
            ..Reply::new(status, layer)
        }));
        let error = fixture.pull(&name).await.unwrap_err();
        let kind = match status {
            200 => ErrorKind::Unavailable,
            _ => ErrorKind::PermissionDenied,
        };
        assert_eq!(error.kind(), kind, "{}", error.chain());
        fixture.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_registry_holds_up_no_other() {
    let (stalled, well) = (FakeRegistry::start().await, FakeRegistry::start().await);
    let image = large_image();
    let name = stalled.add("stalled", "t", &image);
    let fixture = Fixture::with(|config| {
        config.max_parallel_downloads = 3;
        config.pull_progress_timeout = Duration::from_secs(600);
        config.registry.request_timeout = Duration::from_secs(600);
    });
    let config_name = Digest::of(&image.config).to_string();
    stalled.bend(move |request| {
        let is_layer = request.path.contains("/blobs/") && !request.path.ends_with(&config_name);
        is_layer.then(|| Reply::new(crate::testing::registry::MUTE, ""))
    });
    let (store, reference) = (fixture.store.clone(), name.clone());
    let waiting = tokio::spawn(async move { store.pull(&reference, None, None).await });
    while stalled.count("/blobs/") < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let other = well.add("well", "t", &TestImage::small("well"));
    fixture.pull(&other).await.unwrap();
    waiting.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_never_answers_is_given_up() {
    use crate::testing::registry::MUTE;
    let registry = FakeRegistry::start().await;
    let name = registry.add("mute", "t", &TestImage::small("mute"));
    let fixture = Fixture::with(|config| {
        config.pull_progress_timeout = Duration::from_millis(200);
        config.registry.request_timeout = Duration::from_millis(300);
    });
    for part in ["/manifests/", "/blobs/"] {
        registry.bend(move |request| request.path.contains(part).then(|| Reply::new(MUTE, "")));
        let error = fixture.pull(&name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
        fixture.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_and_wrong_names() {
    let fixture = Fixture::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = fixture.pull(&format!("{address}/x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    for name in ["", "UPPER", "a b", "../x", "x@sha256:12"] {
        assert_eq!(
            fixture.pull(name).await.unwrap_err().kind(),
            ErrorKind::InvalidArgument,
            "{name}"
        );
    }
    fixture.assert_clean().await;
}
