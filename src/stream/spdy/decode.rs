//! From bytes to frames.

use super::frame::{CONTROL, FLAG_FIN, FLAG_UNIDIRECTIONAL, Frame, FrameError, MAX_31, kind};
use super::headers::Inflater;
use bytes::{Buf, BytesMut};

/// The largest control frame that is taken.
pub const MAX_CONTROL: usize = 16 * 1024;
/// The largest number of SETTINGS entries in one frame.
const MAX_SETTINGS: usize = 128;
const HEADER: usize = 8;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A whole control frame.
    Frame(Frame),
    /// Bytes of a data frame. A frame is handed on piece by piece, as it comes.
    Data {
        /// The stream.
        id: u32,
        /// The bytes; maybe none, if they end the stream.
        bytes: BytesMut,
        /// Nothing more will come on this stream.
        fin: bool,
    },
}

/// Reads frames; the compression of headers goes on from frame to frame. After an error it must
/// not be used any more.
#[derive(Default)]
pub struct Decoder {
    inflater: Inflater,
    /// The data frame that is under way.
    data: Option<Data>,
}

struct Data {
    id: u32,
    remaining: usize,
    fin: bool,
}

impl Decoder {
    /// Takes the next event off the front of `buffer`. `None` if there is too little yet.
    ///
    /// # Errors
    ///
    /// The bytes are not SPDY/3.1, or go beyond a limit: the connection is lost.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Event>, FrameError> {
        loop {
            if self.data.is_some() {
                return Ok(self.data(buffer));
            }
            let Some((head, _)) = buffer.split_first_chunk::<HEADER>() else {
                return Ok(None);
            };
            let mut head = &head[..];
            let (first, second) = (head.get_u32(), head.get_u32());
            let (flags, length) = ((second >> 24) as u8, (second & 0x00ff_ffff) as usize);
            if first & !MAX_31 == 0 {
                if first == 0 {
                    return Err(FrameError::StreamZero);
                }
                buffer.advance(HEADER);
                let fin = flags & FLAG_FIN != 0;
                if length == 0 {
                    let bytes = BytesMut::new();
                    return Ok(Some(Event::Data {
                        id: first,
                        bytes,
                        fin,
                    }));
                }
                self.data = Some(Data {
                    id: first,
                    remaining: length,
                    fin,
                });
                continue;
            }
            let (version, kind) = ((first >> 16) as u16, first as u16);
            if version != CONTROL {
                return Err(FrameError::Version(version & 0x7fff));
            }
            if length > MAX_CONTROL {
                return Err(FrameError::Length { kind, length });
            }
            if buffer.len() < HEADER + length {
                return Ok(None);
            }
            buffer.advance(HEADER);
            let payload = buffer.split_to(length);
            // A frame of a type that we don't know is skipped.
            if let Some(frame) = self.control(kind, flags, &payload)? {
                return Ok(Some(Event::Frame(frame)));
            }
        }
    }

    /// What there is of the data frame that is under way.
    fn data(&mut self, buffer: &mut BytesMut) -> Option<Event> {
        let data = self.data.as_mut()?;
        let ready = data.remaining.min(buffer.len());
        if ready == 0 {
            return None;
        }
        data.remaining -= ready;
        let last = data.remaining == 0;
        let (id, fin) = (data.id, data.fin && last);
        if last {
            self.data = None;
        }
        let bytes = buffer.split_to(ready);
        Some(Event::Data { id, bytes, fin })
    }

    fn control(
        &mut self,
        kind: u16,
        flags: u8,
        mut payload: &[u8],
    ) -> Result<Option<Frame>, FrameError> {
        let length = payload.len();
        let (least, exact) = match kind {
            kind::SYN_STREAM => (10, false),
            kind::SYN_REPLY | kind::HEADERS | kind::SETTINGS => (4, false),
            kind::RST_STREAM | kind::GOAWAY | kind::WINDOW_UPDATE => (8, true),
            kind::PING => (4, true),
            _ => return Ok(None),
        };
        if length < least || (exact && length != least) {
            return Err(FrameError::Length { kind, length });
        }
        let fin = flags & FLAG_FIN != 0;
        let first = payload.get_u32();
        let id = first & MAX_31;
        if id == 0
            && matches!(
                kind,
                kind::SYN_STREAM | kind::SYN_REPLY | kind::HEADERS | kind::RST_STREAM
            )
        {
            return Err(FrameError::StreamZero);
        }
        Ok(Some(match kind {
            kind::SYN_STREAM => {
                // The associated stream, the priority and the slot don't matter here.
                payload.advance(6);
                Frame::SynStream {
                    id,
                    headers: self.inflater.decompress(payload)?,
                    fin,
                    unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                }
            }
            kind::SYN_REPLY => Frame::SynReply {
                id,
                headers: self.inflater.decompress(payload)?,
                fin,
            },
            kind::HEADERS => Frame::Headers {
                id,
                headers: self.inflater.decompress(payload)?,
                fin,
            },
            kind::RST_STREAM => Frame::RstStream {
                id,
                status: payload.get_u32(),
            },
            kind::SETTINGS => {
                let count = first as usize;
                if count > MAX_SETTINGS || payload.len() != count * 8 {
                    return Err(FrameError::Length { kind, length });
                }
                let entry = |entry: &[u8]| {
                    let mut entry = entry;
                    (entry.get_u32() & 0x00ff_ffff, entry.get_u32())
                };
                Frame::Settings(payload.chunks_exact(8).map(entry).collect())
            }
            kind::PING => Frame::Ping(first),
            kind::GOAWAY => Frame::GoAway {
                last_good: id,
                status: payload.get_u32(),
            },
            _ => Frame::WindowUpdate {
                id,
                delta: payload.get_u32() & MAX_31,
            },
        }))
    }
}
