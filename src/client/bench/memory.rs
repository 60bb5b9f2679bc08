//! Memory of a runtime's own processes: the daemon, and what it keeps beside each pod.
//!
//! Whose processes: the daemon, all its descendants, and those whose command line names a pod or container
//! of ours (shims and monitors that no longer descend from it), with their descendants; without the
//! containers' own processes. Proportional set size (PSS): shared pages count in parts, so that a sum of
//! processes is what they really occupy together.
use std::collections::{HashMap, HashSet};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::net::UnixStream;

use super::pods::{Bencher, Pod, Timed};
use crate::connection::socket_path;
use crate::error::ClientError;
use crate::table::Table;
use crate::wait;

/// Pods are called idle when nothing was asked of the runtime for so long.
const SETTLE: Duration = Duration::from_secs(3);
/// Pods started at once.
const BATCH: usize = 5;

/// A runtime's memory; sizes in kB (1024 bytes).
#[derive(Debug, Clone, Serialize)]
pub struct MemoryResult {
    /// Name of the runtime.
    pub target: String,
    /// Idle pods.
    pub pods: usize,
    /// All processes of the runtime without pods of ours.
    pub before: Footprint,
    /// The same with the pods.
    pub with_pods: Footprint,
    /// PSS per idle pod.
    pub pss_per_pod_kb: f64,
}

/// What a runtime's processes occupy at one time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// PSS of the daemon alone, kB.
    pub daemon_pss_kb: u64,
    /// PSS of all, kB.
    pub total_pss_kb: u64,
    /// Number of processes.
    pub processes: usize,
    /// Number of threads.
    pub threads: usize,
}

/// Set in the process that [`stand_apart`] has started.
const APART: &str = "SLIPWAY_BENCH_APART";

/// Goes on from a copy of the binary in memory. When the daemon is the same file, the two would share its
/// pages, and each would count as half: measuring would make it smaller.
///
/// # Errors
/// [`ClientError::System`] when the copy can't be made or run; otherwise it doesn't return the first time.
pub fn stand_apart() -> Result<(), ClientError> {
    if std::env::var_os(APART).is_some() || cfg!(test) {
        return Ok(());
    }
    let failed = |source| ClientError::System {
        what: "cannot run the measurement from a copy of the binary",
        source,
    };
    let mut binary = std::fs::File::open("/proc/self/exe").map_err(failed)?;
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let copy = rustix::fs::memfd_create("slipway-bench", flags).map_err(|e| failed(e.into()))?;
    let mut copy = std::fs::File::from(copy);
    std::io::copy(&mut binary, &mut copy).map_err(failed)?;
    // Open for writing, a file can't be run.
    let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
    let readable = std::fs::File::open(&path).map_err(failed)?;
    drop(copy);
    let path = format!("/proc/self/fd/{}", readable.as_raw_fd());
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new(path);
    command.env(APART, "1").args(arguments.by_ref().skip(1));
    Err(failed(command.exec()))
}

/// Starts idle pods, measures, and removes them.
///
/// # Errors
/// What the runtime answers, or [`ClientError::Usage`] when the daemon's process can't be found.
pub async fn measure(
    bencher: &Bencher,
    count: usize,
    host_network: bool,
    daemon: Option<i32>,
) -> Result<MemoryResult, ClientError> {
    let daemon = match daemon {
        Some(pid) => pid,
        None => listener(&bencher.endpoint).await?,
    };
    tokio::time::sleep(SETTLE).await;
    let before = footprint(daemon, &[], &HashSet::new())?;
    let mut pods: Vec<Pod> = Vec::with_capacity(count);
    let mut result = Ok(());
    while pods.len() < count && result.is_ok() {
        let wanted = BATCH.min(count - pods.len());
        let starts = (0..wanted).map(|_| async {
            let mut times = Timed::new();
            bencher.start(host_network, &mut times).await
        });
        for pod in futures_util::future::join_all(starts).await {
            match pod {
                Ok(pod) => pods.push(pod),
                Err(error) => result = Err(error),
            }
        }
    }
    let with_pods = match result {
        Ok(()) => with_pods(bencher, daemon, &pods).await,
        Err(error) => Err(error),
    };
    for pod in &pods {
        let mut times = Timed::new();
        // A failure has been reported, and the rest goes with the sweep.
        let _ = bencher.stop(pod, &mut times).await;
    }
    let with_pods = with_pods?;
    let grown = with_pods.total_pss_kb as f64 - before.total_pss_kb as f64;
    Ok(MemoryResult {
        target: bencher.name.clone(),
        pods: count,
        before,
        with_pods,
        pss_per_pod_kb: grown / count as f64,
    })
}

async fn with_pods(bencher: &Bencher, daemon: i32, pods: &[Pod]) -> Result<Footprint, ClientError> {
    let mut payload = HashSet::new();
    let mut ids = Vec::new();
    for pod in pods {
        ids.push(pod.id.clone());
        for container in &pod.containers {
            let (_, pid) = wait::status(&bencher.cri, container).await?;
            payload.insert(pid.ok_or(ClientError::Answer {
                call: "ContainerStatus",
                what: "the container's process id (info.pid), to tell it from the runtime's own",
            })?);
            ids.push(container.clone());
        }
    }
    tokio::time::sleep(SETTLE).await;
    footprint(daemon, &ids, &payload)
}

