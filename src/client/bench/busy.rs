//! A node with many containers: how long the calls take that look at all of them, and what a daemon costs
//! that is asked as often as the kubelet asks.
use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::memory::listener;
use super::pods::{Bencher, Pod, Timed};
use super::report::{Group, TargetResult};
use crate::connection::Cri;
use crate::error::{ClientError, report};

/// Pods started at once.
const BATCH: usize = 8;
/// How often each call is timed.
const ROUNDS: usize = 30;
/// The kubelet lists pods and containers this often (PLEG).
const RELIST: Duration = Duration::from_secs(1);
/// And asks for statistics this often (housekeeping of the summary API).
const STATISTICS: Duration = Duration::from_secs(10);

type Answered<'a> = Pin<Box<dyn Future<Output = Result<(), ClientError>> + Send + 'a>>;
type Call = for<'a> fn(&'a Cri) -> Answered<'a>;

/// The calls of a round, and whether each is made some time after the one before it.
const CALLS: [(&str, bool, Call); 6] = [
    ("ListPodSandbox", false, |cri| {
        Box::pin(async { cri.list_pod_sandbox(Default::default()).await.map(drop) })
    }),
    ("ListContainers", false, |cri| {
        Box::pin(async { cri.list_containers(Default::default()).await.map(drop) })
    }),
    ("ListContainerStats", true, container_stats),
    ("ListContainerStats, at once again", false, container_stats),
    ("ListPodSandboxStats", true, pod_stats),
    ("ListPodSandboxStats, at once again", false, pod_stats),
];

fn container_stats(cri: &Cri) -> Answered<'_> {
    Box::pin(async { cri.list_container_stats(Default::default()).await.map(drop) })
}

fn pod_stats(cri: &Cri) -> Answered<'_> {
    Box::pin(async {
        cri.list_pod_sandbox_stats(Default::default())
            .await
            .map(drop)
    })
}

/// How a full node is asked.
#[derive(Debug, Clone, Copy)]
pub struct Questions {
    /// Before statistics are asked for the first time of a round: a runtime may tell a sample again that it took a
    /// moment ago.
    pub apart: Duration,
    /// How long each daemon is watched afterwards.
    pub watched: Duration,
}

/// Keeps `count` containers running under each runtime, times the calls, and watches each daemon. Removes the containers
/// again.
///
/// # Errors
/// What a runtime answers, or when its daemon is not found.
pub async fn measure(
    benchers: &[(&Bencher, Option<i32>)],
    count: usize,
    host_network: bool,
    questions: Questions,
) -> Result<Group, ClientError> {
    let mut pods: Vec<Vec<Pod>> = Vec::new();
    let mut result = Ok(());
    for (bencher, _) in benchers {
        eprintln!("{}: starting {count} containers", bencher.name);
        let mut started = Vec::new();
        if result.is_ok() {
            result = fill(bencher, count, host_network, &mut started).await;
        }
        pods.push(started);
    }
    let group = match result {
        Ok(()) => ask(benchers, count, host_network, questions).await,
        Err(error) => Err(error),
    };
    for ((bencher, _), pods) in benchers.iter().zip(&pods) {
        for pods in pods.chunks(BATCH) {
            // A failure has been reported, and the rest goes with the sweep.
            join_all(pods.iter().map(|pod| async {
                let mut times = Timed::new();
                let _ = bencher.stop(pod, &mut times).await;
            }))
            .await;
        }
    }
    group
}

async fn fill(
    bencher: &Bencher,
    count: usize,
    host_network: bool,
    pods: &mut Vec<Pod>,
) -> Result<(), ClientError> {
    let wanted = count.div_ceil(bencher.work.containers);
    let mut result = Ok(());
    while pods.len() < wanted && result.is_ok() {
        let starts = (0..BATCH.min(wanted - pods.len())).map(|_| async {
            let mut times = Timed::new();
            bencher.start(host_network, &mut times).await
        });
        for pod in join_all(starts).await {
            match pod {
                Ok(pod) => pods.push(pod),
                Err(error) => result = Err(error),
            }
        }
    }
    result
}

