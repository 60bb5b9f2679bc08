//! Other people's filters: what runc and crun really load, read back out of the kernel.
//!
//! A container is created, not started: its init has loaded the filter and waits. Its program is read with
//! `PTRACE_SECCOMP_GET_FILTER`, which needs CAP_SYS_ADMIN; then the container is deleted.

use oci_spec::runtime::{Capabilities, LinuxSeccomp};
use serde_json::json;
use slipway_seccomp::Instruction;
use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::unix::{fs::PermissionsExt, net::UnixDatagram, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// `PTRACE_SECCOMP_GET_FILTER` (linux/ptrace.h).
const GET_FILTER: libc::c_uint = 0x420c;

/// An OCI runtime on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: &'static str,
    /// Whether it answers calls newer than the profile with ENOSYS, whatever the default.
    pub enosys_for_newer: bool,
}

pub const RUNC: Peer = Peer {
    name: "runc",
    enosys_for_newer: true,
};
pub const CRUN: Peer = Peer {
    name: "crun",
    enosys_for_newer: false,
};

/// The peers that are installed, after a word about those that aren't; none without the privilege.
pub fn peers() -> Vec<Peer> {
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: creating containers and reading their filters needs root");
        return Vec::new();
    }
    let installed = |p: &Peer| {
        let found = find(p.name).is_some();
        if !found {
            println!(
                "SKIPPED: {} is not installed (Debian package {})",
                p.name, p.name
            );
        }
        found
    };
    [RUNC, CRUN].into_iter().filter(installed).collect()
}

/// An executable in PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|d| d.join(name))
        .find(|p| p.is_file())
}

/// One container that was created and is deleted when this is dropped.
struct Created<'a> {
    peer: Peer,
    root: &'a Path,
    id: String,
}

impl Drop for Created<'_> {
    fn drop(&mut self) {
        // Fails where creating failed; what matters is that nothing stays.
        let _ = command(self.peer, self.root, &["delete", "--force", &self.id])
            .stderr(Stdio::null())
            .status();
        // A create that fails half way leaves cgroups, and so does crun on hosts with both versions.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let group = hierarchy.path().join(&self.id);
            if group.is_dir()
                && let Err(e) = fs::remove_dir(&group)
            {
                eprintln!("{} left {} behind: {e}", self.peer.name, group.display());
            }
        }
    }
}

/// A command of the runtime, ended after 20 s (libseccomp 2.5 loops for ever on some contradictions), in a mount namespace of its own.
fn command(peer: Peer, root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", "20", peer.name, "--root"])
        .arg(root)
        .args(args);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // SAFETY: the hook makes three system calls with constant arguments and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(io::Error::last_os_error());
            }
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let none = std::ptr::null();
            if libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0 {
                return Err(io::Error::last_os_error());
            }
            // crun refuses hosts with both cgroup versions; where there is no such mount, fine.
            libc::umount2(c"/sys/fs/cgroup/unified".as_ptr(), libc::MNT_DETACH);
            Ok(())
        });
    }
    command
}

/// The program that `peer` loads for `profile` into a container without capabilities.
pub fn program_of(peer: Peer, profile: &LinuxSeccomp) -> Result<Vec<Instruction>, String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (root, rootfs) = (dir.path().join("state"), dir.path().join("rootfs"));
    for d in ["proc", "dev"] {
        fs::create_dir_all(rootfs.join(d)).map_err(|e| e.to_string())?;
    }
    // Looked up when the container is created; never run.
    let init = rootfs.join("init");
    fs::write(&init, "#!/none\n").map_err(|e| e.to_string())?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    let id = format!(
        "slipway-seccomp-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let none: [&str; 0] = [];
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["/init"], "env": ["PATH=/"], "cwd": "/",
            "capabilities": {"bounding": none, "effective": none, "permitted": none},
            // With it runc would load the filter only when the container starts.
            "noNewPrivileges": false,
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"cgroupsPath": format!("/{id}"), "namespaces": [{"type": "mount"}, {"type": "pid"}], "seccomp": profile},
    });
    fs::write(dir.path().join("config.json"), config.to_string()).map_err(|e| e.to_string())?;

    let (pid_file, log) = (dir.path().join("pid"), dir.path().join("log"));
    let bundle = dir.path().to_string_lossy().into_owned();
    let args = [
        "create",
        "--bundle",
        &bundle,
        "--pid-file",
        &pid_file.to_string_lossy(),
        &id,
    ]
    .map(str::to_owned);
    // Not a pipe: the container's init would hold it open.
    let stderr = File::create(&log).map_err(|e| e.to_string())?;
    let _created = Created {
        peer,
        root: &root,
        id,
    };
    let status = command(peer, &root, &args.each_ref().map(String::as_str))
        .stderr(stderr)
        .status();
    if !status.is_ok_and(|s| s.success()) {
        return Err(format!(
            "{} create: {}",
            peer.name,
            fs::read_to_string(&log).unwrap_or_default()
        ));
    }
    let pid = fs::read_to_string(&pid_file).map_err(|e| e.to_string())?;
    let pid = pid
        .trim()
        .parse()
        .map_err(|e| format!("{}'s pid file: {e}", peer.name))?;
    read_filter(pid).map_err(|e| format!("reading the filter of {} (pid {pid}): {e}", peer.name))
}

