//! `slipway bench`: how fast and how small runtimes are, side by side.
//!
//! Every target takes part in every round, in random order, because a machine's speed drifts: figures of
//! one run can be compared with each other and with nothing else.
mod busy;
mod floor;
mod helper;
mod memory;
mod oci;
mod pods;
mod report;
mod sample;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use slipway_proto::cri::VersionRequest;

use crate::Global;
use crate::connection::Cri;
use crate::error::{ClientError, report as text_of};
use crate::interrupt::Interrupts;
use crate::list::pair;
use crate::quantity::parse_duration;
use crate::{images, output};
use busy::Questions;
use helper::Helper;
pub use helper::{HelperArgs, helper};
use pods::{Bencher, Workload};
use report::{Endpoint, Group, Report, TargetResult};

/// Ends at once on SIGTERM, and leaves a process to be told so.
const DEFAULT_COMMAND: [&str; 3] = [
    "/bin/sh",
    "-c",
    "trap 'exit 0' TERM; : >/ready; sleep 86400 & wait",
];
/// Returns once that shell listens: process 1 of a namespace would miss an earlier SIGTERM.
const AWAIT_COMMAND: [&str; 3] = ["/bin/sh", "-c", "until [ -e /ready ]; do :; done"];
/// How long a round that was interrupted may still take.
const ROUND_GRACE: Duration = Duration::from_secs(60);
const DEFAULT_PULL_LIMIT: Duration = Duration::from_secs(1800);

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Networks {
    Host,
    Cni,
    Both,
}

/// Options of `slipway bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// A runtime to measure; may be repeated, ratios are to the first (default: --runtime-endpoint)
    #[arg(long, value_name = "NAME=ENDPOINT", value_parser = pair)]
    endpoint: Vec<(String, String)>,
    /// Runtime handler of an endpoint; may be repeated
    #[arg(long, value_name = "NAME=HANDLER", value_parser = pair)]
    handler: Vec<(String, String)>,
    /// Image of the pods; without it only --floor and --oci are measured
    #[arg(long, required_unless_present_any = ["floor", "oci"])]
    image: Option<String>,
    /// Command of the containers, split at blanks (default: a shell that ends on SIGTERM)
    #[arg(long, value_name = "COMMAND", conflicts_with = "command")]
    cmd: Option<String>,
    /// The same, word by word, behind --
    #[arg(last = true)]
    command: Vec<String>,
    /// Pods to start, one after the other, and again with --parallel at once
    #[arg(long, default_value_t = 20)]
    pods: usize,
    /// Pods started at once in the second part; 1 leaves it out
    #[arg(long, default_value_t = 1)]
    parallel: usize,
    /// Network of the pods
    #[arg(long, value_enum, default_value = "host")]
    network: Networks,
    /// Rounds before the measured ones
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// ExecSync calls in each pod of the sequential part
    #[arg(long, default_value_t = 0, value_name = "N")]
    exec: usize,
    /// What they run, split at blanks
    #[arg(long, default_value = "true", value_name = "COMMAND")]
    exec_cmd: String,
    /// Containers in each pod
    #[arg(long, default_value_t = 1, value_name = "N")]
    containers_per_pod: usize,
    /// Pause between rounds, in milliseconds
    #[arg(long, default_value_t = 0, value_name = "MS")]
    gap: u64,
    /// Grace period of StopContainer
    #[arg(long, default_value = "10s", value_parser = parse_duration, value_name = "DURATION")]
    grace: Duration,
    /// Write the results as JSON to this file (- is standard output, in place of the tables)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also start N idle pods and measure the memory of the runtime's own processes
    #[arg(long, value_name = "N")]
    memory: Option<usize>,
    /// Also keep N containers running (in pods of --containers-per-pod) and time the calls that list them all
    #[arg(long, value_name = "N")]
    containers: Option<usize>,
    /// With --containers: pause before statistics are asked for in a round; then they are once more, at once
    #[arg(long, default_value = "1s", value_parser = parse_duration, value_name = "DURATION")]
    apart: Duration,
    /// With --containers: how long each daemon is watched while it is asked as by a kubelet
    #[arg(long, default_value = "30s", value_parser = parse_duration, value_name = "DURATION")]
    watch: Duration,
    /// The daemon's process id, where the socket doesn't tell it; may be repeated
    #[arg(long, value_name = "NAME=PID", value_parser = process)]
    processes: Vec<(String, i32)>,
    /// Also start a command in this root file system with bare system calls
    #[arg(long, value_name = "ROOTFS")]
    floor: Option<PathBuf>,
    /// Also `run` it with a bare OCI runtime, to its exit, and `create` and `start` it; may be repeated
    #[arg(long, value_name = "NAME=BINARY", value_parser = pair)]
    oci: Vec<(String, String)>,
    /// Root file system for --oci (default: that of --floor)
    #[arg(long, value_name = "ROOTFS")]
    oci_rootfs: Option<PathBuf>,
    /// Give --oci what this endpoint's runtime gives a container: mounts, namespaces, devices, limits, seccomp filter
    /// (default: the least that a container has)
    #[arg(long, value_name = "NAME", requires_all = ["oci", "image"])]
    oci_like: Option<String>,
    /// What --floor and --oci run: an absolute path in the root file system that ends by itself
    #[arg(long, default_value = "/bin/true", value_name = "PATH")]
    floor_cmd: String,
}

