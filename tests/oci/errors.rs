//! What is refused: in clear words on standard error and in the log, without leaving anything. And what is killed half
//! way.

use std::fs;

use serde_json::{Value, json};

use crate::Test;
use crate::bundle::{Bundle, ended, until};

pub const TESTS: &[Test] = &[
    (
        "errors::bad_specifications_leave_nothing",
        bad_specifications_leave_nothing,
    ),
    ("errors::bad_names", bad_names),
    ("errors::one_id_for_one_container", one_id_for_one_container),
    (
        "errors::one_cgroup_for_one_container",
        one_cgroup_for_one_container,
    ),
    ("errors::a_create_that_was_killed", a_create_that_was_killed),
    ("errors::an_init_that_was_killed", an_init_that_was_killed),
    ("errors::systemd_is_not_here", systemd_is_not_here),
];

fn bad_specifications_leave_nothing() {
    type Change = fn(&mut Value);
    let bad: &[(&str, Change)] = &[
        ("ociVersion", |s| s["ociVersion"] = "3.0.0".into()),
        ("root.path", |s| s["root"]["path"] = "nothing".into()),
        ("process.args", |s| s["process"]["args"] = json!([])),
        ("process.cwd", |s| s["process"]["cwd"] = "x".into()),
        ("executable file not found in $PATH", |s| {
            s["process"]["args"] = json!(["nothing"])
        }),
        ("No such file or directory", |s| {
            s["process"]["args"] = json!(["/no/where"])
        }),
        ("Permission denied", |s| {
            s["process"]["args"] = json!(["/etc/passwd"])
        }),
        (
            "mounts[0].source",
            |s| s["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/no/where"}]),
        ),
        ("two of type", |s| {
            let list = s["linux"]["namespaces"].as_array_mut().unwrap();
            list.push(json!({"type": "pid"}));
        }),
        ("no namespace of type", |s| {
            s["linux"]["namespaces"][2]["path"] = "/proc/self/ns/uts".into()
        }),
        ("mount namespace", |s| {
            s["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "user"}])
        }),
        ("cgroupsPath", |s| s["linux"]["cgroupsPath"] = "/".into()),
        ("cgroupsPath", |s| {
            s["linux"]["cgroupsPath"] = "/a/../..".into()
        }),
        ("listenerPath", |s| {
            s["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}],
            });
        }),
        ("sysctl", |s| {
            s["linux"]["sysctl"] = json!({"kernel.panic": "1"})
        }),
        ("no.such.thing", |s| {
            s["linux"]["resources"] = json!({"unified": {"no.such.thing": "1"}})
        }),
        ("uidMappings", |s| {
            let list = s["linux"]["namespaces"].as_array_mut().unwrap();
            list.push(json!({"type": "user"}));
        }),
        ("process.rlimits", |s| {
            let limit = json!({"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8});
            s["process"]["rlimits"] = json!([limit]);
        }),
        ("intelRdt", |s| {
            s["linux"]["intelRdt"] = json!({"closID": "x"})
        }),
        (
            "linux.devices",
            |s| {
                s["linux"]["devices"] = json!([{"path": "/x", "type": "c", "major": 1, "minor": 3}])
            },
        ),
        ("mount", |s| {
            s["mounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"destination": "/y", "type": "nofs", "source": "x"}));
        }),
    ];
    for (word, change) in bad {
        let mut bundle = Bundle::new("true");
        change(&mut bundle.spec);
        let error = bundle.refused(&["create", "-b", bundle.path().to_str().unwrap(), &bundle.id]);
        let unified = *word == "no.such.thing" && error.contains("unified");
        assert!(error.contains(word) || unified, "{word}: {error}");
        if !word.starts_with("cgroups") {
            bundle.nothing_left();
        }
    }
    // No JSON at all, and no bundle.
    let bundle = Bundle::new("true");
    let mut command =
        bundle.command(&["create", "-b", bundle.path().to_str().unwrap(), &bundle.id]);
    fs::write(
        bundle.path().join("config.json"),
        "{\"ociVersion\": \"1.0.2\", \"mounts\": [{]}",
    )
    .unwrap();
    let said = command.output().unwrap();
    assert!(
        String::from_utf8_lossy(&said.stderr).contains("mounts[0]"),
        "{said:?}"
    );
    assert!(
        bundle
            .refused(&["create", "-b", "/no/bundle", &bundle.id])
            .contains("/no/bundle")
    );
    bundle.nothing_left();
}

fn bad_names() {
    let bundle = Bundle::new("true");
    let long = "x".repeat(2000);
    for id in ["..", "a/b", "../escape", "a b", long.as_str()] {
        for command in [
            &["create", "-b", bundle.path().to_str().unwrap()][..],
            &["state"],
            &["delete", "--force"],
        ] {
            let args: Vec<&str> = command.iter().copied().chain([id]).collect();
            assert!(
                bundle.refused(&args).contains("can't be a container's id"),
                "{id}"
            );
        }
    }
    bundle.nothing_left();
}

fn one_id_for_one_container() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create();
    let error = bundle.refused(&["create", "-b", bundle.path().to_str().unwrap(), &bundle.id]);
    assert!(error.contains("exists already"), "{error}");
    // The first one is as it was.
    assert_eq!(bundle.state()["status"], "created");
    bundle.done(&["start", &bundle.id]);
    // Many at once: one of them.
    let other = Bundle::new("sleep 1000");
    let path = other.path().to_str().unwrap();
    let all: Vec<_> = (0..5)
        .map(|_| {
            other
                .command(&["create", "-b", path, &other.id])
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let codes: Vec<i32> = all.into_iter().map(ended).collect();
    assert_eq!(codes.iter().filter(|c| **c == 0).count(), 1, "{codes:?}");
    assert_eq!(other.state()["status"], "created");
}

fn one_cgroup_for_one_container() {
    let first = Bundle::new("sleep 1000");
    first.create_and_start();
    let mut second = Bundle::new("true");
    second.spec["linux"]["cgroupsPath"] = first.spec["linux"]["cgroupsPath"].clone();
    let error = second.refused(&["create", "-b", second.path().to_str().unwrap(), &second.id]);
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(first.state()["status"], "running");
}

fn a_create_that_was_killed() {
    let mut bundle = Bundle::new("true");
    let here = bundle.path().join("here");
    let script = format!("touch {}; exec sleep 1000", here.display());
    let hook =
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]});
    bundle.spec["hooks"]["createRuntime"] = json!([hook]);
    let path = bundle.path().to_str().unwrap();
    let mut creating = bundle
        .command(&["create", "-b", path, &bundle.id])
        .spawn()
        .unwrap();
    until(|| here.exists(), "the hook");
    assert_eq!(bundle.state()["status"], "creating");
    creating.kill().unwrap();
    creating.wait().unwrap();
    bundle.wait_for("stopped");
    assert!(bundle.refused(&["start", &bundle.id]).contains("stopped"));
    bundle.done(&["delete", "--force", &bundle.id]);
    bundle.nothing_left();
    // One that is still at work is ended by force.
    let _ = fs::remove_file(&here);
    let creating = bundle
        .command(&["create", "-b", path, &bundle.id])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until(|| here.exists(), "the hook");
    bundle.done(&["delete", "--force", &bundle.id]);
    assert_ne!(ended(creating), 0);
    bundle.nothing_left();
}

fn an_init_that_was_killed() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create();
    bundle.done(&["kill", &bundle.id, "KILL"]);
    bundle.wait_for("stopped");
    assert!(bundle.refused(&["start", &bundle.id]).contains("stopped"));
    assert!(
        bundle
            .refused(&["exec", &bundle.id, "true"])
            .contains("stopped")
    );
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
}

fn systemd_is_not_here() {
    let bundle = Bundle::new("true");
    if fs::metadata("/run/systemd/system").is_ok()
        && fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_ok()
    {
        return;
    }
    let error = bundle.refused(&[
        "--systemd-cgroup",
        "create",
        "-b",
        bundle.path().to_str().unwrap(),
        &bundle.id,
    ]);
    assert!(error.contains("systemd"), "{error}");
    bundle.nothing_left();
}
