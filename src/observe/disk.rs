//! How much a container has written.
//!
//! A writable layer is a directory tree that only a walk can measure, and its container makes it as large, as
//! deep and as wide as it likes. So a walk never happens in a call: [`Ledger`] has one thread that walks one
//! layer after the other, rests in between, and ends when nothing is left to do. Calls get what was
//! counted last.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

/// A count is good for so long, and for longer when counting takes long.
const FRESH: Duration = Duration::from_secs(10);
/// A layer is walked for at most 1/50 of the time.
const REST: u32 = 50;
/// Between two walks the thread rests, so that all layers together take at most a fifth of one CPU.
const BREAK: u32 = 4;
/// Directories that are open at once during a walk.
const OPEN: usize = 64;
/// Subtrees deeper than [`OPEN`] that are remembered for later; more is not counted.
const LATER: usize = 4096;
/// Files with several names that are remembered, so as to count them once.
const LINKED: usize = 1 << 18;

/// What a tree takes up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Bytes of allocated blocks.
    pub bytes: u64,
    /// Inodes, the tree's root included.
    pub inodes: u64,
}

/// A [`DiskUsage`] and when it was counted, in nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// What was counted.
    pub usage: DiskUsage,
    /// When.
    pub at: i64,
}

/// The last counts of writable layers.
#[derive(Default)]
pub struct Ledger {
    book: Mutex<Book>,
    counted: Condvar,
}

#[derive(Default)]
struct Book {
    entries: HashMap<String, Entry>,
    queue: VecDeque<(String, PathBuf)>,
    walking: bool,
}

#[derive(Default)]
struct Entry {
    counted: Option<Counted>,
    due: Option<Instant>,
    queued: bool,
    /// The container had ended when it was queued: the next count is the last.
    ended: bool,
    settled: bool,
}

impl Ledger {
    /// The last counts of these layers (id, directory, whether its container has ended), in their order.
    /// Those that are old are counted again, later. Waits at most `patience` for those that were never
    /// counted; `None` for what still was not.
    pub fn usage(
        self: &Arc<Self>,
        layers: &[(String, PathBuf, bool)],
        patience: Duration,
    ) -> Vec<Option<Counted>> {
        let until = Instant::now() + patience;
        let mut book = self.book.lock();
        for (id, dir, ended) in layers {
            book.request(id, dir, *ended);
        }
        if !book.queue.is_empty() && !book.walking {
            let ledger = self.clone();
            let thread = std::thread::Builder::new()
                .name("layers".to_owned())
                .spawn(move || ledger.walk_all());
            book.walking = thread.is_ok();
        }
        let waiting = |book: &Book| {
            let first = |id| {
                book.entries
                    .get(id)
                    .is_some_and(|e| e.queued && e.counted.is_none())
            };
            layers.iter().any(|(id, ..)| first(id))
        };
        while book.walking && waiting(&book) {
            if self.counted.wait_until(&mut book, until).timed_out() {
                break;
            }
        }
        let last = |id| book.entries.get(id).and_then(|e: &Entry| e.counted);
        layers.iter().map(|(id, ..)| last(id)).collect()
    }

    /// The layer is gone.
    pub fn forget(&self, id: &str) {
        self.book.lock().entries.remove(id);
    }

    fn walk_all(&self) {
        loop {
            let (id, dir) = {
                let mut book = self.book.lock();
                match book.queue.pop_front() {
                    Some(next) => next,
                    None => {
                        book.walking = false;
                        return;
                    }
                }
            };
            let begin = Instant::now();
            let at = crate::now();
            let usage = measure(&dir);
            let took = begin.elapsed();
            let mut book = self.book.lock();
            // It may have been forgotten in the meantime.
            if let Some(entry) = book.entries.get_mut(&id) {
                entry.queued = false;
                if let Ok(usage) = usage {
                    entry.counted = Some(Counted { usage, at });
                }
                entry.due = Some(Instant::now() + FRESH.max(took * REST));
                entry.settled = entry.ended;
            }
            let urgent = book
                .queue
                .iter()
                .any(|(id, _)| book.entries.get(id).is_some_and(|e| e.counted.is_none()));
            drop(book);
            self.counted.notify_all();
            if !urgent && took > Duration::from_millis(1) {
                std::thread::sleep((took * BREAK).min(Duration::from_secs(10)));
            }
        }
    }
}

impl Book {
    fn request(&mut self, id: &str, dir: &Path, ended: bool) {
        let entry = self.entries.entry(id.to_owned()).or_default();
        let old = entry.due.is_none_or(|due| Instant::now() >= due);
        // After its end nobody writes to it: one more count, whatever the age of the last.
        let last = ended && !entry.ended;
        if entry.queued || entry.settled || !(old || last) {
            return;
        }
        entry.queued = true;
        entry.ended = ended;
        self.queue.push_back((id.to_owned(), dir.to_owned()));
    }
}

