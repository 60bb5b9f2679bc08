//! Profile in, program out.

use crate::{
    Engine, Filter, Instruction, SeccompError,
    arch::{Abi, X32_BIT},
    emit::{Emitter, JEQ, Target},
    filter::MAX_INSTRUCTIONS,
    rules::{AbiRules, Condition, Decision, ENOSYS, Plan},
};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompOperator as Op};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Which compiler to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// `seccompiler` for profiles it can express and that stay small, the range tree for all others.
    #[default]
    Auto,
    /// Always the range tree.
    RangeTree,
}

/// How to compile.
#[derive(Clone, Copy, Debug)]
pub struct CompileOptions {
    /// The kernel's own ABI; `None` for that of this program.
    pub native: Option<Abi>,
    /// Whether calls newer than every call the profile names fail with `ENOSYS` instead of the default
    /// action, so that libraries fall back to older calls. Has no effect when the default action lets
    /// calls pass. runc does this; leave it on.
    pub enosys_for_newer: bool,
    /// Which compiler to use.
    pub engine: EngineChoice,
    /// Whether the profile may have `SCMP_ACT_NOTIFY`: for who loads the filter by [`crate::load_with_listener`].
    pub notify: bool,
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions {
            native: None,
            enosys_for_newer: true,
            engine: EngineChoice::Auto,
            notify: false,
        }
    }
}

/// What a call of an ABI that is not in the filter gets; as in libseccomp.
const BAD_ARCHITECTURE: u32 = libc::SECCOMP_RET_KILL_THREAD;

/// seccompiler tests one call after the other, so beyond this many the tree is better.
const SMALL: usize = 16;

/// Compiles an OCI profile (runtime-spec, config-linux.md, "Seccomp") to a program for this kernel.
///
/// The meaning is that of runc with libseccomp; see the crate's documentation for what it says about
/// overlapping rules, unknown names, newer calls and foreign architectures.
///
/// # Errors
/// [`SeccompError::Profile`] and [`SeccompError::Unsupported`] name the place in the profile.
pub fn compile(profile: &LinuxSeccomp, options: &CompileOptions) -> Result<Filter, SeccompError> {
    let plan = Plan::new(profile, options)?;
    let mut emitter = Emitter::default();
    let mut engine = Engine::RangeTree;
    let body = match options.engine {
        EngineChoice::Auto => seccompiler_body(&plan)?,
        EngineChoice::RangeTree => None,
    };
    if let (Some(body), [abi]) = (body, plan.abis.as_slice()) {
        let label = emitter.prepend(body.into_iter());
        let section = emitter.tree(&gate(abi, label, plan.default), plan.default, &|_| true);
        let section = emitter.load_number(section);
        dispatch(&mut emitter, &[(abi.abi, section)]);
        engine = Engine::Seccompiler;
    } else {
        range_tree(&mut emitter, &plan);
    }
    let instructions = emitter.finish();
    if instructions.len() > MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLong {
            instructions: instructions.len(),
        });
    }
    Ok(Filter {
        instructions,
        flags: plan.flags,
        unknown: plan.unknown,
        engine,
    })
}

fn range_tree(emitter: &mut Emitter, plan: &Plan) {
    let mut sections: Vec<(Abi, usize)> = Vec::new();
    // The native ABI comes first in the plan and last here, so that it is what the program begins with.
    for abi in plan.abis.iter().rev().filter(|a| a.abi != Abi::X32) {
        let mut ranges = Ranges::new(abi, plan.default);
        if abi.abi == Abi::X86_64 {
            match plan.abis.iter().find(|a| a.abi == Abi::X32) {
                Some(x32) => ranges.append_x32(abi, x32, plan.default),
                None => ranges.refuse_x32(plan.default),
            }
        }
        let wide = |number: u32| {
            abi.abi.wide_arguments() && !(abi.abi == Abi::X86_64 && number & X32_BIT != 0)
        };
        let tree = emitter.tree(&ranges.merged(), plan.default, &wide);
        let section = emitter.load_number(tree);
        sections.push((abi.abi, section));
    }
    dispatch(emitter, &sections);
}

