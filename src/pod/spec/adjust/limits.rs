//! Adjustments of limits.

use crate::error::{Result, SpecError, quoted};
use crate::{ContainerPlan, HostFacts, resize, resources};
use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxPids};
use slipway_proto::{cri, nri};

/// Limits of an NRI message as the CRI has them, for an update. `field` is for messages.
///
/// # Errors
/// [`SpecError`], naming a limit that can't be changed in a container that exists.
pub fn limits_of(field: &str, wish: &nri::LinuxResources) -> Result<cri::LinuxContainerResources> {
    let limits = common(field, wish)?;
    let memory = wish.memory.unwrap_or_default();
    let unsupported = [
        ("blockio_class", names_one(&wish.blockio_class)),
        ("memory.reservation", memory.reservation.is_some()),
        ("pids", wish.pids.is_some()),
        ("devices", !wish.devices.is_empty()),
    ];
    match unsupported.iter().find(|(_, set)| *set) {
        Some((name, _)) => {
            let what = "can't be changed in a container that exists already";
            Err(SpecError::unsupported(format!("{field}.{name}"), what))
        }
        None => Ok(limits),
    }
}

fn names_one(class: &Option<nri::OptionalString>) -> bool {
    class.as_ref().is_some_and(|class| !class.value.is_empty())
}

/// What creating and updating have in common; refuses what neither can.
fn common(field: &str, wish: &nri::LinuxResources) -> Result<cri::LinuxContainerResources> {
    let (memory, cpu) = (
        wish.memory.unwrap_or_default(),
        wish.cpu.clone().unwrap_or_default(),
    );
    // Zero, false and "no class" are what holds anyway.
    let unsupported = [
        ("memory.kernel", memory.kernel.is_some_and(|v| v.value != 0)),
        (
            "memory.kernel_tcp",
            memory.kernel_tcp.is_some_and(|v| v.value != 0),
        ),
        ("memory.swappiness", memory.swappiness.is_some()),
        (
            "memory.disable_oom_killer",
            memory.disable_oom_killer.is_some_and(|v| v.value),
        ),
        (
            "memory.use_hierarchy",
            memory.use_hierarchy.is_some_and(|v| !v.value),
        ),
        (
            "cpu.realtime_runtime",
            cpu.realtime_runtime.is_some_and(|v| v.value != 0),
        ),
        (
            "cpu.realtime_period",
            cpu.realtime_period.is_some_and(|v| v.value != 0),
        ),
        ("rdt_class", names_one(&wish.rdt_class)),
    ];
    if let Some((name, _)) = unsupported.iter().find(|(_, set)| *set) {
        let what = "this limit is not there in this version";
        return Err(SpecError::unsupported(format!("{field}.{name}"), what));
    }
    let whole = |name: &str, value: Option<nri::OptionalUInt64>| {
        i64::try_from(value.map_or(0, |v| v.value)).map_err(|_| {
            SpecError::invalid(format!("{field}.{name}"), "is more than any limit can be")
        })
    };
    Ok(cri::LinuxContainerResources {
        cpu_period: whole("cpu.period", cpu.period)?,
        cpu_quota: cpu.quota.map_or(0, |v| v.value),
        cpu_shares: whole("cpu.shares", cpu.shares)?,
        memory_limit_in_bytes: memory.limit.map_or(0, |v| v.value),
        memory_swap_limit_in_bytes: memory.swap.map_or(0, |v| v.value),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepage_limits: (wish.hugepage_limits.iter())
            .map(|limit| cri::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        unified: wish.unified.clone().into_iter().collect(),
        ..Default::default()
    })
}

pub(super) fn adjust(
    plan: &mut ContainerPlan,
    linux: &mut Linux,
    wish: Option<&nri::LinuxResources>,
    host: &HostFacts,
) -> Result<()> {
    let Some(wish) = wish else { return Ok(()) };
    let field = "adjust.linux.resources";
    let request = common(field, wish)?;
    let mut all = linux.resources().clone().unwrap_or_default();
    if request != cri::LinuxContainerResources::default() {
        let merged = resize::merge(&plan.resources, &request);
        let limits = resources::of_container(Some(&merged), 0, host, &mut plan.warnings)?;
        all.set_cpu(limits.oci.cpu().clone())
            .set_memory(*limits.oci.memory())
            .set_hugepage_limits(limits.oci.hugepage_limits().clone())
            .set_unified(limits.oci.unified().clone());
        plan.resources = limits.effective;
    }
    if let Some(low) = wish.memory.and_then(|memory| memory.reservation) {
        if low.value < -1 {
            let what = format!("{} is not possible; it must be at least -1", low.value);
            return Err(SpecError::invalid(
                format!("{field}.memory.reservation"),
                what,
            ));
        }
        let mut memory = all.memory().unwrap_or_default();
        memory.set_reservation(Some(low.value));
        all.set_memory(Some(memory));
    }
    if let Some(pids) = wish.pids {
        let mut limit = LinuxPids::default();
        limit.set_limit(pids.limit);
        all.set_pids((pids.limit > 0).then_some(limit));
    }
    let mut rules = all.devices().clone().unwrap_or_default();
    for device in &wish.devices {
        rules.push(rule(&format!("{field}.devices"), device)?);
    }
    all.set_devices(Some(rules));
    linux.set_resources(Some(all));
    Ok(())
}

fn rule(field: &str, wish: &nri::LinuxDeviceCgroup) -> Result<LinuxDeviceCgroup> {
    if wish.access.is_empty() || wish.access.contains(|c| !"rwm".contains(c)) {
        let what = format!("{} must be made of r, w and m", quoted(&wish.access));
        return Err(SpecError::invalid(format!("{field}.access"), what));
    }
    let kind = if wish.r#type.is_empty() {
        "a"
    } else {
        &wish.r#type
    };
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(wish.allow)
        .set_typ(Some(super::named(&format!("{field}.type"), kind)?))
        .set_major(wish.major.map(|n| n.value))
        .set_minor(wish.minor.map(|n| n.value))
        .set_access(Some(wish.access.clone()));
    Ok(rule)
}
