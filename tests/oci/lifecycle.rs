//! From create to delete.

use std::fs;

use serde_json::{Value, json};

use crate::Test;
use crate::bundle::{Bundle, until};

pub const TESTS: &[Test] = &[
    (
        "lifecycle::created_started_stopped_deleted",
        created_started_stopped_deleted,
    ),
    (
        "lifecycle::run_has_the_exit_code_of_the_container",
        run_has_the_exit_code_of_the_container,
    ),
    (
        "lifecycle::run_detached_leaves_the_container",
        run_detached_leaves_the_container,
    ),
    ("lifecycle::signals", signals),
    (
        "lifecycle::kill_all_reaches_those_without_an_init",
        kill_all_reaches_those_without_an_init,
    ),
    ("lifecycle::delete_by_force", delete_by_force),
    ("lifecycle::pause_and_resume", pause_and_resume),
    ("lifecycle::limits_are_changed", limits_are_changed),
    ("lifecycle::lists", lists),
    ("lifecycle::without_a_process", without_a_process),
    (
        "lifecycle::descriptors_are_passed_on",
        descriptors_are_passed_on,
    ),
    (
        "lifecycle::features_and_a_specification",
        features_and_a_specification,
    ),
];

fn created_started_stopped_deleted() {
    let mut bundle = Bundle::new("echo ran; touch /ran; read -r line < /go");
    bundle.spec["annotations"] = json!({"a.b": "c"});
    nix::unistd::mkfifo(
        &bundle.inside("go"),
        nix::sys::stat::Mode::from_bits_truncate(0o600),
    )
    .unwrap();
    let pid_file = bundle.path().join("pid");
    let path = bundle.path().to_str().unwrap().to_owned();
    bundle.done(&[
        "create",
        "--bundle",
        &path,
        "--pid-file",
        pid_file.to_str().unwrap(),
        &bundle.id,
    ]);
    let state = bundle.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["bundle"], path.as_str());
    assert_eq!(state["annotations"]["a.b"], "c");
    assert_eq!(
        state["pid"].to_string(),
        fs::read_to_string(&pid_file).unwrap()
    );
    assert!(!bundle.inside("ran").exists());
    assert!(bundle.refused(&["delete", &bundle.id]).contains("created"));
    bundle.done(&["start", &bundle.id]);
    until(|| bundle.inside("ran").exists(), "the process");
    assert_eq!(bundle.state()["status"], "running");
    assert!(bundle.refused(&["start", &bundle.id]).contains("running"));
    assert!(bundle.refused(&["delete", &bundle.id]).contains("running"));
    // A change of the configuration has no effect on what is there.
    bundle.spec["hostname"] = "other".into();
    fs::write(bundle.inside("go"), "on\n").unwrap();
    bundle.wait_for("stopped");
    assert_eq!(bundle.state()["pid"], 0);
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
    assert!(
        bundle
            .refused(&["state", &bundle.id])
            .contains("does not exist")
    );
}

fn run_has_the_exit_code_of_the_container() {
    for (script, code) in [("true", 0), ("exit 7", 7), ("kill -9 $$; sleep 60", 137)] {
        let mut bundle = Bundle::new(script);
        if code == 137 {
            // Process 1 of a PID namespace is not killed by itself.
            let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|n| n["type"] != "pid");
        }
        let said = bundle.run();
        assert_eq!(said.code, code, "{said:?}");
        bundle.nothing_left();
    }
    let bundle = Bundle::new("echo out; echo err >&2");
    let said = bundle.run();
    assert_eq!((said.out.as_str(), said.err.as_str()), ("out\n", "err\n"));
}

fn run_detached_leaves_the_container() {
    let bundle = Bundle::new("sleep 1000");
    bundle.done(&[
        "run",
        "--detach",
        "--bundle",
        bundle.path().to_str().unwrap(),
        &bundle.id,
    ]);
    assert_eq!(bundle.state()["status"], "running");
    bundle.done(&["kill", &bundle.id, "KILL"]);
    bundle.wait_for("stopped");
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
}

