//! PAX extended headers (POSIX.1-2008, `pax`, "pax Extended Header"), with the keys that matter for
//! unpacking a layer.

use std::collections::BTreeMap;

use crate::tarball::{MAX_SEGMENTS, Segment};

const XATTR: &[u8] = b"SCHILY.xattr.";

/// What the extended headers in front of an entry said.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// GNU's keys for sparse files.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) major: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    pub(super) segments: Vec<Segment>,
    /// An offset (format 0.0) whose length is still to come.
    offset: Option<u64>,
    mapped: bool,
}

impl Sparse {
    pub(super) fn is_given(&self) -> bool {
        self.major.is_some() || self.mapped || self.real_size.is_some()
    }
}

impl Extensions {
    /// Parses records of the form `length key=value\n`. The error is a reason.
    pub(super) fn parse(&mut self, mut text: &[u8]) -> Result<(), String> {
        while !text.is_empty() {
            // Some writers pad with NULs.
            if text.iter().all(|byte| *byte == 0) {
                break;
            }
            let (record, rest) = split_record(text).ok_or("a malformed PAX header")?;
            text = rest;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or("a PAX record without a value")?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            self.set(key, value)
                .ok_or_else(|| format!("a bad PAX value for {:?}", String::from_utf8_lossy(key)))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        // An empty value takes an earlier one back.
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let parse = || -> Option<Option<u64>> {
            if value.is_empty() {
                Some(None)
            } else {
                decimal(value).map(Some)
            }
        };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = parse()?,
            b"uid" => self.uid = parse()?,
            b"gid" => self.gid = parse()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = parse()?,
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_size = parse()?,
            b"GNU.sparse.offset" => self.sparse.offset = parse()?,
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take()?;
                self.push(Segment {
                    offset,
                    length: decimal(value)?,
                })?;
            }
            b"GNU.sparse.map" => {
                self.sparse.segments.clear();
                self.sparse.mapped = true;
                let mut numbers = value
                    .split(|byte| *byte == b',')
                    .filter(|part| !part.is_empty());
                while let Some(offset) = numbers.next() {
                    let length = decimal(numbers.next()?)?;
                    self.push(Segment {
                        offset: decimal(offset)?,
                        length,
                    })?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Some(())
    }

    fn push(&mut self, segment: Segment) -> Option<()> {
        self.sparse.mapped = true;
        self.sparse.segments.push(segment);
        (self.sparse.segments.len() <= MAX_SEGMENTS).then_some(())
    }
}

/// Splits the first record off; its length field, blank and newline are dropped.
fn split_record(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let blank = text.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&text[..blank])?).ok()?;
    if length <= blank + 1 || length > text.len() || text[length - 1] != b'\n' {
        return None;
    }
    Some((&text[blank + 1..length - 1], &text[length..]))
}

fn decimal(text: &[u8]) -> Option<u64> {
    if !text.first()?.is_ascii_digit() {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds, possibly negative, possibly with a fraction.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let mut nanos = 0;
    for at in 0..9 {
        nanos = nanos * 10
            + match fraction.as_bytes().get(at) {
                Some(digit @ b'0'..=b'9') => u32::from(digit - b'0'),
                Some(_) => return None,
                None => 0,
            };
    }
    if whole.starts_with('-') && nanos > 0 {
        // -1.25 is a quarter of a second before -1.
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_parse() {
        let mut extensions = Extensions::default();
        extensions
            .parse(b"12 path=a/b\n26 SCHILY.xattr.user.x=\n\x00\n19 mtime=-1.250000\n")
            .unwrap();
        assert_eq!(extensions.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(
            extensions.xattrs,
            BTreeMap::from([(b"user.x".to_vec(), b"\n\0".to_vec())])
        );
        assert_eq!(extensions.mtime, Some((-2, 750_000_000)));
        extensions.parse(b"8 path=\n").unwrap();
        assert_eq!(extensions.path, None);
    }

    #[test]
    fn damaged_records_are_refused() {
        for text in [
            &b"12 path=a/b"[..],
            b"99 path=a\n",
            b"0 a=b\n",
            b"4 =\n",
            b"x",
            b"6 abc\n",
            b"10 size=-\n",
            b"12 size=1x2\n",
            b"26 GNU.sparse.numbytes=10\n",
            b"99999999999999999999 a=b\n",
            b"+5 a=\n",
        ] {
            let result = Extensions::default().parse(text);
            if text == b"4 =\n" {
                // An empty key is harmless.
                assert!(result.is_ok());
            } else {
                assert!(result.is_err(), "{}", String::from_utf8_lossy(text));
            }
        }
    }
}