fn process(text: &str) -> Result<(String, i32), String> {
    let (name, pid) = pair(text)?;
    match pid.parse() {
        Ok(pid) if pid > 0 => Ok((name, pid)),
        _ => Err(format!("'{pid}' is not a process id")),
    }
}

/// Something that starts a pod or its equal.
#[derive(Debug)]
enum Target {
    Runtime(Box<Bencher>),
    Bare(Box<Helper>),
}

impl Target {
    fn name(&self) -> &str {
        match self {
            Target::Runtime(bencher) => &bencher.name,
            Target::Bare(helper) => helper.name(),
        }
    }
}

impl BenchArgs {
    fn workload(&self, image: &str, logs: &std::path::Path) -> Workload {
        let split = |text: &str| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let words = |words: [&str; 3]| words.map(str::to_owned).to_vec();
        let (command, await_ready) = match &self.cmd {
            Some(text) => (split(text), None),
            None if self.command.is_empty() => (words(DEFAULT_COMMAND), Some(words(AWAIT_COMMAND))),
            None => (self.command.clone(), None),
        };
        Workload {
            image: image.to_owned(),
            command,
            await_ready,
            exec: split(&self.exec_cmd),
            containers: self.containers_per_pod.max(1),
            grace: self.grace,
            logs: logs.to_owned(),
            run: format!("{:016x}", fastrand::u64(..)),
        }
    }

    fn host_networks(&self) -> Vec<bool> {
        match self.network {
            Networks::Host => vec![true],
            Networks::Cni => vec![false],
            Networks::Both => vec![true, false],
        }
    }
}

/// Measures, prints and writes the results.
///
/// # Errors
/// [`ClientError`] when a target can't be used at all, or when pods failed. All pods are removed first.
pub async fn bench(args: &BenchArgs, global: &Global) -> Result<(), ClientError> {
    if args.memory.is_some() {
        memory::stand_apart()?;
    }
    bench_interruptible(args, global, &mut Interrupts::new()?).await
}

/// The same, with signals from elsewhere.
///
/// # Errors
/// As [`bench`].
pub async fn bench_interruptible(
    args: &BenchArgs,
    global: &Global,
    interrupts: &mut Interrupts,
) -> Result<(), ClientError> {
    let logs = Scratch::new()?;
    let mut report = Report::new();
    let mut targets = tokio::select! {
        targets = targets(args, global, &logs.path, &mut report) => targets?,
        signal = interrupts.next() => return Err(ClientError::Interrupted(signal)),
    };
    let stop = AtomicBool::new(false);
    let result = {
        let mut measured = Box::pin(measure(args, &mut targets, &mut report, &stop));
        tokio::select! {
            result = &mut measured => result,
            signal = interrupts.next() => {
                // Runtimes take it ill when a call is cut off: the round is finished first.
                stop.store(true, Ordering::Relaxed);
                tokio::select! {
                    _ = tokio::time::timeout(ROUND_GRACE, &mut measured) => {}
                    _ = interrupts.next() => {}
                }
                Err(ClientError::Interrupted(signal))
            }
        }
    };
    for target in targets {
        match target {
            Target::Runtime(bencher) => bencher.sweep().await,
            Target::Bare(helper) => helper.end().await,
        }
    }
    result?;
    publish(args, &report)?;
    match report.failures() {
        0 => Ok(()),
        failures => Err(ClientError::Some(failures, report.attempts())),
    }
}

