//! A SPDY client that does what moby/spdystream does.

use super::{LIMIT, http};
use bytes::BytesMut;
use slipway_stream::wire::{Decoder, Encoder, Event, Frame, Headers};
use std::collections::HashMap;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub struct Client {
    pub io: Box<dyn Io>,
    pub encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
    next: u32,
    /// What came on each stream.
    pub got: HashMap<u32, Vec<u8>>,
    /// Streams in the order in which they ended, and whether they were reset.
    pub ended: Vec<(u32, bool)>,
    pub replies: Vec<u32>,
    pub goaway: Option<u32>,
    pub pings: Vec<u32>,
}

pub async fn upgrade(url: &str, protocol: &str) -> (String, TcpStream) {
    let headers = format!(
        "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n"
    );
    http(url, "POST", &headers).await
}

impl Client {
    pub fn over(io: impl Io + 'static) -> Self {
        Self {
            io: Box::new(io),
            encoder: Encoder::default(),
            decoder: Decoder::default(),
            buffer: BytesMut::new(),
            next: 1,
            got: HashMap::new(),
            ended: Vec::new(),
            replies: Vec::new(),
            goaway: None,
            pings: Vec::new(),
        }
    }

    pub async fn connect(url: &str, protocol: &str) -> Self {
        let (head, socket) = upgrade(url, protocol).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("\r\nConnection: Upgrade\r\n"), "{head}");
        assert!(head.contains("\r\nUpgrade: SPDY/3.1\r\n"), "{head}");
        let version = format!("\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        assert!(head.contains(&version), "{head}");
        Self::over(socket)
    }

    /// Connects and opens streams; gives their ids.
    pub async fn session<const N: usize>(
        url: &str,
        protocol: &str,
        kinds: [&str; N],
    ) -> (Self, [u32; N]) {
        let mut client = Self::connect(url, protocol).await;
        let mut ids = [0; N];
        for (id, kind) in ids.iter_mut().zip(kinds) {
            *id = client.open(&[("streamType", kind)]).await;
        }
        (client, ids)
    }

    /// Opens a stream, and waits for the reply as spdystream does.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.syn(headers).await;
        while !self.replies.contains(&id) {
            assert!(self.step().await, "no reply for stream {id}");
            assert!(!self.ended.contains(&(id, true)), "stream {id} was refused");
        }
        id
    }

    pub async fn syn(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let headers = headers
            .iter()
            .fold(Headers::default(), |all, (name, value)| {
                all.with(name, value)
            });
        self.send(Frame::SynStream {
            id,
            headers,
            fin: false,
            unidirectional: false,
        })
        .await;
        id
    }

    pub async fn send(&mut self, frame: Frame) {
        let mut out = BytesMut::new();
        self.encoder.encode(&frame, &mut out);
        self.io.write_all(&out).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let mut out = BytesMut::new();
        Encoder::encode_data(id, bytes, fin, &mut out);
        self.io.write_all(&out).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// Reads once. False at the end of the connection.
    pub async fn step(&mut self) -> bool {
        let read = self.io.read_buf(&mut self.buffer);
        let Ok(length @ 1..) = timeout(LIMIT, read).await.expect("nothing comes") else {
            return false;
        };
        let _ = length;
        while let Some(event) = self.decoder.decode(&mut self.buffer).unwrap() {
            match event {
                Event::Data { id, bytes, fin } => {
                    assert!(self.replies.contains(&id), "data before the reply");
                    assert!(
                        !self.ended.iter().any(|(e, _)| *e == id),
                        "data after the end"
                    );
                    self.got.entry(id).or_default().extend_from_slice(&bytes);
                    if fin {
                        self.ended.push((id, false));
                    }
                }
                Event::Frame(Frame::SynReply { id, .. }) => self.replies.push(id),
                Event::Frame(Frame::RstStream { id, .. }) => self.ended.push((id, true)),
                Event::Frame(Frame::GoAway { status, .. }) => self.goaway = Some(status),
                Event::Frame(Frame::Ping(id)) => self.pings.push(id),
                Event::Frame(Frame::Settings(_) | Frame::WindowUpdate { .. }) => {}
                Event::Frame(other) => panic!("{other:?}"),
            }
        }
        true
    }

    pub async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            assert!(self.step().await, "the connection ended too early");
        }
    }

    /// Reads to the end of the connection.
    pub async fn finish(&mut self) {
        while self.step().await {}
    }

    pub fn text(&self, id: u32) -> String {
        let bytes = self.got.get(&id).cloned().unwrap_or_default();
        String::from_utf8(bytes).unwrap()
    }
}
