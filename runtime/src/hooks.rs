//! OCI hooks (runtime-spec, config.md "POSIX-platform Hooks") that libcontainer does not run: `startContainer` in the
//! container's init, `poststart` and `poststop` on the host, those of runtimes that are none of ours.
//!
//! A hook gets the container's state on its standard input, is the leader of a process group of its own, and is
//! killed with it when its time is over. What it writes to standard error is quoted when it fails. It dies with
//! whoever runs it. Works in the forked processes of this crate and in a thread that may block; the caller
//! must not collect foreign children meanwhile.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::{ContainerState, Hook, Spec, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::cgroup::pin;
use crate::sys;

/// What a hook gets that names no timeout.
pub const LONGEST: Duration = Duration::from_secs(30);
/// How much of a hook's standard error a message quotes, in bytes.
const QUOTED: u64 = 2048;
/// File in a container's directory with its `poststop` hooks; who removes it runs them.
const POSTSTOP: &str = "poststop.json";

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("can't run the {when} hook {}", path.display())]
    Execute {
        /// Which list it is in.
        when: &'static str,
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It said that it failed, or was killed.
    #[error("the {when} hook {} {how}{said}", path.display())]
    Failed {
        /// Which list it is in.
        when: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        how: String,
        /// What it wrote to standard error, to be appended.
        said: String,
    },
    /// It took too long, and was killed.
    #[error("the {when} hook {} did not end within {limit:?} and was killed{said}", path.display())]
    Timeout {
        /// Which list it is in.
        when: &'static str,
        /// The program.
        path: PathBuf,
        /// The time it had.
        limit: Duration,
        /// What it wrote to standard error, to be appended.
        said: String,
    },
}

/// A list of hooks and what they are told.
#[derive(Debug, Clone)]
pub struct Hooks<'a> {
    /// Name of the list, for messages: `poststart`.
    pub when: &'static str,
    /// To be run one after the other.
    pub list: &'a [Hook],
    /// The container's state.
    pub state: &'a State,
    /// `KEY=VALUE`: the environment of those that bring none.
    pub env: &'a [OsString],
}

impl Hooks<'_> {
    /// Runs them until one fails.
    ///
    /// # Errors
    /// [`HookError`] of the first that failed.
    pub fn run(&self) -> Result<(), HookError> {
        self.list.iter().try_for_each(|hook| self.run_one(hook))
    }

    /// Runs all of them; the failures are for a warning.
    pub fn run_each(&self) -> Vec<HookError> {
        let each = self.list.iter().map(|hook| self.run_one(hook));
        each.filter_map(Result::err).collect()
    }

    fn run_one(&self, hook: &Hook) -> Result<(), HookError> {
        let failed = |source| HookError::Execute {
            when: self.when,
            path: hook.path().clone(),
            source,
        };
        let limit = time_of(hook);
        let deadline = Instant::now() + limit;
        let mut complaints = memory("hook-stderr").map_err(failed)?;
        let mut child = self.spawn(hook, &complaints).map_err(failed)?;
        let status = wait(&mut child, deadline).map_err(failed)?;
        let said = said(&mut complaints);
        let path = hook.path().clone();
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(HookError::Failed {
                when: self.when,
                path,
                how: how(status),
                said,
            }),
            None => Err(HookError::Timeout {
                when: self.when,
                path,
                limit,
                said,
            }),
        }
    }

    fn spawn(&self, hook: &Hook, complaints: &File) -> io::Result<Child> {
        // A file in memory, so that nobody has to write while somebody else should read.
        let mut stdin = memory("hook-state")?;
        serde_json::to_writer(&stdin, self.state)?;
        stdin.rewind()?;
        let mut command = Command::new(hook.path());
        // The first argument is the name that the program goes by.
        if let Some((name, rest)) = hook.args().as_ref().and_then(|args| args.split_first()) {
            command.arg0(name).args(rest);
        }
        command.env_clear();
        match hook.env() {
            Some(own) => own.iter().for_each(|v| set(&mut command, OsStr::new(v))),
            None => self.env.iter().for_each(|v| set(&mut command, v)),
        }
        command
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::null())
            .stderr(Stdio::from(complaints.try_clone()?))
            .process_group(0);
        sys::die_with_parent(&mut command);
        command.spawn()
    }
}

