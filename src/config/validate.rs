//! Values that parse but can't work.

use crate::{Config, Runtime, RuntimeKind, RuntimeOptions};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path};
use std::time::Duration;

/// A value that can't work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, dotted.
    pub key: String,
    /// What is wrong with its value, and what is allowed.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.reason)
    }
}

/// Longest path that fits `sockaddr_un`.
const SOCKET_PATH: usize = 107;
/// No operation of ours is meant to take longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl Config {
    /// Checks what the type of a value does not: all that is wrong, not just the first thing.
    ///
    /// # Errors
    /// One [`Problem`] for each value that can't work.
    pub fn validate(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Problems(Vec::new());
        self.paths(&mut problems);
        self.times(&mut problems);
        self.images(&mut problems);
        self.pods(&mut problems);
        problems.check("cgroup.monitor", self.monitor());
        self.handlers(&mut problems);
        if problems.0.is_empty() {
            Ok(())
        } else {
            Err(problems.0)
        }
    }

    fn monitor(&self) -> Result<(), String> {
        let name = self.cgroup.monitor.as_str();
        let plain = |name: &str| {
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
            !name.is_empty() && name.bytes().all(good) && name != "." && name != ".."
        };
        let good = match name.strip_prefix('/') {
            Some(path) => path.split('/').all(plain),
            None if name.ends_with(".slice") => plain(name),
            None => ["own", "daemon", "pod"].contains(&name),
        };
        if good {
            return Ok(());
        }
        Err(format!(
            "{name:?} must be \"own\", \"daemon\", \"pod\", a slice (name.slice) or a path (/name)"
        ))
    }

    fn paths(&self, problems: &mut Problems) {
        problems.path("listen", &self.listen);
        if self.listen.as_os_str().len() > SOCKET_PATH {
            problems.add(
                "listen",
                format!("a socket's path may have at most {SOCKET_PATH} bytes"),
            );
        }
        problems.path("run_root", &self.run_root);
        problems.path("state_root", &self.state_root);
        for (key, path) in [
            ("nri.socket_path", &self.nri.socket_path),
            ("nri.plugin_dir", &self.nri.plugin_dir),
            ("nri.config_dir", &self.nri.config_dir),
        ] {
            problems.path(key, path);
        }
        if self.nri.socket_path.as_os_str().len() > SOCKET_PATH {
            let what = format!("a socket's path may have at most {SOCKET_PATH} bytes");
            problems.add("nri.socket_path", what);
        }
        if self.run_root == self.state_root {
            problems.add(
                "run_root",
                "must differ from state_root, which outlives a boot",
            );
        }
        problems.path("network.conf_dir", &self.network.conf_dir);
        problems.path("network.cache_dir", &self.network.cache_dir);
        if self.network.bin_dirs.is_empty() {
            problems.add(
                "network.bin_dirs",
                "name at least one directory of CNI plugins",
            );
        }
        for dir in &self.network.bin_dirs {
            problems.path("network.bin_dirs", dir);
        }
        for file in &self.images.ca_files {
            problems.path("images.ca_files", file);
        }
        for (key, file) in [
            ("stream.tls_certificate", &self.stream.tls_certificate),
            ("stream.tls_key", &self.stream.tls_key),
        ] {
            if let Some(file) = file {
                problems.path(key, file);
            }
        }
        if self.stream.tls_certificate.is_some() != self.stream.tls_key.is_some() {
            problems.add(
                "stream.tls_certificate",
                "needs stream.tls_key beside it, and the other way round",
            );
        }
        let profile = &self.pod.apparmor_profile;
        if profile.is_empty() || profile.chars().any(|c| c.is_control() || c.is_whitespace()) {
            problems.add("pod.apparmor_profile", "must be the name of a profile");
        }
        if let Some(file) = &self.pod.seccomp_profile {
            problems.path("pod.seccomp_profile", file);
        }
        problems.path("pod.seccomp_dir", &self.pod.seccomp_dir);
        if let Some(file) = &self.pod.blockio_config_file {
            problems.path("pod.blockio_config_file", file);
        }
        for dir in &self.pod.cdi_dirs {
            problems.path("pod.cdi_dirs", dir);
        }
        for dir in &self.pod.hooks_dirs {
            problems.path("pod.hooks_dirs", dir);
        }
    }

    fn times(&self, problems: &mut Problems) {
        let times = [
            ("stream.idle_timeout", self.stream.idle_timeout),
            (
                "images.pull_progress_timeout",
                self.images.pull_progress_timeout,
            ),
            ("images.connect_timeout", self.images.connect_timeout),
            ("images.request_timeout", self.images.request_timeout),
            ("network.timeout", self.network.timeout),
            ("nri.registration_timeout", self.nri.registration_timeout),
            ("nri.request_timeout", self.nri.request_timeout),
            ("limits.sandbox_timeout", self.limits.sandbox_timeout),
            ("limits.create_timeout", self.limits.create_timeout),
            ("checkpoint.timeout", self.checkpoint.timeout),
            ("limits.start_timeout", self.limits.start_timeout),
            ("limits.delete_timeout", self.limits.delete_timeout),
        ];
        for (key, time) in times {
            if time < Duration::from_millis(100) || time > LONGEST {
                problems.add(key, "must be between 100ms and 24h");
            }
        }
        for (key, size) in [
            ("limits.exec_output", self.limits.exec_output),
            ("limits.max_message", self.limits.max_message),
        ] {
            if !(1 << 10..=1 << 30).contains(&size.bytes()) {
                problems.add(key, "must be between 1KiB and 1GiB");
            }
        }
    }

    fn images(&self, problems: &mut Problems) {
        if !(1..=64).contains(&self.images.max_parallel_downloads) {
            problems.add("images.max_parallel_downloads", "must be between 1 and 64");
        }
        if self.images.retries > 100 {
            problems.add("images.retries", "must be at most 100");
        }
        let host = |name: &str| -> Result<(), String> {
            let good = !name.is_empty()
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b));
            if good {
                return Ok(());
            }
            Err(format!(
                "{name:?} is not a registry; write host or host:port, without scheme and path"
            ))
        };
        for name in &self.images.insecure_registries {
            problems.check("images.insecure_registries", host(name));
        }
        for (name, mirrors) in &self.images.mirrors {
            for name in std::iter::once(name).chain(mirrors) {
                problems.check("images.mirrors", host(name));
            }
        }
        for name in &self.images.pinned {
            let start = name.strip_suffix('*').unwrap_or(name);
            // A keyword has one at both ends.
            let keyword = start.strip_prefix('*').filter(|_| name.ends_with('*'));
            let inner = keyword.unwrap_or(start);
            if inner.is_empty() || inner.contains('*') || inner.contains(char::is_whitespace) {
                let reason = format!(
                    "{name:?} is neither an image name, which may end in one *, nor a *word*"
                );
                problems.add("images.pinned", reason);
            }
        }
    }

    fn pods(&self, problems: &mut Problems) {
        for name in &self.pod.default_capabilities {
            let bare = name.strip_prefix("CAP_").unwrap_or(name);
            if bare.is_empty() || !bare.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') {
                let reason = format!("{name:?} is not a capability; write NET_RAW or CAP_NET_RAW");
                problems.add("pod.default_capabilities", reason);
            }
        }
        sysctls(&self.pod.default_sysctls, problems);
        if self.pod.pids_limit > i64::MAX as u64 {
            problems.add("pod.pids_limit", "is too large; 0 means no limit");
        }
        if self.pod.shm_size.bytes() < 64 << 10 {
            problems.add("pod.shm_size", "must be at least 64KiB");
        }
    }

    fn handlers(&self, problems: &mut Problems) {
        if !self.runtimes.contains_key(&self.default_runtime) {
            let known: Vec<&str> = self.runtimes.keys().map(String::as_str).collect();
            let reason = format!(
                "there is no runtime {:?}; it must be one of {}",
                self.default_runtime,
                known.join(", ")
            );
            problems.add("default_runtime", reason);
        }
        for (name, runtime) in &self.runtimes {
            // A RuntimeClass's handler is a DNS label.
            let good = (1..=63).contains(&name.len())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !name.starts_with('-')
                && !name.ends_with('-');
            if !good {
                let reason = format!(
                    "{name:?} can't be the name of a handler: at most 63 of a-z, 0-9 and -"
                );
                problems.add("runtimes", reason);
                continue;
            }
            self.handler(name, runtime, problems);
        }
    }

    fn handler(&self, name: &str, runtime: &Runtime, problems: &mut Problems) {
        let key = |field: &str| format!("runtimes.{name}.{field}");
        let native = runtime.kind == RuntimeKind::Native;
        for (field, said) in [
            ("path", runtime.path.is_some()),
            ("root", runtime.root.is_some()),
            ("options", !runtime.options.is_empty()),
        ] {
            if native && said {
                let reason = "is for runtimes of others; type \"native\" has none";
                problems.add(&key(field), reason);
            }
        }
        if native {
            if name == "native" && runtime.create_timeout.is_some() {
                // Not wrong, but one of two places for one thing.
                problems.add(&key("create_timeout"), "set limits.create_timeout");
            }
        } else if name == "native" {
            let reason = "the handler \"native\" is of type \"native\"; give this one another name";
            problems.add(&key("type"), reason);
        }
        if let Some(path) = &runtime.path {
            let short = path.components().count() == 1 && !path.is_absolute();
            let plain = matches!(path.components().next(), Some(Component::Normal(_)));
            if !(short && plain) {
                problems.path(&key("path"), path);
            }
        }
        if let Some(root) = &runtime.root {
            problems.path(&key("root"), root);
        }
        let wrong = match (&runtime.options, runtime.kind) {
            (RuntimeOptions::Table(_), RuntimeKind::Oci) => {
                Some("must be a list of arguments, such as [\"--debug\"]")
            }
            (RuntimeOptions::Arguments(list), RuntimeKind::ShimV2) if !list.is_empty() => {
                Some("must be a table, such as { SystemdCgroup = true }")
            }
            (RuntimeOptions::Arguments(list), _) if list.iter().any(|a| a.contains('\0')) => {
                Some("must not contain NUL bytes")
            }
            _ => None,
        };
        if let Some(reason) = wrong {
            problems.add(&key("options"), reason);
        }
        // What Slipway says itself can't be said again.
        let ours = ["--root", "--log", "--log-format", "--systemd-cgroup"];
        for argument in runtime.options.arguments() {
            let word = argument.split('=').next().unwrap_or_default();
            if ours.contains(&word) {
                let reason = match word {
                    "--root" => "the runtime's root has a key of its own, root".to_owned(),
                    "--systemd-cgroup" => {
                        "--systemd-cgroup follows from cgroup.driver = \"systemd\"".to_owned()
                    }
                    _ => format!("{word} is Slipway's to say, who reads what comes of it"),
                };
                problems.add(&key("options"), reason);
            }
        }
        if runtime.allowed_annotations.iter().any(String::is_empty) {
            let reason = "an empty beginning would let every annotation through; name some";
            problems.add(&key("allowed_annotations"), reason);
        }
        if let Some(file) = &runtime.seccomp_profile {
            problems.path(&key("seccomp_profile"), file);
        }
        if let Some(dir) = &runtime.network_conf_dir {
            problems.path(&key("network_conf_dir"), dir);
        }
        if let Some(timeout) = runtime.create_timeout
            && (timeout.is_zero() || timeout > LONGEST)
        {
            problems.add(&key("create_timeout"), "must be between 1ms and 24h");
        }
    }
}

