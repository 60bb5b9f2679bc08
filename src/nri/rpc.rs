//! ttrpc: calls and their answers over one connection.
//!
//! A message is a length, a stream's number (32 bits big-endian each), a type and flags (8 bits each), and so many
//! bytes. A call is a Request on a new odd stream, answered by one Response. Streams of data, which ttrpc has too,
//! NRI does not use.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use prost::Message as _;

use crate::error::NriError;

/// Bytes before a message's data.
pub const HEADER: usize = 10;
/// The longest data of a message.
pub const LONGEST: usize = 4 << 20;
/// NRI's service of plugins.
pub const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// NRI's service of the runtime.
pub const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// gRPC's codes, as far as they are used.
pub mod code {
    /// Success.
    pub const OK: i32 = 0;
    /// The request can never work.
    pub const INVALID_ARGUMENT: i32 = 3;
    /// Too much at a time.
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    /// Not now.
    pub const FAILED_PRECONDITION: i32 = 9;
    /// There is no such method.
    pub const UNIMPLEMENTED: i32 = 12;
}

/// A call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// The service's full name.
    #[prost(string, tag = "1")]
    pub service: String,
    /// The method's.
    #[prost(string, tag = "2")]
    pub method: String,
    /// Its message.
    #[prost(bytes = "bytes", tag = "3")]
    pub payload: Bytes,
    /// How long the caller waits, in nanoseconds; 0: for ever.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// The answer to a call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// Absent or with code 0 for success.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// Its message.
    #[prost(bytes = "bytes", tag = "2")]
    pub payload: Bytes,
}

/// `google.rpc.Status`, without details.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// gRPC's code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

impl Status {
    /// A failure.
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// A call on a stream.
    Request(u32, Request),
    /// The answer on a stream.
    Response(u32, Response),
}

impl Message {
    /// The message's bytes.
    ///
    /// # Errors
    /// [`NriError::TooLong`].
    pub fn encode(&self) -> Result<BytesMut, NriError> {
        let (stream, kind, length) = match self {
            Self::Request(stream, request) => (*stream, REQUEST, request.encoded_len()),
            Self::Response(stream, response) => (*stream, RESPONSE, response.encoded_len()),
        };
        if length > LONGEST {
            return Err(NriError::TooLong {
                what: "a message",
                length,
                limit: LONGEST,
            });
        }
        let mut out = BytesMut::with_capacity(HEADER + length);
        out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        out.put_u32(stream);
        out.put_u8(kind);
        out.put_u8(0);
        let encoded = match self {
            Self::Request(_, request) => request.encode(&mut out),
            Self::Response(_, response) => response.encode(&mut out),
        };
        encoded.map_err(|e| NriError::Protocol(e.to_string()))?;
        Ok(out)
    }
}

/// Takes messages out of a connection's bytes.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: BytesMut,
}

impl Reader {
    /// More bytes of the connection.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, if it is complete.
    ///
    /// # Errors
    /// [`NriError::Protocol`] for what is no message of a call.
    pub fn next(&mut self) -> Result<Option<Message>, NriError> {
        if self.buffer.len() < HEADER {
            return Ok(None);
        }
        let mut head = &self.buffer[..HEADER];
        let (length, stream) = (head.get_u32() as usize, head.get_u32());
        let (kind, _flags) = (head.get_u8(), head.get_u8());
        if length > LONGEST {
            return Err(NriError::Protocol(format!(
                "a message of {length} bytes; {LONGEST} are the most"
            )));
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let data = self.buffer.split_to(length).freeze();
        let bad =
            |e: prost::DecodeError| NriError::Protocol(format!("a message can't be read: {e}"));
        match kind {
            REQUEST if stream % 2 == 0 => Err(NriError::Protocol(format!(
                "a call on stream {stream}, which is even"
            ))),
            REQUEST => Ok(Some(Message::Request(
                stream,
                Request::decode(data).map_err(bad)?,
            ))),
            RESPONSE => Ok(Some(Message::Response(
                stream,
                Response::decode(data).map_err(bad)?,
            ))),
            other => Err(NriError::Protocol(format!(
                "a message of type {other}; NRI has calls and answers only"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(stream: u32, payload: Vec<u8>) -> Message {
        Message::Request(
            stream,
            Request {
                service: PLUGIN_SERVICE.into(),
                method: "Configure".into(),
                payload: payload.into(),
                timeout_nano: 5,
            },
        )
    }

    #[test]
    fn the_layout() {
        let response = Response {
            status: Some(Status::new(code::UNIMPLEMENTED, "no")),
            payload: Bytes::new(),
        };
        let bytes = Message::Response(0x0102_0304, response).encode().unwrap();
        assert_eq!(
            &bytes[..],
            [
                0, 0, 0, 8, 1, 2, 3, 4, 2, 0, 0x0a, 6, 8, 12, 0x12, 2, b'n', b'o'
            ]
        );
    }

    #[test]
    fn what_is_no_message() {
        let even = request(2, Vec::new()).encode().unwrap();
        let mut data = request(1, Vec::new()).encode().unwrap();
        data[8] = 3;
        let mut long = request(1, Vec::new()).encode().unwrap();
        long[0] = 0xff;
        let mut broken = request(1, b"abc".to_vec()).encode().unwrap();
        broken[HEADER] = 0xff;
        for bad in [even, data, long, broken] {
            let mut reader = Reader::default();
            reader.feed(&bad);
            assert!(matches!(reader.next(), Err(NriError::Protocol(_))));
        }
        assert!(matches!(
            request(1, vec![0; LONGEST]).encode(),
            Err(NriError::TooLong { .. })
        ));
    }

    proptest! {
        #[test]
        fn messages_come_back_however_they_are_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..6),
            step in 1usize..40,
        ) {
            let messages: Vec<_> = (payloads.into_iter().zip(0u32..))
                .map(|(payload, i)| request(2 * i + 1, payload))
                .collect();
            let bytes: Vec<u8> = (messages.iter()).flat_map(|m| m.encode().unwrap()).collect();
            let mut reader = Reader::default();
            let mut found = Vec::new();
            for part in bytes.chunks(step) {
                reader.feed(part);
                while let Some(message) = reader.next().unwrap() {
                    found.push(message);
                }
            }
            prop_assert_eq!(found, messages);
        }

        #[test]
        fn garbage_is_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::default();
            reader.feed(&bytes);
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
