//! SELinux labels, and what of /proc and /sys is hidden.

use crate::HostFacts;
use crate::error::{Result, SpecError, quoted};
use crate::paths;
use slipway_proto::cri;

const SECURITY: &str = "linux.security_context";

/// Hidden from a container that comes without a security context.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Read-only for a container that comes without a security context.
const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Masked and read-only paths. The kubelet names them all, so an empty list means none, as with the
/// peers; only who gives no security context at all gets the usual ones. A privileged container has none.
pub(crate) fn hidden(
    security: Option<&cri::LinuxContainerSecurityContext>,
) -> Result<(Vec<String>, Vec<String>)> {
    let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect();
    let Some(security) = security else {
        return Ok((list(&MASKED), list(&READONLY)));
    };
    let checked = |field: &str, wanted: &[String]| -> Result<Vec<String>> {
        for (i, path) in wanted.iter().enumerate() {
            paths::absolute(&format!("{SECURITY}.{field}[{i}]"), path)?;
        }
        Ok(wanted.to_vec())
    };
    let masked = checked("masked_paths", &security.masked_paths)?;
    let readonly = checked("readonly_paths", &security.readonly_paths)?;
    if security.privileged {
        return Ok((Vec::new(), Vec::new()));
    }
    Ok((masked, readonly))
}

/// The SELinux labels of the process and of its mounts; none on a host without SELinux, as with the
/// peers. The container's options go before the pod's.
pub(crate) fn selinux(
    security: Option<&cri::LinuxContainerSecurityContext>,
    pod: &cri::PodSandboxConfig,
    host: &HostFacts,
) -> Result<Option<(String, String)>> {
    let of_pod = pod.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let options = security
        .and_then(|s| s.selinux_options.as_ref())
        .or_else(|| of_pod.and_then(|s| s.selinux_options.as_ref()));
    let Some(options) = options.filter(|o| **o != cri::SeLinuxOption::default()) else {
        return Ok(None);
    };
    let part = |name: &str, value: &str, default: &str, more: &str| -> Result<String> {
        if value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c) || more.contains(c))
        {
            return Ok(if value.is_empty() { default } else { value }.to_owned());
        }
        let what = format!("{} is not possible in a label", quoted(value));
        Err(SpecError::invalid(
            format!("{SECURITY}.selinux_options.{name}"),
            what,
        ))
    };
    let privileged = security.is_some_and(|s| s.privileged);
    let user = part("user", &options.user, "system_u", "")?;
    let role = part("role", &options.role, "system_r", "")?;
    let kind = if privileged { "spc_t" } else { "container_t" };
    let kind = part("type", &options.r#type, kind, "")?;
    let level = part("level", &options.level, "s0", ":,")?;
    if !is_level(&level) {
        let what = format!("{} is not a level such as s0:c1,c2", quoted(&level));
        return Err(SpecError::invalid(
            format!("{SECURITY}.selinux_options.level"),
            what,
        ));
    }
    if !host.selinux {
        return Ok(None);
    }
    let process = format!("{user}:{role}:{kind}:{level}");
    Ok(Some((
        process,
        format!("{user}:object_r:container_file_t:{level}"),
    )))
}

/// `s0`, `s0-s1:c0.c1023`, `s0:c1,c2`.
fn is_level(level: &str) -> bool {
    let number = |text: &str, letter: char| {
        let digits = text.strip_prefix(letter);
        digits
            .is_some_and(|d| !d.is_empty() && d.len() <= 4 && d.bytes().all(|b| b.is_ascii_digit()))
    };
    let one = |text: &str| {
        let (sensitivity, categories) = match text.split_once(':') {
            Some((sensitivity, categories)) => (sensitivity, Some(categories)),
            None => (text, None),
        };
        let range =
            |item: &str| item.split('.').count() <= 2 && item.split('.').all(|c| number(c, 'c'));
        number(sensitivity, 's') && categories.is_none_or(|list| list.split(',').all(range))
    };
    match level.split_once('-') {
        Some((low, high)) => one(low) && one(high),
        None => one(level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Security = cri::LinuxContainerSecurityContext;

    fn host(selinux: bool) -> HostFacts {
        HostFacts {
            selinux,
            ..HostFacts::detect()
        }
    }

    #[test]
    fn hidden_paths_are_as_given() {
        let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        let (masked, readonly) = hidden(None).expect("defaults");
        assert!(masked.contains(&"/proc/kcore".into()) && readonly.contains(&"/proc/sys".into()));
        assert_eq!(hidden(Some(&Security::default())), Ok((vec![], vec![])));
        let given = Security {
            masked_paths: list(&["/bin/ls"]),
            readonly_paths: list(&["/tmp"]),
            ..Default::default()
        };
        assert_eq!(
            hidden(Some(&given)),
            Ok((list(&["/bin/ls"]), list(&["/tmp"])))
        );
        let privileged = Security {
            privileged: true,
            ..given
        };
        assert_eq!(hidden(Some(&privileged)), Ok((vec![], vec![])));
        for bad in ["relative", "", "/proc/../x", "/a\n"] {
            let masked = Security {
                masked_paths: list(&[bad]),
                ..Default::default()
            };
            assert!(hidden(Some(&masked)).is_err());
            let readonly = Security {
                readonly_paths: list(&[bad]),
                ..Default::default()
            };
            let error = hidden(Some(&readonly)).expect_err(bad);
            assert_eq!(error.field(), "linux.security_context.readonly_paths[0]");
        }
    }

    #[test]
    fn selinux_labels() {
        let options = |user: &str, role: &str, kind: &str, level: &str| cri::SeLinuxOption {
            user: user.into(),
            role: role.into(),
            r#type: kind.into(),
            level: level.into(),
        };
        let with = |o: cri::SeLinuxOption, privileged| Security {
            selinux_options: Some(o),
            privileged,
            ..Default::default()
        };
        let pod = cri::PodSandboxConfig::default();
        let label = |security: &Security, on| selinux(Some(security), &pod, &host(on));
        let process = |security: &Security| label(security, true).expect("good").map(|l| l.0);
        let level = with(options("", "", "", "s0:c1,c2"), false);
        assert_eq!(
            process(&level).as_deref(),
            Some("system_u:system_r:container_t:s0:c1,c2")
        );
        assert_eq!(label(&level, false), Ok(None));
        let full = with(options("u", "r", "t", "s0-s1:c0.c5"), false);
        assert_eq!(process(&full).as_deref(), Some("u:r:t:s0-s1:c0.c5"));
        let super_container = with(options("", "", "", "s0"), true);
        assert_eq!(
            process(&super_container).as_deref(),
            Some("system_u:system_r:spc_t:s0")
        );
        assert_eq!(process(&Security::default()), None);
        for bad in [
            "s",
            "x0",
            "s0:c",
            "s0:c1,",
            "s0 ",
            "s0\n",
            "s0:c1.c2.c3",
            "s0-",
        ] {
            assert!(
                label(&with(options("", "", "", bad), false), true).is_err(),
                "{bad:?}"
            );
        }
        assert!(label(&with(options("a:b", "", "", ""), false), true).is_err());
        let of_pod = cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    selinux_options: Some(options("", "", "pod_t", "")),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let found = selinux(None, &of_pod, &host(true))
            .expect("good")
            .map(|l| l.0);
        assert_eq!(found.as_deref(), Some("system_u:system_r:pod_t:s0"));
    }
}
