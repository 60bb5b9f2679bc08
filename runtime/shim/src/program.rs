//! The shim's program: `start`, which leaves a shim running and says where it listens, and `delete`, which clears up after one
//! that is gone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::error::ShimError;
use crate::options::Options;
use crate::task::Exit;

/// Most bytes of an answer or of a standard error that are read.
const LONGEST: u64 = 64 << 10;
/// Most characters of either in a message.
const LONGEST_WORDS: usize = 2048;
/// Where a shim looks for its runtime.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Which task API a shim speaks. Their messages are the same, and their names are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// `containerd.task.v2.Task`; up to containerd 1.7.
    #[default]
    V2,
    /// `containerd.task.v3.Task`.
    V3,
}

impl Version {
    /// As a number.
    pub fn number(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
        }
    }

    /// By its number.
    pub fn of(number: u32) -> Option<Self> {
        match number {
            2 => Some(Self::V2),
            3 => Some(Self::V3),
            _ => None,
        }
    }
}

/// Where a shim listens, and what it speaks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Address {
    /// `unix://` and a path, or `unix://@` and a name.
    pub socket: String,
    /// The version of the task API.
    pub version: Version,
}

/// What a `start` of API version 3 answers.
#[derive(serde::Deserialize)]
struct Bootstrap {
    version: u32,
    address: String,
    protocol: String,
}

impl Address {
    /// Reads the answer of `start`: an address alone, or JSON.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(answer: &str) -> Result<Self, String> {
        let answer = answer.trim();
        let (socket, version) = match answer.starts_with('{') {
            false => (answer.to_owned(), Version::V2),
            true => {
                let said: Bootstrap = serde_json::from_str(answer)
                    .map_err(|e| format!("which is no bootstrap answer: {e}"))?;
                if said.protocol != "ttrpc" {
                    return Err(format!(
                        "a protocol ({}) that Slipway does not speak: it is ttrpc that it does",
                        said.protocol
                    ));
                }
                let version = Version::of(said.version).ok_or_else(|| {
                    format!(
                        "version {} of the task API, and Slipway speaks 2 and 3",
                        said.version
                    )
                })?;
                (said.address, version)
            }
        };
        let path = socket.strip_prefix("unix://").unwrap_or(&socket);
        if !path.starts_with(['/', '@', '\0']) || path.len() < 2 || path.contains('\n') {
            return Err("which is no address of a Unix socket".to_owned());
        }
        Ok(Self { socket, version })
    }
}

/// A shim's program and what it is told in every call.
#[derive(Debug, Clone)]
pub struct Program {
    /// The program; absolute.
    pub path: PathBuf,
    /// The namespace, in containerd's sense, which keeps those who use one shim apart.
    pub namespace: String,
    /// Where events are taken (the `ttrpc` service of containerd's); a path.
    pub events: PathBuf,
    /// What it is to be executed with instead of a service for events, by shims that don't know that; it gets the event on its standard
    /// input.
    pub publisher: PathBuf,
    /// The shim is to tell more.
    pub debug: bool,
}

impl Program {
    /// Has a shim started for a container, or finds the one that serves its pod already.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn start(
        &self,
        id: &str,
        bundle: &Path,
        options: Option<&Options>,
        timeout: Duration,
    ) -> Result<Address, ShimError> {
        let debug: &[&str] = if self.debug { &["-debug"] } else { &[] };
        let mut command = self.command(id, bundle);
        command.args(debug).arg("start");
        let input = options.map(Options::encode).unwrap_or_default();
        let answer = self.run(command, "start", &input, timeout)?;
        let answer = String::from_utf8_lossy(&answer);
        Address::parse(&answer).map_err(|problem| ShimError::Answer {
            program: self.path.clone(),
            command: "start",
            answer: shorten(&answer),
            problem,
        })
    }

    /// Clears up after a shim that is gone: what it made of a container is removed.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn delete(&self, id: &str, bundle: &Path, timeout: Duration) -> Result<Exit, ShimError> {
        let mut command = self.command(id, bundle);
        command.arg("-bundle").arg(bundle).arg("delete");
        let answer = self.run(command, "delete", &[], timeout)?;
        let exit = DeleteResponse::parse_from_bytes(&answer).map_err(|e| ShimError::Answer {
            program: self.path.clone(),
            command: "delete",
            answer: shorten(&String::from_utf8_lossy(&answer)),
            problem: e.to_string(),
        })?;
        Ok(Exit {
            code: exit.exit_status,
        })
    }

    fn command(&self, id: &str, bundle: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command
            .current_dir(bundle)
            .env_clear()
            .env("PATH", PATH)
            .env("TTRPC_ADDRESS", &self.events)
            .env("GRPC_ADDRESS", &self.events)
            .env("NAMESPACE", &self.namespace)
            .env("MAX_SHIM_VERSION", "3")
            .env("GOMAXPROCS", "2")
            .arg("-namespace")
            .arg(&self.namespace)
            .arg("-address")
            .arg(&self.events)
            .arg("-publish-binary")
            .arg(&self.publisher)
            .arg("-id")
            .arg(id);
        command
    }

    /// Runs a command to its end. Nothing is a pipe, which a shim that is left behind could hold open.
    fn run(
        &self,
        mut command: Command,
        name: &'static str,
        input: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, ShimError> {
        let not_run = |source: io::Error| ShimError::NotRun {
            program: self.path.clone(),
            source,
        };
        let mut stdin = memory().map_err(not_run)?;
        stdin
            .write_all(input)
            .and_then(|()| stdin.rewind())
            .map_err(not_run)?;
        let (mut stdout, mut stderr) = (memory().map_err(not_run)?, memory().map_err(not_run)?);
        command
            .stdin(Stdio::from(stdin))
            .stdout(stdout.try_clone().map_err(not_run)?)
            .stderr(stderr.try_clone().map_err(not_run)?)
            .process_group(0);
        let child = command.spawn().map_err(not_run)?;
        let status = end_of(child, timeout).map_err(not_run)?;
        let answer = read_back(&mut stdout);
        let said = shorten(&words(&read_back(&mut stderr), &answer));
        match status {
            None => Err(ShimError::Hangs {
                program: self.path.clone(),
                command: name,
                timeout,
                said,
            }),
            Some(status) if !status.success() => Err(ShimError::Failed {
                program: self.path.clone(),
                command: name,
                status: describe(status),
                said,
            }),
            Some(_) => Ok(answer),
        }
    }
}

