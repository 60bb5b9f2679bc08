//! Freezing cgroups, and never leaving them frozen.
//!
//! Who freezes may be killed at any instruction. So a [`Freeze`] first forks a guard, which waits for the
//! end of a pipe that only the freezing process holds: at its end, however that came, the guard ends what
//! else works on the frozen processes (criu), and thaws.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::cgroup::{Hierarchies, pin, send};
use crate::removal::wait;
use crate::{descriptor, sys};

/// How often a v1 freezer is asked whether it has got there; it tells nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Likewise, by who waits for its end.
const LOOK_AGAIN_LATER: Duration = Duration::from_millis(10);
/// How long the guard waits for a helper that it has killed.
const HELPER_END: Duration = Duration::from_secs(5);

/// Why something could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The host has neither the v1 freezer nor a v2 hierarchy.
    #[error("this host has no cgroup freezer")]
    NoFreezer,
    /// The guard could not be made.
    #[error("can't fork a process that would thaw what is frozen")]
    Guard(#[source] io::Error),
    /// The kernel refused.
    #[error("can't freeze {}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A process does not stop.
    #[error(
        "{} did not freeze in time; a process of it may hang in the kernel (state D)", path.display()
    )]
    Late {
        /// The cgroup's directory.
        path: PathBuf,
    },
}

/// A cgroup's freezer.
#[derive(Debug, Clone)]
pub struct Freezer {
    dir: PathBuf,
    unified: bool,
}

impl Freezer {
    /// The freezer of a cgroup.
    ///
    /// # Errors
    /// [`FreezeError::NoFreezer`].
    pub fn of(cgroups: &Hierarchies, cgroup: &Path) -> Result<Self, FreezeError> {
        let (dir, unified) = cgroups.freezer_dir(cgroup).ok_or(FreezeError::NoFreezer)?;
        Ok(Self { dir, unified })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self) -> PathBuf {
        let name = if self.unified {
            "cgroup.freeze"
        } else {
            "freezer.state"
        };
        self.dir.join(name)
    }

    /// Freezes it: none of its processes runs when this returns. Nobody thaws it when this process dies.
    ///
    /// # Errors
    /// [`FreezeError`]; it may be on its way to be frozen then.
    pub fn freeze(&self, deadline: Instant) -> Result<(), FreezeError> {
        let refused = |source| FreezeError::Refused {
            path: self.file(),
            source,
        };
        let wanted = if self.unified { "1" } else { "FROZEN" };
        fs::write(self.file(), wanted).map_err(refused)?;
        let events = match self.unified {
            true => Some(fs::File::open(self.dir.join("cgroup.events")).map_err(refused)?),
            false => None,
        };
        loop {
            if self.is_frozen(events.as_ref()).map_err(refused)? {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FreezeError::Late {
                    path: self.dir.clone(),
                });
            }
            match &events {
                Some(events) => {
                    let timeout = rustix::event::Timespec::try_from(left).ok();
                    match poll(&mut [PollFd::new(events, PollFlags::PRI)], timeout.as_ref()) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(e) => return Err(refused(e.into())),
                    }
                }
                None => std::thread::sleep(LOOK_AGAIN.min(left)),
            }
        }
    }

    fn is_frozen(&self, events: Option<&fs::File>) -> io::Result<bool> {
        let Some(events) = events else {
            return Ok(fs::read_to_string(self.file())?.trim() == "FROZEN");
        };
        use std::os::unix::fs::FileExt as _;
        let mut text = [0; 256];
        let length = events.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(&text[..length]);
        Ok(text.lines().any(|line| line == "frozen 1"))
    }

    /// Whether it is frozen, or on its way there.
    ///
    /// # Errors
    /// What the cgroup file system says.
    pub fn frozen(&self) -> io::Result<bool> {
        match self.unified {
            true => self.is_frozen(Some(&fs::File::open(self.dir.join("cgroup.events"))?)),
            false => Ok(fs::read_to_string(self.file())?.trim() != "THAWED"),
        }
    }

    /// Waits until it is neither frozen nor to be; false when time is over. What can't be read is not frozen.
    pub fn wait_until_thawed(&self, deadline: Instant) -> bool {
        use std::os::unix::fs::FileExt as _;
        let events = fs::File::open(self.dir.join("cgroup.events")).ok();
        loop {
            // Only what changes after it was read is told.
            let _ = events
                .as_ref()
                .map(|events| events.read_at(&mut [0; 256], 0));
            let state = fs::read_to_string(self.file()).unwrap_or_default();
            if matches!(state.trim(), "" | "THAWED" | "0") {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // v1 tells nobody, and v2 only of what has been frozen.
            let pause = left.min(LOOK_AGAIN_LATER);
            match (&events, rustix::event::Timespec::try_from(pause)) {
                (Some(events), Ok(pause)) if self.unified => {
                    let _ = poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&pause));
                }
                _ => std::thread::sleep(pause),
            }
        }
    }

    /// Thaws it. A cgroup that has gone is no error.
    ///
    /// # Errors
    /// What the cgroup file system says.
    pub fn thaw(&self) -> io::Result<()> {
        let wanted = if self.unified { "0" } else { "THAWED" };
        match fs::write(self.file(), wanted) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }
}

