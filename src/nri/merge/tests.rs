use super::*;
use proptest::prelude::*;
use slipway_proto::nri::{
    Hook, Hooks, HugepageLimit, LinuxCpu, LinuxMemory, LinuxRdt, OptionalInt, OptionalInt64,
    OptionalString, OptionalUInt64, PosixRlimit,
};

fn text(s: &str) -> String {
    s.to_owned()
}

fn creation() -> Creation {
    Creation::new(Container {
        id: text("c"),
        env: vec![text("A=1"), text("B=2")],
        args: vec![text("sleep")],
        annotations: [(text("k"), text("v"))].into(),
        mounts: vec![mount("/m")],
        ..Default::default()
    })
}

fn mount(at: &str) -> Mount {
    Mount {
        destination: text(at),
        ..Default::default()
    }
}

fn env(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: text(key),
        value: text(value),
    }
}

fn limit(bytes: i64) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: Some(OptionalInt64 { value: bytes }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn update(id: &str, resources: LinuxResources, ignore_failure: bool) -> ContainerUpdate {
    ContainerUpdate {
        container_id: text(id),
        linux: Some(LinuxContainerUpdate {
            resources: Some(resources),
        }),
        ignore_failure,
    }
}

#[test]
fn the_next_plugin_sees_what_the_first_changed() {
    let mut creation = creation();
    let wish = ContainerAdjustment {
        annotations: [(text("-k"), String::new()), (text("n"), text("1"))].into(),
        env: vec![env("-A", ""), env("C", "3"), env("B", "4")],
        mounts: vec![mount("-/m"), mount("/n")],
        args: vec![text("cat")],
        rlimits: vec![PosixRlimit {
            r#type: text("RLIMIT_NOFILE"),
            hard: 2,
            soft: 1,
        }],
        ..Default::default()
    };
    creation.adjust(wish, "00-a").unwrap();
    let seen = &creation.container;
    assert_eq!(seen.env, ["C=3", "B=4"]);
    assert_eq!(seen.args, ["cat"]);
    assert_eq!(seen.annotations, [(text("n"), text("1"))].into());
    assert_eq!(seen.mounts, [mount("/n")]);
    assert_eq!(seen.rlimits.len(), 1);
    let all = &creation.adjust;
    assert!(all.annotations.contains_key("-k") && all.annotations.contains_key("n"));
    let keys: Vec<_> = all.env.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["-A", "C", "B"]);
    assert_eq!(all.mounts, [mount("-/m"), mount("/n")]);
}

