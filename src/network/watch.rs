//! Tells when something changes in a few directories, by inotify(7), also in ones that do not exist
//! yet: then their nearest existing parent is watched for them.

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tokio::io::unix::AsyncFd;

/// What is of interest in a watched directory.
#[derive(Debug, Default)]
struct Interest {
    everything: bool,
    names: BTreeSet<Vec<u8>>,
}

/// A watch over directories as they are when it is made. After a change make a new one: a directory
/// may have come or gone.
pub(crate) struct Watch {
    events: AsyncFd<OwnedFd>,
    interests: HashMap<i32, Interest>,
}

impl Watch {
    /// Starts watching. What changes from here on is told by [`Watch::changed`].
    ///
    /// # Errors
    ///
    /// When the kernel gives no inotify instance or watch (`fs.inotify.max_user_instances`,
    /// `fs.inotify.max_user_watches`).
    pub fn new(dirs: &[PathBuf]) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut interests = HashMap::<i32, Interest>::new();
        for dir in dirs {
            let chain: Vec<&Path> = dir.ancestors().collect();
            // From the root down: what appears below a watched directory can't be missed.
            for (depth, path) in chain.iter().enumerate().rev() {
                let Some(watch) = add(&events, path, depth == 0)? else {
                    break;
                };
                let interest = interests.entry(watch).or_default();
                match depth
                    .checked_sub(1)
                    .and_then(|below| chain.get(below)?.file_name())
                {
                    Some(next) => drop(interest.names.insert(next.as_bytes().to_vec())),
                    None => interest.everything = true,
                }
            }
        }
        // Deprecated for descriptors that may be closed behind its back; an owned one can't be.
        #[allow(deprecated)]
        let events = AsyncFd::new(events)?;
        Ok(Self { events, interests })
    }

    /// Returns after a change, with all that is queued taken off. Dropping it loses nothing.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable().await?;
            let relevant = self.drain()?;
            ready.clear_ready();
            if relevant {
                return Ok(());
            }
        }
    }

    fn drain(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
        let mut relevant = false;
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes());
                    relevant |= self.is_relevant(event.wd(), event.events(), name);
                }
                Err(Errno::AGAIN) => return Ok(relevant),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn is_relevant(&self, watch: i32, events: ReadFlags, name: Option<&[u8]>) -> bool {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            return true;
        }
        match (self.interests.get(&watch), name) {
            (Some(interest), Some(name)) => interest.everything || interest.names.contains(name),
            // Without a name it is about the directory itself.
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

/// Watches a directory; `None` when there is none (any more).
fn add(events: &OwnedFd, path: &Path, target: bool) -> io::Result<Option<i32>> {
    let mut mask = WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR
        // One directory may be both the parent of one and another one itself.
        | WatchFlags::MASK_ADD;
    if target {
        mask |= WatchFlags::CLOSE_WRITE | WatchFlags::ATTRIB;
    }
    let path = if path.as_os_str().is_empty() {
        OsStr::new(".")
    } else {
        path.as_os_str()
    };
    match inotify::add_watch(events, path, mask) {
        Ok(watch) => Ok(Some(watch)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;
    use tokio::time::timeout;

    async fn fires(watch: &Watch) -> bool {
        timeout(Duration::from_secs(10), watch.changed())
            .await
            .is_ok_and(|r| r.is_ok())
    }

    #[tokio::test]
    async fn a_directory_that_appears_later_is_noticed_step_by_step() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("cni/net.d");
        let dirs = [dir.clone()];
        let watch = Watch::new(&dirs).unwrap();
        fs::create_dir(root.path().join("cni")).unwrap();
        assert!(fires(&watch).await);
        let watch = Watch::new(&dirs).unwrap();
        fs::create_dir(&dir).unwrap();
        assert!(fires(&watch).await);
        let watch = Watch::new(&dirs).unwrap();
        fs::write(dir.join("a.conf"), "x").unwrap();
        assert!(fires(&watch).await);
        fs::rename(dir.join("a.conf"), dir.join("b.conf")).unwrap();
        assert!(fires(&watch).await);
        fs::remove_dir_all(root.path().join("cni")).unwrap();
        assert!(fires(&watch).await);
    }

    #[tokio::test]
    async fn neighbours_do_not_matter() {
        let root = tempfile::tempdir().unwrap();
        let watch = Watch::new(&[root.path().join("cni/net.d")]).unwrap();
        fs::write(root.path().join("other"), "x").unwrap();
        let nothing = timeout(Duration::from_millis(200), watch.changed()).await;
        assert!(nothing.is_err());
        fs::create_dir(root.path().join("cni")).unwrap();
        assert!(fires(&watch).await);
    }

    #[tokio::test]
    async fn a_directory_inside_another_watched_one_keeps_both() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("net");
        fs::create_dir(&inner).unwrap();
        let watch = Watch::new(&[root.path().into(), inner.clone()]).unwrap();
        fs::write(root.path().join("a"), "x").unwrap();
        assert!(fires(&watch).await);
        fs::write(inner.join("a"), "x").unwrap();
        assert!(fires(&watch).await);
    }
}