fn signals() {
    let bundle = Bundle::new(
        "trap 'touch /term' TERM; trap 'touch /usr1' USR1; touch /ready; while true; do sleep 0.05; done",
    );
    bundle.create_and_start();
    until(|| bundle.inside("ready").exists(), "the traps");
    bundle.done(&["kill", &bundle.id]);
    until(
        || bundle.inside("term").exists(),
        "SIGTERM, which is what kill sends",
    );
    bundle.done(&["kill", &bundle.id, "SIGUSR1"]);
    until(|| bundle.inside("usr1").exists(), "SIGUSR1");
    assert!(
        bundle
            .refused(&["kill", &bundle.id, "SIGNOPE"])
            .contains("SIGNOPE")
    );
    bundle.done(&["kill", &bundle.id, "9"]);
    bundle.wait_for("stopped");
    assert!(
        bundle
            .refused(&["kill", &bundle.id, "9"])
            .contains("container not running")
    );
}

fn kill_all_reaches_those_without_an_init() {
    let mut bundle = Bundle::new("sleep 1000 & echo $! > /child");
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|n| n["type"] != "pid");
    bundle.create_and_start();
    bundle.wait_for("stopped");
    let child = || -> Vec<i32> {
        serde_json::from_str(&bundle.done(&["ps", "-f", "json", &bundle.id])).unwrap()
    };
    assert_eq!(child().len(), 1);
    bundle.done(&["kill", "--all", &bundle.id, "KILL"]);
    until(|| child().is_empty(), "the child");
    bundle.done(&["delete", &bundle.id]);
    bundle.nothing_left();
}

fn delete_by_force() {
    let bundle = Bundle::new("sleep 1000");
    bundle.create();
    bundle.done(&["delete", "--force", &bundle.id]);
    bundle.nothing_left();
    bundle.create_and_start();
    bundle.done(&["pause", &bundle.id]);
    bundle.done(&["delete", "--force", &bundle.id]);
    bundle.nothing_left();
    // Nothing there is what was wanted.
    bundle.done(&["delete", "--force", &bundle.id]);
}

fn pause_and_resume() {
    let bundle = Bundle::new("while true; do echo >> /ticks; sleep 0.01; done");
    bundle.create_and_start();
    let ticks = || fs::metadata(bundle.inside("ticks")).map_or(0, |m| m.len());
    until(|| ticks() > 3, "ticks");
    assert!(bundle.refused(&["resume", &bundle.id]).contains("running"));
    bundle.done(&["pause", &bundle.id]);
    assert_eq!(bundle.state()["status"], "paused");
    let before = ticks();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(ticks(), before);
    assert!(
        bundle
            .refused(&["exec", &bundle.id, "true"])
            .contains("paused")
    );
    bundle.done(&["resume", &bundle.id]);
    until(|| ticks() > before, "ticks after resume");
    // What is killed while it is frozen ends all the same.
    bundle.done(&["pause", &bundle.id]);
    bundle.done(&["kill", &bundle.id, "KILL"]);
    bundle.wait_for("stopped");
}

fn limits_are_changed() {
    let mut bundle = Bundle::new("sleep 1000");
    bundle.spec["linux"]["resources"] =
        json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}});
    bundle.create_and_start();
    let read = |v1, v2| {
        fs::read_to_string(bundle.cgroup_file(v1, v2))
            .unwrap()
            .trim()
            .to_owned()
    };
    let memory = || read("memory.limit_in_bytes", "memory.max");
    let pids = || read("pids.max", "pids.max");
    assert_eq!(
        (memory(), pids()),
        ((64 << 20).to_string(), "50".to_owned())
    );
    bundle.done(&[
        "update",
        "--memory",
        "134217728",
        "--pids-limit",
        "20",
        "--cpu-quota",
        "50000",
        &bundle.id,
    ]);
    assert_eq!(
        (memory(), pids()),
        ((128 << 20).to_string(), "20".to_owned())
    );
    assert!(read("cpu.cfs_quota_us", "cpu.max").starts_with("50000"));
    let file = bundle.path().join("resources");
    fs::write(
        &file,
        json!({"memory": {"limit": 32 << 20}, "cpu": {"quota": 0}}).to_string(),
    )
    .unwrap();
    bundle.done(&["update", "--resources", file.to_str().unwrap(), &bundle.id]);
    assert_eq!(
        (memory(), pids()),
        ((32 << 20).to_string(), "20".to_owned())
    );
    // All or nothing.
    let error = bundle.refused(&[
        "update",
        "--pids-limit",
        "10",
        "--cpuset-cpus",
        "4000",
        &bundle.id,
    ]);
    assert!(error.contains("cpuset.cpus"), "{error}");
    assert_eq!(pids(), "20");
    assert!(
        bundle
            .refused(&["update", "--l3-cache-schema", "x", &bundle.id])
            .contains("RDT")
    );
}

