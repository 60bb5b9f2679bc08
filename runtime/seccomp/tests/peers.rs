//! What a process may do under our filters and under those that runc and crun load, number by number and
//! condition by condition.
//!
//! Nothing is tried out: both programs are run in a machine of ours, on every number of every ABI and on
//! arguments around every condition. So the comparison is complete, and harmless for calls like reboot.
//!
//! Differences are allowed by rule only:
//! - calls that the peer's libseccomp has no name for, found out by asking it ([`Known`]);
//! - the answer to numbers beyond the newest call named: `ENOSYS` or the default;
//! - where the *profiles* differ on purpose, the calls listed with the reason.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction as Action,
    LinuxSeccompArgBuilder, LinuxSeccompOperator as Op, LinuxSyscall,
};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use slipway_seccomp::{
    Abi, CompileOptions, Subject, compile, default_profile, numbers, parse_profile,
};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use support::{
    Call, abi_of, arguments_to_ask, bpf, describe, differences,
    oracle::Oracle,
    peer::{Containerd, Peer, RUNC, peers, program_of},
    verdict,
};

const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;
const ENOSYS: u32 = ERRNO | 38;
const KERNEL: (u32, u32) = (6, 1);
const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X32, Abi::X86];

/// Where containers-common's profile lies (Debian package golang-github-containers-common).
const CONTAINERS_COMMON: &str = "/usr/share/containers/seccomp.json";

/// Which calls a peer's libseccomp knows.
struct Known(HashSet<(Abi, u32)>);

impl Known {
    /// Gives the peer every name there is and sees which of them its program knows.
    fn to(peer: Peer) -> Known {
        let mut all = LinuxSyscall::default();
        let names: BTreeSet<_> = ABIS
            .iter()
            .flat_map(|a| numbers::all(*a))
            .map(|(n, _)| n.to_owned())
            .collect();
        all.set_names(names.into_iter().collect());
        all.set_action(Action::ScmpActAllow);
        let mut profile = LinuxSeccomp::default();
        // Lets the runtime itself pass, and is not what the names get.
        profile.set_default_action(Action::ScmpActLog);
        profile.set_architectures(Some(ABIS.map(Abi::to_oci).to_vec()));
        profile.set_syscalls(Some(vec![all]));
        let program = program_of(peer, &profile).expect("a filter");
        let known = |abi: Abi, nr: u32| {
            bpf::run(
                &program,
                &Call {
                    arch: abi.audit(),
                    nr,
                    args: [0; 6],
                },
            )
            .ret == ALLOW
        };
        let calls = ABIS
            .iter()
            .flat_map(|abi| numbers::all(*abi).map(|(_, nr)| (*abi, nr)));
        let known: HashSet<_> = calls.filter(|(abi, nr)| known(*abi, *nr)).collect();
        assert!(
            known.len() > 1000,
            "{} knows only {} calls",
            peer.name,
            known.len()
        );
        Known(known)
    }
}

/// The rules about names the peer does not know and numbers beyond the newest.
struct Rules<'a> {
    peer: Peer,
    known: &'a Known,
    names: HashMap<(Abi, u32), &'static str>,
    /// The newest call that both the peer and the profile it was given know, by ABI.
    newest: HashMap<Abi, u32>,
    default: u32,
}

impl<'a> Rules<'a> {
    fn new(peer: Peer, known: &'a Known, theirs: &LinuxSeccomp) -> Rules<'a> {
        let mut newest = HashMap::new();
        for name in theirs.syscalls().iter().flatten().flat_map(|e| e.names()) {
            for abi in ABIS {
                if let Some(nr) = numbers::number(abi, name)
                    && known.0.contains(&(abi, nr))
                {
                    let highest = newest.entry(abi).or_insert(nr);
                    *highest = nr.max(*highest);
                }
            }
        }
        let names = ABIS
            .iter()
            .flat_map(|a| numbers::all(*a).map(|(n, nr)| ((*a, nr), n)))
            .collect();
        let default = match theirs.default_action() {
            Action::ScmpActAllow => ALLOW,
            Action::ScmpActErrno => ERRNO | theirs.default_errno_ret().unwrap_or(1),
            other => panic!("{other} is no default of these tests"),
        };
        Rules {
            peer,
            known,
            names,
            newest,
            default,
        }
    }

    /// Whether a rule says why the peer answers `theirs`.
    fn explain(&self, call: &Call, theirs: u32) -> Option<&'static str> {
        let abi = abi_of(call)?;
        let beyond = self.newest.get(&abi).is_some_and(|n| call.nr > *n);
        let without_name = if beyond && self.peer.enosys_for_newer && self.default != ALLOW {
            ENOSYS
        } else {
            self.default
        };
        let has_name = self.names.contains_key(&(abi, call.nr));
        if has_name && !self.known.0.contains(&(abi, call.nr)) && theirs == without_name {
            return Some("calls its libseccomp has no name for");
        }
        if beyond && theirs == without_name {
            return Some("numbers beyond the newest call it knows");
        }
        None
    }
}

