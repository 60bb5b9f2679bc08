use super::*;
use crate::SpecErrorKind;
use crate::tests::Case;
use proptest::prelude::*;

type Wish = nri::ContainerAdjustment;

fn adjusted(wish: &Wish) -> Result<ContainerPlan> {
    let case = Case::new();
    let mut plan = case.plan().expect("good");
    adjust(&mut plan, wish, &case.host)?;
    Ok(plan)
}

fn linux(linux: nri::LinuxContainerAdjustment) -> Wish {
    Wish {
        linux: Some(linux),
        ..Default::default()
    }
}

fn mount(at: &str, kind: &str, source: &str, options: &[&str]) -> nri::Mount {
    nri::Mount {
        destination: at.into(),
        r#type: kind.into(),
        source: source.into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
    }
}

#[test]
fn nothing_wished_is_nothing_changed() {
    let case = Case::new();
    let plan = case.plan().expect("good");
    let mut same = plan.clone();
    adjust(&mut same, &Wish::default(), &case.host).expect("good");
    assert_eq!(same.spec, plan.spec);
    assert_eq!(same.create, plan.create);
}

#[test]
fn the_specification_that_is_sent_is_the_adjusted_one() {
    let wish = Wish {
        args: vec!["other".into()],
        annotations: [("a".to_owned(), "b".to_owned())].into(),
        ..Default::default()
    };
    let plan = adjusted(&wish).expect("good");
    let sent: Spec = serde_json::from_slice(&plan.create.spec).expect("JSON");
    assert_eq!(sent, plan.spec);
    let args = sent.process().as_ref().and_then(|p| p.args().clone());
    assert_eq!(args, Some(vec!["other".to_owned()]));
    assert_eq!(
        sent.annotations()
            .as_ref()
            .and_then(|a| a.get("a"))
            .map(String::as_str),
        Some("b")
    );
}

#[test]
fn mounts_come_in_an_order_in_which_none_hides_another() {
    let wish = Wish {
        mounts: vec![
            mount("/a/b/c", "bind", "/1", &["ro"]),
            mount("/a", "tmpfs", "tmpfs", &["mode=700"]),
            mount("-/dev/shm", "", "", &[]),
            mount("/shared", "bind", "/2", &["rbind", "rshared", "rro"]),
        ],
        ..Default::default()
    };
    let plan = adjusted(&wish).expect("good");
    let mounts = plan.spec.mounts().clone().expect("mounts");
    let at = |path: &str| {
        mounts
            .iter()
            .position(|m| m.destination() == Path::new(path))
    };
    assert!(at("/a") < at("/a/b/c") && at("/a").is_some());
    assert_eq!(at("/dev/shm"), None);
    let inner = &mounts[at("/a/b/c").expect("there")];
    let options = inner.options().clone().unwrap_or_default();
    assert!(options.contains(&"rbind".to_owned()), "{options:?}");
    assert_eq!(plan.create.recursive_read_only, ["/shared"]);
    let linux = plan.spec.linux().as_ref().expect("linux");
    assert_eq!(linux.rootfs_propagation().as_deref(), Some("shared"));
}

#[test]
fn limits_are_checked_and_merged() {
    let resources = nri::LinuxResources {
        memory: Some(nri::LinuxMemory {
            limit: Some(nri::OptionalInt64 { value: 64 << 20 }),
            reservation: Some(nri::OptionalInt64 { value: 32 << 20 }),
            ..Default::default()
        }),
        pids: Some(nri::LinuxPids { limit: -1 }),
        ..Default::default()
    };
    let wish = linux(nri::LinuxContainerAdjustment {
        resources: Some(resources),
        ..Default::default()
    });
    let plan = adjusted(&wish).expect("good");
    assert_eq!(plan.resources.memory_limit_in_bytes, 64 << 20);
    let linux = plan.spec.linux().as_ref().expect("linux");
    let all = linux.resources().as_ref().expect("limits");
    let memory = all.memory().expect("memory");
    assert_eq!(
        (memory.limit(), memory.reservation()),
        (Some(64 << 20), Some(32 << 20))
    );
    assert!(all.pids().is_none(), "no limit");
    assert!(
        !all.devices().as_ref().expect("rules").is_empty(),
        "the rules stay"
    );
}

