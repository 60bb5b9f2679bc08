//! Linux security modules.

use crate::finding::Finding;
use std::fs;
use std::path::Path;

/// AppArmor and SELinux.
pub(crate) fn check() -> Vec<Finding> {
    let list = fs::read_to_string("/sys/kernel/security/lsm").ok();
    let names = list.as_deref().map(modules);
    let active = |name: &str| names.as_ref().is_some_and(|names| names.contains(&name));
    let parameter = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    let apparmor = parameter.is_ok_and(|text| text.starts_with('Y')) || active("apparmor");
    // The file system is there exactly when a policy can be.
    let selinux = Path::new("/sys/fs/selinux/enforce").exists();
    let shown = names.as_ref().map_or_else(
        || "the list is not readable (securityfs is not mounted)".to_owned(),
        |names| names.join(", "),
    );
    let mut findings = Vec::new();
    findings.push(if apparmor {
        Finding::info("apparmor", "AppArmor", "on")
            .cost("Slipway brings no profile of its own: RuntimeDefault runs without one")
            .fix("ask for Localhost profiles that are loaded on this node")
    } else {
        Finding::info("apparmor", "AppArmor", "off")
            .cost("pods that ask for a Localhost profile are refused")
            .fix("a kernel with CONFIG_SECURITY_APPARMOR, booted with apparmor=1 security=apparmor")
    });
    findings.push(if selinux {
        let enforcing = fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|t| t.trim() == "1");
        let found = if enforcing { "enforcing" } else { "permissive" };
        Finding::warn("selinux", "SELinux", found)
            .cost("this version sets no process labels: containers run with the daemon's")
            .fix("rely on seccomp and capabilities, or use another runtime where policy demands labels")
    } else {
        Finding::info("selinux", "SELinux", "off")
    });
    findings.push(Finding::info("lsm", "security modules", shown));
    findings
}

/// The names in `/sys/kernel/security/lsm`: separated by commas, without a newline at the end.
fn modules(list: &str) -> Vec<&str> {
    let names = list.split(',').map(str::trim);
    names.filter(|name| !name.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read() {
        assert_eq!(
            modules("lockdown,capability,apparmor"),
            ["lockdown", "capability", "apparmor"]
        );
        assert_eq!(modules("capability\n"), ["capability"]);
        assert!(modules("").is_empty() && modules(",\n").is_empty());
    }
}
