//! Projects: what a file system counts for a directory tree by itself, without a walk (ext4, XFS).
//!
//! A file belongs to a project, a number, and takes it from the directory that it is made in. A layer that has a
//! project of its own is measured by one question to the kernel, and the answer is always that of the moment.
//!
//! Nothing is written down: the work directory of a layer, which no container sees, holds its project, and the file
//! system knows which projects are in use. So there is nothing that a crash could make wrong, and a project is free
//! as soon as the last file of it is gone, open ones included.
//!
//! A process in the host's user namespace may move files that it owns to other projects, be it in a
//! container. So numbers are drawn by lot from many: nobody can put files on the account of a layer whose number it
//! doesn't know. What leaves an account is found by comparing (see [`Ledger`](crate::disk::Ledger)).

mod sys;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::disk::{DiskUsage, UPPER, WORK};

/// Where projects of layers are from. The kubelet counts up from 1048577, Docker from 1, and systemd has the upper
/// half; who draws from everywhere, as containers/storage does, is noticed because the number is in use. On XFS a
/// number that was ever used takes up 136 bytes to 4 KiB for good, so there may not be too many.
pub const RANGE: Range<u32> = 0x5000_0000..0x5100_0000;
/// Numbers that are tried for a layer.
const TRIES: usize = 16;
/// Where administrators name projects.
const CLAIMS: [&str; 2] = ["/etc/projects", "/etc/projid"];

/// Why a layer or a file system has no accounting by projects.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// The file system does not count.
    #[error(
        "the file system of {dir:?} does not account for projects: {source}; ext4 does with the features \
         \"quota\" and \"project\" and the quota type prjquota, XFS mounted with pquota"
    )]
    Off {
        /// A directory on it.
        dir: PathBuf,
        /// What quotactl_fd(2) said.
        source: io::Error,
    },
    /// The whole tree is on somebody's account.
    #[error("{dir:?} belongs to project {project} already, whose account its layers stay on")]
    Claimed {
        /// Where layers are.
        dir: PathBuf,
        /// Whose it is.
        project: u32,
    },
    /// A call failed.
    #[error("can't {action} of {path:?}: {source}")]
    Refused {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Every number that was tried is in use.
    #[error("{TRIES} projects of {RANGE:?} were tried and all are in use")]
    Exhausted,
}

/// What a file system has of a project.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// Bytes of allocated blocks, and those that were promised to what is still to be written.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Somebody has set limits for it.
    pub limited: bool,
}

/// Projects for layers.
pub trait Accounts: Send + Sync {
    /// Gives a layer whose directories are new and empty a project.
    ///
    /// # Errors
    /// [`QuotaError`]; the layer has none then.
    fn open(&self, layer: &Path) -> Result<(), QuotaError>;

    /// The project of a layer, if it has one of ours.
    ///
    /// # Errors
    /// [`QuotaError::Refused`].
    fn find(&self, layer: &Path) -> Result<Option<u32>, QuotaError>;

    /// What is on the account of a project.
    ///
    /// # Errors
    /// What quotactl_fd(2) says.
    fn usage(&self, project: u32) -> io::Result<DiskUsage>;
}

/// The projects of a file system.
#[derive(Debug)]
pub struct Projects {
    /// What quotactl_fd(2) knows the file system by.
    home: OwnedFd,
    /// Numbers that administrators have given away.
    claimed: HashSet<u32>,
}

impl Projects {
    /// Those of the file system of `dir`, in which layers are.
    ///
    /// # Errors
    /// [`QuotaError`] when there is no accounting for layers there.
    pub fn on(dir: &Path) -> Result<Self, QuotaError> {
        let home = open(dir)?;
        sys::accounting(home.as_fd()).map_err(|source| QuotaError::Off {
            dir: dir.to_owned(),
            source,
        })?;
        let project = read(&home, dir)?.project;
        if project != 0 {
            return Err(QuotaError::Claimed {
                dir: dir.to_owned(),
                project,
            });
        }
        let texts = CLAIMS.map(|file| std::fs::read_to_string(file).unwrap_or_default());
        let claimed = texts.iter().flat_map(|text| numbers(text)).collect();
        Ok(Self { home, claimed })
    }

