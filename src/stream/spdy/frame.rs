//! SPDY/3.1 frames, and their way onto the wire.

use super::headers::{Deflater, Headers};
use bytes::{BufMut, BytesMut};
use thiserror::Error;

/// The control bit and the version, as the first 16 bits of a control frame.
pub(super) const CONTROL: u16 = 0x8003;
/// Set on the last frame that a side sends on a stream.
pub(super) const FLAG_FIN: u8 = 0x01;
/// Set on SYN_STREAM if the other side may not send.
pub(super) const FLAG_UNIDIRECTIONAL: u8 = 0x02;
/// The largest length that a frame can have.
pub const MAX_LENGTH: usize = 0x00ff_ffff;
/// Stream ids, window sizes and deltas have 31 bits.
pub const MAX_31: u32 = 0x7fff_ffff;
/// Window sizes before anything is said about them.
pub const INITIAL_WINDOW: u32 = 65536;

pub(super) mod kind {
    pub(in super::super) const SYN_STREAM: u16 = 1;
    pub(in super::super) const SYN_REPLY: u16 = 2;
    pub(in super::super) const RST_STREAM: u16 = 3;
    pub(in super::super) const SETTINGS: u16 = 4;
    pub(in super::super) const PING: u16 = 6;
    pub(in super::super) const GOAWAY: u16 = 7;
    pub(in super::super) const HEADERS: u16 = 8;
    pub(in super::super) const WINDOW_UPDATE: u16 = 9;
}

/// Why a stream is reset, as RST_STREAM says it.
pub mod reset {
    #![allow(missing_docs)]
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const INVALID_STREAM: u32 = 2;
    pub const REFUSED_STREAM: u32 = 3;
    pub const CANCEL: u32 = 5;
    pub const FLOW_CONTROL_ERROR: u32 = 7;
}

/// Why a connection ends, as GOAWAY says it.
pub mod goaway {
    #![allow(missing_docs)]
    pub const OK: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const INTERNAL_ERROR: u32 = 2;
}

/// The SETTINGS entry that says how much a peer may send on each stream unasked.
pub const SETTING_INITIAL_WINDOW: u32 = 7;

/// A control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Frame {
    SynStream {
        id: u32,
        headers: Headers,
        fin: bool,
        unidirectional: bool,
    },
    SynReply {
        id: u32,
        headers: Headers,
        fin: bool,
    },
    RstStream {
        id: u32,
        status: u32,
    },
    /// Identifiers and values.
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    GoAway {
        last_good: u32,
        status: u32,
    },
    Headers {
        id: u32,
        headers: Headers,
        fin: bool,
    },
    WindowUpdate {
        id: u32,
        delta: u32,
    },
}

/// What ends a connection: bytes that are not SPDY/3.1, or more of something than is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum FrameError {
    #[error("a control frame of SPDY version {0}, not 3")]
    Version(u16),
    #[error("a control frame of type {kind} has the length {length}, which it can't have")]
    Length { kind: u16, length: usize },
    #[error("a frame on stream 0")]
    StreamZero,
    #[error("the header block can't be decompressed")]
    Compression,
    #[error("the header block is larger than {0} bytes when decompressed")]
    HeadersTooLarge(usize),
    #[error("the header block is malformed")]
    Headers,
}

/// Writes frames; the compression of headers goes on from frame to frame.
#[derive(Default)]
pub struct Encoder {
    deflater: Deflater,
}

impl Encoder {
    /// Appends a control frame to `out`.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) {
        let start = out.len();
        let (kind, flags) = match frame {
            Frame::SynStream {
                fin,
                unidirectional,
                ..
            } => (
                kind::SYN_STREAM,
                if *fin { FLAG_FIN } else { 0 }
                    | if *unidirectional {
                        FLAG_UNIDIRECTIONAL
                    } else {
                        0
                    },
            ),
            Frame::SynReply { fin, .. } => (kind::SYN_REPLY, if *fin { FLAG_FIN } else { 0 }),
            Frame::RstStream { .. } => (kind::RST_STREAM, 0),
            Frame::Settings(_) => (kind::SETTINGS, 0),
            Frame::Ping(_) => (kind::PING, 0),
            Frame::GoAway { .. } => (kind::GOAWAY, 0),
            Frame::Headers { fin, .. } => (kind::HEADERS, if *fin { FLAG_FIN } else { 0 }),
            Frame::WindowUpdate { .. } => (kind::WINDOW_UPDATE, 0),
        };
        out.put_u16(CONTROL);
        out.put_u16(kind);
        out.put_u32(0);
        match frame {
            Frame::SynStream { id, headers, .. } => {
                out.put_u32(*id);
                // No associated stream, priority 0, slot 0.
                out.put_u32(0);
                out.put_u16(0);
                self.deflater.compress(headers, out);
            }
            Frame::SynReply { id, headers, .. } | Frame::Headers { id, headers, .. } => {
                out.put_u32(*id);
                self.deflater.compress(headers, out);
            }
            Frame::RstStream { id, status } => {
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Frame::Settings(entries) => {
                out.put_u32(entries.len() as u32);
                for (id, value) in entries {
                    out.put_u32(*id);
                    out.put_u32(*value);
                }
            }
            Frame::Ping(id) => out.put_u32(*id),
            Frame::GoAway { last_good, status } => {
                out.put_u32(*last_good);
                out.put_u32(*status);
            }
            Frame::WindowUpdate { id, delta } => {
                out.put_u32(*id);
                out.put_u32(*delta);
            }
        }
        let length = (out.len() - start - 8) as u32 & MAX_LENGTH as u32;
        let word = u32::from(flags) << 24 | length;
        out[start + 4..start + 8].copy_from_slice(&word.to_be_bytes());
    }

    /// Appends a data frame to `out`. At most [`MAX_LENGTH`] bytes fit.
    pub fn encode_data(id: u32, data: &[u8], fin: bool, out: &mut BytesMut) {
        debug_assert!(data.len() <= MAX_LENGTH);
        let flags = if fin { FLAG_FIN } else { 0 };
        out.reserve(8 + data.len());
        out.put_u32(id & MAX_31);
        out.put_u32(u32::from(flags) << 24 | data.len() as u32);
        out.put_slice(data);
    }
}
