//! Overlay mounts, as containers' root file systems are made, on the state root's file system.

use crate::attempt::{existing, in_private_mounts};
use crate::finding::Finding;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

const ID: &str = "overlay";
const WHAT: &str = "overlay";

/// Whether containers' writable layers can be on the state root's file system.
pub(crate) fn check(privileged: bool, state_root: &Path) -> Vec<Finding> {
    let base = existing(state_root);
    let shown = base.display().to_string();
    let fix = "put state_root on ext4, xfs or btrfs; load the module overlay (modprobe overlay)";
    let cost = "no container's root file system can be mounted";
    let kind = file_system(&base);
    let on = format!(
        "{shown} ({})",
        kind.unwrap_or("file system of unknown type")
    );
    if !privileged {
        let finding = match kind {
            Some(kind) if UNFIT.contains(&kind) => Finding::fail(
                ID,
                WHAT,
                format!("{on} can't hold an overlay's writable layer"),
            )
            .cost(cost)
            .fix(fix),
            _ => Finding::not_probed(ID, WHAT),
        };
        return vec![finding];
    }
    let finding = match in_private_mounts(move || probe(&base)) {
        Ok(way) => {
            if let Some(problem) = way.problem {
                Finding::fail(ID, WHAT, format!("on {on}: {problem}"))
                    .cost("files that a container removes come back")
                    .fix(fix)
            } else if way.layers_one_by_one && way.volatile {
                let how = "layers one by one, volatile";
                Finding::ok(ID, WHAT, format!("writable on {on}: {how}"))
            } else if !way.volatile {
                Finding::fail(ID, WHAT, format!("on {on}: without the option volatile"))
                    .cost(cost)
                    .fix("use Linux 5.10 or later")
            } else {
                let found = format!("writable on {on}, but without lowerdir+");
                Finding::warn(ID, WHAT, found)
                    .cost("images of very many layers (over 100 or so) can't be mounted")
                    .fix("use Linux 6.5 or later")
            }
        }
        Err(e) => Finding::fail(ID, WHAT, format!("not writable on {on}: {e}"))
            .cost(cost)
            .fix(fix),
    };
    vec![finding]
}

/// File systems that an overlay's upper layer can't be on.
const UNFIT: [&str; 7] = [
    "overlay",
    "nfs",
    "virtiofs/fuse",
    "vfat",
    "exfat",
    "9p",
    "squashfs",
];

/// The type of the file system of a path, for those that are known here.
fn file_system(path: &Path) -> Option<&'static str> {
    let magic = rustix::fs::statfs(path).ok()?.f_type;
    name_of(u64::try_from(magic).ok()?)
}

/// By `f_type` of statfs(2).
pub(crate) fn name_of(magic: u64) -> Option<&'static str> {
    Some(match magic & 0xffff_ffff {
        0xEF53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683E => "btrfs",
        0xF2F5_2010 => "f2fs",
        0x2FC1_2FC1 => "zfs",
        0xCA45_1A4E => "bcachefs",
        0x0102_1994 => "tmpfs",
        0x8584_58F6 => "ramfs",
        0x794C_7630 => "overlay",
        0x6969 => "nfs",
        0x6573_5546 => "virtiofs/fuse",
        0x4D44 => "vfat",
        0x2011_BAB0 => "exfat",
        0x0102_1997 => "9p",
        0x7371_7368 => "squashfs",
        _ => return None,
    })
}

/// In which way it works.
struct Way {
    layers_one_by_one: bool,
    volatile: bool,
    /// What is wrong with the mount that was made.
    problem: Option<String>,
}

