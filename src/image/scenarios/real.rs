//! A real registry, Debian's docker-registry, over TLS with a certificate authority of our own and
//! over plain HTTP, with images that skopeo pushed.

use std::process::{Child, Command, Stdio};

use super::*;

struct RealRegistry {
    child: Child,
    address: String,
    dir: tempfile::TempDir,
}

impl RealRegistry {
    /// `None`, with a word on why, when the machine lacks something.
    async fn start(tls: bool) -> Option<Self> {
        for (program, argument) in [
            ("docker-registry", "--version"),
            ("skopeo", "--version"),
            ("openssl", "version"),
        ] {
            if Command::new(program).arg(argument).output().is_err() {
                println!("SKIPPED: there is no {program}");
                return None;
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let mut config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {path}/data\nhttp:\n  addr: {address}\n"
        );
        if tls {
            make_certificates(dir.path());
            config.push_str(&format!(
                "  tls:\n    certificate: {path}/cert.pem\n    key: {path}/key.pem\n"
            ));
        }
        fs::write(dir.path().join("config.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self {
            child,
            address,
            dir,
        };
        for _ in 0..500 {
            if std::net::TcpStream::connect(&registry.address).is_ok() {
                return Some(registry);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("docker-registry doesn't listen");
    }

    /// Pushes a layout's image in the given manifest format.
    fn push(&self, layout: &Path, name: &str, format: &str) -> String {
        let output = Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--dest-tls-verify=false",
                "--format",
                format,
            ])
            .arg(format!("oci:{}:test", layout.display()))
            .arg(format!("docker://{}/{name}", self.address))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        format!("{}/{name}", self.address)
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        // It may have ended by itself; both are fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn make_certificates(dir: &Path) {
    let run = |arguments: &[&str]| {
        let output = Command::new("openssl")
            .current_dir(dir)
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    run(&[
        &[
            "req",
            "-x509",
            "-days",
            "2",
            "-subj",
            "/CN=test ca",
            "-keyout",
            "ca-key.pem",
            "-out",
            "ca.pem",
        ][..],
        &key,
    ]
    .concat());
    run(&[
        &[
            "req",
            "-subj",
            "/CN=registry",
            "-keyout",
            "key.pem",
            "-out",
            "request.pem",
        ][..],
        &key,
    ]
    .concat());
    fs::write(dir.join("extensions"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    run(&[
        "x509",
        "-req",
        "-days",
        "2",
        "-in",
        "request.pem",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca-key.pem",
        "-CAcreateserial",
        "-extfile",
        "extensions",
        "-out",
        "cert.pem",
    ]);
}

/// Both manifest formats, by tag and by digest.
async fn pull_everything(registry: &RealRegistry, fixture: &Fixture) {
    // Docker's format knows no zstd, so there it is one layer, with gzip.
    let one = TestImage::new(&[large_layer(1)], "");
    for (name, format, image) in [
        ("a/oci:1", "oci", large_image()),
        ("a/docker:1", "v2s2", one),
    ] {
        let layout = tempfile::tempdir().unwrap();
        crate::testing::write_layout(layout.path(), &[("test", &image)]);
        let reference = registry.push(layout.path(), name, format);
        let pulled = fixture
            .pull(&reference)
            .await
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(pulled.repo_tags, std::slice::from_ref(&reference));
        assert_eq!(pulled.layers.len(), image.layers.len());
        for (index, layer) in pulled.layers.iter().enumerate() {
            assert_eq!(
                fs::read(layer.path.join("d/noise")).unwrap(),
                noise(1 << 20, index as u64 + 1)
            );
        }
        let digest = pulled.repo_digests[0].clone();
        fixture.store.remove(&reference).await.unwrap();
        let pulled = fixture.pull(&digest).await.unwrap();
        assert_eq!(pulled.repo_digests, std::slice::from_ref(&digest));
        fixture.store.remove(&digest).await.unwrap();
        let error = fixture.pull(&format!("{reference}23")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    fixture.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_over_http() {
    if let Some(registry) = RealRegistry::start(false).await {
        pull_everything(&registry, &Fixture::new()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_over_tls() {
    let Some(registry) = RealRegistry::start(true).await else {
        return;
    };
    let ca = registry.dir.path().join("ca.pem");
    let fixture = Fixture::with(|config| config.registry.ca_files = vec![ca]);
    pull_everything(&registry, &fixture).await;
    // Without the authority, nobody is believed.
    let error = Fixture::new()
        .pull(&format!("{}/a/oci:1", registry.address))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("certificate"), "{}", error.chain());
}
