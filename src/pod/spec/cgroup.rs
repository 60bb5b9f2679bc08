//! Where a pod's and a container's cgroups are.
//!
//! `cgroup_parent` comes in three forms, which all become directories here:
//!
//! | form | pod's cgroup | container's cgroup |
//! | --- | --- | --- |
//! | `/kubepods/burstable/podX` | itself | `<pod>/<id>` |
//! | `kubepods-podX.slice`, also with the slices that it lies in before it | `/kubepods.slice/kubepods-podX.slice` | `<pod>/slipway-<id>.scope` |
//! | `kubepods.slice:prefix:name` | `/kubepods.slice/prefix-name.scope` | `<pod>/<id>` |
//! | empty | `/slipway/<pod id>` | `<pod>/<id>` |

use crate::error::{Result, SpecError, quoted};

const FIELD: &str = "linux.cgroup_parent";
const SUFFIX: &str = ".slice";
/// Names of directories are bounded, and so must paths be with a container's name behind them.
const LONGEST_NAME: usize = 255;
const LONGEST: usize = 3500;

/// Where a pod's cgroup is: an absolute path in the hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodCgroup {
    pub path: String,
    slice: bool,
}

/// The cgroup of a pod that names no parent.
pub fn default_cgroup(pod_id: &str) -> String {
    format!("/slipway/{pod_id}")
}

impl PodCgroup {
    /// The place that `cgroup_parent` names.
    pub fn new(parent: &str, pod_id: &str) -> Result<Self> {
        if parent.is_empty() {
            return Ok(Self {
                path: default_cgroup(pod_id),
                slice: false,
            });
        }
        if parent.chars().any(char::is_control) {
            return Err(wrong(parent, "has a control character in it"));
        }
        let cgroup = if let Some(unit) = scope(parent) {
            unit?
        } else if parent.contains('/') || !parent.ends_with(SUFFIX) {
            let names: Vec<&str> = parent
                .split('/')
                .filter(|n| !n.is_empty() && *n != ".")
                .collect();
            let slice = names.last().is_some_and(|name| name.ends_with(SUFFIX));
            Self {
                path: format!("/{}", names.join("/")),
                slice,
            }
        } else {
            Self {
                path: nested(parent)?,
                slice: true,
            }
        };
        if cgroup.path.split('/').any(|name| name == "..") {
            return Err(wrong(parent, "must not contain \"..\""));
        }
        let long = cgroup.path.split('/').any(|name| name.len() > LONGEST_NAME);
        if long || cgroup.path.len() > LONGEST {
            return Err(wrong(parent, "is too long"));
        }
        Ok(cgroup)
    }

    /// The cgroup of one of its containers.
    pub fn container(&self, id: &str) -> String {
        let pod = self.path.trim_end_matches('/');
        if self.slice {
            format!("{pod}/slipway-{id}.scope")
        } else {
            format!("{pod}/{id}")
        }
    }
}

/// `slice:prefix:name`, if it is that.
fn scope(parent: &str) -> Option<Result<PodCgroup>> {
    if parent.starts_with('/') || !parent.contains(':') {
        return None;
    }
    let parts: Vec<&str> = parent.split(':').collect();
    Some(match parts[..] {
        [slice, prefix, name]
            if !name.is_empty() && !prefix.contains('/') && !name.contains('/') =>
        {
            nested(if slice.is_empty() {
                "system.slice"
            } else {
                slice
            })
            .map(|slice| {
                let name = match prefix {
                    "" => name.to_owned(),
                    _ => format!("{prefix}-{name}"),
                };
                let path = match name.ends_with(SUFFIX) {
                    true => format!("{slice}/{name}"),
                    false => format!("{slice}/{name}.scope"),
                };
                PodCgroup {
                    path: path.replace("//", "/"),
                    slice: false,
                }
            })
        }
        _ => Err(wrong(parent, "is not of the form slice:prefix:name")),
    })
}

