//! Messages of `channel.k8s.io`: each begins with its channel.

use crate::protocol::Encoding;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use std::borrow::Cow;
use tokio_tungstenite::tungstenite::Message;

/// The channel on which v5 clients close others.
const CLOSE: u8 = 255;

/// How a connection's messages are read and written.
#[derive(Debug, Clone, Copy)]
pub struct Codec {
    /// How data is written.
    pub encoding: Encoding,
    /// Whether channels can be closed (v5).
    pub closes: bool,
}

/// A client's message.
#[derive(Debug, PartialEq, Eq)]
pub enum Inbound<'a> {
    /// Bytes on a channel.
    Data(u8, Cow<'a, [u8]>),
    /// Nothing more comes on a channel.
    Close(u8),
    /// An empty message, which means nothing.
    Nothing,
    /// Not of this protocol.
    Malformed,
}

impl Codec {
    /// Reads a message.
    pub fn read<'a>(&self, message: &'a [u8]) -> Inbound<'a> {
        let Some((&channel, data)) = message.split_first() else {
            return Inbound::Nothing;
        };
        if self.closes && channel == CLOSE {
            return match data {
                [channel] => Inbound::Close(*channel),
                _ => Inbound::Malformed,
            };
        }
        match self.encoding {
            Encoding::Binary => Inbound::Data(channel, Cow::Borrowed(data)),
            Encoding::Base64 => match (channel.checked_sub(b'0'), STANDARD.decode(data)) {
                (Some(channel), Ok(data)) => Inbound::Data(channel, Cow::Owned(data)),
                _ => Inbound::Malformed,
            },
        }
    }

    /// Writes a message.
    pub(crate) fn write(&self, channel: u8, data: &[u8]) -> Message {
        match self.encoding {
            Encoding::Binary => {
                let mut message = BytesMut::with_capacity(data.len() + 1);
                message.put_u8(channel);
                message.put_slice(data);
                Message::Binary(message.freeze())
            }
            Encoding::Base64 => {
                let mut message = String::with_capacity(data.len() * 4 / 3 + 5);
                message.push(char::from(b'0' + channel));
                STANDARD.encode_string(data, &mut message);
                Message::Text(message.into())
            }
        }
    }
}

/// What a client's message carries, text or not.
pub(super) fn payload(message: Message) -> Option<Bytes> {
    match message {
        Message::Binary(bytes) => Some(bytes),
        Message::Text(text) => Some(text.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_their_channel() {
        let binary = Codec {
            encoding: Encoding::Binary,
            closes: true,
        };
        assert_eq!(binary.read(b""), Inbound::Nothing);
        assert_eq!(binary.read(b"\0ab"), Inbound::Data(0, b"ab"[..].into()));
        assert_eq!(binary.read(b"\xff\0"), Inbound::Close(0));
        assert_eq!(binary.read(b"\xff"), Inbound::Malformed);
        assert_eq!(binary.read(b"\xff\0\0"), Inbound::Malformed);
        assert_eq!(binary.write(1, b"x"), Message::Binary(b"\x01x"[..].into()));
        let base64 = Codec {
            encoding: Encoding::Base64,
            closes: false,
        };
        assert_eq!(
            base64.read(b"0Zm9vCg=="),
            Inbound::Data(0, b"foo\n"[..].into())
        );
        assert_eq!(base64.read(b"0Zm8="), Inbound::Data(0, b"fo"[..].into()));
        assert_eq!(base64.read(b"0Z"), Inbound::Malformed);
        assert_eq!(base64.read(b"\0Zm9v"), Inbound::Malformed);
        assert_eq!(base64.write(1, b"\n"), Message::Text("1Cg==".into()));
    }
}
