//! What a container uses of a sandbox that it shares with the others of its pod (gVisor). The host sees only the sandbox, in a
//! cgroup of its own: that is the one container's, where there is one. CPU time of several is divided as the runtime says;
//! nobody tells their memory apart, so each is said to use an equal part of it. Either way the sum is right.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use slipway_observe::cgroup::{Memory, Usage};

use super::container::Container;
use super::handlers::Driver;
use super::node::Node;
use super::state::Stage;

/// How long a runtime may take to tell what a container has used. Whoever asked waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long what a runtime has told of a pod holds: for one answer about all of its containers.
const FRESH: Duration = Duration::from_millis(500);

/// What a runtime has told of the CPU time of a pod's containers. In this unit or that: runsc of 2022 has nanoseconds on
/// cgroup v1 and microseconds on v2.
#[derive(Debug)]
pub struct Told {
    at: Instant,
    times: HashMap<String, u64>,
}

/// A container's share of its pod's sandbox.
pub struct Share {
    /// The sandbox's cgroup.
    pub cgroup: String,
    /// How many containers run in it.
    members: u64,
    /// The CPU time of this one and of all, in some unit, where there are others, too, and the runtime tells.
    cpu: Option<(u64, u64)>,
}

impl Share {
    /// What this container uses, of all that is used.
    pub fn of(&self, mut all: Usage) -> Usage {
        if self.members < 2 {
            return all;
        }
        all.cpu = self.cpu.zip(all.cpu).and_then(|((own, sum), cpu)| {
            let part = u128::from(cpu) * u128::from(own) / u128::from(sum.max(1));
            u64::try_from(part).ok()
        });
        all.memory = all.memory.map(|m| self.memory(m));
        all.swap = all.swap.map(|mut swap| {
            swap.usage /= self.members;
            swap
        });
        all
    }

    fn memory(&self, mut memory: Memory) -> Memory {
        for amount in [
            &mut memory.usage,
            &mut memory.inactive_file,
            &mut memory.rss,
            &mut memory.page_faults,
            &mut memory.major_page_faults,
            &mut memory.cache,
            &mut memory.mapped_file,
        ] {
            *amount /= self.members;
        }
        memory.kernel = memory.kernel.map(|kernel| kernel / self.members);
        memory
    }
}

impl Node {
    /// A container's share of its pod's sandbox; `None` of one that has a cgroup to itself. Blocks, while the runtime is
    /// asked.
    pub(super) fn share(&self, container: &Container) -> Option<Share> {
        let pod = self.pods.get(&container.record.pod_id)?;
        let driver = pod.record.driver.as_ref().filter(|d| d.pod_sandbox)?;
        let cgroup = super::shim::sandbox_cgroup(&pod.dir)?;
        let mut members = self.containers_of_pod(&pod);
        members.retain(|c| c.stage() == Stage::Running);
        let cpu = match (members.len() > 1, container.stage()) {
            (true, Stage::Running) => {
                // Whoever asks for another of them meanwhile waits for this answer.
                let mut told = pod.told.lock();
                let fresh = told.take_if(|told| told.at.elapsed() < FRESH);
                let fresh = fresh.unwrap_or_else(|| {
                    let ids = members.iter().map(|c| c.id());
                    let times =
                        ids.filter_map(|id| Some((id.to_owned(), driver.cpu_time(pod.id(), id)?)));
                    let times = times.collect();
                    Told {
                        at: Instant::now(),
                        times,
                    }
                });
                let own = fresh.times.get(container.id()).copied();
                let sum = fresh.times.values().sum();
                *told = Some(fresh);
                own.map(|own| (own, sum))
            }
            _ => None,
        };
        Some(Share {
            cgroup,
            members: members.len() as u64,
            cpu,
        })
    }
}

impl Driver {
    /// CPU time of a container, as its runtime says.
    fn cpu_time(&self, pod: &str, container: &str) -> Option<u64> {
        let root = self.root.join(pod);
        let root = root.to_string_lossy();
        let arguments = ["--root", &root, "events", "--stats", container];
        let told = slipway_check::runtime_says(&self.path, &arguments, PATIENCE);
        let told = told.inspect_err(|reason| {
            tracing::debug!(container, reason, "its runtime tells no statistics");
        });
        total(&told.ok()?)
    }
}

/// The CPU time in what `events --stats` prints, which leaves out zeros.
fn total(text: &str) -> Option<u64> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let usage = value.pointer("/data/cpu/usage")?.as_object()?;
    usage
        .get("total")
        .map_or(Some(0), serde_json::Value::as_u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_containers_share_what_nobody_tells_apart() {
        let usage = Usage {
            at: 1,
            cpu: Some(900),
            memory: Some(Memory {
                usage: 300,
                limit: Some(1000),
                kernel: Some(30),
                ..Memory::default()
            }),
            ..Usage::default()
        };
        let share = |members, cpu| Share {
            cgroup: String::new(),
            members,
            cpu,
        };
        assert_eq!(share(1, None).of(usage).cpu, Some(900));
        let part = share(3, Some((7, 9))).of(usage);
        assert_eq!(part.cpu, Some(700));
        let memory = part.memory.unwrap();
        assert_eq!((memory.usage, memory.kernel), (100, Some(10)));
        assert_eq!(memory.limit, Some(1000));
        assert_eq!(share(2, None).of(usage).cpu, None);
    }

    #[test]
    fn what_a_runtime_says_is_read() {
        let text = r#"{"type":"stats","id":"c1","data":{"cpu":{"usage":{"total":2251}}}}"#;
        assert_eq!(total(text), Some(2251));
        assert_eq!(total(r#"{"data":{"cpu":{"usage":{}}}}"#), Some(0));
        assert_eq!(total("{}"), None);
    }
}
