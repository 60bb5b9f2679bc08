//! The compiled program decides as the profile says: on random profiles, on RuntimeDefault, and with
//! `seccompiler` as a second opinion.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompOperator as Op, LinuxSyscall,
};
use proptest::prelude::*;
use slipway_seccomp::{
    Abi, CompileOptions, Engine, EngineChoice, Filter, SeccompError, compile, default_profile,
    numbers,
};
use support::{
    Call, arches_to_ask, arguments_to_ask, bpf, describe, numbers_to_ask, oracle::Oracle, verdict,
};

const TREE: CompileOptions = CompileOptions {
    native: Some(Abi::X86_64),
    enosys_for_newer: true,
    engine: EngineChoice::RangeTree,
    notify: false,
};

/// Names with different numbers everywhere, multiplexed ones, one-ABI ones, new ones, and none at all.
const NAMES: &[&str] = &[
    "read",
    "write",
    "open",
    "rt_sigaction",
    "ioctl",
    "clone",
    "clone3",
    "socket",
    "sendmsg",
    "accept",
    "recv",
    "socketcall",
    "ipc",
    "semop",
    "shmget",
    "personality",
    "prctl",
    "openat2",
    "futex_time64",
    "chown32",
    "execve",
    "execveat",
    "uselib",
    "set_tls",
    "arm_fadvise64_64",
    "arch_prctl",
    "file_setattr",
    "mseal",
    "no_such_call",
    "restart_syscall",
    "pwritev2",
];

fn arg(index: usize, op: Op, value: u64, two: u64) -> LinuxSeccompArg {
    LinuxSeccompArgBuilder::default()
        .index(index)
        .op(op)
        .value(value)
        .value_two(two)
        .build()
        .expect("complete")
}

fn entry(
    names: &[&str],
    action: Action,
    errno: Option<u32>,
    args: Vec<LinuxSeccompArg>,
) -> LinuxSyscall {
    let mut e = LinuxSyscall::default();
    e.set_names(names.iter().map(|n| (*n).to_owned()).collect());
    e.set_action(action);
    e.set_errno_ret(errno);
    e.set_args(Some(args));
    e
}

fn profile(default: Action, arches: Vec<Arch>, entries: Vec<LinuxSyscall>) -> LinuxSeccomp {
    let mut p = LinuxSeccomp::default();
    p.set_default_action(default);
    p.set_architectures(Some(arches));
    p.set_syscalls(Some(entries));
    p
}

/// Asks both about every call and panics at the first that they see differently.
fn compare(profile: &LinuxSeccomp, options: &CompileOptions, filter: &Filter) {
    let native = options.native.expect("set by the tests");
    let oracle = Oracle::new(profile, native, options.enosys_for_newer);
    let arguments = arguments_to_ask(profile);
    for arch in arches_to_ask() {
        for nr in numbers_to_ask() {
            for args in &arguments {
                let call = Call {
                    arch,
                    nr,
                    args: *args,
                };
                let ours = bpf::run(&filter.instructions, &call);
                let right = oracle.evaluate(&call);
                assert!(
                    right.contains(&ours.ret),
                    "{}: the program says {}, the profile {:?}\n{profile:#?}",
                    describe(&call),
                    verdict(ours.ret),
                    right.iter().map(|r| verdict(*r)).collect::<Vec<_>>()
                );
                // Where neither looks at the arguments, one set of them is enough.
                if !ours.looked_at_arguments && !oracle.conditional(&call) {
                    break;
                }
            }
        }
    }
}

fn actions() -> impl Strategy<Value = (Action, Option<u32>)> {
    prop_oneof![
        3 => Just((Action::ScmpActAllow, None)),
        2 => Just((Action::ScmpActErrno, None)),
        2 => (0u32..=4095).prop_map(|e| (Action::ScmpActErrno, Some(e))),
        1 => Just((Action::ScmpActErrno, Some(38))),
        1 => Just((Action::ScmpActKill, None)),
        1 => Just((Action::ScmpActKillProcess, None)),
        1 => Just((Action::ScmpActTrap, None)),
        1 => Just((Action::ScmpActLog, None)),
        1 => (0u32..=0xffff).prop_map(|d| (Action::ScmpActTrace, Some(d))),
    ]
}

