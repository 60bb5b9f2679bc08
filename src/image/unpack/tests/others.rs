//! What others make of the same archives: GNU tar and the kernel's overlayfs.

use super::*;

/// A real tree of this machine comes out as GNU tar makes it.
#[test]
fn a_real_tree_is_what_gnu_tar_makes_of_it() {
    use std::process::Command;
    if !is_root() {
        return;
    }
    let run = |arguments: &[&str]| {
        let output = Command::new("tar").args(arguments).output();
        output.map(|output| output.stdout).unwrap_or_default()
    };
    let tar = run(&[
        "--format=pax",
        "-C",
        "/",
        "-cf",
        "-",
        "etc",
        "usr/share/doc/base-files",
        "dev/null",
    ]);
    if tar.is_empty() {
        println!("SKIPPED: there's no GNU tar");
        return;
    }
    let theirs = tempfile::tempdir().unwrap();
    let archive = theirs.path().join("archive");
    fs::write(&archive, &tar).unwrap();
    let root = theirs.path().join("root");
    fs::create_dir(&root).unwrap();
    run(&[
        "-p",
        "-C",
        root.to_str().unwrap(),
        "-xf",
        archive.to_str().unwrap(),
    ]);
    let ours = unpack_tar(tar);
    ours.result.as_ref().unwrap();
    let ours = describe(&ours.root());
    let theirs = describe(&root);
    assert!(ours.len() > 100, "{} entries", ours.len());
    for (path, description) in &theirs {
        // Times of directories that the archive only implies are the time of unpacking.
        assert_eq!(ours.get(path), Some(description), "{}", path.display());
    }
    assert_eq!(ours.len(), theirs.len());
}

/// Everything that can be seen of a tree's entries.
fn describe(root: &Path) -> std::collections::BTreeMap<PathBuf, String> {
    let mut found = std::collections::BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(root).unwrap().to_path_buf();
            let content = match metadata.file_type() {
                kind if kind.is_file() => crate::Digest::of(&fs::read(&path).unwrap()).to_string(),
                kind if kind.is_symlink() => fs::read_link(&path).unwrap().display().to_string(),
                _ => String::new(),
            };
            let implied = ["usr", "usr/share", "usr/share/doc", "dev"]
                .iter()
                .any(|dir| name == Path::new(dir));
            let time = if implied { 0 } else { metadata.mtime() };
            let mode = if implied { 0 } else { metadata.mode() };
            found.insert(
                name,
                format!(
                    "{mode:o} {}:{} {time} {} {content}",
                    metadata.uid(),
                    metadata.gid(),
                    metadata.rdev()
                ),
            );
            if metadata.is_dir() {
                dirs.push(path);
            }
        }
    }
    found
}

/// The kernel's overlayfs understands what is unpacked.
#[test]
fn overlayfs_stacks_the_layers() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    if !is_root() {
        return;
    }
    let lower = unpack_tar(
        Tar::default()
            .file("gone", b"")
            .file("stays", b"lower")
            .file("dir/gone", b"")
            .file("dir/stays", b"")
            .file("replaced/old", b"")
            .file("opaque/old", b"")
            .file("file-to-dir", b"")
            .finish(),
    );
    let upper = unpack_tar(
        Tar::default()
            .file("opaque/new", b"")
            .file("opaque/.wh..wh..opq", b"")
            .file(".wh.gone", b"")
            .file("dir/.wh.gone", b"")
            .file("replaced/new", b"")
            .file(".wh.replaced", b"")
            .file("file-to-dir/inside", b"")
            .finish(),
    );
    // A mount namespace for this thread alone.
    let tester = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let target = tempfile::tempdir().unwrap();
        let options = format!(
            "lowerdir={}:{}",
            upper.root().display(),
            lower.root().display()
        );
        mount(
            Some("overlay"),
            target.path(),
            Some("overlay"),
            MsFlags::MS_RDONLY,
            Some(options.as_str()),
        )
        .unwrap();
        let mut names: Vec<String> = describe(target.path())
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        names.sort();
        umount2(target.path(), MntFlags::MNT_DETACH).unwrap();
        let expected = [
            "dir",
            "dir/stays",
            "file-to-dir",
            "file-to-dir/inside",
            "opaque",
            "opaque/new",
            "replaced",
            "replaced/new",
            "stays",
        ];
        assert_eq!(names, expected);
    });
    tester.join().unwrap();
}
