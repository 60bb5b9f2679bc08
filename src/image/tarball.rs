//! A streaming reader of tar archives: ustar, GNU and PAX, with long names, extended attributes and
//! all forms of sparse files.
//!
//! The `tar` crate supplies the layout of the headers. Iteration is ours, because layers are hostile
//! input: every buffer is bounded before it is allocated, the sparse map is given to the caller
//! rather than expanded into zeros, and PAX values may hold any byte.

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, Header};

use crate::tarball::pax::Extensions;

mod pax;

const BLOCK: usize = 512;
/// An entry whose long names and PAX headers together are longer is refused.
const MAX_EXTENSION: u64 = 1 << 20;
/// A sparse file of more pieces is refused.
const MAX_SEGMENTS: usize = 1 << 20;

/// Why an archive can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The stream behind it failed.
    #[error("the stream broke off")]
    Read(#[source] io::Error),
    /// The archive is not well-formed.
    #[error("{0}")]
    Malformed(String),
}

fn malformed(reason: impl Into<String>) -> TarError {
    TarError::Malformed(reason.into())
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular,
    /// To a name in the archive.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// A piece of a sparse file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// One entry of an archive.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds since the epoch and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// The file's length in bytes, holes included.
    pub(crate) size: u64,
    /// Where the data of a sparse file goes; ordered and within `size`. `None`: all of it in one
    /// piece.
    pub(crate) segments: Option<Vec<Segment>>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after the other; the data of the current entry is read through [`Read`].
pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes of data of the current entry that are still to come, and the padding behind them.
    remaining: u64,
    padding: u64,
    /// The start of the archive's last header, for errors.
    position: u64,
    /// Bytes of the archive that were read.
    offset: u64,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            remaining: 0,
            padding: 0,
            position: 0,
            offset: 0,
        }
    }

    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// How far the archive was read; after [`next`](Self::next), where the entry's data begins.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next entry; `None` at the end of the archive. What was not read of the last entry's data
    /// is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extensions = Extensions::default();
        let (mut long_name, mut long_link) = (None, None);
        // An entry may have any number of extension headers: what counts is all of them together.
        let mut allowed = MAX_EXTENSION;
        loop {
            self.skip_data()?;
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let header = Header::from_byte_slice(&block);
            let flag = block[156];
            let size = number(&header.as_old().size).ok_or_else(|| {
                malformed(format!("bad size in the header at byte {}", self.position))
            })?;
            match flag {
                b'L' => long_name = Some(cut_at_nul(self.extension(size, &mut allowed)?)),
                b'K' => long_link = Some(cut_at_nul(self.extension(size, &mut allowed)?)),
                b'x' => {
                    let text = self.extension(size, &mut allowed)?;
                    extensions.parse(&text).map_err(malformed)?;
                }
                // Global headers and volume labels say nothing about files that we'd use.
                b'g' | b'V' => self.set_data(size)?,
                _ => {
                    let entry = self.entry(header, size, extensions, long_name, long_link)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The next header block; `None` at the end-of-archive mark. An archive that ends without the
    /// mark is accepted, as other tools do.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut length = 0;
        while length < BLOCK {
            match self.inner.read(&mut block[length..]) {
                Ok(0) if length == 0 => return Ok(None),
                Ok(0) => return Err(malformed("the archive ends within a header")),
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        self.position = self.offset;
        self.offset += BLOCK as u64;
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block);
        let sum: u32 = block
            .iter()
            .enumerate()
            // The checksum field itself counts as blanks.
            .map(|(at, byte)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*byte)
                }
            })
            .sum();
        if number(&header.as_old().cksum) != Some(u64::from(sum)) {
            return Err(malformed(format!(
                "no valid tar header at byte {}",
                self.position
            )));
        }
        Ok(Some(block))
    }

    /// Turns a header and what preceded it into an entry.
    fn entry(
        &mut self,
        header: &Header,
        header_size: u64,
        mut extensions: Extensions,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let sparse_name = extensions.sparse.name.take();
        let name = sparse_name
            .or(extensions.path.take())
            .or(long_name)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions
            .link
            .take()
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(|link| link.into_owned()))
            .unwrap_or_default();
        let named = String::from_utf8_lossy(&name).into_owned();
        let bad = |what: &str| malformed(format!("entry {named:?} has a bad {what}"));
        let field = |bytes: &[u8], what: &str| number(bytes).ok_or_else(|| bad(what));
        let old = header.as_old();
        let device = || -> Result<(u32, u32), TarError> {
            let (major, minor) = (&header.as_bytes()[329..337], &header.as_bytes()[337..345]);
            let narrow = |bytes: &[u8]| {
                u32::try_from(field(bytes, "device number")?).map_err(|_| bad("device number"))
            };
            Ok((narrow(major)?, narrow(minor)?))
        };
        let flag = header.as_bytes()[156];
        let kind = match flag {
            b'0' | 0 | b'7' if name.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::Regular,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => {
                let (major, minor) = device()?;
                Kind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = device()?;
                Kind::BlockDevice { major, minor }
            }
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(malformed(format!(
                    "entry {named:?} is of the unknown type {:?}",
                    char::from(other)
                )));
            }
        };
        let mut entry = Entry {
            mode: u32::try_from(field(&old.mode, "mode")?).map_err(|_| bad("mode"))? & 0o7777,
            uid: match extensions.uid {
                Some(uid) => uid,
                None => field(&old.uid, "owner")?,
            },
            gid: match extensions.gid {
                Some(gid) => gid,
                None => field(&old.gid, "group")?,
            },
            mtime: match extensions.mtime {
                Some(time) => time,
                // Times before the epoch are two's complement in the binary form.
                None => (field(&old.mtime, "time")? as i64, 0),
            },
            size: 0,
            segments: None,
            xattrs: std::mem::take(&mut extensions.xattrs).into_iter().collect(),
            name,
            kind,
        };
        if entry.kind == Kind::Regular {
            let stored = extensions.size.unwrap_or(header_size);
            entry.size = stored;
            // A sparse map may be in front of the data or between header and data, so the order of
            // these steps matters.
            if flag == b'S' {
                let (size, segments) = self.gnu_sparse(header)?;
                entry.size = size;
                entry.segments = Some(segments);
                self.set_data(stored)?;
            } else {
                self.set_data(stored)?;
                if extensions.sparse.is_given() {
                    entry.size = extensions
                        .sparse
                        .real_size
                        .ok_or_else(|| bad("sparse map"))?;
                    entry.segments = Some(match extensions.sparse.major {
                        Some(1) => self.pax_sparse_map(&named)?,
                        Some(major) if major > 1 => return Err(bad("sparse format version")),
                        _ => std::mem::take(&mut extensions.sparse.segments),
                    });
                }
            }
            if let Some(segments) = &entry.segments {
                check_segments(segments, entry.size, self.remaining)
                    .ok_or_else(|| bad("sparse map"))?;
            }
        }
        Ok(entry)
    }

    /// The sparse map of the old GNU format: four pieces in the header, more in blocks behind it.
    fn gnu_sparse(&mut self, header: &Header) -> Result<(u64, Vec<Segment>), TarError> {
        let bad = || malformed("bad sparse map");
        let gnu = header.as_gnu().ok_or_else(bad)?;
        let size = number(&gnu.realsize).ok_or_else(bad)?;
        let mut segments = Vec::new();
        let mut add = |pieces: &[tar::GnuSparseHeader]| -> Result<(), TarError> {
            for piece in pieces {
                if piece.is_empty() {
                    continue;
                }
                segments.push(Segment {
                    offset: number(&piece.offset).ok_or_else(bad)?,
                    length: number(&piece.numbytes).ok_or_else(bad)?,
                });
            }
            if segments.len() > MAX_SEGMENTS {
                Err(malformed("sparse map of too many pieces"))
            } else {
                Ok(())
            }
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.inner
                .read_exact(block.as_mut_bytes())
                .map_err(TarError::Read)?;
            self.offset += BLOCK as u64;
            add(block.sparse())?;
            more = block.is_extended();
        }
        Ok((size, segments))
    }

    /// The sparse map of PAX format 1.0: decimal numbers in front of the data, one per line, padded
    /// to a block.
    fn pax_sparse_map(&mut self, named: &str) -> Result<Vec<Segment>, TarError> {
        let bad = || malformed(format!("entry {named:?} has a bad sparse map"));
        let mut line = || -> Result<u64, TarError> {
            let mut value: u64 = 0;
            let mut digits = 0;
            loop {
                let mut byte = [0];
                if self.read(&mut byte).map_err(TarError::Read)? == 0 {
                    return Err(bad());
                }
                match byte[0] {
                    b'\n' if digits > 0 => return Ok(value),
                    digit @ b'0'..=b'9' => {
                        value = value
                            .checked_mul(10)
                            .and_then(|value| value.checked_add(u64::from(digit - b'0')))
                            .ok_or_else(bad)?;
                        digits += 1;
                    }
                    _ => return Err(bad()),
                }
            }
        };
        let count = usize::try_from(line()?)
            .ok()
            .filter(|count| *count <= MAX_SEGMENTS)
            .ok_or_else(bad)?;
        let mut segments = Vec::new();
        for _ in 0..count {
            segments.push(Segment {
                offset: line()?,
                length: line()?,
            });
        }
        // The rest of the block that the map ends in is padding: data and map end on block borders
        // counted from the start of the data.
        let stored_end = self.remaining + self.padding;
        let over = (stored_end % BLOCK as u64).min(self.remaining);
        io::copy(&mut self.by_ref().take(over), &mut io::sink()).map_err(TarError::Read)?;
        Ok(segments)
    }

    /// Reads the data of an extension header, of which `allowed` bytes are left for this entry.
    fn extension(&mut self, size: u64, allowed: &mut u64) -> Result<Vec<u8>, TarError> {
        *allowed = allowed.checked_sub(size).ok_or_else(|| {
            malformed(format!(
                "an entry with more than {MAX_EXTENSION} bytes of names and PAX headers, the last of {size} bytes"
            ))
        })?;
        self.set_data(size)?;
        let mut bytes = Vec::with_capacity(size as usize);
        self.read_to_end(&mut bytes).map_err(TarError::Read)?;
        Ok(bytes)
    }

    fn set_data(&mut self, size: u64) -> Result<(), TarError> {
        let block = BLOCK as u64;
        self.padding = (block - size % block) % block;
        self.remaining = size;
        self.offset
            .checked_add(size)
            .and_then(|end| end.checked_add(block))
            .ok_or_else(|| malformed("an entry of an impossible size"))?;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let padding = std::mem::take(&mut self.padding);
        self.remaining += padding;
        let mut buffer = [0; 4096];
        while self.remaining > 0 {
            self.read(&mut buffer).map_err(TarError::Read)?;
        }
        Ok(())
    }
}