fn sysctls(all: &BTreeMap<String, String>, problems: &mut Problems) {
    for (name, value) in all {
        let good = !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && name.split('.').all(|part| !part.is_empty());
        if !good {
            let reason = format!("{name:?} is not a sysctl; write net.core.somaxconn");
            problems.add("pod.default_sysctls", reason);
        }
        if value.chars().any(char::is_control) {
            let reason = format!("the value of {name} has a control character in it");
            problems.add("pod.default_sysctls", reason);
        }
    }
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, key: &str, reason: impl Into<String>) {
        self.0.push(Problem {
            key: key.to_owned(),
            reason: reason.into(),
        });
    }

    fn check(&mut self, key: &str, result: Result<(), String>) {
        if let Err(reason) = result {
            self.add(key, reason);
        }
    }

    fn path(&mut self, key: &str, path: &Path) {
        let plain = path
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || !plain || path.as_os_str().as_encoded_bytes().contains(&0) {
            self.add(
                key,
                format!("{} must be an absolute path without ..", path.display()),
            );
        } else if path == Path::new("/") {
            self.add(key, "can't be the root directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn each_bad_value_is_named() {
        let cases: &[(&str, &str)] = &[
            ("listen = 'slipway.sock'", "listen"),
            ("run_root = '/var/lib/slipway'", "run_root"),
            ("state_root = '/var/../etc'", "state_root"),
            ("state_root = '/'", "state_root"),
            ("default_runtime = 'kata'", "default_runtime"),
            ("cgroup.monitor = 'mine'", "cgroup.monitor"),
            ("cgroup.monitor = '/a/../b'", "cgroup.monitor"),
            (
                "images.max_parallel_downloads = 0",
                "images.max_parallel_downloads",
            ),
            ("images.retries = 1000", "images.retries"),
            ("images.connect_timeout = '0s'", "images.connect_timeout"),
            (
                "images.insecure_registries = ['http://x']",
                "images.insecure_registries",
            ),
            ("images.ca_files = ['ca.pem']", "images.ca_files"),
            (
                "images.mirrors = { 'docker.io' = ['a/b'] }",
                "images.mirrors",
            ),
            ("images.pinned = ['a*b*']", "images.pinned"),
            ("images.pinned = ['*a']", "images.pinned"),
            ("images.pinned = ['**']", "images.pinned"),
            ("network.bin_dirs = []", "network.bin_dirs"),
            ("network.conf_dir = ''", "network.conf_dir"),
            ("network.timeout = '2days'", "network.timeout"),
            ("limits.exec_output = 0", "limits.exec_output"),
            (
                "pod.default_capabilities = ['net raw']",
                "pod.default_capabilities",
            ),
            (
                "pod.default_sysctls = { 'net..x' = '1' }",
                "pod.default_sysctls",
            ),
            (
                "pod.default_sysctls = { 'net.x' = \"1\\n2\" }",
                "pod.default_sysctls",
            ),
            ("pod.shm_size = 1", "pod.shm_size"),
            ("pod.apparmor_profile = ''", "pod.apparmor_profile"),
            ("pod.seccomp_profile = 'x.json'", "pod.seccomp_profile"),
            (
                "runtimes = { native = { type = 'native' }, 'Not A Name' = { type = 'native' } }",
                "runtimes",
            ),
            (
                "runtimes = { native = { type = 'oci' } }",
                "runtimes.native.type",
            ),
            (
                "runtimes = { native = { type = 'native', path = '/x' } }",
                "runtimes.native.path",
            ),
        ];
        for (text, key) in cases {
            let config: Config = toml::from_str(text).expect(text);
            let problems = config.validate().expect_err(text);
            assert_eq!(problems.len(), 1, "{text}: {problems:?}");
            assert_eq!(&problems[0].key, key, "{text}");
        }
        for (text, field) in [
            ("path = 'bin/crun'", "path"),
            ("path = '../crun'", "path"),
            ("path = ''", "path"),
            ("root = 'x'", "root"),
            ("options = ['--root', '/x']", "options"),
            ("options = ['--log=/x']", "options"),
            ("options = { a = 1 }", "options"),
            ("allowed_annotations = ['']", "allowed_annotations"),
            ("seccomp_profile = 'x.json'", "seccomp_profile"),
            ("network_conf_dir = 'net.d'", "network_conf_dir"),
            ("create_timeout = '0s'", "create_timeout"),
        ] {
            let text =
                format!("[runtimes.native]\ntype = 'native'\n[runtimes.x]\ntype = 'oci'\n{text}");
            let config: Config = toml::from_str(&text).expect(&text);
            let problems = config.validate().expect_err(&text);
            assert_eq!(problems.len(), 1, "{text}: {problems:?}");
            assert_eq!(problems[0].key, format!("runtimes.x.{field}"), "{text}");
        }
        let good = "[runtimes.native]\ntype = 'native'\n[runtimes.x]\ntype = 'oci'\npath = 'crun'\n\
            options = ['--debug']\nminimum_memory = '6MiB'\nmonitor_cgroup = 'pod'\ncreate_timeout = '1m'\n\
            [runtimes.kata]\ntype = 'shim-v2'\noptions = { ConfigPath = '/x' }";
        let config: Config = toml::from_str(good).expect(good);
        assert_eq!(config.validate(), Ok(()));
        let long = Config {
            listen: format!("/{}", "x".repeat(120)).into(),
            ..Config::default()
        };
        assert_eq!(long.validate().expect_err("too long")[0].key, "listen");
    }
}
