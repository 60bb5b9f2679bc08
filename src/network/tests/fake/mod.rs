//! A node of its own for a test: configuration, records, and plugins that are shell scripts.
#![allow(dead_code)] // Each test binary uses a part.

use serde_json::Value;
use slipway_network::{Cni, CniConfig, NetworkStatus, PodNetwork};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::timeout;

/// Longer than anything takes on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

pub struct Node {
    dir: TempDir,
    pub config: CniConfig,
}

impl Node {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["bin", "in", "env", "hook"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let config = CniConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![dir.path().join("absent"), dir.path().join("bin")],
            cache_dir: dir.path().join("results"),
            timeout: LONG,
            max_conf_num: 1,
        };
        Self { dir, config }
    }

    /// A node with one network of the plugins `one`, `two` and `three`.
    pub fn with_chain(version: &str) -> Self {
        let node = Self::new();
        for kind in ["one", "two", "three"] {
            node.plugin(kind);
        }
        node.network("10-net.conflist", &chain(version, ""));
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn cni(&self) -> Cni {
        Cni::new(self.config.clone())
    }

    pub fn network(&self, file: &str, text: &str) {
        fs::create_dir_all(&self.config.conf_dir).unwrap();
        fs::write(self.config.conf_dir.join(file), text).unwrap();
    }

    /// Installs a plugin that notes each call, its input and its environment, and then does what its
    /// hook says.
    pub fn plugin(&self, kind: &str) {
        let script = format!(
            r#"#!/bin/sh
T={}; K=${{0##*/}}; C=$CNI_COMMAND
cat > "$T/in/$K.$C"
env > "$T/env/$K.$C"
echo "$C $K" >> "$T/log"
if [ -e "$T/hook/$K.$C" ]; then . "$T/hook/$K.$C"; exit; fi
case $C in
VERSION) echo '{{"cniVersion":"1.1.0","supportedVersions":["0.2.0","0.3.1","0.4.0","1.0.0","1.1.0"]}}';;
ADD) echo '{{"interfaces":[{{"name":"eth0","sandbox":"/x"}}],"ips":[{{"address":"10.9.0.2/24","interface":0}}],"by":"'$K'"}}';;
esac
"#,
            self.dir.path().display()
        );
        // Into place by rename: another thread's fork must not find it open for writing.
        let draft = self.path(&format!("{kind}.new"));
        fs::write(&draft, script).unwrap();
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(draft, self.path("bin").join(kind)).unwrap();
    }

    /// What a plugin does for a verb, in shell.
    pub fn hook(&self, kind: &str, verb: &str, script: &str) {
        fs::write(self.path("hook").join(format!("{kind}.{verb}")), script).unwrap();
    }

    pub fn unhook(&self, kind: &str, verb: &str) {
        fs::remove_file(self.path("hook").join(format!("{kind}.{verb}"))).unwrap();
    }

    /// The calls so far, without those that only look.
    pub fn calls(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        let looks = |call: &&str| call.starts_with("VERSION") || call.starts_with("STATUS");
        log.lines()
            .filter(|call| !looks(call))
            .map(str::to_owned)
            .collect()
    }

    pub fn forget_calls(&self) {
        let _ = fs::remove_file(self.path("log"));
    }

    pub fn input(&self, kind: &str, verb: &str) -> Value {
        let text = fs::read(self.path("in").join(format!("{kind}.{verb}"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    pub fn env(&self, kind: &str, verb: &str, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.path("env").join(format!("{kind}.{verb}"))).unwrap();
        let prefix = format!("{name}=");
        text.lines()
            .find_map(|line| line.strip_prefix(&prefix))
            .map(str::to_owned)
    }

    /// Files of the record directory.
    pub fn records(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.config.cache_dir) else {
            return Vec::new();
        };
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

pub fn chain(version: &str, more: &str) -> String {
    format!(
        r#"{{"cniVersion":"{version}","name":"net",{more}"plugins":[
            {{"type":"one","capabilities":{{"ipRanges":true}}}},
            {{"type":"two","own":"setting"}},
            {{"type":"three","capabilities":{{"portMappings":true}}}}]}}"#
    )
}

pub fn pod(id: &str) -> PodNetwork {
    // Some network namespace that is certain to be there; the fakes never enter it.
    PodNetwork::new(id, "default", "web", "uid-1", "/proc/self/ns/net")
}

/// The error and its causes, as an operator reads them.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

pub async fn until(cni: &Cni, wanted: impl Fn(&NetworkStatus) -> bool) -> NetworkStatus {
    let mut changes = cni.changed();
    let status = timeout(LONG, changes.wait_for(|s| wanted(s))).await;
    let status = status.unwrap_or_else(|_| panic!("still {:?}", cni.status()));
    status.unwrap().clone()
}

pub fn is_ready(status: &NetworkStatus) -> bool {
    matches!(status, NetworkStatus::Ready { .. })
}

/// Not ready for this reason.
pub fn complains(part: &str) -> impl Fn(&NetworkStatus) -> bool {
    let part = part.to_owned();
    move |s| matches!(s, NetworkStatus::NotReady { message, .. } if message.contains(&part))
}

/// Waits until something on disk is so; for what only other processes bring about.
pub async fn eventually(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(LONG, wait).await.is_ok(), "{what}");
}

pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