fn probe(base: &Path) -> io::Result<Way> {
    let dir = tempfile::Builder::new()
        .prefix(".slipway-check-")
        .tempdir_in(base)?;
    let at = |name: &str| dir.path().join(name);
    for name in ["one", "two", "two/dir", "upper", "work", "merged"] {
        fs::create_dir(at(name))?;
    }
    fs::write(at("one/file"), "one")?;
    fs::write(at("two/dir/file"), "two")?;
    let mut way = Way {
        layers_one_by_one: true,
        volatile: true,
        problem: None,
    };
    if let Err(first) = mount_by_fd(dir.path()) {
        way.layers_one_by_one = false;
        if mount_by_options(dir.path(), ",volatile").is_err() {
            way.volatile = false;
            mount_by_options(dir.path(), "").map_err(|_| first)?;
        }
    }
    way.problem = misbehaviour(&at("merged"), &at("upper")).err();
    umount2(&at("merged"), MntFlags::MNT_DETACH)?;
    Ok(way)
}

fn mount_by_fd(dir: &Path) -> io::Result<()> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let at = |name: &str| dir.join(name);
    fsconfig_set_string(&fs, "lowerdir+", at("one"))?;
    fsconfig_set_string(&fs, "lowerdir+", at("two"))?;
    fsconfig_set_string(&fs, "upperdir", at("upper"))?;
    fsconfig_set_string(&fs, "workdir", at("work"))?;
    fsconfig_set_flag(&fs, "volatile")?;
    fsconfig_create(&fs).map_err(|e| explained(e, std::os::fd::AsFd::as_fd(&fs)))?;
    let tree = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, at("merged"), flags)?;
    Ok(())
}

/// An error with what the kernel wrote about it (fsopen(2)).
fn explained(error: rustix::io::Errno, fs: BorrowedFd<'_>) -> io::Error {
    let mut message = [0u8; 512];
    let length = rustix::io::read(fs, &mut message).unwrap_or(0);
    let message = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
    let message = message.trim().trim_start_matches("e ");
    if message.is_empty() {
        error.into()
    } else {
        io::Error::other(format!("{error}: {message}"))
    }
}

fn mount_by_options(dir: &Path, more: &str) -> io::Result<()> {
    let at = |name: &str| dir.join(name).display().to_string();
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}{more}",
        at("one"),
        at("two"),
        at("upper"),
        at("work")
    );
    mount(
        Some("overlay"),
        &dir.join("merged"),
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    Ok(())
}

/// Writes, removes a file of a lower layer (whiteout), replaces a directory of one (opaque).
fn misbehaviour(merged: &Path, upper: &Path) -> Result<(), String> {
    let step = |what: &str, result: io::Result<()>| result.map_err(|e| format!("{what}: {e}"));
    step("writing a file", fs::write(merged.join("new"), "x"))?;
    if !upper.join("new").exists() {
        return Err("a new file is not in the writable layer".to_owned());
    }
    step("removing a file", fs::remove_file(merged.join("file")))?;
    step(
        "removing a directory",
        fs::remove_dir_all(merged.join("dir")),
    )?;
    step("making it anew", fs::create_dir(merged.join("dir")))?;
    if merged.join("file").exists() || merged.join("dir/file").exists() {
        return Err("removed files come back".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_numbers_have_names() {
        assert_eq!(name_of(0xEF53), Some("ext4"));
        assert_eq!(name_of(0x794C_7630), Some("overlay"));
        assert_eq!(name_of(1), None);
        assert!(file_system(Path::new("/proc")).is_none());
    }

    #[test]
    fn an_overlay_on_an_overlay_is_refused_and_leaves_nothing() {
        if !crate::privileges::is_root() {
            return println!("SKIPPED: needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().to_owned();
        let nested = in_private_mounts(move || {
            for name in ["one", "two", "upper", "work", "merged"] {
                fs::create_dir(base.join(name))?;
            }
            mount_by_fd(&base)?;
            let refused = probe(&base.join("merged")).is_err();
            let empty = fs::read_dir(base.join("merged"))?.count() == 0;
            Ok((refused, empty))
        });
        match nested {
            Ok(found) => assert_eq!(found, (true, true)),
            Err(e) => println!("SKIPPED: no overlay here: {e}"),
        }
        // Nothing is left mounted on what is removed here.
        dir.close().unwrap();
    }
}
