//! A container's log file: read to its end, and followed through writes and rotation.
//!
//! Following waits for inotify events; nothing is polled. The directory is watched beside the file,
//! because rotation renames the file and makes another of the same name.
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use crate::error::ClientError;
use crate::log_line::{self, LogLine, Stream};

/// Bytes read at once.
const CHUNK: usize = 64 * 1024;
/// An entry longer than this isn't CRI's (they are split at 16 KiB): it is passed through in pieces.
const MAX_ENTRY: usize = 1 << 20;

/// Takes the entries of a log.
pub trait Sink {
    /// One entry. An error ends the reading.
    ///
    /// # Errors
    /// Whatever keeps the sink from taking more.
    fn line(&mut self, line: LogLine<'_>) -> io::Result<()>;
    /// Called when there is nothing more to read for now.
    ///
    /// # Errors
    /// As above.
    fn flush(&mut self) -> io::Result<()>;
}

/// Writes a log to standard output and standard error as the container wrote it.
#[derive(Debug)]
pub struct Console<O, E> {
    out: O,
    err: E,
    timestamps: bool,
    /// Whether the streams' last entry was partial, so that a timestamp would stand inside a line.
    open: [bool; 2],
}

impl Console<io::BufWriter<io::Stdout>, io::BufWriter<io::Stderr>> {
    /// The process's own output; `timestamps` puts each line's time before it.
    pub fn new(timestamps: bool) -> Self {
        Console::with(
            io::BufWriter::with_capacity(CHUNK, io::stdout()),
            io::BufWriter::with_capacity(CHUNK, io::stderr()),
            timestamps,
        )
    }
}

impl<O: Write, E: Write> Console<O, E> {
    /// Any two writers.
    pub fn with(out: O, err: E, timestamps: bool) -> Self {
        Console {
            out,
            err,
            timestamps,
            open: [false; 2],
        }
    }

    fn emit(to: &mut dyn Write, line: LogLine<'_>, time: bool) -> io::Result<()> {
        if time {
            to.write_all(line.timestamp.as_bytes())?;
            to.write_all(b" ")?;
        }
        to.write_all(line.content)?;
        if line.partial {
            Ok(())
        } else {
            to.write_all(b"\n")
        }
    }
}

impl<O: Write, E: Write> Sink for Console<O, E> {
    fn line(&mut self, line: LogLine<'_>) -> io::Result<()> {
        let index = usize::from(line.stream == Stream::Stderr);
        let time = self.timestamps && !self.open[index];
        self.open[index] = line.partial;
        match line.stream {
            // Keeps the two in the order of the log when both go to one terminal.
            Stream::Stdout => Self::emit(&mut self.out, line, time),
            Stream::Stderr => {
                self.out.flush()?;
                Self::emit(&mut self.err, line, time)?;
                self.err.flush()
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()?;
        self.err.flush()
    }
}

/// A log file being read.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of an entry whose end has not been written yet.
    rest: Vec<u8>,
}

impl LogFile {
    /// A log by its path; the file need not exist yet.
    pub fn new(path: &Path) -> LogFile {
        LogFile {
            path: path.to_owned(),
            file: None,
            rest: Vec::new(),
        }
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> ClientError + use<> {
        let path = self.path.clone();
        move |source| ClientError::File {
            what,
            path: path.clone(),
            source,
        }
    }

    /// Opens the file; false when there is none yet.
    ///
    /// # Errors
    /// [`ClientError::File`] for any other failure.
    pub fn open(&mut self) -> Result<bool, ClientError> {
        match File::open(&self.path) {
            Ok(file) => self.file = Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(self.failed("cannot open the log")(e)),
        }
        Ok(self.file.is_some())
    }

    /// Moves to the last `lines` whole lines of the file (partial entries count with their end).
    ///
    /// # Errors
    /// [`ClientError::File`] when the file can't be read.
    pub fn seek_tail(&mut self, lines: u64) -> Result<(), ClientError> {
        let failed = self.failed("cannot read the log");
        let Some(file) = self.file.as_mut() else {
            return Ok(());
        };
        let start = tail_start(file, lines).map_err(&failed)?;
        file.seek(SeekFrom::Start(start)).map_err(&failed)?;
        Ok(())
    }

    /// Hands all that can be read now to the sink; follows a rotation that has happened.
    ///
    /// # Errors
    /// [`ClientError::File`] when the file can't be read, [`ClientError::Output`] from the sink.
    pub fn drain(&mut self, sink: &mut dyn Sink) -> Result<(), ClientError> {
        loop {
            if self.file.is_none() && !self.open()? {
                return sink.flush().map_err(ClientError::Output);
            }
            // Looked at first: what was rotated away has no more writers once its successor exists,
            // so that reading the old file after this misses nothing.
            let rotated = self.rotated();
            self.drain_open_file(sink)?;
            if !rotated {
                return sink.flush().map_err(ClientError::Output);
            }
            self.file = None;
        }
    }

    fn rotated(&self) -> bool {
        let inode = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let open = self
            .file
            .as_ref()
            .and_then(|f| f.metadata().ok())
            .map(inode);
        let named = std::fs::metadata(&self.path).ok().map(inode);
        named.is_some() && open != named
    }

    fn drain_open_file(&mut self, sink: &mut dyn Sink) -> Result<(), ClientError> {
        let failed = self.failed("cannot read the log");
        let Some(file) = self.file.as_mut() else {
            return Ok(());
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = match file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(failed(e)),
            };
            self.rest.extend_from_slice(&chunk[..n]);
            let mut start = 0;
            while let Some(end) = self.rest[start..].iter().position(|&b| b == b'\n') {
                take(&self.rest[start..start + end], sink).map_err(ClientError::Output)?;
                start += end + 1;
            }
            self.rest.drain(..start);
            if self.rest.len() > MAX_ENTRY {
                take(&self.rest, sink).map_err(ClientError::Output)?;
                self.rest.clear();
            }
        }
    }

