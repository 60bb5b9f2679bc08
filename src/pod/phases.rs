//! Where the time of an operation went.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// One step of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// How long it took, in microseconds.
    #[serde(rename = "us")]
    pub micros: u64,
}

/// A stopwatch with named laps.
#[derive(Debug)]
pub struct Phases {
    last: Instant,
    laps: Vec<Phase>,
}

impl Default for Phases {
    fn default() -> Self {
        Self {
            last: Instant::now(),
            laps: Vec::with_capacity(8),
        }
    }
}

impl Phases {
    /// Starts now.
    pub fn start() -> Self {
        Self::default()
    }

    /// Ends the current step under this name and begins the next.
    pub fn mark(&mut self, name: &str) {
        let now = Instant::now();
        let micros = u64::try_from((now - self.last).as_micros()).unwrap_or(u64::MAX);
        self.laps.push(Phase {
            name: name.to_owned(),
            micros,
        });
        self.last = now;
    }

    /// The steps so far.
    pub fn laps(&self) -> &[Phase] {
        &self.laps
    }

    /// Ends the watch.
    pub fn finish(self) -> Vec<Phase> {
        self.laps
    }
}

/// `name=12us` and so on, for logs.
pub fn describe(laps: &[Phase]) -> String {
    let text: Vec<_> = laps
        .iter()
        .map(|p| format!("{}={}us", p.name, p.micros))
        .collect();
    text.join(" ")
}

/// One finished operation.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The CRI method.
    pub method: &'static str,
    /// The pod.
    pub pod_id: String,
    /// The container, unless the operation is the pod's.
    pub container_id: String,
    /// When it ended, in nanoseconds since the epoch.
    pub ended_at: i64,
    /// Its steps.
    pub phases: Vec<Phase>,
}

/// The last operations, oldest first. Bounded.
#[derive(Debug, Default)]
pub struct Traces {
    last: Mutex<VecDeque<Trace>>,
}

/// How many operations are remembered.
const KEPT: usize = 512;

impl Traces {
    /// Adds an operation and forgets the oldest beyond the bound.
    pub fn add(&self, trace: Trace) {
        let mut last = self.last.lock();
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(trace);
    }

    /// The operations on one container, oldest first.
    pub fn of_container(&self, id: &str) -> Vec<Trace> {
        self.last
            .lock()
            .iter()
            .filter(|trace| trace.container_id == id)
            .cloned()
            .collect()
    }

    /// The operations of one pod (its id or the beginning of it; empty: of all), oldest first, at most
    /// the last `limit` of them.
    pub fn of_pod(&self, pod_id: &str, limit: usize) -> Vec<Trace> {
        let last = self.last.lock();
        let mut found: Vec<_> = last
            .iter()
            .rev()
            .filter(|trace| trace.pod_id.starts_with(pod_id))
            .take(limit)
            .cloned()
            .collect();
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_bounded_and_found_by_pod() {
        let traces = Traces::default();
        for n in 0..KEPT + 10 {
            traces.add(Trace {
                method: "RunPodSandbox",
                pod_id: format!("{n:04}"),
                container_id: String::new(),
                ended_at: 0,
                phases: Vec::new(),
            });
        }
        assert_eq!(traces.of_pod("", usize::MAX).len(), KEPT);
        assert!(traces.of_pod("0009", 9).is_empty());
        assert_eq!(traces.of_pod("0010", 9).len(), 1);
        let last = traces.of_pod("", 2);
        assert_eq!(last[1].pod_id, format!("{:04}", KEPT + 9));
    }

    #[test]
    fn laps_are_in_order() {
        let mut phases = Phases::start();
        phases.mark("a");
        phases.mark("b");
        let laps = phases.finish();
        assert_eq!(
            laps.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(),
            ["a", "b"]
        );
        assert!(describe(&laps).starts_with("a="));
    }
}
