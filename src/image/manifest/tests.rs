use super::*;
use crate::error::ErrorKind;

const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn descriptor(media_type: &str, more: &str) -> String {
    format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{HEX}","size":3{more}}}"#)
}

#[test]
fn both_manifest_forms_parse() {
    for (own, config, layer) in [
        (
            "application/vnd.oci.image.manifest.v1+json",
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
        (
            "application/vnd.docker.distribution.manifest.v2+json",
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ),
    ] {
        let text = format!(
            r#"{{"schemaVersion":2,"mediaType":"{own}","config":{},"layers":[{}],"subject":null}}"#,
            descriptor(config, ""),
            descriptor(layer, r#","urls":[]"#)
        );
        match parse(text.as_bytes(), None, "x").unwrap() {
            Document::Manifest(manifest) => {
                assert_eq!(manifest.layers.len(), 1);
                assert_eq!(manifest.config.digest.hex(), HEX);
            }
            Document::Index(_) => panic!("an index"),
        }
    }
}

#[test]
fn wrong_documents_are_refused() {
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar", "");
    let artifact = descriptor("application/vnd.example.model", "");
    let config = descriptor("application/vnd.oci.image.config.v1+json", "");
    let encrypted = descriptor("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "");
    for (text, kind) in [
        ("<html></html>".to_owned(), ErrorKind::DataLoss),
        ("{}".into(), ErrorKind::DataLoss),
        ("[]".into(), ErrorKind::DataLoss),
        (
            r#"{"schemaVersion":1,"fsLayers":[]}"#.into(),
            ErrorKind::FailedPrecondition,
        ),
        (
            format!(r#"{{"layers":[{layer}],"manifests":[{layer}]}}"#),
            ErrorKind::DataLoss,
        ),
        (format!(r#"{{"layers":[{layer}]}}"#), ErrorKind::DataLoss),
        (
            format!(r#"{{"config":{config},"layers":[{artifact}]}}"#),
            ErrorKind::FailedPrecondition,
        ),
        (
            format!(r#"{{"config":{layer},"layers":[{encrypted}]}}"#),
            ErrorKind::FailedPrecondition,
        ),
        (
            r#"{"layers":[{"digest":"sha256:../../etc","size":1}]}"#.into(),
            ErrorKind::DataLoss,
        ),
        (
            format!(r#"{{"config":{{"digest":"sha256:{HEX}","size":-1}},"layers":[]}}"#),
            ErrorKind::DataLoss,
        ),
    ] {
        let error = parse(text.as_bytes(), None, "image x").unwrap_err();
        assert_eq!(error.kind(), kind, "{text}: {error}");
    }
}

#[test]
fn the_platform_is_selected() {
    let entry = |os: &str, architecture: &str, variant: &str, digit: &str| {
        format!(
            r#"{{"digest":"sha256:{}","size":1,"platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}}}"#,
            digit.repeat(64)
        )
    };
    let text = format!(
        r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
        entry("unknown", "unknown", "", "0"),
        entry("linux", "arm", "v6", "1"),
        entry("linux", "arm", "v7", "2"),
        entry("linux", "amd64", "", "3"),
    );
    let Document::Index(index) = parse(text.as_bytes(), None, "x").unwrap() else {
        panic!("no index");
    };
    let select = |architecture: &str, variant: Option<&str>| {
        let platform = Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
        };
        index
            .select(&platform, "image x")
            .map(|entry| entry.descriptor("x").unwrap().digest.hex()[..1].to_owned())
    };
    assert_eq!(select("arm", Some("v7")).unwrap(), "2");
    assert_eq!(select("arm", Some("v6")).unwrap(), "1");
    assert_eq!(select("amd64", None).unwrap(), "3");
    let error = select("s390x", None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("linux/arm/v7"), "{error}");
}

#[test]
fn real_configurations_parse() {
    // The shapes that Docker, BuildKit and hand-made tools write.
    for text in [
        r#"{"architecture":"amd64","os":"linux","config":{"Hostname":"","ExposedPorts":{"80/tcp":{}},
           "Env":["PATH=/bin"],"Cmd":["sh"],"Image":"","Volumes":null,"WorkingDir":"","Entrypoint":null,
           "OnBuild":null,"Labels":null,"StopSignal":"SIGQUIT","Healthcheck":{"Test":["CMD","x"]},
           "ArgsEscaped":true,"Shell":["sh"]},"container":"x","container_config":{},
           "created":"2021-01-01T00:00:00Z","docker_version":"20","history":[{"created":"x","empty_layer":true}],
           "rootfs":{"type":"layers","diff_ids":[]}}"#,
        r#"{"architecture":"","os":"","rootfs":{"type":"layers","diff_ids":null}}"#,
        r#"{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[]},"history":null}"#,
    ] {
        let config = ConfigFile::parse(text.as_bytes(), "x").unwrap();
        assert!(config.diff_ids(0, "x").unwrap().is_empty());
        assert!(config.diff_ids(1, "x").is_err());
    }
    assert!(ConfigFile::parse(b"{}", "x").is_err());
}

#[test]
fn entries_that_say_less_or_are_strange_are_passed_over_or_tried() {
    let select = |entries: &str| {
        let text = format!(r#"{{"schemaVersion":2,"manifests":[{entries}]}}"#);
        let Document::Index(index) = parse(text.as_bytes(), None, "x").unwrap() else {
            panic!("no index");
        };
        let platform = crate::testing::platform();
        let entry = index.select(&platform, "image x").cloned();
        entry.and_then(|entry| entry.descriptor("image x"))
    };
    let entry = |digit: &str, more: &str| {
        let hex = digit.repeat(64);
        format!(r#"{{"digest":"sha256:{hex}","size":1{more}}}"#)
    };
    let plain = entry("1", "");
    let attestation = entry(
        "2",
        r#","platform":{"os":"unknown","architecture":"unknown"}"#,
    );
    let annotated = entry(
        "3",
        r#","annotations":{"vnd.docker.reference.type":"attestation-manifest"}"#,
    );
    let artifact = entry("4", r#","artifactType":"application/vnd.example""#);
    let foreign =
        r#"{"digest":"blake3:00","size":1,"platform":{"os":"linux","architecture":"s390x"}}"#;
    let own = entry("5", r#","platform":{"os":"linux","architecture":"amd64"}"#);
    let first = |entries: &[&str]| {
        select(&entries.join(",")).map(|found| found.digest.hex()[..1].to_owned())
    };
    assert_eq!(first(&[&attestation, &plain]).unwrap(), "1");
    assert_eq!(first(&[&artifact, &annotated, &plain]).unwrap(), "1");
    assert_eq!(first(&[foreign, &plain, &own]).unwrap(), "5");
    for none in [&attestation, &annotated, &artifact] {
        assert_eq!(
            first(&[none]).unwrap_err().kind(),
            ErrorKind::NotFound,
            "{none}"
        );
    }
    // Only a digest that is needed has to be known.
    let unknown = foreign.replace("s390x", "amd64");
    assert_eq!(first(&[&unknown]).unwrap_err().kind(), ErrorKind::DataLoss);
}
