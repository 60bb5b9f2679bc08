//! Which AppArmor profile a container gets.

use crate::SpecOptions;
use crate::error::{Result, SpecError, quoted};
use slipway_proto::cri;
use slipway_proto::cri::security_profile::ProfileType;
use std::collections::BTreeSet;
use std::fs;

const SECURITY: &str = "linux.security_context";
/// The kernel's list: a line `name (mode)` for each.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// AppArmor on this host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AppArmor {
    /// The kernel has none, or it is switched off.
    #[default]
    Off,
    /// It is on, and these profiles are loaded.
    Loaded(BTreeSet<String>),
    /// It is on, but the list can't be read (securityfs is not mounted): what is loaded, execve will tell.
    Unknown,
}

impl AppArmor {
    /// Asks the kernel.
    pub fn detect() -> Self {
        let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if !enabled.is_ok_and(|text| text.starts_with('Y')) {
            return Self::Off;
        }
        // Profile names may hold anything.
        match fs::read(PROFILES) {
            Ok(list) => Self::Loaded(names(&String::from_utf8_lossy(&list))),
            Err(_) => Self::Unknown,
        }
    }

    /// Whether the profile is loaded; `None` when that can't be known.
    pub fn has(&self, profile: &str) -> Option<bool> {
        match self {
            Self::Off => Some(false),
            Self::Loaded(names) => Some(names.contains(profile)),
            Self::Unknown => None,
        }
    }
}

/// Names may have spaces and parentheses of their own: the mode is what the last ones hold.
fn names(list: &str) -> BTreeSet<String> {
    let lines = list.lines().filter_map(|line| line.rsplit_once(" ("));
    lines.map(|(name, _)| name.to_owned()).collect()
}

enum Wanted {
    /// Nothing was said: the default profile where there is one.
    Unsaid,
    Unconfined,
    RuntimeDefault,
    Localhost(String),
}

/// What the security context says, and in which field. `apparmor` goes before the deprecated
/// `apparmor_profile`.
fn wanted(security: &cri::LinuxContainerSecurityContext) -> Result<(String, Wanted)> {
    if let Some(profile) = &security.apparmor {
        let field = format!("{SECURITY}.apparmor");
        let wanted = match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Unconfined) => Wanted::Unconfined,
            Ok(ProfileType::RuntimeDefault) => Wanted::RuntimeDefault,
            Ok(ProfileType::Localhost) => {
                let name = profile.localhost_ref.as_str();
                let name = name.strip_prefix("localhost/").unwrap_or(name);
                Wanted::Localhost(name.to_owned())
            }
            Err(_) => {
                let what = format!("there is no profile type {}", profile.profile_type);
                return Err(SpecError::invalid(field, what));
            }
        };
        return Ok((field, wanted));
    }
    let field = format!("{SECURITY}.apparmor_profile");
    #[allow(deprecated)]
    let old = security.apparmor_profile.as_str();
    let wanted = match old {
        "" => Wanted::Unsaid,
        "runtime/default" => Wanted::RuntimeDefault,
        "unconfined" => Wanted::Unconfined,
        _ => match old.strip_prefix("localhost/") {
            Some(name) => Wanted::Localhost(name.to_owned()),
            None => {
                let what = format!(
                    "{} is not a profile; write runtime/default, unconfined or localhost/<name>",
                    quoted(old)
                );
                return Err(SpecError::invalid(field, what));
            }
        },
    };
    Ok((field, wanted))
}

