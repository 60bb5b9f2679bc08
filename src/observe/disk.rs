//! How much a container has written.
//!
//! A writable layer is a directory tree. Where its file system counts for itself what belongs to a project
//! ([`quota`](crate::quota)), each call asks it, and gets the use of that moment. Elsewhere only a walk can measure
//! the tree, and its container makes it as large, as deep and as wide as it likes. So a walk never happens in a call:
//! [`Ledger`] has one thread that walks one layer after the other, rests in between, and ends when nothing is left to
//! do. Calls get what was counted last.
//!
//! A container may move files that it owns to another project, and its use with them. So layers with a project are
//! walked, too, but seldom ([`AUDIT`]): one in which there is more than on its account is told by walks from then on.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

use crate::quota::{Accounts, QuotaError};

/// The directory of a layer in which there is what the container has written.
pub const UPPER: &str = "upper";
/// The directory of a layer that the kernel's overlay works in; on the same account.
pub const WORK: &str = "work";
/// A count is good for so long, and for longer when counting takes long.
const FRESH: Duration = Duration::from_secs(10);
/// A layer is walked for at most 1/50 of the time.
const REST: u32 = 50;
/// Layers with a project are walked this often at most,
const AUDIT: Duration = Duration::from_secs(300);
/// and for at most 1/500 of the time.
const AUDIT_REST: u32 = 500;
/// A layer may have this much more in it than is on its account before that counts as hidden: a walk takes time, in
/// which files come and go.
const SLACK: DiskUsage = DiskUsage {
    bytes: 16 << 20,
    inodes: 256,
};
/// A layer in which something was hidden this often is walked for good.
const STRIKES: u8 = 2;
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

/// A layer that is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its container.
    pub id: String,
    /// Where [`UPPER`] and [`WORK`] are.
    pub dir: PathBuf,
    /// Whether the container has ended, so that nobody writes to it any more.
    pub ended: bool,
}

/// The last counts of writable layers.
pub struct Ledger {
    book: Mutex<Book>,
    /// A layer was counted.
    counted: Condvar,
    /// A layer that was never counted is in the queue.
    wanted: Condvar,
    accounts: OnceLock<Box<dyn Accounts>>,
    audit: Duration,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            book: Mutex::default(),
            counted: Condvar::new(),
            wanted: Condvar::new(),
            accounts: OnceLock::new(),
            audit: AUDIT,
        }
    }
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
    /// Its project, once that was looked for.
    project: Option<Option<u32>>,
    /// How often it had more in it than was on the project's account.
    strikes: u8,
    /// The last walk found more than that.
    doubted: bool,
}

impl Entry {
    /// The project that says what it uses.
    fn account(&self) -> Option<u32> {
        self.project.flatten().filter(|_| !self.doubted)
    }
}

impl Ledger {
    /// From now on layers are measured by these projects where they have one. Said once, before the first question.
    pub fn keep_accounts(&self, accounts: impl Accounts + 'static) {
        let _ = self.accounts.set(Box::new(accounts));
    }

    /// Opens an account for a layer whose directories are new and empty; nothing where there are none.
    ///
    /// # Errors
    /// Why the layer has none; it is walked then.
    pub fn open(&self, layer: &Path) -> Result<(), QuotaError> {
        self.accounts
            .get()
            .map_or(Ok(()), |accounts| accounts.open(layer))
    }