fn set(command: &mut Command, variable: &OsStr) {
    let bytes = variable.as_bytes();
    // An entry without "=" is none that execve would hand on as a variable.
    if let Some(at) = bytes.iter().position(|b| *b == b'=').filter(|at| *at > 0) {
        let (key, value) = (&bytes[..at], &bytes[at + 1..]);
        command.env(OsStr::from_bytes(key), OsStr::from_bytes(value));
    }
}

/// An empty file in memory.
fn memory(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

/// Waits for a hook's end; `None` when it had to be killed.
fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    // Not waited for yet, so the number is still its own.
    let group = Pid::from_raw(child.id().cast_signed());
    let Some(process) = pin(child.id().cast_signed()) else {
        return child.wait().map(Some);
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        match poll(
            &mut [PollFd::new(&process, PollFlags::IN)],
            timeout.as_ref(),
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => {
                let _ = killpg(group, Signal::SIGKILL);
                child.wait()?;
                return Ok(None);
            }
            // A poll that fails leaves the wait without a limit, which is better than a child that nobody collects.
            _ => return child.wait().map(Some),
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "failed".to_owned(),
    }
}

/// The end of a message: what was written to standard error, or nothing.
pub(crate) fn said(file: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(QUOTED).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    match (read, text.trim()) {
        (Ok(_), text) if !text.is_empty() => format!("; the hook said: {text}"),
        _ => String::new(),
    }
}

/// How long a hook may take.
fn time_of(hook: &Hook) -> Duration {
    let own = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    own.filter(|seconds| *seconds > 0)
        .map_or(LONGEST, Duration::from_secs)
}

/// How long hooks may take together: what a caller adds to its deadline.
pub fn patience(list: Option<&Vec<Hook>>) -> Duration {
    list.into_iter().flatten().map(time_of).sum()
}

/// The state of the container that this OCI spec is of. Its bundle has a `config.json`.
pub fn state(spec: &Spec, id: &str, bundle: &Path, status: ContainerState, pid: i32) -> State {
    let mut state = State::default();
    state
        .set_version(spec.version().clone())
        .set_id(id.to_owned())
        .set_status(status)
        .set_pid(Some(pid).filter(|pid| *pid > 0))
        .set_bundle(bundle.to_owned())
        .set_annotations(
            spec.annotations()
                .clone()
                .filter(|a: &HashMap<_, _>| !a.is_empty()),
        );
    state
}

/// Puts a container's `poststop` hooks down in its directory, from where [`run_poststop`] takes them, whoever then
/// lives. Nothing for a container without any.
///
/// # Errors
/// What writing the file says.
pub fn leave_poststop(spec: &Spec, id: &str, dir: &Path) -> io::Result<()> {
    let hooks = spec.hooks().as_ref().and_then(|h| h.poststop().as_ref());
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else {
        return Ok(());
    };
    let state = state(spec, id, dir, ContainerState::Stopped, 0);
    let bytes = serde_json::to_vec(&(state, hooks))?;
    let mut options = File::options();
    // The environment of hooks is nobody else's business.
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(dir.join(POSTSTOP))?.write_all(&bytes)
}

/// Runs the `poststop` hooks of the container with this directory, which has been taken apart. Once: the second
/// caller finds none. Answers with what went wrong, which is for a warning (runtime-spec, runtime.md
/// "Lifecycle", 13).
pub fn run_poststop(dir: &Path) -> Vec<String> {
    let file = dir.join(POSTSTOP);
    let claimed = fs::read(&file).and_then(|bytes| fs::remove_file(&file).map(|()| bytes));
    let unread =
        |e: &dyn std::fmt::Display| vec![format!("poststop hooks of {}: {e}", dir.display())];
    let bytes = match claimed {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(e) => return unread(&e),
    };
    let (state, list): (State, Vec<Hook>) = match serde_json::from_slice(&bytes) {
        Ok(read) => read,
        Err(e) => return unread(&e),
    };
    let hooks = Hooks {
        when: "poststop",
        list: &list,
        state: &state,
        env: &[],
    };
    let failures = hooks.run_each();
    failures.iter().map(|e| crate::confine::chain(e)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout: Option<i64>) -> Hook {
        let mut hook = Hook::default();
        hook.set_path("/bin/sh".into())
            .set_args(Some(["sh", "-c", script].map(str::to_owned).to_vec()))
            .set_timeout(timeout);
        hook
    }

    fn spec(hooks: serde_json::Value) -> Spec {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2", "annotations": {"a": "b"}, "hooks": hooks,
        });
        serde_json::from_value(spec).unwrap()
    }

    fn run(list: &[Hook], env: &[OsString]) -> Vec<String> {
        let state = state(
            &spec(serde_json::json!({})),
            "c",
            Path::new("/b"),
            ContainerState::Running,
            7,
        );
        let hooks = Hooks {
            when: "poststart",
            list,
            state: &state,
            env,
        };
        let failures = hooks.run_each();
        assert_eq!(hooks.run().is_err(), !failures.is_empty());
        failures.iter().map(|e| crate::confine::chain(e)).collect()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let mut own = sh(
            &format!("/bin/cat >{out}; echo $K $0 >>{out}; exit 0"),
            None,
        );
        own.set_env(Some(vec!["K=own".to_owned(), "odd".to_owned()]));
        assert_eq!(run(&[own], &["K=default".into()]), [""; 0]);
        let text = fs::read_to_string(&out).unwrap();
        let (json, rest) = text.split_at(text.rfind('}').unwrap() + 1);
        let state: serde_json::Value = serde_json::from_str(json).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.0.2", "id": "c", "status": "running", "pid": 7, "bundle": "/b",
            "annotations": {"a": "b"},
        });
        assert_eq!((state, rest), (expected, "own sh\n"));
        let default = sh(&format!("echo $K >{out}"), None);
        assert_eq!(run(&[default], &["K=default".into()]), [""; 0]);
        assert_eq!(fs::read_to_string(&out).unwrap(), "default\n");
    }

    #[test]
    fn failures_say_why_and_what_the_hook_said() {
        let mut absent = Hook::default();
        absent.set_path("/no/such".into());
        let list = [
            sh("echo no driver >&2; exit 3", None),
            absent,
            sh("kill -9 $$", None),
            sh("echo slow >&2; sleep 1000 & wait", Some(1)),
        ];
        let begin = Instant::now();
        let failures = run(&list, &[]);
        assert!(begin.elapsed() < Duration::from_secs(20));
        let expected = [
            "the poststart hook /bin/sh exited with 3; the hook said: no driver",
            "can't run the poststart hook /no/such: No such file or directory (os error 2)",
            "the poststart hook /bin/sh was killed by signal 9",
            "the poststart hook /bin/sh did not end within 1s and was killed; the hook said: slow",
        ];
        assert_eq!(failures, expected);
    }

    #[test]
    fn poststop_hooks_run_once() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("/bin/cat >>{}; exit 4", out.display());
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        let spec = spec(serde_json::json!({"poststop": [hook]}));
        leave_poststop(&spec, "c", dir.path()).unwrap();
        assert_eq!(run_poststop(dir.path()).len(), 1);
        assert_eq!(run_poststop(dir.path()), [""; 0]);
        let told = fs::read_to_string(&out).unwrap();
        assert_eq!(told.matches("\"stopped\"").count(), 1, "{told}");
        fs::write(dir.path().join(POSTSTOP), "junk").unwrap();
        assert!(run_poststop(dir.path())[0].contains("poststop hooks of"));
        let none = spec_without_hooks();
        leave_poststop(&none, "c", dir.path()).unwrap();
        assert!(!dir.path().join(POSTSTOP).exists());
    }

    fn spec_without_hooks() -> Spec {
        spec(serde_json::json!({}))
    }

    #[test]
    fn patience_is_what_all_may_take() {
        let list = vec![sh("", Some(5)), sh("", None), sh("", Some(-1))];
        assert_eq!(patience(Some(&list)), Duration::from_secs(5) + 2 * LONGEST);
        assert_eq!(patience(None), Duration::ZERO);
    }
}
