//! Running OCI hooks (config.md, "POSIX-platform Hooks"): the container's state on standard input, an exit code that is 0,
//! in the time that the hook has.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks};
use rustix::fs::{MemfdFlags, memfd_create};
use slipway_runtime::cgroup;
use slipway_runtime::removal::wait;

use crate::log::Log;
use crate::record::{OCI_VERSION, Record, Status};

/// How much of what a failed hook wrote is quoted, in bytes.
const LONGEST: u64 = 2048;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be executed, or not waited for.
    #[error("can't run the {kind} hook {}", path.display())]
    Run {
        /// `createRuntime` and so on.
        kind: &'static str,
        /// The hook.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("the {kind} hook {} {how}{said}", path.display())]
    Failed {
        /// `createRuntime` and so on.
        kind: &'static str,
        /// The hook.
        path: PathBuf,
        /// How it ended.
        how: String,
        /// What it said, with a prefix.
        said: String,
    },
    /// The namespaces of the container could not be entered.
    #[error("can't enter the container's namespaces for its {kind} hooks: {reason}")]
    Enter {
        /// `createContainer`.
        kind: &'static str,
        /// In words.
        reason: String,
    },
}

/// The hooks of one kind.
#[allow(deprecated)]
pub fn of<'a>(hooks: Option<&'a Hooks>, kind: &str) -> &'a [Hook] {
    let Some(hooks) = hooks else { return &[] };
    let list = match kind {
        "prestart" => hooks.prestart(),
        "createRuntime" => hooks.create_runtime(),
        "createContainer" => hooks.create_container(),
        "startContainer" => hooks.start_container(),
        "poststart" => hooks.poststart(),
        _ => hooks.poststop(),
    };
    list.as_deref().unwrap_or_default()
}

/// The state that hooks get.
pub fn state(record: &Record, status: Status, pid: Option<i32>) -> serde_json::Value {
    let mut state = serde_json::json!({
        "ociVersion": OCI_VERSION,
        "id": record.id,
        "status": status.to_string(),
        "bundle": record.bundle,
    });
    if let Some(pid) = pid {
        state["pid"] = pid.into();
    }
    if !record.annotations.is_empty() {
        state["annotations"] = serde_json::json!(record.annotations);
    }
    state
}

/// Runs hooks one after the other, up to the first that fails. A hook without an environment gets `env`.
///
/// # Errors
/// [`HookError`].
pub fn run(
    kind: &'static str,
    hooks: &[Hook],
    state: &serde_json::Value,
    env: &[String],
) -> Result<(), HookError> {
    hooks
        .iter()
        .try_for_each(|hook| one(kind, hook, state, env))
}

/// Runs hooks whose failure changes nothing: each is told of, and the next one runs.
pub fn run_all(kind: &'static str, hooks: &[Hook], state: &serde_json::Value, log: &Log) {
    for hook in hooks {
        if let Err(error) = one(kind, hook, state, &[]) {
            log.warning(&slipway_runtime::confine::chain(&error));
        }
    }
}

fn one(
    kind: &'static str,
    hook: &Hook,
    state: &serde_json::Value,
    env: &[String],
) -> Result<(), HookError> {
    let failed = |source: io::Error| HookError::Run {
        kind,
        path: hook.path().clone(),
        source,
    };
    // Files in memory: a hook that does not read, or writes much, blocks nobody.
    let memory = |name| -> io::Result<File> { Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into()) };
    let mut input = memory("state").map_err(failed)?;
    input
        .write_all(state.to_string().as_bytes())
        .map_err(failed)?;
    input.rewind().map_err(failed)?;
    let mut output = memory("output").map_err(failed)?;
    let said = || -> io::Result<[Stdio; 2]> {
        Ok([output.try_clone()?.into(), output.try_clone()?.into()])
    };
    let [stdout, stderr] = said().map_err(failed)?;

    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(args);
    }
    let env = hook.env().as_deref().unwrap_or(env);
    let pairs = env.iter().filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(pairs);
    command.stdin(input).stdout(stdout).stderr(stderr);
    let mut child = command.spawn().map_err(failed)?;
    let time = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let mut late = false;
    if let Some(time) = time.map(Duration::from_secs)
        && let Some(process) = cgroup::pin(child.id().cast_signed())
    {
        wait(&process, Instant::now() + time);
        if child.try_wait().map_err(failed)?.is_none() {
            late = true;
            let _ = child.kill();
        }
    }
    let status = child.wait().map_err(failed)?;
    if status.success() && !late {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        _ if late => format!(
            "did not end in its time ({} seconds)",
            time.unwrap_or_default()
        ),
        (Some(code), _) => format!("exited with {code}"),
        (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
    };
    let mut words = Vec::new();
    let _ = output
        .rewind()
        .and_then(|()| output.take(LONGEST).read_to_end(&mut words));
    let words = String::from_utf8_lossy(&words);
    let said = match words.trim() {
        "" => String::new(),
        words => format!("; it said: {words}"),
    };
    Err(HookError::Failed {
        kind,
        path: hook.path().clone(),
        how,
        said,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": timeout});
        serde_json::from_value(hook).unwrap()
    }

    fn state() -> serde_json::Value {
        serde_json::json!({"id": "x", "bundle": "/b"})
    }

    #[test]
    fn a_hook_reads_the_state_and_has_no_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("read -r line; echo \"$line $HOME\" > {}", out.display());
        run("prestart", &[hook(&script, Some(10))], &state(), &[]).unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        assert_eq!(text.trim(), state().to_string());
    }

    #[test]
    fn failures_are_told_with_the_hooks_words() {
        let error = run(
            "prestart",
            &[hook("echo no >&2; exit 3", None)],
            &state(),
            &[],
        );
        let text = error.unwrap_err().to_string();
        assert!(text.contains("exited with 3; it said: no"), "{text}");
        let started = Instant::now();
        let error = run("prestart", &[hook("exec sleep 60", Some(1))], &state(), &[]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("in its time (1 seconds)"), "{text}");
        assert!(started.elapsed() < Duration::from_secs(30));
        let missing: Hook =
            serde_json::from_value(serde_json::json!({"path": "/no/hook"})).unwrap();
        assert!(matches!(
            run("prestart", &[missing], &state(), &[]),
            Err(HookError::Run { .. })
        ));
    }

    #[test]
    fn the_first_failure_ends_it_unless_it_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let second = hook(&format!("touch {}", out.display()), None);
        let hooks = [hook("exit 1", None), second];
        assert!(run("prestart", &hooks, &state(), &[]).is_err());
        assert!(!out.exists());
        let options = liboci_cli::GlobalOpts {
            log: Some(dir.path().join("log")),
            debug: false,
            log_format: Some("json".into()),
            root: None,
            systemd_cgroup: false,
        };
        run_all("poststart", &hooks, &state(), &Log::open(&options).unwrap());
        assert!(out.exists());
        let line = std::fs::read_to_string(dir.path().join("log")).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["level"], "warning");
    }
}