    /// The log's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// An entry that isn't in the format is shown as it stands, as a whole line of standard output.
fn take(entry: &[u8], sink: &mut dyn Sink) -> io::Result<()> {
    match log_line::parse(entry) {
        Ok(line) => sink.line(line),
        Err(_) => sink.line(LogLine {
            timestamp: "-",
            stream: Stream::Stdout,
            partial: false,
            content: entry,
        }),
    }
}

/// Where the last `lines` lines begin, read backwards in chunks.
fn tail_start(file: &mut File, lines: u64) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(length);
    }
    let mut chunk = vec![0; CHUNK];
    let mut position = length;
    // Entries seen so far from the end, oldest last: (offset behind it, bytes after the last newline).
    let mut head: Vec<u8> = Vec::new();
    let mut start = length;
    let mut full = 0;
    let counts = |entry: &[u8]| !log_line::parse(entry).is_ok_and(|line| line.partial);
    while position > 0 {
        let size = position.min(CHUNK as u64);
        position -= size;
        file.seek(SeekFrom::Start(position))?;
        let piece = &mut chunk[..size as usize];
        file.read_exact(piece)?;
        let mut text = piece.to_vec();
        text.append(&mut head);
        // Walk the entries of `text` from its end; the first one may lack its beginning.
        let mut end = text.len();
        while let Some(newline) = text[..end].iter().rposition(|&b| b == b'\n') {
            let entry = &text[newline + 1..end];
            if !entry.is_empty() {
                if counts(entry) {
                    full += 1;
                    if full > lines {
                        return Ok(start);
                    }
                }
                start = position + newline as u64 + 1;
            }
            end = newline;
        }
        text.truncate(end);
        head = text;
    }
    // `head` is now the file's first entry.
    if !head.is_empty() && counts(&head) && full + 1 > lines {
        return Ok(start);
    }
    Ok(0)
}

/// Tells when a log has changed.
#[derive(Debug)]
pub struct Watch {
    events: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches the directory that holds the log.
    ///
    /// # Errors
    /// [`ClientError::File`] when it can't be watched.
    pub fn new(log: &Path) -> Result<Watch, ClientError> {
        let directory = log.parent().unwrap_or(Path::new("/"));
        let failed = |e: io::Error| ClientError::File {
            what: "cannot watch the log's directory",
            path: directory.to_owned(),
            source: e,
        };
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let fd = inotify::init(flags).map_err(|e| failed(e.into()))?;
        let what = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&fd, directory, what).map_err(|e| failed(e.into()))?;
        #[allow(
            deprecated,
            reason = "unsound only for types whose descriptor changes; OwnedFd's can't"
        )]
        let events = AsyncFd::new(fd).map_err(failed)?;
        Ok(Watch { events })
    }

    /// Waits until something in the directory has changed since the last call.
    ///
    /// # Errors
    /// [`ClientError::System`] when the events can't be read.
    pub async fn changed(&self) -> Result<(), ClientError> {
        let failed = |source| ClientError::System {
            what: "cannot read inotify events",
            source,
        };
        loop {
            let mut ready = self.events.readable().await.map_err(failed)?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
            let mut seen = false;
            loop {
                match reader.next() {
                    Ok(_) => seen = true,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(failed(e.into())),
                }
            }
            ready.clear_ready();
            if seen {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;

    fn entry(stream: &str, tag: &str, text: &str) -> String {
        format!("2016-10-06T00:17:09.669794202Z {stream} {tag} {text}\n")
    }

    fn shown(log: &mut LogFile) -> (String, String) {
        let mut console = Console::with(Vec::new(), Vec::new(), false);
        log.drain(&mut console).unwrap();
        (
            String::from_utf8(console.out).unwrap(),
            String::from_utf8(console.err).unwrap(),
        )
    }

    #[test]
    fn partial_entries_are_joined_and_streams_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text = entry("stdout", "P", "one ")
            + &entry("stderr", "F", "error")
            + &entry("stdout", "F", "line")
            + "rubbish\n"
            + &entry("stdout", "P", "no newline");
        fs::write(&path, text).unwrap();
        let (out, err) = shown(&mut LogFile::new(&path));
        assert_eq!(out, "one line\nrubbish\nno newline");
        assert_eq!(err, "error\n");
    }

    #[test]
    fn timestamps_stand_before_lines_only() {
        let mut console = Console::with(Vec::new(), Vec::new(), true);
        for (partial, content) in [(true, "a"), (false, "b"), (false, "c")] {
            let content = content.as_bytes();
            let line = LogLine {
                timestamp: "T",
                stream: Stream::Stdout,
                partial,
                content,
            };
            console.line(line).unwrap();
        }
        assert_eq!(console.out, b"T ab\nT c\n");
    }

    #[test]
    fn an_entry_written_in_two_parts_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = LogFile::new(&path);
        assert_eq!(shown(&mut log).0, "");
        let text = entry("stdout", "F", "whole");
        fs::write(&path, &text[..40]).unwrap();
        assert_eq!(shown(&mut log).0, "");
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&text.as_bytes()[40..]).unwrap();
        assert_eq!(shown(&mut log).0, "whole\n");
    }

    #[test]
    fn a_rotation_loses_and_doubles_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(&path, entry("stdout", "F", "one")).unwrap();
        let mut log = LogFile::new(&path);
        assert_eq!(shown(&mut log).0, "one\n");
        let mut old = fs::OpenOptions::new().append(true).open(&path).unwrap();
        fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        old.write_all(entry("stdout", "F", "two").as_bytes())
            .unwrap();
        fs::write(&path, entry("stdout", "F", "three")).unwrap();
        assert_eq!(shown(&mut log).0, "two\nthree\n");
        assert_eq!(shown(&mut log).0, "");
    }

    #[test]
    fn tails() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let long = "x".repeat(CHUNK);
        let mut text = String::new();
        for i in 0..10 {
            text += &entry("stdout", "P", &format!("{i}-"));
            text += &entry("stdout", "F", if i == 7 { &long } else { "end" });
        }
        fs::write(&path, &text).unwrap();
        let tail = |n| {
            let mut log = LogFile::new(&path);
            log.open().unwrap();
            log.seek_tail(n).unwrap();
            shown(&mut log).0
        };
        assert_eq!(tail(0), "");
        assert_eq!(tail(1), "9-end\n");
        assert_eq!(tail(2), "8-end\n9-end\n");
        assert_eq!(tail(3), format!("7-{long}\n8-end\n9-end\n"));
        assert_eq!(tail(9).lines().count(), 9);
        for n in [10, 11, 1000] {
            assert_eq!(tail(n).lines().count(), 10, "{n}");
        }
    }

    #[tokio::test]
    async fn a_write_wakes_the_watch() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let watch = Watch::new(&path).unwrap();
        let limit = Duration::from_secs(10);
        fs::write(&path, "x").unwrap();
        tokio::time::timeout(limit, watch.changed())
            .await
            .unwrap()
            .unwrap();
    }
}
