//! The wire formats, byte for byte and with any bytes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::prelude::*;
use slipway_stream::wire::{Decoder, Encoder, Event, Frame, FrameError, Headers};

/// Two SYN_STREAM frames whose header blocks Python's zlib compressed in one stream, with the
/// dictionary:
///
/// ```python
/// c = zlib.compressobj(level=9, zdict=dictionary)
/// def block(headers):
///     b = struct.pack(">I", len(headers))
///     for k, v in headers: b += struct.pack(">I", len(k)) + k + struct.pack(">I", len(v)) + v
///     return c.compress(b) + c.flush(zlib.Z_SYNC_FLUSH)
/// def syn(id, block): return struct.pack(">HHII", 0x8003, 1, len(block) + 10, id) + bytes(6) + block
/// ```
#[rustfmt::skip]
const FROM_PYTHON: [&[u8]; 2] = [
    &[
        0x80, 0x03, 0x00, 0x01, 0x00, 0x00, 0x00, 0x3a, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2, 0x02, 0x25, 0x3a, 0x70, 0x3a, 0x2b, 0x29, 0x4a,
        0x4d, 0xcc, 0x45, 0x2a, 0x4a, 0x12, 0x21, 0xa5, 0x72, 0x11, 0x38, 0x03, 0x58, 0x18, 0x58, 0x18,
        0x00, 0x69, 0xce, 0x22, 0x48, 0x2c, 0x66, 0x82, 0x52, 0x37, 0x93, 0xa1, 0x39, 0x00, 0x00, 0x00,
        0xff, 0xff,
    ],
    &[
        0x80, 0x03, 0x00, 0x01, 0x00, 0x00, 0x00, 0x19, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0xc2, 0xaa, 0x99, 0x35, 0x15, 0x14, 0x4b, 0x44, 0xe8, 0x06, 0x00, 0x00, 0x00, 0xff,
        0xff,
    ],
];

fn headers(kind: &str) -> Headers {
    Headers::default()
        .with("streamtype", kind)
        .with("port", "8080")
        .with("requestid", "17")
}

fn syn(id: u32, kind: &str) -> Frame {
    Frame::SynStream {
        id,
        headers: headers(kind),
        fin: false,
        unidirectional: false,
    }
}

#[test]
fn reads_what_pythons_zlib_compressed() {
    let mut decoder = Decoder::default();
    for (bytes, expected) in FROM_PYTHON.iter().zip([syn(1, "data"), syn(3, "error")]) {
        let mut buffer = BytesMut::from(*bytes);
        let event = decoder.decode(&mut buffer).unwrap();
        assert_eq!(event, Some(Event::Frame(expected)));
    }
    // The second can't be read without the first.
    let mut buffer = BytesMut::from(FROM_PYTHON[1]);
    let error = Decoder::default().decode(&mut buffer).unwrap_err();
    assert_eq!(error, FrameError::Compression);
}

#[test]
fn writes_the_bytes_of_the_specification() {
    let bytes = |frame: Frame| {
        let mut out = BytesMut::new();
        Encoder::default().encode(&frame, &mut out);
        out.to_vec()
    };
    assert_eq!(
        bytes(Frame::RstStream { id: 5, status: 3 }),
        [0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 3]
    );
    assert_eq!(
        bytes(Frame::Settings(vec![(7, 0x7fff_ffff)])),
        [
            0x80, 3, 0, 4, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 7, 0x7f, 0xff, 0xff, 0xff
        ]
    );
    assert_eq!(
        bytes(Frame::Ping(9)),
        [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]
    );
    let goaway = Frame::GoAway {
        last_good: 7,
        status: 1,
    };
    assert_eq!(
        bytes(goaway),
        [0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 1]
    );
    let update = Frame::WindowUpdate { id: 2, delta: 256 };
    assert_eq!(
        bytes(update),
        [0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 1, 0]
    );
    let mut out = BytesMut::new();
    Encoder::encode_data(3, b"ab", true, &mut out);
    assert_eq!(out[..], [0, 0, 0, 3, 1, 0, 0, 2, b'a', b'b']);
}

#[test]
fn unknown_frames_are_skipped_however_many() {
    let mut buffer = BytesMut::new();
    for _ in 0..100_000 {
        buffer.extend_from_slice(&[0x80, 3, 0, 99, 0, 0, 0, 0]);
    }
    Encoder::default().encode(&Frame::Ping(1), &mut buffer);
    let event = Decoder::default().decode(&mut buffer).unwrap();
    assert_eq!(event, Some(Event::Frame(Frame::Ping(1))));
}

#[derive(Debug, Clone)]
enum Sent {
    Frame(Frame),
    Data(u32, Vec<u8>, bool),
}

