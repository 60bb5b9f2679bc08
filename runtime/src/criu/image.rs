//! criu's image files, as far as Slipway looks into them: facts of criu's `magic.h` and `images/*.proto` (3.17 to
//! 4.2); what it does not need is left out.
//!
//! A file is a magic number (two, but for the inventory's), then messages, each after its length.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use prost::Message;

/// The first number of all files but the inventory.
const COMMON: u32 = 0x5456_4319;
/// The largest file that is looked into, in bytes.
const LARGEST: u64 = 64 << 20;

/// Why an image can't be used.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} criu's image {}", path.display())]
pub struct ImageError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A kind of image.
pub trait Image: Message + Default {
    /// Its magic number.
    const MAGIC: u32;
    /// Whether the common number comes before that.
    const HAS_COMMON: bool = true;
}

/// Reads all messages of an image.
///
/// # Errors
/// [`ImageError`]: it can't be read, is too large or malformed.
pub fn read<M: Image>(path: &Path) -> Result<Vec<M>, ImageError> {
    let failed = |source| ImageError {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    let length = file.take(LARGEST + 1).read_to_end(&mut bytes);
    if length.map_err(failed)? as u64 > LARGEST {
        return Err(failed(malformed("it is too large")));
    }
    decode(&bytes).map_err(failed)
}

/// Reads an image's only message.
///
/// # Errors
/// As [`read`]; also when there is not exactly one.
pub fn read_one<M: Image>(path: &Path) -> Result<M, ImageError> {
    let mut found = read(path)?;
    match (found.pop(), found.is_empty()) {
        (Some(message), true) => Ok(message),
        _ => Err(ImageError {
            action: "read",
            path: path.to_owned(),
            source: malformed("it does not hold one entry"),
        }),
    }
}

/// Writes an image of one message in place of another. The message must be one that is known whole.
///
/// # Errors
/// What writing says.
pub fn write_one<M: Image>(path: &Path, message: &M) -> Result<(), ImageError> {
    let mut bytes = Vec::new();
    if M::HAS_COMMON {
        bytes.extend_from_slice(&COMMON.to_le_bytes());
    }
    bytes.extend_from_slice(&M::MAGIC.to_le_bytes());
    let content = message.encode_to_vec();
    bytes.extend_from_slice(
        &u32::try_from(content.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    bytes.extend_from_slice(&content);
    let mut options = File::options();
    options
        .write(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW);
    let written = options
        .open(path)
        .and_then(|mut file| file.write_all(&bytes));
    written.map_err(|source| ImageError {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

fn malformed(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

fn decode<M: Image>(bytes: &[u8]) -> io::Result<Vec<M>> {
    let mut rest = bytes;
    if M::HAS_COMMON && number(&mut rest)? != COMMON {
        return Err(malformed("it is none of criu's"));
    }
    if number(&mut rest)? != M::MAGIC {
        return Err(malformed("it is of another kind"));
    }
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = number(&mut rest)? as usize;
        let (message, tail) = rest
            .split_at_checked(length)
            .ok_or_else(|| malformed("it ends within an entry"))?;
        rest = tail;
        found.push(M::decode(message).map_err(|e| malformed(e.to_string()))?);
    }
    Ok(found)
}

fn number(rest: &mut &[u8]) -> io::Result<u32> {
    let (head, tail) = rest
        .split_first_chunk::<4>()
        .ok_or_else(|| malformed("it ends within a number"))?;
    *rest = tail;
    Ok(u32::from_le_bytes(*head))
}

/// `inventory_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Inventory {
    /// Version of the images.
    #[prost(uint32, required, tag = "1")]
    pub version: u32,
    /// What criu itself was in.
    #[prost(message, optional, tag = "3")]
    pub root_ids: Option<Ids>,
    /// Established TCP connections were left out.
    #[prost(bool, optional, tag = "10")]
    pub tcp_close: Option<bool>,
}

impl Image for Inventory {
    const MAGIC: u32 = 0x5831_3116;
    const HAS_COMMON: bool = false;
}

/// `task_kobj_ids_entry`, whole: what a process shares with others.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ids {
    /// Memory.
    #[prost(uint32, required, tag = "1")]
    pub vm: u32,
    /// Table of descriptors.
    #[prost(uint32, required, tag = "2")]
    pub files: u32,
    /// Root and working directory.
    #[prost(uint32, required, tag = "3")]
    pub fs: u32,
    /// Signal handlers.
    #[prost(uint32, required, tag = "4")]
    pub sighand: u32,
    /// PID namespace.
    #[prost(uint32, optional, tag = "5")]
    pub pid_ns: Option<u32>,
    /// Network namespace.
    #[prost(uint32, optional, tag = "6")]
    pub net_ns: Option<u32>,
    /// IPC namespace.
    #[prost(uint32, optional, tag = "7")]
    pub ipc_ns: Option<u32>,
    /// UTS namespace.
    #[prost(uint32, optional, tag = "8")]
    pub uts_ns: Option<u32>,
    /// Mount namespace.
    #[prost(uint32, optional, tag = "9")]
    pub mnt_ns: Option<u32>,
    /// User namespace.
    #[prost(uint32, optional, tag = "10")]
    pub user_ns: Option<u32>,
    /// cgroup namespace.
    #[prost(uint32, optional, tag = "11")]
    pub cgroup_ns: Option<u32>,
    /// Time namespace.
    #[prost(uint32, optional, tag = "12")]
    pub time_ns: Option<u32>,
}

impl Image for Ids {
    const MAGIC: u32 = 0x5443_2030;
}

/// `pstree_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Process {
    /// Its number in its own namespace.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// Its parent's.
    #[prost(uint32, required, tag = "2")]
    pub ppid: u32,
    /// Its threads' numbers.
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub threads: Vec<u32>,
}

impl Image for Process {
    const MAGIC: u32 = 0x5027_3030;
}

/// `core_entry`: a thread.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Core {
    /// The part of the process's first thread.
    #[prost(message, optional, tag = "3")]
    pub task: Option<Task>,
    /// The part of every thread.
    #[prost(message, optional, tag = "5")]
    pub thread: Option<Thread>,
}

impl Image for Core {
    const MAGIC: u32 = 0x5505_3847;
}

/// `task_core_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Task {
    /// [`DEAD`] or something else.
    #[prost(uint32, required, tag = "1")]
    pub state: u32,
    /// Its name.
    #[prost(string, required, tag = "6")]
    pub comm: String,
}

/// State of a process that has ended and was not waited for.
pub const DEAD: u32 = 2;

/// `thread_core_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Thread {
    /// Niceness.
    #[prost(sint32, optional, tag = "3")]
    pub nice: Option<i32>,
    /// `SCHED_*`.
    #[prost(uint32, optional, tag = "4")]
    pub policy: Option<u32>,
    /// Who it is, and what it may.
    #[prost(message, optional, tag = "10")]
    pub creds: Option<Creds>,
    /// `SECCOMP_MODE_*`.
    #[prost(int32, optional, tag = "11")]
    pub seccomp_mode: Option<i32>,
    /// Its last filter, in the list of all.
    #[prost(uint32, optional, tag = "12")]
    pub seccomp_filter: Option<u32>,
}

