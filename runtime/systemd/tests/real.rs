//! Against a real systemd: scopes and slices come, keep their limits, and go, also while it restarts.
//!
//! Needs root and a machine whose PID 1 is systemd on pure cgroup v2; says SKIPPED elsewhere. A scope is made
//! around the process that asks, so each is asked for by a process of its own: this binary again.
#![allow(clippy::unwrap_used)] // A test.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use slipway_systemd::{Scope, Systemd, Value, booted, expand_slice};

/// Emulated processors are slow: this says nothing about how long anything should take.
const ENOUGH: Duration = Duration::from_secs(600);
const MEMORY: u64 = 64 << 20;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, word, unit, slice] = args.as_slice()
        && word == "hold"
    {
        return hold(unit, slice);
    }
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    if !booted() || !unified || !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root, and systemd as PID 1 on pure cgroup v2");
        return;
    }
    let version = Systemd::here().unwrap().version(ENOUGH).unwrap();
    println!("systemd {version}");
    for (name, test) in [
        ("a scope lives and dies", one as fn()),
        ("limits outlive a reload", reload),
        ("a slice comes and goes", slice),
        ("two hundred at once", many),
        ("while systemd executes itself again", reexec),
    ] {
        let began = Instant::now();
        test();
        println!(
            "test {name} ... ok ({:.1} s)",
            began.elapsed().as_secs_f32()
        );
    }
}

/// Goes into a scope, says where it is, and stays until standard input ends.
fn hold(unit: &str, slice: &str) {
    let properties = [
        ("MemoryMax", Value::U64(MEMORY)),
        ("MemorySwapMax", Value::U64(0)),
        ("TasksMax", Value::U64(u64::MAX)),
        ("CPUWeight", Value::U64(39)),
        ("CPUQuotaPeriodUSec", Value::U64(50_000)),
        ("CPUQuotaPerSecUSec", Value::U64(250_000)),
        ("AllowedCPUs", Value::Bytes(vec![1])),
    ];
    let scope = Scope {
        unit,
        slice,
        process: 0,
        description: "a scope of slipway's tests",
        properties: &properties,
    };
    let joined = || own_cgroup().ends_with(unit);
    let began = Instant::now();
    let result = Systemd::here()
        .and_then(|systemd| systemd.start_scope(&scope, ENOUGH, &joined))
        .map_err(|e| e.to_string());
    match result {
        Ok(()) => println!("{} {}", began.elapsed().as_micros(), own_cgroup()),
        Err(e) => println!("failed: {e}"),
    }
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn own_cgroup() -> String {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    text.trim().strip_prefix("0::").unwrap().to_owned()
}

struct Holder {
    child: Child,
    unit: String,
    slice: String,
}

impl Holder {
    fn start(unit: &str, slice: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["hold", unit, slice])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            unit: unit.to_owned(),
            slice: slice.to_owned(),
        }
    }

    /// Microseconds that it took, when it is where it should be.
    fn wait(&mut self) -> u64 {
        let mut line = String::new();
        let out = self.child.stdout.as_mut().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        let line = line.trim();
        let (micros, cgroup) = line.split_once(' ').unwrap();
        let expected = format!("{}/{}", expand_slice(&self.slice).unwrap(), self.unit);
        assert_eq!(cgroup, expected, "{line}");
        micros.parse().unwrap()
    }

    fn dir(&self) -> PathBuf {
        let slice = expand_slice(&self.slice).unwrap();
        PathBuf::from(format!("/sys/fs/cgroup{slice}/{}", self.unit))
    }

    fn read(&self, file: &str) -> String {
        let text = std::fs::read_to_string(self.dir().join(file)).unwrap();
        text.trim().to_owned()
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

fn limits_stand(holder: &Holder) {
    for (file, value) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("pids.max", "max"),
        ("cpu.weight", "39"),
        ("cpu.max", "12500 50000"),
        ("cpuset.cpus", "0"),
    ] {
        // A machine without swap has no file for its limit.
        if holder.dir().join(file).exists() {
            assert_eq!(holder.read(file), value, "{file}");
        }
    }
}