    /// What these layers use, in their order: by their accounts, or what was counted last. Those whose count is old
    /// are counted again, later. Waits at most `patience` for those that were never counted; `None` for what still was
    /// not.
    pub fn usage(self: &Arc<Self>, layers: &[Layer], patience: Duration) -> Vec<Option<Counted>> {
        let until = Instant::now() + patience;
        let told = self.ask_accounts(layers);
        let mut book = self.book.lock();
        for (layer, told) in layers.iter().zip(told) {
            book.request(layer, told, self.audit);
        }
        if book.walking && book.urgent() {
            self.wanted.notify_all();
        }
        if !book.queue.is_empty() && !book.walking {
            let ledger = self.clone();
            let thread = std::thread::Builder::new()
                .name("layers".to_owned())
                .spawn(move || ledger.walk_all());
            book.walking = thread.is_ok();
        }
        let waiting = |book: &Book| {
            let first = |layer: &Layer| {
                book.entries
                    .get(&layer.id)
                    .is_some_and(|e| e.queued && e.counted.is_none())
            };
            layers.iter().any(first)
        };
        while book.walking && waiting(&book) {
            if self.counted.wait_until(&mut book, until).timed_out() {
                break;
            }
        }
        let last = |layer: &Layer| book.entries.get(&layer.id).and_then(|e: &Entry| e.counted);
        layers.iter().map(last).collect()
    }

    /// The layer is gone.
    pub fn forget(&self, id: &str) {
        self.book.lock().entries.remove(id);
    }

    /// What is on the accounts of those that have one. The kernel is asked without the lock.
    fn ask_accounts(&self, layers: &[Layer]) -> Vec<Option<(u32, Counted)>> {
        let Some(accounts) = self.accounts.get() else {
            return vec![None; layers.len()];
        };
        // What is known of each: whether it was looked at, and its project if that is believed.
        let known: Vec<_> = {
            let book = self.book.lock();
            let look = |layer: &Layer| {
                let entry = book.entries.get(&layer.id);
                entry.map_or((false, None), |e| (e.project.is_some(), e.account()))
            };
            layers.iter().map(look).collect()
        };
        let ask = |layer: &Layer, (looked, project): (bool, Option<u32>)| {
            let project = match looked {
                true => project,
                false => self.look(accounts.as_ref(), layer),
            }?;
            let at = crate::now();
            let usage = accounts.usage(project).ok()?;
            Some((project, Counted { usage, at }))
        };
        let each = layers.iter().zip(known);
        each.map(|(layer, known)| ask(layer, known)).collect()
    }

    /// Looks for the project of a layer, and remembers it. What can't be read now is looked for again.
    fn look(&self, accounts: &dyn Accounts, layer: &Layer) -> Option<u32> {
        let project = accounts.find(&layer.dir).ok()?;
        let mut book = self.book.lock();
        let entry = book.entries.entry(layer.id.clone()).or_default();
        entry.project = Some(project);
        project
    }

    fn walk_all(&self) {
        loop {
            let (id, dir, account) = {
                let mut book = self.book.lock();
                match book.queue.pop_front() {
                    Some((id, dir)) => {
                        let entry = book.entries.get(&id);
                        let account = entry.and_then(|e| e.project).flatten();
                        (id, dir, account)
                    }
                    None => {
                        book.walking = false;
                        return;
                    }
                }
            };
            let begin = Instant::now();
            let at = crate::now();
            let booked = || self.accounts.get()?.usage(account?).ok();
            let before = booked();
            let usage = measure(&dir.join(UPPER));
            let after = booked();
            let took = begin.elapsed();
            let mut book = self.book.lock();
            // It may have been forgotten in the meantime.
            if let Some(entry) = book.entries.get_mut(&id) {
                entry.queued = false;
                if let Ok(usage) = usage {
                    if let (Some(before), Some(after)) = (before, after) {
                        let strikes = entry.strikes;
                        entry.judge(usage, before, after);
                        if entry.strikes > strikes {
                            let (found, account) = (usage.bytes, after.bytes);
                            tracing::warn!(
                                container = id,
                                found,
                                account,
                                "a writable layer holds more than is on its account; it is walked"
                            );
                        }
                    }
                    if entry.account().is_none() || after.is_none() {
                        entry.counted = Some(Counted { usage, at });
                    }
                }
                let pause = match entry.account().and(after) {
                    Some(_) => self.audit.max(took * AUDIT_REST),
                    None => FRESH.max(took * REST),
                };
                entry.due = Some(Instant::now() + pause);
                entry.settled = entry.ended;
            }
            self.counted.notify_all();
            if took > Duration::from_millis(1) {
                // Somebody waits for a layer that was never counted: no rest then.
                let until = Instant::now() + (took * BREAK).min(Duration::from_secs(10));
                while !book.urgent() && !self.wanted.wait_until(&mut book, until).timed_out() {}
            }
        }
    }
}

