//! A backend, a server, and clients.

pub mod backend;
pub mod spdy;
pub mod ws;

use backend::Fake;
use slipway_stream::{Config, ExecRequest, StreamServer};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Nothing here takes longer than this, unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

pub struct Server {
    pub server: Arc<StreamServer<Fake>>,
    pub fake: Fake,
    pub shutdown: CancellationToken,
    pub serving: JoinHandle<()>,
}

pub async fn start() -> Server {
    start_with(Config::default()).await
}

pub async fn start_with(config: Config) -> Server {
    let fake = Fake::default();
    let server = StreamServer::new(config, fake.clone()).await.unwrap();
    let server = Arc::new(server);
    let shutdown = CancellationToken::new();
    let serving = {
        let (server, shutdown) = (server.clone(), shutdown.clone());
        tokio::spawn(async move { server.serve(shutdown).await })
    };
    Server {
        server,
        fake,
        shutdown,
        serving,
    }
}

impl Server {
    pub fn exec(&self, command: &[&str]) -> String {
        self.server.exec_url(request(command)).unwrap()
    }

    pub fn tty(&self, command: &[&str]) -> String {
        let request = ExecRequest {
            tty: true,
            stderr: false,
            ..request(command)
        };
        self.server.exec_url(request).unwrap()
    }
}

/// With all streams.
pub fn request(command: &[&str]) -> ExecRequest {
    ExecRequest {
        container_id: "c".into(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    }
}

/// Sends the head of a request and gives the head of the answer, and the connection.
pub async fn http(url: &str, method: &str, headers: &str) -> (String, TcpStream) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut socket = TcpStream::connect(host).await.unwrap();
    let head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(socket.read_u8().await.unwrap());
    }
    (String::from_utf8(answer).unwrap(), socket)
}

/// Bytes that look random and can be made again.
pub fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(length as u64).fill(&mut bytes);
    bytes
}
