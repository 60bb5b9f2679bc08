//! Where a pod's and a container's cgroups are.
//!
//! `cgroup_parent` comes in three forms. With the cgroupfs driver they all become directories:
//!
//! | form | pod's cgroup | container's cgroup |
//! | --- | --- | --- |
//! | `/kubepods/burstable/podX` | itself | `<pod>/<id>` |
//! | `kubepods-podX.slice`, also with the slices that it lies in before it | `/kubepods.slice/kubepods-podX.slice` | `<pod>/slipway-<id>.scope` |
//! | `kubepods.slice:prefix:name` | `/kubepods.slice/prefix-name.scope` | `<pod>/<id>` |
//! | empty | `/slipway/<pod id>` | `<pod>/<id>` |
//!
//! The last two rows but one are refused where systemd is PID 1: what is made in its slices without asking
//! it may be taken away again. With the systemd driver, pods are slices and containers scopes:
//!
//! | form | pod's slice | container's scope |
//! | --- | --- | --- |
//! | `kubepods-podX.slice`, also with the slices that it lies in before it | itself | `slipway-<id>.scope` |
//! | `kubepods.slice:prefix:name` | `kubepods.slice` | `prefix-name-<id>.scope` |
//! | empty | `slipway-<pod id>.slice` | `slipway-<id>.scope` |
//! | any other | refused | |

use crate::error::{Result, SpecError, quoted};
use slipway_systemd::expand_slice;

const FIELD: &str = "linux.cgroup_parent";
const SUFFIX: &str = ".slice";
const PREFIX: &str = "slipway";
/// Names of directories are bounded, and so must paths be with a container's name behind them.
const LONGEST_NAME: usize = 255;
const LONGEST: usize = 3500;
/// What a scope's name has besides its prefix: a dash, the id of a container, the ending.
const LONGEST_PREFIX: usize = LONGEST_NAME - 64 - "-.scope".len();

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    /// Slipway, in the file system.
    #[default]
    Cgroupfs,
    /// systemd, when asked.
    Systemd,
}

/// What the place of a cgroup depends on besides the parent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub driver: CgroupDriver,
    /// systemd is PID 1 of this host.
    pub systemd: bool,
}

/// Where a pod's cgroup is: an absolute path in the hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodCgroup {
    pub path: String,
    /// Containers are scopes, whose names begin so; `None`: directories of the container's id.
    scopes: Option<String>,
}

/// The cgroups of a pod that names no parent: with the cgroupfs driver, and with systemd's.
pub fn default_cgroups(pod_id: &str) -> [String; 2] {
    [
        format!("/slipway/{pod_id}"),
        format!("/{PREFIX}{SUFFIX}/{PREFIX}-{pod_id}{SUFFIX}"),
    ]
}

impl PodCgroup {
    /// The place that `cgroup_parent` names.
    pub fn new(parent: &str, pod_id: &str, rules: Rules) -> Result<Self> {
        if parent.chars().any(char::is_control) {
            return Err(wrong(parent, "has a control character in it"));
        }
        let cgroup = match rules.driver {
            CgroupDriver::Cgroupfs => Self::directories(parent, pod_id, rules.systemd)?,
            CgroupDriver::Systemd => Self::units(parent, pod_id)?,
        };
        if cgroup.path.split('/').any(|name| name == "..") {
            return Err(wrong(parent, "must not contain \"..\""));
        }
        let long = cgroup.path.split('/').any(|name| name.len() > LONGEST_NAME);
        let prefix = cgroup.scopes.as_ref().map_or(0, String::len);
        if long || cgroup.path.len() > LONGEST || prefix > LONGEST_PREFIX {
            return Err(wrong(parent, "is too long"));
        }
        Ok(cgroup)
    }