/// The process that listens on the socket.
pub(super) async fn listener(endpoint: &str) -> Result<i32, ClientError> {
    let failed = |source: std::io::Error| ClientError::Connect {
        endpoint: endpoint.to_owned(),
        source: source.into(),
    };
    let stream = UnixStream::connect(socket_path(endpoint)?)
        .await
        .map_err(failed)?;
    let pid = stream
        .peer_cred()
        .map_err(failed)?
        .pid()
        .filter(|&pid| pid > 1);
    pid.ok_or_else(|| {
        let text = format!("{endpoint} doesn't tell its daemon: name it with --processes NAME=PID");
        ClientError::Usage(text)
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    command: String,
}

fn footprint(
    daemon: i32,
    ids: &[String],
    payload: &HashSet<i32>,
) -> Result<Footprint, ClientError> {
    let table = processes()?;
    if !table.iter().any(|process| process.pid == daemon) {
        let text = format!("there is no process {daemon}, which was to be the daemon");
        return Err(ClientError::Usage(text));
    }
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut sum = Footprint::default();
    for pid in select(&table, daemon, ids, payload, own) {
        // Processes come and go: one that has ended occupies nothing.
        let Some(pss) = field(pid, "smaps_rollup", "Pss:") else {
            continue;
        };
        sum.total_pss_kb += pss;
        sum.processes += 1;
        sum.threads += field(pid, "status", "Threads:").unwrap_or(0) as usize;
        if pid == daemon {
            sum.daemon_pss_kb = pss;
        }
    }
    if sum.daemon_pss_kb == 0 {
        let text = format!("the memory of process {daemon} can't be read: run as root");
        return Err(ClientError::Usage(text));
    }
    Ok(sum)
}

/// The runtime's own processes.
fn select(
    table: &[Process],
    daemon: i32,
    ids: &[String],
    payload: &HashSet<i32>,
    own: i32,
) -> Vec<i32> {
    let parents: HashMap<i32, i32> = table.iter().map(|p| (p.pid, p.parent)).collect();
    let roots: HashSet<i32> = table
        .iter()
        .filter(|p| p.pid == daemon || ids.iter().any(|id| p.command.contains(id.as_str())))
        .map(|p| p.pid)
        .collect();
    // Up the tree until a container's process, ourselves (whoever started us) or a root is met.
    let belongs = |pid: i32| {
        let mut current = pid;
        let mut found = false;
        for _ in 0..table.len() {
            if payload.contains(&current) || current == own {
                return false;
            }
            found |= roots.contains(&current);
            match parents.get(&current) {
                Some(&parent) if parent > 0 => current = parent,
                _ => break,
            }
        }
        found
    };
    table
        .iter()
        .map(|p| p.pid)
        .filter(|&pid| belongs(pid))
        .collect()
}

fn processes() -> Result<Vec<Process>, ClientError> {
    let failed = |source| ClientError::File {
        what: "cannot list the processes in",
        path: PathBuf::from("/proc"),
        source,
    };
    let mut table = Vec::new();
    for entry in std::fs::read_dir("/proc").map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Some(parent) = field(pid, "status", "PPid:") else {
            continue;
        };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        table.push(Process {
            pid,
            parent: i32::try_from(parent).unwrap_or(0),
            command,
        });
    }
    Ok(table)
}

/// The number behind a key in one of a process's files.
fn field(pid: i32, file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A table of all runtimes.
pub fn render(results: &[MemoryResult]) -> String {
    let mut table = Table::new(&[
        "MEMORY (PSS, kB)",
        "PODS",
        "PER POD",
        "DAEMON",
        "ALL",
        "ALL WITHOUT PODS",
        "PROCESSES",
        "THREADS",
    ]);
    for result in results {
        let with = &result.with_pods;
        table.row([
            result.target.clone(),
            result.pods.to_string(),
            format!("{:.0}", result.pss_per_pod_kb),
            with.daemon_pss_kb.to_string(),
            with.total_pss_kb.to_string(),
            result.before.total_pss_kb.to_string(),
            with.processes.to_string(),
            with.threads.to_string(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_strangers_and_we_ourselves_are_left_out() {
        let process = |pid, parent, command: &str| Process {
            pid,
            parent,
            command: command.into(),
        };
        let table = [
            process(1, 0, "init"),
            process(10, 1, "slipway serve"),
            process(11, 10, "slipway zygote"),
            process(12, 11, "slipway keeper p1"),
            process(13, 12, "payload of p1"),
            process(14, 13, "child of payload, says p1"),
            process(20, 1, "containerd-shim -id p2"),
            process(21, 20, "/pause"),
            process(22, 20, "payload of p2"),
            process(30, 1, "containerd-shim -id other"),
            process(31, 30, "/pause"),
            process(40, 10, "slipway bench p1"),
            process(41, 40, "slipway bench-helper"),
        ];
        let ids = ["p1".to_owned(), "p2".to_owned()];
        let selected = select(&table, 10, &ids, &[13, 22].into(), 40);
        assert_eq!(selected, [10, 11, 12, 20, 21]);
    }

    #[test]
    fn our_own_memory_can_be_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let pss = field(pid, "smaps_rollup", "Pss:").unwrap();
        assert!(pss > 100, "{pss}");
        assert!(
            processes()
                .unwrap()
                .iter()
                .any(|process| process.pid == pid)
        );
        assert_eq!(field(pid, "status", "NoSuchKey:"), None);
    }

    #[tokio::test]
    async fn a_socket_tells_its_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let pid = listener(path.to_str().unwrap()).await.unwrap();
        assert_eq!(pid, i32::try_from(std::process::id()).unwrap());
    }
}