    /// What the file system has of a project.
    ///
    /// # Errors
    /// What quotactl_fd(2) says.
    pub fn entry(&self, project: u32) -> io::Result<Entry> {
        match sys::entry(self.home.as_fd(), project) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Entry::default()),
            result => result,
        }
    }

    /// Gives the work directory a project that it has alone.
    fn claim(&self, work: &OwnedFd, path: &Path) -> Result<u32, QuotaError> {
        let asked = |source| QuotaError::Refused {
            action: "ask for the account",
            path: path.to_owned(),
            source,
        };
        for _ in 0..TRIES {
            let project = draw().map_err(asked)?;
            let free = Entry::default();
            if self.claimed.contains(&project) || self.entry(project).map_err(asked)? != free {
                continue;
            }
            write(work, path, project)?;
            // Whoever has drawn the same meanwhile is there, too.
            if self.entry(project).map_err(asked)?.inodes == 1 {
                return Ok(project);
            }
        }
        Err(QuotaError::Exhausted)
    }
}

impl Accounts for Projects {
    fn open(&self, layer: &Path) -> Result<(), QuotaError> {
        let [work, upper] = [WORK, UPPER].map(|name| layer.join(name));
        let (work_fd, upper_fd) = (open(&work)?, open(&upper)?);
        let done = self
            .claim(&work_fd, &work)
            .and_then(|project| write(&upper_fd, &upper, project));
        if done.is_err() {
            // The kernel moves no file between the two unless both have the same or none.
            let _ = write(&work_fd, &work, 0);
        }
        done
    }

    fn find(&self, layer: &Path) -> Result<Option<u32>, QuotaError> {
        let look = |name| {
            let path = layer.join(name);
            read(&open(&path)?, &path)
        };
        let (work, upper) = (look(WORK)?, look(UPPER)?);
        let inherited = work.flags & upper.flags & sys::PROJECT_INHERIT != 0;
        // The container may have given its root another.
        let sound = inherited && work.project == upper.project && RANGE.contains(&work.project);
        Ok(sound.then_some(work.project))
    }

    fn usage(&self, project: u32) -> io::Result<DiskUsage> {
        let entry = self.entry(project)?;
        Ok(DiskUsage {
            bytes: entry.bytes,
            inodes: entry.inodes,
        })
    }
}

fn open(dir: &Path) -> Result<OwnedFd, QuotaError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty()).map_err(|e| QuotaError::Refused {
        action: "look for the project",
        path: dir.to_owned(),
        source: e.into(),
    })
}

fn read(dir: &OwnedFd, path: &Path) -> Result<sys::Attributes, QuotaError> {
    sys::attributes(dir.as_fd()).map_err(|source| QuotaError::Refused {
        action: "read the project",
        path: path.to_owned(),
        source,
    })
}

/// Gives an empty directory a project, which what is made in it takes over; none for 0.
fn write(dir: &OwnedFd, path: &Path, project: u32) -> Result<(), QuotaError> {
    let mut attributes = read(dir, path)?;
    attributes.project = project;
    match project {
        0 => attributes.flags &= !sys::PROJECT_INHERIT,
        _ => attributes.flags |= sys::PROJECT_INHERIT,
    }
    sys::set_attributes(dir.as_fd(), &attributes).map_err(|source| QuotaError::Refused {
        action: "set the project",
        path: path.to_owned(),
        source,
    })
}

/// A number of [`RANGE`] that nobody can foresee.
fn draw() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(RANGE.start + u32::from_ne_bytes(bytes) % (RANGE.end - RANGE.start))
}

/// The numbers in a file of projects: `number:directory` or `name:number` on each line.
fn numbers(text: &str) -> impl Iterator<Item = u32> + '_ {
    let lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    lines.filter_map(|line| {
        let (first, second) = line.split_once(':')?;
        let number = |text: &str| text.trim().parse().ok();
        number(first).or_else(|| number(second))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_drawn_from_the_range() {
        let drawn: HashSet<u32> = (0..100).map(|_| draw().unwrap()).collect();
        assert!(drawn.iter().all(|project| RANGE.contains(project)));
        assert!(drawn.len() > 90, "{drawn:?}");
    }

    #[test]
    fn numbers_that_administrators_gave_away_are_read() {
        let text = "# 7:/comment\n10:/var/log\n\nlogs:11\nhalf:\n:12\nnonsense\n 13 : /srv \n4294967296:/big\n";
        assert_eq!(numbers(text).collect::<Vec<_>>(), [10, 11, 12, 13]);
    }

    #[test]
    fn a_file_system_without_accounting_says_so() {
        let proc = Path::new("/proc");
        let Err(QuotaError::Off { dir, .. }) = Projects::on(proc) else {
            panic!("/proc has no quotas");
        };
        assert_eq!(dir, proc);
        assert!(matches!(
            Projects::on(Path::new("/nowhere")),
            Err(QuotaError::Refused { .. })
        ));
    }
}