async fn targets(
    args: &BenchArgs,
    global: &Global,
    logs: &std::path::Path,
    report: &mut Report,
) -> Result<Vec<Target>, ClientError> {
    let mut targets = Vec::new();
    let default = [("runtime".to_owned(), global.runtime_endpoint.clone())];
    let endpoints = if args.endpoint.is_empty() {
        &default[..]
    } else {
        &args.endpoint
    };
    for (name, _) in args.handler.iter() {
        if !endpoints.iter().any(|(endpoint, _)| endpoint == name) {
            return Err(ClientError::Usage(format!(
                "--handler {name}: there is no such --endpoint"
            )));
        }
    }
    let image = args.image.as_deref();
    for ((name, endpoint), image) in image
        .iter()
        .flat_map(|i| endpoints.iter().map(move |e| (e, i)))
    {
        let own = global
            .image_endpoint
            .as_deref()
            .filter(|_| args.endpoint.is_empty());
        let cri = Cri::open(endpoint, own, global.timeout).await?;
        let version = cri.version(VersionRequest::default()).await?;
        let id = match images::present(&cri, image).await? {
            Some(present) => present.id,
            None => images::pull_one(&cri, image, None, None, DEFAULT_PULL_LIMIT).await?,
        };
        let handler = args
            .handler
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, h)| h.clone());
        report.endpoints.push(Endpoint {
            name: name.clone(),
            endpoint: endpoint.clone(),
            runtime: version.runtime_name,
            version: version.runtime_version,
        });
        targets.push(Target::Runtime(Box::new(Bencher {
            name: name.clone(),
            endpoint: endpoint.clone(),
            handler: handler.unwrap_or_default(),
            work: Workload {
                image: id,
                ..args.workload(image, logs)
            },
            cri,
        })));
    }
    let like = match &args.oci_like {
        Some(name) => Some(specs_of(args, name, &targets, logs).await?),
        None => None,
    };
    for (rootfs, cgroups) in args
        .floor
        .iter()
        .flat_map(|rootfs| [(rootfs, true), (rootfs, false)])
    {
        let helper = Helper::floor(rootfs, &args.floor_cmd, cgroups)?;
        targets.push(Target::Bare(Box::new(helper)));
    }
    for (name, binary) in &args.oci {
        let rootfs = args
            .oci_rootfs
            .as_ref()
            .or(args.floor.as_ref())
            .ok_or_else(|| {
                ClientError::Usage(
                    "--oci needs --floor or --oci-rootfs: a root file system".to_owned(),
                )
            })?;
        let helper = Helper::oci(name, binary, rootfs, &args.floor_cmd, like.as_deref())?;
        targets.push(Target::Bare(Box::new(helper)));
    }
    Ok(targets)
}

/// Starts a pod in each network at this endpoint, and writes the OCI specifications of their containers into a directory.
/// The pods stay until all of the run are removed: the specifications name their namespaces and files.
async fn specs_of(
    args: &BenchArgs,
    name: &str,
    targets: &[Target],
    logs: &std::path::Path,
) -> Result<PathBuf, ClientError> {
    let runtimes = targets.iter().filter_map(|target| match target {
        Target::Runtime(bencher) => Some(bencher),
        Target::Bare(_) => None,
    });
    let bencher = runtimes.into_iter().find(|b| b.name == name);
    let bencher = bencher.ok_or_else(|| {
        ClientError::Usage(format!("--oci-like {name}: there is no such --endpoint"))
    })?;
    let dir = logs.join("specs");
    for host_network in args.host_networks() {
        let spec = bencher.spec_of_one(host_network).await?;
        let path = dir.join(helper::spec_file(host_network));
        let written = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, spec));
        written.map_err(|source| ClientError::File {
            what: "cannot write a container's OCI spec",
            path,
            source,
        })?;
    }
    Ok(dir)
}

async fn measure(
    args: &BenchArgs,
    targets: &mut [Target],
    report: &mut Report,
    stop: &AtomicBool,
) -> Result<(), ClientError> {
    for host_network in args.host_networks() {
        let group = sequential(args, targets, host_network, stop).await?;
        report.groups.push(group);
        if args.parallel > 1 {
            let group = parallel(args, targets, host_network, stop).await?;
            report.groups.push(group);
        }
    }
    let daemon = |name: &str| args.processes.iter().find(|(n, _)| n == name).map(|p| p.1);
    if let Some(count) = args.containers.filter(|&count| count > 0) {
        let benchers: Vec<_> = (targets.iter())
            .filter_map(|target| match target {
                Target::Runtime(bencher) => Some((&**bencher, daemon(&bencher.name))),
                Target::Bare(_) => None,
            })
            .collect();
        if !stop.load(Ordering::Relaxed) {
            let host_network = args.network != Networks::Cni;
            let questions = Questions {
                apart: args.apart,
                watched: args.watch,
            };
            let group = busy::measure(&benchers, count, host_network, questions).await?;
            report.groups.push(group);
        }
    }
    if let Some(pods) = args.memory.filter(|&pods| pods > 0) {
        let host_network = args.network != Networks::Cni;
        for target in targets.iter().filter(|_| !stop.load(Ordering::Relaxed)) {
            if let Target::Runtime(bencher) = target {
                let pid = daemon(&bencher.name);
                eprintln!("{}: memory of {pods} idle pods", bencher.name);
                report
                    .memory
                    .push(memory::measure(bencher, pods, host_network, pid).await?);
            }
        }
    }
    Ok(())
}

