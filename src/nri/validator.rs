//! The validator that is always there, if it is enabled: what plugins may do on this node, and which must be there.

use slipway_proto::nri::security_profile::ProfileType;
use slipway_proto::nri::{Container, Field, PodSandbox};

use crate::owners::Owners;

/// Its name in messages.
pub const VALIDATOR: &str = "the default validator";
/// Annotation of a pod that names further plugins which must be there, as a YAML list.
const REQUIRED: &str = "required-plugins.noderesource.dev";

/// What the validator refuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ValidatorSettings {
    /// It is asked at all.
    pub enable: bool,
    /// No plugin may add OCI hooks.
    pub reject_oci_hooks: bool,
    /// None may replace the runtime's default seccomp profile.
    pub reject_runtime_default_seccomp: bool,
    /// None may confine what shall be unconfined.
    pub reject_unconfined_seccomp: bool,
    /// None may replace a profile of the node's.
    pub reject_custom_seccomp: bool,
    /// None may change namespaces.
    pub reject_namespaces: bool,
    /// None may change sysctls.
    pub reject_sysctls: bool,
    /// Plugins (names without index) without which no container is created.
    pub required_plugins: Vec<String>,
    /// Annotation by which a pod does without them; empty: none can.
    pub tolerate_missing_annotation: String,
}

impl ValidatorSettings {
    /// Checks what plugins made of a container.
    ///
    /// # Errors
    /// Why it must not be created.
    pub fn check(
        &self,
        pod: &PodSandbox,
        container: &Container,
        owners: &Owners,
        plugins: &[&str],
    ) -> Result<(), String> {
        let id = container.id.as_str();
        if self.reject_oci_hooks
            && let Some(who) = owners.of(id, Field::OciHooks, None)
        {
            return Err(format!("{who} may not add OCI hooks on this node"));
        }
        if let Some(who) = owners.of(id, Field::SeccompPolicy, None) {
            let profile = container
                .linux
                .as_ref()
                .and_then(|l| l.seccomp_profile.as_ref());
            let kind = profile.map_or(ProfileType::Unconfined, |p| p.profile_type());
            let (rejected, what) = match kind {
                ProfileType::RuntimeDefault => {
                    (self.reject_runtime_default_seccomp, "the runtime's default")
                }
                ProfileType::Unconfined => {
                    (self.reject_unconfined_seccomp, "an unconfined container's")
                }
                ProfileType::Localhost => (self.reject_custom_seccomp, "a custom"),
            };
            if rejected {
                return Err(format!(
                    "{who} may not replace {what} seccomp profile on this node"
                ));
            }
        }
        if self.reject_namespaces
            && let Some((namespace, who)) = owners.all_of(id, Field::Namespace).first()
        {
            let who = who.trim_start_matches('-');
            return Err(format!(
                "{who} may not change the {namespace} namespace on this node"
            ));
        }
        if self.reject_sysctls
            && let Some((name, who)) = owners.all_of(id, Field::Sysctl).first()
        {
            let who = who.trim_start_matches('-');
            return Err(format!(
                "{who} may not change the sysctl {name} on this node"
            ));
        }
        self.required(pod, container, plugins)
    }

    fn required(
        &self,
        pod: &PodSandbox,
        container: &Container,
        plugins: &[&str],
    ) -> Result<(), String> {
        if !self.tolerate_missing_annotation.is_empty() {
            let key = self.tolerate_missing_annotation.as_str();
            match annotation(pod, key, &container.name) {
                Some("1" | "t" | "T" | "true" | "True" | "TRUE") => return Ok(()),
                None | Some("0" | "f" | "F" | "false" | "False" | "FALSE") => {}
                Some(other) => {
                    return Err(format!(
                        "the annotation {key} must be true or false, not {other:?}"
                    ));
                }
            }
        }
        let mut required = self.required_plugins.clone();
        if let Some(more) = annotation(pod, REQUIRED, &container.name) {
            let more: Vec<String> = serde_yaml_ng::from_str(more)
                .map_err(|e| format!("the annotation {REQUIRED} must be a list of names: {e}"))?;
            required.extend(more);
        }
        let missing: Vec<_> = (required.iter())
            .filter(|name| !plugins.contains(&name.as_str()))
            .map(String::as_str)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(format!(
            "NRI plugins that it needs are not there: {}",
            missing.join(", ")
        ))
    }
}