fn report(what: &str, explained: &BTreeMap<&str, usize>) {
    println!("{what}: {explained:?}");
}

fn all_capabilities() -> Vec<Capability> {
    vec![
        Capability::SysAdmin,
        Capability::SysPtrace,
        Capability::Bpf,
        Capability::Perfmon,
        Capability::SysModule,
        Capability::DacReadSearch,
        Capability::SysBoot,
        Capability::SysChroot,
        Capability::SysPacct,
        Capability::SysRawio,
        Capability::SysTime,
        Capability::SysTtyConfig,
        Capability::SysNice,
        Capability::Syslog,
        Capability::AuditWrite,
    ]
}

/// No capability, each alone, all together.
fn capability_sets() -> Vec<Capabilities> {
    let all = all_capabilities();
    let mut sets = vec![Capabilities::new()];
    sets.extend(all.iter().map(|c| Capabilities::from([*c])));
    sets.push(all.into_iter().collect());
    sets
}

fn show(caps: &Capabilities) -> String {
    match caps.len() {
        0 => "no capability".into(),
        1 => caps.iter().map(|c| format!("CAP_{c}")).collect(),
        n => format!("{n} capabilities"),
    }
}

fn subject(capabilities: &Capabilities) -> Subject<'_> {
    Subject {
        capabilities,
        arch: Arch::ScmpArchX86_64,
        kernel: KERNEL,
    }
}

/// Both given the same profile: the compilers are compared.
fn same_profile(peer: Peer, known: &Known, profile: &LinuxSeccomp, what: &str) {
    let ours = compile(profile, &CompileOptions::default()).expect("a filter");
    let theirs = program_of(peer, profile).expect(what);
    let rules = Rules::new(peer, known, profile);
    let mut explained = BTreeMap::new();
    for (call, a, b) in differences(&ours.instructions, &theirs, &arguments_to_ask(profile)) {
        match rules.explain(&call, b) {
            Some(why) => *explained.entry(why).or_insert(0) += 1,
            None => panic!(
                "{what}: {}: we say {}, {} says {}",
                describe(&call),
                verdict(a),
                peer.name,
                verdict(b)
            ),
        }
    }
    report(
        &format!(
            "{what}, {} ({} instructions, ours {})",
            peer.name,
            theirs.len(),
            ours.instructions.len()
        ),
        &explained,
    );
}

#[test]
#[cfg(target_arch = "x86_64")]
fn same_profiles_mean_the_same() {
    let tricky: LinuxSeccomp =
        serde_json::from_str(include_str!("data/tricky.json")).expect("a profile");
    for peer in peers() {
        let known = Known::to(peer);
        same_profile(peer, &known, &tricky, "tricky profile");
        let sets = capability_sets();
        for caps in [&sets[0], &sets[sets.len() - 1]] {
            let profile = default_profile(caps, Arch::ScmpArchX86_64, KERNEL);
            same_profile(
                peer,
                &known,
                &profile,
                &format!("our profile, {}", show(caps)),
            );
            match std::fs::read(CONTAINERS_COMMON) {
                Ok(json) => {
                    let profile = parse_profile(&json, subject(caps)).expect("their profile");
                    same_profile(
                        peer,
                        &known,
                        &profile,
                        &format!("containers-common's profile, {}", show(caps)),
                    );
                }
                Err(e) => println!(
                    "SKIPPED: {CONTAINERS_COMMON}: {e} (Debian package golang-github-containers-common)"
                ),
            }
        }
    }
}

