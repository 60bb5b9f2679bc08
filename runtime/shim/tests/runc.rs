//! The client against the shim that others wrote: `containerd-shim-runc-v2`, with runc below it. It runs itself again in
//! mount and network namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use slipway_shim::{
    Address, Create, Defaults, Exec, Options, Process, Program, Sandbox, ShimError, Task, Version,
    wait_answer,
};

const SHIM: &str = "/usr/bin/containerd-shim-runc-v2";
const BUSYBOX: &str = "/bin/busybox";
const SOON: Duration = Duration::from_secs(20);
const INSIDE: &str = "SLIPWAY_SHIM_TEST_INSIDE";

fn main() -> ExitCode {
    let runc = ["/usr/sbin/runc", "/usr/bin/runc"];
    if !Path::new(SHIM).exists() || !runc.iter().any(|p| Path::new(p).exists()) {
        println!("SKIPPED: needs {SHIM} and runc (Debian's containerd package)");
        return ExitCode::SUCCESS;
    }
    if !Path::new(BUSYBOX).exists() {
        println!("SKIPPED: needs {BUSYBOX} (Debian's busybox-static package)");
        return ExitCode::SUCCESS;
    }
    if std::env::var_os(INSIDE).is_none() {
        let status = Command::new("unshare")
            .args(["--mount", "--net", "--propagation", "private"])
            .arg(std::env::current_exe().unwrap())
            .env(INSIDE, "1")
            .status();
        return match status {
            Ok(status) if status.success() => ExitCode::SUCCESS,
            Ok(status) => {
                println!("failed: {status}");
                ExitCode::FAILURE
            }
            Err(e) => {
                println!("SKIPPED: needs unshare(1): {e}");
                ExitCode::SUCCESS
            }
        };
    }
    let mut place = Place::new();
    life(&mut place);
    println!("ok: a container's life");
    death(&mut place);
    println!("ok: a shim that is killed");
    silence(&mut place);
    println!("ok: a shim that stops answering");
    ExitCode::SUCCESS
}

struct Place {
    dir: tempfile::TempDir,
    program: Program,
    options: Options,
    count: u32,
    /// Keeps the other side of the FIFOs for the shims' logs open.
    logs: Vec<File>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // What shims make beside their bundles goes with the mount namespace.
        mount(&["-t", "tmpfs", "tmpfs", "/run"]);
        let events = dir.path().join("events.sock");
        let listener = UnixListener::bind(&events).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut receiver = slipway_shim::events::Receiver::default();
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut buffer) {
                        let (answers, _) = receiver.feed(&buffer[..n]).unwrap();
                        std::io::Write::write_all(&mut stream, &answers).unwrap();
                    }
                });
            }
        });
        let root = dir.path().join("runc");
        let defaults = Defaults {
            root: root.to_str().unwrap(),
            systemd: false,
            owner: (0, 0),
        };
        let options = Options::new(Path::new(SHIM), "", defaults)
            .unwrap()
            .unwrap();
        Self {
            program: Program {
                path: SHIM.into(),
                namespace: "slipway-test".into(),
                events,
                publisher: "/bin/true".into(),
                debug: false,
            },
            options,
            dir,
            count: 0,
            logs: Vec::new(),
        }
    }

    /// The cgroup of all its containers'.
    fn cgroup() -> String {
        format!("slipway-shim-test-{}", std::process::id())
    }

    /// A bundle whose root holds a static busybox, a copy: nothing of the host may be mounted below a directory that the
    /// test removes.
    fn bundle(&mut self, command: &str) -> Bundle {
        self.count += 1;
        let id = format!("t{}-{}", std::process::id(), self.count);
        let path = self.dir.path().join(&id);
        let bin = path.join("rootfs/bin");
        fs::create_dir_all(path.join("rootfs/proc")).unwrap();
        fs::create_dir_all(&bin).unwrap();
        fs::copy(BUSYBOX, bin.join("busybox")).unwrap();
        for name in ["sh", "sleep"] {
            std::os::unix::fs::symlink("busybox", bin.join(name)).unwrap();
        }
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {
                "cwd": "/", "args": ["/bin/sh", "-c", command], "user": {"uid": 0, "gid": 0},
                "env": ["PATH=/usr/bin:/bin"],
            },
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", Self::cgroup()),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            },
        });
        fs::write(path.join("config.json"), config.to_string()).unwrap();
        for name in ["out", "err", "log", "exec-out", "exec-err"] {
            fifo(&path.join(name));
        }
        self.logs.push(open(&path.join("log")));
        Bundle { id, path }
    }
}

