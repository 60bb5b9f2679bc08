//! Reading the kernel's small files with as few system calls as there can be.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{Mode, OFlags};

/// Enough for every file that is read here in one go: memory.stat has less than 4 KiB.
const ROOM: usize = 16 << 10;

/// A buffer for paths and one for content, used again for every file.
pub struct Reader {
    path: Vec<u8>,
    directory: usize,
    content: Vec<u8>,
}

impl Reader {
    /// A reader of files in no directory yet.
    pub fn new() -> Self {
        Self {
            path: Vec::with_capacity(512),
            directory: 0,
            content: vec![0; ROOM],
        }
    }

    /// The files that follow are in this directory.
    pub fn enter(&mut self, dir: &Path) -> &mut Self {
        use std::os::unix::ffi::OsStrExt as _;
        self.path.clear();
        self.path.extend_from_slice(dir.as_os_str().as_bytes());
        self.path.push(b'/');
        self.directory = self.path.len();
        self
    }

    /// The text of a file; `None` when there is none, or it can't be read.
    pub fn text(&mut self, name: &str) -> Option<&str> {
        self.path.truncate(self.directory);
        self.path.extend_from_slice(name.as_bytes());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.path.as_slice(), flags, Mode::empty()).ok()?;
        let mut length = 0;
        // The files of cgroups come whole with the first read; those of /proc may come in pieces.
        while length < self.content.len() {
            match rustix::io::read(&file, &mut self.content[length..]) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return None,
            }
            if self.content[length - 1] == b'\n' && length < 4096 {
                break;
            }
        }
        std::str::from_utf8(&self.content[..length]).ok()
    }

    /// The number that a file holds; `None` also for `max` and what is no number.
    pub fn number(&mut self, name: &str) -> Option<u64> {
        self.text(name)?.trim().parse().ok()
    }

    /// A limit: the inner `None` is `max`.
    pub fn limit(&mut self, name: &str) -> Option<Option<u64>> {
        let text = self.text(name)?.trim();
        match text {
            "max" => Some(None),
            number => number.parse().ok().map(Some),
        }
    }
}

/// A file that stays open between reads, as long as descriptors are not scarce.
#[derive(Debug, Default)]
pub struct Kept(Option<OwnedFd>);

/// How many files stay open in all of this process.
static OPEN: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CONTENT: RefCell<Vec<u8>> = RefCell::new(vec![0; ROOM]);
}

impl Kept {
    /// Reads the file, which is opened when it is not; `None` when it is gone. `dir` is asked only then.
    pub fn with<T>(
        &mut self,
        dir: impl FnOnce() -> Option<PathBuf>,
        name: &str,
        read: impl FnOnce(&str) -> T,
    ) -> Option<T> {
        CONTENT.with_borrow_mut(|content| {
            let length = self.fill(dir, name, content)?;
            std::str::from_utf8(&content[..length]).ok().map(read)
        })
    }

    fn fill(
        &mut self,
        dir: impl FnOnce() -> Option<PathBuf>,
        name: &str,
        content: &mut [u8],
    ) -> Option<usize> {
        if let Some(fd) = &self.0 {
            // Such a file comes whole with the first read, and anew with each read at its beginning.
            match rustix::io::pread(fd, &mut *content, 0) {
                Ok(length) => return Some(length),
                // The cgroup is gone; another of the same name is another cgroup.
                Err(_) => self.close(),
            }
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir()?.join(name), flags, Mode::empty()).ok()?;
        let length = rustix::io::pread(&fd, content, 0).ok()?;
        if OPEN.fetch_add(1, Ordering::Relaxed) < most_open() {
            self.0 = Some(fd);
        } else {
            OPEN.fetch_sub(1, Ordering::Relaxed);
        }
        Some(length)
    }

    fn close(&mut self) {
        if self.0.take().is_some() {
            OPEN.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.close();
    }
}

/// Half of the descriptors that this process may have: the rest is for those that can't do without.
fn most_open() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit
            .current
            .map_or(usize::MAX, |n| usize::try_from(n / 2).unwrap_or(usize::MAX))
    })
}

/// The lines `key value` of a file, such as memory.stat; lines of another form are passed over.
pub fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    Keyed { rest: text }
}

/// One pass over the bytes: there are tens of lines in each of hundreds of files.
struct Keyed<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Keyed<'a> {
    type Item = (&'a str, u64);

    fn next(&mut self) -> Option<Self::Item> {
        while !self.rest.is_empty() {
            let (text, bytes) = (self.rest, self.rest.as_bytes());
            let to = |from: usize, end: fn(&u8) -> bool| {
                let found = bytes[from..].iter().position(end);
                found.map_or(bytes.len(), |n| from + n)
            };
            let key = to(0, |b| matches!(b, b' ' | b'\n'));
            let line = to(key, |b| *b == b'\n');
            self.rest = text.get(line + 1..).unwrap_or_default();
            let number = bytes.get(key + 1..line).and_then(number);
            if let Some(number) = number {
                return Some((&text[..key], number));
            }
        }
        None
    }
}

/// A decimal number of digits only.
fn number(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, byte: &u8| {
        let digit = byte.wrapping_sub(b'0');
        let sum = sum.checked_mul(10)?.checked_add(digit.into())?;
        (digit < 10).then_some(sum)
    };
    (!digits.is_empty())
        .then(|| digits.iter().try_fold(0, add))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_is_read_anew_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        let mut kept = Kept::default();
        let mut read = || kept.with(|| Some(dir.path().to_owned()), "n", str::to_owned);
        assert_eq!(read(), None);
        std::fs::write(&path, "1\n").unwrap();
        assert_eq!(read().as_deref(), Some("1\n"));
        std::fs::write(&path, "22\n").unwrap();
        assert_eq!(read().as_deref(), Some("22\n"));
        assert!(OPEN.load(Ordering::Relaxed) >= 1);
    }

    #[test]
    fn numbers_limits_and_tables() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("n", "42\n");
        put("max", "max\n");
        put("bad", "many\n");
        put(
            "table",
            "a 1\nodd\n\nb 2\nc x\nd \ne 18446744073709551616\nf -1\ng 18446744073709551615",
        );
        put("long", &"x 1\n".repeat(8000));
        let mut reader = Reader::new();
        reader.enter(dir.path());
        assert_eq!(reader.number("n"), Some(42));
        assert_eq!(reader.limit("n"), Some(Some(42)));
        assert_eq!(reader.limit("max"), Some(None));
        assert_eq!(reader.number("max"), None);
        assert_eq!(reader.number("bad"), None);
        assert_eq!(reader.number("absent"), None);
        let table: Vec<_> = keyed(reader.text("table").unwrap()).collect();
        assert_eq!(table, [("a", 1), ("b", 2), ("g", u64::MAX)]);
        assert_eq!(reader.text("long").unwrap().len(), ROOM);
    }
}
