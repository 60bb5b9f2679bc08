//! What is kept of a container below `--root`, and what can be seen of it.
//!
//! The record is written before anything is made, so that what a killed `create` has left can be found; once more when
//! the init is there; and never again. Every write is a rename.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use slipway_runtime::cgroup::{self, Hierarchies};
use slipway_runtime::freezer::Freezer;

use crate::shared_mounts::SharedMounts;
use crate::{Context, OciError, Result};

/// The version of the runtime specification that states and records are in.
pub const OCI_VERSION: &str = "1.2.0";

const RECORD: &str = "record.json";
const SPEC: &str = "bundle.json";
/// A FIFO that the init has open until it executes its command, and tells on why it can't.
const START: &str = "start";

/// How long a command waits for another one that works on the same container.
const LOCK: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Longest id.
const LONGEST: usize = 1024;

/// A process that can be told from another one with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// In clock ticks since the boot (proc_pid_stat(5), field 22).
    start: u64,
}

impl Process {
    /// The process with this number, if it is there and has not ended.
    pub fn of(pid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start) = parse_stat(&text)?;
        (!matches!(state, 'Z' | 'X')).then_some(Self { pid, start })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(std::process::id().cast_signed())
    }

    /// A descriptor for it, if it lives.
    pub fn pin(&self) -> Option<OwnedFd> {
        // First: what is looked at afterwards is what is pinned.
        let pinned = cgroup::pin(self.pid)?;
        (Self::of(self.pid) == Some(*self)).then_some(pinned)
    }
}

/// State and time of start. The name of the command, in parentheses, may hold anything.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// What is kept of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub cgroup: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// Who created it.
    pub owner: u32,
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    /// The specification has a process to start.
    pub has_process: bool,
    /// Its processes have session keyrings of their own.
    pub new_keyring: bool,
    /// It is in a mount namespace that others are in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_mounts: Option<SharedMounts>,
    /// The command that creates it.
    pub creator: Option<Process>,
    /// Its init, once it is there.
    pub init: Option<Process>,
}

/// What a container is doing (runtime.md, "State").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    /// Frozen; other runtimes say so, too.
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// A container's directory with its record.
#[derive(Debug)]
pub struct Container {
    pub dir: PathBuf,
    pub record: Record,
}

/// Keeps other commands away from a container until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _dir: OwnedFd,
}

/// Refuses what can't be a directory's name, or could not be told from an option.
pub fn check_id(id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    let good = !id.is_empty() && id.len() <= LONGEST && id.chars().all(fits);
    match good && !id.trim_matches('.').is_empty() {
        true => Ok(()),
        false => Err(OciError::Id(id.to_owned())),
    }
}