/// Frozen cgroups. Thawed when this is dropped, and when this process dies.
#[derive(Debug)]
pub struct Freeze {
    freezers: Vec<Freezer>,
    /// The guard, and the pipe whose end it waits for.
    guard: i32,
    pipe: Option<fs::File>,
}

impl Freeze {
    /// Freezes cgroups: none of their processes runs when this returns.
    ///
    /// # Errors
    /// [`FreezeError`]; nothing is frozen then.
    pub fn new(freezers: Vec<Freezer>, deadline: Instant) -> Result<Self, FreezeError> {
        let (guard, pipe) = start_guard(&freezers).map_err(FreezeError::Guard)?;
        // From here on dropping thaws.
        let frozen = Self {
            freezers,
            guard,
            pipe: Some(pipe),
        };
        for freezer in &frozen.freezers {
            freezer.freeze(deadline)?;
        }
        Ok(frozen)
    }

    /// A child of this process works on what is frozen: it is not to outlive this process and what is frozen.
    pub fn helped_by(&self, pid: i32) {
        if let Some(mut pipe) = self.pipe.as_ref() {
            let _ = pipe.write_all(&pid.to_ne_bytes());
        }
    }

    /// Thaws.
    ///
    /// # Errors
    /// What the kernel says, of the first that failed; all are tried.
    pub fn thaw(self) -> io::Result<()> {
        self.freezers
            .iter()
            .map(Freezer::thaw)
            .fold(Ok(()), Result::and)
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        // The guard thaws, whether that has been done or not.
        self.pipe.take();
        sys::wait_child(self.guard);
    }
}

fn start_guard(freezers: &[Freezer]) -> io::Result<(i32, fs::File)> {
    let (read, write) = descriptor::pipe()?;
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Parent(pid) => Ok((pid, write.into())),
        sys::Forked::Child => {
            sys::close_all_but(&[read.as_raw_fd()]);
            sys::reset_signals();
            let _ = nix::unistd::setsid();
            watch(read, freezers);
            sys::exit_now(0)
        }
    }
}

/// What the guard does.
fn watch(pipe: OwnedFd, freezers: &[Freezer]) {
    let mut pipe = fs::File::from(pipe);
    let mut helpers = Vec::new();
    let mut pid = [0; 4];
    while pipe.read_exact(&mut pid).is_ok() {
        // Not waited for by its parent before the pipe has ended, or else gone: never another's number for long,
        // and then one of a process that its parent is just starting.
        helpers.extend(pin(i32::from_ne_bytes(pid)));
    }
    for helper in &helpers {
        send(helper, libc::SIGKILL);
        wait(helper, Instant::now() + HELPER_END);
    }
    for freezer in freezers {
        let _ = freezer.thaw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_frost_or_the_time() {
        for (unified, file, frozen, thawed) in [
            (false, "freezer.state", "FROZEN\n", "THAWED\n"),
            (true, "cgroup.freeze", "1\n", "0\n"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let freezer = Freezer {
                dir: dir.path().to_owned(),
                unified,
            };
            let soon = || Instant::now() + Duration::from_millis(30);
            // A cgroup that has gone holds nobody up.
            assert!(freezer.wait_until_thawed(soon()));
            let path = dir.path().join(file);
            fs::write(&path, frozen).unwrap();
            assert!(!freezer.wait_until_thawed(soon()));
            let waiting = std::thread::spawn(move || {
                freezer.wait_until_thawed(Instant::now() + Duration::from_secs(20))
            });
            fs::write(&path, thawed).unwrap();
            assert!(waiting.join().unwrap());
        }
    }
}
