//! Container logs in the CRI format: `<RFC 3339 time, nanoseconds> <stdout|stderr> <P|F> <text>`.
//!
//! A line longer than [`MAX_LINE`] is split into `P` (partial) lines and a last `F` (full) one; what stands
//! at the end of a stream without a newline is a `P` line, so that a reader can tell that there was none.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longest text of one log line, in bytes.
pub const MAX_LINE: usize = 16 << 10;

/// One of the two output streams of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

/// Splits a stream into CRI log lines.
#[derive(Debug)]
pub struct LineSplitter {
    stream: Stream,
    /// Text since the last newline that has not been written yet; shorter than or equal to [`MAX_LINE`].
    pending: Vec<u8>,
}

impl LineSplitter {
    /// A splitter at the start of a stream.
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            pending: Vec::new(),
        }
    }

    /// Appends to `out` the log lines that `data` completes; `time` stands in front of each.
    pub fn feed(&mut self, mut data: &[u8], time: &[u8], out: &mut Vec<u8>) {
        while !data.is_empty() {
            let newline = data.iter().position(|b| *b == b'\n');
            let text = &data[..newline.unwrap_or(data.len())];
            let mut rest = text;
            // A line of exactly MAX_LINE bytes is full, so it is split only when one more byte has come.
            while self.pending.len() + rest.len() > MAX_LINE {
                let (head, tail) = rest.split_at(MAX_LINE - self.pending.len());
                self.emit(head, b'P', time, out);
                rest = tail;
            }
            match newline {
                Some(at) => {
                    self.emit(rest, b'F', time, out);
                    data = &data[at + 1..];
                }
                None => {
                    self.pending.extend_from_slice(rest);
                    return;
                }
            }
        }
    }

    /// Appends what stands without a newline at the end of the stream.
    pub fn finish(&mut self, time: &[u8], out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.emit(&[], b'P', time, out);
        }
        self.pending = Vec::new();
    }

    fn emit(&mut self, tail: &[u8], tag: u8, time: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(time);
        out.extend_from_slice(self.stream.name());
        out.extend_from_slice(&[tag, b' ']);
        out.extend_from_slice(&self.pending);
        out.extend_from_slice(tail);
        out.push(b'\n');
        self.pending.clear();
    }
}

/// The log file of a container. Without a path, output is discarded.
#[derive(Debug)]
pub struct LogFile {
    path: Option<PathBuf>,
    file: Option<File>,
}

impl LogFile {
    /// Opens the file for appending, making its directory if it is missing.
    ///
    /// # Errors
    /// What the file system says; a symbolic link in place of the file is refused.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let file = path.map(open).transpose()?;
        Ok(Self {
            path: path.map(Path::to_owned),
            file,
        })
    }

    /// Opens the path anew, after the kubelet has renamed the file. Lines go whole to either the old or the
    /// new file.
    ///
    /// # Errors
    /// What the file system says; the old file then stays in use.
    pub fn reopen(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            self.file = Some(open(path)?);
        }
        Ok(())
    }

    /// Writes a batch of whole lines.
    ///
    /// # Errors
    /// What the file system says (a full disk): the batch may be cut then, the container is not held up.
    pub fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match &mut self.file {
            Some(file) => file.write_all(lines),
            None => Ok(()),
        }
    }

    /// Closes the file; [`LogFile::reopen`] opens it again.
    pub fn close(&mut self) {
        self.file = None;
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW);
    match options.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir)?;
            }
            options.open(path)
        }
        other => other,
    }
}

/// The time in RFC 3339 with nanoseconds, in UTC.
pub fn timestamp(now: std::time::SystemTime) -> String {
    chrono::DateTime::<chrono::Utc>::from(now).to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn split(chunks: &[&[u8]]) -> String {
        let (mut splitter, mut out) = (LineSplitter::new(Stream::Stdout), Vec::new());
        for chunk in chunks {
            splitter.feed(chunk, b"T", &mut out);
        }
        splitter.finish(b"T", &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_full_and_a_missing_newline_shows() {
        assert_eq!(
            split(&[b"a\nb", b"c\n\n"]),
            "T stdout F a\nT stdout F bc\nT stdout F \n"
        );
        assert_eq!(split(&[b"a\nprompt"]), "T stdout F a\nT stdout P prompt\n");
        assert_eq!(split(&[b""]), "");
    }

    #[test]
    fn long_lines_are_split_wherever_the_reads_fall() {
        let long = vec![b'x'; MAX_LINE * 2 + 5];
        let mut text = long.clone();
        text.push(b'\n');
        let x = "x".repeat(MAX_LINE);
        let expected = format!("T stdout P {x}\nT stdout P {x}\nT stdout F xxxxx\n");
        for step in [1, 7, 4096, MAX_LINE, MAX_LINE + 1, text.len()] {
            assert_eq!(
                split(&text.chunks(step).collect::<Vec<_>>()),
                expected,
                "reads of {step}"
            );
        }
        let exact = [&vec![b'x'; MAX_LINE][..], b"\n"].concat();
        assert_eq!(split(&[&exact]), format!("T stdout F {x}\n"));
    }

    #[test]
    fn times_are_rfc_3339() {
        let at = |s, ns| timestamp(UNIX_EPOCH + Duration::new(s, ns));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
    }

    #[test]
    fn a_reopened_log_gets_the_new_lines() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (
            dir.path().join("pod/0.log"),
            dir.path().join("pod/0.log.old"),
        );
        let mut log = LogFile::open(Some(&path)).unwrap();
        log.write(b"one\n").unwrap();
        std::fs::rename(&path, &old).unwrap();
        log.write(b"two\n").unwrap();
        log.reopen().unwrap();
        log.write(b"three\n").unwrap();
        assert_eq!(std::fs::read(&old).unwrap(), b"one\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
    }
}