/// The only filter of process `pid`.
fn read_filter(pid: libc::pid_t) -> io::Result<Vec<Instruction>> {
    let null = std::ptr::null_mut::<libc::c_void>();
    let checked = |ret: libc::c_long| {
        if ret < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(ret)
        }
    };
    // SAFETY: `pid` is that of a container's init, which we alone hold; it is stopped, read and let go. The
    // buffer has room for as many instructions as the kernel said there are.
    unsafe {
        checked(libc::ptrace(libc::PTRACE_SEIZE, pid, null, null))?;
        checked(libc::ptrace(libc::PTRACE_INTERRUPT, pid, null, null))?;
        let mut status = 0;
        checked(libc::c_long::from(libc::waitpid(
            pid,
            &raw mut status,
            libc::__WALL,
        )))?;
        let count = checked(libc::ptrace(GET_FILTER, pid, null, null))? as usize;
        let mut program = vec![
            Instruction {
                code: 0,
                jt: 0,
                jf: 0,
                k: 0
            };
            count
        ];
        checked(libc::ptrace(GET_FILTER, pid, null, program.as_mut_ptr()))?;
        let second = libc::ptrace(
            GET_FILTER,
            pid,
            std::ptr::without_provenance_mut::<libc::c_void>(1),
            null,
        );
        checked(libc::ptrace(libc::PTRACE_DETACH, pid, null, null))?;
        if second >= 0 {
            return Err(io::Error::other("it has more than one filter"));
        }
        Ok(program)
    }
}

/// A containerd of its own, for the profile that it gives to containers by default.
pub struct Containerd {
    daemon: Child,
    dir: tempfile::TempDir,
    count: AtomicU32,
}

impl Containerd {
    /// Starts it in a private directory; `None`, with a word, where it is not installed.
    pub fn start() -> Option<Containerd> {
        if find("containerd").is_none() || find("ctr").is_none() {
            println!("SKIPPED: containerd is not installed (Debian package containerd)");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("sock")
        );
        fs::write(dir.path().join("config.toml"), config).expect("its configuration");
        fs::create_dir(dir.path().join("rootfs")).expect("a root directory");
        let ready = UnixDatagram::bind(dir.path().join("notify")).expect("a socket");
        ready
            .set_read_timeout(Some(Duration::from_secs(60)))
            .expect("a deadline");
        let daemon = Command::new("containerd")
            .args(["--log-level", "error", "--config", &at("config.toml")])
            .env("NOTIFY_SOCKET", at("notify"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("containerd starts");
        let containerd = Containerd {
            daemon,
            dir,
            count: AtomicU32::new(0),
        };
        let mut message = [0; 64];
        let n = ready.recv(&mut message).expect("containerd says READY=1");
        assert!(
            message[..n].starts_with(b"READY=1"),
            "{:?}",
            String::from_utf8_lossy(&message[..n])
        );
        Some(containerd)
    }

    fn ctr(&self, args: &[&str]) -> Vec<u8> {
        let out = Command::new("timeout")
            .args(["30", "ctr", "--address"])
            .arg(self.dir.path().join("sock"))
            .args(args)
            .output()
            .expect("ctr runs");
        assert!(
            out.status.success(),
            "ctr {args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        out.stdout
    }

    /// The default profile of a container with just these capabilities.
    pub fn default_profile(&self, capabilities: &Capabilities) -> LinuxSeccomp {
        // What ctr grants unasked.
        const GRANTED: [&str; 14] = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ];
        let id = format!("c{}", self.count.fetch_add(1, Ordering::Relaxed));
        let rootfs = self
            .dir
            .path()
            .join("rootfs")
            .to_string_lossy()
            .into_owned();
        let wanted: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
        let drop = GRANTED.iter().filter(|g| !wanted.iter().any(|w| w == *g));
        let add = wanted.iter().filter(|w| !GRANTED.contains(&w.as_str()));
        let flags: Vec<String> = drop
            .map(|c| format!("--cap-drop=CAP_{c}"))
            .chain(add.map(|c| format!("--cap-add=CAP_{c}")))
            .collect();
        let mut args = vec!["containers", "create", "--seccomp"];
        args.extend(flags.iter().map(String::as_str));
        args.extend(["--rootfs", &rootfs, &id, "/init"]);
        self.ctr(&args);
        let info: serde_json::Value =
            serde_json::from_slice(&self.ctr(&["containers", "info", &id]))
                .expect("ctr prints JSON");
        let mut held: Vec<String> = info["Spec"]["process"]["capabilities"]["bounding"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|c| c.as_str()?.strip_prefix("CAP_").map(str::to_owned))
            .collect();
        held.sort();
        let mut wanted = wanted;
        wanted.sort();
        assert_eq!(held, wanted, "the container's capabilities");
        serde_json::from_value(info["Spec"]["linux"]["seccomp"].clone()).expect("an OCI profile")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // SAFETY: our own child, not yet waited for.
        unsafe { libc::kill(self.daemon.id().cast_signed(), libc::SIGTERM) };
        let _ = self.daemon.wait();
        // It leaves no mounts: no container of it ever ran. A shared mount below its state, if any, goes too.
        let state = CString::new(self.dir.path().join("state").to_string_lossy().into_owned());
        if let Ok(state) = state {
            // SAFETY: a path of ours.
            unsafe { libc::umount2(state.as_ptr(), libc::MNT_DETACH) };
        }
    }
}
