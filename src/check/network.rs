//! The pod network: does its configuration load, are its plugins there, and do they answer?

use crate::attempt::{PATIENCE, apart};
use crate::finding::Finding;
use slipway_config::Config;
use slipway_network::{Cni, CniConfig, Directory, Network, NetworkStatus};
use std::error::Error;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const WHAT: &str = "CNI network";
const COST: &str = "NetworkReady is false: the node takes no pods but those on the host's network";

/// Configuration and plugins, of the node's network and of those that handlers have.
pub(crate) fn check(config: &Config) -> Vec<Finding> {
    let mut findings = check_dir(config, &config.network.conf_dir, "cni", COST);
    for (name, runtime) in &config.runtimes {
        if let Some(dir) = &runtime.network_conf_dir {
            let cost = format!(
                "pods of runtime handler {name:?} are refused, but those on the host's network"
            );
            findings.extend(check_dir(config, dir, &format!("cni-{name}"), &cost));
        }
    }
    findings
}

fn check_dir(config: &Config, conf_dir: &Path, id: &str, cost: &str) -> Vec<Finding> {
    let dir = conf_dir.to_owned();
    let shown = dir.display().to_string();
    let found = match apart(move || Ok(Directory::read(&dir, 1).map_err(|e| chain(&e)))) {
        Ok(Ok(found)) => found,
        Ok(Err(e)) => {
            return vec![
                Finding::fail(id, WHAT, e)
                    .cost(cost)
                    .fix("make the directory readable"),
            ];
        }
        Err(e) => return vec![Finding::fail(id, WHAT, format!("{shown}: {e}")).cost(cost)],
    };
    let mut findings: Vec<_> = found
        .rejected
        .iter()
        .map(|e| {
            Finding::warn(&format!("{id}-rejected"), WHAT, chain(e))
                .cost("the file is passed over")
                .fix("mend or remove it")
        })
        .collect();
    match found.networks.first() {
        None => findings.push(
            // A network add-on usually comes after the runtime, as pods.
            Finding::warn(id, WHAT, format!("none is configured in {shown}"))
                .cost(cost)
                .fix("install a network add-on, or put a .conflist there; it is seen at once"),
        ),
        Some(network) => findings.push(usable(config, conf_dir, network, id, cost)),
    }
    findings
}

fn usable(config: &Config, conf_dir: &Path, network: &Network, id: &str, cost: &str) -> Finding {
    let kinds: Vec<&str> = network.plugins().iter().map(|p| p.kind()).collect();
    let name = format!("{:?} of {}", network.name(), network.file().display());
    let missing: Vec<_> = kinds
        .iter()
        .copied()
        .filter(|kind| !executable(&config.network.bin_dirs, kind))
        .collect();
    if !missing.is_empty() {
        let dirs: Vec<_> = config
            .network
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        let found = format!("{name}: plugins missing: {}", missing.join(", "));
        return Finding::fail(id, WHAT, found).cost(cost).fix(format!(
            "install them in {}, or name their directory in network.bin_dirs",
            dirs.join(" or ")
        ));
    }
    let answered = {
        let (conf_dir, bin_dirs) = (conf_dir.to_owned(), config.network.bin_dirs.clone());
        apart(move || ask(conf_dir, bin_dirs))
    };
    match answered {
        Ok(NetworkStatus::Ready { .. }) => {
            Finding::ok(id, WHAT, format!("{name}: {}", kinds.join(", ")))
        }
        Ok(NetworkStatus::NotReady { message, .. }) => {
            Finding::fail(id, WHAT, format!("{name}: {message}"))
                .cost(cost)
                .fix("see what the plugin says; its own service may not be up yet")
        }
        Err(e) => Finding::fail(id, WHAT, format!("{name}: the plugins can't be asked: {e}"))
            .cost(cost)
            .fix("see why they hang"),
    }
}

/// Has the plugins asked, as the daemon does, for their version and status. No pod is touched.
fn ask(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>) -> io::Result<NetworkStatus> {
    let records = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let cni_config = CniConfig {
        conf_dir,
        bin_dirs,
        cache_dir: records.path().to_owned(),
        timeout: PATIENCE / 4,
        ..CniConfig::default()
    };
    runtime.block_on(async {
        let cni = Cni::new(cni_config);
        let mut changed = cni.changed();
        // The first change is from "being looked at" to what was found.
        match tokio::time::timeout(PATIENCE * 3 / 4, changed.changed()).await {
            Ok(Ok(())) => Ok(cni.status()),
            Ok(Err(e)) => Err(io::Error::other(e)),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    })
}

fn executable(dirs: &[PathBuf], kind: &str) -> bool {
    let runs = |path: PathBuf| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    // A type with a slash is refused by the network itself, with a message of its own.
    dirs.iter().any(|dir| runs(dir.join(kind)))
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use std::fs;

    fn config(dir: &Path) -> Config {
        let mut config = Config::default();
        config.network.conf_dir = dir.join("net.d");
        config.network.bin_dirs = vec![dir.join("bin")];
        config
    }

    fn plugin(dir: &Path, name: &str, script: &str) {
        let path = dir.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn configuration_and_plugins_are_judged() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        for sub in ["net.d", "bin"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let last = || check(&config).pop().unwrap();
        assert_eq!(last().status, Status::Warn);

        let put =
            |name: &str, text: &str| fs::write(dir.path().join("net.d").join(name), text).unwrap();
        put("00-bad.conflist", "{");
        put(
            "10-net.conflist",
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"one"},{"type":"two"}]}"#,
        );
        plugin(
            dir.path(),
            "one",
            r#"echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'"#,
        );
        let findings = check(&config);
        let mut other = config.clone();
        let handler = other
            .runtimes
            .entry("kata".into())
            .or_insert_with(|| config.runtimes["native"].clone());
        handler.network_conf_dir = Some(dir.path().join("net.kata"));
        let own = check(&other).pop().unwrap();
        assert_eq!((own.id.as_str(), own.status), ("cni-kata", Status::Warn));
        assert!(own.cost.unwrap().contains("kata"));
        assert_eq!(findings[0].id, "cni-rejected");
        assert_eq!(findings[1].status, Status::Fail);
        assert!(
            findings[1].found.contains("missing: two"),
            "{}",
            findings[1].found
        );

        plugin(dir.path(), "two", "exit 3");
        let finding = last();
        assert_eq!(finding.status, Status::Fail, "{}", finding.found);
        assert!(finding.found.contains("two"), "{}", finding.found);

        plugin(
            dir.path(),
            "two",
            r#"echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'"#,
        );
        let finding = last();
        assert_eq!(finding.status, Status::Ok, "{}", finding.found);
    }
}