/// `SECCOMP_MODE_FILTER`.
pub const SECCOMP_FILTER: i32 = 2;

/// `creds_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Creds {
    /// Real user.
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    /// Real group.
    #[prost(uint32, required, tag = "2")]
    pub gid: u32,
    /// Effective user.
    #[prost(uint32, required, tag = "3")]
    pub euid: u32,
    /// Effective group.
    #[prost(uint32, required, tag = "4")]
    pub egid: u32,
    /// Saved user.
    #[prost(uint32, required, tag = "5")]
    pub suid: u32,
    /// Saved group.
    #[prost(uint32, required, tag = "6")]
    pub sgid: u32,
    /// User for files.
    #[prost(uint32, required, tag = "7")]
    pub fsuid: u32,
    /// Group for files.
    #[prost(uint32, required, tag = "8")]
    pub fsgid: u32,
    /// Inheritable capabilities, the lower half first; likewise the others.
    #[prost(uint32, repeated, packed = "false", tag = "9")]
    pub inheritable: Vec<u32>,
    /// Permitted capabilities.
    #[prost(uint32, repeated, packed = "false", tag = "10")]
    pub permitted: Vec<u32>,
    /// Effective capabilities.
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    pub effective: Vec<u32>,
    /// Bounding set.
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    pub bounding: Vec<u32>,
    /// `SECBIT_*`.
    #[prost(uint32, required, tag = "13")]
    pub secbits: u32,
    /// Supplementary groups.
    #[prost(uint32, repeated, packed = "false", tag = "14")]
    pub groups: Vec<u32>,
    /// AppArmor profile or SELinux label.
    #[prost(string, optional, tag = "15")]
    pub lsm_profile: Option<String>,
    /// Not 0: no new privileges.
    #[prost(uint32, optional, tag = "18")]
    pub no_new_privs: Option<u32>,
    /// Ambient capabilities.
    #[prost(uint32, repeated, packed = "false", tag = "19")]
    pub ambient: Vec<u32>,
}

