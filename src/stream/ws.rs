//! WebSocket: channels in messages, and a byte stream in messages.

mod channel;
mod connection;
mod tunnel;

pub use channel::{Codec, Inbound};
pub(crate) use connection::Channels;
pub(crate) use tunnel::Tunnel;

use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// The largest message that is taken. Some clients send all that they have to say in one.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// Begins to speak WebSocket, after the handshake.
pub(crate) async fn start<T>(io: T) -> WebSocketStream<T>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .read_buffer_size(32 * 1024)
        .write_buffer_size(64 * 1024)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}
