//! Clients that say something as `:authority` that is none: the socket's path, percent-encoded or not.
//!
//! Several gRPC libraries do so on Unix sockets (grpc-go with a dialer of the caller's, C++ and what is built on
//! it, Java), and Go and C++ servers take it. `h2` refuses it with PROTOCOL_ERROR (hyperium/h2#487) and has no setting
//! for it. So what a client sends is read along until its first request. With a proper authority it passes
//! untouched from then on; else each header block is decoded, its authority replaced, and written anew without
//! HPACK's dynamic table (RFC 7541).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use http::uri::Authority;
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What clients say that do it right.
const REPLACEMENT: &[u8] = b"localhost";
/// The client's connection preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
/// Length, type, flags, stream.
const FRAME_HEAD: usize = 9;
/// The largest frame that a peer has to take (RFC 9113, section 6.5.2).
const MOST_OF_A_FRAME: usize = 16_384;
/// Bytes of a header block, encoded or decoded. hyper takes 16 KiB.
const MOST_OF_A_BLOCK: usize = 64 * 1024;
/// SETTINGS_HEADER_TABLE_SIZE, unless a server says otherwise, and ours does not.
const HEADER_TABLE: usize = 4096;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// A connection whose client may say what it likes as its authority.
pub struct Lenient<S> {
    stream: S,
    filter: Filter,
    ready: BytesMut,
}

impl<S> Lenient<S> {
    /// Takes over a connection of which nothing was read yet.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            filter: Filter::default(),
            ready: BytesMut::new(),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lenient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.ready.is_empty() {
                let n = this.ready.len().min(buf.remaining());
                buf.put_slice(&this.ready[..n]);
                this.ready.advance(n);
                return Poll::Ready(Ok(()));
            }
            if this.filter.is_done() {
                return Pin::new(&mut this.stream).poll_read(cx, buf);
            }
            let mut bytes = [0; 4096];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                // The end. What was held back is a frame without its end, which is worth nothing to anybody.
                return Poll::Ready(Ok(()));
            }
            this.filter.push(read.filled(), &mut this.ready)?;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lenient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A header block that is not complete yet.
struct Block {
    stream: u32,
    end_stream: bool,
    fragment: Vec<u8>,
    /// As the client sent it.
    frames: Vec<u8>,
}

enum Mode {
    /// No request was seen.
    Unknown,
    /// The client's authority is an authority.
    Untouched,
    /// Each block is written anew.
    Rewriting,
}

/// What is done with the bytes of a client.
struct Filter {
    mode: Mode,
    /// Bytes that pass as they are before the next frame begins.
    passing: usize,
    input: BytesMut,
    block: Option<Block>,
    decoder: Decoder<'static>,
}

impl Default for Filter {
    fn default() -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(HEADER_TABLE);
        Self {
            mode: Mode::Unknown,
            passing: PREFACE,
            input: BytesMut::new(),
            block: None,
            decoder,
        }
    }
}

impl Filter {
    /// Whether whatever comes passes as it is.
    fn is_done(&self) -> bool {
        matches!(self.mode, Mode::Untouched)
    }

    fn push(&mut self, bytes: &[u8], out: &mut BytesMut) -> io::Result<()> {
        self.input.extend_from_slice(bytes);
        while !self.input.is_empty() {
            if self.is_done() {
                out.extend_from_slice(&self.input.split());
                break;
            }
            if self.passing > 0 {
                let n = self.passing.min(self.input.len());
                out.extend_from_slice(&self.input.split_to(n));
                self.passing -= n;
                continue;
            }
            let Some(&[a, b, c, kind, flags, d, e, f, g]) = self.input.first_chunk::<FRAME_HEAD>()
            else {
                break;
            };
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if kind != HEADERS && kind != CONTINUATION {
                self.passing = FRAME_HEAD + length;
                continue;
            }
            if length > MOST_OF_A_FRAME {
                return Err(invalid("a frame of headers is too large"));
            }
            if self.input.len() < FRAME_HEAD + length {
                break;
            }
            let frame = self.input.split_to(FRAME_HEAD + length);
            let stream = u32::from_be_bytes([d, e, f, g]) & 0x7fff_ffff;
            self.take_headers(&frame, kind, flags, stream, out)?;
        }
        Ok(())
    }

