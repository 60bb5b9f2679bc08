//! An OCI profile resolved to numbers: what each ABI's calls get, with libseccomp's and runc's rules
//! for profiles that say several things about one call.
//!
//! - A rule whose action is the default action says nothing and is left out.
//! - A rule without conditions beats every rule with conditions, wherever it stands; of several, the
//!   first counts.
//! - Conditions of one rule must all hold. Two conditions on the *same* argument are two rules.
//! - Rules with conditions are alternatives. Where two with different actions match one call, the
//!   order is libseccomp's: higher argument first, equality before ranges, the narrower range first; a rule
//!   that another merely narrows down beats it. (libseccomp 2.5 itself confuses some ranges and loses some
//!   rules after an inverted test; there the text of the profile decides.)

use crate::{
    CompileOptions, MAX_INSTRUCTIONS, SeccompError,
    arch::{Abi, native_arch},
    numbers,
};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompFilterFlag as Flag,
    LinuxSeccompOperator as Op, LinuxSyscall,
};
use std::{cmp::Ordering, collections::BTreeMap};

/// Linux passes at most six arguments.
const MAX_ARGS: usize = 6;
/// The kernel cuts greater error numbers to this (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

/// The flag by which a filter that asks somebody else for decisions can be told.
pub(crate) const NEW_LISTENER: u32 = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;
/// Since Linux 5.19.
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

pub(crate) const ENOSYS: u32 = libc::ENOSYS as u32;
const EPERM: u32 = libc::EPERM as u32;

/// One test of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    pub arg: u8,
    pub op: Op,
    /// What to compare with; for a masked comparison already masked.
    pub value: u64,
    /// All ones unless the comparison is masked.
    pub mask: u64,
}

/// Conditions that must all hold, and what a call that meets them gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub conditions: Vec<Condition>,
    pub ret: u32,
}

/// What one system call gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Always this.
    Always(u32),
    /// The first rule that matches, else the default.
    Checks(Vec<Rule>),
}

/// The calls of one ABI that don't simply get the default.
#[derive(Clone, Debug)]
pub(crate) struct AbiRules {
    pub abi: Abi,
    pub calls: BTreeMap<u32, Decision>,
    /// The highest number the profile names, whatever it says about it: greater ones are newer than
    /// the profile and get `ENOSYS`. `None`: no such rule for this ABI.
    pub newest: Option<u32>,
}

/// A whole profile, resolved.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub default: u32,
    pub abis: Vec<AbiRules>,
    pub flags: u32,
    pub unknown: Vec<String>,
}

impl Plan {
    pub fn new(profile: &LinuxSeccomp, options: &CompileOptions) -> Result<Plan, SeccompError> {
        let native = match options.native {
            Some(abi) => abi,
            None => Abi::native().map_err(|_| SeccompError::Architecture(native_arch()))?,
        };
        if profile.default_action() == Action::ScmpActNotify {
            return Err(SeccompError::Profile {
                place: "defaultAction".to_owned(),
                problem: "it can't be SCMP_ACT_NOTIFY: the calls that make a process the container's would wait for an \
                          answer, too"
                    .to_owned(),
            });
        }
        let default = return_value(
            profile.default_action(),
            profile.default_errno_ret(),
            "defaultAction",
        )?;
        let stub = options.enosys_for_newer && !permissive(profile.default_action());
        let mut plan = Plan {
            default,
            abis: abis(profile, native)
                .into_iter()
                .map(|abi| AbiRules {
                    abi,
                    calls: BTreeMap::new(),
                    newest: None,
                })
                .collect(),
            flags: flags(profile, options)?,
            unknown: Vec::new(),
        };
        for (i, entry) in profile.syscalls().iter().flatten().enumerate() {
            plan.add(entry, &format!("syscalls[{i}]"), stub)?;
        }
        Ok(plan)
    }

    /// An entry whose calls somebody else decides.
    fn notify(&mut self, entry: &LinuxSyscall, place: &str) -> Result<(), SeccompError> {
        if self.flags & NEW_LISTENER == 0 {
            return Err(SeccompError::Unsupported {
                place: place.to_owned(),
                what: "the action SCMP_ACT_NOTIFY".to_owned(),
                remedy: "use SCMP_ACT_ERRNO or SCMP_ACT_TRACE, or run the pod with the runc handler",
            });
        }
        // With it the process tells of the descriptor that the answers come by.
        if entry.names().iter().any(|name| name == "write") {
            return Err(SeccompError::Profile {
                place: place.to_owned(),
                problem: "SCMP_ACT_NOTIFY can't be used for write".to_owned(),
            });
        }
        Ok(())
    }

