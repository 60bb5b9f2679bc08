//! The table of mounts, `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Where.
    pub point: PathBuf,
    /// File system type.
    pub kind: String,
    /// Options of the mount: `rw`, `nosuid`, …
    pub options: Vec<String>,
    /// Options of the file system: for a v1 cgroup its controllers.
    pub super_options: Vec<String>,
}

impl Mount {
    /// Whether the mount or its file system is read-only.
    pub fn read_only(&self) -> bool {
        [&self.options, &self.super_options]
            .iter()
            .any(|list| list.iter().any(|o| o == "ro"))
    }
}

/// The mounts of this process; none when they can't be read.
pub(crate) fn mounts() -> Vec<Mount> {
    parse(&std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default())
}

/// Lines that are not as they should be are passed over.
pub(crate) fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|b| *b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(4)?)));
    let options = list(fields.next()?);
    // Optional fields, then a dash.
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let super_options = list(rest.nth(1)?);
    Some(Mount {
        point,
        kind,
        options,
        super_options,
    })
}

fn list(field: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(field);
    text.split(',').map(str::to_owned).collect()
}

/// Undoes the octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

/// The mount that a path is on: the last of those with the longest mount point above it.
pub(crate) fn of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts
        .iter()
        .filter(|m| path.starts_with(&m.point))
        .max_by_key(|m| m.point.components().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
33 22 0:28 / /sys/fs/cgroup rw,relatime shared:9 master:2 - tmpfs tmpfs rw,mode=755
35 33 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
40 22 0:31 / /mnt/a\\040b\\134c ro - vfat /dev/x\\040y rw
41 22 0:32 / /mnt/over rw - tmpfs tmpfs rw
42 41 0:33 / /mnt/over rw - overlay overlay ro
43 22
nonsense
";

    #[test]
    fn a_table_is_read() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 6);
        assert_eq!(mounts[2].super_options, ["rw", "cpu", "cpuacct"]);
        assert_eq!(mounts[3].point, Path::new("/mnt/a b\\c"));
        assert!(mounts[3].read_only() && mounts[5].read_only() && !mounts[0].read_only());
    }

    #[test]
    fn the_mount_of_a_path_is_the_nearest_and_topmost() {
        let mounts = parse(TABLE);
        let kind = |path: &str| of(&mounts, Path::new(path)).unwrap().kind.as_str();
        assert_eq!(kind("/var/lib"), "ext4");
        assert_eq!(kind("/mnt/over/x"), "overlay");
        assert_eq!(kind("/mnt/overnot"), "ext4");
        assert_eq!(kind("/sys/fs/cgroup"), "tmpfs");
    }

    #[test]
    fn this_machine_has_a_root() {
        let mounts = mounts();
        assert!(mounts.iter().any(|m| m.point == Path::new("/")));
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(table: Vec<u8>) {
            let _ = parse(&table);
        }

        #[test]
        fn escaped_paths_come_back(path in "[a-z \\\\\t\n#0-9]{0,20}") {
            let escaped: String = path.chars().map(|c| match c {
                ' ' => "\\040".to_owned(),
                '\\' => "\\134".to_owned(),
                '\t' => "\\011".to_owned(),
                '\n' => "\\012".to_owned(),
                c => c.to_string(),
            }).collect();
            proptest::prop_assert_eq!(unescape(escaped.as_bytes()), path.as_bytes());
        }
    }
}
