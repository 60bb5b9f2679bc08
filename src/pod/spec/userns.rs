//! User namespaces (KEP-127): which of the pod's ids are which of the host's.
//!
//! One range of users and one of groups, as the kubelet hands them out and as the peers take them; both begin at
//! the container's 0, since nothing works in a container without a root.

use crate::error::{Result, SpecError};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use slipway_proto::cri::{self, NamespaceMode as Mode};

/// Ids of a user namespace, or of a mapped mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdMaps {
    /// Users.
    pub uids: LinuxIdMapping,
    /// Groups.
    pub gids: LinuxIdMapping,
}

impl IdMaps {
    /// Both ranges, checked.
    fn new(uids: (&str, &[cri::IdMapping]), gids: (&str, &[cri::IdMapping])) -> Result<Self> {
        Ok(Self {
            uids: range(uids.0, uids.1)?,
            gids: range(gids.0, gids.1)?,
        })
    }
}

/// Which ids a pod asks for; `None`: the host's, all of them.
pub(crate) fn of_options(
    field: &str,
    options: Option<&cri::UserNamespace>,
) -> Result<Option<IdMaps>> {
    let Some(options) = options else {
        return Ok(None);
    };
    let mode = Mode::try_from(options.mode).map_err(|_| {
        SpecError::invalid(
            field,
            format!("there is no namespace mode {}", options.mode),
        )
    })?;
    match mode {
        Mode::Node if options.uids.is_empty() && options.gids.is_empty() => Ok(None),
        Mode::Node => Err(SpecError::invalid(
            field,
            "mode NODE has no mappings; drop them or use POD",
        )),
        Mode::Pod => IdMaps::new(
            (&format!("{field}.uids"), &options.uids),
            (&format!("{field}.gids"), &options.gids),
        )
        .map(Some),
        other => {
            let what = format!(
                "{} makes no sense here; a user namespace is POD or NODE",
                other.as_str_name()
            );
            Err(SpecError::invalid(field, what))
        }
    }
}

/// How a mount's owners are mapped; `None`: not at all.
pub(crate) fn of_mount(field: &str, mount: &cri::Mount) -> Result<Option<IdMaps>> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(None);
    }
    IdMaps::new(
        (&format!("{field}.uidMappings"), &mount.uid_mappings),
        (&format!("{field}.gidMappings"), &mount.gid_mappings),
    )
    .map(Some)
}

fn range(field: &str, mappings: &[cri::IdMapping]) -> Result<LinuxIdMapping> {
    let [mapping] = mappings else {
        let what = format!(
            "has {} mappings; exactly one is needed, such as container_id 0, host_id 65536, length 65536",
            mappings.len()
        );
        return Err(SpecError::invalid(field, what));
    };
    let wrong = |what: String| Err(SpecError::invalid(format!("{field}[0]"), what));
    if mapping.container_id != 0 {
        return wrong(format!(
            "begins at {} in the container; id 0 has to be mapped, so begin there",
            mapping.container_id
        ));
    }
    if mapping.length == 0 {
        return wrong("maps nothing: its length is 0; the kubelet gives a pod 65536 ids".into());
    }
    if mapping.host_id == 0 {
        return wrong("gives the container the host's root (host_id 0); use other ids".into());
    }
    // The last id, 4294967295, means "none" in system calls.
    if mapping.host_id.checked_add(mapping.length).is_none() {
        return wrong(format!(
            "ends beyond the last id of the host: {} + {} is more than 4294967295",
            mapping.host_id, mapping.length
        ));
    }
    LinuxIdMappingBuilder::default()
        .container_id(mapping.container_id)
        .host_id(mapping.host_id)
        .size(mapping.length)
        .build()
        .map_err(|e| SpecError::invalid(field, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::Invalid;
    use proptest::prelude::*;

    fn ids(container_id: u32, host_id: u32, length: u32) -> cri::IdMapping {
        cri::IdMapping {
            container_id,
            host_id,
            length,
        }
    }

    fn options(
        mode: i32,
        uids: &[cri::IdMapping],
        gids: &[cri::IdMapping],
    ) -> Result<Option<IdMaps>> {
        let options = cri::UserNamespace {
            mode,
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        };
        of_options("userns_options", Some(&options))
    }

    const GOOD: cri::IdMapping = cri::IdMapping {
        host_id: 65536,
        container_id: 0,
        length: 65536,
    };

    #[test]
    fn what_the_kubelet_gives_is_taken() {
        let pod = Mode::Pod.into();
        assert_eq!(of_options("x", None), Ok(None));
        assert_eq!(options(Mode::Node.into(), &[], &[]), Ok(None));
        let maps = options(pod, &[GOOD], &[ids(0, 200_000, 1000)])
            .expect("good")
            .expect("maps");
        assert_eq!((maps.uids.host_id(), maps.uids.size()), (65536, 65536));
        assert_eq!((maps.gids.host_id(), maps.gids.size()), (200_000, 1000));
        let top = options(pod, &[ids(0, u32::MAX - 10, 10)], &[GOOD]);
        assert!(top.is_ok());
    }

    #[test]
    fn everything_else_is_refused_with_its_field() {
        let pod = Mode::Pod.into();
        let many: Vec<_> = (0..400).map(|n| ids(n, 1000 + n, 1)).collect();
        let cases: &[(i32, &[cri::IdMapping], &[cri::IdMapping], &str)] = &[
            (Mode::Node.into(), &[GOOD], &[], "userns_options"),
            (Mode::Container.into(), &[], &[], "userns_options"),
            (Mode::Target.into(), &[GOOD], &[GOOD], "userns_options"),
            (17, &[GOOD], &[GOOD], "userns_options"),
            (pod, &[], &[], "userns_options.uids"),
            (pod, &[GOOD], &[], "userns_options.gids"),
            (
                pod,
                &[GOOD, ids(0, 2000, 9)],
                &[GOOD],
                "userns_options.uids",
            ),
            (pod, &many, &[GOOD], "userns_options.uids"),
            (pod, &[ids(1, 1000, 9)], &[GOOD], "userns_options.uids[0]"),
            (pod, &[ids(0, 1000, 0)], &[GOOD], "userns_options.uids[0]"),
            (pod, &[GOOD], &[ids(0, 0, 1000)], "userns_options.gids[0]"),
            (
                pod,
                &[ids(0, u32::MAX - 5, 6)],
                &[GOOD],
                "userns_options.uids[0]",
            ),
        ];
        for (mode, uids, gids, field) in cases {
            let error = options(*mode, uids, gids).expect_err(field);
            assert_eq!((error.kind(), error.field()), (Invalid, *field));
        }
        let mount = cri::Mount {
            uid_mappings: vec![GOOD],
            ..Default::default()
        };
        let error = of_mount("mounts[3]", &mount).expect_err("no groups");
        assert_eq!(error.field(), "mounts[3].gidMappings");
    }

    proptest! {
        #[test]
        fn what_is_taken_is_safe(container in any::<u32>(), host in any::<u32>(), length in any::<u32>()) {
            if let Ok(Some(maps)) = options(Mode::Pod.into(), &[ids(container, host, length)], &[GOOD]) {
                prop_assert!(maps.uids.container_id() == 0 && maps.uids.size() > 0);
                prop_assert!(maps.uids.host_id() > 0);
                prop_assert!(u64::from(maps.uids.host_id()) + u64::from(maps.uids.size()) < 1 << 32);
            }
        }
    }
}