fn results(targets: &[Target]) -> Vec<TargetResult> {
    targets
        .iter()
        .map(|target| TargetResult::new(target.name()))
        .collect()
}

/// The targets' numbers in random order.
fn order(count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    fastrand::shuffle(&mut order);
    order
}

/// Notes a failed pod; in the warm-up there is nothing to compare yet, and the run ends.
fn failed(
    name: &str,
    warm: bool,
    error: ClientError,
    result: &mut TargetResult,
) -> Result<(), ClientError> {
    if warm {
        eprintln!("slipway: {name} fails in the warm-up");
        return Err(error);
    }
    eprintln!("slipway: {name}: {}", text_of(&error));
    result.failures += 1;
    Ok(())
}

async fn sequential(
    args: &BenchArgs,
    targets: &mut [Target],
    host_network: bool,
    stop: &AtomicBool,
) -> Result<Group, ClientError> {
    let mut group = Group::new(host_network, 1, results(targets));
    for round in 0..args.warmup + args.pods {
        let warm = round < args.warmup;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        progress("sequential", host_network, round, args.warmup + args.pods);
        for index in order(targets.len()) {
            let into = &mut group.results[index];
            let outcome = match &mut targets[index] {
                Target::Runtime(bencher) => bencher.one(host_network, args.exec).await,
                Target::Bare(helper) => helper.once(host_network).await,
            };
            match outcome {
                Ok(samples) if !warm => into.add(samples),
                Ok(_) => {}
                Err(error) => failed(targets[index].name(), warm, error, into)?,
            }
        }
        tokio::time::sleep(Duration::from_millis(args.gap)).await;
    }
    Ok(group)
}

async fn parallel(
    args: &BenchArgs,
    targets: &mut [Target],
    host_network: bool,
    stop: &AtomicBool,
) -> Result<Group, ClientError> {
    let mut group = Group::new(host_network, args.parallel, results(targets));
    let batches = args.pods.div_ceil(args.parallel);
    let warmup = args.warmup.min(1);
    for round in 0..warmup + batches {
        let warm = round < warmup;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        progress("parallel", host_network, round, warmup + batches);
        for index in order(targets.len()) {
            let Target::Runtime(bencher) = &targets[index] else {
                continue;
            };
            let batch = bencher.batch(host_network, args.parallel).await;
            let into = &mut group.results[index];
            for outcome in batch.pods {
                match outcome {
                    Ok(samples) if !warm => into.add(samples),
                    Ok(_) => {}
                    Err(error) => failed(&bencher.name, warm, error, into)?,
                }
            }
            if !warm {
                into.batches.push((batch.ready, batch.wall));
            }
        }
        tokio::time::sleep(Duration::from_millis(args.gap)).await;
    }
    group
        .results
        .retain(|result| !result.operations.is_empty() || result.failures > 0);
    Ok(group)
}

fn progress(part: &str, host_network: bool, round: usize, rounds: usize) {
    if rounds > 0 && round.is_multiple_of(rounds.div_ceil(5)) {
        let network = if host_network { "host" } else { "cni" };
        eprintln!("{part}, {network} network: round {} of {rounds}", round + 1);
    }
}

fn publish(args: &BenchArgs, report: &Report) -> Result<(), ClientError> {
    let json = serde_json::to_string_pretty(&report.to_json())
        .map_err(|e| ClientError::Internal(e.to_string()))?
        + "\n";
    match &args.json {
        Some(path) if path.as_os_str() == "-" => return output::print(&json),
        Some(path) => std::fs::write(path, json).map_err(|source| ClientError::File {
            what: "cannot write the results to",
            path: path.clone(),
            source,
        })?,
        None => {}
    }
    output::print(&report.render())
}

/// A directory for logs, removed at the end.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new() -> Result<Scratch, ClientError> {
        let name = format!(
            "slipway-bench-{}-{:08x}",
            std::process::id(),
            fastrand::u32(..)
        );
        let path = std::env::temp_dir().join(name);
        match std::fs::create_dir(&path) {
            Ok(()) => Ok(Scratch { path }),
            Err(source) => Err(ClientError::File {
                what: "cannot make",
                path,
                source,
            }),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
