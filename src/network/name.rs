//! Names that reach plugins, file names or environment variables, and what they may be made of.

use thiserror::Error;

/// Container ids and network names become file names in plugins' state, so they are bounded.
const MAX_NAME: usize = 200;
/// `IFNAMSIZ` less the terminating NUL.
const MAX_IFNAME: usize = 15;

/// A name that a plugin must not see.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{what} {name:?} is not valid: {rule}")]
pub struct NameError {
    what: &'static str,
    name: String,
    rule: &'static str,
}

fn refuse(what: &'static str, name: &str, rule: &'static str) -> Result<(), NameError> {
    let name = name.chars().take(MAX_NAME).collect();
    Err(NameError { what, name, rule })
}

fn identifier(what: &'static str, name: &str) -> Result<(), NameError> {
    let ok = name.len() <= MAX_NAME
        && name
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if ok {
        return Ok(());
    }
    refuse(
        what,
        name,
        "use a letter or digit, then letters, digits, '_', '.' and '-', at most 200 in all",
    )
}

/// Checks a container id (CNI specification, section 2, `CNI_CONTAINERID`).
pub fn check_container_id(id: &str) -> Result<(), NameError> {
    identifier("container id", id)
}

/// Checks a network's name (CNI specification, section 1, `name`).
pub fn check_network_name(name: &str) -> Result<(), NameError> {
    identifier("network name", name)
}

/// Checks an interface name (CNI specification, section 2, `CNI_IFNAME`; the kernel's own rule).
pub fn check_ifname(name: &str) -> Result<(), NameError> {
    let ok = !name.is_empty()
        && name.len() <= MAX_IFNAME
        && name != "."
        && name != ".."
        && name
            .chars()
            .all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
    if ok {
        return Ok(());
    }
    refuse(
        "interface name",
        name,
        "use 1 to 15 printable characters without space, '/' and ':', and neither '.' nor '..'",
    )
}

/// Checks a plugin's `type`: the name of a file in a plugin directory, never a path.
pub fn check_plugin_type(name: &str) -> Result<(), NameError> {
    let ok = !name.is_empty()
        && name.len() <= MAX_NAME
        && name != "."
        && name != ".."
        && name.chars().all(|c| !c.is_control() && c != '/');
    if ok {
        return Ok(());
    }
    refuse(
        "plugin type",
        name,
        "it names a file in a plugin directory: no '/', no '..', no control characters",
    )
}

/// Checks a value that goes into `CNI_ARGS`, where `;` and `=` have a meaning.
pub(crate) fn check_arg(what: &'static str, value: &str) -> Result<(), NameError> {
    if value
        .chars()
        .all(|c| !c.is_control() && c != ';' && c != '=')
    {
        return Ok(());
    }
    refuse(what, value, "no ';', no '=' and no control characters")
}

/// The refusal of a host port that leads nowhere.
pub(crate) fn no_container_port(host_port: u16) -> NameError {
    let name = format!("{host_port}:0");
    NameError {
        what: "port mapping",
        name,
        rule: "the container's port must be from 1 to 65535",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_what_exists_in_the_field() {
        for id in ["a", "0123abcdef", "k8s.pod_1-x"] {
            check_container_id(id).unwrap();
            check_network_name(id).unwrap();
        }
        for name in ["eth0", "net1", "en-p3s0.100"] {
            check_ifname(name).unwrap();
        }
        for name in ["bridge", "host-local", "cilium-cni", "a.b_c"] {
            check_plugin_type(name).unwrap();
        }
    }

    #[test]
    fn refuses_what_would_climb_or_split() {
        for bad in [
            "", ".", "..", "../x", "a/b", "-a", ".a", "a b", "a\nb", "a;b", "ä",
        ] {
            check_container_id(bad).unwrap_err();
            check_network_name(bad).unwrap_err();
        }
        check_container_id(&"a".repeat(201)).unwrap_err();
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "sixteen-letters-",
            "a\n",
        ] {
            check_ifname(bad).unwrap_err();
        }
        for bad in ["", ".", "..", "../bridge", "/bin/sh", "a/b", "a\0b", "a\n"] {
            check_plugin_type(bad).unwrap_err();
        }
        check_arg("pod name", "a;K8S_POD_NAMESPACE=kube-system").unwrap_err();
    }

    proptest! {
        #[test]
        fn an_accepted_identifier_is_one_plain_file_name(s in "\\PC{0,220}") {
            if check_container_id(&s).is_ok() {
                let path = std::path::Path::new(&s);
                prop_assert_eq!(path.components().count(), 1);
                prop_assert_eq!(path.file_name().and_then(|n| n.to_str()), Some(s.as_str()));
            }
        }

        #[test]
        fn an_accepted_type_stays_in_its_directory(s in any::<String>()) {
            if check_plugin_type(&s).is_ok() {
                let joined = std::path::Path::new("/opt/cni/bin").join(&s);
                prop_assert_eq!(joined.parent(), Some(std::path::Path::new("/opt/cni/bin")));
            }
        }
    }
}
