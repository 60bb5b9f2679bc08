//! The results as tables and as JSON.
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::memory::MemoryResult;
use super::pods::Timed;
use super::sample::{Samples, Summary};
use crate::table::Table;

/// A runtime that took part.
#[derive(Debug, Clone, Serialize)]
pub struct Endpoint {
    /// Name in reports.
    pub name: String,
    /// The socket.
    pub endpoint: String,
    /// What the runtime calls itself.
    pub runtime: String,
    /// Its version.
    pub version: String,
}

/// What one target did in one group.
#[derive(Debug, Clone)]
pub struct TargetResult {
    /// Name of the target.
    pub name: String,
    /// Each operation's samples, in the order of their first appearance.
    pub operations: Vec<(&'static str, Samples)>,
    /// Of each parallel batch: pods that became ready, and the time until the last was.
    pub batches: Vec<(usize, Duration)>,
    /// The daemon's share of one processor while it was asked as by a kubelet, in percent.
    pub cpu_percent: Option<f64>,
    /// Pods that failed.
    pub failures: usize,
    /// Pods that went through.
    pub successes: usize,
}

impl TargetResult {
    /// No results yet.
    pub fn new(name: &str) -> TargetResult {
        TargetResult {
            name: name.to_owned(),
            operations: Vec::new(),
            batches: Vec::new(),
            cpu_percent: None,
            failures: 0,
            successes: 0,
        }
    }

    /// Adds the durations of one pod.
    pub fn add(&mut self, times: Timed) {
        self.successes += 1;
        for (name, took) in times {
            match self.operations.iter_mut().find(|(n, _)| *n == name) {
                Some((_, samples)) => samples.push(took),
                None => {
                    let mut samples = Samples::default();
                    samples.push(took);
                    self.operations.push((name, samples));
                }
            }
        }
    }

    fn summary(&self, operation: &str) -> Option<Summary> {
        self.operations
            .iter()
            .find(|(name, _)| *name == operation)?
            .1
            .summary()
    }

    /// Pods ready per second of the batches' wall time.
    fn pods_per_second(&self) -> Option<f64> {
        let pods: usize = self.batches.iter().map(|batch| batch.0).sum();
        let wall: Duration = self.batches.iter().map(|batch| batch.1).sum();
        (pods > 0).then(|| pods as f64 / wall.as_secs_f64())
    }
}

/// Results that can be compared with each other.
#[derive(Debug, Clone)]
pub struct Group {
    /// The node's network, or pods' own.
    pub host_network: bool,
    /// Pods started at once.
    pub parallel: usize,
    /// Containers that ran meanwhile, where it was about them and not about pods' lives.
    pub containers: Option<usize>,
    /// Each target's results.
    pub results: Vec<TargetResult>,
}

impl Group {
    /// A group.
    pub fn new(host_network: bool, parallel: usize, results: Vec<TargetResult>) -> Group {
        Group {
            host_network,
            parallel,
            containers: None,
            results,
        }
    }

    fn title(&self) -> String {
        let network = if self.host_network {
            "host network"
        } else {
            "network from CNI"
        };
        if let Some(count) = self.containers {
            return format!("{network}, {count} containers");
        }
        match self.parallel {
            1 => format!("{network}, one after the other"),
            many => format!("{network}, {many} at once"),
        }
    }

    fn operations(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (name, _) in self.results.iter().flat_map(|result| &result.operations) {
            if !names.contains(name) {
                names.push(*name);
            }
        }
        names
    }

    fn render(&self) -> String {
        let mut table = Table::new(&[
            "OPERATION (ms)",
            "TARGET",
            "N",
            "P50",
            "P95",
            "P99",
            "MAX",
            "P50 TO FIRST",
        ]);
        for operation in self.operations() {
            let mut first = None;
            for result in &self.results {
                let Some(s) = result.summary(operation) else {
                    continue;
                };
                let base = *first.get_or_insert(s.p50);
                let ms = |value: f64| format!("{value:.2}");
                let figures = [s.p50, s.p95, s.p99, s.max].map(ms);
                let row = [
                    operation.to_owned(),
                    result.name.clone(),
                    s.count.to_string(),
                ];
                table.row(row.into_iter().chain(figures).chain([ratio(s.p50, base)]));
            }
        }
        let mut text = format!("{}\n{}", self.title(), table.render());
        let mut first = None;
        for result in &self.results {
            if let Some(rate) = result.pods_per_second() {
                let base = *first.get_or_insert(rate);
                let ratio = ratio(rate, base);
                text += &format!("{}: {rate:.1} pods per second ({ratio})\n", result.name);
            }
            if let Some(percent) = result.cpu_percent {
                let name = &result.name;
                text += &format!(
                    "{name}: {percent:.2} % of one processor at the kubelet's rate of calls\n"
                );
            }
            if result.failures > 0 {
                text += &format!("{}: {} pods FAILED\n", result.name, result.failures);
            }
        }
        text
    }

