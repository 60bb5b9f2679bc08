//! Logs in the CRI's form: `TIME STREAM TAG CONTENT`.

use std::path::Path;

use super::{Context, Result, ensure};

/// One line of a log file.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// RFC 3339 with nanoseconds.
    pub time: chrono::DateTime<chrono::FixedOffset>,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The line goes on in the next entry of its stream.
    pub partial: bool,
    /// What was written.
    pub content: Vec<u8>,
}

/// Reads a log file; a line that is not in the form is an error. None when there is no file yet.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
    };
    // A batch may be half written when we look: what has no end is not a line yet.
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1);
    bytes[..whole]
        .split_inclusive(|b| *b == b'\n')
        .map(line)
        .collect()
}

fn line(bytes: &[u8]) -> Result<Line> {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
    let bytes = bytes.strip_suffix(b"\n").context("no newline")?;
    let mut parts = bytes.splitn(4, |b| *b == b' ');
    let mut part = || {
        parts
            .next()
            .with_context(|| format!("not in the CRI's form: {shown:?}"))
    };
    let time = std::str::from_utf8(part()?)?;
    let stream = std::str::from_utf8(part()?)?.to_owned();
    let tag = std::str::from_utf8(part()?)?;
    let content = part()?.to_vec();
    ensure!(
        stream == "stdout" || stream == "stderr",
        "no stream: {shown:?}"
    );
    ensure!(tag == "P" || tag == "F", "no tag: {shown:?}");
    // RFC3339Nano: a fraction of at most nine digits, if any.
    let fraction = time.split_once('.').map_or(0, |(_, f)| {
        f.chars().take_while(char::is_ascii_digit).count()
    });
    ensure!(fraction <= 9, "{time} has {fraction} digits of a second");
    let time = chrono::DateTime::parse_from_rfc3339(time)
        .with_context(|| format!("not a time: {shown:?}"))?;
    Ok(Line {
        time,
        stream,
        partial: tag == "P",
        content,
    })
}

/// What was written to a stream.
pub fn bytes(lines: &[Line], stream: &str) -> Vec<u8> {
    let mut text = Vec::new();
    for line in lines.iter().filter(|l| l.stream == stream) {
        text.extend_from_slice(&line.content);
        if !line.partial {
            text.push(b'\n');
        }
    }
    text
}

/// Likewise, as text.
pub fn text(lines: &[Line], stream: &str) -> String {
    String::from_utf8_lossy(&bytes(lines, stream)).into_owned()
}
