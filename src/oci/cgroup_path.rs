//! Which cgroup a container is in (config-linux.md, "Cgroups Path"), and under systemd which scope.

use std::path::{Component, Path, PathBuf};

use crate::{OciError, Result};

/// The parent of containers that name no cgroup, and of relative paths.
const PARENT: &str = "/slipway-oci";

/// The cgroup of a container, absolute in its hierarchy. Under the systemd driver the specification says
/// `slice:prefix:name`, as for runc.
///
/// # Errors
/// [`OciError::Spec`].
pub fn resolve(wanted: Option<&Path>, id: &str, systemd: bool) -> Result<PathBuf> {
    let wanted = wanted.filter(|path| !path.as_os_str().is_empty());
    if systemd {
        return scope(wanted, id);
    }
    let refused = |reason: &str| Err(OciError::spec("linux.cgroupsPath", reason));
    let Some(path) = wanted else {
        return Ok(Path::new(PARENT).join(id));
    };
    if path.components().any(|part| part == Component::ParentDir) {
        return refused("it must not lead upwards (..)");
    }
    if path.to_str().is_some_and(|text| text.contains(':')) {
        return refused("it is slice:prefix:name, which needs --systemd-cgroup");
    }
    // A container's cgroup is emptied and removed with it.
    if path.components().all(|part| part == Component::RootDir) {
        return refused(
            "a container can't be in the root of the hierarchy; name a cgroup of its own",
        );
    }
    Ok(match path.is_absolute() {
        true => path.to_owned(),
        false => Path::new(PARENT).join(path),
    })
}

fn scope(wanted: Option<&Path>, id: &str) -> Result<PathBuf> {
    let refused = |reason: String| OciError::spec("linux.cgroupsPath", reason);
    let text = match wanted {
        None => format!("system.slice:slipway:{id}"),
        Some(path) => {
            let text = path.to_str();
            text.ok_or_else(|| refused("it is no text".to_owned()))?
                .to_owned()
        }
    };
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts.as_slice() else {
        return Err(refused(format!(
            "{text:?} is not slice:prefix:name, which --systemd-cgroup needs"
        )));
    };
    if name.is_empty() || [slice, prefix, name].iter().any(|part| part.contains('/')) {
        return Err(refused(format!("{text:?} is no unit of systemd's")));
    }
    if name.ends_with(".slice") {
        return Err(refused(format!(
            "{name} is a slice; a container is a scope"
        )));
    }
    let unit = match *prefix {
        "" => format!("{name}.scope"),
        prefix => format!("{prefix}-{name}.scope"),
    };
    let slice = match *slice {
        "" => "system.slice",
        slice => slice,
    };
    let slice = nested(slice).ok_or_else(|| refused(format!("{slice:?} is no slice")))?;
    Ok(slice.join(unit))
}

/// Where a slice is: each dash is one level (systemd.slice(5)).
fn nested(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::from("/");
    if name == "-" {
        return Some(path);
    }
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !so_far.is_empty() {
            so_far.push('-');
        }
        so_far.push_str(part);
        path.push(format!("{so_far}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_of_the_containers_own() {
        let of = |path: &str| {
            resolve(Some(Path::new(path)), "c", false).map(|p| p.display().to_string())
        };
        assert_eq!(of("/a/b").unwrap(), "/a/b");
        assert_eq!(of("a/b").unwrap(), "/slipway-oci/a/b");
        assert_eq!(of("").unwrap(), "/slipway-oci/c");
        for bad in ["/", "//", "/a/../..", "..", "a.slice:b:c"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn scopes_are_in_nested_slices() {
        let of =
            |path: &str| resolve(Some(Path::new(path)), "c", true).map(|p| p.display().to_string());
        assert_eq!(
            of("machine-a.slice:libpod:x").unwrap(),
            "/machine.slice/machine-a.slice/libpod-x.scope"
        );
        assert_eq!(of("-.slice::x").unwrap(), "/x.scope");
        assert_eq!(of(":p:x").unwrap(), "/system.slice/p-x.scope");
        assert_eq!(of("").unwrap(), "/system.slice/slipway-c.scope");
        for bad in [
            "/a/b",
            "a:b",
            "a:b:c",
            "a.slice:b:",
            "a.slice:b:c.slice",
            "a--b.slice::x",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