/// Profiles with rules that overlap: several actions, operators and values for a few calls that neither
/// runtime makes itself while it waits.
fn overlapping() -> impl Strategy<Value = LinuxSeccomp> {
    let ops = prop::sample::select(vec![
        Op::ScmpCmpEq,
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpGt,
        Op::ScmpCmpGe,
        Op::ScmpCmpMaskedEq,
    ]);
    let values = prop::sample::select(vec![0u64, 1, 5, 6, 0xff, 0x1000, 0xffff_ffff]);
    // Among several conditions libseccomp 2.5 gets only these right: it loses rules that follow on an inverted
    // test, and confuses ranges that have the upper half in common.
    let sound = |op| matches!(op, Op::ScmpCmpEq | Op::ScmpCmpMaskedEq);
    let arg = (0usize..3, ops, values.clone(), values);
    let args = prop::collection::vec(arg, 0..3).prop_map(move |args| {
        let several = args.len() > 1;
        args.into_iter()
            .map(|(index, op, value, two)| {
                let op = if several && !sound(op) {
                    Op::ScmpCmpEq
                } else {
                    op
                };
                let arg = LinuxSeccompArgBuilder::default()
                    .index(index)
                    .op(op)
                    .value(value)
                    .value_two(two);
                arg.build().expect("complete")
            })
            .collect::<Vec<_>>()
    });
    let names =
        prop::sample::subsequence(vec!["acct", "swapon", "keyctl", "shmctl", "accept4"], 1..3);
    let entry = (names, 2u32..6, args).prop_map(|(names, errno, args)| {
        let mut entry = LinuxSyscall::default();
        entry.set_names(names.into_iter().map(str::to_owned).collect());
        entry.set_action(Action::ScmpActErrno);
        entry.set_errno_ret(Some(errno));
        entry.set_args(Some(args));
        entry
    });
    prop::collection::vec(entry, 1..6).prop_map(|entries| {
        let mut profile = LinuxSeccomp::default();
        profile.set_default_action(Action::ScmpActAllow);
        profile.set_architectures(Some(ABIS.map(Abi::to_oci).to_vec()));
        profile.set_syscalls(Some(entries));
        profile
    })
}

#[test]
#[cfg(target_arch = "x86_64")]
fn overlapping_rules_mean_the_same() {
    const PROFILES: usize = 20;
    for peer in peers() {
        let mut runner = TestRunner::deterministic();
        let (mut compared, mut refused, mut wrong) = (0, 0, 0);
        while compared < PROFILES {
            let profile = overlapping()
                .new_tree(&mut runner)
                .expect("a profile")
                .current();
            // libseccomp takes some contradictions and refuses others.
            let Ok(theirs) = program_of(peer, &profile) else {
                refused += 1;
                assert!(refused < PROFILES, "{} refuses everything", peer.name);
                continue;
            };
            compared += 1;
            let ours = compile(&profile, &CompileOptions::default()).expect("a filter");
            let oracle = Oracle::new(&profile, Abi::X86_64, true);
            for (call, a, b) in
                differences(&ours.instructions, &theirs, &arguments_to_ask(&profile))
            {
                // Where the profile leaves no doubt, its text decides and not libseccomp 2.5.
                assert!(
                    oracle.evaluate(&call) == [a],
                    "{}: we say {}, {} says {}\n{profile:#?}",
                    describe(&call),
                    verdict(a),
                    peer.name,
                    verdict(b)
                );
                wrong += 1;
            }
        }
        println!(
            "{}: {compared} profiles compared, {wrong} calls it decides against the profile's text; {refused} profiles refused by it",
            peer.name
        );
    }
}

/// Where two profiles differ on purpose: a call (of any ABI) with a reason.
struct Intended {
    reason: &'static str,
    we_allow: bool,
    calls: &'static [&'static str],
}

fn refused(ret: u32) -> bool {
    ret & 0xffff_0000 == ERRNO
}

/// RuntimeDefault against another profile as runc makes it: every difference is intended, every intended
/// difference is real.
fn compare_profiles(
    whose: &str,
    known: &Known,
    intended: &[Intended],
    errno_matters: bool,
    theirs: impl Fn(&Capabilities) -> LinuxSeccomp,
) {
    let mut unused: BTreeSet<&str> = intended.iter().flat_map(|i| i.calls).copied().collect();
    for caps in capability_sets() {
        let profile = default_profile(&caps, Arch::ScmpArchX86_64, KERNEL);
        let ours = compile(&profile, &CompileOptions::default()).expect("our profile");
        let theirs = theirs(&caps);
        let program = program_of(RUNC, &theirs).expect("their filter");
        let rules = Rules::new(RUNC, known, &theirs);
        let mut arguments = arguments_to_ask(&profile);
        arguments.extend(arguments_to_ask(&theirs));
        let mut explained = BTreeMap::new();
        let mut surprises = BTreeMap::new();
        for (call, a, b) in differences(&ours.instructions, &program, &arguments) {
            let name = abi_of(&call).and_then(|abi| rules.names.get(&(abi, call.nr)).copied());
            let reason = name.and_then(|n| {
                intended
                    .iter()
                    .find(|i| i.calls.contains(&n) && i.we_allow == (a == ALLOW))
            });
            if let Some(why) = rules.explain(&call, b) {
                *explained.entry(why).or_insert(0) += 1;
            } else if !errno_matters && refused(a) && refused(b) {
                *explained
                    .entry("refused by both, with another error")
                    .or_insert(0) += 1;
            } else if let (Some(name), Some(reason)) = (name, reason) {
                unused.remove(name);
                *explained.entry(reason.reason).or_insert(0) += 1;
            } else {
                surprises.entry((name, a, b)).or_insert(call);
            }
        }
        assert!(
            surprises.is_empty(),
            "{whose}, {}: {} differences that nobody intended:\n{}",
            show(&caps),
            surprises.len(),
            surprises
                .iter()
                .map(|((_, a, b), call)| format!(
                    "{}: we say {}, they {}",
                    describe(call),
                    verdict(*a),
                    verdict(*b)
                ))
                .collect::<Vec<_>>()
                .join(
                    "
"
                )
        );
        report(&format!("{whose}, {}", show(&caps)), &explained);
    }
    assert!(
        unused.is_empty(),
        "{whose}: listed as different, but the same: {unused:?}"
    );
}

