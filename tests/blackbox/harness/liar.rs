//! A registry that serves one small image and lies about it in one way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use sha2::Digest as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::Result;

/// How an answer is false.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// It is true.
    None,
    /// Other bytes of the same length.
    Wrong,
    /// The connection ends in the middle.
    Cut,
    /// Fewer bytes, and the length says so.
    Short,
    /// It never ends.
    Endless,
    /// A page for people, with status 200.
    Html,
    /// Status 500.
    Error,
    /// Half of it, and then silence.
    Stall,
}

/// What the lie is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    Manifest,
    Config,
    Layer,
}

/// A running registry; ends when dropped.
pub struct Liar {
    /// `host:port`.
    pub address: String,
    /// Digest of the true manifest.
    pub digest: String,
    /// Requests by path.
    pub asked: Arc<Mutex<HashMap<String, u32>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Document {
    about: About,
    kind: &'static str,
    bytes: Vec<u8>,
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = sha2::Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("sha256:{hex}")
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

impl Liar {
    /// Starts one at a free port of loopback.
    pub async fn start(about: About, lie: Lie) -> Result<Self> {
        let mut layer = tar::Builder::new(Vec::new());
        let content = vec![b'x'; 300_000];
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        layer.append_data(&mut header, "file", content.as_slice())?;
        let layer = layer.into_inner()?;
        let config = serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux", "config": {"Cmd": ["/file"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        });
        let config = config.to_string().into_bytes();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len()}],
        });
        let manifest = manifest.to_string().into_bytes();
        let top = digest(&manifest);
        let blob = |bytes: &[u8]| format!("/v2/lies/blobs/{}", digest(bytes));
        let binary = "application/octet-stream";
        let documents = HashMap::from([
            (
                blob(&config),
                Document {
                    about: About::Config,
                    kind: binary,
                    bytes: config,
                },
            ),
            (
                blob(&layer),
                Document {
                    about: About::Layer,
                    kind: binary,
                    bytes: layer,
                },
            ),
            (
                format!("/v2/lies/manifests/{top}"),
                Document {
                    about: About::Manifest,
                    kind: MANIFEST,
                    bytes: manifest.clone(),
                },
            ),
            (
                "/v2/lies/manifests/latest".to_owned(),
                Document {
                    about: About::Manifest,
                    kind: MANIFEST,
                    bytes: manifest,
                },
            ),
        ]);
        Self::serve(documents, top, about, lie).await
    }

    /// One with an artifact of these files: title, media type, content.
    pub async fn artifact(files: &[(Option<&str>, &str, Vec<u8>)]) -> Result<Self> {
        let empty = b"{}".to_vec();
        let layers: Vec<_> = files
            .iter()
            .map(|(title, kind, bytes)| {
                let mut layer = serde_json::json!({
                    "mediaType": kind, "digest": digest(bytes), "size": bytes.len(),
                });
                if let Some(title) = title {
                    layer["annotations"] =
                        serde_json::json!({"org.opencontainers.image.title": title});
                }
                layer
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.example.model",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(&empty), "size": 2},
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let top = digest(&manifest);
        let document = |about, kind, bytes: &[u8]| Document {
            about,
            kind,
            bytes: bytes.to_vec(),
        };
        let blobs = files.iter().map(|(_, _, bytes)| bytes).chain([&empty]);
        let mut documents: HashMap<_, _> = blobs
            .map(|bytes| {
                let path = format!("/v2/lies/blobs/{}", digest(bytes));
                (
                    path,
                    document(About::Layer, "application/octet-stream", bytes),
                )
            })
            .collect();
        for version in [top.as_str(), "latest"] {
            let path = format!("/v2/lies/manifests/{version}");
            documents.insert(path, document(About::Manifest, MANIFEST, &manifest));
        }
        Self::serve(documents, top, About::Config, Lie::None).await
    }

    async fn serve(
        documents: HashMap<String, Document>,
        top: String,
        about: About,
        lie: Lie,
    ) -> Result<Self> {
        let documents = Arc::new(documents);
        let asked: Arc<Mutex<HashMap<String, u32>>> = Arc::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let counts = asked.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (documents, counts) = (documents.clone(), counts.clone());
                connections.spawn(async move {
                    answer(stream, &documents, &counts, about, lie).await.ok()
                });
            }
        });
        Ok(Self {
            address,
            digest: top,
            asked,
            task,
        })
    }

    /// The image's reference, by tag.
    pub fn reference(&self) -> String {
        format!("{}/lies:latest", self.address)
    }
}

/// Answers the one request of a connection.
async fn answer(
    mut stream: TcpStream,
    documents: &HashMap<String, Document>,
    counts: &Mutex<HashMap<String, u32>>,
    about: About,
    lie: Lie,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let mut words = request.split_whitespace();
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    *counts.lock().unwrap().entry(path.to_owned()).or_default() += 1;
    let mut send = async |status: &str, kind: &str, length: Option<usize>, body: &[u8]| {
        let length = length
            .map(|n| format!("Content-Length: {n}\r\n"))
            .unwrap_or_default();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{length}Connection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        if method != "HEAD" {
            stream.write_all(body).await?;
        }
        stream.flush().await
    };
    if path == "/v2/" {
        return send("200 OK", "application/json", Some(2), b"{}").await;
    }
    let Some(document) = documents.get(path) else {
        let body = br#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#;
        return send("404 Not Found", "application/json", Some(body.len()), body).await;
    };
    let (bytes, length) = (&document.bytes, document.bytes.len());
    let lie = if document.about == about {
        lie
    } else {
        Lie::None
    };
    match lie {
        Lie::None => send("200 OK", document.kind, Some(length), bytes).await,
        Lie::Wrong => {
            let mut wrong = bytes.clone();
            // Inside the file's content, or a word of the JSON: the form stays right.
            let place = if document.about == About::Layer {
                2000
            } else {
                length - 10
            };
            wrong[place] = if wrong[place] == b'0' { b'1' } else { b'0' };
            send("200 OK", document.kind, Some(length), &wrong).await
        }
        Lie::Cut => send("200 OK", document.kind, Some(length), &bytes[..length / 2]).await,
        Lie::Short => {
            send(
                "200 OK",
                document.kind,
                Some(length / 2),
                &bytes[..length / 2],
            )
            .await
        }
        Lie::Html => {
            let page = b"<html><body>Please log in to the hotel's network</body></html>";
            send("200 OK", "text/html", Some(page.len()), page).await
        }
        Lie::Error => send("500 Internal Server Error", "text/plain", Some(4), b"ouch").await,
        Lie::Endless => {
            send("200 OK", document.kind, None, bytes).await?;
            loop {
                stream.write_all(&[b' '; 65536]).await?;
            }
        }
        Lie::Stall => {
            send("200 OK", document.kind, Some(length), &bytes[..length / 2]).await?;
            std::future::pending().await
        }
    }
}
