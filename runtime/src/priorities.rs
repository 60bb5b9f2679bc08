//! What a process of a container gets beside its confinement: CPU and I/O scheduling, memory policy, personality.
//!
//! libcontainer sets them for a container's init. An exec session gets the same here, as under runc, before it is in the
//! container's namespaces: in a user namespace nobody may raise a priority.

use std::io;

use libcontainer::process::memory_policy::setup_memory_policy;
use libcontainer::syscall::syscall::create_syscall;
use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonalityDomain,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
};

use crate::confine::chain;
use crate::sys::{self, SchedAttr};

/// The two classes' field is above the eight levels' (ioprio_set(2)).
const CLASS_SHIFT: i64 = 13;
// personality(2)
const PER_LINUX: i32 = 0;
const PER_LINUX32: i32 = 8;

/// The priorities of a container's processes.
#[derive(Debug, Clone, Default)]
pub struct Priorities {
    scheduler: Option<Scheduler>,
    io: Option<LinuxIOPriority>,
    memory: Option<LinuxMemoryPolicy>,
    personality: Option<LinuxPersonalityDomain>,
}

impl Priorities {
    /// Those that a specification gives to one of its processes.
    pub fn new(process: &Process, linux: Option<&Linux>) -> Self {
        let personality = linux.and_then(|l| l.personality().as_ref());
        Self {
            scheduler: process.scheduler().clone(),
            io: *process.io_priority(),
            memory: linux.and_then(|l| l.memory_policy().clone()),
            personality: personality.map(|p| p.domain()),
        }
    }

    /// Gives them to this process, which must be in its cgroup already: nodes of a memory policy are those of the cpuset.
    ///
    /// # Errors
    /// The step, and what the kernel says.
    pub fn take(&self) -> Result<(), (&'static str, io::Error)> {
        if let Some(io) = &self.io {
            sys::set_io_priority(io_priority(io)).map_err(|e| ("set its I/O priority", e))?;
        }
        if let Some(scheduler) = &self.scheduler {
            sys::set_scheduler(&attributes(scheduler)).map_err(|e| ("set its scheduler", e))?;
        }
        setup_memory_policy(&self.memory, create_syscall().as_ref())
            .map_err(|e| ("set its memory policy", io::Error::other(chain(&e))))?;
        if let Some(domain) = self.personality {
            sys::set_personality(match domain {
                LinuxPersonalityDomain::PerLinux => PER_LINUX,
                LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
            })
            .map_err(|e| ("set its personality", e))?;
        }
        Ok(())
    }
}

fn io_priority(priority: &LinuxIOPriority) -> i64 {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    class << CLASS_SHIFT | priority.priority()
}

fn attributes(scheduler: &Scheduler) -> SchedAttr {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        // Reserved, and refused by every kernel.
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    SchedAttr {
        policy: policy.cast_unsigned(),
        flags: scheduler
            .flags()
            .iter()
            .flatten()
            .fold(0, |all, f| all | flag(f)),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).cast_unsigned(),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedAttr::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{CloneOptions, Forked};

    fn priorities(process: serde_json::Value, linux: serde_json::Value) -> Priorities {
        let mut whole =
            serde_json::json!({"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        whole
            .as_object_mut()
            .unwrap()
            .extend(process.as_object().unwrap().clone());
        let process: Process = serde_json::from_value(whole).unwrap();
        let linux: Linux = serde_json::from_value(linux).unwrap();
        Priorities::new(&process, Some(&linux))
    }

    /// What a child of this process is told, in a process of its own: the tests' threads share theirs.
    fn in_a_child(taken: &Priorities, holds: impl FnOnce() -> bool) -> i32 {
        match sys::clone_process(&CloneOptions::default()).unwrap() {
            Forked::Child => sys::exit_now(match taken.take() {
                Ok(()) if holds() => 0,
                Ok(()) => 1,
                Err(_) => 2,
            }),
            Forked::Parent(pid) => sys::wait_child(pid),
        }
    }

    #[test]
    fn a_process_takes_what_its_specification_says() {
        let process = serde_json::json!({
            "scheduler": {"policy": "SCHED_BATCH", "nice": 7},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0},
        });
        let all = priorities(
            process,
            serde_json::json!({"personality": {"domain": "LINUX32"}}),
        );
        let holds = || {
            // SAFETY: all three calls take integers only; 0 is the calling process, 0xffffffff asks.
            let (policy, io, personality) = unsafe {
                (
                    libc::sched_getscheduler(0),
                    libc::syscall(libc::SYS_ioprio_get, 1, 0),
                    libc::personality(0xffff_ffff),
                )
            };
            policy == libc::SCHED_BATCH && io >> CLASS_SHIFT == 3 && personality == PER_LINUX32
        };
        assert_eq!(in_a_child(&all, holds), 0);
        assert_eq!(in_a_child(&Priorities::default(), || true), 0);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let odd = serde_json::json!({"scheduler": {"policy": "SCHED_FIFO", "priority": 1000}});
        assert_eq!(
            in_a_child(&priorities(odd, serde_json::json!({})), || true),
            2
        );
    }
}