/// The directories of a slice: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn nested(slice: &str) -> Result<String> {
    if slice == "-.slice" {
        return Ok("/".to_owned());
    }
    let name = slice.strip_suffix(SUFFIX).filter(|name| !name.is_empty());
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.\\@".contains(c);
    let Some(name) = name.filter(|name| name.chars().all(good)) else {
        let what = "is not a slice of systemd's; write for example kubepods-podX.slice";
        return Err(wrong(slice, what));
    };
    let (mut path, mut unit) = (String::new(), String::new());
    for part in name.split('-') {
        if part.is_empty() {
            return Err(wrong(slice, "has an empty part between its dashes"));
        }
        if !unit.is_empty() {
            unit.push('-');
        }
        unit.push_str(part);
        path.push('/');
        path.push_str(&unit);
        path.push_str(SUFFIX);
        if path.len() > LONGEST {
            return Err(wrong(slice, "is too long"));
        }
    }
    Ok(path)
}

fn wrong(parent: &str, what: &str) -> SpecError {
    SpecError::invalid(FIELD, format!("{} {what}", quoted(parent)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        let cases = [
            ("", "/slipway/pod", "/slipway/pod/c"),
            (
                "/kubepods/burstable/podX",
                "/kubepods/burstable/podX",
                "/kubepods/burstable/podX/c",
            ),
            ("kubepods/podX", "/kubepods/podX", "/kubepods/podX/c"),
            ("/a//./b/", "/a/b", "/a/b/c"),
            ("/", "/", "/c"),
            ("/a:b:c", "/a:b:c", "/a:b:c/c"),
            (
                "kubepods-burstable-pod1_2.slice",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/slipway-c.scope",
            ),
            (
                "/kubepods.slice/kubepods-podX.slice",
                "/kubepods.slice/kubepods-podX.slice",
                "/kubepods.slice/kubepods-podX.slice/slipway-c.scope",
            ),
            ("-.slice", "/", "/slipway-c.scope"),
            (
                "a-b.slice:pre:n",
                "/a.slice/a-b.slice/pre-n.scope",
                "/a.slice/a-b.slice/pre-n.scope/c",
            ),
            ("a.slice::n", "/a.slice/n.scope", "/a.slice/n.scope/c"),
            (
                ":pre:n",
                "/system.slice/pre-n.scope",
                "/system.slice/pre-n.scope/c",
            ),
            ("-.slice:pre:n", "/pre-n.scope", "/pre-n.scope/c"),
        ];
        for (parent, pod, container) in cases {
            let cgroup = PodCgroup::new(parent, "pod").expect(parent);
            assert_eq!(
                (cgroup.path.as_str(), cgroup.container("c").as_str()),
                (pod, container)
            );
        }
    }

    #[test]
    fn what_climbs_or_makes_no_sense_is_refused() {
        let long = format!("{}.slice", "a-".repeat(300) + "a");
        let cases = [
            "..",
            "/../a",
            "/a/../../b",
            "a/..",
            "/a\nb",
            "/a\0",
            "a--b.slice",
            "-a.slice",
            "a-.slice",
            ".slice",
            "a.slice:b",
            "a.slice:b:c:d",
            "a.slice:b:",
            "a.slice:b/..:c",
            "a.slice:b:../c",
            "a:b:c",
            "a b.slice",
            long.as_str(),
        ];
        for parent in cases {
            let error = PodCgroup::new(parent, "pod").expect_err(parent);
            assert_eq!(error.field(), FIELD);
        }
        assert!(PodCgroup::new(&format!("/{}", "a".repeat(256)), "pod").is_err());
    }

    proptest! {
        #[test]
        fn accepted_parents_stay_in_the_hierarchy(
            parent in prop_oneof!["[-a./:\\PC]{0,20}", "[-a.:]{0,9}\\.slice(:[a./]{0,4}){0,3}"]
        ) {
            if let Ok(cgroup) = PodCgroup::new(&parent, "pod") {
                let path = cgroup.container("cid");
                prop_assert!(path.starts_with('/') && !path.contains("//"), "{path}");
                prop_assert!(!path.split('/').any(|n| n == ".." || n == "."), "{path}");
                prop_assert!(path.ends_with("/cid") || path.ends_with("/slipway-cid.scope"));
                prop_assert!(path.starts_with(cgroup.path.trim_end_matches('/')));
            }
        }
    }
}
