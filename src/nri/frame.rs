//! Several logical connections over one socket.
//!
//! A frame is a connection's number and a length, both 32 bits big-endian, and so many bytes. A logical
//! connection needs no opening; frames of one that nobody knows are passed over.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::error::NriError;
use crate::rpc;

/// The connection on which the plugin serves.
pub const PLUGIN: u32 = 1;
/// The connection on which we do.
pub const RUNTIME: u32 = 2;
const HEADER: usize = 8;
/// The longest payload.
pub const LONGEST: usize = rpc::HEADER + rpc::LONGEST;
/// Go's plugins read the head of a message through a buffer of this size, and fail with a frame that does not fit
/// in. So a message begins in a frame of at most this, and the rest, which they read directly, is one more.
const FIRST: usize = 4096;

/// Appends a whole message in the frames that peers can take.
pub fn write(out: &mut BytesMut, connection: u32, message: &[u8]) {
    let (first, rest) = message.split_at(message.len().min(FIRST));
    for part in [first, rest] {
        if !part.is_empty() {
            out.put_u32(connection);
            // Messages are bounded by rpc::LONGEST.
            out.put_u32(u32::try_from(part.len()).unwrap_or(u32::MAX));
            out.put_slice(part);
        }
    }
}

/// Takes frames out of what was read so far.
#[derive(Debug, Default)]
pub struct Reader {
    buffer: BytesMut,
}

impl Reader {
    /// Where to read into.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next frame, if it is complete: its connection and payload.
    ///
    /// # Errors
    /// [`NriError::Protocol`] for a length that no frame has. Nothing is allocated for that.
    pub fn next(&mut self) -> Result<Option<(u32, Bytes)>, NriError> {
        let Some(head) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let number = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let (connection, length) = (number(0), number(4) as usize);
        if length > LONGEST {
            return Err(NriError::Protocol(format!(
                "a frame of {length} bytes; {LONGEST} are the most"
            )));
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        Ok(Some((connection, self.buffer.split_to(length).freeze())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hostile_lengths() {
        let mut reader = Reader::default();
        reader
            .buffer()
            .put_slice(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(reader.next(), Err(NriError::Protocol(_))));
        let mut reader = Reader::default();
        reader.buffer().put_u32(1);
        reader.buffer().put_u32(u32::try_from(LONGEST).unwrap());
        assert!(reader.next().unwrap().is_none());
        assert!(
            reader.buffer().capacity() < 4096,
            "nothing is allocated for a promise"
        );
    }

    #[test]
    fn long_messages_are_framed_for_gos_buffers() {
        let mut out = BytesMut::new();
        write(&mut out, PLUGIN, &[7; 10_000]);
        let mut reader = Reader::default();
        reader.buffer().extend_from_slice(&out);
        assert_eq!(reader.next().unwrap().unwrap().1.len(), 4096);
        assert_eq!(reader.next().unwrap().unwrap().1.len(), 10_000 - 4096);
        assert!(reader.next().unwrap().is_none());
    }

    proptest! {
        #[test]
        fn frames_come_back_however_they_are_cut(
            frames in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 1..600)), 1..8),
            step in 1usize..50,
        ) {
            let mut bytes = BytesMut::new();
            for (connection, payload) in &frames {
                write(&mut bytes, *connection, payload);
            }
            let mut reader = Reader::default();
            let mut found = Vec::new();
            for part in bytes.chunks(step) {
                reader.buffer().extend_from_slice(part);
                while let Some((connection, payload)) = reader.next().unwrap() {
                    found.push((connection, payload.to_vec()));
                }
            }
            prop_assert_eq!(found, frames);
        }

        #[test]
        fn garbage_is_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = Reader::default();
            reader.buffer().extend_from_slice(&bytes);
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