impl Entry {
    /// Compares what a walk found with what was on the account before and after it.
    fn judge(&mut self, walked: DiskUsage, before: DiskUsage, after: DiskUsage) {
        // More on the account than in the tree is no wonder: files that were removed, but are open.
        let allowed = |before: u64, after: u64, slack: u64| {
            let most = before.max(after);
            most.saturating_add(slack.max(most / 16))
        };
        let hidden = walked.bytes > allowed(before.bytes, after.bytes, SLACK.bytes)
            || walked.inodes > allowed(before.inodes, after.inodes, SLACK.inodes);
        if hidden {
            self.strikes = self.strikes.saturating_add(1);
        }
        self.doubted = hidden || self.strikes >= STRIKES;
    }
}

impl Book {
    /// Whether a layer that was never counted is in the queue.
    fn urgent(&self) -> bool {
        let new = |id| {
            self.entries
                .get(id)
                .is_some_and(|e: &Entry| e.counted.is_none())
        };
        self.queue.iter().any(|(id, _)| new(id))
    }

    /// Takes down what was told of a layer's account, and queues it if it is to be walked.
    fn request(&mut self, layer: &Layer, told: Option<(u32, Counted)>, audit: Duration) {
        let entry = self.entries.entry(layer.id.clone()).or_default();
        // Doubts may have come up since the account was asked.
        let told = told.filter(|(project, _)| entry.account() == Some(*project));
        if let Some((_, counted)) = told {
            entry.counted = Some(counted);
            entry.due.get_or_insert_with(|| Instant::now() + audit);
        }
        let old = entry.due.is_none_or(|due| Instant::now() >= due);
        // After its end nobody writes to it: one more count, whatever the age of the last.
        let last = layer.ended && !entry.ended && told.is_none();
        if entry.queued || entry.settled || !(old || last) {
            return;
        }
        entry.queued = true;
        entry.ended = layer.ended;
        self.queue.push_back((layer.id.clone(), layer.dir.clone()));
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

    fn layer(dir: &Path, ended: bool) -> [Layer; 1] {
        [Layer {
            id: "c".to_owned(),
            dir: dir.to_owned(),
            ended,
        }]
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    /// Asks until the answer is this.
    fn until(ledger: &Arc<Ledger>, layer: &[Layer; 1], inodes: u64) -> Counted {
        let until = Instant::now() + PATIENCE;
        loop {
            let counted = ledger.usage(layer, PATIENCE)[0].unwrap();
            if counted.usage.inodes == inodes {
                return counted;
            }
            assert!(Instant::now() < until, "{counted:?}, not {inodes} inodes");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn counts_are_remembered_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(UPPER)).unwrap();
        let ledger = Arc::new(Ledger::default());
        ledger.open(dir.path()).unwrap();
        let layer = |ended| layer(dir.path(), ended);
        let first = ledger.usage(&layer(false), PATIENCE)[0].unwrap();
        assert_eq!(first.usage.inodes, 1);
        std::fs::write(dir.path().join(UPPER).join("f"), "x").unwrap();
        assert_eq!(
            ledger.usage(&layer(false), PATIENCE)[0],
            Some(first),
            "still fresh"
        );
        // Its end makes it count again.
        until(&ledger, &layer(true), 2);
        ledger.forget("c");
        until(&ledger, &layer(true), 2);
        let gone = [Layer {
            id: "x".to_owned(),
            dir: dir.path().join("absent"),
            ended: false,
        }];
        assert_eq!(ledger.usage(&gone, PATIENCE), [None]);
    }

    /// A file system that says what it is told to.
    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<(Option<u32>, DiskUsage)>>);

    impl Fake {
        fn say(&self, project: Option<u32>, inodes: u64) {
            *self.0.lock() = (project, DiskUsage { bytes: 0, inodes });
        }
    }

    impl Accounts for Fake {
        fn open(&self, _: &Path) -> Result<(), QuotaError> {
            Err(QuotaError::Exhausted)
        }

        fn find(&self, _: &Path) -> Result<Option<u32>, QuotaError> {
            Ok(self.0.lock().0)
        }

        fn usage(&self, project: u32) -> io::Result<DiskUsage> {
            let (known, usage) = *self.0.lock();
            assert_eq!(known, Some(project));
            Ok(usage)
        }
    }

    fn with_accounts(audit: Duration) -> (tempfile::TempDir, Fake, Arc<Ledger>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(UPPER)).unwrap();
        let ledger = Ledger {
            audit,
            ..Ledger::default()
        };
        let fake = Fake::default();
        ledger.keep_accounts(fake.clone());
        (dir, fake, Arc::new(ledger))
    }

