//! Limits that several plugins change.

use slipway_proto::nri::{Field, LinuxCpu, LinuxMemory, LinuxResources};

use crate::error::NriError;
use crate::owners::Owners;

/// Takes over what `change` says into `all`, each thing from one plugin alone.
///
/// # Errors
/// [`NriError::Conflict`]; `all` may have some of the change then.
pub fn merge(
    all: &mut LinuxResources,
    change: &LinuxResources,
    owners: &mut Owners,
    container: &str,
    plugin: &str,
) -> Result<(), NriError> {
    macro_rules! take {
        ($from:expr, $to:expr, $($name:ident: $field:ident),+) => {
            $(if let Some(value) = &$from.$name {
                owners.claim(container, Field::$field, None, plugin)?;
                $to.$name = Some(value.clone());
            })+
        };
    }
    if let Some(memory) = &change.memory {
        let to = all.memory.get_or_insert_with(LinuxMemory::default);
        take!(memory, to, limit: MemLimit, reservation: MemReservation, swap: MemSwapLimit,
            kernel: MemKernelLimit, kernel_tcp: MemTcpLimit, swappiness: MemSwappiness,
            disable_oom_killer: MemDisableOomKiller, use_hierarchy: MemUseHierarchy);
    }
    if let Some(cpu) = &change.cpu {
        let to = all.cpu.get_or_insert_with(LinuxCpu::default);
        take!(cpu, to, shares: CpuShares, quota: CpuQuota, period: CpuPeriod,
            realtime_runtime: CpuRealtimeRuntime, realtime_period: CpuRealtimePeriod);
        for (from, to, field) in [
            (&cpu.cpus, &mut to.cpus, Field::CpusetCpus),
            (&cpu.mems, &mut to.mems, Field::CpusetMems),
        ] {
            if !from.is_empty() {
                owners.claim(container, field, None, plugin)?;
                to.clone_from(from);
            }
        }
    }
    for limit in &change.hugepage_limits {
        let size = limit.page_size.as_str();
        owners.claim(container, Field::HugepageLimits, Some(size), plugin)?;
        all.hugepage_limits.retain(|old| old.page_size != size);
        all.hugepage_limits.push(limit.clone());
    }
    for (name, value) in &change.unified {
        owners.claim(container, Field::CgroupsUnified, Some(name), plugin)?;
        all.unified.insert(name.clone(), value.clone());
    }
    take!(change, all, blockio_class: BlockioClass, rdt_class: RdtClass, pids: PidsLimit);
    all.devices.extend_from_slice(&change.devices);
    Ok(())
}
