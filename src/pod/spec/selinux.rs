//! SELinux labels of containers.

use crate::ContainerPlan;
use crate::error::{Result, SpecError, quoted};
use slipway_proto::cri;
use std::fs;
use std::io::Write as _;
use std::path::Path;

const FIELD: &str = "linux.security_context.selinux_options";
/// The kernel's side of SELinux.
const SELINUXFS: &str = "/sys/fs/selinux";
/// Which policy is loaded, and where its contexts are.
const CONFIG: &str = "/etc/selinux/config";

/// SELinux on this host: the labels that its policy has for containers (`lxc_contexts`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selinux {
    /// User, role and type of a container's processes.
    pub process: [String; 3],
    /// The same of its files.
    pub file: [String; 3],
}

/// Why containers get no labels.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSelinux {
    /// The kernel has no SELinux, or no policy.
    #[error("SELinux is off")]
    Off,
    /// The policy knows no containers.
    #[error("the loaded policy has no context {0}")]
    Policy(String),
}

/// The labels of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes.
    pub process: String,
    /// Of its root file system and of what it mounts.
    pub file: String,
}

impl Selinux {
    /// Asks the kernel and the policy's files.
    ///
    /// # Errors
    /// [`NoSelinux`].
    pub fn detect() -> std::result::Result<Self, NoSelinux> {
        if !Path::new(SELINUXFS).join("enforce").exists() {
            return Err(NoSelinux::Off);
        }
        let kind = fs::read_to_string(CONFIG).unwrap_or_default();
        let kind = value(&kind, "SELINUXTYPE").unwrap_or("targeted");
        let contexts = fs::read_to_string(format!("/etc/selinux/{kind}/contexts/lxc_contexts"));
        let found = Self::of(&contexts.unwrap_or_default());
        for parts in [&found.process, &found.file] {
            let context = format!("{}:s0", parts.join(":"));
            if !valid(&context) {
                return Err(NoSelinux::Policy(context));
            }
        }
        Ok(found)
    }

    fn of(contexts: &str) -> Self {
        let parts = |key, usual: [&str; 3]| {
            let given = value(contexts, key).map(|context| context.splitn(4, ':'));
            let given: Vec<_> = given.into_iter().flatten().take(3).collect();
            let parts = <[&str; 3]>::try_from(given).unwrap_or(usual);
            parts.map(str::to_owned)
        };
        Self {
            process: parts("process", ["system_u", "system_r", "container_t"]),
            file: parts("file", ["system_u", "object_r", "container_file_t"]),
        }
    }
}

/// The value of a key in a file of lines `KEY = "value"`, quoted or not.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    let mut values = lines.filter(|(name, _)| name.trim() == key);
    values
        .next()
        .map(|(_, value)| value.trim().trim_matches('"'))
}

/// Whether the loaded policy knows a context.
fn valid(context: &str) -> bool {
    let file = fs::File::options()
        .write(true)
        .open(Path::new(SELINUXFS).join("context"));
    file.is_ok_and(|mut file| file.write_all(context.as_bytes()).is_ok())
}

/// Asks the kernel whether its policy knows the labels of a planned container. Not a part of the plan: that is pure.
///
/// # Errors
/// [`SpecError`] for one it doesn't know.
pub fn check_labels(plan: &ContainerPlan) -> Result<()> {
    let process = plan.spec.process().as_ref();
    let linux = plan.spec.linux().as_ref();
    let labels = [
        process.and_then(|p| p.selinux_label().as_ref()),
        linux.and_then(|l| l.mount_label().as_ref()),
    ];
    match labels.into_iter().flatten().find(|label| !valid(label)) {
        Some(label) => {
            let what = format!("the policy of this host has no context {}", quoted(label));
            Err(SpecError::precondition(FIELD, what))
        }
        None => Ok(()),
    }
}

/// The level that a pod's configuration asks for, so that none of its own is needed.
///
/// # Errors
/// [`SpecError`] for one that is none.
pub fn level_of_pod(pod: &cri::PodSandboxConfig) -> Result<Option<String>> {
    let options = of_pod(pod).filter(|options| !options.level.is_empty());
    options.map(|options| level(options, "")).transpose()
}

fn of_pod(pod: &cri::PodSandboxConfig) -> Option<&cri::SeLinuxOption> {
    pod.linux
        .as_ref()?
        .security_context
        .as_ref()?
        .selinux_options
        .as_ref()
}

fn level(options: &cri::SeLinuxOption, usual: &str) -> Result<String> {
    let level = part("level", &options.level, usual, ":,")?;
    if !is_level(&level) {
        let what = format!("{} is not a level such as s0:c1,c2", quoted(&level));
        return Err(SpecError::invalid(format!("{FIELD}.level"), what));
    }
    Ok(level)
}

fn part(name: &str, value: &str, usual: &str, more: &str) -> Result<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c) || more.contains(c);
    if value.chars().all(allowed) {
        return Ok(if value.is_empty() { usual } else { value }.to_owned());
    }
    let what = format!("{} is not possible in a label", quoted(value));
    Err(SpecError::invalid(format!("{FIELD}.{name}"), what))
}