fn memory() -> io::Result<File> {
    Ok(memfd_create("shim", MemfdFlags::CLOEXEC)?.into())
}

fn read_back(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.take(LONGEST).read_to_end(&mut bytes));
    read.map_or_else(|_| Vec::new(), |_| bytes)
}

/// What a failed program has to say.
fn words(stderr: &[u8], stdout: &[u8]) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match of(stderr) {
        text if text.is_empty() => of(stdout),
        text => text,
    }
}

fn shorten(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match text.char_indices().nth(LONGEST_WORDS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.trim().to_owned(),
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".to_owned(),
    }
}

/// Waits for a child's end; `None` when it had to be killed, with all of its process group.
fn end_of(mut child: Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let until = Instant::now() + timeout;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&left)) {
            Ok(0) => break,
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let _ = kill_process_group(pid, Signal::KILL);
    // One in an uninterruptible wait is left to whoever reaps for this process.
    let moment = Timespec {
        tv_sec: 2,
        tv_nsec: 0,
    };
    if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&moment)).is_ok_and(|n| n > 0) {
        let _ = child.wait();
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn answers() {
        let address = Address::parse("unix:///run/containerd/s/abc\n").unwrap();
        assert_eq!(address.socket, "unix:///run/containerd/s/abc");
        assert_eq!(address.version, Version::V2);
        let json = r#"{"version":3,"address":"unix:///s","protocol":"ttrpc"}"#;
        assert_eq!(Address::parse(json).unwrap().version, Version::V3);
        assert!(Address::parse("@abstract").is_ok());
        for (answer, problem) in [
            ("", "no address"),
            ("garbage", "no address"),
            ("unix://", "no address"),
            ("tcp://1.2.3.4:5", "no address"),
            ("/run/a\n/run/b", "no address"),
            ("{\"version\":3}", "no bootstrap answer"),
            (
                r#"{"version":3,"address":"unix:///s","protocol":"grpc"}"#,
                "grpc",
            ),
            (
                r#"{"version":9,"address":"unix:///s","protocol":"ttrpc"}"#,
                "version 9",
            ),
        ] {
            let error = Address::parse(answer).unwrap_err();
            assert!(error.contains(problem), "{answer}: {error}");
        }
    }

    fn program(dir: &Path, script: &str) -> Program {
        let path = dir.join("shim");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Program {
            path,
            namespace: "ns".into(),
            events: "/e".into(),
            publisher: "/p".into(),
            debug: true,
        }
    }

    #[test]
    fn programs_of_all_kinds() {
        let dir = tempfile::tempdir().unwrap();
        let start = |script: &str, timeout: u64| {
            program(dir.path(), script).start(
                "id1",
                dir.path(),
                None,
                Duration::from_millis(timeout),
            )
        };
        // What it leaves running holds its streams open, and nobody waits for that.
        let address = start(
            "sleep 60 & echo \"unix:///$(pwd | wc -c)$TTRPC_ADDRESS $*\"",
            5000,
        );
        let address = address.unwrap().socket;
        let told = "/e -namespace ns -address /e -publish-binary /p -id id1 -debug start";
        assert!(address.ends_with(told), "{address}");
        for (script, timeout, words) in [
            ("echo oops >&2; exit 3", 5000, "exit status 3: oops"),
            ("kill -9 $$", 5000, "signal 9"),
            (
                "echo half; sleep 60",
                300,
                "did not end within 300ms and was killed; it said: half",
            ),
            (
                "echo garbage",
                5000,
                "answered \"garbage\", which is no address",
            ),
            ("true", 5000, "answered \"\""),
        ] {
            let error = start(script, timeout).unwrap_err().to_string();
            assert!(error.contains(words), "{script}: {error}");
        }
        let mut missing = program(dir.path(), "");
        missing.path = "/nonexistent/shim".into();
        let error = missing.start("a", dir.path(), None, Duration::from_secs(1));
        assert!(matches!(error, Err(ShimError::NotRun { .. })), "{error:?}");
        let gone = program(dir.path(), "printf '\\020\\211\\001'");
        let exit = gone
            .delete("a", dir.path(), Duration::from_secs(5))
            .unwrap();
        assert_eq!(exit.code, 137);
    }
}