#[test]
fn devices_and_their_rules_go_together() {
    let device = |path: &str| nri::LinuxDevice {
        path: path.into(),
        r#type: "c".into(),
        major: 10,
        minor: 200,
        file_mode: Some(nri::OptionalFileMode { value: 0o444 }),
        ..Default::default()
    };
    let of = |devices: Vec<nri::LinuxDevice>| {
        adjusted(&linux(nri::LinuxContainerAdjustment {
            devices,
            ..Default::default()
        }))
    };
    let rules = |plan: &ContainerPlan| {
        let linux = plan.spec.linux().as_ref().expect("linux");
        let rules = linux.resources().as_ref().and_then(|r| r.devices().clone());
        rules
            .expect("rules")
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    let plan = of(vec![device("/dev/net/tun")]).expect("good");
    assert_eq!(rules(&plan).last().map(String::as_str), Some("c 10:200 rm"));
    let plan = of(vec![device("/dev/net/tun"), device("-/dev/net/tun")]).expect("good");
    assert!(!rules(&plan).iter().any(|rule| rule.contains("10:200")));
    for bad in ["/tmp/x", "dev/x", "/dev", "/dev/null", "/dev/../x"] {
        assert!(of(vec![device(bad)]).is_err(), "{bad}");
    }
}

#[test]
fn a_policy_becomes_a_profile() {
    let policy = nri::LinuxSeccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        default_errno: Some(nri::OptionalUInt32 { value: 38 }),
        syscalls: vec![nri::LinuxSyscall {
            names: vec!["read".into()],
            action: "SCMP_ACT_ALLOW".into(),
            args: vec![nri::LinuxSeccompArg {
                index: 1,
                value: 2,
                value_two: 3,
                op: "SCMP_CMP_EQ".into(),
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let wish = |policy| {
        linux(nri::LinuxContainerAdjustment {
            seccomp_policy: Some(policy),
            ..Default::default()
        })
    };
    let plan = adjusted(&wish(policy.clone())).expect("good");
    let SeccompChoice::Localhost { json, .. } = plan.seccomp else {
        panic!("{:?}", plan.seccomp);
    };
    let profile: Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(profile["defaultErrnoRet"], 38);
    assert_eq!(profile["syscalls"][0]["args"][0]["valueTwo"], 3);
    let error = adjusted(&wish(nri::LinuxSeccomp {
        listener_path: "/run/x".into(),
        ..policy
    }));
    assert_eq!(
        error.expect_err("a listener").kind(),
        SpecErrorKind::Unsupported
    );
}

#[test]
fn what_an_update_can_change() {
    let of = |resources: nri::LinuxResources| limits_of("update", &resources);
    let memory = |memory: nri::LinuxMemory| nri::LinuxResources {
        memory: Some(memory),
        ..Default::default()
    };
    let limits = of(memory(nri::LinuxMemory {
        limit: Some(nri::OptionalInt64 { value: 5 }),
        kernel: Some(nri::OptionalInt64 { value: 0 }),
        use_hierarchy: Some(nri::OptionalBool { value: true }),
        ..Default::default()
    }));
    assert_eq!(limits.expect("good").memory_limit_in_bytes, 5);
    let bad = [
        memory(nri::LinuxMemory {
            reservation: Some(nri::OptionalInt64 { value: 5 }),
            ..Default::default()
        }),
        memory(nri::LinuxMemory {
            disable_oom_killer: Some(nri::OptionalBool { value: true }),
            ..Default::default()
        }),
        nri::LinuxResources {
            pids: Some(nri::LinuxPids { limit: 5 }),
            ..Default::default()
        },
        nri::LinuxResources {
            cpu: Some(nri::LinuxCpu {
                realtime_runtime: Some(nri::OptionalInt64 { value: 5 }),
                ..Default::default()
            }),
            ..Default::default()
        },
    ];
    for resources in bad {
        let error = of(resources).expect_err("not in a container that is there");
        assert_eq!(error.kind(), SpecErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn enumerations_that_there_are_not() {
    type Linux = nri::LinuxContainerAdjustment;
    let wishes = [
        Linux {
            io_priority: Some(nri::LinuxIoPriority {
                class: 9,
                priority: 0,
            }),
            ..Default::default()
        },
        Linux {
            io_priority: Some(nri::LinuxIoPriority {
                class: 1,
                priority: 8,
            }),
            ..Default::default()
        },
        Linux {
            scheduler: Some(nri::LinuxScheduler {
                policy: 99,
                ..Default::default()
            }),
            ..Default::default()
        },
        Linux {
            scheduler: Some(nri::LinuxScheduler {
                policy: 1,
                nice: 40,
                ..Default::default()
            }),
            ..Default::default()
        },
        Linux {
            memory_policy: Some(nri::LinuxMemoryPolicy {
                mode: 77,
                ..Default::default()
            }),
            ..Default::default()
        },
        Linux {
            oom_score_adj: Some(nri::OptionalInt { value: 1001 }),
            ..Default::default()
        },
        Linux {
            net_devices: [("a/b".to_owned(), nri::LinuxNetDevice::default())].into(),
            ..Default::default()
        },
    ];
    for wish in wishes {
        assert!(adjusted(&linux(wish.clone())).is_err(), "{wish:?}");
    }
    // All modes and flags of the protocol are the specification's.
    for mode in 0..=6 {
        let policy = nri::LinuxMemoryPolicy {
            mode,
            nodes: "0".into(),
            flags: vec![0, 1, 2],
        };
        let wish = Linux {
            memory_policy: Some(policy),
            ..Default::default()
        };
        adjusted(&linux(wish)).expect("known");
    }
}

proptest! {
    /// Whatever text a plugin sends: it is taken or refused.
    #[test]
    fn any_text_is_taken_or_refused(a in "\\PC{0,12}", b in "[-/.a-z=\\x00]{0,12}", n in any::<i64>()) {
        let wish = Wish {
            annotations: [(a.clone(), b.clone())].into(),
            env: vec![nri::KeyValue { key: b.clone(), value: a.clone() }],
            args: vec![a.clone()],
            mounts: vec![mount(&b, &a, &b, &[&a])],
            rlimits: vec![nri::PosixRlimit { r#type: a.clone(), hard: n.unsigned_abs(), soft: 1 }],
            linux: Some(nri::LinuxContainerAdjustment {
                devices: vec![nri::LinuxDevice { path: b.clone(), r#type: a.clone(), major: n, ..Default::default() }],
                namespaces: vec![nri::LinuxNamespace { r#type: a.clone(), path: b.clone() }],
                sysctl: [(b.clone(), a.clone())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let _ = adjusted(&wish);
    }
}