fn gone(dir: &Path) {
    let began = Instant::now();
    while dir.exists() {
        assert!(began.elapsed() < ENOUGH, "{} stays", dir.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn systemctl(args: &[&str]) -> String {
    let output = Command::new("systemctl").args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn one() {
    let mut holder = Holder::start("slipway-test-one.scope", "slipwaytest-a.slice");
    println!("  in {} µs", holder.wait());
    limits_stand(&holder);
    let controllers = holder.read("cgroup.controllers");
    assert!(
        controllers.contains("memory") && controllers.contains("io"),
        "{controllers}"
    );
    // A second one of the name is somebody else's.
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["hold", "slipway-test-one.scope", "slipwaytest-a.slice"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(
        text.contains("has a unit") && text.contains("active"),
        "{text}"
    );
    let dir = holder.dir();
    // Stopped with somebody in it: systemd ends them.
    Systemd::here()
        .unwrap()
        .stop("slipway-test-one.scope", ENOUGH)
        .unwrap();
    gone(&dir);
    holder.end();
    // By the end of its last process.
    let mut holder = Holder::start("slipway-test-one.scope", "slipwaytest-a.slice");
    holder.wait();
    let dir = holder.dir();
    holder.end();
    gone(&dir);
    Systemd::here()
        .unwrap()
        .stop("slipway-test-one.scope", ENOUGH)
        .unwrap();
}

fn reload() {
    let mut holder = Holder::start("slipway-test-two.scope", "slipwaytest-a.slice");
    holder.wait();
    limits_stand(&holder);
    // A child of ours, and a file that systemd does not know of, are left alone.
    std::fs::create_dir(holder.dir().join("exec-1")).unwrap();
    systemctl(&["daemon-reload"]);
    limits_stand(&holder);
    // Another unit's change makes systemd write its own idea of the siblings again.
    systemctl(&[
        "set-property",
        "--runtime",
        "slipwaytest-a.slice",
        "CPUWeight=77",
        "MemoryMax=1G",
    ]);
    systemctl(&["daemon-reexec"]);
    let _ = Systemd::here().unwrap().version(ENOUGH).unwrap();
    limits_stand(&holder);
    assert!(holder.dir().join("exec-1").exists());
    let dir = holder.dir();
    holder.end();
    gone(&dir);
}

fn slice() {
    let systemd = Systemd::here().unwrap();
    let (unit, path) = (
        "slipwaytest-b-c.slice",
        expand_slice("slipwaytest-b-c.slice").unwrap(),
    );
    let dir = PathBuf::from(format!("/sys/fs/cgroup{path}"));
    let exists = || dir.is_dir();
    systemd
        .start_slice(unit, "a test's", ENOUGH, &exists)
        .unwrap();
    assert!(exists());
    systemd
        .start_slice(unit, "a test's", ENOUGH, &exists)
        .unwrap();
    systemd.stop(unit, ENOUGH).unwrap();
    gone(&dir);
    systemd.stop(unit, ENOUGH).unwrap();
}

fn many() {
    let began = Instant::now();
    let mut all: Vec<_> = (0..200)
        .map(|i| Holder::start(&format!("slipway-test-{i}.scope"), "slipwaytest-many.slice"))
        .collect();
    let mut times: Vec<u64> = all.iter_mut().map(Holder::wait).collect();
    println!("  200 scopes in {:.1} s", began.elapsed().as_secs_f32());
    times.sort_unstable();
    println!("  median {} µs, longest {} µs", times[100], times[199]);
    let dirs: Vec<_> = all.iter().map(Holder::dir).collect();
    all.into_iter().for_each(Holder::end);
    dirs.iter().for_each(|dir| gone(dir));
    Systemd::here()
        .unwrap()
        .stop("slipwaytest-many.slice", ENOUGH)
        .unwrap();
}

fn reexec() {
    let mut restart = Command::new("systemctl")
        .arg("daemon-reexec")
        .spawn()
        .unwrap();
    let mut all: Vec<_> = (0..20)
        .map(|i| {
            Holder::start(
                &format!("slipway-test-r{i}.scope"),
                "slipwaytest-many.slice",
            )
        })
        .collect();
    restart.wait().unwrap();
    for holder in &mut all {
        holder.wait();
        limits_stand(holder);
    }
    let dirs: Vec<_> = all.iter().map(Holder::dir).collect();
    all.into_iter().for_each(Holder::end);
    dirs.iter().for_each(|dir| gone(dir));
    Systemd::here()
        .unwrap()
        .stop("slipwaytest.slice", ENOUGH)
        .unwrap();
}