    fn take_headers(
        &mut self,
        frame: &[u8],
        kind: u8,
        flags: u8,
        stream: u32,
        out: &mut BytesMut,
    ) -> io::Result<()> {
        let payload = &frame[FRAME_HEAD..];
        let mut block = match (kind, self.block.take()) {
            (HEADERS, None) => Block {
                stream,
                end_stream: flags & END_STREAM != 0,
                fragment: fragment(payload, flags)?.to_vec(),
                frames: Vec::new(),
            },
            (CONTINUATION, Some(mut block)) if block.stream == stream => {
                block.fragment.extend_from_slice(payload);
                block
            }
            _ => return Err(invalid("frames of headers are out of order")),
        };
        block.frames.extend_from_slice(frame);
        if block.frames.len() > MOST_OF_A_BLOCK {
            return Err(invalid("a request has too many headers"));
        }
        if flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        let decoded = decode(&mut self.decoder, &block.fragment);
        if matches!(self.mode, Mode::Unknown) {
            // What can't be decoded is for the server to judge.
            let untouched = decoded.as_ref().map_or(true, |headers| {
                !headers.iter().any(|(name, value)| is_wrong(name, value))
            });
            if untouched {
                self.mode = Mode::Untouched;
                out.extend_from_slice(&block.frames);
                return Ok(());
            }
            self.mode = Mode::Rewriting;
        }
        let mut encoded = Vec::with_capacity(block.fragment.len() * 2);
        for (name, value) in &decoded? {
            let wrong = is_wrong(name, value);
            encode(&mut encoded, name, if wrong { REPLACEMENT } else { value });
        }
        write_frames(out, &encoded, block.stream, block.end_stream);
        Ok(())
    }
}

/// What a frame of headers has beside padding and priority (RFC 9113, section 6.2).
fn fragment(mut payload: &[u8], flags: u8) -> io::Result<&[u8]> {
    let short = || invalid("a frame of headers is too short");
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (first, rest) = payload.split_first().ok_or_else(short)?;
        (padding, payload) = (usize::from(*first), rest);
    }
    if flags & PRIORITY != 0 {
        payload = payload.get(5..).ok_or_else(short)?;
    }
    let end = payload.len().checked_sub(padding).ok_or_else(short)?;
    Ok(&payload[..end])
}

type Headers = Vec<(Vec<u8>, Vec<u8>)>;

fn decode(decoder: &mut Decoder<'_>, block: &[u8]) -> io::Result<Headers> {
    let (mut headers, mut size) = (Headers::new(), 0);
    let decoded = decoder.decode_with_cb(block, |name, value| {
        size += name.len() + value.len();
        // A few bytes can stand for a large entry of the table, again and again.
        if size <= MOST_OF_A_BLOCK {
            headers.push((name.into_owned(), value.into_owned()));
        }
    });
    decoded.map_err(|e| invalid(&format!("a request's headers can't be decoded: {e}")))?;
    if size > MOST_OF_A_BLOCK {
        return Err(invalid("a request has too many headers"));
    }
    Ok(headers)
}

fn is_wrong(name: &[u8], value: &[u8]) -> bool {
    name == b":authority" && Authority::try_from(value).is_err()
}

/// A literal without indexing, with a new name and without Huffman's code (RFC 7541, section 6.2.2).
fn encode(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    for text in [name, value] {
        encode_length(out, text.len());
        out.extend_from_slice(text);
    }
}

/// An integer with a prefix of seven bits (RFC 7541, section 5.1).
fn encode_length(out: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        out.push(length as u8);
        return;
    };
    out.push(127);
    while rest >= 128 {
        out.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    out.push(rest as u8);
}

