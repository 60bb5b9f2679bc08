//! Terminal sizes, as clients send them: JSON objects one after the other.

use crate::TerminalSize;
use serde_json::Deserializer;
use serde_json::error::Category;

/// The longest object that is waited for.
const MAX_OBJECT: usize = 4096;

/// Takes sizes out of a stream of bytes.
#[derive(Default)]
pub struct ResizeDecoder {
    buffer: Vec<u8>,
    broken: bool,
}

impl ResizeDecoder {
    /// Adds bytes, and gives the last size that is complete with them: those before it are out of
    /// date. After something that isn't a size there are no more.
    pub fn push(&mut self, bytes: &[u8]) -> Option<TerminalSize> {
        if self.broken {
            return None;
        }
        let mut last = None;
        for part in bytes.chunks(MAX_OBJECT) {
            self.buffer.extend_from_slice(part);
            let mut sizes = Deserializer::from_slice(&self.buffer).into_iter::<TerminalSize>();
            loop {
                match sizes.next() {
                    Some(Ok(size)) => last = Some(size),
                    None => break,
                    Some(Err(error)) => {
                        self.broken = error.classify() != Category::Eof;
                        break;
                    }
                }
            }
            let used = sizes.byte_offset();
            self.buffer.drain(..used);
            if self.broken || self.buffer.len() > MAX_OBJECT {
                self.broken = true;
                self.buffer = Vec::new();
                break;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: u16, height: u16) -> Option<TerminalSize> {
        Some(TerminalSize { width, height })
    }

    #[test]
    fn sizes_come_in_any_pieces() {
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(br#"{"Width":80,"#), None);
        assert_eq!(decoder.push(b"\"Height\":24}\n"), size(80, 24));
        let storm = br#"{"Width":1,"Height":2}{"Width":3,"Height":4} {"Wid"#;
        assert_eq!(decoder.push(storm), size(3, 4));
        assert_eq!(decoder.push(br#"th":5,"Height":6}"#), size(5, 6));
        assert_eq!(decoder.push(b""), None);
    }

    #[test]
    fn what_is_no_size_ends_it() {
        for bad in ["nonsense", r#"{"Width":-1}"#, r#"{"Width":70000}"#, "7"] {
            let mut decoder = ResizeDecoder::default();
            let both = format!(r#"{{"Width":80,"Height":24}}{bad}"#);
            assert_eq!(decoder.push(both.as_bytes()), size(80, 24), "{bad}");
            decoder.push(b" ");
            assert_eq!(decoder.push(br#"{"Width":1,"Height":1}"#), None, "{bad}");
        }
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(&[b'['; 100_000]), None);
        let mut decoder = ResizeDecoder::default();
        assert_eq!(decoder.push(&vec![b' '; 100_000]), None);
        assert_eq!(decoder.push(br#"{"Width":1,"Height":1}"#), size(1, 1));
        assert!(decoder.buffer.len() <= MAX_OBJECT);
    }
}