async fn ask(
    benchers: &[(&Bencher, Option<i32>)],
    count: usize,
    host_network: bool,
    questions: Questions,
) -> Result<Group, ClientError> {
    let results = benchers.iter().map(|(b, _)| TargetResult::new(&b.name));
    let mut group = Group::new(host_network, 1, results.collect());
    group.containers = Some(count);
    let mut missing: HashSet<(usize, &str)> = HashSet::new();
    for round in 0..=ROUNDS {
        for index in super::order(benchers.len()) {
            let mut times = Timed::new();
            for (name, apart, call) in CALLS {
                if missing.contains(&(index, name)) {
                    continue;
                }
                if apart {
                    tokio::time::sleep(questions.apart).await;
                }
                let began = Instant::now();
                match call(&benchers[index].0.cri).await {
                    Ok(()) => times.push((name, began.elapsed())),
                    // In the warm-up: the runtime has no such call, or can't answer it here.
                    Err(error) if round == 0 => {
                        let target = &benchers[index].0.name;
                        eprintln!(
                            "slipway: {target} is not asked for {name}: {}",
                            report(&error)
                        );
                        missing.insert((index, name));
                    }
                    Err(error) => return Err(error),
                }
            }
            // The first is a warm-up.
            if round > 0 {
                group.results[index].add(times);
            }
        }
    }
    for (index, (bencher, pid)) in benchers.iter().enumerate() {
        let pid = match pid {
            Some(pid) => *pid,
            None => listener(&bencher.endpoint).await?,
        };
        let watched = questions.watched;
        eprintln!("{}: watched for {} s", bencher.name, watched.as_secs());
        group.results[index].cpu_percent = Some(watch(bencher, pid, watched).await?);
    }
    Ok(group)
}

/// Asks as the kubelet does, and returns the daemon's share of one processor in percent.
async fn watch(bencher: &Bencher, pid: i32, watched: Duration) -> Result<f64, ClientError> {
    let began = Instant::now();
    let used = processor_time(pid)?;
    let mut statistics = Duration::ZERO;
    let mut beat = tokio::time::interval(RELIST);
    while began.elapsed() < watched {
        beat.tick().await;
        bencher.cri.list_pod_sandbox(Default::default()).await?;
        bencher.cri.list_containers(Default::default()).await?;
        if began.elapsed() >= statistics {
            statistics += STATISTICS;
            bencher.cri.list_container_stats(Default::default()).await?;
        }
    }
    let used = processor_time(pid)?.saturating_sub(used);
    Ok(used.as_secs_f64() * 100.0 / began.elapsed().as_secs_f64())
}

/// What a process and those it has waited for have used of the processors (proc_pid_stat(5)).
fn processor_time(pid: i32) -> Result<Duration, ClientError> {
    let path = std::path::PathBuf::from(format!("/proc/{pid}/stat"));
    let failed = |source| ClientError::File {
        what: "cannot read the processor time in",
        path: path.clone(),
        source,
    };
    let text = std::fs::read_to_string(&path).map_err(failed)?;
    let ticks = ticks(&text).ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
    let each = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    let each = each.ok().flatten().filter(|&n| n > 0).unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / each as f64))
}

/// utime, stime, cutime and cstime; the name before them may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<u64> = rest
        .split_whitespace()
        .skip(11)
        .take(4)
        .map_while(|f| f.parse().ok())
        .collect();
    (fields.len() == 4).then(|| fields.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_behind_any_name() {
        let stat = "12 (a) b ( 9) S 1 1 1 0 -1 4194560 1 2 3 4 10 20 3 4 20 0 1 0 5";
        assert_eq!(ticks(stat), Some(37));
        for bad in ["", "1 (x) S", "1 (x S 1 1 1"] {
            assert_eq!(ticks(bad), None, "{bad}");
        }
        assert!(processor_time(i32::try_from(std::process::id()).unwrap()).is_ok());
    }
}
