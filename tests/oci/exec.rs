//! More processes in a container, and terminals.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;

use serde_json::json;

use crate::Test;
use crate::bundle::{Bundle, ended, until};

pub const TESTS: &[Test] = &[
    ("exec::codes_output_and_options", codes_output_and_options),
    ("exec::a_process_from_a_file", a_process_from_a_file),
    ("exec::is_confined_as_the_init", is_confined_as_the_init),
    (
        "exec::has_the_priorities_of_the_init",
        has_the_priorities_of_the_init,
    ),
    ("exec::detached_with_a_pid_file", detached_with_a_pid_file),
    (
        "exec::commands_that_are_not_there",
        commands_that_are_not_there,
    ),
    ("exec::in_a_paused_container", in_a_paused_container),
    (
        "exec::the_terminal_of_a_container",
        the_terminal_of_a_container,
    ),
    ("exec::the_terminal_of_an_exec", the_terminal_of_an_exec),
];

fn sleeper() -> Bundle {
    Bundle::new("sleep 1000")
}

fn codes_output_and_options() {
    let bundle = sleeper();
    bundle.create_and_start();
    let said = bundle.oci(&[
        "exec",
        &bundle.id,
        "sh",
        "-c",
        "echo out; echo err >&2; exit 9",
    ]);
    assert_eq!(
        (said.code, said.out.as_str(), said.err.as_str()),
        (9, "out\n", "err\n")
    );
    let said = bundle.oci(&["exec", &bundle.id, "sh", "-c", "kill -15 $$"]);
    assert_eq!(said.code, 128 + 15);
    let out = bundle.done(&[
        "exec",
        "-e",
        "X=1",
        "--env",
        "PATH=/bin:/x",
        "--user",
        "33:34",
        "-g",
        "77",
        "--cwd",
        "/tmp",
        &bundle.id,
        "sh",
        "-c",
        "echo $X $PATH; pwd; id -u; id -g; id -G; echo $$",
    ]);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..4], ["1 /bin:/x", "/tmp", "33", "34"], "{out}");
    assert!(lines[4].split(' ').any(|g| g == "77"), "{out}");
    // In the container's PID namespace.
    assert!(lines[5].parse::<i32>().unwrap() < 100, "{out}");
    // What is there in the container's cgroup is in ps, too.
    let out = bundle.done(&["exec", &bundle.id, "hostname"]);
    assert_eq!(out, "inside\n");
    bundle.done(&["delete", "--force", &bundle.id]);
    bundle.nothing_left();
    assert!(
        bundle
            .refused(&["exec", &bundle.id, "true"])
            .contains("does not exist")
    );
}

fn a_process_from_a_file() {
    let bundle = sleeper();
    bundle.create_and_start();
    let file = bundle.path().join("process.json");
    let process = json!({
        "args": ["sh", "-c", "echo $Y; id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status; ulimit -n"],
        "cwd": "/", "env": ["Y=2", "PATH=/bin"], "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"], "permitted": ["CAP_NET_RAW"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}],
    });
    fs::write(&file, process.to_string()).unwrap();
    let out = bundle.done(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert!(
        out.starts_with("2\n0\n")
            && out.contains("CapEff:\t0000000000002000")
            && out.ends_with("99\n"),
        "{out}"
    );
    assert!(out.contains("NoNewPrivs:\t0"), "{out}");
    fs::write(
        &file,
        r#"{"args": ["x"], "cwd": "here", "user": {"uid": 0, "gid": 0}}"#,
    )
    .unwrap();
    assert!(
        bundle
            .refused(&["exec", "--process", file.to_str().unwrap(), &bundle.id])
            .contains("process.cwd")
    );
}