/// What containerd changed after the version that Debian 12 ships (1.6).
const SINCE_CONTAINERD_1_6: &[Intended] = &[
    Intended {
        reason: "withdrawn: io_uring",
        we_allow: false,
        calls: &["io_uring_enter", "io_uring_register", "io_uring_setup"],
    },
    Intended {
        reason: "withdrawn: AF_ALG and AF_VSOCK",
        we_allow: false,
        calls: &["socket"],
    },
    Intended {
        reason: "added",
        we_allow: true,
        calls: &[
            "cachestat",
            "fchmodat2",
            "futex_requeue",
            "futex_wait",
            "futex_wake",
            "name_to_handle_at",
            "process_vm_readv",
            "process_vm_writev",
            "set_mempolicy_home_node",
        ],
    },
];

#[test]
#[cfg(target_arch = "x86_64")]
fn runtime_default_is_containerds() {
    if !peers().contains(&RUNC) {
        return;
    }
    let Some(containerd) = Containerd::start() else {
        return;
    };
    let known = Known::to(RUNC);
    compare_profiles("containerd", &known, SINCE_CONTAINERD_1_6, true, |caps| {
        containerd.default_profile(caps)
    });
}

/// Where containerd, which we follow, and containers-common, which CRI-O uses, decide differently.
const CONTAINERS_COMMON_DIFFERS: &[Intended] = &[
    Intended {
        reason: "only with CAP_SYS_ADMIN",
        we_allow: false,
        calls: &[
            "clone",
            "clone3",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "setns",
            "umount",
            "umount2",
            "unshare",
        ],
    },
    Intended {
        reason: "only with CAP_SYS_NICE, CAP_SYS_PTRACE, CAP_SYS_BOOT, CAP_SYSLOG",
        we_allow: false,
        calls: &[
            "get_mempolicy",
            "mbind",
            "set_mempolicy",
            "pidfd_getfd",
            "reboot",
            "syslog",
        ],
    },
    Intended {
        reason: "keyrings have no namespace, and a container's root is not changed from within",
        we_allow: false,
        calls: &["keyctl", "pivot_root"],
    },
    Intended {
        reason: "calls that no C library has made for twenty years",
        we_allow: false,
        calls: &[
            "query_module",
            "readdir",
            "sigaction",
            "signal",
            "sigpending",
            "sigsuspend",
        ],
    },
    Intended {
        reason: "AF_ALG and AF_VSOCK",
        we_allow: false,
        calls: &["socket"],
    },
    Intended {
        reason: "NETLINK_AUDIT, which the kernel guards itself",
        we_allow: true,
        calls: &["socket"],
    },
    Intended {
        reason: "newer than Debian's version",
        we_allow: true,
        calls: &[
            "cachestat",
            "fchmodat2",
            "futex_requeue",
            "futex_wait",
            "futex_waitv",
            "futex_wake",
            "quotactl_fd",
            "set_mempolicy_home_node",
        ],
    },
    Intended {
        reason: "harmless",
        we_allow: true,
        calls: &["io_pgetevents", "io_pgetevents_time64", "vmsplice"],
    },
    Intended {
        reason: "with capabilities that were split off CAP_SYS_ADMIN",
        we_allow: true,
        calls: &["bpf", "perf_event_open"],
    },
];

#[test]
#[cfg(target_arch = "x86_64")]
fn runtime_default_differs_from_containers_common_as_documented() {
    if !peers().contains(&RUNC) {
        return;
    }
    let json = match std::fs::read(CONTAINERS_COMMON) {
        Ok(json) => json,
        Err(e) => {
            println!(
                "SKIPPED: {CONTAINERS_COMMON}: {e} (Debian package golang-github-containers-common)"
            );
            return;
        }
    };
    let known = Known::to(RUNC);
    compare_profiles(
        "containers-common",
        &known,
        CONTAINERS_COMMON_DIFFERS,
        false,
        |caps| parse_profile(&json, subject(caps)).expect("their profile"),
    );
}
