//! Runs one plugin once (CNI specification, section 2): environment and standard input in,
//! standard output and exit status out, within a deadline and bounded memory.

use crate::name::check_plugin_type;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// A result is a few kilobytes; more than this is a plugin gone wild.
const MAX_OUTPUT: usize = 1 << 20;
/// How much of a plugin's standard error is kept; the rest is read and dropped.
const MAX_COMPLAINT: usize = 4 << 10;
/// How long output is awaited after the plugin's exit, when something it started holds the pipe open.
const AFTER_EXIT: Duration = Duration::from_millis(500);
/// An executable that is being replaced (`ETXTBSY`) gives no event to wait for.
const BUSY_RETRY: Duration = Duration::from_millis(50);
const BUSY_RETRIES: u32 = 40;
/// The daemon's own dealings with the service manager are none of a plugin's.
const WITHHELD: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
];

/// Why a plugin gave no answer, or not the one wanted. Which plugin it was is said by
/// [`StepError`](crate::StepError).
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum PluginError {
    #[error(
        "there is no such executable in {dirs}: install the plugin there, or name its directory in the configuration"
    )]
    Missing { dirs: String },
    #[error("its type {0:?} is not the name of a file in a plugin directory")]
    Type(String),
    #[error("cannot run {}", path.display())]
    Spawn {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("it did not finish within {} s and was killed: see why it hangs, or raise the deadline", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("it wrote more than {MAX_OUTPUT} bytes of output and was killed")]
    TooMuchOutput,
    #[error("cannot talk to it")]
    Talk(#[source] io::Error),
    /// The plugin's own error object (CNI specification, section 5).
    #[error("it reports: {msg}{}{} (code {code})", if details.is_empty() { "" } else { "; " }, details)]
    Reported {
        code: u64,
        msg: String,
        details: String,
    },
    #[error("it ended with {status}{}{complaint}", if complaint.is_empty() { " and said nothing" } else { ", saying: " })]
    Failed {
        status: ExitStatus,
        complaint: String,
    },
    #[error("its output is not the JSON that the specification asks for ({excerpt:?})")]
    Output {
        excerpt: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("its result can't be used")]
    Result(#[from] crate::result::ResultError),
    #[error("it speaks CNI {}, but the configuration asks for {wanted}: install a plugin that speaks it, or change \"cniVersion\"", spoken.join(", "))]
    Version { spoken: Vec<String>, wanted: String },
}

/// What a plugin is asked to do (`CNI_COMMAND`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the specification's.
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    /// The verb as plugins see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// What names an attachment to a plugin; empty for verbs about the network as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target<'a> {
    pub id: &'a str,
    pub netns: &'a str,
    pub ifname: &'a str,
    pub args: &'a str,
}

/// Where plugins are and how long each one may take.
#[derive(Clone, Debug)]
pub(crate) struct Runner {
    pub bin_dirs: Vec<PathBuf>,
    pub timeout: Duration,
}

impl Runner {
    /// Runs a plugin and gives its standard output.
    pub async fn run(
        &self,
        kind: &str,
        verb: Verb,
        target: Target<'_>,
        input: &Value,
    ) -> Result<Vec<u8>, PluginError> {
        let path = self.find(kind).await?;
        let mut command = Command::new(&path);
        for name in WITHHELD {
            command.env_remove(name);
        }
        command
            .env("CNI_COMMAND", verb.as_str())
            .env("CNI_CONTAINERID", target.id)
            .env("CNI_NETNS", target.netns)
            .env("CNI_IFNAME", target.ifname)
            .env("CNI_ARGS", target.args)
            .env("CNI_PATH", self.search_path())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let deadline = Instant::now() + self.timeout;
        let finished = converse(command, &path, input.to_string().as_bytes(), deadline).await;
        match finished {
            Err(PluginError::Timeout(_)) => Err(PluginError::Timeout(self.timeout)),
            Err(error) => Err(error),
            Ok((status, output, complaint)) => judge(status, output, &complaint),
        }
    }

    /// The executable of a plugin: the first of that name in the plugin directories.
    pub(crate) async fn find(&self, kind: &str) -> Result<PathBuf, PluginError> {
        use std::os::unix::fs::PermissionsExt;
        check_plugin_type(kind).map_err(|_| PluginError::Type(kind.to_owned()))?;
        for dir in &self.bin_dirs {
            let path = dir.join(kind);
            if let Ok(meta) = tokio::fs::metadata(&path).await
                && meta.is_file()
                && meta.permissions().mode() & 0o111 != 0
            {
                return Ok(path);
            }
        }
        let dirs: Vec<_> = self
            .bin_dirs
            .iter()
            .map(|d| d.display().to_string())
            .collect();
        Err(PluginError::Missing {
            dirs: dirs.join(" or "),
        })
    }

    fn search_path(&self) -> std::ffi::OsString {
        let dirs: Vec<_> = self.bin_dirs.iter().map(|dir| dir.as_os_str()).collect();
        dirs.join(":".as_ref())
    }
}

/// Kills a plugin and what it started, unless it was seen to exit. Also when the caller gives up.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // The plugin is not reaped yet, so the number is still its own. ESRCH: nothing is left.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn converse(
    mut command: Command,
    path: &Path,
    input: &[u8],
    deadline: Instant,
) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), PluginError> {
    let mut busy = 0;
    let mut child = loop {
        match command.spawn() {
            Ok(child) => break child,
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && busy < BUSY_RETRIES => {
                busy += 1;
                sleep(BUSY_RETRY).await;
            }
            Err(source) => {
                return Err(PluginError::Spawn {
                    path: path.into(),
                    source,
                });
            }
        }
    };
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw);
    let mut group = Group(pid);
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());

    let feed = async {
        if let Some(mut stdin) = stdin {
            // A plugin may answer without reading its input (EPIPE).
            let _ = stdin.write_all(input).await;
        }
        Ok(())
    };
    let mut output = Vec::new();
    let mut complaint = Vec::new();
    let mut overflow = false;
    let talk = async {
        let out = read_up_to(stdout, &mut output, MAX_OUTPUT, &mut overflow);
        let err = read_and_drop(stderr, &mut complaint);
        tokio::try_join!(feed, out, err).map(drop)
    };
    let whole = async {
        tokio::pin!(talk);
        tokio::select! {
            talked = &mut talk => {
                talked?;
                let status = child.wait().await;
                group.0 = None;
                status
            }
            status = child.wait() => {
                group.0 = None;
                // All that the plugin itself wrote is in the pipe by now.
                timeout(AFTER_EXIT, &mut talk).await.unwrap_or(Ok(()))?;
                status
            }
        }
    };
    let talked = timeout_at(deadline, whole)
        .await
        .map_err(|_| PluginError::Timeout(Duration::ZERO))?;
    if overflow {
        return Err(PluginError::TooMuchOutput);
    }
    let status = talked.map_err(PluginError::Talk)?;
    Ok((status, output, complaint))
}