/// A container's labels; none on a host without SELinux, where the options are only checked.
///
/// The container's options go before the pod's, and `pod_level` stands for a level that neither names. A privileged
/// container, and one that shares the host's PID or IPC namespace (`shared`), has labels only if it asks: as with
/// the peers, it is not to be kept from the host.
pub(crate) fn labels(
    security: Option<&cri::LinuxContainerSecurityContext>,
    pod: &cri::PodSandboxConfig,
    pod_level: Option<&str>,
    shared: bool,
    host: Option<&Selinux>,
) -> Result<Option<Labels>> {
    let given = security
        .and_then(|s| s.selinux_options.as_ref())
        .or(of_pod(pod));
    let given = given.filter(|options| **options != cri::SeLinuxOption::default());
    let privileged = security.is_some_and(|s| s.privileged);
    let nothing = cri::SeLinuxOption::default();
    let options = given.unwrap_or(&nothing);
    let usual = host.cloned().unwrap_or_else(|| Selinux::of(""));
    let [user, role, kind] = &usual.process;
    let kind = if privileged { "spc_t" } else { kind };
    let user = part("user", &options.user, user, "")?;
    let role = part("role", &options.role, role, "")?;
    let kind = part("type", &options.r#type, kind, "")?;
    let level = level(options, pod_level.unwrap_or("s0"))?;
    if host.is_none() || given.is_none() && (privileged || shared) {
        return Ok(None);
    }
    let [_, file_role, file_kind] = &usual.file;
    Ok(Some(Labels {
        file: format!("{user}:{file_role}:{file_kind}:{level}"),
        process: format!("{user}:{role}:{kind}:{level}"),
    }))
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

    fn options(user: &str, role: &str, kind: &str, level: &str) -> cri::SeLinuxOption {
        cri::SeLinuxOption {
            user: user.into(),
            role: role.into(),
            r#type: kind.into(),
            level: level.into(),
        }
    }

    fn with(options: cri::SeLinuxOption, privileged: bool) -> Security {
        Security {
            selinux_options: Some(options),
            privileged,
            ..Default::default()
        }
    }

    fn label(security: &Security, on: bool) -> Result<Option<Labels>> {
        let (pod, host) = (cri::PodSandboxConfig::default(), Selinux::of(""));
        let own = Some("s0:c7,c9");
        labels(Some(security), &pod, own, false, on.then_some(&host))
    }

    fn process(security: &Security) -> Option<String> {
        label(security, true).expect("good").map(|l| l.process)
    }

    #[test]
    fn the_policys_contexts_are_read() {
        let text = "process = \"u:r:t:s0\"\n# file = \"no\"\nfile=a:b:c:s0:c1\nro_file = \"x\"\n";
        let found = Selinux::of(text);
        assert_eq!(found.process, ["u", "r", "t"]);
        assert_eq!(found.file, ["a", "b", "c"]);
        for bad in ["", "process = u:r\nfile = x", "process\nfile"] {
            let found = Selinux::of(bad);
            assert_eq!(
                found.process,
                ["system_u", "system_r", "container_t"],
                "{bad}"
            );
            assert_eq!(
                found.file,
                ["system_u", "object_r", "container_file_t"],
                "{bad}"
            );
        }
    }

    #[test]
    fn labels_by_request() {
        let level = with(options("", "", "", "s0:c1,c2"), false);
        let found = label(&level, true).expect("good").expect("labels");
        assert_eq!(found.process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(found.file, "system_u:object_r:container_file_t:s0:c1,c2");
        assert_eq!(label(&level, false), Ok(None));
        let full = with(options("u", "r", "t", "s0-s1:c0.c5"), false);
        assert_eq!(process(&full).as_deref(), Some("u:r:t:s0-s1:c0.c5"));
        let own = Some("system_u:system_r:container_t:s0:c7,c9");
        assert_eq!(process(&Security::default()).as_deref(), own);
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
            for on in [true, false] {
                assert!(
                    label(&with(options("", "", "", bad), false), on).is_err(),
                    "{bad:?}"
                );
            }
        }
        assert!(label(&with(options("a:b", "", "", ""), false), true).is_err());
    }

    #[test]
    fn who_is_not_to_be_kept_from_the_host_has_none() {
        let privileged = Security {
            privileged: true,
            ..Default::default()
        };
        assert_eq!(process(&privileged), None);
        let asked = with(options("", "", "", "s0"), true);
        assert_eq!(
            process(&asked).as_deref(),
            Some("system_u:system_r:spc_t:s0")
        );
        let (pod, host) = (cri::PodSandboxConfig::default(), Selinux::of(""));
        let found = labels(None, &pod, Some("s0"), true, Some(&host));
        assert_eq!(found, Ok(None));
    }

    #[test]
    fn the_pods_options_count_where_the_container_has_none() {
        let mut pod = cri::PodSandboxConfig::default();
        assert_eq!(level_of_pod(&pod), Ok(None));
        let security = pod
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        security.selinux_options = Some(options("", "", "pod_t", "s0:c3"));
        let host = Selinux::of("");
        let found = labels(None, &pod, None, false, Some(&host)).expect("good");
        let found = found.map(|l| l.process);
        assert_eq!(found.as_deref(), Some("system_u:system_r:pod_t:s0:c3"));
        assert_eq!(level_of_pod(&pod), Ok(Some("s0:c3".to_owned())));
    }
}
