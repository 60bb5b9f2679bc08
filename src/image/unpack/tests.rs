use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;

use super::*;
use crate::testing::{Tar, is_root};

mod others;
mod properties;

struct Unpack {
    dir: tempfile::TempDir,
    result: Result<Unpacked, UnpackError>,
}

impl Unpack {
    fn root(&self) -> PathBuf {
        self.dir.path().join("outer/root")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn xattr(&self, name: &str, attribute: &str) -> Option<Vec<u8>> {
        let mut value = [0; 256];
        let length = rustix::fs::lgetxattr(self.path(name), attribute, &mut value).ok()?;
        Some(value[..length].to_vec())
    }

    fn is_whiteout(&self, name: &str) -> bool {
        let metadata = self.path(name).symlink_metadata().unwrap();
        metadata.file_type().is_char_device() && metadata.rdev() == 0
    }

    fn is_opaque(&self, name: &str) -> bool {
        self.xattr(name, "trusted.overlay.opaque").as_deref() == Some(b"y")
    }
}

/// Unpacks two levels below a directory of its own, so that an escape is seen.
fn unpack_tar(tar: Vec<u8>) -> Unpack {
    let dir = tempfile::tempdir().unwrap();
    let (root, spare) = (
        dir.path().join("outer/root"),
        dir.path().join("outer/spare"),
    );
    fs::create_dir_all(&root).unwrap();
    fs::create_dir_all(&spare).unwrap();
    let written = AtomicU64::new(0);
    let result = unpack(tar.as_slice(), &root, &spare, &written).map(|(_, unpacked)| unpacked);
    assert_eq!(fs::read_dir(&spare).unwrap().count(), 0);
    let outside = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(
        (outside(dir.path()), outside(&dir.path().join("outer"))),
        (1, 2),
        "it escaped"
    );
    Unpack { dir, result }
}

fn refused(tar: Tar) -> (String, String) {
    match unpack_tar(tar.finish()).result {
        Err(UnpackError::Refused { entry, reason }) => (entry, reason),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn every_kind_of_entry_is_unpacked() {
    if !is_root() {
        return;
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    let tar = Tar::default()
        .dir("./", 0o711)
        .dir("bin/", 0o1777)
        .raw(b'0', b"bin/su", b"", 0o4755, b"setuid")
        .hard_link("bin/su2", "./bin/su")
        .hard_link("su3", "/bin/su")
        .symlink("link", "/etc/passwd")
        .raw(b'3', b"null", b"", 0o666, b"")
        .raw(b'4', b"block", b"", 0o600, b"")
        .raw(b'6', b"fifo", b"", 0o640, b"")
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"a\nb"),
            ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.other", b"x"),
            ("mtime", b"1234567890.5"),
            ("uid", b"3000000"),
        ])
        .file("ping", b"capable")
        .pax(&[("path", long.as_bytes())])
        .file("short", b"long name")
        .file("empty", b"");
    let unpack = unpack_tar(tar.finish());
    let unpacked = unpack.result.as_ref().unwrap();
    assert_eq!(unpack.root().metadata().unwrap().mode() & 0o7777, 0o711);
    assert_eq!(
        unpack.path("bin").metadata().unwrap().mode() & 0o7777,
        0o1777
    );
    let su = unpack.path("bin/su").metadata().unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.nlink(), su.mtime()),
        (0o4755, 3, 1_000_000_000)
    );
    assert_eq!(
        unpack.path("bin").metadata().unwrap().mtime(),
        1_000_000_000
    );
    assert_eq!(
        fs::read_link(unpack.path("link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert_eq!(
        unpack.path("link").symlink_metadata().unwrap().mtime(),
        1_000_000_000
    );
    let null = unpack.path("null").metadata().unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    assert!(
        unpack
            .path("block")
            .metadata()
            .unwrap()
            .file_type()
            .is_block_device()
    );
    assert!(
        unpack
            .path("fifo")
            .metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
    let ping = unpack.path("ping").metadata().unwrap();
    assert_eq!(
        (ping.uid(), ping.mtime(), ping.mtime_nsec()),
        (3_000_000, 1_234_567_890, 500_000_000)
    );
    assert_eq!(
        unpack.xattr("ping", "security.capability").as_deref(),
        Some(&capability[..])
    );
    assert_eq!(
        unpack.xattr("ping", "user.note").as_deref(),
        Some(&b"a\nb"[..])
    );
    for foreign in [
        "user.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.other",
    ] {
        assert_eq!(unpack.xattr("ping", foreign), None, "{foreign}");
    }
    assert_eq!(unpack.text(&long), "long name");
    assert_eq!(unpacked.implied, [b"d".repeat(200)]);
    // The root, bin, su, link, null, block, fifo, ping, ddd, fff, empty.
    assert_eq!(unpacked.inodes, 11);
    // Three directories and three files of one block.
    assert_eq!(unpacked.bytes, 6 * 4096);
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    if !is_root() {
        return;
    }
    // Whichever comes first, a layer's own entries stay.
    let before = Tar::default()
        .file("dir/.wh.gone", b"")
        .file(".wh.both", b"")
        .dir("both", 0o755)
        .file("both/new", b"new")
        .file(".wh.filled", b"")
        .file("filled/new", b"new")
        .file(".wh.file", b"")
        .file("file", b"file")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"new");
    let after = Tar::default()
        .file("dir/.wh.gone", b"")
        .dir("both", 0o755)
        .file("both/new", b"new")
        .file(".wh.both", b"")
        .file("filled/new", b"new")
        .file(".wh.filled", b"")
        .file("file", b"file")
        .file(".wh.file", b"")
        .dir("opaque", 0o755)
        .file("opaque/new", b"new")
        .file("opaque/.wh..wh..opq", b"");
    for tar in [before, after] {
        let unpack = unpack_tar(tar.finish());
        unpack.result.as_ref().unwrap();
        assert!(unpack.is_whiteout("dir/gone"));
        assert!(!unpack.is_opaque("dir"));
        for dir in ["both", "filled", "opaque"] {
            assert!(unpack.is_opaque(dir), "{dir}");
            assert_eq!(unpack.text(&format!("{dir}/new")), "new");
        }
        assert_eq!(unpack.text("file"), "file");
        assert!(!unpack.path("opaque/.wh..wh..opq").exists());
    }
    // The layer's root can't be marked; it's said instead.
    let unpack = unpack_tar(
        Tar::default()
            .file("a", b"")
            .file(".wh..wh..opq", b"")
            .finish(),
    );
    assert!(unpack.result.as_ref().unwrap().opaque);
    assert!(!unpack.path(".wh..wh..opq").exists() && !unpack.is_opaque("."));
    assert!(
        !unpack_tar(Tar::default().file("a/.wh..wh..opq", b"").finish())
            .result
            .unwrap()
            .opaque
    );
    // AUFS' own files mean nothing.
    let unpack = unpack_tar(
        Tar::default()
            .dir(".wh..wh.plnk", 0o755)
            .file(".wh..wh.aufs", b"")
            .file(".wh..wh.plnk/1.2", b"")
            .finish(),
    );
    assert_eq!(fs::read_dir(unpack.root()).unwrap().count(), 0);
    for name in [".wh.", "a/.wh..", ".wh...", ".wh.a/b"] {
        let (entry, reason) = refused(Tar::default().file(name, b""));
        assert_eq!(entry, name);
        assert!(reason.contains("whiteout"), "{reason}");
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    if !is_root() {
        return;
    }
    let unpack = unpack_tar(
        Tar::default()
            .file("a", b"first")
            .file("a", b"second, longer")
            .dir("b", 0o755)
            .file("b/c/d", b"deep")
            .file("b", b"now a file")
            .file("c", b"file")
            .dir("c", 0o700)
            .file("c/x", b"x")
            .symlink("s", "c")
            .file("s", b"not through the link")
            .dir("e", 0o700)
            .file("e/keep", b"keep")
            .dir("e", 0o755)
            .file("h1", b"h")
            .file("h2", b"other")
            .hard_link("h2", "h1")
            .hard_link("h1", "h1")
            .symlink("lib", "usr")
            .dir("usr", 0o755)
            .dir("lib/below", 0o755)
            .symlink("lib", "/elsewhere")
            .finish(),
    );
    let unpacked = unpack.result.as_ref().unwrap();
    assert_eq!(unpack.text("a"), "second, longer");
    assert_eq!(unpack.text("b"), "now a file");
    assert_eq!(unpack.text("c/x"), "x");
    assert_eq!(unpack.text("s"), "not through the link");
    assert_eq!(unpack.text("e/keep"), "keep");
    assert_eq!(unpack.path("e").metadata().unwrap().mode() & 0o777, 0o755);
    assert_eq!(unpack.text("h2"), "h");
    let root: Vec<Vec<u8>> = vec![Vec::new()];
    assert_eq!(unpacked.implied, root);
    // The root, a, b, c, c/x, s, e, e/keep, h1, lib, usr, usr/below.
    assert_eq!(unpacked.inodes, 12);
}

#[test]
fn names_that_climb_are_refused() {
    for name in [
        "../x",
        "/../x",
        "a/../../x",
        "a/../x",
        "..",
        "a/..",
        "./../x",
        "a/../../../../../../etc/x",
    ] {
        for kind in [b'0', b'1', b'2', b'5', b'6', b'3'] {
            let (entry, reason) = refused(Tar::default().dir("a", 0o755).raw(
                kind,
                name.as_bytes(),
                b"t",
                0o644,
                b"",
            ));
            assert_eq!(entry, name);
            assert!(reason.contains("climbs"), "{reason}");
        }
    }
    let (_, reason) = refused(Tar::default().pax(&[("path", b"a\0b")]).file("x", b""));
    assert!(reason.contains("NUL"), "{reason}");
    for name in ["", "/", ".", "///"] {
        refused(Tar::default().symlink(name, "/etc"));
    }
}

#[test]
fn absolute_names_are_the_layers_own() {
    let unpack = unpack_tar(Tar::default().file("/etc/slipway-test", b"inside").finish());
    unpack.result.as_ref().unwrap();
    assert_eq!(unpack.text("etc/slipway-test"), "inside");
    assert!(!Path::new("/etc/slipway-test").exists());
}

#[test]
fn links_do_not_lead_out() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), b"secret").unwrap();
    let outside = outside.to_str().unwrap();
    for target in [
        outside,
        "../..",
        "../../outside",
        "/",
        "/proc/self/root",
        "x/../../..",
    ] {
        for last in [
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .file("a/evil", b"evil"),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .dir("a/evil", 0o755),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .file("a/b/evil", b"evil"),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .symlink("b", "a")
                .file("b/evil", b"evil"),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .file("a/.wh.evil", b""),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .file("a/.wh..wh..opq", b""),
            Tar::default()
                .dir("x", 0o755)
                .symlink("a", target)
                .hard_link("evil", "a/secret"),
        ] {
            let (entry, reason) = refused(last);
            assert!(entry.contains("evil") || entry.contains(".wh."), "{entry}");
            assert!(reason.contains("leads out"), "{target}: {reason}");
        }
    }
    for target in [
        "../../../../../../../../etc/passwd",
        "../x",
        "a/../../x",
        "/etc/passwd",
        "missing",
        "dir",
        "",
        ".",
    ] {
        let (entry, reason) = refused(Tar::default().dir("dir", 0o755).hard_link("evil", target));
        assert_eq!(entry, "evil");
        assert!(
            reason.contains("target") || reason.contains("no file of this layer"),
            "{reason}"
        );
    }
    // The file that a symbolic link at the target names is not what is linked.
    let secret = format!("{outside}/secret");
    let unpack = unpack_tar(
        Tar::default()
            .symlink("a", &secret)
            .hard_link("b", "a")
            .finish(),
    );
    unpack.result.as_ref().unwrap();
    assert!(unpack.path("b").symlink_metadata().unwrap().is_symlink());
    // A file over a link replaces the link.
    let unpack = unpack_tar(
        Tar::default()
            .symlink("a", &secret)
            .file("a", b"evil")
            .finish(),
    );
    unpack.result.as_ref().unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside).unwrap().count(), 1);
}