/// The data of the current entry.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let got = self.inner.read(&mut buffer[..want])?;
        if got == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive ends within an entry",
            ));
        }
        self.remaining -= got as u64;
        self.offset += got as u64;
        Ok(got)
    }
}

/// Whether the pieces are in order, within the file, and as long as the stored data.
fn check_segments(segments: &[Segment], size: u64, stored: u64) -> Option<()> {
    let (mut end, mut sum) = (0u64, 0u64);
    for segment in segments {
        if segment.offset < end {
            return None;
        }
        end = segment.offset.checked_add(segment.length)?;
        sum = sum.checked_add(segment.length)?;
    }
    (end <= size && sum == stored).then_some(())
}

fn cut_at_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// A numeric header field: octal with blanks and NULs around it, or GNU's base 256. An empty field
/// is zero.
fn number(field: &[u8]) -> Option<u64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // Base 256, big endian, the top bit is the mark; 0xff starts a negative number.
        let negative = first == 0xff;
        let tail = field.len().saturating_sub(8);
        let rest = if tail > 0 { &field[1..tail] } else { &[] };
        if rest
            .iter()
            .any(|byte| *byte != if negative { 0xff } else { 0 })
            || (!negative && tail > 0 && first != 0x80)
        {
            return None;
        }
        let mut value: u64 = if negative { u64::MAX } else { 0 };
        for (at, byte) in field[tail..].iter().enumerate() {
            let byte = if tail == 0 && at == 0 && !negative {
                byte & 0x7f
            } else {
                *byte
            };
            value = (value << 8) | u64::from(byte);
        }
        return Some(value);
    }
    let mut value: u64 = 0;
    let text = field
        .iter()
        .skip_while(|byte| **byte == b' ' || **byte == 0);
    for byte in text {
        match byte {
            b'0'..=b'7' => value = value.checked_mul(8)?.checked_add(u64::from(byte - b'0'))?,
            b' ' | 0 => break,
            _ => return None,
        }
    }
    Some(value)
}

#[cfg(test)]
mod tests;