fn write_frames(out: &mut BytesMut, block: &[u8], stream: u32, end_stream: bool) {
    let count = block.len().div_ceil(MOST_OF_A_FRAME).max(1);
    for n in 0..count {
        let from = n * MOST_OF_A_FRAME;
        let part = &block[from..block.len().min(from + MOST_OF_A_FRAME)];
        let kind = if n == 0 { HEADERS } else { CONTINUATION };
        let mut flags = if n + 1 == count { END_HEADERS } else { 0 };
        if n == 0 && end_stream {
            flags |= END_STREAM;
        }
        out.extend_from_slice(&(part.len() as u32).to_be_bytes()[1..]);
        out.extend_from_slice(&[kind, flags]);
        out.extend_from_slice(&stream.to_be_bytes());
        out.extend_from_slice(part);
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    fn request<'a>(authority: &'a str, path: &'a str) -> Vec<(&'a [u8], &'a [u8])> {
        vec![
            (b":method", b"POST"),
            (b":path", path.as_bytes()),
            (b":authority", authority.as_bytes()),
            (b"te", b"trailers"),
        ]
    }

    /// Bytes of a client that makes two requests; the second uses what the first left in the table.
    fn client(authority: &str) -> Vec<u8> {
        let mut encoder = Encoder::new();
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        let first = encoder.encode(request(authority, "/one"));
        // Padded, with a priority, and in two frames.
        let mut payload = vec![3, 0, 0, 0, 0, 16];
        payload.extend_from_slice(&first[..4]);
        payload.extend([0; 3]);
        bytes.extend(frame(HEADERS, PADDED | PRIORITY, 1, &payload));
        bytes.extend(frame(CONTINUATION, END_HEADERS, 1, &first[4..]));
        bytes.extend(frame(0, END_STREAM, 1, b"data"));
        let second = encoder.encode(request(authority, "/two"));
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 3, &second));
        bytes
    }

    fn filter(pieces: impl Iterator<Item = Vec<u8>>) -> io::Result<Vec<u8>> {
        let (mut filter, mut out) = (Filter::default(), BytesMut::new());
        for piece in pieces {
            filter.push(&piece, &mut out)?;
        }
        Ok(out.to_vec())
    }

    fn bytewise(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
        bytes.iter().map(|b| vec![*b])
    }

    /// The frames after the preface.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
        bytes = &bytes[PREFACE..];
        let mut frames = Vec::new();
        while let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEAD>() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            frames.push((head[3], head[4], stream, rest[..length].to_vec()));
            bytes = &rest[length..];
        }
        frames
    }

    #[test]
    fn a_proper_authority_passes_untouched() {
        for authority in ["localhost", "example.org:80", "[::1]:5"] {
            let sent = client(authority);
            assert_eq!(filter(bytewise(&sent)).unwrap(), sent);
        }
    }

    #[test]
    fn a_path_as_authority_is_replaced_in_every_request() {
        for authority in ["/run/slipway/slipway.sock", "%2Frun%2Fslipway.sock"] {
            let out = filter(bytewise(&client(authority))).unwrap();
            let frames = frames(&out);
            let kinds: Vec<_> = frames.iter().map(|f| (f.0, f.1, f.2)).collect();
            let ended = END_HEADERS | END_STREAM;
            let wanted = [
                (4, 0, 0),
                (HEADERS, END_HEADERS, 1),
                (0, END_STREAM, 1),
                (HEADERS, ended, 3),
            ];
            assert_eq!(kinds, wanted);
            assert_eq!(frames[2].3, b"data");
            let mut decoder = Decoder::new();
            for (n, path) in [(1, "/one"), (3, "/two")] {
                let headers = decoder.decode(&frames[n].3).unwrap();
                let wanted = request("localhost", path);
                let wanted: Headers = (wanted.iter())
                    .map(|(name, value)| (name.to_vec(), value.to_vec()))
                    .collect();
                assert_eq!(headers, wanted);
            }
        }
    }

    #[test]
    fn long_headers_are_split_into_frames() {
        let long = "x".repeat(40_000);
        let mut headers = request("/run/x.sock", "/one");
        headers.push((b"long", long.as_bytes()));
        let encoded = Encoder::new().encode(headers);
        let mut bytes = vec![0; PREFACE];
        let (first, rest) = encoded.split_at(encoded.len().min(16_000));
        bytes.extend(frame(HEADERS, 0, 1, first));
        let parts: Vec<_> = rest.chunks(16_000).collect();
        for (n, part) in parts.iter().enumerate() {
            let flags = if n + 1 == parts.len() { END_HEADERS } else { 0 };
            bytes.extend(frame(CONTINUATION, flags, 1, part));
        }
        let out = filter(std::iter::once(bytes)).unwrap();
        let block: Vec<u8> = frames(&out).into_iter().flat_map(|f| f.3).collect();
        let headers = Decoder::new().decode(&block).unwrap();
        assert_eq!(headers.last().unwrap().1, long.as_bytes());
        assert!(frames(&out).len() > 1);
    }

    #[test]
    fn a_small_block_that_stands_for_much_is_refused() {
        let big = "x".repeat(4000);
        let mut encoder = Encoder::new();
        let mut block = encoder.encode(vec![
            (&b":authority"[..], &b"/x"[..]),
            (&b"big"[..], big.as_bytes()),
        ]);
        // The entry that was added last.
        block.extend([0x80 | 62; 10_000]);
        let mut bytes = vec![0; PREFACE];
        bytes.extend(frame(HEADERS, END_HEADERS, 1, &block));
        let mut filter = Filter {
            mode: Mode::Rewriting,
            ..Filter::default()
        };
        let error = filter.push(&bytes, &mut BytesMut::new()).unwrap_err();
        assert!(error.to_string().contains("too many headers"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_danger(bytes: Vec<u8>, cut in 0..200usize) {
            let mut sent = client("/run/x.sock");
            sent.truncate(cut);
            sent.extend(bytes);
            let _ = filter(std::iter::once(sent));
        }
    }
}
