//! Runtimes of others: where they are, and what they say of themselves.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};

/// How long a runtime may take to say what it can do.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is read of its answer, in bytes.
const LONGEST: u64 = 1 << 20;
/// Where programs are looked for, after PATH.
const USUAL: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// What a runtime says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RuntimeFacts {
    /// The first line of `--version`.
    pub version: String,
    /// What its `features` command says; none of a runtime that has no such command.
    pub features: Option<RuntimeFeatures>,
    /// The containers of a pod share a sandbox that it makes: gVisor's `runsc`, by the name it gives itself.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pod_sandbox: bool,
    /// It is youki's command line, by the name it gives itself.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub youki: bool,
    /// Its containers can join a user namespace. By its features; where it has no such command, by its name and version,
    /// and then only those are known that could do so before they had one.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub user_namespaces: bool,
    /// What is not known of it, or different about it, for the operator.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What an operator must know of youki.
const YOUKI: &str =
    "what it executes in a container has no seccomp filter: youki 0.7 leaves it out in exec";
/// What a command-line runtime without a `features` command is told to be.
const NO_FEATURES: &str = "it has no features command, so nothing is known of its features";
/// What is different about gVisor's.
const POD_SANDBOX: &str = "the containers of a pod share one sandbox (gVisor)";

/// What is missing of one that says so.
const NO_USERS: &str = "it does not say that it knows user namespaces, so its pods have none";
/// What is different about youki's.
const EXEC_OUTSIDE: &str = "its exec leaves a command in the host's user namespace (youki 0.7), so its pods have no \
                            user namespaces";
/// Runtimes that could join user namespaces by path before they had a `features` command (runc 1.1, crun 1.8.6), by the
/// beginning of what they say to `--version`.
const JOIN_USERS: [&str; 2] = ["runc version 1.", "crun version 1."];

/// What a runtime can do (features.md of the runtime specification), as far as anything here depends on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeFeatures {
    /// The newest version of the specification that it knows.
    pub oci_version_max: String,
    /// Stages of hooks.
    pub hooks: Vec<String>,
    /// Options of mounts.
    pub mount_options: Vec<String>,
    /// For Linux.
    pub linux: LinuxFeatures,
    /// What else it says.
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// See [`RuntimeFeatures`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinuxFeatures {
    /// Kinds of namespaces.
    pub namespaces: Vec<String>,
    /// Versions and managers of cgroups.
    pub cgroup: serde_json::Value,
    /// Extensions of mounts.
    pub mount_extensions: serde_json::Value,
}

/// A program's file, to tell whether it was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity([u64; 5]);

impl Identity {
    /// Of the file at this path now; `None` without one.
    pub fn of(path: &Path) -> Option<Self> {
        let m = std::fs::metadata(path).ok()?;
        let changed = [m.ctime().cast_unsigned(), m.ctime_nsec().cast_unsigned()];
        Some(Self([m.dev(), m.ino(), m.size(), changed[0], changed[1]]))
    }
}

