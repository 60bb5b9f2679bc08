//! Capabilities of a container.
//!
//! | request | result |
//! | --- | --- |
//! | nothing | the node's default set, cut to what the daemon holds |
//! | `add: [X]` | also X; refused when the daemon does not hold it |
//! | `add: [ALL]` | all that the daemon holds |
//! | `drop: [X]` | without X, even if `add` names it |
//! | `drop: [ALL]` | none but those that `add` names |
//! | `add_ambient: [X]` | also X, and kept over execve(2) by a user that is not root |
//! | privileged | all that the daemon holds, whatever the lists say |
//!
//! Names count in either case, with or without `CAP_`. Inheritable is what ambient needs and no more
//! (CVE-2022-24769).

use crate::error::{Result, SpecError, quoted};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use slipway_proto::cri;
use std::str::FromStr;

const FIELD: &str = "linux.security_context.capabilities";

/// Every set of a container's process. Its bounding set is what a seccomp profile's conditions are about.
pub(crate) fn of_container(
    security: Option<&cri::LinuxContainerSecurityContext>,
    defaults: &[String],
    held: &Capabilities,
    warnings: &mut Vec<String>,
) -> Result<LinuxCapabilities> {
    let request = security
        .and_then(|s| s.capabilities.clone())
        .unwrap_or_default();
    let add = parse_all("add_capabilities", &request.add_capabilities)?;
    let drop = parse_all("drop_capabilities", &request.drop_capabilities)?;
    let ambient = parse_all(
        "add_ambient_capabilities",
        &request.add_ambient_capabilities,
    )?;
    if security.is_some_and(|s| s.privileged) {
        return Ok(sets(held.clone(), Capabilities::new()));
    }
    let mut all = if add.all {
        held.clone()
    } else {
        let mut wanted = Capabilities::new();
        for name in defaults {
            let field = "pod.default_capabilities of the configuration";
            wanted.insert(parse(field, name)?);
        }
        let mut missing: Vec<_> = wanted.difference(held).map(ToString::to_string).collect();
        if !missing.is_empty() && !drop.all {
            missing.sort();
            warnings.push(format!(
                "Slipway does not hold {}, so neither can containers",
                missing.join(", ")
            ));
        }
        wanted.intersection(held).copied().collect()
    };
    if drop.all {
        all.clear();
    }
    for (list, single) in [
        ("add_capabilities", &add.single),
        ("add_ambient_capabilities", &ambient.single),
    ] {
        for capability in single {
            if !held.contains(capability) {
                let what = format!(
                    "Slipway itself does not hold {capability} on this host, so it can't give it; \
                     drop it from the request, or run the daemon with it"
                );
                return Err(SpecError::precondition(format!("{FIELD}.{list}"), what));
            }
            all.insert(*capability);
        }
    }
    if ambient.all {
        let what = "ALL is not for ambient capabilities; name each";
        return Err(SpecError::invalid(
            format!("{FIELD}.add_ambient_capabilities"),
            what,
        ));
    }
    let mut kept: Capabilities = ambient.single.into_iter().collect();
    for capability in &drop.single {
        all.remove(capability);
        kept.remove(capability);
    }
    Ok(sets(all, kept))
}

fn sets(all: Capabilities, ambient: Capabilities) -> LinuxCapabilities {
    let mut out = LinuxCapabilities::default();
    out.set_bounding(Some(all.clone()))
        .set_effective(Some(all.clone()))
        .set_permitted(Some(all))
        .set_inheritable(Some(ambient.clone()))
        .set_ambient(Some(ambient));
    out
}

struct Named {
    all: bool,
    single: Vec<Capability>,
}

fn parse_all(list: &str, names: &[String]) -> Result<Named> {
    let mut named = Named {
        all: false,
        single: Vec::new(),
    };
    for (i, name) in names.iter().enumerate() {
        if name.eq_ignore_ascii_case("ALL") {
            named.all = true;
        } else {
            named
                .single
                .push(parse(&format!("{FIELD}.{list}[{i}]"), name)?);
        }
    }
    Ok(named)
}

