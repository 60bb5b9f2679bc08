use std::process::Command;

use super::*;
use crate::testing::Tar;

fn read_all(tar: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(tar);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut data = Vec::new();
        reader.read_to_end(&mut data).map_err(TarError::Read)?;
        entries.push((entry, data));
    }
    Ok(entries)
}

#[test]
fn numbers_parse() {
    assert_eq!(number(b"0000644\0"), Some(0o644));
    assert_eq!(number(b"   644 \0"), Some(0o644));
    assert_eq!(number(b"\0\0\0\0"), Some(0));
    assert_eq!(number(b"        "), Some(0));
    assert_eq!(number(b"77777777777"), Some(0o77_777_777_777));
    assert_eq!(number(b"00009"), None);
    assert_eq!(number(b"-1"), None);
    let mut large = [0u8; 12];
    large[0] = 0x80;
    large[4] = 0x12;
    assert_eq!(number(&large), Some(0x1200_0000_0000_0000));
    large[1] = 1;
    assert_eq!(number(&large), None, "more than 64 bits");
    assert_eq!(number(&[0xff; 12]).map(|n| n as i64), Some(-1));
    assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 7]), Some(7));
    assert_eq!(number(&[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
}

#[test]
fn long_names_of_all_formats() {
    let name = format!("{}/{}", "a".repeat(150), "b".repeat(200));
    let gnu = Tar::default()
        .raw(
            b'L',
            b"././@LongLink",
            b"",
            0,
            format!("{name}\0").as_bytes(),
        )
        .raw(
            b'K',
            b"././@LongLink",
            b"",
            0,
            format!("{name}\0").as_bytes(),
        )
        .symlink("short", "short")
        .finish();
    let pax = Tar::default()
        .raw(b'g', b"global", b"", 0, b"11 path=bad\n")
        .pax(&[("path", name.as_bytes()), ("linkpath", name.as_bytes())])
        .symlink("short", "short")
        .file("next", b"next")
        .finish();
    for tar in [gnu, pax] {
        let entries = read_all(&tar).unwrap();
        assert_eq!(entries[0].0.name, name.as_bytes());
        assert_eq!(entries[0].0.kind, Kind::Symlink(name.clone().into_bytes()));
        // What was said for one entry is not said for the next.
        assert!(
            entries
                .get(1)
                .is_none_or(|(entry, data)| entry.name == b"next" && data == b"next")
        );
    }
    // The ustar prefix.
    let mut header = tar::Header::new_ustar();
    header
        .set_path(format!("{}/{}", "p".repeat(120), "n".repeat(90)))
        .unwrap();
    header.set_size(0);
    header.set_entry_type(tar::EntryType::Regular);
    let entries = read_all(&Tar::default().header(header).finish()).unwrap();
    assert_eq!(entries[0].0.name.len(), 211);
}

/// As many attributes as fit into one header are no work to speak of.
#[test]
fn many_attributes_are_read_in_no_time() {
    let names: Vec<String> = (0..30_000)
        .map(|n| format!("SCHILY.xattr.user.{n}"))
        .collect();
    let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
    let tar = Tar::default().pax(&records).file("x", b"").finish();
    let started = std::time::Instant::now();
    assert_eq!(read_all(&tar).unwrap()[0].0.xattrs.len(), names.len());
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn bounds_hold() {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().linkflag = [b'L'];
    header.set_size(1 << 40);
    let error = read_all(&Tar::default().header(header).finish()).unwrap_err();
    assert!(error.to_string().contains("bytes"), "{error}");
    // However many headers they are spread over.
    let record = vec![b'v'; 200 << 10];
    let several = |count: u8| {
        let mut tar = Tar::default();
        for n in 0..count {
            let key = format!("SCHILY.xattr.user.{n}");
            tar = tar.pax(&[(key.as_str(), record.as_slice())]);
        }
        tar.raw(b'L', b"long", b"", 0, &[b'n'; 90 << 10])
    };
    let read = read_all(&several(4).file("x", b"").file("y", b"").finish()).unwrap();
    assert_eq!((read[0].0.xattrs.len(), read[1].0.xattrs.len()), (4, 0));
    let error = read_all(&several(5).file("x", b"").finish()).unwrap_err();
    assert!(error.to_string().contains("PAX headers"), "{error}");
    // Each entry has its own allowance.
    let twice = [several(4).file("x", b""), several(4).file("y", b"")].map(|tar| {
        let tar = tar.finish();
        tar[..tar.len() - 1024].to_vec()
    });
    assert_eq!(read_all(&twice.concat()).unwrap().len(), 2);
    let mut header = tar::Header::new_gnu();
    header.set_size(u64::MAX);
    assert!(read_all(&Tar::default().header(header.clone()).finish()).is_err());
    // An archive without the mark at its end is fine, one that ends in an entry is not.
    let tar = Tar::default().file("a", b"data").finish();
    assert_eq!(read_all(&tar[..1024]).unwrap().len(), 1);
    assert!(read_all(&tar[..514]).is_err());
    assert!(read_all(&tar[..100]).is_err());
    assert!(read_all(&Tar::default().raw(b'Z', b"x", b"", 0, b"").finish()).is_err());
}

#[test]
fn bad_sparse_maps_are_refused() {
    for (map, size) in [
        ("0,5", "100"),
        ("0,4", "3"),
        ("10,2,0,2", "100"),
        ("0,3,2,1", "100"),
        ("18446744073709551615,4", "100"),
        ("0", "100"),
    ] {
        let tar = Tar::default()
            .pax(&[
                ("GNU.sparse.map", map.as_bytes()),
                ("GNU.sparse.size", size.as_bytes()),
            ])
            .file("x", b"data")
            .finish();
        assert!(read_all(&tar).is_err(), "{map}");
    }
    for text in ["1\n0\n", "99999999999\n", "x\n", "1\n0\n4", "\n"] {
        let tar = Tar::default()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", b"4"),
            ])
            .file("x", text.as_bytes())
            .finish();
        assert!(read_all(&tar).is_err(), "{text:?}");
    }
}

/// What GNU tar writes is read as what it is, in every one of its formats.
#[test]
fn archives_of_gnu_tar() {
    use std::os::unix::fs::FileExt as _;
    if Command::new("tar").arg("--version").output().is_err() {
        println!("SKIPPED: there's no GNU tar");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("sparse")).unwrap();
    // More pieces than fit into one header and one extension block.
    let offsets: Vec<u64> = (0..40).map(|n| n * (1 << 20)).collect();
    for offset in &offsets {
        file.write_all_at(&[b'x'; 4096], *offset).unwrap();
    }
    file.set_len(100 << 20).unwrap();
    std::fs::write(dir.path().join("zz-plain"), b"plain").unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let output = Command::new("tar")
            .args(["--sparse", "-C"])
            .arg(dir.path())
            .args(format)
            .args(["-cf", "-", "sparse", "zz-plain"])
            .output()
            .unwrap();
        assert!(output.status.success());
        let entries = read_all(&output.stdout).unwrap();
        let (sparse, data) = &entries[0];
        assert_eq!(
            (sparse.name.as_slice(), sparse.size),
            (&b"sparse"[..], 100 << 20),
            "{format:?}"
        );
        let pieces = sparse.segments.as_ref().unwrap();
        let found: Vec<u64> = pieces
            .iter()
            .filter(|piece| piece.length > 0)
            .map(|piece| piece.offset)
            .collect();
        assert_eq!(found, offsets, "{format:?}");
        assert!(
            data.len() == 40 * 4096 && data.iter().all(|byte| *byte == b'x'),
            "{format:?}"
        );
        assert_eq!(entries[1].1, b"plain");
    }
}
