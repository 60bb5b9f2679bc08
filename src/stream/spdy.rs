//! SPDY/3.1: the frames, and connections whose streams a client opens.
//!
//! The peer is, in practice, always moby/spdystream (in `kubectl`, the API server, the kubelet and
//! `crictl`). It knows no flow control: it neither sends nor heeds WINDOW_UPDATE. So
//! windows are heeded here only once the peer has shown that it has any, and the peer is allowed
//! to send as much as windows can allow; what slows it down is that its connection isn't read.

mod connection;
mod decode;
mod dictionary;
mod frame;
mod headers;
mod state;
mod stream;

pub(crate) use connection::{Connection, Limits};
pub use decode::{Decoder, Event, MAX_CONTROL};
pub use frame::{Encoder, Frame, FrameError, goaway, reset};
pub use headers::{Headers, MAX_HEADER_BLOCK};
pub(crate) use stream::{Closer, Stream};