/// `ld arch` and one comparison per section, the last section first.
fn dispatch(emitter: &mut Emitter, sections: &[(Abi, usize)]) {
    let mut next = None;
    for (abi, section) in sections {
        let otherwise = match next {
            Some(label) => label,
            None => emitter.ret(BAD_ARCHITECTURE),
        };
        next = Some(emitter.branch(JEQ, abi.audit(), *section, otherwise));
    }
    if let Some(first) = next {
        emitter.load_arch(first);
    }
}

/// Ascending starts of ranges, covering every number.
struct Ranges(Vec<(u32, Target)>);

impl Ranges {
    /// Every number from 0, as `abi` has it; what lies above its newest goes on to the end.
    fn new(abi: &AbiRules, default: u32) -> Ranges {
        let mut ranges = Ranges(Vec::with_capacity(2 * abi.calls.len() + 4));
        ranges.put(0, always(default));
        ranges.fill(abi, 0, default);
        ranges
    }

    fn put(&mut self, start: u32, target: Target) {
        // A range that begins where the last one does replaces it.
        if self.0.last().is_some_and(|(s, _)| *s == start) {
            self.0.pop();
        }
        self.0.push((start, target));
    }

    fn fill(&mut self, abi: &AbiRules, base: u32, default: u32) {
        let newer = abi.newest.filter(|n| *n >= base).map(|n| n + 1);
        let rest = |number: u32| match newer {
            Some(first) if number >= first => always(libc::SECCOMP_RET_ERRNO | ENOSYS),
            _ => always(default),
        };
        let mut newer_done = newer.is_none();
        for (number, decision) in &abi.calls {
            if let Some(first) = newer.filter(|f| !newer_done && *number >= *f) {
                self.put(first, rest(first));
                newer_done = true;
            }
            self.put(*number, Target::Decision(decision.clone()));
            if let Some(after) = number.checked_add(1) {
                self.put(after, rest(after));
            }
        }
        if let Some(first) = newer.filter(|_| !newer_done) {
            self.put(first, rest(first));
        }
    }

    fn append_x32(&mut self, native: &AbiRules, x32: &AbiRules, default: u32) {
        self.put(X32_BIT, always(default));
        self.fill(x32, X32_BIT, default);
        // The bit alone says which ABI it is, also in numbers that no ABI has.
        self.put(2 * X32_BIT, beyond(native, default));
        self.put(3 * X32_BIT, beyond(x32, default));
    }

    /// Numbers with the x32 bit are a foreign ABI's. -1 is not: a tracer sets it to skip a call.
    fn refuse_x32(&mut self, default: u32) {
        self.put(X32_BIT, always(BAD_ARCHITECTURE));
        self.put(u32::MAX, always(default));
    }

    /// The ranges with equal neighbours joined.
    fn merged(mut self) -> Vec<(u32, Target)> {
        self.0.dedup_by(|next, kept| next.1 == kept.1);
        self.0
    }
}

/// What numbers beyond all that the profile names get.
fn beyond(abi: &AbiRules, default: u32) -> Target {
    always(
        abi.newest
            .map_or(default, |_| libc::SECCOMP_RET_ERRNO | ENOSYS),
    )
}

fn always(value: u32) -> Target {
    Target::Decision(Decision::Always(value))
}

/// The ranges around a body that another compiler made: newer and foreign numbers never get to it.
fn gate(abi: &AbiRules, body: usize, default: u32) -> Vec<(u32, Target)> {
    let mut ranges = Ranges(vec![(0, Target::Code(body))]);
    if let Some(newest) = abi.newest {
        ranges.put(newest + 1, always(libc::SECCOMP_RET_ERRNO | ENOSYS));
    }
    if abi.abi == Abi::X86_64 {
        ranges.refuse_x32(default);
    }
    ranges.merged()
}

