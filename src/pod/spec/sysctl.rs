//! Sysctls: only those of a namespace that the pod has of its own.

use crate::error::{Result, SpecError, quoted};
use std::collections::{BTreeMap, HashMap};

/// System V IPC (ipc_namespaces(7)); POSIX message queues are `fs.mqueue.*`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Files of /proc/sys take less.
const LONGEST_VALUE: usize = 4096;

/// Which namespace a sysctl belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Home {
    Network,
    Ipc,
}

/// The pod's sysctls in dotted form, with the node's defaults.
///
/// Names may be written with dots or, as sysctl(8) has it, with slashes; a name that mixes them, and
/// everything that isn't a plain name or value, is refused: the peers once let `+` smuggle a second sysctl
/// in (CVE-2022-0811).
pub(crate) fn collect(
    wanted: &HashMap<String, String>,
    defaults: &BTreeMap<String, String>,
    own_network: bool,
    own_ipc: bool,
) -> Result<HashMap<String, String>> {
    let mut all = HashMap::new();
    for (name, value) in defaults {
        let field = format!("pod.default_sysctls of the configuration: {}", quoted(name));
        let (name, home) = check(&field, name, value)?;
        if (home == Home::Network && own_network) || (home == Home::Ipc && own_ipc) {
            all.insert(name, value.clone());
        }
    }
    let mut seen = HashMap::new();
    let mut names: Vec<_> = wanted.iter().collect();
    names.sort();
    for (written, value) in names {
        let field = format!("linux.sysctls[{}]", quoted(written));
        let (name, home) = check(&field, written, value)?;
        let (own, what) = match home {
            Home::Network => (own_network, "network"),
            Home::Ipc => (own_ipc, "IPC"),
        };
        if !own {
            let what = format!(
                "the pod shares the host's {what} namespace, so this would change the host; drop the \
                 sysctl or give the pod a namespace of its own"
            );
            return Err(SpecError::invalid(field, what));
        }
        if let Some(other) = seen.insert(name.clone(), written) {
            return Err(SpecError::invalid(
                field,
                format!("is the same as {}", quoted(other)),
            ));
        }
        all.insert(name, value.clone());
    }
    Ok(all)
}

