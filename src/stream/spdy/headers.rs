//! Header blocks and their compression, which both ends carry on from frame to frame.

use super::dictionary::DICTIONARY;
use super::frame::FrameError;
use bytes::{Buf, BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The largest header block that is taken, decompressed. What clients send has some 100 bytes.
pub const MAX_HEADER_BLOCK: usize = 64 * 1024;
const MAX_HEADERS: usize = 256;

/// Names and values. Names are in lower case and unique; values that belong to the same name are
/// separated by NUL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of `name`, which has to be in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(n, _)| n == name)?;
        value.split('\0').next()
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.push((name.to_ascii_lowercase(), value.to_owned()));
        self
    }

    fn write(&self) -> Vec<u8> {
        let mut block = Vec::new();
        block.put_u32(self.0.len() as u32);
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.put_u32(text.len() as u32);
            block.put_slice(text.as_bytes());
        }
        block
    }

    fn parse(mut block: &[u8]) -> Result<Self, FrameError> {
        let count = block.try_get_u32().map_err(|_| FrameError::Headers)? as usize;
        if count > MAX_HEADERS {
            return Err(FrameError::Headers);
        }
        let mut headers: Vec<(String, String)> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = text(&mut block)?.to_ascii_lowercase();
            let value = text(&mut block)?;
            if name.is_empty() || headers.iter().any(|(n, _)| *n == name) {
                return Err(FrameError::Headers);
            }
            headers.push((name, value));
        }
        if block.has_remaining() {
            return Err(FrameError::Headers);
        }
        Ok(Self(headers))
    }
}

fn text(block: &mut &[u8]) -> Result<String, FrameError> {
    let length = block.try_get_u32().map_err(|_| FrameError::Headers)? as usize;
    let (text, rest) = block.split_at_checked(length).ok_or(FrameError::Headers)?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Compresses header blocks. Takes memory from the first one on.
#[derive(Default)]
pub(super) struct Deflater(Option<Compress>);

impl Deflater {
    pub(super) fn compress(&mut self, headers: &Headers, out: &mut BytesMut) {
        let deflate = self.0.get_or_insert_with(|| {
            // A window that holds the dictionary is enough for the few and small replies.
            let mut deflate = Compress::new_with_window_bits(Compression::fast(), true, 11);
            // It fails only after the first use.
            let _ = deflate.set_dictionary(DICTIONARY);
            deflate
        });
        let block = headers.write();
        let mut buffer = [0; 1024];
        let start = deflate.total_in();
        loop {
            let read = (deflate.total_in() - start) as usize;
            let before = deflate.total_out();
            // A deflate stream that is never finished knows no error but "no progress".
            let status = deflate.compress(&block[read..], &mut buffer, FlushCompress::Sync);
            let written = (deflate.total_out() - before) as usize;
            out.put_slice(&buffer[..written]);
            if status.is_err() || written < buffer.len() {
                break;
            }
        }
    }
}

/// Decompresses header blocks.
#[derive(Default)]
pub(super) struct Inflater(Option<Decompress>);

impl Inflater {
    pub(super) fn decompress(&mut self, compressed: &[u8]) -> Result<Headers, FrameError> {
        let inflate = self.0.get_or_insert_with(|| Decompress::new(true));
        let mut block = Vec::new();
        let mut buffer = [0; 2048];
        let start = inflate.total_in();
        loop {
            let before = (inflate.total_in(), inflate.total_out());
            let rest = &compressed[(before.0 - start) as usize..];
            let status = inflate.decompress(rest, &mut buffer, FlushDecompress::Sync);
            let written = (inflate.total_out() - before.1) as usize;
            match status {
                Ok(Status::Ok | Status::BufError) => {}
                // The connection's header stream has no end.
                Ok(Status::StreamEnd) => return Err(FrameError::Compression),
                Err(error) if error.needs_dictionary().is_some() => {
                    inflate
                        .set_dictionary(DICTIONARY)
                        .map_err(|_| FrameError::Compression)?;
                    continue;
                }
                Err(_) => return Err(FrameError::Compression),
            }
            if block.len() + written > MAX_HEADER_BLOCK {
                return Err(FrameError::HeadersTooLarge(MAX_HEADER_BLOCK));
            }
            block.extend_from_slice(&buffer[..written]);
            let done = (inflate.total_in() - start) as usize == compressed.len();
            if done && written < buffer.len() {
                return Headers::parse(&block);
            }
            if written == 0 && inflate.total_in() == before.0 {
                return Err(FrameError::Compression);
            }
        }
    }
}