fn is_confined_as_the_init() {
    let mut bundle =
        Bundle::new("cat /proc/self/status > /init; ls -l /proc/self/ns > /init-ns; sleep 1000");
    bundle.spec["process"]["user"] = json!({"uid": 0, "gid": 0, "additionalGids": [5, 6]});
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["unshare"], "action": "SCMP_ACT_ERRNO"}],
    });
    bundle.create_and_start();
    until(|| bundle.inside("init-ns").exists(), "the init");
    let out = bundle.done(&[
        "exec",
        &bundle.id,
        "sh",
        "-c",
        "cat /proc/self/status; ls -l /proc/self/ns",
    ]);
    let init = fs::read_to_string(bundle.inside("init")).unwrap();
    for name in [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
    ] {
        let line = |text: &str| {
            text.lines()
                .find(|l| l.starts_with(&format!("{name}:")))
                .map(str::to_owned)
        };
        assert_eq!(line(&init), line(&out), "{name}");
        assert!(line(&init).is_some(), "{name}");
    }
    let namespaces = |text: &str| -> Vec<String> {
        let words = text.split_whitespace().filter(|w| w.contains(":["));
        words.map(str::to_owned).collect()
    };
    let init = namespaces(&fs::read_to_string(bundle.inside("init-ns")).unwrap());
    assert!(init.len() >= 7);
    assert_eq!(init, namespaces(&out));
}

/// Machine, I/O priority, and nice value and policy, which are the 19th and 41st field (proc_pid_stat(5)).
const PRIORITIES: &str = "uname -m; ionice -p $$; cut -d' ' -f 19,41 /proc/self/stat";

