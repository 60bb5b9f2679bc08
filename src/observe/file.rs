//! Reading the kernel's small files with as few system calls as there can be.

use std::path::Path;

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

/// The lines `key value` of a file, such as memory.stat.
pub fn keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key, value.trim().parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_limits_and_tables() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("n", "42\n");
        put("max", "max\n");
        put("bad", "many\n");
        put("table", "a 1\nb 2\nodd\nc x\n");
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
        assert_eq!(table, [("a", 1), ("b", 2)]);
        assert_eq!(reader.text("long").unwrap().len(), ROOM);
    }
}
