//! The run root and the state root: writable, on a fitting file system, with room.

use crate::attempt::existing;
use crate::finding::Finding;
use crate::mountinfo::{self, Mount};
use crate::overlay::name_of;
use crate::privileges;
use rustix::fs::{Access, access, statfs, statvfs};
use slipway_config::Config;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Bytes that must be free, and that should be.
struct Room {
    least: u64,
    good: u64,
}

/// Both roots.
pub(crate) fn check(config: &Config) -> Vec<Finding> {
    let mounts = mountinfo::mounts();
    let small = Room {
        least: MIB,
        good: 32 * MIB,
    };
    let large = Room {
        least: 64 * MIB,
        good: 2048 * MIB,
    };
    vec![
        root("run-root", "run root", &config.run_root, &small, &mounts),
        root(
            "state-root",
            "state root",
            &config.state_root,
            &large,
            &mounts,
        ),
    ]
}

fn root(id: &str, what: &str, path: &Path, room: &Room, mounts: &[Mount]) -> Finding {
    let shown = path.display();
    if path.symlink_metadata().is_ok() && !path.is_dir() {
        return Finding::fail(id, what, format!("{shown} is no directory"))
            .cost("the daemon does not start")
            .fix("remove what is there, or choose another directory");
    }
    let base = existing(path);
    let key = id.replace('-', "_");
    let place = if base == path {
        format!("{shown}")
    } else {
        format!("{shown}, to be made in {}", base.display())
    };
    if mountinfo::of(mounts, &base).is_some_and(Mount::read_only) {
        return Finding::fail(id, what, format!("{place}: mounted read-only"))
            .cost("the daemon does not start")
            .fix(format!("choose another {key}, or remount read-write"));
    }
    if access(&base, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let found = format!("{place}: not writable for user {}", nix::unistd::geteuid());
        return if privileges::is_root() {
            Finding::fail(id, what, found)
                .cost("the daemon does not start")
                .fix(format!("choose another {key}"))
        } else {
            Finding::info(id, what, found).fix("run slipway check as root")
        };
    }
    let (Ok(space), Ok(fs)) = (statvfs(&base), statfs(&base)) else {
        return Finding::warn(
            id,
            what,
            format!("{place}: its file system does not answer"),
        )
        .cost("the daemon may hang there")
        .fix("look at the file system's server or disk");
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let kind = u64::try_from(fs.f_type).ok().and_then(name_of);
    let found = format!("{place}: {} free ({})", bytes(free), kind.unwrap_or("?"));
    let fix = format!("make room, or choose another {key}");
    if free < room.least {
        return Finding::fail(id, what, found)
            .cost("pods can't be made, images can't be pulled")
            .fix(fix);
    }
    if free < room.good {
        return Finding::warn(id, what, found)
            .cost("it will soon be full")
            .fix(fix);
    }
    // Some file systems make inodes as needed, and count none.
    if space.f_files > 0 && space.f_favail < 10_000 {
        return Finding::warn(id, what, format!("{found}, but {} inodes", space.f_favail))
            .cost("images of many files can't be unpacked")
            .fix(fix);
    }
    if id == "run-root" && kind != Some("tmpfs") {
        return Finding::info(id, what, found)
            .cost("what is there outlives the boot that it is about, and its writes go to a disk")
            .fix("put run_root on a tmpfs, as /run usually is");
    }
    Finding::ok(id, what, found)
}

/// `12.3 GiB`.
fn bytes(n: u64) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)];
    match units.iter().find(|(_, size)| n >= *size) {
        Some((unit, size)) => format!("{}.{} {unit}", n / size, n % size * 10 / size),
        None => format!("{} KiB", n >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(0), "0 KiB");
        assert_eq!(bytes(1536 * MIB), "1.5 GiB");
        assert_eq!(bytes(u64::MAX), "16777215.9 TiB");
    }

    #[test]
    fn a_root_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let all = mountinfo::mounts();
        let any = Room { least: 0, good: 0 };
        let judge = |path: &Path, room: &Room| root("state-root", "x", path, room, &all).status;
        assert_eq!(judge(&dir.path().join("a/b"), &any), Status::Ok);
        let much = Room {
            least: 0,
            good: u64::MAX,
        };
        assert_eq!(judge(dir.path(), &much), Status::Warn);
        let more = Room {
            least: u64::MAX,
            good: u64::MAX,
        };
        assert_eq!(judge(dir.path(), &more), Status::Fail);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(judge(&file, &any), Status::Fail);
    }
}
