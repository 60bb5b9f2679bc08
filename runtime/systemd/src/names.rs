//! Names of units, and the directories that systemd gives them.

/// Ending of a slice's name.
const SLICE: &str = ".slice";
/// Ending of a scope's name.
const SCOPE: &str = ".scope";

/// Whether a cgroup's directory name is a slice's.
pub fn is_slice(name: &str) -> bool {
    name.ends_with(SLICE)
}

/// The unit that a cgroup is of, by the last part of its path: a scope or a slice. `None`: it can't be
/// systemd's.
pub fn unit_of(cgroup: &str) -> Option<&str> {
    let name = cgroup.trim_end_matches('/').rsplit('/').next()?;
    let is_unit = [SLICE, SCOPE]
        .iter()
        .any(|end| name.strip_suffix(end).is_some_and(|n| !n.is_empty()));
    is_unit.then_some(name)
}

/// The cgroup of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)), the root slice `-.slice` is the
/// root. The error says what is wrong with the name.
///
/// # Errors
/// A text that continues "the name ...".
pub fn expand_slice(slice: &str) -> Result<String, &'static str> {
    if slice == "-.slice" {
        return Ok("/".to_owned());
    }
    let name = slice.strip_suffix(SLICE).filter(|name| !name.is_empty());
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.\\@".contains(c);
    let Some(name) = name.filter(|name| name.chars().all(good)) else {
        return Err("is not a slice of systemd's; write for example kubepods-podX.slice");
    };
    let (mut path, mut unit) = (String::new(), String::new());
    for part in name.split('-') {
        if part.is_empty() {
            return Err("has an empty part between its dashes");
        }
        if !unit.is_empty() {
            unit.push('-');
        }
        unit.push_str(part);
        path.push('/');
        path.push_str(&unit);
        path.push_str(SLICE);
        // Names of directories are bounded; this also bounds the work.
        if path.len() > 4096 {
            return Err("is too long");
        }
    }
    Ok(path)
}

/// The D-Bus object of a unit: what is neither letter nor digit becomes `_` and its number (and so does a
/// leading digit).
pub(crate) fn object_path(unit: &str) -> String {
    let mut path = "/org/freedesktop/systemd1/unit/".to_owned();
    for (i, b) in unit.bytes().enumerate() {
        if b.is_ascii_alphabetic() || (i > 0 && b.is_ascii_digit()) {
            path.push(char::from(b));
        } else {
            path.push_str(&format!("_{b:02x}"));
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_nested() {
        let cases = [
            ("-.slice", "/"),
            ("a.slice", "/a.slice"),
            ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"),
            (
                "kubepods-burstable-pod1_2.slice",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
            ),
        ];
        for (slice, path) in cases {
            assert_eq!(expand_slice(slice).as_deref(), Ok(path));
        }
        let long = format!("{}a.slice", "a-".repeat(300));
        for bad in [
            "",
            ".slice",
            "a",
            "a--b.slice",
            "-a.slice",
            "a-.slice",
            "a/b.slice",
            &long,
        ] {
            assert!(expand_slice(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn units_are_told_by_their_names() {
        assert_eq!(unit_of("/a.slice/slipway-1.scope"), Some("slipway-1.scope"));
        assert_eq!(unit_of("/a.slice/a-b.slice/"), Some("a-b.slice"));
        for path in ["/", "", "/kubepods/podX/abc", "/a.slice/abc", "/.scope"] {
            assert_eq!(unit_of(path), None, "{path}");
        }
    }

    #[test]
    fn object_paths_are_escaped() {
        assert_eq!(
            object_path("slipway-4f.scope"),
            "/org/freedesktop/systemd1/unit/slipway_2d4f_2escope"
        );
        assert_eq!(
            object_path("4.scope"),
            "/org/freedesktop/systemd1/unit/_34_2escope"
        );
    }
}