/// Reads all of a pipe. Fails with `overflow` set as soon as it holds more than `limit` bytes.
async fn read_up_to(
    pipe: Option<impl AsyncRead + Unpin>,
    into: &mut Vec<u8>,
    limit: usize,
    overflow: &mut bool,
) -> io::Result<()> {
    let Some(pipe) = pipe else { return Ok(()) };
    let read = pipe.take(limit as u64 + 1).read_to_end(into).await?;
    *overflow = read > limit;
    if *overflow {
        Err(io::ErrorKind::FileTooLarge.into())
    } else {
        Ok(())
    }
}

/// Reads all of a pipe, so that its writer never waits, and keeps the first [`MAX_COMPLAINT`] bytes.
async fn read_and_drop(pipe: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) -> io::Result<()> {
    let Some(mut pipe) = pipe else { return Ok(()) };
    let mut buffer = [0; 4096];
    loop {
        let read = pipe.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let room = MAX_COMPLAINT.saturating_sub(into.len());
        into.extend_from_slice(buffer.get(..read.min(room)).unwrap_or_default());
    }
}

/// Success is exit status 0 without an error object; some plugins exit with 0 after printing one.
fn judge(status: ExitStatus, output: Vec<u8>, complaint: &[u8]) -> Result<Vec<u8>, PluginError> {
    if let Some(error) = reported(&output) {
        return Err(error);
    }
    if status.success() {
        return Ok(output);
    }
    let said = if complaint.trim_ascii().is_empty() {
        &output
    } else {
        complaint
    };
    Err(PluginError::Failed {
        status,
        complaint: excerpt(said),
    })
}

fn reported(output: &[u8]) -> Option<PluginError> {
    let error: Value = serde_json::from_slice(output).ok()?;
    let code = error.get("code")?.as_u64().filter(|code| *code != 0)?;
    let text = |key| {
        error
            .get(key)
            .and_then(Value::as_str)
            .map(|t| excerpt(t.as_bytes()))
    };
    Some(PluginError::Reported {
        code,
        msg: text("msg")
            .filter(|m| !m.is_empty())
            .unwrap_or_else(|| "no message".into()),
        details: text("details").unwrap_or_default(),
    })
}

/// A plugin's words on one line and of bearable length.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    const LENGTH: usize = 512;
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::new();
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|w| !w.is_empty())
    {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > LENGTH {
            return line.chars().take(LENGTH).chain(['…']).collect();
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn an_error_object_counts_whatever_the_exit_status() {
        let error = br#"{"code": 4, "msg": "bad"}"#;
        for status in [0, 256] {
            let judged = judge(ExitStatus::from_raw(status), error.to_vec(), b"");
            assert!(
                matches!(judged, Err(PluginError::Reported { code: 4, .. })),
                "{judged:?}"
            );
        }
        let fine = br#"{"code": 0, "ips": []}"#.to_vec();
        assert_eq!(
            judge(ExitStatus::from_raw(0), fine.clone(), b"noise").unwrap(),
            fine
        );
        judge(ExitStatus::from_raw(9), fine, b"").unwrap_err();
    }

    proptest! {
        #[test]
        fn an_excerpt_is_one_short_line(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let line = excerpt(&bytes);
            prop_assert!(line.chars().count() <= 513);
            prop_assert!(!line.chars().any(char::is_control));
        }

        #[test]
        fn no_output_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(judge(ExitStatus::from_raw(0), bytes, b""));
        }
    }
}
