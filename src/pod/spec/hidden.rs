//! What of /proc and /sys is hidden from a container.

use crate::error::Result;
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

#[cfg(test)]
mod tests {
    use super::*;

    type Security = cri::LinuxContainerSecurityContext;

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
}
