//! The compressions that layers come in. What the content is says its first bytes, not its media
//! type: registries and build tools mislabel layers, and the digests are verified anyway.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const BUFFER: usize = 128 * 1024;
/// Zstandard frames that want a larger window are refused; `zstd -19 --long=27` is just allowed.
const MAX_WINDOW: u64 = 128 << 20;

type Source<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// A stream of the uncompressed bytes.
pub(crate) enum Decompressor<R: Read> {
    Plain(Source<R>),
    Gzip(Box<MultiGzDecoder<Source<R>>>),
    Zstd(Box<Zstd<Source<R>>>),
}

impl<R: Read> Decompressor<R> {
    /// Looks at the first bytes and picks the decoder.
    pub(crate) fn new(mut inner: R) -> io::Result<Self> {
        let mut head = Vec::with_capacity(6);
        inner.by_ref().take(6).read_to_end(&mut head)?;
        let magic = head.clone();
        let source = BufReader::with_capacity(BUFFER, Cursor::new(head).chain(inner));
        let unsupported = |name: &str| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "it is compressed with {name}; only gzip, zstd and no compression are supported"
                ),
            )
        };
        match magic.as_slice() {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip(Box::new(MultiGzDecoder::new(source)))),
            // A frame, or a skippable frame in front of the first one.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let mut decoder = FrameDecoder::new();
                decoder.set_max_window_size(MAX_WINDOW);
                Ok(Self::Zstd(Box::new(Zstd {
                    source,
                    decoder,
                    started: false,
                })))
            }
            [b'B', b'Z', b'h', ..] => Err(unsupported("bzip2")),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Err(unsupported("xz")),
            _ => Ok(Self::Plain(source)),
        }
    }
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(inner) => inner.read(buffer),
            Self::Gzip(inner) => inner.read(buffer),
            Self::Zstd(inner) => inner.read(buffer),
        }
    }
}

/// Zstandard: any number of frames, with skippable frames between them (zstd:chunked and parallel
/// compressors write those).
pub(crate) struct Zstd<S> {
    source: S,
    decoder: FrameDecoder,
    started: bool,
}

impl<S: BufRead> Zstd<S> {
    /// Begins the next frame; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped =
                        io::copy(&mut self.source.by_ref().take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl<S: BufRead> Read for Zstd<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.started {
                if !self.next_frame()? {
                    return Ok(0);
                }
                self.started = true;
            }
            let got = self.decoder.read(buffer)?;
            if got > 0 {
                return Ok(got);
            }
            if self.decoder.is_finished() {
                self.started = false;
                continue;
            }
            self.decoder
                .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBytes(BUFFER))
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decompressor::new(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn every_compression_is_sniffed() {
        let text: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
        assert_eq!(decode(&text).unwrap(), text);
        assert_eq!(decode(&gzip(&text)).unwrap(), text);
        assert_eq!(decode(&zstd(&text)).unwrap(), text);
        assert_eq!(decode(b"").unwrap(), b"");
        assert_eq!(decode(b"abc").unwrap(), b"abc");
    }

    #[test]
    fn several_members_and_skippable_frames() {
        assert_eq!(
            decode(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(),
            b"onetwo"
        );
        let skip = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        let all = [skip.clone(), zstd(b"one"), skip.clone(), zstd(b"two"), skip].concat();
        assert_eq!(decode(&all).unwrap(), b"onetwo");
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

        /// Damage may go unnoticed here, where digests are not looked at, but it never panics.
        #[test]
        fn damaged_streams_do_not_panic(
            at in 0usize..4000,
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 1..8),
            seed in 0u64..4,
        ) {
            let mut text = crate::testing::noise(3000, seed);
            text.extend_from_slice(&[b'a'; 3000]);
            for mut stream in [gzip(&text), zstd(&text)] {
                let at = 4 + at % (stream.len() - 4);
                let end = (at + bytes.len()).min(stream.len());
                stream[at..end].copy_from_slice(&bytes[..end - at]);
                drop(decode(&stream));
            }
        }
    }

    #[test]
    fn broken_streams_are_errors() {
        let text = vec![7; 100_000];
        for whole in [gzip(&text), zstd(&text)] {
            assert!(decode(&whole[..whole.len() - 5]).is_err());
            assert!(decode(&[&whole[..], b"junk"].concat()).is_err());
        }
        assert!(decode(b"BZh91AY").is_err());
        assert!(decode(b"\xfd7zXZ\0").is_err());
    }
}