/// The AppArmor profile to enter, if any.
///
/// As with the peers, a container that says nothing gets the default profile where AppArmor is on, and a
/// privileged one only what it names itself.
pub(crate) fn profile(
    security: Option<&cri::LinuxContainerSecurityContext>,
    host: &AppArmor,
    options: &SpecOptions,
    warnings: &mut Vec<String>,
) -> Result<Option<String>> {
    let (field, wanted) = match security {
        Some(security) => wanted(security)?,
        None => (SECURITY.to_owned(), Wanted::Unsaid),
    };
    let privileged = security.is_some_and(|s| s.privileged);
    let default = || options.apparmor_profile.clone();
    match wanted {
        Wanted::Unconfined => Ok(None),
        Wanted::Unsaid | Wanted::RuntimeDefault if privileged || *host == AppArmor::Off => Ok(None),
        Wanted::Unsaid => {
            if host.has(&default()) == Some(true) {
                return Ok(Some(default()));
            }
            warnings.push(format!(
                "the AppArmor profile {} is not loaded; the container runs without",
                quoted(&default())
            ));
            Ok(None)
        }
        Wanted::RuntimeDefault => {
            if host.has(&default()) == Some(false) {
                let what = format!(
                    "the profile {}, which RuntimeDefault means here, is not loaded: the daemon's log says \
                     why it could not be, apparmor_parser -r loads one that is yours (pod.apparmor_profile)",
                    quoted(&default())
                );
                return Err(SpecError::precondition(field, what));
            }
            Ok(Some(default()))
        }
        Wanted::Localhost(name) => {
            if name.is_empty() || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
                let what = format!("{} is not the name of a profile", quoted(&name));
                return Err(SpecError::invalid(field, what));
            }
            let why = match host {
                AppArmor::Off => {
                    "AppArmor is off on this host; turn it on, or use RuntimeDefault or Unconfined"
                }
                _ if host.has(&name) == Some(false) => {
                    "it is not loaded; load it with apparmor_parser -r"
                }
                _ => return Ok(Some(name)),
            };
            let what = format!("the profile {} can't be used: {why}", quoted(&name));
            Err(SpecError::precondition(field, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::{self, FailedPrecondition, Invalid};

    type Security = cri::LinuxContainerSecurityContext;

    fn new(kind: ProfileType, name: &str) -> Security {
        Security {
            apparmor: Some(cri::SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: name.into(),
            }),
            ..Default::default()
        }
    }

    #[allow(deprecated)]
    fn old(name: &str) -> Security {
        Security {
            apparmor_profile: name.into(),
            ..Default::default()
        }
    }

    fn on(loaded: &[&str]) -> AppArmor {
        AppArmor::Loaded(loaded.iter().map(|name| (*name).to_owned()).collect())
    }

    fn chosen(
        security: Option<&Security>,
        host: &AppArmor,
    ) -> std::result::Result<Option<String>, SpecErrorKind> {
        profile(security, host, &SpecOptions::default(), &mut Vec::new()).map_err(|e| e.kind())
    }

    #[test]
    fn the_kernels_list_is_read() {
        let list = "slipway-default (enforce)\n/usr/bin/man (complain)\na (b) (kill)\n//null-x (unconfined)\n";
        let expected = ["//null-x", "/usr/bin/man", "a (b)", "slipway-default"];
        assert_eq!(names(list), expected.map(str::to_owned).into());
        assert!(names("").is_empty() && names("\n(x)\n").is_empty());
    }

    #[test]
    fn profiles_by_request() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let some = |name: &str| Ok(Some(name.to_owned()));
        let default = || some("slipway-default");
        let loaded = on(&["slipway-default", "p", "new"]);
        let none = on(&[]);
        // request; all is loaded; nothing is; off; unknown
        let cases = [
            (
                Security::default(),
                [default(), Ok(None), Ok(None), Ok(None)],
            ),
            (
                new(Unconfined, ""),
                [Ok(None), Ok(None), Ok(None), Ok(None)],
            ),
            (old("unconfined"), [Ok(None), Ok(None), Ok(None), Ok(None)]),
            (
                new(RuntimeDefault, ""),
                [default(), Err(FailedPrecondition), Ok(None), default()],
            ),
            (
                old("runtime/default"),
                [default(), Err(FailedPrecondition), Ok(None), default()],
            ),
            (
                new(Localhost, "p"),
                [
                    some("p"),
                    Err(FailedPrecondition),
                    Err(FailedPrecondition),
                    some("p"),
                ],
            ),
            (
                new(Localhost, "localhost/p"),
                [
                    some("p"),
                    Err(FailedPrecondition),
                    Err(FailedPrecondition),
                    some("p"),
                ],
            ),
            (
                old("localhost/p"),
                [
                    some("p"),
                    Err(FailedPrecondition),
                    Err(FailedPrecondition),
                    some("p"),
                ],
            ),
            (
                Security {
                    apparmor: new(Localhost, "new").apparmor,
                    ..old("localhost/old")
                },
                [
                    some("new"),
                    Err(FailedPrecondition),
                    Err(FailedPrecondition),
                    some("new"),
                ],
            ),
            (
                new(Localhost, ""),
                [Err(Invalid), Err(Invalid), Err(Invalid), Err(Invalid)],
            ),
            (
                new(Localhost, "a b"),
                [Err(Invalid), Err(Invalid), Err(Invalid), Err(Invalid)],
            ),
            (
                old("p"),
                [Err(Invalid), Err(Invalid), Err(Invalid), Err(Invalid)],
            ),
        ];
        for (security, expected) in cases {
            let hosts = [&loaded, &none, &AppArmor::Off, &AppArmor::Unknown];
            for (host, expected) in hosts.into_iter().zip(expected) {
                assert_eq!(
                    chosen(Some(&security), host),
                    expected,
                    "{security:?} {host:?}"
                );
            }
        }
        assert_eq!(chosen(None, &loaded), default());
    }

    #[test]
    fn a_privileged_container_has_only_what_it_names() {
        let loaded = on(&["slipway-default", "p"]);
        let privileged = |security: Security| Security {
            privileged: true,
            ..security
        };
        for security in [Security::default(), new(ProfileType::RuntimeDefault, "")] {
            assert_eq!(chosen(Some(&privileged(security)), &loaded), Ok(None));
        }
        let named = privileged(new(ProfileType::Localhost, "p"));
        assert_eq!(chosen(Some(&named), &loaded), Ok(Some("p".to_owned())));
    }

    #[test]
    fn a_missing_default_is_told() {
        let mut warnings = Vec::new();
        let found = profile(None, &on(&[]), &SpecOptions::default(), &mut warnings);
        assert_eq!((found, warnings.len()), (Ok(None), 1));
    }
}