#[test]
fn links_within_the_layer_are_followed() {
    if !is_root() {
        return;
    }
    let unpack = unpack_tar(
        Tar::default()
            .dir("usr/lib", 0o755)
            .symlink("lib", "usr/lib")
            .symlink("usr/up", "../lib")
            .file("lib/a", b"a")
            .file("usr/up/b", b"b")
            .file("lib/.wh.c", b"")
            .hard_link("d", "lib/a")
            .dir("lib/e/", 0o700)
            .finish(),
    );
    unpack.result.as_ref().unwrap();
    assert_eq!(unpack.text("usr/lib/a"), "a");
    assert_eq!(unpack.text("usr/lib/b"), "b");
    assert!(unpack.is_whiteout("usr/lib/c"));
    assert_eq!(unpack.text("d"), "a");
    assert_eq!(
        unpack.path("usr/lib/e").metadata().unwrap().mtime(),
        1_000_000_000
    );
    // A loop and a dangling link are errors, not endless work.
    refused(
        Tar::default()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/x", b""),
    );
    refused(Tar::default().symlink("a", "nowhere").file("a/x", b""));
    refused(Tar::default().file("a", b"").file("a/x", b""));
}

#[test]
fn bad_owners_and_names_are_refused() {
    refused(Tar::default().pax(&[("uid", b"4294967295")]).file("x", b""));
    refused(
        Tar::default()
            .pax(&[("gid", b"99999999999")])
            .file("x", b""),
    );
    let name = "n".repeat(300);
    let (_, reason) = refused(
        Tar::default()
            .pax(&[("path", name.as_bytes())])
            .file("x", b""),
    );
    assert!(reason.contains("longer"), "{reason}");
    let deep = "d/".repeat(3000);
    refused(
        Tar::default()
            .pax(&[("path", deep.as_bytes())])
            .dir("x", 0o755),
    );
}