fn parse(field: &str, name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    Capability::from_str(bare).map_err(|_| {
        let what = format!(
            "{} is not a capability; write for example NET_ADMIN or ALL",
            quoted(name)
        );
        SpecError::invalid(field, what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::{FailedPrecondition, Invalid};
    use oci_spec::runtime::Capability as C;

    fn held() -> Capabilities {
        [C::Chown, C::Kill, C::NetRaw, C::NetAdmin, C::SysAdmin].into()
    }

    fn given(
        add: &[&str],
        drop: &[&str],
        ambient: &[&str],
    ) -> (Result<LinuxCapabilities>, Vec<String>) {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let security = cri::LinuxContainerSecurityContext {
            capabilities: Some(cri::Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                add_ambient_capabilities: list(ambient),
            }),
            ..Default::default()
        };
        let defaults = [
            "CHOWN".to_owned(),
            "CAP_KILL".to_owned(),
            "net_raw".to_owned(),
        ];
        let mut warnings = Vec::new();
        let found = of_container(Some(&security), &defaults, &held(), &mut warnings);
        (found, warnings)
    }

    #[test]
    fn adding_and_dropping() {
        let base = vec![C::Chown, C::Kill, C::NetRaw];
        let with = |more: C| [base.clone(), vec![more]].concat();
        let cases: Vec<(&[&str], &[&str], Vec<Capability>)> = vec![
            (&[], &[], base.clone()),
            (&["NET_ADMIN"], &[], with(C::NetAdmin)),
            (&["CAP_NET_ADMIN"], &[], with(C::NetAdmin)),
            (&["cap_net_admin"], &[], with(C::NetAdmin)),
            (&["Net_Admin"], &[], with(C::NetAdmin)),
            (&["CHOWN"], &[], base),
            (&["ALL"], &[], held().into_iter().collect()),
            (
                &["all"],
                &["NET_RAW"],
                vec![C::Chown, C::Kill, C::NetAdmin, C::SysAdmin],
            ),
            (&[], &["ALL"], vec![]),
            (&["NET_ADMIN"], &["All"], vec![C::NetAdmin]),
            (&["ALL"], &["ALL"], vec![]),
            (
                &["NET_ADMIN"],
                &["NET_ADMIN"],
                vec![C::Chown, C::Kill, C::NetRaw],
            ),
            (&[], &["KILL", "CAP_CHOWN"], vec![C::NetRaw]),
            (&[], &["SYS_BOOT"], vec![C::Chown, C::Kill, C::NetRaw]),
        ];
        for (add, drop, expected) in cases {
            let (found, warnings) = given(add, drop, &[]);
            let found = found.expect("good");
            let expected: Capabilities = expected.into_iter().collect();
            for set in [found.bounding(), found.effective(), found.permitted()] {
                assert_eq!(set.as_ref(), Some(&expected), "+{add:?} -{drop:?}");
            }
            for set in [found.inheritable(), found.ambient()] {
                assert_eq!(set.as_ref().map(|s| s.len()), Some(0));
            }
            assert_eq!(warnings, Vec::<String>::new());
        }
    }

    #[test]
    fn what_is_not_held_or_not_known() {
        let cases: [(&[&str], &[&str], &[&str], _); 7] = [
            (&["SYS_BOOT"], &[], &[], FailedPrecondition),
            (&[], &[], &["SYS_BOOT"], FailedPrecondition),
            (&["FLY"], &[], &[], Invalid),
            (&["CAP_CAP_CHOWN"], &[], &[], Invalid),
            (&[""], &[], &[], Invalid),
            (&[], &["FLY"], &[], Invalid),
            (&[], &[], &["ALL"], Invalid),
        ];
        for (add, drop, ambient, kind) in cases {
            let error = given(add, drop, ambient).0.expect_err("bad");
            assert_eq!(error.kind(), kind, "{error}");
        }
        let error = given(&["SYS_BOOT"], &[], &[])
            .0
            .expect_err("not held")
            .to_string();
        assert!(error.contains("SYS_BOOT"), "{error}");
    }

    #[test]
    fn ambient_ones_are_in_every_set() {
        let found = given(&[], &["CHOWN", "KILL"], &["NET_ADMIN"])
            .0
            .expect("good");
        let ambient: Capabilities = [C::NetAdmin].into();
        let all: Capabilities = [C::NetAdmin, C::NetRaw].into();
        assert_eq!(found.ambient().as_ref(), Some(&ambient));
        assert_eq!(found.inheritable().as_ref(), Some(&ambient));
        assert_eq!(found.bounding().as_ref(), Some(&all));
        let found = given(&[], &["NET_ADMIN"], &["NET_ADMIN"]).0.expect("good");
        assert_eq!(found.ambient().as_ref(), Some(&Capabilities::new()));
    }

    #[test]
    fn defaults_are_cut_with_a_warning() {
        let defaults = ["CHOWN".to_owned(), "SYS_BOOT".to_owned()];
        let mut warnings = Vec::new();
        let found = of_container(None, &defaults, &held(), &mut warnings).expect("good");
        assert_eq!(found.bounding().as_ref(), Some(&[C::Chown].into()));
        assert!(warnings[0].contains("SYS_BOOT"), "{warnings:?}");
        let bad = ["NONSENSE".to_owned()];
        assert!(of_container(None, &bad, &held(), &mut warnings).is_err());
    }

    #[test]
    fn privileged_means_all_that_is_held() {
        let security = cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        let found = of_container(Some(&security), &[], &held(), &mut Vec::new()).expect("good");
        assert_eq!(found.bounding().as_ref(), Some(&held()));
        assert_eq!(found.ambient().as_ref(), Some(&Capabilities::new()));
    }
}