/// A pod's annotation, by preference the one that is for this container alone.
fn annotation<'a>(pod: &'a PodSandbox, key: &str, container: &str) -> Option<&'a str> {
    let keys = [
        format!("{key}/container.{container}"),
        format!("{key}/pod"),
        key.to_owned(),
    ];
    keys.iter()
        .find_map(|key| pod.annotations.get(key))
        .map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_proto::nri::{LinuxContainer, SecurityProfile};

    fn container(kind: Option<ProfileType>) -> Container {
        Container {
            id: "c".into(),
            name: "main".into(),
            linux: Some(LinuxContainer {
                seccomp_profile: kind.map(|kind| SecurityProfile {
                    profile_type: kind.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_plugins_may_not_do() {
        let mut owners = Owners::default();
        owners.share("c", Field::OciHooks, "00-h");
        owners
            .claim("c", Field::SeccompPolicy, None, "10-s")
            .unwrap();
        owners
            .claim("c", Field::Namespace, Some("ipc"), "20-n")
            .unwrap();
        owners
            .claim("c", Field::Sysctl, Some("net.x"), "30-y")
            .unwrap();
        let nothing = ValidatorSettings::default();
        let pod = PodSandbox::default();
        let check = |settings: &ValidatorSettings, kind| {
            settings.check(&pod, &container(kind), &owners, &[])
        };
        assert_eq!(check(&nothing, None), Ok(()));
        let default = ProfileType::RuntimeDefault;
        type Case = (
            fn(&mut ValidatorSettings),
            Option<ProfileType>,
            &'static str,
        );
        let cases: [Case; 7] = [
            (|s| s.reject_oci_hooks = true, None, "00-h"),
            (
                |s| s.reject_runtime_default_seccomp = true,
                Some(default),
                "10-s",
            ),
            (|s| s.reject_unconfined_seccomp = true, None, "10-s"),
            (
                |s| s.reject_unconfined_seccomp = true,
                Some(ProfileType::Unconfined),
                "10-s",
            ),
            (
                |s| s.reject_custom_seccomp = true,
                Some(ProfileType::Localhost),
                "10-s",
            ),
            (|s| s.reject_namespaces = true, None, "20-n"),
            (|s| s.reject_sysctls = true, None, "30-y"),
        ];
        for (set, kind, who) in cases {
            let mut settings = nothing.clone();
            set(&mut settings);
            let error = check(&settings, kind).unwrap_err();
            assert!(error.contains(who), "{error}");
            let clean = settings.check(&pod, &container(kind), &Owners::default(), &[]);
            assert_eq!(clean, Ok(()));
        }
    }

    #[test]
    fn required_plugins() {
        let settings = ValidatorSettings {
            required_plugins: vec!["a".into()],
            tolerate_missing_annotation: "tolerate".into(),
            ..Default::default()
        };
        let check = |annotations: &[(&str, &str)], plugins: &[&str]| {
            let pod = PodSandbox {
                annotations: (annotations.iter())
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                    .collect(),
                ..Default::default()
            };
            settings.check(&pod, &container(None), &Owners::default(), plugins)
        };
        assert!(check(&[], &[]).unwrap_err().contains('a'));
        assert_eq!(check(&[], &["b", "a"]), Ok(()));
        assert_eq!(check(&[("tolerate", "true")], &[]), Ok(()));
        assert_eq!(check(&[("tolerate/container.main", "true")], &[]), Ok(()));
        assert!(check(&[("tolerate/container.other", "true")], &[]).is_err());
        assert!(check(&[("tolerate", "maybe")], &["a"]).is_err());
        assert!(
            check(&[(REQUIRED, "[ b ]")], &["a"])
                .unwrap_err()
                .contains('b')
        );
        assert!(check(&[(REQUIRED, "{")], &["a"]).is_err());
    }
}