fn lists() {
    let bundle = Bundle::new("sleep 1000");
    assert_eq!(bundle.done(&["list", "-q"]), "");
    bundle.create_and_start();
    assert_eq!(bundle.done(&["list", "-q"]), format!("{}\n", bundle.id));
    let all: Value = serde_json::from_str(&bundle.done(&["list", "-f", "json"])).unwrap();
    assert_eq!(all[0], bundle.state());
    let table = bundle.done(&["list"]);
    assert!(
        table.starts_with("ID") && table.contains("running"),
        "{table}"
    );
    let pids: Vec<i32> =
        serde_json::from_str(&bundle.done(&["ps", "-f", "json", &bundle.id])).unwrap();
    assert!(pids.contains(&i32::try_from(bundle.state()["pid"].as_i64().unwrap()).unwrap()));
    let table = bundle.done(&["ps", &bundle.id, "-e", "-o", "pid,args"]);
    assert!(
        table.contains("sleep 1000") && table.lines().count() <= 3,
        "{table}"
    );
    assert!(bundle.refused(&["list", "-f", "yaml"]).contains("yaml"));
}

fn without_a_process() {
    let mut bundle = Bundle::new("");
    bundle.spec["process"] = Value::Null;
    bundle.create();
    assert_eq!(bundle.state()["status"], "created");
    assert!(
        bundle
            .refused(&["start", &bundle.id])
            .contains("no process")
    );
    bundle.done(&["delete", "--force", &bundle.id]);
    bundle.nothing_left();
}

fn descriptors_are_passed_on() {
    let bundle = Bundle::new("cat <&3; ls /proc/self/fd");
    // With nothing open that a test's caller may have left.
    let (_, err) = shell(&bundle, "exec \"$@\" 3<&- 4<&-");
    assert!(err.contains("descriptor 3"), "{err}");
    bundle.nothing_left();
    let file = bundle.path().join("passed");
    fs::write(&file, "through three\n").unwrap();
    // Two are open, and one of them is passed on.
    let script = format!("exec \"$@\" 3<{0} 4<&- 5<{0}", file.display());
    let (out, err) = shell(&bundle, &script);
    assert!(out.starts_with("through three\n"), "{out} {err}");
    // ls has its own directory open as 4.
    assert!(!out.contains('5'), "{out}");
}

/// Runs the container from a shell, with `--preserve-fds 1`: its output and its errors.
fn shell(bundle: &Bundle, script: &str) -> (String, String) {
    let path = bundle.path().to_str().unwrap();
    let inner = bundle.command(&["run", "--preserve-fds", "1", "-b", path, &bundle.id]);
    let words = std::iter::once(inner.get_program()).chain(inner.get_args());
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, "sh"]).args(words);
    let said = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(said.stdout), text(said.stderr))
}

fn features_and_a_specification() {
    let bundle = Bundle::new("");
    let features: Value = serde_json::from_str(&bundle.done(&["features"])).unwrap();
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
    let unified = fs::metadata("/sys/fs/cgroup/cgroup.controllers").is_ok();
    assert_eq!(features["linux"]["cgroup"]["v2"], unified);
    let dir = tempfile::tempdir().unwrap();
    bundle.done(&["spec", "--bundle", dir.path().to_str().unwrap()]);
    let spec = fs::read(dir.path().join("config.json")).unwrap();
    let spec: Value = serde_json::from_slice(&spec).unwrap();
    assert_eq!(spec["process"]["args"][0], "sh");
    assert!(bundle.refused(&["spec", "--rootless"]).contains("root"));
    for command in [
        &["checkpoint", "x"][..],
        &["restore", "x"],
        &["events", "x"],
    ] {
        assert!(bundle.refused(command).contains("not supported"));
    }
}