fn has_the_priorities_of_the_init() {
    let mut bundle = Bundle::new(&format!("{{ {PRIORITIES}; }} >/init; sleep 1000"));
    let process = &mut bundle.spec["process"];
    process["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
    process["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    bundle.spec["linux"]["personality"] = json!({"domain": "LINUX32"});
    bundle.create_and_start();
    let init = || fs::read_to_string(bundle.inside("init")).unwrap_or_default();
    until(|| init().lines().count() == 3, "the init tells");
    let own = bundle.done(&["exec", &bundle.id, "sh", "-c", PRIORITIES]);
    assert_eq!(own, init());
    let lines: Vec<&str> = own.lines().collect();
    assert!(lines[1].starts_with("idle") && lines[2] == "7 3", "{own}");
    assert!(!lines[0].contains("64"), "{own}");
    // A process of its own has its own.
    let file = bundle.path().join("process.json");
    let process = json!({
        "args": ["sh", "-c", PRIORITIES], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        "scheduler": {"policy": "SCHED_OTHER", "nice": 3},
    });
    fs::write(&file, process.to_string()).unwrap();
    let out = bundle.done(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert!(out.ends_with("\n3 0\n"), "{out}");
    // What the kernel refuses is told with the step.
    let process = json!({
        "args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0},
        "scheduler": {"policy": "SCHED_FIFO", "priority": 1000},
    });
    fs::write(&file, process.to_string()).unwrap();
    let error = bundle.refused(&["exec", "--process", file.to_str().unwrap(), &bundle.id]);
    assert!(error.contains("scheduler"), "{error}");
}

fn detached_with_a_pid_file() {
    let bundle = sleeper();
    bundle.create_and_start();
    let file = bundle.path().join("exec.pid");
    bundle.done(&[
        "exec",
        "-d",
        "--pid-file",
        file.to_str().unwrap(),
        &bundle.id,
        "sleep",
        "77",
    ]);
    let pid = fs::read_to_string(&file).unwrap();
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.contains("77"), "{command}");
    let pids: Vec<i32> =
        serde_json::from_str(&bundle.done(&["ps", "-f", "json", &bundle.id])).unwrap();
    assert!(pids.contains(&pid.parse().unwrap()), "{pids:?}");
}

fn commands_that_are_not_there() {
    let bundle = sleeper();
    bundle.create_and_start();
    for (command, code, word) in [
        ("nothing", 127, "not in the container's PATH"),
        ("/no/where", 127, "No such file"),
        ("/etc/passwd", 126, "Permission denied"),
    ] {
        let said = bundle.oci(&["exec", &bundle.id, command]);
        assert_eq!(said.code, code, "{said:?}");
        assert!(said.err.contains(word), "{said:?}");
    }
}

fn in_a_paused_container() {
    let bundle = sleeper();
    bundle.create_and_start();
    bundle.done(&["pause", &bundle.id]);
    assert!(
        bundle
            .refused(&["exec", &bundle.id, "true"])
            .contains("paused")
    );
    let child = bundle
        .command(&["exec", "--ignore-paused", &bundle.id, "touch", "/late"])
        .spawn()
        .unwrap();
    bundle.done(&["resume", &bundle.id]);
    assert_eq!(ended(child), 0);
    assert!(bundle.inside("late").exists());
}

/// Reads a terminal until it has said this.
fn hear(terminal: &mut fs::File, words: &str) -> String {
    let mut heard = String::new();
    let mut bytes = [0; 1024];
    while !heard.contains(words) {
        match terminal.read(&mut bytes) {
            Ok(n) if n > 0 => heard.push_str(&String::from_utf8_lossy(&bytes[..n])),
            other => panic!("{other:?} after {heard:?}"),
        }
    }
    heard
}

/// The terminal that is sent to a console socket.
fn terminal(listener: &UnixListener) -> fs::File {
    let (stream, _) = listener.accept().unwrap();
    slipway_runtime::terminal::receive(&stream).unwrap().into()
}

fn the_terminal_of_a_container() {
    let mut bundle = Bundle::new(
        "tty; stat -c %u $(tty); test -c /dev/console && echo console; read -r x; echo got $x",
    );
    bundle.spec["process"]["terminal"] = true.into();
    bundle.spec["process"]["user"] = json!({"uid": 33, "gid": 34});
    let path = bundle.path().to_str().unwrap();
    let error = bundle.refused(&["create", "-b", path, &bundle.id]);
    assert!(error.contains("--console-socket"), "{error}");
    bundle.nothing_left();
    // A name that does not fit into a socket's address.
    let dir = bundle.path().join("x".repeat(100));
    fs::create_dir(&dir).unwrap();
    let short = bundle.path().join("s");
    let listener = UnixListener::bind(&short).unwrap();
    fs::rename(&short, dir.join("console")).unwrap();
    let socket = dir.join("console");
    bundle.done(&[
        "create",
        "-b",
        path,
        "--console-socket",
        socket.to_str().unwrap(),
        &bundle.id,
    ]);
    let mut terminal = terminal(&listener);
    bundle.done(&["start", &bundle.id]);
    let heard = hear(&mut terminal, "console");
    assert!(
        heard.contains("/dev/pts/0") && heard.contains("33"),
        "{heard}"
    );
    terminal.write_all(b"word\n").unwrap();
    hear(&mut terminal, "got word");
    bundle.wait_for("stopped");
}

fn the_terminal_of_an_exec() {
    let bundle = sleeper();
    bundle.create_and_start();
    let socket = bundle.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let socket = socket.to_str().unwrap();
    let error = bundle.refused(&["exec", "--console-socket", socket, &bundle.id, "tty"]);
    assert!(error.contains("no terminal"), "{error}");
    bundle.done(&[
        "exec",
        "-d",
        "-t",
        "--console-socket",
        socket,
        &bundle.id,
        "sh",
        "-c",
        "tty; read -r x; echo got $x",
    ]);
    let mut terminal = terminal(&listener);
    hear(&mut terminal, "/dev/pts/");
    terminal.write_all(b"word\n").unwrap();
    hear(&mut terminal, "got word");
    // In the foreground the command serves the terminal itself.
    let out = bundle.done(&["exec", "-t", &bundle.id, "sh", "-c", "tty; echo end"]);
    assert!(
        out.contains("/dev/pts/") && out.contains("end\r\n"),
        "{out:?}"
    );
}