    fn directories(parent: &str, pod_id: &str, systemd: bool) -> Result<Self> {
        if parent.is_empty() {
            let [path, _] = default_cgroups(pod_id);
            return Ok(Self { path, scopes: None });
        }
        let (cgroup, unit) = if let Some(parts) = scope_form(parent) {
            let [slice, prefix, name] = parts?;
            let slice = nested(slice)?;
            let name = joined(prefix, name);
            let path = match name.ends_with(SUFFIX) {
                true => format!("{slice}/{name}"),
                false => format!("{slice}/{name}.scope"),
            };
            let path = path.replace("//", "/");
            (Self { path, scopes: None }, true)
        } else if parent.contains('/') || !parent.ends_with(SUFFIX) {
            let names = names(parent);
            let slice = names.last().is_some_and(|name| name.ends_with(SUFFIX));
            let cgroup = Self {
                path: format!("/{}", names.join("/")),
                scopes: slice.then(|| PREFIX.to_owned()),
            };
            (cgroup, slice)
        } else {
            let cgroup = Self {
                path: nested(parent)?,
                scopes: Some(PREFIX.to_owned()),
            };
            (cgroup, true)
        };
        if unit && systemd {
            let what = "is a slice of systemd's, which is PID 1 here, but Slipway's cgroup.driver is \
                        \"cgroupfs\": set cgroup.driver to \"systemd\", or the kubelet's \
                        cgroupDriver to cgroupfs";
            return Err(mismatch(parent, what));
        }
        Ok(cgroup)
    }

    fn units(parent: &str, pod_id: &str) -> Result<Self> {
        if parent.is_empty() {
            let [_, path] = default_cgroups(pod_id);
            return Ok(Self {
                path,
                scopes: Some(PREFIX.to_owned()),
            });
        }
        if let Some(parts) = scope_form(parent) {
            let [slice, prefix, name] = parts?;
            let prefix = joined(prefix, name);
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.\\@".contains(c);
            if !prefix.chars().all(good) {
                return Err(wrong(parent, "has characters that no unit's name has"));
            }
            return Ok(Self {
                path: nested(slice)?,
                scopes: Some(prefix),
            });
        }
        let names = names(parent);
        let Some(slice) = names.last().filter(|name| name.ends_with(SUFFIX)) else {
            let what = "is no slice of systemd's, but Slipway's cgroup.driver is \"systemd\": set the \
                        kubelet's cgroupDriver to systemd, or cgroup.driver to \"cgroupfs\"";
            return Err(mismatch(parent, what));
        };
        let path = nested(slice)?;
        if parent.contains('/') && path != format!("/{}", names.join("/")) {
            let what = format!("is not where systemd has {slice}: that is {path}");
            return Err(wrong(parent, &what));
        }
        Ok(Self {
            path,
            scopes: Some(PREFIX.to_owned()),
        })
    }

    /// The cgroup of one of its containers.
    pub fn container(&self, id: &str) -> String {
        let pod = self.path.trim_end_matches('/');
        match &self.scopes {
            Some(prefix) => format!("{pod}/{prefix}-{id}.scope"),
            None => format!("{pod}/{id}"),
        }
    }
}

fn names(parent: &str) -> Vec<&str> {
    parent
        .split('/')
        .filter(|n| !n.is_empty() && *n != ".")
        .collect()
}

/// `slice:prefix:name`, if it is that; the slice is never empty.
fn scope_form(parent: &str) -> Option<Result<[&str; 3]>> {
    if parent.starts_with('/') || !parent.contains(':') {
        return None;
    }
    let parts: Vec<&str> = parent.split(':').collect();
    Some(match parts[..] {
        [slice, prefix, name]
            if !name.is_empty() && !prefix.contains('/') && !name.contains('/') =>
        {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            Ok([slice, prefix, name])
        }
        _ => Err(wrong(parent, "is not of the form slice:prefix:name")),
    })
}

fn joined(prefix: &str, name: &str) -> String {
    match prefix {
        "" => name.to_owned(),
        _ => format!("{prefix}-{name}"),
    }
}

/// The directories of a slice.
fn nested(slice: &str) -> Result<String> {
    expand_slice(slice).map_err(|what| wrong(slice, what))
}

fn wrong(parent: &str, what: &str) -> SpecError {
    SpecError::invalid(FIELD, format!("{} {what}", quoted(parent)))
}