impl Container {
    /// Takes the id: makes the container's directory, with the record in it.
    ///
    /// # Errors
    /// [`OciError::Exists`].
    pub fn make(context: &Context, record: Record, spec: &Spec) -> Result<(Self, Lock)> {
        check_id(&record.id)?;
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700).recursive(true);
        let root = &context.root;
        builder
            .create(root)
            .map_err(OciError::file("make the directory", root))?;
        let dir = root.join(&record.id);
        match builder.recursive(false).create(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(OciError::Exists { id: record.id, dir });
            }
            made => made.map_err(OciError::file("make the directory", &dir))?,
        }
        let container = Self { dir, record };
        let made = container.lock().and_then(|lock| {
            container.save()?;
            container.write(SPEC, spec)?;
            Ok(lock)
        });
        match made {
            Ok(lock) => Ok((container, lock)),
            Err(error) => {
                let _ = fs::remove_dir_all(&container.dir);
                Err(error)
            }
        }
    }

    /// A container that is there.
    ///
    /// # Errors
    /// [`OciError::NotFound`], also when its directory is there and the record is not yet.
    pub fn open(context: &Context, id: &str) -> Result<Self> {
        check_id(id)?;
        let dir = context.root.join(id);
        match read(&dir.join(RECORD), "record") {
            Ok(record) => Ok(Self { dir, record }),
            Err(OciError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(OciError::NotFound {
                    id: id.to_owned(),
                    root: context.root.clone(),
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self) -> Result<()> {
        self.write(RECORD, &self.record)
    }

    fn write(&self, name: &str, content: &impl Serialize) -> Result<()> {
        let path = self.dir.join(name);
        let partial = self.dir.join(format!("{name}.partial"));
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        serde_json::to_vec(content)
            .map_err(io::Error::from)
            .and_then(|bytes| options.open(&partial)?.write_all(&bytes))
            .and_then(|()| fs::rename(&partial, &path))
            .map_err(OciError::file("write", &path))
    }

    /// The specification, as its bundle had it.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn spec(&self) -> Result<Spec> {
        read(&self.dir.join(SPEC), "OCI specification")
    }

    /// Waits until no other command works on the container.
    ///
    /// # Errors
    /// [`OciError::Busy`].
    pub fn lock(&self) -> Result<Lock> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.dir, flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(OciError::file("open", &self.dir))?;
        let deadline = Instant::now() + LOCK;
        loop {
            match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock { _dir: dir }),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(OciError::Busy(self.record.id.clone()));
                }
                Err(e) => return Err(OciError::file("lock", &self.dir)(e.into())),
            }
        }
    }

    /// The FIFO that its init tells on.
    pub fn start_fifo(&self) -> PathBuf {
        self.dir.join(START)
    }

    /// Its init, if that lives.
    pub fn init(&self) -> Option<OwnedFd> {
        self.record.init.and_then(|init| init.pin())
    }

    /// What it is doing.
    pub fn status(&self, cgroups: &Hierarchies) -> Status {
        if self.record.init.is_none() {
            // Its creator holds the lock, or has died on the way.
            return match self.record.creator.and_then(|creator| creator.pin()) {
                Some(_) => Status::Creating,
                None => Status::Stopped,
            };
        }
        if self.init().is_none() {
            return Status::Stopped;
        }
        let frozen = Freezer::of(cgroups, &self.record.cgroup)
            .is_ok_and(|freezer| freezer.frozen().unwrap_or(false));
        match (frozen, self.waits()) {
            (true, _) => Status::Paused,
            (false, true) => Status::Created,
            (false, false) => Status::Running,
        }
    }

    /// Whether its init waits for start: until its execve it is a reader of the FIFO.
    fn waits(&self) -> bool {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::open(self.start_fifo(), flags, Mode::empty()).is_ok()
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path, kind: &'static str) -> Result<T> {
    let bytes = fs::read(path).map_err(OciError::file("read", path))?;
    parse(&bytes, path, kind)
}

/// Reads JSON, naming the place of what is wrong.
///
/// # Errors
/// [`OciError::Json`].
pub fn parse<T: serde::de::DeserializeOwned>(
    bytes: &[u8],
    path: &Path,
    kind: &'static str,
) -> Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|e| OciError::Json {
        path: path.to_owned(),
        kind,
        at: e.path().to_string(),
        source: e.into_inner(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_directories() {
        for good in ["a", "a.b", "A_1+2-3", "..a"] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "../x", "a b", "ü", "a\0"] {
            assert!(matches!(check_id(bad), Err(OciError::Id(_))), "{bad:?}");
        }
        assert!(check_id(&"x".repeat(LONGEST + 1)).is_err());
    }

    #[test]
    fn another_process_with_the_number_is_another() {
        let own = Process::own().unwrap();
        assert!(own.pin().is_some());
        let earlier = Process {
            start: own.start - 1,
            ..own
        };
        assert!(earlier.pin().is_none());
    }

    #[test]
    fn names_of_commands_may_hold_anything() {
        let text = "12 (a) Z (b) ) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_stat(text), Some(('S', 4711)));
        assert_eq!(parse_stat("12"), None);
    }
}
