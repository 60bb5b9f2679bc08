//! The processes that start things without a CRI: they are told `host` or `new` (the network namespace)
//! on a line each, do one start, and answer with its time, or its times. Processes of their own, because a small,
//! single-threaded one forks faster than the benchmark with its event loop.
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::floor::Floor;
use super::oci::Oci;
use super::pods::{MADE, READY, Timed};
use crate::error::{ClientError, report};

/// How long one start may take.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Floor,
    Oci,
}

/// The file with the OCI specification of a container in that network, in the directory for `like`.
pub fn spec_file(host_network: bool) -> &'static str {
    if host_network {
        "host.json"
    } else {
        "new.json"
    }
}

/// Options of the hidden helper command.
#[derive(Debug, clap::Args)]
pub struct HelperArgs {
    kind: Kind,
    #[arg(long)]
    rootfs: PathBuf,
    #[arg(long)]
    cmd: String,
    #[arg(long, default_value = "")]
    binary: String,
    #[arg(long)]
    like: Option<PathBuf>,
    #[arg(long)]
    no_cgroups: bool,
}

/// Serves starts on standard input and output until the input ends.
///
/// # Errors
/// [`ClientError`] when it can't begin at all; failed starts are answered.
pub fn helper(args: &HelperArgs) -> Result<(), ClientError> {
    let rootfs = std::path::absolute(&args.rootfs).map_err(|source| ClientError::File {
        what: "cannot use the root file system",
        path: args.rootfs.clone(),
        source,
    })?;
    match args.kind {
        Kind::Floor => {
            let mut floor = Floor::new(&rootfs, &args.cmd, !args.no_cgroups)?;
            serve(|host_network| Ok(vec![floor.once(host_network)?]))
        }
        Kind::Oci => {
            let mut oci = Oci::new(&args.binary, &rootfs, &args.cmd, args.like.as_deref())?;
            serve(|host_network| oci.once(host_network))
        }
    }
}

fn serve(
    mut once: impl FnMut(bool) -> Result<Vec<Duration>, ClientError>,
) -> Result<(), ClientError> {
    let input = std::io::stdin().lock();
    for line in input.lines() {
        let line = line.map_err(|source| ClientError::System {
            what: "cannot read orders",
            source,
        })?;
        let answer = match once(line.trim() == "host") {
            Ok(took) => {
                let times = took.iter().map(|t| t.as_nanos().to_string());
                format!("ok {}\n", times.collect::<Vec<_>>().join(" "))
            }
            Err(error) => format!("error {}\n", report(&error).replace('\n', " ")),
        };
        let mut output = std::io::stdout().lock();
        output
            .write_all(answer.as_bytes())
            .and_then(|()| output.flush())
            .map_err(ClientError::Output)?;
    }
    Ok(())
}

/// A helper process under our command; it ends with us.
#[derive(Debug)]
pub struct Helper {
    name: String,
    // Killed when dropped without an end.
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Helper {
    /// A helper that starts `cmd` with bare system calls, in cgroups of its own or not.
    ///
    /// # Errors
    /// [`ClientError::System`] when it can't be started.
    pub fn floor(rootfs: &Path, cmd: &str, cgroups: bool) -> Result<Helper, ClientError> {
        let mut command = Self::command("floor", rootfs, cmd);
        if cgroups {
            return Helper::spawn("floor", &mut command);
        }
        Helper::spawn("floor without cgroups", command.arg("--no-cgroups"))
    }

    /// A helper that has an OCI runtime `run` it; `like`: a directory with specifications ([`spec_file`]) to go by.
    ///
    /// # Errors
    /// [`ClientError::System`] when it can't be started.
    pub fn oci(
        name: &str,
        binary: &str,
        rootfs: &Path,
        cmd: &str,
        like: Option<&Path>,
    ) -> Result<Helper, ClientError> {
        let mut command = Self::command("oci", rootfs, cmd);
        command.arg(format!("--binary={binary}"));
        if let Some(like) = like {
            command.arg("--like").arg(like);
        }
        Helper::spawn(name, &mut command)
    }

    fn command(kind: &str, rootfs: &Path, cmd: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["bench-helper", kind])
            .arg("--rootfs")
            .arg(rootfs)
            .arg(format!("--cmd={cmd}"));
        command
    }

    fn spawn(name: &str, command: &mut Command) -> Result<Helper, ClientError> {
        let failed = |source| ClientError::System {
            what: "cannot start a benchmark's helper",
            source,
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            // Ctrl-C is ours to hear: a helper cleans up when its orders end.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let missing = || failed(std::io::ErrorKind::BrokenPipe.into());
        let orders = child.stdin.take().ok_or_else(missing)?;
        let answers = child.stdout.take().ok_or_else(missing)?;
        let answers = BufReader::new(answers).lines();
        Ok(Helper {
            name: name.to_owned(),
            child,
            orders,
            answers,
        })
    }

    /// Lets the helper clean up and end.
    pub async fn end(mut self) {
        drop(self.orders);
        // One that hangs is killed as it is dropped.
        let _ = tokio::time::timeout(LIMIT, self.child.wait()).await;
    }

    /// Name in reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One start, by the names of what was timed.
    ///
    /// # Errors
    /// [`ClientError::Helper`] with what the helper says.
    pub async fn once(&mut self, host_network: bool) -> Result<Timed, ClientError> {
        let what = self.name.clone();
        let failed = |message: String| ClientError::Helper {
            what: what.clone(),
            message,
        };
        let order: &[u8] = if host_network { b"host\n" } else { b"new\n" };
        self.orders
            .write_all(order)
            .await
            .map_err(|e| failed(format!("it is gone: {e}")))?;
        let answer = match tokio::time::timeout(LIMIT, self.answers.next_line()).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => return Err(failed("it ended".to_owned())),
            Ok(Err(e)) => return Err(failed(e.to_string())),
            Err(_) => return Err(failed(format!("no answer within {LIMIT:?}"))),
        };
        match answer.split_once(' ') {
            Some(("ok", times)) => {
                let times = times
                    .split(' ')
                    .map(|t| t.parse().map(Duration::from_nanos));
                let times: Result<Vec<_>, _> = times.collect();
                let times = times.map_err(|_| failed(format!("it says '{answer}'")))?;
                Ok([READY, MADE].into_iter().zip(times).collect())
            }
            Some(("error", message)) => Err(failed(message.to_owned())),
            _ => Err(failed(format!("it says '{answer}'"))),
        }
    }
}