    fn to_json(&self) -> Value {
        let results: Vec<Value> = self
            .results
            .iter()
            .map(|result| {
                let operations: serde_json::Map<String, Value> = result
                    .operations
                    .iter()
                    .map(|(name, samples)| ((*name).to_owned(), json!(samples.summary())))
                    .collect();
                json!({
                    "target": result.name,
                    "operations_ms": operations,
                    "pods_per_second": result.pods_per_second(),
                    "cpu_percent": result.cpu_percent,
                    "pods": result.successes,
                    "failures": result.failures,
                    "ratio_to_first": self.ratios(result),
                })
            })
            .collect();
        json!({
            "network": if self.host_network { "host" } else { "cni" },
            "parallel": self.parallel,
            "containers": self.containers,
            "results": results,
        })
    }

    /// Each operation's median in proportion to the first target's that has it.
    fn ratios(&self, result: &TargetResult) -> Value {
        let mut ratios = serde_json::Map::new();
        for (name, samples) in &result.operations {
            let first = self.results.iter().find_map(|other| other.summary(name));
            if let (Some(own), Some(first)) = (samples.summary(), first) {
                ratios.insert((*name).to_owned(), json!(own.p50 / first.p50));
            }
        }
        Value::Object(ratios)
    }
}

fn ratio(value: f64, base: f64) -> String {
    if base > 0.0 {
        format!("{:.3}", value / base)
    } else {
        "-".to_owned()
    }
}

/// All results of a run.
#[derive(Debug)]
pub struct Report {
    /// The runtimes.
    pub endpoints: Vec<Endpoint>,
    /// The measurements.
    pub groups: Vec<Group>,
    /// Memory of each runtime.
    pub memory: Vec<MemoryResult>,
}

impl Report {
    /// Nothing yet.
    pub fn new() -> Report {
        Report {
            endpoints: Vec::new(),
            groups: Vec::new(),
            memory: Vec::new(),
        }
    }

    fn results(&self) -> impl Iterator<Item = &TargetResult> {
        self.groups.iter().flat_map(|group| &group.results)
    }

    /// Pods that failed.
    pub fn failures(&self) -> usize {
        self.results().map(|result| result.failures).sum()
    }

    /// All pods.
    pub fn attempts(&self) -> usize {
        self.failures() + self.results().map(|result| result.successes).sum::<usize>()
    }

    /// Tables.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for endpoint in &self.endpoints {
            let Endpoint {
                name,
                endpoint,
                runtime,
                version,
            } = endpoint;
            text += &format!("{name}: {runtime} {version} at {endpoint}\n");
        }
        for group in &self.groups {
            text += &format!("\n{}", group.render());
        }
        if !self.memory.is_empty() {
            text += &format!("\n{}", super::memory::render(&self.memory));
        }
        text
    }

    /// The same for machines.
    pub fn to_json(&self) -> Value {
        let uname = nix::sys::utsname::uname().ok();
        let kernel = uname.map(|u| u.release().to_string_lossy().into_owned());
        json!({
            "schema": 1,
            "host": {
                "kernel": kernel,
                "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            },
            "endpoints": self.endpoints,
            "groups": self.groups.iter().map(Group::to_json).collect::<Vec<_>>(),
            "memory": self.memory,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &str, ms: u64) -> TargetResult {
        let mut result = TargetResult::new(name);
        result.add(vec![("pod ready", Duration::from_millis(ms))]);
        result
    }

    #[test]
    fn ratios_are_to_the_first_target() {
        let mut group = Group::new(true, 10, vec![result("a", 100), result("b", 25)]);
        group.results[1].batches.push((10, Duration::from_secs(2)));
        group.results[1].failures = 1;
        let text = group.render();
        assert!(text.starts_with("host network, 10 at once\n"), "{text}");
        let row = |name: &str| {
            let mut lines = text
                .lines()
                .filter(|line| line.contains(&format!(" {name} ")));
            let line = lines.next().unwrap();
            line.split_whitespace().last().unwrap().to_owned()
        };
        assert_eq!((row("a").as_str(), row("b").as_str()), ("1.000", "0.250"));
        assert!(text.contains("b: 5.0 pods per second (1.000)"), "{text}");
        assert!(text.contains("b: 1 pods FAILED"), "{text}");
        let value = group.to_json();
        assert_eq!(value["results"][1]["ratio_to_first"]["pod ready"], 0.25);
        assert_eq!(
            value["results"][1]["operations_ms"]["pod ready"]["p50"],
            25.0
        );
        let report = Report {
            endpoints: vec![],
            groups: vec![group],
            memory: vec![],
        };
        assert_eq!((report.failures(), report.attempts()), (1, 3));
    }
}
