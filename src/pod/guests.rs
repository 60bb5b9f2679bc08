//! What containers in virtual machines use. The host sees only the machine, in the pod's cgroup; the cgroup of such a container
//! has nobody in it. Its shim tells, as the machine's agent has counted.

use std::path::Path;
use std::time::{Duration, Instant};

use slipway_config::RuntimeKind;
use slipway_observe::cgroup::{Memory, Swap, Usage};
use slipway_shim::{Address, Metrics, ShimError, Task};

use super::container::Container;
use super::node::Node;
use super::sandbox::Pod;
use super::shim;
use super::state::Stage;

/// How long a shim may take to tell. Whoever asked waits for it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one that did not answer is not asked again.
const PAUSE: Duration = Duration::from_secs(10);

impl Node {
    /// Whether a container runs where the host does not see its processes: in a virtual machine.
    pub(super) fn in_machine(&self, container: &Container) -> bool {
        let status = container.status();
        if status.stage != Stage::Running || status.pid != 0 {
            return false;
        }
        let pod = self.pods.get(&container.record.pod_id);
        pod.is_some_and(|pod| of_shim(&pod))
    }

    /// Whether containers of a pod run in a virtual machine.
    pub(super) fn has_machine(&self, pod: &Pod) -> bool {
        let containers = self.containers_of_pod(pod);
        of_shim(pod) && containers.iter().any(|c| self.in_machine(c))
    }

    /// What the shim tells of such a container; nothing but the time if it does not. Blocks while it is asked.
    pub(super) fn told_by_shim(&self, container: &Container) -> Usage {
        let nothing = Usage {
            at: slipway_observe::now(),
            ..Usage::default()
        };
        let Some(pod) = self.pods.get(&container.record.pod_id) else {
            return nothing;
        };
        // Others wait here, so that one that hangs is asked once for all containers of its pod.
        let mut silent = pod.silent_until.lock();
        if silent.is_some_and(|until| Instant::now() < until) {
            return nothing;
        }
        *silent = None;
        match ask(&pod.dir, container.id()) {
            Some(Ok(metrics)) => usage(&metrics, slipway_observe::now()),
            Some(Err(error)) => {
                if error.is_timeout() {
                    *silent = Some(Instant::now() + PAUSE);
                }
                tracing::debug!(
                    container = container.id(),
                    reason = super::chain(&error),
                    "its shim tells no statistics"
                );
                nothing
            }
            None => nothing,
        }
    }
}

fn of_shim(pod: &Pod) -> bool {
    let driver = pod.record.driver.as_ref();
    driver.is_some_and(|d| d.settings.kind == RuntimeKind::ShimV2)
}

/// Asks the shim of the pod with this run directory; `None` if it has none.
fn ask(dir: &Path, container: &str) -> Option<Result<Metrics, ShimError>> {
    let address: Address = shim::address(dir)?;
    let asked = Task::connect(&address, PATIENCE);
    Some(asked.and_then(|mut task| task.stats(container, PATIENCE)))
}

fn usage(metrics: &Metrics, at: i64) -> Usage {
    let told = metrics.memory();
    let memory = Memory {
        usage: told.usage,
        inactive_file: told.inactive_file,
        rss: told.rss,
        limit: told.limit,
        page_faults: told.page_faults,
        major_page_faults: told.major_page_faults,
        cache: told.cache,
        mapped_file: told.mapped_file,
        kernel: None,
    };
    Usage {
        at,
        cpu: Some(metrics.cpu_nanoseconds()),
        memory: Some(memory),
        swap: Some(Swap {
            usage: told.swap,
            limit: told.swap_limit,
        }),
        ..Usage::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_shim_tells_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ask(dir.path(), "c1").is_none());
        let record = serde_json::json!({"pid": 1, "address": "unix:///nonexistent/s", "version": 3,
            "root": "/nonexistent/p1", "cgroup": "/"});
        let file = dir.path().join(slipway_runtime::SHIM_RECORD);
        std::fs::write(file, record.to_string()).unwrap();
        let error = ask(dir.path(), "c1").unwrap().unwrap_err();
        assert!(error.is_gone(), "{error}");
    }
}
