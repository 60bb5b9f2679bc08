//! A bundle, a place for state, and commands on them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything may take here.
pub const LONG: Duration = Duration::from_secs(30);

const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "sleep", "id", "ls", "grep", "touch", "true", "false", "test", "tty",
    "hostname", "mkdir", "readlink", "stat", "mknod", "head", "dd", "ps", "env", "pwd", "kill",
    "ip", "mount", "uname", "ionice", "cut",
];

/// A bundle with a container's id, deleted with all that is left of it.
pub struct Bundle {
    dir: tempfile::TempDir,
    pub id: String,
    pub spec: Value,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Bundle {
    /// A container that runs a shell script.
    pub fn new(script: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::tempdir().unwrap();
        // In a user namespace somebody else has to pass.
        fs::set_permissions(
            dir.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let rootfs = dir.path().join("rootfs");
        for place in ["bin", "etc", "tmp", "root", "proc", "sys", "dev"] {
            fs::create_dir_all(rootfs.join(place)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        fs::write(
            rootfs.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\n",
        )
        .unwrap();
        let id = format!("test-{}-{n}", std::process::id());
        let pid = nix::unistd::Pid::this();
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "hostname": "inside",
            "process": {
                "args": ["/bin/sh", "-c", script],
                "cwd": "/",
                "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL", "CAP_CHOWN"],
                    "permitted": ["CAP_KILL", "CAP_CHOWN"],
                },
                "noNewPrivileges": true,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            ],
            "linux": {
                "cgroupsPath": format!("/slipway-oci-tests/{pid}/{id}"),
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"},
                ],
            },
        });
        Self { dir, id, spec }
    }

    /// The bundle's directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A file of its root file system.
    pub fn inside(&self, name: &str) -> PathBuf {
        self.dir.path().join("rootfs").join(name)
    }

    /// Where state is kept.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn log(&self) -> PathBuf {
        self.dir.path().join("log.json")
    }

    /// A command, ready to be run.
    pub fn command(&self, args: &[&str]) -> Command {
        fs::write(self.path().join("config.json"), self.spec.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_slipway"));
        command
            .arg("oci")
            .arg("--root")
            .arg(self.root())
            .arg("--log")
            .arg(self.log());
        command.args(["--log-format", "json"]).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command, within [`LONG`].
    pub fn oci(&self, args: &[&str]) -> Said {
        let mut command = self.command(args);
        // Files: what a container keeps open would keep a pipe open.
        let (out, err) = (self.path().join("out"), self.path().join("err"));
        let file = |path: &Path| {
            fs::File::options()
                .append(true)
                .create(true)
                .open(path)
                .unwrap()
        };
        let _ = (fs::remove_file(&out), fs::remove_file(&err));
        let child = command
            .stdout(file(&out))
            .stderr(file(&err))
            .spawn()
            .unwrap();
        let code = ended(child);
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        Said {
            code,
            out: read(&out),
            err: read(&err),
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn done(&self, args: &[&str]) -> String {
        let said = self.oci(args);
        assert_eq!(said.code, 0, "{args:?}: {said:?}");
        said.out
    }

    /// Runs a command that must fail; what it says, which must be the log's last words, too.
    #[track_caller]
    pub fn refused(&self, args: &[&str]) -> String {
        let said = self.oci(args);
        assert_ne!(said.code, 0, "{args:?}: {said:?}");
        let log = fs::read_to_string(self.log()).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "error");
        assert!(
            said.err.contains(last["msg"].as_str().unwrap()),
            "{last} {said:?}"
        );
        said.err
    }

    pub fn create(&self) {
        let bundle = self.path().to_str().unwrap();
        self.done(&["create", "--bundle", bundle, &self.id]);
    }

    pub fn create_and_start(&self) {
        self.create();
        self.done(&["start", &self.id]);
    }

    /// Runs the container to its end.
    pub fn run(&self) -> Said {
        let bundle = self.path().to_str().unwrap();
        self.oci(&["run", "--bundle", bundle, &self.id])
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.done(&["state", &self.id])).unwrap()
    }

    /// Waits until the container is in a state.
    #[track_caller]
    pub fn wait_for(&self, status: &str) {
        until(|| self.state()["status"] == status, status);
    }

    /// The container's cgroup in the hierarchy that has this controller.
    pub fn cgroup_file(&self, v1: &str, v2: &str) -> PathBuf {
        let path = self.spec["linux"]["cgroupsPath"].as_str().unwrap();
        let (controller, _) = v1.split_once('.').unwrap();
        let first = Path::new("/sys/fs/cgroup")
            .join(controller)
            .join(&path[1..])
            .join(v1);
        match first.exists() {
            true => first,
            false => Path::new("/sys/fs/cgroup").join(&path[1..]).join(v2),
        }
    }

    /// That nothing is left of it: no state, no cgroup, no process.
    #[track_caller]
    pub fn nothing_left(&self) {
        let left = fs::read_dir(self.root()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "state");
        let path = self.spec["linux"]["cgroupsPath"].as_str().unwrap();
        for hierarchy in ["", "memory", "unified", "pids", "freezer"] {
            let dir = Path::new("/sys/fs/cgroup").join(hierarchy).join(&path[1..]);
            assert!(!dir.exists(), "{}", dir.display());
        }
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            let own = line.contains(self.id.as_str());
            assert!(!own || line.contains("tests"), "{line}");
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).output();
        let path = format!("slipway-oci-tests/{}", nix::unistd::Pid::this());
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = fs::remove_dir(hierarchy.path().join(&path));
            let _ = fs::remove_dir(hierarchy.path().join("slipway-oci-tests"));
        }
    }
}

/// Waits for something to become true.
#[track_caller]
pub fn until(true_yet: impl Fn() -> bool, what: &str) {
    let deadline = Instant::now() + LONG;
    while !true_yet() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for a command's end: its exit code, or 128 and the signal.
#[track_caller]
pub fn ended(mut child: Child) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap());
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the command did not end in time");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