/// Counts a tree. Follows no symbolic link, leaves the tree nowhere, holds at most [`OPEN`] descriptors and
/// bounded memory whatever the tree looks like.
///
/// # Errors
/// When the tree's root can't be opened. What disappears below it is not counted, as is what can't be read.
pub fn measure(root: &Path) -> io::Result<DiskUsage> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |at: &OwnedFd, name: &CStr| rustix::fs::openat(at, name, flags, Mode::empty());
    let top = rustix::fs::open(root, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&top)?;
    let mut count = Count {
        device: stat.st_dev,
        ..Count::default()
    };
    count.add(&stat);
    // Each is a chain of names from the root to a directory that has not been read.
    let mut later: Vec<Vec<CString>> = vec![Vec::new()];
    while let Some(mut chain) = later.pop() {
        let begin = chain
            .iter()
            .try_fold(top.try_clone()?, |at, name| open(&at, name));
        let Ok(dir) = begin.and_then(Level::new) else {
            continue;
        };
        let depth = chain.len();
        let mut levels = vec![dir];
        loop {
            let full = levels.len() >= OPEN;
            let Some(level) = levels.last_mut() else {
                break;
            };
            let Some(Ok(entry)) = level.entries.read() else {
                levels.pop();
                if chain.len() > depth {
                    chain.pop();
                }
                continue;
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&level.fd, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            if !count.add(&stat) || FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                continue;
            }
            if full {
                if later.len() < LATER {
                    let mut path = chain.clone();
                    path.push(name.to_owned());
                    later.push(path);
                }
                continue;
            }
            let name = name.to_owned();
            if let Ok(next) = open(&level.fd, &name).and_then(Level::new) {
                chain.push(name);
                levels.push(next);
            }
        }
    }
    Ok(count.usage)
}

/// A directory that is being read.
struct Level {
    fd: OwnedFd,
    entries: Dir,
}

impl Level {
    fn new(fd: OwnedFd) -> rustix::io::Result<Self> {
        let entries = Dir::read_from(&fd)?;
        Ok(Self { fd, entries })
    }
}

#[derive(Default)]
struct Count {
    device: u64,
    usage: DiskUsage,
    linked: HashSet<u64>,
}

impl Count {
    /// Counts an inode, unless it is another file system's or was counted under another name.
    fn add(&mut self, stat: &rustix::fs::Stat) -> bool {
        if stat.st_dev != self.device {
            return false;
        }
        let several =
            stat.st_nlink > 1 && FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
        if several {
            if self.linked.contains(&stat.st_ino) {
                return false;
            }
            if self.linked.len() < LINKED {
                self.linked.insert(stat.st_ino);
            }
        }
        self.usage.inodes += 1;
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        self.usage.bytes = self.usage.bytes.saturating_add(blocks.saturating_mul(512));
        true
    }
}

/// The file system that a path is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// Bytes in all.
    pub bytes: u64,
    /// Inodes in all.
    pub inodes: u64,
    /// Free inodes.
    pub free_inodes: u64,
}

/// Asks a file system about its size.
///
/// # Errors
/// What statvfs(2) says.
pub fn file_system(path: &Path) -> io::Result<FileSystem> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(FileSystem {
        bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        inodes: stat.f_files,
        free_inodes: stat.f_favail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_once_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let empty = measure(root).unwrap();
        assert_eq!(empty.inodes, 1);
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("a/file"), vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(root.join("a/file"), root.join("a/b/again")).unwrap();
        std::os::unix::fs::symlink("/usr", root.join("usr")).unwrap();
        std::os::unix::fs::symlink(".", root.join("a/loop")).unwrap();
        let full = measure(root).unwrap();
        assert_eq!(full.inodes, 6, "root, a, b, file, two links");
        assert!(full.bytes >= 1 << 20 && full.bytes < 2 << 20, "{full:?}");
        assert!(measure(&root.join("absent")).is_err());
        assert!(measure(&root.join("usr")).is_err(), "a link is no tree");
    }

    #[test]
    fn a_tree_deeper_than_descriptors_and_paths_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut at: OwnedFd = std::fs::File::open(dir.path()).unwrap().into();
        let deep = 3 * OPEN;
        let name = "d".repeat(100);
        for _ in 0..deep {
            rustix::fs::mkdirat(&at, name.as_str(), Mode::RWXU).unwrap();
            at = rustix::fs::openat(
                &at,
                name.as_str(),
                OFlags::RDONLY | OFlags::DIRECTORY,
                Mode::empty(),
            )
            .unwrap();
        }
        assert_eq!(measure(dir.path()).unwrap().inodes, deep as u64 + 1);
    }

    #[test]
    fn counts_are_remembered_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Arc::new(Ledger::default());
        let layer = |ended| [("c".to_owned(), dir.path().to_owned(), ended)];
        let patience = Duration::from_secs(10);
        let first = ledger.usage(&layer(false), patience)[0].unwrap();
        assert_eq!(first.usage.inodes, 1);
        std::fs::write(dir.path().join("f"), "x").unwrap();
        assert_eq!(
            ledger.usage(&layer(false), patience)[0],
            Some(first),
            "still fresh"
        );
        // Its end makes it count again.
        let until = Instant::now() + patience;
        while ledger.usage(&layer(true), patience)[0]
            .unwrap()
            .usage
            .inodes
            != 2
        {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        ledger.forget("c");
        assert_eq!(
            ledger.usage(&layer(true), patience)[0]
                .unwrap()
                .usage
                .inodes,
            2
        );
        let gone = [("x".to_owned(), dir.path().join("absent"), false)];
        assert_eq!(ledger.usage(&gone, patience), [None]);
    }
}
