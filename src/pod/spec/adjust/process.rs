//! Adjustments of the process: command, environment, limits, scheduling; and hooks around it.

use super::named;
use crate::error::{Result, SpecError};
use crate::{ContainerPlan, paths, process};
use oci_spec::runtime::{
    Hook, Hooks, IOPriorityClass, LinuxIOPriority, LinuxIOPriorityBuilder, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, PosixRlimitBuilder, PosixRlimitType, Process, Scheduler, Spec,
};
use slipway_proto::nri;

pub(super) fn adjust(plan: &mut ContainerPlan, wish: &nri::ContainerAdjustment) -> Result<()> {
    env(plan, &wish.env)?;
    let mut own: Process = plan.spec.process().clone().unwrap_or_default();
    let shown = |entry: &Vec<u8>| String::from_utf8(entry.clone()).ok();
    own.set_env(Some(plan.create.env.iter().filter_map(shown).collect()));
    if !wish.args.is_empty() {
        process::checked("adjust.args", &wish.args)?;
        own.set_args(Some(wish.args.clone()));
    }
    let mut limits = own.rlimits().clone().unwrap_or_default();
    for limit in &wish.rlimits {
        let field = "adjust.rlimits";
        let kind: PosixRlimitType = named(field, &limit.r#type)?;
        if limit.soft > limit.hard {
            let what = format!(
                "{}: the soft limit {} is above the hard one {}",
                limit.r#type, limit.soft, limit.hard
            );
            return Err(SpecError::invalid(field, what));
        }
        let new = PosixRlimitBuilder::default()
            .typ(kind)
            .soft(limit.soft)
            .hard(limit.hard);
        let new = new.build().map_err(|e| SpecError::invalid(field, e))?;
        limits.retain(|old| old.typ() != kind);
        limits.push(new);
    }
    own.set_rlimits((!limits.is_empty()).then_some(limits));
    let linux = wish.linux.as_ref();
    if let Some(wish) = linux.and_then(|linux| linux.io_priority) {
        own.set_io_priority(io_priority(wish)?);
    }
    if let Some(wish) = linux.and_then(|linux| linux.scheduler.as_ref()) {
        own.set_scheduler(scheduler(wish)?);
    }
    plan.spec.set_process(Some(own));
    Ok(())
}

/// Replaces in place, adds at the end.
fn env(plan: &mut ContainerPlan, wish: &[nri::KeyValue]) -> Result<()> {
    let all = &mut plan.create.env;
    let is = |entry: &[u8], key: &str| {
        entry
            .strip_prefix(key.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&b'='))
    };
    for pair in wish {
        if let Some(key) = pair.key.strip_prefix('-') {
            all.retain(|entry| !is(entry, key));
            continue;
        }
        let entry = process::variable("adjust.env", &pair.key, pair.value.as_bytes())?;
        match all.iter_mut().find(|old| is(old, &pair.key)) {
            Some(old) => *old = entry,
            None => all.push(entry),
        }
    }
    Ok(())
}

fn io_priority(wish: nri::LinuxIoPriority) -> Result<Option<LinuxIOPriority>> {
    let field = "adjust.linux.io_priority";
    use nri::IoPrioClass as Class;
    let class = match Class::try_from(wish.class) {
        Ok(Class::IoprioClassNone) => return Ok(None),
        Ok(Class::IoprioClassRt) => IOPriorityClass::IoprioClassRt,
        Ok(Class::IoprioClassBe) => IOPriorityClass::IoprioClassBe,
        Ok(Class::IoprioClassIdle) => IOPriorityClass::IoprioClassIdle,
        Err(_) => {
            let what = format!("there is no class {}", wish.class);
            return Err(SpecError::invalid(field, what));
        }
    };
    if !(0..=7).contains(&wish.priority) {
        let what = format!(
            "{} is not possible; it must be between 0 and 7",
            wish.priority
        );
        return Err(SpecError::invalid(field, what));
    }
    let priority = LinuxIOPriorityBuilder::default()
        .class(class)
        .priority(wish.priority);
    priority
        .build()
        .map(Some)
        .map_err(|e| SpecError::invalid(field, e))
}

