//! The CRI log format: `<RFC 3339 time> <stdout|stderr> <tags> <content>\n`.
//!
//! Tags are separated by colons; the first says whether the line is whole (`F`) or goes on in the next
//! entry (`P`). Content is bytes: containers write what they like.

/// The stream that a log entry was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One entry of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLine<'a> {
    /// When, in RFC 3339 with nanoseconds.
    pub timestamp: &'a str,
    /// Where the container wrote it.
    pub stream: Stream,
    /// Whether the line goes on in this stream's next entry.
    pub partial: bool,
    /// What the container wrote, without the line's end.
    pub content: &'a [u8],
}

/// An entry that isn't in the CRI's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogLineError {
    /// Fewer than three fields.
    #[error("a log entry lacks its {0}")]
    Missing(&'static str),
    /// A stream that the format doesn't know.
    #[error("a log entry is of an unknown stream")]
    Stream,
    /// Neither P nor F.
    #[error("a log entry is neither partial (P) nor full (F)")]
    Tag,
}

/// Reads one entry, without its newline.
///
/// # Errors
/// [`LogLineError`] when the entry isn't in the format.
pub fn parse(entry: &[u8]) -> Result<LogLine<'_>, LogLineError> {
    let (timestamp, rest) = field(entry).ok_or(LogLineError::Missing("time"))?;
    let timestamp = std::str::from_utf8(timestamp)
        .ok()
        .filter(|t| !t.is_empty())
        .ok_or(LogLineError::Missing("time"))?;
    let (stream, rest) = field(rest).ok_or(LogLineError::Missing("stream"))?;
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return Err(LogLineError::Stream),
    };
    // An empty line may come without the blank behind its tag.
    let (tags, content) = field(rest).unwrap_or((rest, b""));
    let partial = match tags.split(|&b| b == b':').next() {
        Some(b"P") => true,
        Some(b"F") => false,
        _ => return Err(LogLineError::Tag),
    };
    Ok(LogLine {
        timestamp,
        stream,
        partial,
        content,
    })
}

fn field(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let blank = text.iter().position(|&b| b == b' ')?;
    Some((&text[..blank], &text[blank + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIME: &str = "2016-10-06T00:17:09.669794202Z";

    #[test]
    fn entries_of_the_format() {
        let line = parse(b"2016-10-06T00:17:09.669794202Z stdout P log content 1").unwrap();
        assert_eq!(
            line,
            LogLine {
                timestamp: TIME,
                stream: Stream::Stdout,
                partial: true,
                content: b"log content 1"
            }
        );
        let line =
            parse(b"2016-10-06T00:17:09.669794202Z stderr F:tag:other  two blanks ").unwrap();
        assert_eq!((line.partial, line.content), (false, &b" two blanks "[..]));
        assert_eq!(
            parse(format!("{TIME} stdout F").as_bytes())
                .unwrap()
                .content,
            b""
        );
        assert_eq!(
            parse(format!("{TIME} stdout F ").as_bytes())
                .unwrap()
                .content,
            b""
        );
    }

    #[test]
    fn other_entries() {
        for (entry, error) in [
            ("", LogLineError::Missing("time")),
            ("one", LogLineError::Missing("time")),
            (" stdout F x", LogLineError::Missing("time")),
            ("t stdout", LogLineError::Missing("stream")),
            ("t stdin F x", LogLineError::Stream),
            ("t stdout X x", LogLineError::Tag),
            ("t stdout  x", LogLineError::Tag),
        ] {
            assert_eq!(parse(entry.as_bytes()), Err(error), "{entry:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(entry in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&entry);
        }

        #[test]
        fn what_is_written_is_read(
            content in prop::collection::vec(any::<u8>(), 0..64),
            partial: bool,
            error: bool,
        ) {
            let mut entry = TIME.as_bytes().to_vec();
            entry.extend(if error { &b" stderr "[..] } else { b" stdout " });
            entry.extend(if partial { &b"P "[..] } else { b"F " });
            entry.extend(&content);
            let line = parse(&entry).unwrap();
            prop_assert_eq!(line.timestamp, TIME);
            prop_assert_eq!(line.stream == Stream::Stderr, error);
            prop_assert_eq!(line.partial, partial);
            prop_assert_eq!(line.content, &content[..]);
        }
    }
}
