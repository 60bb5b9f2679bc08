//! Hooks: their order, their namespaces, the state that they get, and what their failure does.

use std::fs;

use serde_json::{Value, json};

use crate::Test;
use crate::bundle::{Bundle, until};

pub const TESTS: &[Test] = &[
    (
        "hooks::run_in_order_with_the_state",
        run_in_order_with_the_state,
    ),
    ("hooks::see_the_right_namespaces", see_the_right_namespaces),
    ("hooks::a_failed_one_ends_create", a_failed_one_ends_create),
    ("hooks::a_failed_one_ends_start", a_failed_one_ends_start),
    ("hooks::the_last_ones_only_warn", the_last_ones_only_warn),
    ("hooks::have_their_time", have_their_time),
];

const KINDS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
}

/// Hooks that write what they are, and the state that they get, in the order in which they run.
fn recording(bundle: &mut Bundle) {
    let out = bundle.path().join("order");
    for kind in KINDS {
        // In the container's root there is another path to it.
        let out = match kind {
            "startContainer" => "/order".to_owned(),
            _ => out.display().to_string(),
        };
        bundle.spec["hooks"][kind] = json!([hook(&format!(
            "read -r state; echo \"{kind} $state\" >> {out}"
        ))]);
    }
    fs::write(&out, "").unwrap();
    fs::write(bundle.inside("order"), "").unwrap();
    let mounts = bundle.spec["mounts"].as_array_mut().unwrap();
    mounts
        .push(json!({"destination": "/order", "type": "bind", "source": out, "options": ["bind"]}));
}

fn run_in_order_with_the_state() {
    let mut bundle = Bundle::new("echo process x >> /order; sleep 1000");
    bundle.spec["annotations"] = json!({"k": "v"});
    recording(&mut bundle);
    let out = bundle.path().join("order");
    let lines = || -> Vec<String> {
        fs::read_to_string(&out)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    };
    bundle.create();
    let kinds = || -> Vec<String> {
        lines()
            .iter()
            .map(|l| l.split(' ').next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(kinds(), KINDS[..3]);
    bundle.done(&["start", &bundle.id]);
    until(|| lines().len() >= 6, "the process");
    let mut middle = kinds()[3..6].to_vec();
    assert_eq!(middle[0], "startContainer");
    // poststart and the process run side by side.
    middle.sort();
    assert_eq!(middle, ["poststart", "process", "startContainer"]);
    let pid = bundle.state()["pid"].clone();
    bundle.done(&["delete", "--force", &bundle.id]);
    assert_eq!(kinds().last().unwrap(), "poststop");
    for line in lines().iter().filter(|l| !l.starts_with("process")) {
        let (kind, state) = line.split_once(' ').unwrap();
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["id"], bundle.id.as_str(), "{kind}");
        assert_eq!(state["bundle"], bundle.path().to_str().unwrap(), "{kind}");
        assert_eq!(state["annotations"]["k"], "v", "{kind}");
        let (status, number) = match kind {
            "prestart" | "createRuntime" => ("creating", pid.clone()),
            // As the container sees it.
            "createContainer" => ("creating", 1.into()),
            "startContainer" => ("created", 1.into()),
            "poststart" => ("running", pid.clone()),
            _ => ("stopped", Value::Null),
        };
        assert_eq!(
            (&state["status"], &state["pid"]),
            (&status.into(), &number),
            "{kind}"
        );
    }
    bundle.nothing_left();
}

fn see_the_right_namespaces() {
    let mut bundle = Bundle::new("readlink /proc/self/ns/net /proc/self/ns/mnt");
    let seen = |kind: &str| format!("{}/{kind}", bundle.path().display());
    let look = |kind: &str| {
        hook(&format!(
            "readlink /proc/self/ns/net > {0}; readlink /proc/self/ns/mnt >> {0}",
            seen(kind)
        ))
    };
    let hooks = json!({
        "createRuntime": [look("createRuntime")],
        "createContainer": [look("createContainer")],
    });
    bundle.spec["hooks"] = hooks;
    // ps of busybox' readlink takes one name: two commands.
    bundle.spec["process"]["args"] = json!([
        "/bin/sh",
        "-c",
        "readlink /proc/self/ns/net; readlink /proc/self/ns/mnt"
    ]);
    let said = bundle.run();
    assert_eq!(said.code, 0, "{said:?}");
    let read = |kind: &str| fs::read_to_string(bundle.path().join(kind)).unwrap();
    let own = |name: &str| {
        fs::read_link(format!("/proc/self/ns/{name}"))
            .unwrap()
            .display()
            .to_string()
    };
    assert_eq!(
        read("createRuntime"),
        format!("{}\n{}\n", own("net"), own("mnt"))
    );
    assert_eq!(read("createContainer"), said.out);
}

fn a_failed_one_ends_create() {
    for kind in &KINDS[..3] {
        let mut bundle = Bundle::new("true");
        let after = bundle.path().join("after");
        bundle.spec["hooks"][kind] = json!([
            hook("echo because >&2; exit 5"),
            hook(&format!("touch {}", after.display()))
        ]);
        let stopped = bundle.path().join("stopped");
        bundle.spec["hooks"]["poststop"] = json!([hook(&format!("touch {}", stopped.display()))]);
        let error = bundle.refused(&["create", "-b", bundle.path().to_str().unwrap(), &bundle.id]);
        assert!(error.contains(kind) && error.contains("because"), "{error}");
        assert!(!after.exists(), "{kind}");
        assert!(stopped.exists(), "{kind}");
        bundle.nothing_left();
    }
}

fn a_failed_one_ends_start() {
    let mut bundle = Bundle::new("touch /ran");
    bundle.spec["hooks"]["startContainer"] = json!([hook("echo because >&2; exit 5")]);
    bundle.create();
    let error = bundle.refused(&["start", &bundle.id]);
    assert!(
        error.contains("startContainer") && error.contains("because"),
        "{error}"
    );
    bundle.wait_for("stopped");
    assert!(!bundle.inside("ran").exists());
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
}

fn the_last_ones_only_warn() {
    let mut bundle = Bundle::new("sleep 1000");
    let seen = bundle.path().join("seen");
    for kind in ["poststart", "poststop"] {
        bundle.spec["hooks"][kind] = json!([
            hook("exit 5"),
            hook(&format!("echo {kind} >> {}", seen.display()))
        ]);
    }
    bundle.create_and_start();
    assert_eq!(bundle.state()["status"], "running");
    bundle.done(&["delete", "--force", &bundle.id]);
    assert_eq!(fs::read_to_string(&seen).unwrap(), "poststart\npoststop\n");
    let log = fs::read_to_string(bundle.log()).unwrap();
    let warnings: Vec<Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(warnings.len(), 2, "{log}");
    assert!(warnings.iter().all(|w| w["level"] == "warning"), "{log}");
    bundle.nothing_left();
}

fn have_their_time() {
    let mut bundle = Bundle::new("true");
    let mut slow = hook("exec sleep 1000");
    slow["timeout"] = 1.into();
    bundle.spec["hooks"]["createRuntime"] = json!([slow]);
    let error = bundle.refused(&["create", "-b", bundle.path().to_str().unwrap(), &bundle.id]);
    assert!(error.contains("in its time"), "{error}");
    bundle.nothing_left();
}