    #[test]
    fn an_account_is_asked_each_time_and_nothing_is_walked() {
        let (dir, fake, ledger) = with_accounts(AUDIT);
        for (inodes, ended) in [(7, false), (9, false), (3, true), (2, true)] {
            fake.say(Some(1), inodes);
            // Not a moment is waited for a walk, and none is queued.
            let counted = ledger.usage(&layer(dir.path(), ended), Duration::ZERO)[0].unwrap();
            assert_eq!(counted.usage.inodes, inodes);
            assert!(!ledger.book.lock().walking);
        }
        assert!(ledger.open(dir.path()).is_err());
    }

    #[test]
    fn a_layer_without_a_project_is_walked() {
        let (dir, fake, ledger) = with_accounts(AUDIT);
        fake.say(None, 70);
        until(&ledger, &layer(dir.path(), false), 1);
    }

    #[test]
    fn a_layer_that_leaves_its_account_is_walked() {
        let (dir, fake, ledger) = with_accounts(Duration::ZERO);
        let files = 2 * SLACK.inodes;
        for n in 0..files {
            std::fs::write(dir.path().join(UPPER).join(n.to_string()), "").unwrap();
        }
        fake.say(Some(1), 4);
        until(&ledger, &layer(dir.path(), false), files + 1);
        // Caught once, it may be mended; more than once, it is not believed again.
        let entry = |look: fn(&Entry) -> bool| look(&ledger.book.lock().entries["c"]);
        assert!(entry(|e| e.strikes == 1 && e.doubted));
        fake.say(Some(1), files + 3);
        let recount = || ledger.book.lock().entries.get_mut("c").unwrap().due = None;
        recount();
        until(&ledger, &layer(dir.path(), false), files + 3);
        fake.say(Some(1), 4);
        until(&ledger, &layer(dir.path(), false), files + 1);
        assert!(entry(|e| e.strikes == 2));
        fake.say(Some(1), files + 3);
        recount();
        until(&ledger, &layer(dir.path(), true), files + 1);
        assert!(entry(|e| e.doubted));
    }

    #[test]
    fn what_comes_and_goes_during_a_walk_is_not_hidden() {
        let usage = |bytes, inodes| DiskUsage { bytes, inodes };
        let large = usage(1 << 40, 1 << 20);
        for (walked, before, after, hidden) in [
            (usage(10, 10), usage(0, 0), usage(0, 0), false),
            (usage(17 << 20, 10), usage(0, 10), usage(0, 10), true),
            (usage(17 << 20, 10), usage(0, 10), usage(9 << 20, 10), false),
            (usage(17 << 20, 10), usage(9 << 20, 10), usage(0, 10), false),
            (usage(0, 300), usage(0, 10), usage(0, 10), true),
            (large, usage(1039 << 30, 1 << 20), usage(0, 0), false),
            (large, usage(900 << 30, 1 << 20), usage(0, 0), true),
            (usage(0, 1), large, large, false),
        ] {
            let mut entry = Entry::default();
            entry.judge(walked, before, after);
            assert_eq!(entry.doubted, hidden, "{walked:?} {before:?} {after:?}");
        }
    }
}