/// The profile as compiled by `seccompiler`, when it can express it: one 64-bit ABI, one action beside the
/// default, few calls. What it can't say (foreign ABIs, x32, newer calls) is for [`gate`] to add.
fn seccompiler_body(plan: &Plan) -> Result<Option<Vec<Instruction>>, SeccompError> {
    let [abi] = plan.abis.as_slice() else {
        return Ok(None);
    };
    let arch = match abi.abi {
        Abi::X86_64 => TargetArch::x86_64,
        Abi::Aarch64 => TargetArch::aarch64,
        _ => return Ok(None),
    };
    let mut returns: Vec<u32> = Vec::new();
    for decision in abi.calls.values() {
        match decision {
            Decision::Always(value) => returns.push(*value),
            Decision::Checks(rules) => returns.extend(rules.iter().map(|r| r.ret)),
        }
    }
    returns.dedup();
    let [matched] = returns.as_slice() else {
        return Ok(None);
    };
    if abi.calls.len() > SMALL {
        return Ok(None);
    }
    let (Some(default), Some(matched)) = (action(plan.default), action(*matched)) else {
        return Ok(None);
    };
    let refused = |e: seccompiler::BackendError| {
        SeccompError::Seccompiler(Box::new(seccompiler::Error::Backend(e)))
    };
    let mut rules = BTreeMap::new();
    for (number, decision) in &abi.calls {
        let mut chain = Vec::new();
        if let Decision::Checks(alternatives) = decision {
            for rule in alternatives {
                let conditions: Result<Vec<_>, _> = rule.conditions.iter().map(condition).collect();
                let rule = SeccompRule::new(conditions.map_err(refused)?).map_err(refused)?;
                chain.push(rule);
            }
        }
        rules.insert(i64::from(*number), chain);
    }
    let filter = SeccompFilter::new(rules, default, matched, arch).map_err(refused)?;
    let program: BpfProgram = filter.try_into().map_err(refused)?;
    let program: Vec<_> = program
        .iter()
        .map(|i| Instruction {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect();
    // With the gate in front it must still fit; the tree is shorter.
    Ok((program.len() < MAX_INSTRUCTIONS - 32).then_some(program))
}

fn action(value: u32) -> Option<SeccompAction> {
    let data = value & libc::SECCOMP_RET_DATA;
    match value & libc::SECCOMP_RET_ACTION_FULL {
        libc::SECCOMP_RET_ALLOW => Some(SeccompAction::Allow),
        libc::SECCOMP_RET_LOG => Some(SeccompAction::Log),
        libc::SECCOMP_RET_TRACE => Some(SeccompAction::Trace(data)),
        libc::SECCOMP_RET_ERRNO => Some(SeccompAction::Errno(data)),
        libc::SECCOMP_RET_TRAP => Some(SeccompAction::Trap),
        libc::SECCOMP_RET_KILL_THREAD => Some(SeccompAction::KillThread),
        libc::SECCOMP_RET_KILL_PROCESS => Some(SeccompAction::KillProcess),
        _ => None,
    }
}

fn condition(c: &Condition) -> Result<SeccompCondition, seccompiler::BackendError> {
    let op = match c.op {
        Op::ScmpCmpEq => SeccompCmpOp::Eq,
        Op::ScmpCmpNe => SeccompCmpOp::Ne,
        Op::ScmpCmpLt => SeccompCmpOp::Lt,
        Op::ScmpCmpLe => SeccompCmpOp::Le,
        Op::ScmpCmpGt => SeccompCmpOp::Gt,
        Op::ScmpCmpGe => SeccompCmpOp::Ge,
        Op::ScmpCmpMaskedEq => SeccompCmpOp::MaskedEq(c.mask),
    };
    SeccompCondition::new(c.arg, SeccompCmpArgLen::Qword, op, c.value)
}
