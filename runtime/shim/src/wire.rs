//! ttrpc on the wire: a header of ten bytes (length, stream, type, flags; big-endian) and a protobuf message.

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE,
    MessageHeader, Request, Response,
};

/// What a message is, once it is whole.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// Somebody asks.
    Request {
        /// Number of the call.
        stream: u32,
        /// Name of the service.
        service: String,
        /// Name of the method.
        method: String,
        /// The message.
        payload: Vec<u8>,
    },
    /// The answer to a call.
    Response {
        /// Number of the call.
        stream: u32,
        /// The message, or the code and the text of an error.
        result: Result<Vec<u8>, (i32, String)>,
    },
}

/// A request in its final form. `timeout` 0: none.
///
/// # Errors
/// For what is too long to be sent.
pub fn request(
    stream: u32,
    service: &str,
    method: &str,
    payload: Vec<u8>,
    timeout: std::time::Duration,
) -> Result<Vec<u8>, String> {
    let mut request = Request::new();
    request.service = service.to_owned();
    request.method = method.to_owned();
    request.payload = payload;
    request.timeout_nano = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
    frame(stream, MESSAGE_TYPE_REQUEST, &request)
}

/// The answer to a request.
///
/// # Errors
/// For what is too long to be sent.
pub fn response(stream: u32, payload: Vec<u8>) -> Result<Vec<u8>, String> {
    let mut response = Response::new();
    response.payload = payload;
    frame(stream, MESSAGE_TYPE_RESPONSE, &response)
}

fn frame(stream_id: u32, type_: u8, message: &impl Message) -> Result<Vec<u8>, String> {
    let body = message.write_to_bytes().map_err(|e| e.to_string())?;
    if body.len() > MESSAGE_LENGTH_MAX {
        return Err(format!(
            "a message of {} bytes, and {MESSAGE_LENGTH_MAX} are the most",
            body.len()
        ));
    }
    let header = MessageHeader {
        length: u32::try_from(body.len()).unwrap_or(u32::MAX),
        stream_id,
        type_,
        flags: 0,
    };
    let mut bytes = Vec::<u8>::from(header);
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Takes messages out of what was read so far.
#[derive(Debug, Default)]
pub struct Inbox {
    buffer: Vec<u8>,
}

impl Inbox {
    /// Adds what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, if it is whole. Those of types that no unary call has are passed over.
    ///
    /// # Errors
    /// What is wrong with what came; nothing that follows can be understood then.
    #[expect(
        clippy::should_implement_trait,
        reason = "it can fail, and there may be more later"
    )]
    pub fn next(&mut self) -> Result<Option<Incoming>, String> {
        loop {
            if self.buffer.len() < MESSAGE_HEADER_LENGTH {
                return Ok(None);
            }
            let header = MessageHeader::from(&self.buffer[..MESSAGE_HEADER_LENGTH]);
            let length = header.length as usize;
            if length > MESSAGE_LENGTH_MAX {
                return Err(format!(
                    "a message of {length} bytes, and {MESSAGE_LENGTH_MAX} are the most"
                ));
            }
            let end = MESSAGE_HEADER_LENGTH + length;
            if self.buffer.len() < end {
                return Ok(None);
            }
            let body: Vec<u8> = self
                .buffer
                .drain(..end)
                .skip(MESSAGE_HEADER_LENGTH)
                .collect();
            let stream = header.stream_id;
            match header.type_ {
                MESSAGE_TYPE_REQUEST => {
                    let request = Request::parse_from_bytes(&body).map_err(|e| e.to_string())?;
                    return Ok(Some(Incoming::Request {
                        stream,
                        service: request.service,
                        method: request.method,
                        payload: request.payload,
                    }));
                }
                MESSAGE_TYPE_RESPONSE => {
                    let response = Response::parse_from_bytes(&body).map_err(|e| e.to_string())?;
                    let refused = response.status.as_ref().filter(|s| s.code.value() != 0);
                    let result = match refused {
                        Some(status) => Err((status.code.value(), status.message.clone())),
                        None => Ok(response.payload),
                    };
                    return Ok(Some(Incoming::Response { stream, result }));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn messages_come_back_in_whatever_pieces() {
        let mut bytes = request(1, "a.B", "C", b"hello".to_vec(), Duration::from_secs(1)).unwrap();
        bytes.extend(response(3, b"there".to_vec()).unwrap());
        let mut inbox = Inbox::default();
        let mut seen = Vec::new();
        for byte in bytes {
            inbox.feed(&[byte]);
            seen.extend(inbox.next().unwrap());
        }
        assert_eq!(
            seen,
            [
                Incoming::Request {
                    stream: 1,
                    service: "a.B".into(),
                    method: "C".into(),
                    payload: b"hello".to_vec()
                },
                Incoming::Response {
                    stream: 3,
                    result: Ok(b"there".to_vec())
                }
            ]
        );
    }

    #[test]
    fn what_can_not_be_is_refused_before_it_is_read() {
        let mut inbox = Inbox::default();
        inbox.feed(&[0xff; 10]);
        assert!(inbox.next().unwrap_err().contains("4294967295"));
        // A data frame of a stream, which nobody asked for, and then a message that is none.
        let mut inbox = Inbox::default();
        inbox.feed(&[0, 0, 0, 1, 0, 0, 0, 1, 3, 0, 9]);
        assert_eq!(inbox.next(), Ok(None));
        inbox.feed(&[0, 0, 0, 2, 0, 0, 0, 1, 2, 0, 0xff, 0xff]);
        assert!(inbox.next().is_err());
        assert!(request(1, "a", "b", vec![0; MESSAGE_LENGTH_MAX], Duration::ZERO).is_err());
    }
}