#[test]
fn sparse_files_keep_their_holes() {
    let size = 10u64 << 30;
    let map = format!("{},4,{},0", size - 4096, size);
    let unpack = unpack_tar(
        Tar::default()
            .pax(&[
                ("GNU.sparse.map", map.as_bytes()),
                ("GNU.sparse.size", size.to_string().as_bytes()),
                ("GNU.sparse.name", b"huge"),
            ])
            .file("x", b"data")
            .file("next", b"next")
            .finish(),
    );
    let unpacked = unpack.result.as_ref().unwrap();
    let metadata = unpack.path("huge").metadata().unwrap();
    assert_eq!(metadata.len(), size);
    assert!(
        metadata.blocks() * 512 < 1 << 20,
        "{} blocks",
        metadata.blocks()
    );
    assert!(unpacked.bytes < 1 << 20);
    let mut file = File::open(unpack.path("huge")).unwrap();
    file.seek(SeekFrom::Start(size - 4096)).unwrap();
    let mut data = [0; 5];
    file.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"data\0");
    assert_eq!(unpack.text("next"), "next");
}

/// However often a directory is named, and whatever was there in between, one time is kept for it.
#[test]
fn what_is_kept_is_bounded() {
    let mut tar = Tar::default();
    for n in 0..2000 {
        tar = tar.dir("again", 0o755).dir(&format!("x/{n}"), 0o755);
    }
    // All of them are replaced.
    tar = tar.file("x", b"").dir("again", 0o700);
    let (dir, written) = (tempfile::tempdir().unwrap(), AtomicU64::new(0));
    let (root, spare) = (dir.path().join("root"), dir.path().join("spare"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&spare).unwrap();
    let mut layer = Layer::new(&root, &spare, &written).unwrap();
    let tar = tar.finish();
    let mut archive = TarReader::new(tar.as_slice());
    while let Some(entry) = archive.next().unwrap() {
        assert!(layer.apply(&entry, &mut archive).is_ok());
        assert!(layer.times.len() <= 2001, "{}", layer.times.len());
    }
    let names: Vec<_> = layer.times.keys().collect();
    assert_eq!(names, [b"again"]);
    assert_eq!(layer.names, "again".len() + NAME_OVERHEAD);
    // A layer can't name more than a machine can remember, by whatever aliases.
    layer.names = MAX_NAMES;
    let tar = Tar::default().dir("one more", 0o755).finish();
    let mut archive = TarReader::new(tar.as_slice());
    let entry = archive.next().unwrap().unwrap();
    assert!(matches!(
        layer.apply(&entry, &mut archive),
        Err(Failure::Refused(reason)) if reason.contains("in all")
    ));
}

#[test]
fn deep_trees_are_unpacked_and_removed() {
    // Deeper than a process may have open files.
    let mut tar = Tar::default();
    let mut name = String::new();
    for _ in 0..1900 {
        name.push_str("d/");
        tar = tar.pax(&[("path", name.as_bytes())]).dir("x", 0o755);
    }
    // Replaced by a file, which removes the tree.
    tar = tar.file("d", b"file");
    let unpack = unpack_tar(tar.finish());
    assert_eq!(unpack.result.as_ref().unwrap().inodes, 2);
    assert_eq!(unpack.text("d"), "file");
}