/// The name in dotted form, and where it belongs.
fn check(field: &str, name: &str, value: &str) -> Result<(String, Home)> {
    let dotted = match (name.contains('/'), name.contains('.')) {
        (true, true) => {
            let what = "mixes dots and slashes; write it with dots alone";
            return Err(SpecError::invalid(field, what));
        }
        (true, false) => name.replace('/', "."),
        _ => name.to_owned(),
    };
    let letter = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if !dotted
        .split('.')
        .all(|part| !part.is_empty() && part.bytes().all(letter))
    {
        return Err(SpecError::invalid(
            field,
            "is not a sysctl's name, such as net.core.somaxconn",
        ));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || " \t.,:;_-/*".contains(c);
    if let Some(bad) = value.chars().find(|c| !plain(*c)) {
        let what = format!(
            "its value {} has {bad:?} in it, which no sysctl takes",
            quoted(value)
        );
        return Err(SpecError::invalid(field, what));
    }
    if value.trim().is_empty() || value.len() > LONGEST_VALUE {
        return Err(SpecError::invalid(field, "its value is empty or too long"));
    }
    let parts = dotted.split('.').count();
    if dotted.starts_with("net.") && parts > 2 {
        Ok((dotted, Home::Network))
    } else if IPC.contains(&dotted.as_str()) || (dotted.starts_with("fs.mqueue.") && parts == 3) {
        Ok((dotted, Home::Ipc))
    } else {
        let what = "belongs to no namespace of the pod, so it would change the host; allowed are net.*, \
                    fs.mqueue.*, kernel.shm*, kernel.msg* and kernel.sem";
        Err(SpecError::invalid(field, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(name: &str, value: &str, network: bool, ipc: bool) -> Result<HashMap<String, String>> {
        let wanted = HashMap::from([(name.to_owned(), value.to_owned())]);
        collect(&wanted, &BTreeMap::new(), network, ipc)
    }

    #[test]
    fn namespaced_ones_pass() {
        let cases = [
            ("net.ipv4.ip_forward", "1", "net.ipv4.ip_forward"),
            ("net/ipv4/ip_forward", "1", "net.ipv4.ip_forward"),
            (
                "net.ipv4.ip_local_port_range",
                "1024 65535",
                "net.ipv4.ip_local_port_range",
            ),
            (
                "net.ipv4.ping_group_range",
                "0\t2147483647",
                "net.ipv4.ping_group_range",
            ),
            (
                "net.ipv4.conf.all.rp_filter",
                "-1",
                "net.ipv4.conf.all.rp_filter",
            ),
            ("kernel.shm_rmid_forced", "1", "kernel.shm_rmid_forced"),
            ("kernel/shmmax", "1", "kernel.shmmax"),
            ("kernel.sem", "250 32000 100 128", "kernel.sem"),
            ("fs.mqueue.msg_max", "100", "fs.mqueue.msg_max"),
        ];
        for (name, value, dotted) in cases {
            let all = one(name, value, true, true).expect(name);
            assert_eq!(all, HashMap::from([(dotted.to_owned(), value.to_owned())]));
        }
    }

    #[test]
    fn the_rest_is_refused() {
        let cases = [
            ("kernel.core_pattern", "|/evil"),
            ("kernel.hostname", "x"),
            ("kernel.shm_next_id", "1"),
            ("vm.swappiness", "1"),
            ("fs.file-max", "1"),
            ("fs.mqueue", "1"),
            ("fs.mqueue.a.b", "1"),
            ("net", "1"),
            ("net.", "1"),
            ("net.ipv4", "1"),
            ("netx.ipv4.x", "1"),
            ("net.ipv4..x", "1"),
            ("net.ipv4/../../kernel/core_pattern", "1"),
            ("net/../kernel/core_pattern", "1"),
            ("net.ipv4.conf.eth0/1.x", "1"),
            ("/net/ipv4/x", "1"),
            ("net.ipv4.x\n", "1"),
            ("net.ipv4.x\0", "1"),
            ("net.ipv4.x y", "1"),
            ("net.ipv4.x=1 kernel.y", "1"),
            ("", "1"),
            ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
            ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=1"),
            ("kernel.shm_rmid_forced", "1\0"),
            ("kernel.shm_rmid_forced", "1&x"),
            ("kernel.shm_rmid_forced", ""),
            ("kernel.shm_rmid_forced", " "),
        ];
        for (name, value) in cases {
            let error = one(name, value, true, true).expect_err(name);
            assert_eq!(error.kind(), crate::SpecErrorKind::Invalid, "{name}");
        }
    }

    #[test]
    fn the_hosts_namespaces_are_not_touched() {
        assert!(one("net.core.somaxconn", "1", false, true).is_err());
        assert!(one("kernel.sem", "1", true, false).is_err());
        assert!(one("fs.mqueue.msg_max", "1", true, false).is_err());
        let error = one("net.core.somaxconn", "1", false, true).expect_err("host");
        assert!(error.to_string().contains("net.core.somaxconn"), "{error}");
    }

    #[test]
    fn two_names_of_one_sysctl_are_refused() {
        let wanted = ["net.core.somaxconn", "net/core/somaxconn"];
        let wanted = wanted.map(|name| (name.to_owned(), "1".to_owned())).into();
        assert!(collect(&wanted, &BTreeMap::new(), true, true).is_err());
    }

    #[test]
    fn defaults_go_where_they_belong() {
        let pairs = [
            ("net.core.somaxconn", "1"),
            ("kernel.sem", "2"),
            ("fs/mqueue/msg_max", "3"),
        ];
        let defaults = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let own = HashMap::from([("net/core/somaxconn".to_owned(), "9".to_owned())]);
        let all = collect(&own, &defaults, true, false).expect("network only");
        assert_eq!(
            all,
            HashMap::from([("net.core.somaxconn".to_owned(), "9".to_owned())])
        );
        assert_eq!(
            collect(&HashMap::new(), &defaults, false, true)
                .expect("ipc only")
                .len(),
            2
        );
        let bad = BTreeMap::from([("vm.swappiness".to_owned(), "1".to_owned())]);
        assert!(collect(&HashMap::new(), &bad, true, true).is_err());
    }

    proptest! {
        #[test]
        fn what_passes_is_one_file_below_a_namespaced_directory(
            name in prop_oneof!["(net|kernel|fs)[./][a-z./+ \\PC]{0,20}", "\\PC*"],
            value in "[0-9a-z+=|\\n\\PC]{0,9}",
        ) {
            if let Ok(all) = one(&name, &value, true, true) {
                for (name, value) in all {
                    prop_assert!(!name.contains('/') && !name.contains(".."));
                    let path = name.replace('.', "/");
                    let ours = path.starts_with("net/") || path.starts_with("fs/mqueue/")
                        || IPC.contains(&name.as_str());
                    prop_assert!(ours);
                    prop_assert!(!value.contains(['\n', '\0', '+', '=', '|']));
                }
            }
        }
    }
}