#[test]
fn two_plugins_must_not_set_the_same() {
    type Wish = ContainerAdjustment;
    let linux = |linux| Wish {
        linux: Some(linux),
        ..Default::default()
    };
    type Linux = LinuxContainerAdjustment;
    let wishes = [
        Wish {
            annotations: [(text("x"), text("1"))].into(),
            ..Default::default()
        },
        Wish {
            env: vec![env("X", "1")],
            ..Default::default()
        },
        Wish {
            mounts: vec![mount("/x")],
            ..Default::default()
        },
        Wish {
            args: vec![text("x")],
            ..Default::default()
        },
        Wish {
            rlimits: vec![PosixRlimit {
                r#type: text("x"),
                ..Default::default()
            }],
            ..Default::default()
        },
        Wish {
            cdi_devices: vec![slipway_proto::nri::CdiDevice {
                name: text("v/c=x"),
            }],
            ..Default::default()
        },
        linux(Linux {
            devices: vec![LinuxDevice {
                path: text("/dev/x"),
                ..Default::default()
            }],
            ..Default::default()
        }),
        linux(Linux {
            namespaces: vec![LinuxNamespace {
                r#type: text("ipc"),
                ..Default::default()
            }],
            ..Default::default()
        }),
        linux(Linux {
            sysctl: [(text("net.x"), text("1"))].into(),
            ..Default::default()
        }),
        linux(Linux {
            net_devices: [(text("eth1"), Default::default())].into(),
            ..Default::default()
        }),
        linux(Linux {
            cgroups_path: text("/x"),
            ..Default::default()
        }),
        linux(Linux {
            oom_score_adj: Some(OptionalInt { value: 1 }),
            ..Default::default()
        }),
        linux(Linux {
            io_priority: Some(Default::default()),
            ..Default::default()
        }),
        linux(Linux {
            seccomp_policy: Some(Default::default()),
            ..Default::default()
        }),
        linux(Linux {
            scheduler: Some(Default::default()),
            ..Default::default()
        }),
        linux(Linux {
            memory_policy: Some(Default::default()),
            ..Default::default()
        }),
        linux(Linux {
            rdt: Some(LinuxRdt {
                clos_id: Some(OptionalString { value: text("x") }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        linux(Linux {
            resources: Some(limit(1)),
            ..Default::default()
        }),
        linux(Linux {
            resources: Some(LinuxResources {
                cpu: Some(LinuxCpu {
                    shares: Some(OptionalUInt64 { value: 2 }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        linux(Linux {
            resources: Some(LinuxResources {
                hugepage_limits: vec![HugepageLimit {
                    page_size: text("2MB"),
                    limit: 1,
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        linux(Linux {
            resources: Some(LinuxResources {
                unified: [(text("memory.high"), text("1"))].into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
    ];
    for wish in wishes {
        let mut creation = creation();
        creation.adjust(wish.clone(), "00-a").unwrap();
        let error = creation
            .adjust(wish.clone(), "10-b")
            .expect_err("a conflict");
        let error = error.to_string();
        assert!(error.contains("00-a") && error.contains("10-b"), "{error}");
    }
}

#[test]
fn who_removes_may_set_anew() {
    let mut creation = creation();
    let set = |value| ContainerAdjustment {
        env: vec![env("X", value)],
        args: vec![text("x")],
        annotations: [(text("x"), text(value))].into(),
        ..Default::default()
    };
    creation.adjust(set("1"), "00-a").unwrap();
    let again = ContainerAdjustment {
        env: vec![env("-X", ""), env("X", "2")],
        args: vec![String::new(), text("y")],
        annotations: [(text("-x"), String::new()), (text("x"), text("2"))].into(),
        ..Default::default()
    };
    creation.adjust(again, "10-b").unwrap();
    assert!(creation.container.env.contains(&text("X=2")));
    assert_eq!(creation.adjust.args, ["y"]);
    assert_eq!(creation.adjust.annotations.get("x"), Some(&text("2")));
    assert_eq!(creation.owners.of("c", Field::Env, Some("X")), Some("10-b"));
}

#[test]
fn hooks_are_shared() {
    let mut creation = creation();
    let hooks = |path: &str| ContainerAdjustment {
        hooks: Some(Hooks {
            create_runtime: vec![Hook {
                path: text(path),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    creation.adjust(hooks("/a"), "00-a").unwrap();
    creation.adjust(hooks("/b"), "10-b").unwrap();
    assert_eq!(
        creation.adjust.hooks.as_ref().unwrap().create_runtime.len(),
        2
    );
    assert_eq!(
        creation.owners.of("c", Field::OciHooks, None),
        Some("00-a,10-b")
    );
}

#[test]
fn updates_of_others() {
    let mut creation = creation();
    creation
        .update(vec![update("d", limit(1), false)], "00-a")
        .unwrap();
    let cpu = LinuxResources {
        cpu: Some(LinuxCpu {
            cpus: text("0"),
            ..Default::default()
        }),
        ..Default::default()
    };
    creation
        .update(vec![update("d", cpu, true)], "10-b")
        .unwrap();
    let only = &creation.updates.list()[0];
    assert_eq!(creation.updates.list().len(), 1);
    assert!(!only.ignore_failure);
    let merged = only.linux.as_ref().unwrap().resources.as_ref().unwrap();
    assert!(merged.memory.is_some() && merged.cpu.is_some());
    assert!(
        creation
            .update(vec![update("d", limit(2), false)], "20-c")
            .is_err()
    );
    creation
        .update(vec![update("d", limit(2), true)], "20-c")
        .unwrap();
    let kept = creation.updates.list()[0]
        .linux
        .clone()
        .unwrap()
        .resources
        .unwrap();
    assert_eq!(kept.memory.unwrap().limit.unwrap().value, 1);
    let error = creation
        .update(vec![update("c", limit(1), false)], "00-a")
        .unwrap_err();
    assert!(error.to_string().contains("being created"), "{error}");
}

proptest! {
    /// However two plugins add and remove variables: what is merged, laid over the original, is what the next sees.
    #[test]
    fn the_merged_wish_gives_what_is_shown(
        first in prop::collection::vec(("-?[A-C]", "[0-9]"), 0..5),
        second in prop::collection::vec(("-?[A-C]", "[0-9]"), 0..5),
    ) {
        let mut creation = creation();
        let before = creation.container.env.clone();
        let mut good = true;
        for (wish, plugin) in [(first, "00-a"), (second, "10-b")] {
            let wish = ContainerAdjustment {
                env: wish.iter().map(|(k, v)| env(k, v)).collect(),
                ..Default::default()
            };
            good &= creation.adjust(wish, plugin).is_ok();
        }
        prop_assume!(good);
        let name = |e: &str| e.split('=').next().unwrap_or_default().to_owned();
        let mut laid: BTreeMap<String, String> = before.iter().map(|e| (name(e), e.clone())).collect();
        for entry in &creation.adjust.env {
            match is_removal(&entry.key) {
                Some(key) => drop(laid.remove(key)),
                None => drop(laid.insert(entry.key.clone(), format!("{}={}", entry.key, entry.value))),
            }
        }
        let shown: BTreeMap<String, String> =
            creation.container.env.iter().map(|e| (name(e), e.clone())).collect();
        prop_assert_eq!(laid, shown);
    }
}
