//! Which container the kernel's OOM killer struck.
//!
//! A container's cgroup tells, while it is there. A scope of systemd's is taken away as soon as its last
//! process has ended, which may be before the keeper has looked. The pod's cgroup stays, and counts what
//! happens anywhere below it; what the pod's other containers do not account for was the one that is gone.

use std::collections::BTreeMap;
use std::path::Path;

use super::Keeper;

/// What is known of a pod's OOM kills.
#[derive(Debug, Default)]
pub(super) struct OomLedger {
    /// The pod's count before its first container.
    base: u64,
    /// Counts of containers, as last seen.
    containers: BTreeMap<String, u64>,
    /// Counts of containers that were deleted.
    deleted: u64,
}

impl OomLedger {
    pub(super) fn new(base: u64) -> Self {
        Self {
            base,
            ..Self::default()
        }
    }

    /// Writes down what a container's cgroup says; `None`: it is gone, and the pod's says `total`.
    fn enter(&mut self, id: &str, own: Option<u64>, total: u64) -> u64 {
        let known = self.containers.get(id).copied().unwrap_or(0);
        let count = own.unwrap_or_else(|| {
            let all: u64 = self.containers.values().sum();
            let others = self.base + self.deleted + all - known;
            total.saturating_sub(others).max(known)
        });
        self.containers.insert(id.to_owned(), count);
        count
    }

    pub(super) fn delete(&mut self, id: &str) {
        self.deleted += self.containers.remove(id).unwrap_or(0);
    }
}

impl Keeper {
    /// How many processes of a container the OOM killer has ended.
    pub(super) fn oom_kills(&mut self, id: &str, cgroup: &Path) -> u64 {
        let own = self.cgroups.known_oom_kills(cgroup);
        let mut total = 0;
        if own.is_none()
            && let Some(pod) = &self.sandbox.cgroup
        {
            total = self.cgroups.oom_kills(pod);
            // The others are asked first: what is theirs is not this one's.
            for (other, container) in self.containers.iter().filter(|(other, _)| *other != id) {
                if let Some(count) = self.cgroups.known_oom_kills(&container.cgroup) {
                    self.oom.enter(other, Some(count), 0);
                }
            }
        }
        self.oom.enter(id, own, total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_else_accounts_for_was_the_one_that_is_gone() {
        let mut ledger = OomLedger::new(3);
        assert_eq!(ledger.enter("a", Some(0), 0), 0);
        assert_eq!(ledger.enter("b", Some(1), 0), 1);
        // Not killed: all four are others'.
        assert_eq!(ledger.enter("c", None, 4), 0);
        assert_eq!(ledger.enter("a", None, 6), 2);
        ledger.delete("a");
        ledger.delete("b");
        assert_eq!(ledger.enter("d", None, 6), 0);
        assert_eq!(ledger.enter("d", None, 7), 1);
        // Asked twice, or of a cgroup that is gone as well.
        assert_eq!(ledger.enter("d", None, 0), 1);
    }
}
