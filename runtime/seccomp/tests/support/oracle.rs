//! What a profile says about a call, read straight from the profile: slow, and shaped by the text of the
//! OCI specification and of seccomp_rule_add(3), not by how the compiler works.

use super::Call;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Op,
};
use slipway_seccomp::{Abi, X32_BIT, numbers};
use std::collections::HashMap;

const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;

/// Rules for one number: what each gives, and on which conditions.
type Rules = Vec<(u32, Vec<LinuxSeccompArg>)>;

/// A profile, read.
pub struct Oracle<'a> {
    profile: &'a LinuxSeccomp,
    native: Abi,
    enosys: bool,
    default: u32,
    rules: HashMap<(Abi, u32), Rules>,
    newest: HashMap<Abi, u32>,
}

impl<'a> Oracle<'a> {
    pub fn new(profile: &'a LinuxSeccomp, native: Abi, enosys: bool) -> Oracle<'a> {
        let default = ret(profile.default_action(), profile.default_errno_ret());
        let mut rules: HashMap<(Abi, u32), Rules> = HashMap::new();
        let mut newest = HashMap::new();
        for entry in profile.syscalls().iter().flatten() {
            let action = ret(entry.action(), entry.errno_ret());
            let args = entry.args().clone().unwrap_or_default();
            let alone = (0..6).any(|i| args.iter().filter(|a| a.index() == i).count() > 1);
            let groups: Vec<Vec<LinuxSeccompArg>> = if alone {
                args.iter().map(|a| vec![*a]).collect()
            } else {
                vec![args]
            };
            for (name, abi) in entry.names().iter().flat_map(|n| Abi::ALL.map(|a| (n, a))) {
                let number = numbers::number(abi, name);
                let sub = sub_call(abi, name);
                if let (Some(n), None) = (number, sub)
                    && n > 0
                    && (abi != Abi::Arm || n < 0xf0000)
                {
                    let highest = newest.entry(abi).or_insert(n);
                    *highest = n.max(*highest);
                }
                if action == default {
                    continue;
                }
                for group in &groups {
                    if let Some(n) = number {
                        rules
                            .entry((abi, n))
                            .or_default()
                            .push((action, group.clone()));
                    }
                    if let Some((multiplexer, call)) = sub {
                        let mut group: Vec<_> =
                            group.iter().filter(|a| a.index() != 0).copied().collect();
                        group.push(equals(0, call));
                        rules
                            .entry((abi, multiplexer))
                            .or_default()
                            .push((action, group));
                    }
                }
            }
        }
        Oracle {
            profile,
            native,
            enosys,
            default,
            rules,
            newest,
        }
    }

    /// What may come out: one value, or several where conditions of different actions overlap.
    pub fn evaluate(&self, call: &Call) -> Vec<u32> {
        let Some(abi) = abi_of(self.profile, self.native, call) else {
            // A tracer's "skip this call" belongs to every ABI of the machine.
            let skip = self.native == Abi::X86_64
                && call.arch == self.native.audit()
                && call.nr == u32::MAX;
            return vec![if skip { self.default } else { KILL_THREAD }];
        };
        let Some(rules) = self.rules.get(&(abi, call.nr)) else {
            // Named by nobody: perhaps because it is too new.
            let passes = matches!(
                self.profile.default_action(),
                Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace
            );
            let newer = self.newest.get(&abi).is_some_and(|n| call.nr > *n);
            return vec![if self.enosys && !passes && newer {
                0x0005_0000 | 38
            } else {
                self.default
            }];
        };
        let tautology = |a: &LinuxSeccompArg| {
            let mask = if abi_is_wide(abi) {
                a.value()
            } else {
                a.value() & 0xffff_ffff
            };
            a.op() == Op::ScmpCmpMaskedEq && mask == 0
        };
        if let Some((action, _)) = rules.iter().find(|(_, args)| args.iter().all(tautology)) {
            return vec![*action];
        }
        let mut matching: Vec<u32> = rules
            .iter()
            .filter(|(_, args)| args.iter().all(|a| tautology(a) || holds(a, abi, call)))
            .map(|(action, _)| *action)
            .collect();
        matching.sort_unstable();
        matching.dedup();
        if matching.is_empty() {
            vec![self.default]
        } else {
            matching
        }
    }

    /// Whether what happens to this call may depend on its arguments.
    pub fn conditional(&self, call: &Call) -> bool {
        Abi::ALL
            .iter()
            .filter(|a| a.audit() == call.arch)
            .filter_map(|a| self.rules.get(&(*a, call.nr)))
            .flatten()
            .any(|(_, args)| !args.is_empty())
    }
}

fn abi_of(profile: &LinuxSeccomp, native: Abi, call: &Call) -> Option<Abi> {
    let listed = |abi: Abi| {
        abi == native
            || profile
                .architectures()
                .iter()
                .flatten()
                .any(|a| *a == abi.to_oci() || (*a == Arch::ScmpArchNative && abi == native))
    };
    let family: &[Abi] = match native {
        Abi::X86_64 => &[Abi::X86_64, Abi::X32, Abi::X86],
        Abi::Aarch64 => &[Abi::Aarch64, Abi::Arm],
        _ => panic!("the tests are about 64-bit machines"),
    };
    let abi = *family.iter().find(|a| {
        a.audit() == call.arch
            && match a {
                Abi::X86_64 => call.nr & X32_BIT == 0 && (call.nr < X32_BIT || listed(Abi::X32)),
                Abi::X32 => call.nr >= X32_BIT && call.nr & X32_BIT != 0,
                _ => true,
            }
    })?;
    listed(abi).then_some(abi)
}

fn abi_is_wide(abi: Abi) -> bool {
    abi == Abi::X86_64 || abi == Abi::Aarch64
}

fn holds(arg: &LinuxSeccompArg, abi: Abi, call: &Call) -> bool {
    let cut = |v: u64| if abi_is_wide(abi) { v } else { v & 0xffff_ffff };
    let (have, want) = (cut(call.args[arg.index()]), cut(arg.value()));
    match arg.op() {
        Op::ScmpCmpEq => have == want,
        Op::ScmpCmpNe => have != want,
        Op::ScmpCmpLt => have < want,
        Op::ScmpCmpLe => have <= want,
        Op::ScmpCmpGt => have > want,
        Op::ScmpCmpGe => have >= want,
        // The bits that the mask leaves out are left out on both sides.
        Op::ScmpCmpMaskedEq => have & want == cut(arg.value_two().unwrap_or(0)) & want,
    }
}

fn equals(index: usize, value: u64) -> LinuxSeccompArg {
    oci_spec::runtime::LinuxSeccompArgBuilder::default()
        .index(index)
        .value(value)
        .op(Op::ScmpCmpEq)
        .build()
        .expect("complete")
}

/// socketcall(2) and ipc(2): i386's multiplexer for `name`, and the number by which it knows it.
fn sub_call(abi: Abi, name: &str) -> Option<(u32, u64)> {
    if abi != Abi::X86 {
        return None;
    }
    let socket = SOCKETCALLS
        .iter()
        .position(|n| *n == name)
        .map(|i| (102, i as u64 + 1));
    socket.or_else(|| {
        IPC.iter()
            .find(|(n, _)| *n == name)
            .map(|(_, call)| (117, *call))
    })
}

/// `SYS_SOCKET` … `SYS_SENDMMSG` of linux/net.h.
const SOCKETCALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// `SEMOP` … `SHMCTL` of linux/ipc.h.
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

fn ret(action: Action, data: Option<u32>) -> u32 {
    let data = data.unwrap_or(1);
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => KILL_THREAD,
        Action::ScmpActKillProcess => 0x8000_0000,
        Action::ScmpActTrap => 0x0003_0000,
        Action::ScmpActErrno => 0x0005_0000 | data,
        Action::ScmpActTrace => 0x7ff0_0000 | data,
        Action::ScmpActLog => 0x7ffc_0000,
        Action::ScmpActAllow => ALLOW,
        Action::ScmpActNotify => panic!("notify is not compiled"),
    }
}