    fn add(&mut self, entry: &LinuxSyscall, place: &str, stub: bool) -> Result<(), SeccompError> {
        let ret = return_value(entry.action(), entry.errno_ret(), place)?;
        if entry.action() == Action::ScmpActNotify {
            self.notify(entry, place)?;
        }
        let alternatives = alternatives(entry.args().as_deref().unwrap_or_default(), place)?;
        for name in entry.names() {
            if name.is_empty() {
                return Err(SeccompError::Profile {
                    place: place.to_owned(),
                    problem: "a system call's name is empty; delete it".to_owned(),
                });
            }
            let mut known = false;
            for abi in &mut self.abis {
                let number = numbers::number(abi.abi, name);
                let multiplexed = numbers::multiplexed(abi.abi, name);
                known |= number.is_some() || multiplexed.is_some();
                if let (true, Some(n), None) = (stub, number, multiplexed) {
                    let private = abi.abi == Abi::Arm && n >= numbers::ARM_PRIVATE_BASE;
                    if n > 0 && !private {
                        abi.newest = abi.newest.max(Some(n));
                    }
                }
                if ret == self.default {
                    continue;
                }
                for conditions in &alternatives {
                    if let Some(n) = number {
                        abi.add(n, conditions, ret)?;
                    }
                    if let Some((mux, call)) = multiplexed {
                        // The multiplexer takes the real arguments from memory, where no filter can look:
                        // what the rule says of the first argument is lost, as in libseccomp.
                        let mut c: Vec<_> =
                            conditions.iter().filter(|c| c.arg != 0).copied().collect();
                        c.insert(
                            0,
                            Condition {
                                arg: 0,
                                op: Op::ScmpCmpEq,
                                value: call,
                                mask: u64::MAX,
                            },
                        );
                        abi.add(mux, &c, ret)?;
                    }
                }
            }
            if !known && !self.unknown.contains(name) {
                self.unknown.push(name.clone());
            }
        }
        Ok(())
    }
}

impl AbiRules {
    fn add(&mut self, number: u32, conditions: &[Condition], ret: u32) -> Result<(), SeccompError> {
        let conditions: Vec<_> = conditions
            .iter()
            .map(|c| c.narrowed(self.abi))
            // A mask without bits holds for every value.
            .filter(|c| c.mask != 0)
            .collect();
        let decision = self
            .calls
            .entry(number)
            .or_insert_with(|| Decision::Checks(Vec::new()));
        match decision {
            Decision::Always(_) => {}
            Decision::Checks(_) if conditions.is_empty() => *decision = Decision::Always(ret),
            Decision::Checks(rules) => {
                let rule = Rule { conditions, ret };
                if !rules.contains(&rule) {
                    // Each takes an instruction at least.
                    if rules.len() == MAX_INSTRUCTIONS {
                        return Err(SeccompError::TooLong {
                            instructions: rules.len() + 1,
                        });
                    }
                    let wide = self.abi.wide_arguments();
                    let behind = rules.iter().position(|r| goes_before(&rule, r, wide));
                    rules.insert(behind.unwrap_or(rules.len()), rule);
                }
            }
        }
        Ok(())
    }
}

impl Condition {
    /// The condition as `abi` sees it: 32-bit ABIs compare the low half only.
    fn narrowed(self, abi: Abi) -> Condition {
        if abi.wide_arguments() {
            return self;
        }
        let low = u64::from(u32::MAX);
        let mask = if self.op == Op::ScmpCmpMaskedEq {
            self.mask & low
        } else {
            self.mask
        };
        Condition {
            value: self.value & low,
            mask,
            ..self
        }
    }
}

/// libseccomp's order of rules: whether `new` is tested before `old`, which came earlier. The first condition
/// that differs decides; of two rules that begin alike, the one with fewer conditions, which covers the other.
fn goes_before(new: &Rule, old: &Rule, wide: bool) -> bool {
    for (n, o) in new.conditions.iter().zip(&old.conditions) {
        // libseccomp tests the halves of an argument one after the other.
        for shift in if wide { [32, 0].as_slice() } else { &[0] } {
            match half(n, *shift).cmp(&half(o, *shift)) {
                Ordering::Greater => return true,
                Ordering::Less => return false,
                // As important, but not the same test: who came first stays first.
                Ordering::Equal if test(n, *shift) != test(o, *shift) => return false,
                Ordering::Equal => {}
            }
        }
    }
    new.conditions.len() < old.conditions.len()
}

/// How early half of a condition is tested; the greatest is first.
fn half(c: &Condition, shift: u32) -> (u8, u8, u32) {
    let value = (c.value >> shift) as u32;
    match c.op {
        Op::ScmpCmpEq | Op::ScmpCmpNe | Op::ScmpCmpMaskedEq => (c.arg, 3, value),
        Op::ScmpCmpLt | Op::ScmpCmpLe => (c.arg, 2, !value),
        Op::ScmpCmpGe | Op::ScmpCmpGt => (c.arg, 1, value),
    }
}