fn scheduler(wish: &nri::LinuxScheduler) -> Result<Option<Scheduler>> {
    let field = "adjust.linux.scheduler";
    use nri::LinuxSchedulerPolicy as Policy;
    let policy = match Policy::try_from(wish.policy) {
        Ok(Policy::SchedNone) => return Ok(None),
        Ok(Policy::SchedOther) => LinuxSchedulerPolicy::SchedOther,
        Ok(Policy::SchedFifo) => LinuxSchedulerPolicy::SchedFifo,
        Ok(Policy::SchedRr) => LinuxSchedulerPolicy::SchedRr,
        Ok(Policy::SchedBatch) => LinuxSchedulerPolicy::SchedBatch,
        Ok(Policy::SchedIdle) => LinuxSchedulerPolicy::SchedIdle,
        Ok(Policy::SchedDeadline) => LinuxSchedulerPolicy::SchedDeadline,
        Ok(Policy::SchedIso) | Err(_) => {
            let what = format!("this kernel has no policy {}", wish.policy);
            return Err(SpecError::invalid(field, what));
        }
    };
    if !(-20..=19).contains(&wish.nice) {
        let what = format!(
            "nice {} is not possible; it must be between -20 and 19",
            wish.nice
        );
        return Err(SpecError::invalid(field, what));
    }
    if !(0..=99).contains(&wish.priority) {
        let what = format!(
            "priority {} is not possible; it must be between 0 and 99",
            wish.priority
        );
        return Err(SpecError::invalid(field, what));
    }
    use nri::LinuxSchedulerFlag as Flag;
    let mut flags = Vec::new();
    for flag in &wish.flags {
        flags.push(match Flag::try_from(*flag) {
            Ok(Flag::SchedFlagResetOnFork) => LinuxSchedulerFlag::SchedResetOnFork,
            Ok(Flag::SchedFlagReclaim) => LinuxSchedulerFlag::SchedFlagReclaim,
            Ok(Flag::SchedFlagDlOverrun) => LinuxSchedulerFlag::SchedFlagDLOverrun,
            Ok(Flag::SchedFlagKeepPolicy) => LinuxSchedulerFlag::SchedFlagKeepPolicy,
            Ok(Flag::SchedFlagKeepParams) => LinuxSchedulerFlag::SchedFlagKeepParams,
            Ok(Flag::SchedFlagUtilClampMin) => LinuxSchedulerFlag::SchedFlagUtilClampMin,
            Ok(Flag::SchedFlagUtilClampMax) => LinuxSchedulerFlag::SchedFlagUtilClampMax,
            Err(_) => {
                return Err(SpecError::invalid(
                    field,
                    format!("there is no flag {flag}"),
                ));
            }
        });
    }
    let mut scheduler = Scheduler::default();
    scheduler
        .set_policy(policy)
        .set_nice(Some(wish.nice))
        .set_priority(Some(wish.priority))
        .set_flags((!flags.is_empty()).then_some(flags))
        .set_runtime(Some(wish.runtime).filter(|n| *n != 0))
        .set_deadline(Some(wish.deadline).filter(|n| *n != 0))
        .set_period(Some(wish.period).filter(|n| *n != 0));
    Ok(Some(scheduler))
}

/// Adds hooks.
pub(super) fn hooks(spec: &mut Spec, wish: Option<&nri::Hooks>) -> Result<()> {
    let Some(wish) = wish else { return Ok(()) };
    let mut all = spec.hooks().clone().unwrap_or_default();
    let none = all == Hooks::default();
    // The runtime's two names for one time: who says "prestart" means before the start, in the host.
    #[allow(deprecated)]
    add("prestart", all.prestart_mut(), &wish.prestart)?;
    let runtime = all.create_runtime_mut();
    add("create_runtime", runtime, &wish.create_runtime)?;
    let container = all.create_container_mut();
    add("create_container", container, &wish.create_container)?;
    let start = all.start_container_mut();
    add("start_container", start, &wish.start_container)?;
    add("poststart", all.poststart_mut(), &wish.poststart)?;
    add("poststop", all.poststop_mut(), &wish.poststop)?;
    if !none || all != Hooks::default() {
        spec.set_hooks(Some(all));
    }
    Ok(())
}

fn add(name: &str, to: &mut Option<Vec<Hook>>, from: &[nri::Hook]) -> Result<()> {
    for hook in from {
        paths::absolute(&format!("adjust.hooks.{name}.path"), &hook.path)?;
        let some = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
        let mut new = Hook::default();
        new.set_path(hook.path.clone().into())
            .set_args(some(&hook.args))
            .set_env(some(&hook.env))
            .set_timeout(hook.timeout.map(|timeout| timeout.value));
        to.get_or_insert_default().push(new);
    }
    Ok(())
}