fn any_headers() -> impl Strategy<Value = Headers> {
    let values = proptest::collection::btree_map("[a-z:-]{1,20}", "[ -~]{0,200}", 0..20);
    values.prop_map(|values| {
        let all = values.iter();
        all.fold(Headers::default(), |h, (name, value)| h.with(name, value))
    })
}

fn any_sent() -> impl Strategy<Value = Sent> {
    let id = 1u32..0x7fff_ffff;
    prop_oneof![
        (id.clone(), any_headers(), any::<bool>(), any::<bool>()).prop_map(
            |(id, headers, fin, unidirectional)| Sent::Frame(Frame::SynStream {
                id,
                headers,
                fin,
                unidirectional
            })
        ),
        (id.clone(), any_headers(), any::<bool>())
            .prop_map(|(id, headers, fin)| Sent::Frame(Frame::SynReply { id, headers, fin })),
        (id.clone(), any_headers(), any::<bool>())
            .prop_map(|(id, headers, fin)| Sent::Frame(Frame::Headers { id, headers, fin })),
        (id.clone(), any::<u32>())
            .prop_map(|(id, status)| Sent::Frame(Frame::RstStream { id, status })),
        vec((0u32..1 << 24, any::<u32>()), 0..10).prop_map(|s| Sent::Frame(Frame::Settings(s))),
        any::<u32>().prop_map(|id| Sent::Frame(Frame::Ping(id))),
        (id.clone(), any::<u32>())
            .prop_map(|(last_good, status)| Sent::Frame(Frame::GoAway { last_good, status })),
        (id.clone(), 0u32..1 << 31)
            .prop_map(|(id, delta)| Sent::Frame(Frame::WindowUpdate { id, delta })),
        (id, vec(any::<u8>(), 0..2000), any::<bool>())
            .prop_map(|(id, bytes, fin)| Sent::Data(id, bytes, fin)),
    ]
}

/// Reads bytes that come in pieces, and joins data that was cut.
fn read(bytes: &[u8], piece: usize) -> Result<Vec<Event>, FrameError> {
    let mut decoder = Decoder::default();
    let mut buffer = BytesMut::new();
    let mut events: Vec<Event> = Vec::new();
    let mut open = false;
    for part in bytes.chunks(piece) {
        buffer.extend_from_slice(part);
        while let Some(event) = decoder.decode(&mut buffer)? {
            match (events.last_mut(), event) {
                (
                    Some(Event::Data { id, bytes, fin }),
                    Event::Data {
                        id: i,
                        bytes: more,
                        fin: end,
                    },
                ) if *id == i && !*fin && open => {
                    bytes.unsplit(more);
                    *fin = end;
                }
                (_, event) => events.push(event),
            }
            open = matches!(events.last(), Some(Event::Data { .. }));
        }
    }
    Ok(events)
}

proptest! {
    #[test]
    fn what_was_written_is_read_whatever_the_pieces(
        sent in vec(any_sent(), 0..20),
        piece in 1usize..5000,
    ) {
        let mut encoder = Encoder::default();
        let mut out = BytesMut::new();
        // A ping between the frames keeps data frames apart.
        let ping = Frame::Ping(77);
        let mut expected = Vec::new();
        for sent in sent {
            match sent {
                Sent::Frame(frame) => {
                    encoder.encode(&frame, &mut out);
                    expected.push(Event::Frame(frame));
                }
                Sent::Data(id, bytes, fin) => {
                    Encoder::encode_data(id, &bytes, fin, &mut out);
                    // A frame without bytes or an end says nothing, but it is told all the same.
                    expected.push(Event::Data { id, bytes: BytesMut::from(&bytes[..]), fin });
                }
            }
            encoder.encode(&ping, &mut out);
            expected.push(Event::Frame(ping.clone()));
        }
        prop_assert_eq!(read(&out, piece).unwrap(), expected);
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in vec(any::<u8>(), 0..2000), piece in 1usize..100) {
        let _ = read(&bytes, piece);
    }

    #[test]
    fn any_header_block_is_read_without_panic(block in vec(any::<u8>(), 0..2000), first in any::<bool>()) {
        let mut bytes = if first { FROM_PYTHON[0].to_vec() } else { Vec::new() };
        bytes.extend_from_slice(&[0x80, 3, 0, 8, 0]);
        bytes.extend_from_slice(&(block.len() as u32 + 4).to_be_bytes()[1..]);
        bytes.extend_from_slice(&[0, 0, 0, 1]);
        bytes.extend_from_slice(&block);
        let _ = read(&bytes, bytes.len());
    }
}
