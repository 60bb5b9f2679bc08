//! The streaming server: Exec, Attach and PortForward over SPDY/3.1 and WebSocket.
//!
//! The CRI answers `Exec`, `Attach` and `PortForward` with a URL; the kubelet (for `kubectl`) or
//! `crictl` connects to it and upgrades the connection. [`StreamServer`] hands out such URLs, each
//! with a token that works once and for a minute, and serves them. What happens in a container or a
//! pod is the business of a [`Backend`]: this crate knows neither CRI messages nor how a container
//! is made.
//!
//! ```no_run
//! # use slipway_stream::*;
//! # struct Runtime;
//! # impl Backend for Runtime {
//! #     async fn exec(&self, _: ExecRequest, _: SessionIo) -> Result<ExitStatus, StreamError> { Err(StreamError::Failed("no runtime".into())) }
//! #     async fn attach(&self, _: AttachRequest, _: SessionIo) -> Result<(), StreamError> { Err(StreamError::Failed("no runtime".into())) }
//! #     async fn port_forward(&self, _: &str, _: u16) -> Result<PortStream, StreamError> { Err(StreamError::Failed("no runtime".into())) }
//! # }
//! # async fn example(shutdown: tokio_util::sync::CancellationToken) -> Result<(), StreamError> {
//! let server = StreamServer::new(Config::default(), Runtime).await?;
//! let url = server.exec_url(ExecRequest {
//!     container_id: "c0ffee".into(),
//!     command: vec!["date".into()],
//!     stdout: true,
//!     ..ExecRequest::default()
//! })?;
//! server.serve(shutdown).await;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod activity;
mod backend;
mod config;
mod error;
mod forward;
mod http;
mod peer;
mod pipe;
mod protocol;
mod resize;
mod server;
mod session;
mod spdy;
mod status;
mod tls;
mod token;
mod ws;

pub use backend::{
    AttachRequest, Backend, Duplex, ExecRequest, ExitStatus, Input, Output, PortStream, Resizes,
    SessionIo, TerminalSize,
};
pub use config::{Config, TlsFiles};
pub use error::StreamError;
pub use server::StreamServer;

/// What fuzzers and tests of the wire formats need. Not for others.
#[doc(hidden)]
pub mod wire {
    pub use crate::protocol::Encoding;
    pub use crate::resize::ResizeDecoder;
    pub use crate::spdy::{
        Decoder, Encoder, Event, Frame, FrameError, Headers, MAX_CONTROL, MAX_HEADER_BLOCK, goaway,
        reset,
    };
    pub use crate::ws::{Codec, Inbound};
}