/// `seccomp_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filters {
    /// All filters.
    #[prost(message, repeated, tag = "1")]
    pub filters: Vec<Filter>,
}

impl Image for Filters {
    const MAGIC: u32 = 0x6441_3049;
}

/// `seccomp_filter`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filter {
    /// `struct sock_filter`s.
    #[prost(bytes = "vec", required, tag = "1")]
    pub program: Vec<u8>,
    /// The one that was loaded before it.
    #[prost(uint32, optional, tag = "2")]
    pub previous: Option<u32>,
}

/// `mnt_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    /// `fstype`.
    #[prost(uint32, required, tag = "1")]
    pub kind: u32,
    /// Its number.
    #[prost(uint32, required, tag = "2")]
    pub id: u32,
    /// The number of what it is on.
    #[prost(uint32, required, tag = "4")]
    pub parent: u32,
    /// `MS_*`.
    #[prost(uint32, required, tag = "5")]
    pub flags: u32,
    /// What of its file system is mounted.
    #[prost(string, required, tag = "6")]
    pub root: String,
    /// Where.
    #[prost(string, required, tag = "7")]
    pub place: String,
    /// Options of its file system.
    #[prost(string, required, tag = "9")]
    pub options: String,
    /// An older way to say that it is external.
    #[prost(bool, optional, tag = "13")]
    pub ext_mount: Option<bool>,
    /// A plugin has to mount it.
    #[prost(bool, optional, tag = "12")]
    pub with_plugin: Option<bool>,
    /// What it was called as external.
    #[prost(string, optional, tag = "18")]
    pub ext_key: Option<String>,
}

impl Image for Mount {
    const MAGIC: u32 = 0x5556_3928;
}

/// `file_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OpenFile {
    /// `fd_types`.
    #[prost(uint32, required, tag = "1")]
    pub kind: u32,
    /// A file with a path.
    #[prost(message, optional, tag = "3")]
    pub file: Option<PathFile>,
    /// A socket of the internet.
    #[prost(message, optional, tag = "4")]
    pub inet: Option<InetSocket>,
    /// A Unix socket.
    #[prost(message, optional, tag = "16")]
    pub unix: Option<UnixSocket>,
}

impl Image for OpenFile {
    const MAGIC: u32 = 0x5630_3138;
}

/// `reg_file_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PathFile {
    /// Its path.
    #[prost(string, required, tag = "6")]
    pub name: String,
}

/// `inet_sk_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InetSocket {
    /// `SOCK_*`.
    #[prost(uint32, required, tag = "4")]
    pub kind: u32,
}

/// `unix_sk_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UnixSocket {
    /// What it is bound to.
    #[prost(bytes = "vec", required, tag = "11")]
    pub name: Vec<u8>,
    /// The directory that a relative name counts from.
    #[prost(string, optional, tag = "14")]
    pub dir: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_garbled_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids-1.img");
        let ids = Ids {
            vm: 1,
            files: 2,
            net_ns: Some(300),
            ..Ids::default()
        };
        // Only an image that is there is replaced.
        assert!(write_one(&path, &ids).is_err());
        std::fs::write(&path, "").unwrap();
        write_one(&path, &ids).unwrap();
        assert_eq!(read_one::<Ids>(&path).unwrap(), ids);
        assert!(read_one::<Process>(&path).is_err());
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(read_one::<Ids>(&path).is_err(), "{length}");
        }
        let mut long = whole.clone();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        std::fs::write(&path, &long).unwrap();
        assert!(read_one::<Ids>(&path).is_err());
        let twice = [&whole[..], &whole[8..]].concat();
        std::fs::write(&path, &twice).unwrap();
        assert_eq!(read::<Ids>(&path).unwrap().len(), 2);
        assert!(read_one::<Ids>(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(read::<Ids>(&path).is_err());
    }
}
