//! A process's mounts, as `/proc/<pid>/mountinfo` tells them.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// `major:minor` of its file system.
    pub device: String,
    /// Where it is, in the process's root.
    pub place: PathBuf,
    /// Type of its file system.
    pub kind: String,
}

/// Reads a mount table.
///
/// # Errors
/// When it can't be read.
pub fn read(path: &Path) -> io::Result<Vec<Mounted>> {
    Ok(parse(&std::fs::read(path)?))
}

fn parse(table: &[u8]) -> Vec<Mounted> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let device = text(fields.nth(2)?);
    let place = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let kind = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(Mounted {
        device,
        place,
        kind,
    })
}

/// Undoes the octal escapes of /proc/self/mountinfo (proc(5)).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|d| *first == b'\\' && d.iter().all(|c| (b'0'..b'8').contains(c)));
        match octal {
            Some(d) => {
                out.push(
                    d.iter()
                        .fold(0u8, |n, c| n.wrapping_mul(8).wrapping_add(c - b'0')),
                );
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c"), b"/a b\\c");
        assert_eq!(unescape(br"/a\04"), br"/a\04");
    }

    #[test]
    fn lines_are_read_with_their_optional_fields_and_escapes() {
        let table = b"118 77 0:42 / / rw,relatime - overlay overlay rw\n\
                      124 118 0:39 /x /a\\040b rw shared:1 master:2 - tmpfs x rw\nbroken\n";
        let found = parse(table);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].place, Path::new("/a b"));
        assert_eq!(found[1].kind, "tmpfs");
        assert_eq!(found[1].device, "0:39");
    }
}