/// The program of this name or path.
///
/// # Errors
/// What is wrong with it, for the operator.
pub fn find_program(name: &Path) -> Result<PathBuf, String> {
    let executable = |path: &Path| {
        let found = std::fs::metadata(path);
        found.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if name.is_absolute() {
        return match std::fs::metadata(name) {
            Err(e) => Err(format!("{}: {e}", name.display())),
            Ok(_) if !executable(name) => Err(format!("{} is no program", name.display())),
            Ok(_) => Ok(name.to_owned()),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(USUAL.map(PathBuf::from))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|path| executable(path))
        .ok_or_else(|| {
            format!(
                "there is no program {:?} in PATH",
                name.display().to_string()
            )
        })
}

/// Asks a runtime what it can do. Blocks, for a few seconds at most.
///
/// # Errors
/// Why it can't be used, for the operator.
pub fn ask_runtime(path: &Path) -> Result<RuntimeFacts, String> {
    let until = Instant::now() + PATIENCE;
    let shown = path.display();
    let hung = || format!("{shown} does not answer within {} s", PATIENCE.as_secs());
    let answer = run(path, &["features"], until).map_err(|e| format!("can't run {shown}: {e}"))?;
    let features = match answer {
        None => return Err(hung()),
        Some((status, text, _)) if status.success() => serde_json::from_str(&text).ok(),
        // Runtimes from before there was such a command.
        Some(_) => None,
    };
    match run(path, &["--version"], until).map_err(|e| format!("can't run {shown}: {e}"))? {
        None => Err(hung()),
        Some((status, text, _)) if status.success() || features.is_some() => {
            let version = text.lines().next().unwrap_or_default().trim().to_owned();
            let pod_sandbox = version.starts_with("runsc version ");
            let youki = version.starts_with("youki version");
            let user_namespaces =
                !pod_sandbox && !youki && joins_users(features.as_ref(), &version);
            let silent = !pod_sandbox && !youki && !user_namespaces;
            let notes = [
                (features.is_none(), NO_FEATURES),
                (pod_sandbox, POD_SANDBOX),
                (youki, YOUKI),
                (youki, EXEC_OUTSIDE),
                (silent, NO_USERS),
            ];
            let notes = notes.into_iter().filter(|(holds, _)| *holds);
            Ok(RuntimeFacts {
                version,
                features,
                pod_sandbox,
                youki,
                user_namespaces,
                notes: notes.map(|(_, note)| note.to_owned()).collect(),
            })
        }
        Some((status, text, error)) => {
            let said = error
                .lines()
                .chain(text.lines())
                .find(|l| !l.trim().is_empty());
            let said = said.map_or("it said nothing", str::trim);
            let said: String = said.chars().take(300).collect();
            Err(format!("{shown} --version failed ({status}): {said}"))
        }
    }
}

fn joins_users(features: Option<&RuntimeFeatures>, version: &str) -> bool {
    match features {
        Some(said) => said.linux.namespaces.iter().any(|kind| kind == "user"),
        None => JOIN_USERS.iter().any(|known| version.starts_with(known)),
    }
}

/// Has a runtime do something beside what its keepers have it do, for a few seconds at most. Blocks.
///
/// # Errors
/// Why it did not, for the operator.
pub fn tell_runtime(path: &Path, arguments: &[&str]) -> Result<(), String> {
    runtime_says(path, arguments, PATIENCE).map(drop)
}

/// Has a runtime say something, within this time. Blocks.
///
/// # Errors
/// Why it did not, for the operator.
pub fn runtime_says(path: &Path, arguments: &[&str], patience: Duration) -> Result<String, String> {
    let shown = path.display();
    let answer = run(path, arguments, Instant::now() + patience);
    match answer.map_err(|e| format!("can't run {shown}: {e}"))? {
        None => Err(format!(
            "{shown} did not end within {} s",
            patience.as_secs()
        )),
        Some((status, text, _)) if status.success() => Ok(text),
        Some((status, _, error)) => Err(format!("{shown} ({status}): {}", error.trim())),
    }
}

/// The program of a shim: by its path, its name, or the name of its runtime as containerd has it
/// (`io.containerd.runc.v2` is `containerd-shim-runc-v2`).
pub fn shim_program(name: &Path) -> PathBuf {
    let text = name.to_string_lossy();
    let parts: Vec<&str> = text.split('.').collect();
    match parts.as_slice() {
        [_, .., name, version] if !text.contains('/') && !text.starts_with("containerd-shim-") => {
            PathBuf::from(format!("containerd-shim-{name}-{version}"))
        }
        _ => name.to_owned(),
    }
}

/// Asks a shim for its version. Blocks, for a few seconds at most.
///
/// # Errors
/// Why it can't be used, for the operator.
pub fn ask_shim(path: &Path) -> Result<RuntimeFacts, String> {
    let shown = path.display();
    let until = Instant::now() + PATIENCE;
    let answer = run(path, &["-v"], until).map_err(|e| format!("can't run {shown}: {e}"))?;
    let (_, text, _) =
        answer.ok_or_else(|| format!("{shown} does not answer within {} s", PATIENCE.as_secs()))?;
    // Go's print a name, and then a line for each thing.
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Version:"));
    let line = line.or_else(|| text.lines().next());
    Ok(RuntimeFacts {
        version: line.unwrap_or_default().trim().to_owned(),
        ..RuntimeFacts::default()
    })
}

/// Exit status, standard output and standard error; `None` when it did not end in time and was killed.
fn run(
    path: &Path,
    arguments: &[&str],
    until: Instant,
) -> io::Result<Option<(ExitStatus, String, String)>> {
    // Files, not pipes: what it has started may hold those open for ever.
    let (out, error) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = Command::new(path)
        .args(arguments)
        .env_clear()
        .env("PATH", USUAL.join(":"))
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(error.try_clone()?)
        .spawn()?;
    if !ends(&child, until) {
        end_group(&child);
        child.kill()?;
        // One that the kernel holds is left to whom it is reparented to.
        if ends(&child, Instant::now() + Duration::from_secs(1)) {
            child.wait()?;
        }
        return Ok(None);
    }
    end_group(&child);
    let status = child.wait()?;
    Ok(Some((status, text(out)?, text(error)?)))
}

fn end_group(child: &Child) {
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn ends(child: &Child, until: Instant) -> bool {
    let pid = Pid::from_raw(child.id().cast_signed());
    let Some(Ok(process)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return false;
    };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(timeout) = rustix::event::Timespec::try_from(left) else {
            return false;
        };
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Err(rustix::io::Errno::INTR) => {}
            other => return other.is_ok(),
        }
    }
}

fn text(mut file: File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("runtime");
        // By rename: a file that some other test's fork still holds open for writing can't be executed.
        std::fs::write(dir.join("draft"), format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(dir.join("draft"), PermissionsExt::from_mode(0o755)).unwrap();
        let copied = Command::new("cp")
            .arg(dir.join("draft"))
            .arg(&path)
            .status();
        assert!(copied.unwrap().success());
        path
    }

    #[test]
    fn what_runtimes_say() {
        let dir = tempfile::tempdir().unwrap();
        let old = "[ $1 = --version ] && echo 'crun version 1.8.1' && exit; echo unknown command >&2; exit 1";
        let facts = ask_runtime(&script(dir.path(), old)).unwrap();
        assert_eq!(facts.version, "crun version 1.8.1");
        assert_eq!(facts.features, None);
        assert!(facts.user_namespaces);
        let new = r#"[ $1 = --version ] && echo 'x 2' && exit; echo '{"ociVersionMax":"1.2.0","mountOptions":["rro"],
            "linux":{"namespaces":["user"]},"other":1}'"#;
        let facts = ask_runtime(&script(dir.path(), new)).unwrap();
        let features = facts.features.clone().unwrap();
        assert_eq!(features.mount_options, ["rro"]);
        assert_eq!(features.linux.namespaces, ["user"]);
        assert!(facts.user_namespaces && facts.notes.is_empty());
        // What says nothing of them has none, whatever it is called.
        for text in [
            r#"[ $1 = --version ] && echo 'crun version 1.9' && exit; echo '{"linux":{"namespaces":["pid"]}}'"#,
            r#"[ $1 = --version ] && echo 'youki version: 0.7.0' && exit; echo '{"linux":{"namespaces":["user"]}}'"#,
            "[ $1 = --version ] && echo 'crun version 0.17' && exit; exit 1",
            "[ $1 = --version ] && echo 'runsc version 1' && exit; exit 1",
        ] {
            let facts = ask_runtime(&script(dir.path(), text)).unwrap();
            assert!(!facts.user_namespaces && !facts.notes.is_empty(), "{text}");
        }
    }

    #[test]
    fn shims() {
        for (name, program) in [
            ("io.containerd.runc.v2", "containerd-shim-runc-v2"),
            ("containerd-shim-runc-v2", "containerd-shim-runc-v2"),
            ("/opt/x.y.z/shim.v2", "/opt/x.y.z/shim.v2"),
            ("kata", "kata"),
        ] {
            assert_eq!(shim_program(Path::new(name)), Path::new(program));
        }
        let dir = tempfile::tempdir().unwrap();
        let answer = "echo 'a-shim:'; echo '  Version:  1.2.3'; echo '  Revision: x'";
        let facts = ask_shim(&script(dir.path(), answer)).unwrap();
        assert_eq!(facts.version, "1.2.3");
        assert!(ask_shim(Path::new("/nonexistent/shim")).is_err());
    }

    #[test]
    fn runtimes_that_can_not_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask_runtime(&script(dir.path(), "echo no luck >&2; exit 3")).unwrap_err();
        assert!(error.contains("no luck") && error.contains('3'), "{error}");
        let began = Instant::now();
        let error = ask_runtime(&script(dir.path(), "sleep 60 & sleep 60")).unwrap_err();
        assert!(error.contains("does not answer"), "{error}");
        assert!(began.elapsed() < PATIENCE * 2);
        assert!(find_program(Path::new("/nonexistent/x")).is_err());
        assert!(find_program(dir.path()).is_err());
        let error = find_program(Path::new("no-such-runtime")).unwrap_err();
        assert!(error.contains("no-such-runtime"), "{error}");
        assert!(find_program(Path::new("sh")).unwrap().is_absolute());
    }
}