/// The kubelet's driver is not ours: right in itself, but not on this node as it is.
fn mismatch(parent: &str, what: &str) -> SpecError {
    SpecError::precondition(FIELD, format!("{} {what}", quoted(parent)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::{FailedPrecondition, Invalid};
    use proptest::prelude::*;

    const DIRECTORIES: Rules = Rules {
        driver: CgroupDriver::Cgroupfs,
        systemd: false,
    };
    const UNITS: Rules = Rules {
        driver: CgroupDriver::Systemd,
        systemd: true,
    };

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
            let cgroup = PodCgroup::new(parent, "pod", DIRECTORIES).expect(parent);
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
            let error = PodCgroup::new(parent, "pod", DIRECTORIES).expect_err(parent);
            assert_eq!(error.field(), FIELD);
        }
        assert!(PodCgroup::new(&format!("/{}", "a".repeat(256)), "pod", DIRECTORIES).is_err());
    }

    #[test]
    fn systemd_gets_slices_and_scopes() {
        let slices = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice";
        let cases = [
            ("", "/slipway.slice/slipway-pod.slice", "slipway-c.scope"),
            ("kubepods-burstable-pod1_2.slice", slices, "slipway-c.scope"),
            (slices, slices, "slipway-c.scope"),
            ("-.slice", "/", "slipway-c.scope"),
            ("a-b.slice:pre:n", "/a.slice/a-b.slice", "pre-n-c.scope"),
            (":pre:n", "/system.slice", "pre-n-c.scope"),
            ("a.slice::n", "/a.slice", "n-c.scope"),
        ];
        for (parent, pod, scope) in cases {
            let cgroup = PodCgroup::new(parent, "pod", UNITS).expect(parent);
            assert_eq!(cgroup.path, pod);
            let container = format!("{}/{scope}", pod.trim_end_matches('/'));
            assert_eq!(cgroup.container("c"), container);
        }
        for bad in [
            "/a.slice/kubepods-podX.slice",
            "/kubepods-podX.slice/",
            "a--b.slice",
            "a.slice:b",
            "a.slice:b c:d",
            "a.slice:b:c/d",
            "a\n.slice",
            &format!("a.slice:{}:n", "b".repeat(190)),
        ] {
            let error = PodCgroup::new(bad, "pod", UNITS).expect_err(bad);
            assert_eq!((error.kind(), error.field()), (Invalid, FIELD), "{bad}");
        }
    }

    #[test]
    fn the_other_drivers_form_is_refused_with_the_fix() {
        for parent in ["/kubepods/burstable/podX", "kubepods", "/", "/a.slice/b"] {
            let error = PodCgroup::new(parent, "pod", UNITS).expect_err(parent);
            assert_eq!(error.kind(), FailedPrecondition, "{parent}");
            assert!(error.to_string().contains("cgroupDriver to systemd"));
        }
        let on_systemd = Rules {
            systemd: true,
            ..DIRECTORIES
        };
        for parent in ["kubepods-podX.slice", "/a.slice", "a.slice:b:c"] {
            let error = PodCgroup::new(parent, "pod", on_systemd).expect_err(parent);
            assert_eq!(error.kind(), FailedPrecondition, "{parent}");
            assert!(error.to_string().contains("cgroupDriver to cgroupfs"));
        }
        // In a scope that was delegated to whoever started the kubelet.
        for parent in ["", "/kubepods/podX", "/system.slice/x.scope/kubepods/podX"] {
            assert!(
                PodCgroup::new(parent, "pod", on_systemd).is_ok(),
                "{parent}"
            );
        }
    }

    proptest! {
        #[test]
        fn accepted_parents_stay_in_the_hierarchy(
            parent in prop_oneof!["[-a./:\\PC]{0,20}", "[-a.:]{0,9}\\.slice(:[a./]{0,4}){0,3}"]
        ) {
            for rules in [DIRECTORIES, UNITS] {
                let Ok(cgroup) = PodCgroup::new(&parent, "pod", rules) else {
                    continue;
                };
                let path = cgroup.container("cid");
                prop_assert!(path.starts_with('/') && !path.contains("//"), "{path}");
                prop_assert!(!path.split('/').any(|n| n == ".." || n == "."), "{path}");
                prop_assert!(path.ends_with("/cid") || path.ends_with("-cid.scope"));
                prop_assert!(path.starts_with(cgroup.path.trim_end_matches('/')));
            }
        }
    }
}
