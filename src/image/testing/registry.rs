//! A registry of a few lines over HTTP/1.1, whose every answer a test can bend.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::digest::Digest;
use crate::testing::TestImage;

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

/// As a status: there is no answer, the connection stays open.
pub(crate) const MUTE: u16 = 0;

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection is closed after this many bytes of the body.
    pub(crate) cut: Option<usize>,
    /// No length is announced; the body ends with the connection.
    pub(crate) unsized_body: bool,
    /// The body is repeated until the client goes away.
    pub(crate) endless: bool,
    /// The body comes byte by byte, with this much time in between.
    pub(crate) drip: Option<Duration>,
    /// After `cut` bytes the connection stays open and silent.
    pub(crate) stall: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            cut: None,
            unsized_body: false,
            endless: false,
            drip: None,
            stall: false,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

type Handler = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

/// The running registry.
pub(crate) struct FakeRegistry {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    manifests: Mutex<HashMap<String, Vec<u8>>>,
    blobs: Mutex<HashMap<String, Vec<u8>>>,
    requests: Mutex<Vec<Request>>,
    /// Asked before the honest answer.
    handler: Mutex<Option<Arc<Handler>>>,
}

impl FakeRegistry {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let for_server = Arc::clone(&shared);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&for_server)));
            }
        });
        Self {
            address,
            shared,
            server,
        }
    }

    /// Bends answers: what the handler returns is sent instead of the truth.
    pub(crate) fn bend(&self, handler: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        *self.shared.handler.lock().unwrap() = Some(Arc::new(handler));
    }

    /// Adds an image under `repository:tag` and its digest; returns the reference by tag.
    pub(crate) fn add(&self, repository: &str, tag: &str, image: &TestImage) -> String {
        for blob in image.layers.iter().chain([&image.config]) {
            self.blob(blob);
        }
        self.manifest(repository, tag, &image.manifest);
        format!("{}/{repository}:{tag}", self.address)
    }

    pub(crate) fn blob(&self, blob: &[u8]) {
        self.shared
            .blobs
            .lock()
            .unwrap()
            .insert(Digest::of(blob).to_string(), blob.to_vec());
    }

    pub(crate) fn manifest(&self, repository: &str, tag: &str, manifest: &[u8]) {
        let mut manifests = self.shared.manifests.lock().unwrap();
        for version in [tag.to_owned(), Digest::of(manifest).to_string()] {
            manifests.insert(
                format!("/v2/{repository}/manifests/{version}"),
                manifest.to_vec(),
            );
        }
    }

    /// What was asked for so far, without probes.
    pub(crate) fn requests(&self) -> Vec<Request> {
        let requests = self.shared.requests.lock().unwrap();
        requests
            .iter()
            .filter(|request| request.path != "/v2/")
            .cloned()
            .collect()
    }

    pub(crate) fn count(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.path.contains(part))
            .count()
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Shared {
    fn truth(&self, request: &Request) -> Reply {
        if request.path == "/v2/" {
            return Reply::new(200, "{}");
        }
        let path = request.path.split('?').next().unwrap_or_default();
        if let Some(manifest) = self.manifests.lock().unwrap().get(path) {
            return Reply::new(200, manifest.clone())
                .header("docker-content-digest", &Digest::of(manifest).to_string());
        }
        let blobs = self.blobs.lock().unwrap();
        let blob = path
            .rsplit_once("/blobs/")
            .and_then(|(_, digest)| blobs.get(digest));
        match blob {
            Some(blob) => ranged(request, blob),
            None => Reply::new(
                404,
                r#"{"errors":[{"code":"NAME_UNKNOWN","message":"not known"}]}"#,
            ),
        }
    }
}

/// The whole or, when asked for, the end of a blob.
pub(crate) fn ranged(request: &Request, blob: &[u8]) -> Reply {
    let start = request
        .headers
        .get("range")
        .and_then(|range| range.strip_prefix("bytes="))
        .and_then(|range| range.strip_suffix('-'))
        .and_then(|start| start.parse::<usize>().ok());
    match start {
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", blob.len() - 1, blob.len());
            Reply::new(206, &blob[start..]).header("content-range", &range)
        }
        None => Reply::new(200, blob),
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = receive(&mut stream).await {
        shared.requests.lock().unwrap().push(request.clone());
        let handler = shared.handler.lock().unwrap().clone();
        let reply = handler
            .and_then(|handler| handler(&request))
            .unwrap_or_else(|| shared.truth(&request));
        if !answer(stream.get_mut(), &reply).await {
            return;
        }
    }
}

async fn receive(stream: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let length = headers
        .get("content-length")
        .and_then(|text: &String| text.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request {
        method,
        path,
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Whether the connection can go on.
async fn answer(stream: &mut TcpStream, reply: &Reply) -> bool {
    if reply.status == MUTE {
        tokio::time::sleep(Duration::from_secs(600)).await;
        return false;
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if reply.unsized_body || reply.endless {
        head.push_str("connection: close\r\n");
    } else if !reply
        .headers
        .iter()
        .any(|(name, _)| name == "content-length")
    {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    head.push_str("\r\n");
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    let sent = &reply.body[..reply.cut.unwrap_or(reply.body.len())];
    if let Some(pause) = reply.drip {
        for byte in sent {
            if stream.write_all(&[*byte]).await.is_err() {
                return false;
            }
            tokio::time::sleep(pause).await;
        }
        return reply.cut.is_none();
    }
    loop {
        if stream.write_all(sent).await.is_err() {
            return false;
        }
        if !reply.endless {
            break;
        }
    }
    if reply.stall {
        tokio::time::sleep(Duration::from_secs(600)).await;
    }
    reply.cut.is_none() && !reply.unsized_body
}
