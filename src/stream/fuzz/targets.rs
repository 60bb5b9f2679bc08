// What is fuzzed, for libFuzzer and for tests/corpus.rs.

/// Any bytes as a client's end of a SPDY connection, in two pieces.
#[allow(dead_code)]
pub fn spdy(input: &[u8]) {
    use bytes::BytesMut;
    use slipway_stream::wire::{Decoder, Encoder, Event};
    let mut decoder = Decoder::default();
    let mut encoder = Encoder::default();
    let mut buffer = BytesMut::new();
    let (first, second) = input.split_at(input.len() / 2);
    for part in [first, second] {
        buffer.extend_from_slice(part);
        loop {
            match decoder.decode(&mut buffer) {
                // What was read can be written, and reads the same.
                Ok(Some(Event::Frame(frame))) => {
                    let mut out = BytesMut::new();
                    encoder.encode(&frame, &mut out);
                    if out.len() < slipway_stream::wire::MAX_CONTROL {
                        let mut fresh = BytesMut::new();
                        Encoder::default().encode(&frame, &mut fresh);
                        let again = Decoder::default().decode(&mut fresh);
                        assert_eq!(again, Ok(Some(Event::Frame(frame))));
                    }
                }
                Ok(Some(Event::Data { .. })) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// Any bytes as a WebSocket message of each kind, and as terminal sizes.
#[allow(dead_code)]
pub fn channel(input: &[u8]) {
    use slipway_stream::wire::{Codec, Encoding, Inbound, ResizeDecoder};
    for (encoding, closes) in [
        (Encoding::Binary, true),
        (Encoding::Binary, false),
        (Encoding::Base64, false),
    ] {
        if let Inbound::Data(_, data) = (Codec { encoding, closes }).read(input) {
            assert!(data.len() < input.len());
        }
    }
    let mut sizes = ResizeDecoder::default();
    for part in input.chunks(7) {
        sizes.push(part);
    }
    ResizeDecoder::default().push(input);
}
