//! How a streaming server is set up.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// How a [`StreamServer`](crate::StreamServer) is set up. The default suits a kubelet on the same
/// machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen. Port 0 lets the kernel choose; the URLs name the real port. Default: `127.0.0.1:0`.
    pub address: SocketAddr,
    /// What URLs begin with, instead of `http(s)://<address>`: for instance `https://node-1.example:10010`,
    /// with a path if a proxy serves the streams under one. `/exec/<token>` is appended.
    pub base_url: Option<String>,
    /// Serve over TLS with these files.
    pub tls: Option<TlsFiles>,
    /// How long a URL may wait to be used. Default: 1 minute.
    pub token_ttl: Duration,
    /// How many URLs may wait to be used at once. Default: 1000.
    pub max_in_flight: usize,
    /// How long a connection may carry no frame in either direction (pings count, as they do in the
    /// Go servers). Default: 4 hours.
    pub idle_timeout: Duration,
    /// How long a client may take to create the streams it needs. Default: 30 seconds.
    pub creation_timeout: Duration,
    /// How long a backend may take to return after its client has gone, before its future is dropped.
    /// Default: 30 seconds.
    pub cancel_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            base_url: None,
            tls: None,
            token_ttl: Duration::from_secs(60),
            max_in_flight: 1000,
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            creation_timeout: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(30),
        }
    }
}

/// A certificate chain and its key, both PEM. They are read again when they change; while what is
/// there can't be used, the old ones stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain, leaf first.
    pub certificate: PathBuf,
    /// The private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}