struct Bundle {
    id: String,
    path: PathBuf,
}

impl Bundle {
    fn file(&self, name: &str) -> String {
        self.path.join(name).to_str().unwrap().to_owned()
    }

    fn create(&self, place: &Place) -> (Task, Address) {
        let address = place
            .program
            .start(&self.id, &self.path, Some(&place.options), SOON)
            .unwrap();
        let mut task = Task::connect(&address, SOON).unwrap();
        let (stdout, stderr) = (self.file("out"), self.file("err"));
        let create = Create {
            id: &self.id,
            bundle: self.path.to_str().unwrap(),
            stdout: &stdout,
            stderr: &stderr,
            ..Create::default()
        };
        let pid = task.create(&create, Some(&place.options), SOON).unwrap();
        assert!(pid > 0);
        (task, address)
    }
}

impl Drop for Place {
    /// runc removes the containers' cgroups, and leaves what they were in.
    fn drop(&mut self) {
        let top = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(top).into_iter().flatten().flatten();
        for hierarchy in hierarchies.map(|e| e.path()).chain([top.to_owned()]) {
            let _ = fs::remove_dir(hierarchy.join(Self::cgroup()));
        }
    }
}

fn mount(args: &[&str]) {
    assert!(Command::new("mount").args(args).status().unwrap().success());
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Both ends of a FIFO, so that nobody waits for one.
fn open(path: &Path) -> File {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

fn read_now(file: &mut File) -> String {
    let mut text = Vec::new();
    let _ = file.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

fn life(place: &mut Place) {
    let bundle =
        place.bundle("echo out; echo err >&2; until [ -e /go ]; do sleep 0.05; done; exit 7");
    let (mut out, mut err) = (
        open(&bundle.path.join("out")),
        open(&bundle.path.join("err")),
    );
    let (mut task, address) = bundle.create(place);
    assert_eq!(address.version, Version::V2);
    // It has no sandbox API, and says so in a way that is known.
    let mut sandbox = Sandbox::connect(&address, SOON).unwrap();
    assert!(
        sandbox
            .ping(&bundle.id, SOON)
            .unwrap_err()
            .is_unimplemented()
    );

    let init = Process::init(&bundle.id);
    let (shim, pid) = task.pids_of(&bundle.id, SOON).unwrap();
    assert!(shim > 0 && pid > 0 && shim != pid);
    assert_eq!(task.state(init, SOON).unwrap(), None);
    let number = task.send_wait(init).unwrap();
    task.start(init, SOON).unwrap();
    // Not before: this shim, in version 1.6, can miss the end of a process that ends while it is started.
    fs::write(bundle.path.join("rootfs/go"), "").unwrap();
    let until = Instant::now() + SOON;
    let exit = loop {
        assert!(Instant::now() < until, "the shim does not tell of the end");
        task.client().receive("Wait").unwrap();
        if let Some((of, result)) = task.client().next("Wait").unwrap() {
            assert_eq!(of, number);
            break wait_answer(result).unwrap();
        }
        std::thread::yield_now();
    };
    assert_eq!(exit.code, 7);
    assert_eq!(task.state(init, SOON).unwrap().map(|e| e.code), Some(7));
    // All output has been handed on when this is answered.
    assert_eq!(task.delete(init, SOON).unwrap().code, 7);
    assert_eq!(
        (read_now(&mut out).as_str(), read_now(&mut err).as_str()),
        ("out\n", "err\n")
    );
    let gone = task.delete(init, SOON).unwrap_err();
    assert!(gone.is_not_found(), "{gone:?}");
    task.shutdown(&bundle.id, false, SOON).unwrap();
    let after = Task::connect(&address, SOON).and_then(|mut task| task.wait(init, SOON));
    assert!(after.is_err());

    // A command that is not there, in runc's own words.
    let bundle = place.bundle("x");
    let config = fs::read_to_string(bundle.path.join("config.json")).unwrap();
    fs::write(
        bundle.path.join("config.json"),
        config.replace("/bin/sh", "/nonexistent"),
    )
    .unwrap();
    let address = place
        .program
        .start(&bundle.id, &bundle.path, Some(&place.options), SOON)
        .unwrap();
    let mut task = Task::connect(&address, SOON).unwrap();
    let create = Create {
        id: &bundle.id,
        bundle: bundle.path.to_str().unwrap(),
        ..Create::default()
    };
    let error = task
        .create(&create, Some(&place.options), SOON)
        .unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    task.shutdown(&bundle.id, true, SOON).unwrap();
}

fn death(place: &mut Place) {
    let bundle = place.bundle("sleep 1000");
    let (_out, _err) = (
        open(&bundle.path.join("out")),
        open(&bundle.path.join("err")),
    );
    let (mut task, address) = bundle.create(place);
    let init = Process::init(&bundle.id);
    task.start(init, SOON).unwrap();
    let stats = task.stats(&bundle.id, SOON).unwrap();
    assert!(stats.pids() > 0, "{stats:?}");
    assert!(task.pids(&bundle.id, SOON).unwrap().len() == 1);
    let resources = br#"{"memory":{"limit":67108864}}"#;
    task.update(&bundle.id, resources, SOON).unwrap();
    task.pause(&bundle.id, SOON).unwrap();
    task.resume(&bundle.id, SOON).unwrap();

    // A second command in it, and its own end.
    let mut exec_out = open(&bundle.path.join("exec-out"));
    let (stdout, stderr) = (bundle.file("exec-out"), bundle.file("exec-err"));
    let _exec_err = open(&bundle.path.join("exec-err"));
    let process = serde_json::json!({"cwd": "/", "args": ["/bin/sh", "-c", "echo hi; exit 3"], "user": {"uid": 0, "gid": 0}});
    let exec = Exec {
        id: &bundle.id,
        exec: "e1",
        stdout: &stdout,
        stderr: &stderr,
        process: process.to_string().into_bytes(),
        ..Exec::default()
    };
    task.exec(&exec, SOON).unwrap();
    let command = Process {
        id: &bundle.id,
        exec: "e1",
    };
    task.start(command, SOON).unwrap();
    assert_eq!(task.wait(command, SOON).unwrap().code, 3);
    assert_eq!(task.delete(command, SOON).unwrap().code, 3);
    assert_eq!(read_now(&mut exec_out), "hi\n");

    let (shim, pid) = task.pids_of(&bundle.id, SOON).unwrap();
    task.send_wait(init).unwrap();
    signal(shim, "KILL");
    let closed = loop {
        match task.client().receive("Wait") {
            Ok(()) => std::thread::yield_now(),
            Err(e) => break e,
        }
    };
    assert!(closed.is_gone(), "{closed:?}");
    assert!(task.wait(init, SOON).unwrap_err().is_gone());
    assert!(Task::connect(&address, SOON).unwrap_err().is_gone());
    // The container lives on without it, until the program clears up.
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let exit = place
        .program
        .delete(&bundle.id, &bundle.path, SOON)
        .unwrap();
    assert_eq!(exit.code, 137);
    let gone = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state.is_empty() || state.contains(") Z ")
    });
    assert!(gone);
}

fn silence(place: &mut Place) {
    let bundle = place.bundle("sleep 1000");
    let (_out, _err) = (
        open(&bundle.path.join("out")),
        open(&bundle.path.join("err")),
    );
    let (mut task, address) = bundle.create(place);
    let (shim, _) = task.pids_of(&bundle.id, SOON).unwrap();
    signal(shim, "STOP");
    let moment = Duration::from_millis(200);
    let init = Process::init(&bundle.id);
    for error in [
        task.start(init, moment).unwrap_err(),
        Task::connect(&address, moment)
            .unwrap()
            .wait(init, moment)
            .unwrap_err(),
    ] {
        assert!(matches!(error, ShimError::TimedOut { .. }), "{error:?}");
    }
    signal(shim, "CONT");
    // What came too late is not taken for the answer to the next call.
    assert_eq!(task.pids_of(&bundle.id, SOON).unwrap().0, shim);
    task.kill(init, 9, true, SOON).unwrap();
    assert_eq!(task.wait(init, SOON).unwrap().code, 137);
    task.delete(init, SOON).unwrap();
    task.shutdown(&bundle.id, false, SOON).unwrap();
}

fn signal(pid: u32, name: &str) {
    let kill = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status();
    assert!(kill.unwrap().success());
}