/// What distinguishes tests of the same value: mask and comparison.
fn test(c: &Condition, shift: u32) -> (u32, u8) {
    let comparison = match c.op {
        Op::ScmpCmpMaskedEq => 0,
        Op::ScmpCmpEq | Op::ScmpCmpNe => 1,
        // The upper halves are compared alike.
        _ if shift > 0 => 2,
        Op::ScmpCmpLt | Op::ScmpCmpGe => 3,
        Op::ScmpCmpLe | Op::ScmpCmpGt => 4,
    };
    ((c.mask >> shift) as u32, comparison)
}

/// The rules that one entry's arguments make: one of all conditions, or one each when two look at
/// the same argument.
fn alternatives(
    args: &[LinuxSeccompArg],
    place: &str,
) -> Result<Vec<Vec<Condition>>, SeccompError> {
    let mut conditions = Vec::with_capacity(args.len());
    for (i, arg) in args.iter().enumerate() {
        if arg.index() >= MAX_ARGS {
            return Err(SeccompError::Profile {
                place: format!("{place}.args[{i}]"),
                problem: format!(
                    "index {} is not 0 to 5, the arguments a system call has",
                    arg.index()
                ),
            });
        }
        let (value, mask) = match arg.op() {
            // OCI: `value` is the mask, `valueTwo` what the masked argument must equal.
            Op::ScmpCmpMaskedEq => (arg.value_two().unwrap_or(0) & arg.value(), arg.value()),
            _ => (arg.value(), u64::MAX),
        };
        conditions.push(Condition {
            arg: arg.index() as u8,
            op: arg.op(),
            value,
            mask,
        });
    }
    let doubled = (0..MAX_ARGS as u8).any(|a| conditions.iter().filter(|c| c.arg == a).count() > 1);
    if doubled {
        return Ok(conditions.into_iter().map(|c| vec![c]).collect());
    }
    conditions.sort_by_key(|c| c.arg);
    Ok(vec![conditions])
}

/// The ABIs the filter decides; calls of any other are killed. The native one is always among them.
fn abis(profile: &LinuxSeccomp, native: Abi) -> Vec<Abi> {
    let mut abis = vec![native];
    // An architecture that this kernel can't run needs no code: its calls can't happen.
    let listed = profile
        .architectures()
        .iter()
        .flatten()
        .filter_map(|a| Abi::from_oci(*a, native));
    for abi in listed.filter(|a| a.runs_on(native)) {
        if !abis.contains(&abi) {
            abis.push(abi);
        }
    }
    abis
}

/// Whether calls pass by default, so that newer ones need no answer of their own.
fn permissive(action: Action) -> bool {
    matches!(
        action,
        Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace
    )
}

/// The value a BPF program returns for an action (`SECCOMP_RET_*`).
fn return_value(action: Action, data: Option<u32>, place: &str) -> Result<u32, SeccompError> {
    let limited = |max: u32| match data.unwrap_or(EPERM) {
        d if d <= max => Ok(d),
        d => Err(SeccompError::Profile {
            place: place.to_owned(),
            problem: format!("errnoRet {d} is above {max}, the greatest the kernel can return"),
        }),
    };
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => libc::SECCOMP_RET_KILL_THREAD,
        Action::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        Action::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        Action::ScmpActErrno => libc::SECCOMP_RET_ERRNO | limited(MAX_ERRNO)?,
        Action::ScmpActTrace => libc::SECCOMP_RET_TRACE | limited(libc::SECCOMP_RET_DATA)?,
        Action::ScmpActLog => libc::SECCOMP_RET_LOG,
        Action::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        Action::ScmpActNotify => libc::SECCOMP_RET_USER_NOTIF,
    })
}

fn flags(profile: &LinuxSeccomp, options: &CompileOptions) -> Result<u32, SeccompError> {
    let mut bits: libc::c_ulong = 0;
    let mut entries = profile.syscalls().iter().flatten();
    let notifies = options.notify && entries.any(|e| e.action() == Action::ScmpActNotify);
    for (i, flag) in profile.flags().iter().flatten().enumerate() {
        bits |= match flag {
            Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            Flag::SeccompFilterFlagWaitKillableRecv if notifies => WAIT_KILLABLE_RECV,
            Flag::SeccompFilterFlagWaitKillableRecv => {
                return Err(SeccompError::Unsupported {
                    place: format!("flags[{i}]"),
                    what: "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".to_owned(),
                    remedy: "it only has a meaning with SCMP_ACT_NOTIFY; delete it",
                });
            }
        };
    }
    let mut bits = bits as u32;
    if notifies {
        // Both in one call need a third flag; and what loads a filter here has one thread.
        bits = bits & !(libc::SECCOMP_FILTER_FLAG_TSYNC as u32) | NEW_LISTENER;
    }
    Ok(bits)
}
