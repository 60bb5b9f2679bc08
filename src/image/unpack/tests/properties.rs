//! Whatever an archive holds, unpacking it neither escapes nor panics.

use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("a"),
        Just("b"),
        Just("c"),
        Just(".."),
        Just("."),
        Just(""),
        Just(".wh.a"),
        Just(".wh..wh..opq"),
        Just(".wh.."),
    ];
    prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
}

fn entry() -> impl Strategy<Value = (u8, String, String)> {
    let kind = prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'5'), Just(b'6')];
    let target = prop_oneof![
        name(),
        name().prop_map(|name| format!("/{name}")),
        Just("../../..".to_owned())
    ];
    (kind, name(), target)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the entries are, nothing outside of the root changes (`unpack_tar` looks), and
    /// the accounts agree with what is there.
    #[test]
    fn nothing_escapes(entries in prop::collection::vec(entry(), 0..12)) {
        if !is_root() {
            return Ok(());
        }
        let mut tar = Tar::default();
        for (kind, name, target) in &entries {
            let data: &[u8] = if *kind == b'0' { b"data" } else { b"" };
            tar = tar.raw(*kind, name.as_bytes(), target.as_bytes(), 0o755, data);
        }
        let unpack = unpack_tar(tar.finish());
        if let Ok(unpacked) = &unpack.result {
            let mut inodes = std::collections::HashSet::new();
            let mut dirs = vec![unpack.root()];
            while let Some(dir) = dirs.pop() {
                inodes.insert(dir.symlink_metadata().unwrap().ino());
                for entry in fs::read_dir(dir).unwrap() {
                    let entry = entry.unwrap();
                    prop_assert!(!entry.file_name().to_string_lossy().starts_with(".wh."));
                    if entry.file_type().unwrap().is_dir() {
                        dirs.push(entry.path());
                    }
                    inodes.insert(entry.metadata().unwrap().ino());
                }
            }
            // Removing one of several hard links counts as an inode, so the account is a lower bound.
            prop_assert!(unpacked.inodes <= inodes.len() as u64);
        }
    }

    /// Damaged archives are errors, never panics.
    #[test]
    fn damaged_archives_are_errors(at in 0usize..6000, byte: u8, cut in 0usize..7000) {
        let mut tar = Tar::default()
            .dir("a", 0o755)
            .pax(&[("SCHILY.xattr.user.x", b"y"), ("mtime", b"1.5")])
            .file("a/b", b"data")
            .hard_link("c", "a/b")
            .pax(&[("GNU.sparse.map", b"0,4"), ("GNU.sparse.size", b"100")])
            .file("s", b"data")
            .symlink("l", "a")
            .finish();
        let at = at % tar.len();
        tar[at] = byte;
        // A checksum that fits, so that the damage is seen by what reads the fields.
        let block = at / 512 * 512;
        let header = &mut tar[block..block + 512];
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.truncate(cut.max(1));
        drop(unpack_tar(tar));
    }

    #[test]
    fn random_bytes_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = TarReader::new(bytes.as_slice());
        while let Ok(Some(_)) = reader.next() {}
    }
}
