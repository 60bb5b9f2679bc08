//! Streams over TLS, and certificates that change.

use crate::support::spdy::Client;
use crate::support::start_with;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use slipway_stream::{Config, StreamError, StreamServer, TlsFiles};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tls")
        .join(name)
}

fn put(name: &str, files: &TlsFiles) {
    fs::copy(file(&format!("{name}.crt")), &files.certificate).unwrap();
    fs::copy(file(&format!("{name}.key")), &files.key).unwrap();
}

/// Connects, trusting one certificate only.
async fn connect(url: &str, trusted: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(file(&format!("{trusted}.crt"))).unwrap();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let host = url.split('/').nth(2).unwrap();
    let socket = TcpStream::connect(host).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, socket)
        .await
}

#[tokio::test]
async fn certificates_are_read_again_when_they_change() {
    let directory = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificate: directory.path().join("tls.crt"),
        key: directory.path().join("tls.key"),
    };
    put("first", &files);
    let config = Config {
        tls: Some(files.clone()),
        ..Config::default()
    };
    let server = start_with(config).await;
    let url = server.exec(&["cat"]);
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let mut socket = connect(&url, "first").await.unwrap();
    assert!(connect(&url, "second").await.is_err());
    // A whole session.
    let path = url.splitn(4, '/').nth(3).unwrap();
    let head = format!(
        "POST /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(socket.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "));
    let mut client = Client::over(socket);
    let mut ids = Vec::new();
    for kind in ["error", "stdin", "stdout", "stderr"] {
        ids.push(client.open(&[("streamType", kind)]).await);
    }
    client.data(ids[1], b"secret", true).await;
    client.finish().await;
    assert_eq!(client.text(ids[2]), "secret");

    // What can't be used changes nothing: a certificate without its key, and no files at all.
    fs::copy(file("second.crt"), &files.certificate).unwrap();
    connect(&url, "first").await.unwrap();
    fs::remove_file(&files.certificate).unwrap();
    connect(&url, "first").await.unwrap();
    put("second", &files);
    connect(&url, "second").await.unwrap();
    assert!(connect(&url, "first").await.is_err());
}

#[tokio::test]
async fn a_server_does_not_start_without_its_files() {
    let tls = Some(TlsFiles {
        certificate: file("first.crt"),
        key: file("absent.key"),
    });
    let config = Config {
        tls,
        ..Config::default()
    };
    let result = StreamServer::new(config, crate::support::backend::Fake::default()).await;
    match result {
        Err(StreamError::Tls { path, .. }) => assert_eq!(path, file("absent.key")),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("there is no key"),
    }
}