fn operators() -> impl Strategy<Value = Op> {
    prop::sample::select(vec![
        Op::ScmpCmpEq,
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpGt,
        Op::ScmpCmpGe,
        Op::ScmpCmpMaskedEq,
    ])
}

fn values() -> impl Strategy<Value = u64> {
    prop_oneof![
        prop::sample::select(vec![
            0,
            1,
            5,
            0x7e02_0000,
            0xffff_ffff,
            0x1_0000_0000,
            0x1_0000_0005,
            0xffff_ffff_0000_0000,
            u64::MAX,
        ]),
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
    ]
}

fn arguments() -> impl Strategy<Value = Vec<LinuxSeccompArg>> {
    let one =
        (0usize..6, operators(), values(), values()).prop_map(|(i, op, v, w)| arg(i, op, v, w));
    prop_oneof![2 => Just(Vec::new()), 3 => prop::collection::vec(one, 1..4)]
}

fn entries() -> impl Strategy<Value = LinuxSyscall> {
    (
        prop::collection::vec(prop::sample::select(NAMES), 1..5),
        actions(),
        arguments(),
    )
        .prop_map(|(names, (action, errno), args)| entry(&names, action, errno, args))
}

fn profiles() -> impl Strategy<Value = LinuxSeccomp> {
    let arches = prop::sample::subsequence(
        vec![
            Arch::ScmpArchX86_64,
            Arch::ScmpArchX86,
            Arch::ScmpArchX32,
            Arch::ScmpArchAarch64,
            Arch::ScmpArchArm,
            Arch::ScmpArchNative,
            Arch::ScmpArchS390x,
        ],
        0..=7,
    );
    (actions(), arches, prop::collection::vec(entries(), 0..10)).prop_map(
        |((action, errno), arches, entries)| {
            let mut p = profile(action, arches, entries);
            p.set_default_errno_ret(errno);
            p
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn program_decides_as_the_profile_says(p in profiles(), native in prop::sample::select(vec![Abi::X86_64, Abi::Aarch64]), enosys: bool) {
        let options = CompileOptions { native: Some(native), enosys_for_newer: enosys, ..CompileOptions::default() };
        let filter = compile(&p, &options).expect("a valid profile");
        compare(&p, &options, &filter);
    }

    /// Many comparisons of one argument, which share their loads.
    #[test]
    fn comparisons_of_one_argument(
        tests in prop::collection::vec((operators(), values()), 1..8),
        near in any::<bool>(),
        native in prop::sample::select(vec![Abi::X86_64, Abi::Aarch64]),
    ) {
        let entries = tests
            .iter()
            .map(|(op, v)| {
                let v = if near { (1 << 33) | (v & 7) } else { *v };
                entry(&["prctl", "ioctl"], Action::ScmpActAllow, None, vec![arg(1, *op, v, v)])
            })
            .collect();
        let p = profile(Action::ScmpActTrap, vec![Arch::ScmpArchX86, Arch::ScmpArchX32, Arch::ScmpArchArm], entries);
        let options = CompileOptions { native: Some(native), ..TREE };
        compare(&p, &options, &compile(&p, &options).expect("a valid profile"));
    }

    #[test]
    fn both_compilers_agree(
        deny in any::<bool>(),
        errno in 2u32..4096,
        native in prop::sample::select(vec![Abi::X86_64, Abi::Aarch64]),
        rules in prop::collection::vec((prop::sample::select(NAMES), arguments()), 1..8),
    ) {
        let (default, action) = if deny {
            (Action::ScmpActAllow, Action::ScmpActErrno)
        } else {
            (Action::ScmpActErrno, Action::ScmpActLog)
        };
        let entries = rules.iter().map(|(name, args)| entry(&[*name], action, Some(errno), args.clone())).collect();
        let p = profile(default, vec![native.to_oci()], entries);
        let tree = CompileOptions { native: Some(native), ..TREE };
        let auto = CompileOptions { engine: EngineChoice::Auto, ..tree };
        let (ours, theirs) = (compile(&p, &tree).expect("tree"), compile(&p, &auto).expect("auto"));
        // Nothing is left for seccompiler when this machine knows none of the names.
        if rules.iter().any(|(name, _)| numbers::number(native, name).is_some()) {
            prop_assert_eq!(theirs.engine, Engine::Seccompiler);
        }
        let arguments = arguments_to_ask(&p);
        for arch in arches_to_ask() {
            for nr in numbers_to_ask() {
                for args in &arguments {
                    let call = Call { arch, nr, args: *args };
                    let (a, b) = (bpf::run(&ours.instructions, &call), bpf::run(&theirs.instructions, &call));
                    prop_assert_eq!(a.ret, b.ret, "{}", describe(&call));
                    if !a.looked_at_arguments && !b.looked_at_arguments {
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn bytes_survive_the_way(p in profiles()) {
        let filter = compile(&p, &TREE).expect("a valid profile");
        let back = Filter::from_bytes(&filter.to_bytes()).expect("our own bytes");
        prop_assert_eq!(&back.instructions, &filter.instructions);
        prop_assert_eq!(back.flags, filter.flags);
    }

    #[test]
    fn foreign_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        prop_assume!(!bytes.starts_with(b"SLF1"));
        prop_assert!(Filter::from_bytes(&bytes).is_err());
    }
}

#[test]
fn cut_bytes_are_refused() {
    let filter = compile(&profile(Action::ScmpActAllow, vec![], vec![]), &TREE).expect("a filter");
    let bytes = filter.to_bytes();
    for n in 0..bytes.len() {
        assert!(Filter::from_bytes(&bytes[..n]).is_err(), "{n} bytes");
    }
    assert!(Filter::from_bytes(&[bytes, vec![0]].concat()).is_err());
}

fn capability_sets() -> Vec<Capabilities> {
    let every = [
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
    ];
    let mut sets: Vec<Capabilities> = vec![Capabilities::new(), every.into_iter().collect()];
    sets.extend(every.iter().map(|c| Capabilities::from([*c])));
    sets
}

#[test]
fn runtime_default_decides_as_it_says() {
    for caps in capability_sets() {
        let p = default_profile(&caps, Arch::ScmpArchX86_64, (6, 1));
        let filter = compile(&p, &TREE).expect("our own profile");
        compare(&p, &TREE, &filter);
    }
    let arm = CompileOptions {
        native: Some(Abi::Aarch64),
        ..TREE
    };
    let p = default_profile(&Capabilities::new(), Arch::ScmpArchAarch64, (6, 1));
    let filter = compile(&p, &arm).expect("our own profile");
    compare(&p, &arm, &filter);
}

fn decide(filter: &Filter, abi: Abi, name: &str, args: &[u64]) -> String {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    let nr = numbers::number(abi, name).expect(name);
    verdict(
        bpf::run(
            &filter.instructions,
            &Call {
                arch: abi.audit(),
                nr,
                args: all,
            },
        )
        .ret,
    )
}

/// The defect of libcontainer 0.7: mask and value exchanged, CLONE_NEWUSER let through.
#[test]
fn masked_comparison_is_not_the_wrong_way_round() {
    let p = default_profile(&Capabilities::new(), Arch::ScmpArchX86_64, (6, 1));
    let filter = compile(&p, &TREE).expect("our own profile");
    for abi in [Abi::X86_64, Abi::X32, Abi::X86] {
        assert_eq!(decide(&filter, abi, "clone", &[0x1200011]), "allow");
        for bit in [
            0x0002_0000,
            0x0200_0000,
            0x0400_0000,
            0x0800_0000,
            0x1000_0000,
            0x2000_0000,
            0x4000_0000,
        ] {
            assert_eq!(
                decide(&filter, abi, "clone", &[bit | 17]),
                "errno 1",
                "{abi:?} {bit:#x}"
            );
        }
        assert_eq!(decide(&filter, abi, "clone3", &[]), "errno 38");
        assert_eq!(decide(&filter, abi, "unshare", &[0x1000_0000]), "errno 1");
    }
}

#[test]
fn runtime_default_in_detail() {
    let none = compile(
        &default_profile(&Capabilities::new(), Arch::ScmpArchX86_64, (6, 1)),
        &TREE,
    )
    .expect("filter");
    let x = |name: &str, args: &[u64]| decide(&none, Abi::X86_64, name, args);
    for family in (0..=60).filter(|f| *f != 38 && *f != 40) {
        assert_eq!(x("socket", &[family]), "allow", "family {family}");
    }
    assert_eq!(x("socket", &[38]), "errno 1");
    assert_eq!(x("socket", &[40]), "errno 1");
    for domain in [0, 8, 0x20000, 0x20008, 0xffff_ffff] {
        assert_eq!(x("personality", &[domain]), "allow");
    }
    assert_eq!(x("personality", &[1]), "errno 1");
    assert_eq!(x("personality", &[u64::MAX]), "errno 1");
    assert_eq!(x("ptrace", &[]), "allow");
    assert_eq!(x("io_uring_setup", &[]), "errno 1");
    assert_eq!(x("keyctl", &[]), "errno 1");
    // Newer than removexattrat, the newest that the profile names.
    assert_eq!(x("open_tree_attr", &[]), "errno 38");
    assert_eq!(decide(&none, Abi::X86, "file_getattr", &[]), "errno 38");
    let old = compile(
        &default_profile(&Capabilities::new(), Arch::ScmpArchX86_64, (4, 7)),
        &TREE,
    )
    .expect("filter");
    assert_eq!(decide(&old, Abi::X86_64, "ptrace", &[]), "errno 1");
    // s390 passes clone's flags second.
    let s390 = default_profile(&Capabilities::new(), Arch::ScmpArchS390x, (6, 1));
    let clone = s390
        .syscalls()
        .iter()
        .flatten()
        .find(|e| e.names() == &["clone"])
        .expect("clone");
    assert_eq!(clone.args().as_ref().map(|a| a[0].index()), Some(1));
}

/// Long programs: relays over more than 255 instructions, and the end of what the kernel takes.
#[test]
fn long_programs() {
    let mut names: Vec<&str> = numbers::all(Abi::X86_64).map(|(n, _)| n).collect();
    names.sort_unstable();
    let make = |count: usize, conditions: usize| {
        let entries = names.iter().take(count).enumerate().map(|(i, name)| {
            let args = (0..conditions)
                .map(|a| {
                    arg(
                        a,
                        [Op::ScmpCmpGt, Op::ScmpCmpNe, Op::ScmpCmpMaskedEq][a % 3],
                        (i as u64) << (a * 7),
                        1,
                    )
                })
                .collect();
            entry(&[*name], Action::ScmpActErrno, Some(i as u32 + 2), args)
        });
        profile(
            Action::ScmpActAllow,
            vec![Arch::ScmpArchX86_64],
            entries.collect(),
        )
    };
    for (count, conditions) in [(380, 1), (200, 3), (380, 0)] {
        let p = make(count, conditions);
        let filter = compile(&p, &TREE).expect("fits");
        assert!(
            filter.instructions.len() > 300,
            "{}",
            filter.instructions.len()
        );
        let oracle = Oracle::new(&p, Abi::X86_64, true);
        let nrs: Vec<u32> = names
            .iter()
            .filter_map(|n| numbers::number(Abi::X86_64, n))
            .collect();
        for (i, nr) in nrs.iter().enumerate() {
            for v in [0, i as u64, i as u64 + 1, u64::MAX, 1 << 32] {
                let call = Call {
                    arch: Abi::X86_64.audit(),
                    nr: *nr,
                    args: [v, v << 7, v, 1, v, 0],
                };
                let ours = bpf::run(&filter.instructions, &call).ret;
                assert_eq!(oracle.evaluate(&call), [ours], "{}", describe(&call));
            }
        }
    }
    match compile(&make(380, 6), &TREE) {
        Err(SeccompError::TooLong { instructions }) => assert!(instructions > 4096),
        other => panic!("{:?}", other.map(|f| f.instructions.len())),
    }
}

#[test]
fn what_cannot_be_done_is_said() {
    let text = |p: &LinuxSeccomp| compile(p, &TREE).expect_err("must be refused").to_string();
    let notify = profile(
        Action::ScmpActAllow,
        vec![],
        vec![entry(&["mount"], Action::ScmpActNotify, None, vec![])],
    );
    assert!(text(&notify).contains("syscalls[0]") && text(&notify).contains("SCMP_ACT_NOTIFY"));
    // For who can serve it, all is well, but for what would wait for itself.
    let served = CompileOptions {
        notify: true,
        ..TREE
    };
    let filter = compile(&notify, &served).expect("a filter");
    assert!(
        filter.notifies()
            && Filter::from_bytes(&filter.to_bytes())
                .expect("bytes")
                .notifies()
    );
    let mount = numbers::number(Abi::X86_64, "mount").expect("a number");
    let ret = |nr| {
        let call = Call {
            arch: Abi::X86_64.audit(),
            nr,
            args: [0; 6],
        };
        bpf::run(&filter.instructions, &call).ret
    };
    assert_eq!(ret(mount), libc::SECCOMP_RET_USER_NOTIF);
    assert_eq!(ret(mount + 1), libc::SECCOMP_RET_ALLOW);
    let silent = profile(Action::ScmpActAllow, vec![], vec![]);
    assert!(!compile(&silent, &served).expect("a filter").notifies());
    for (default, name) in [
        (Action::ScmpActNotify, "mount"),
        (Action::ScmpActAllow, "write"),
    ] {
        let entry = entry(&[name], Action::ScmpActNotify, None, vec![]);
        let error = compile(&profile(default, vec![], vec![entry]), &served).expect_err("refused");
        assert!(error.to_string().contains("SCMP_ACT_NOTIFY"), "{error}");
    }
    let index = profile(
        Action::ScmpActAllow,
        vec![],
        vec![
            entry(&["read"], Action::ScmpActErrno, None, vec![]),
            entry(
                &["mount"],
                Action::ScmpActErrno,
                None,
                vec![arg(6, Op::ScmpCmpEq, 0, 0)],
            ),
        ],
    );
    assert!(
        text(&index).contains("syscalls[1].args[0]"),
        "{}",
        text(&index)
    );
    let errno = profile(
        Action::ScmpActAllow,
        vec![],
        vec![entry(&["mount"], Action::ScmpActErrno, Some(4096), vec![])],
    );
    assert!(text(&errno).contains("4095"));
    let unnamed = profile(
        Action::ScmpActAllow,
        vec![],
        vec![entry(&[""], Action::ScmpActErrno, None, vec![])],
    );
    assert!(text(&unnamed).contains("empty"));
}

#[test]
fn unknown_names_are_reported_once() {
    let p = profile(
        Action::ScmpActErrno,
        vec![Arch::ScmpArchX86_64],
        vec![
            entry(
                &["read", "no_such_call", "set_tls"],
                Action::ScmpActAllow,
                None,
                vec![],
            ),
            entry(&["no_such_call"], Action::ScmpActAllow, None, vec![]),
        ],
    );
    assert_eq!(
        compile(&p, &TREE).expect("filter").unknown,
        ["no_such_call", "set_tls"]
    );
    let flags: LinuxSeccomp = serde_json::from_str(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_SPEC_ALLOW","SECCOMP_FILTER_FLAG_TSYNC"]}"#,
    )
    .expect("a profile");
    assert_eq!(compile(&flags, &TREE).expect("filter").flags, 7);
}
