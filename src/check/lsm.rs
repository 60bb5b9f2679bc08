//! Linux security modules.

use crate::finding::Finding;
use slipway_spec::{AppArmor, NoSelinux, Selinux, SpecOptions};
use std::fs;

/// AppArmor, with the profile that is RuntimeDefault's, and SELinux.
pub(crate) fn check(profile: &str) -> Vec<Finding> {
    let list = fs::read_to_string("/sys/kernel/security/lsm").ok();
    let names = list.as_deref().map(modules);
    let active = |name: &str| names.as_ref().is_some_and(|names| names.contains(&name));
    let parameter = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    let apparmor = parameter.is_ok_and(|text| text.starts_with('Y')) || active("apparmor");
    let shown = names.as_ref().map_or_else(
        || "the list is not readable (securityfs is not mounted)".to_owned(),
        |names| names.join(", "),
    );
    let mut findings = Vec::new();
    findings.push(if apparmor {
        default_profile(&AppArmor::detect(), profile)
    } else {
        Finding::info("apparmor", "AppArmor", "off")
            .cost("pods that ask for a Localhost profile are refused")
            .fix("a kernel with CONFIG_SECURITY_APPARMOR, booted with apparmor=1 security=apparmor")
    });
    let labels = Selinux::detect();
    findings.push(if let Err(NoSelinux::Policy(context)) = &labels {
        Finding::warn("selinux", "SELinux", format!("on, but the policy has no context {context}"))
            .cost("containers have no labels: they run with the daemon's")
            .fix("install the policy for containers (container-selinux), or name its contexts in lxc_contexts")
    } else if let Ok(labels) = &labels {
        let enforcing = fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|t| t.trim() == "1");
        let found = if enforcing { "enforcing" } else { "permissive" };
        let kind = labels.process.last().map_or("", String::as_str);
        Finding::ok("selinux", "SELinux", format!("{found}; containers are {kind}"))
    } else {
        Finding::info("selinux", "SELinux", "off")
    });
    findings.push(Finding::info("lsm", "security modules", shown));
    findings
}

/// Whether containers can have the profile they get unless they name another.
fn default_profile(apparmor: &AppArmor, profile: &str) -> Finding {
    let what = "AppArmor";
    // The daemon's own, which it loads when it starts.
    let ours = profile == SpecOptions::default().apparmor_profile;
    match apparmor.has(profile) {
        Some(true) => Finding::ok("apparmor", what, format!("on; {profile} is loaded")),
        None => Finding::info("apparmor", what, "on; which profiles are loaded can't be read")
            .cost("a container whose profile is missing fails at its start, not at its creation")
            .fix("as root; mount -t securityfs securityfs /sys/kernel/security"),
        Some(false) if ours && on_path("apparmor_parser") => {
            Finding::ok("apparmor", what, format!("on; the daemon loads {profile}"))
        }
        Some(false) if ours => Finding::warn("apparmor", what, "on, but apparmor_parser is missing")
            .cost("containers have no profile, and those that ask for RuntimeDefault are refused")
            .fix("install the package apparmor and restart the daemon"),
        Some(false) => Finding::warn("apparmor", what, format!("on, but {profile} is not loaded"))
            .cost("containers have no profile, and those that ask for RuntimeDefault are refused")
            .fix("load it with apparmor_parser -r, or take pod.apparmor_profile out of the configuration"),
    }
}

/// Whether a program can be found; that it is executable is for its call to tell.
fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
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
    fn the_default_profile_is_judged() {
        use crate::Status::{Info, Ok, Warn};
        let loaded = AppArmor::Loaded(["mine".to_owned()].into());
        assert_eq!(default_profile(&loaded, "mine").status, Ok);
        assert_eq!(default_profile(&loaded, "other").status, Warn);
        assert_eq!(default_profile(&AppArmor::Unknown, "mine").status, Info);
        let ours = default_profile(&loaded, "slipway-default");
        let parser = on_path("apparmor_parser");
        assert_eq!(ours.status, if parser { Ok } else { Warn });
    }

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
