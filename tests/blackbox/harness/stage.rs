//! The three lives of the test program: outside, which makes the namespaces and removes cgroups at the end;
//! `init`, process 1 of the PID namespace, which reaps; and `run`, which runs the tests.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use super::{Driver, LOGIN_REGISTRY, REGISTRY, Test, cgroups, runner, seconds};

/// Names the life; carries the name of the cgroup.
const STAGE: &str = "SLIPWAY_BLACKBOX_STAGE";
const CGROUP: &str = "SLIPWAY_BLACKBOX_CGROUP";

/// The program.
pub fn main(tests: &[Test]) -> ExitCode {
    match std::env::var(STAGE).as_deref() {
        Ok("init") => init(),
        Ok("run") => run(tests),
        _ if std::env::args().any(|a| a == "--list") => {
            tests.iter().for_each(|t| println!("{}: test", t.name));
            ExitCode::SUCCESS
        }
        _ => outside(),
    }
}

fn outside() -> ExitCode {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED blackbox: needs root (namespaces, mounts, cgroups)");
        println!("0 passed, 0 failed, 1 skipped");
        return ExitCode::SUCCESS;
    }
    let driver = match Driver::of_run() {
        Ok(driver) => driver,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let cgroup = driver.top(std::process::id());
    let myself = std::env::current_exe().expect("our own path");
    // Standard input is a pipe of ours: when we die, however, the inner stages see its end.
    let child = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["--propagation", "private", "--"])
        .arg(myself)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "init")
        .env(CGROUP, &cgroup)
        .stdin(Stdio::piped())
        .spawn();
    let status = match child {
        // wait() would close the pipe first.
        Ok(mut child) => {
            let pipe = child.stdin.take();
            let status = child.wait();
            drop(pipe);
            status
        }
        Err(error) => {
            eprintln!("can't run unshare(1): {error}; install util-linux");
            return ExitCode::FAILURE;
        }
    };
    if driver == Driver::Systemd {
        cgroups::stop_top(&cgroup);
    }
    remove_cgroups(&cgroup);
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            if let Some(signal) = status.signal() {
                eprintln!("the tests were ended by signal {signal}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("waiting for the tests: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Process 1: starts the tests, reaps orphans, and ends (and with it everything) when they have ended.
fn init() -> ExitCode {
    use nix::sys::wait::{WaitStatus, wait};
    let myself = std::env::current_exe().expect("our own path");
    let runner = Command::new(myself)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "run")
        .spawn();
    let runner =
        nix::unistd::Pid::from_raw(runner.expect("the tests' own process").id().cast_signed());
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == runner => {
                return ExitCode::from(u8::try_from(code).unwrap_or(1));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == runner => {
                eprintln!("the tests were ended by {signal}");
                return ExitCode::FAILURE;
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                eprintln!("waiting: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

fn run(tests: &[Test]) -> ExitCode {
    use nix::mount::{MsFlags, mount};
    std::thread::spawn(|| {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        eprintln!("the test program outside has gone");
        std::process::exit(1);
    });
    let none = None::<&str>;
    // Short paths for sockets, and locks of our own; gone with the namespace.
    let from_systemd = keep_systemd();
    mount(
        Some("slipway-test"),
        "/run",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .expect("a /run of our own");
    std::fs::create_dir_all("/run/lock").expect("/run/lock");
    show_systemd(&from_systemd);
    // What the daemon finds on an ordinary machine, where systemd has made / shared.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).expect("shared propagation");
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(
        up.is_ok_and(|s| s.success()),
        "can't bring lo up with ip(8); install iproute2"
    );
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("ip_forward");
    let registry = Registry::start();
    let cgroup = std::env::var(CGROUP).expect("the name of the cgroup");
    let driver = Driver::of_run().expect("the driver that was good outside");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("an event loop");
    let good = runtime.block_on(runner::run(tests, Path::new("/run"), &cgroup, driver));
    runtime.shutdown_timeout(seconds(1));
    drop(registry);
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The directories of /run in which systemd listens.
const SYSTEMD: [&str; 2] = ["/run/systemd", "/run/dbus"];

/// Whether systemd is PID 1 outside, on pure cgroup v2, so that the systemd driver can be tested.
pub fn systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Why other runtimes are not tested under the systemd driver here.
pub const NO_PROCESS_IDS: &str = "runc and crun tell systemd ids of processes, which are others in the tests' PID namespace; \
     integration/vm/test-unit runs them under it";

/// Whether cgroup v2 is the only hierarchy.
pub fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Takes hold of systemd's sockets before /run is covered.
fn keep_systemd() -> Vec<(std::fs::File, &'static str)> {
    if !unified() || !systemd() {
        return Vec::new();
    }
    let open = |dir: &'static str| Some((std::fs::File::open(dir).ok()?, dir));
    SYSTEMD.into_iter().filter_map(open).collect()
}

fn show_systemd(kept: &[(std::fs::File, &'static str)]) {
    use std::os::fd::AsRawFd as _;
    for (dir, at) in kept {
        std::fs::create_dir_all(at).expect("a mount point");
        let from = format!("/proc/self/fd/{}", dir.as_raw_fd());
        let flags = nix::mount::MsFlags::MS_BIND | nix::mount::MsFlags::MS_REC;
        let none = None::<&str>;
        nix::mount::mount(Some(from.as_str()), *at, none, flags, none).expect("systemd's sockets");
    }
}

/// The registries that `hack/test-image serve` runs, until its standard input is closed.
struct Registry(std::process::Child);

impl Registry {
    fn start() -> Self {
        let port = |address: &str| address.rsplit(':').next().expect("a port").to_owned();
        let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let mut child = Command::new(repository.join("hack/test-image"))
            .arg("serve")
            .arg(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("test-images"))
            .args([
                "--port",
                &port(REGISTRY),
                "--auth-port",
                &port(LOGIN_REGISTRY),
                "--data",
                "/run/registry",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("hack/test-image");
        let mut line = String::new();
        let out = child.stdout.take().expect("its standard output");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)
            .expect("its answer");
        assert_eq!(line, "ready\n", "hack/test-image serve did not come up");
        Self(child)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().ok();
    }
}

/// Directories below `dir`, the deepest first, and then `dir`.
pub fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.extend(tree(&entry.path()));
        }
    }
    all.push(dir.to_owned());
    all
}

/// The directories of a cgroup in the hierarchies that are mounted here.
pub fn cgroup_dirs(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let mut tops = vec![top.to_owned()];
    tops.extend(
        std::fs::read_dir(top)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path()),
    );
    let name = name.trim_start_matches('/');
    let mut dirs: Vec<_> = tops
        .iter()
        .map(|t| t.join(name))
        .filter(|d| d.is_dir())
        .collect();
    // Hierarchies may be mounted under two names (cpu -> cpu,cpuacct).
    dirs.sort_by_key(|d| d.canonicalize().ok());
    dirs.dedup_by_key(|d| d.canonicalize().ok());
    dirs
}

/// Removes the cgroups of a run; their processes have died with the PID namespace.
fn remove_cgroups(name: &str) {
    let until = Instant::now() + seconds(5);
    loop {
        for dir in cgroup_dirs(name) {
            for dir in tree(&dir) {
                std::fs::write(dir.join("freezer.state"), "THAWED").ok();
                std::fs::remove_dir(dir).ok();
            }
        }
        let left = cgroup_dirs(name);
        if left.is_empty() {
            return;
        }
        if Instant::now() > until {
            eprintln!("cgroups are left: {left:?}");
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
