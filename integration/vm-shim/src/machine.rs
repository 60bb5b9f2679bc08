//! The machine: QEMU and its file server, which are children of the shim and members of the sandbox's cgroup.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::initrd;
use crate::link::Link;
use crate::network::Network;

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// What a machine gets that nobody has said a size of.
const MEMORY: u64 = 256 << 20;
/// How long a guest may take until its agent speaks.
const BOOT: Duration = Duration::from_secs(100);
/// Without KVM: see hack/vm for why each of these.
const PROCESSOR: [&str; 4] = [
    "-accel",
    "tcg,thread=single,tb-size=64",
    "-cpu",
    "max,-la57,-erms,-fsrm",
];
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 cgroup_no_v1=all mitigations=off random.trust_cpu=on norandmaps \
     no_timer_check clearcpuid=112 rcupdate.rcu_expedited=1";

/// How large a machine is to be.
#[derive(Debug, PartialEq)]
pub struct Size {
    /// Bytes.
    pub memory: u64,
    /// Processors.
    pub cpus: u64,
}

impl Size {
    /// By the annotations: what the pod's containers need, and the overhead of its RuntimeClass.
    pub fn of(annotation: impl Fn(&str) -> u64) -> Self {
        let both = |key: &str| {
            annotation(&format!("sandbox-{key}")) + annotation(&format!("sandbox-overhead-{key}"))
        };
        let memory = match both("memory") {
            0 => MEMORY,
            bytes => bytes,
        };
        let period = annotation("sandbox-cpu-period").max(1);
        let cpus = both("cpu-quota").div_ceil(period).clamp(1, 8);
        Self { memory, cpus }
    }
}

/// What a machine is made of.
pub struct Plan {
    /// Directory of the kernel.
    pub kernel: PathBuf,
    /// Where its files are; the guest sees what is in `shared` there.
    pub bundle: PathBuf,
    /// The cgroup, as the specification has it.
    pub cgroup: String,
    /// How large it is.
    pub size: Size,
    /// The host's name.
    pub hostname: String,
    /// What it takes over.
    pub network: Network,
}

/// A machine that runs.
pub struct Machine {
    /// The agent.
    pub link: Arc<Link>,
    /// QEMU's process id.
    pub pid: u32,
}

impl Plan {
    /// Boots, and returns when the agent has answered; `ended` is called when QEMU has ended.
    ///
    /// # Errors
    /// What could not be started, or the last words of a guest that does not speak. Nothing is left then.
    pub fn boot(&self, ended: impl FnOnce() + Send + 'static) -> Result<Machine> {
        let taps = self.network.connect()?;
        let groups = make_cgroup(&self.cgroup)?;
        let shared = self.bundle.join("shared");
        fs::create_dir_all(&shared)?;
        let initrd = self.bundle.join("initrd");
        fs::write(&initrd, initrd::make(&self.kernel)?).context("writing the RAM disk")?;

        // A path of any length, and QEMU is in this directory.
        let dir = File::open(&self.bundle)?;
        let socket = format!("/proc/self/fd/{}/fs.sock", dir.as_raw_fd());
        let listener = OwnedFd::from(UnixListener::bind(socket).context("making fs.sock")?);
        let mut server = self.command(VIRTIOFSD, "virtiofsd.log")?;
        let number = listener.as_raw_fd();
        // It changes its working directory.
        let options = format!(
            "source={},sandbox=chroot,cache=auto,log_level=err",
            shared.display()
        );
        server.args([
            &format!("--fd={number}"),
            "--rlimit-nofile=0",
            "-o",
            &options,
        ]);
        let mut server = spawn(server, vec![listener], &groups, None)
            .context("starting virtiofsd (QEMU 7 has it)")?;

        let (port, theirs) = UnixStream::pair()?;
        let begun = self.qemu(theirs.into(), taps, &groups);
        let mut qemu = match begun {
            Ok(qemu) => qemu,
            Err(error) => {
                let _ = server.kill();
                let _ = server.wait();
                return Err(error.context("starting QEMU"));
            }
        };
        let pid = qemu.id();
        let port = OwnedFd::from(port);
        let link = Link::new(port.try_clone()?.into());
        let reader = link.clone();
        let (sender, hello) = channel();
        let greet = sender.clone();
        std::thread::spawn(move || {
            reader.run(port.into(), |number, _| {
                reader.answer(number, &Ok(Value::Null));
                let _ = sender.send(true);
            });
        });
        std::thread::spawn(move || {
            let _ = qemu.wait();
            let _ = greet.send(false);
            ended();
            // It may wait for a QEMU that never came to use it.
            let _ = server.kill();
            let _ = server.wait();
        });
        let spoke = hello.recv_timeout(BOOT).unwrap_or(false);
        let _ = fs::remove_file(&initrd);
        let told = match spoke {
            true => link.call(&json!({
                "do": "boot", "hostname": self.hostname, "network": self.network.describe(),
            })),
            false => Err("its agent does not speak".to_owned()),
        };
        if let Err(problem) = told {
            kill(pid);
            bail!("the machine: {problem}; {}", self.last_words());
        }
        Ok(Machine { link, pid })
    }

    fn qemu(&self, port: OwnedFd, taps: Vec<File>, groups: &[PathBuf]) -> Result<Child> {
        let mib = self.size.memory.div_ceil(1 << 20);
        let mut qemu = self.command("qemu-system-x86_64", "qemu.log")?;
        qemu.args(
            "-nodefaults -no-user-config -display none -no-reboot -machine q35,memory-backend=mem"
                .split(' '),
        );
        qemu.args(PROCESSOR);
        qemu.args(["-smp", &self.size.cpus.to_string(), "-m", &mib.to_string()]);
        qemu.args([
            "-object",
            &format!("memory-backend-memfd,id=mem,size={mib}M,share=on"),
        ]);
        qemu.arg("-kernel").arg(self.kernel.join("vmlinuz"));
        qemu.args(["-initrd", "initrd", "-append", KERNEL_ARGUMENTS]);
        qemu.args(["-serial", "file:console", "-device", "virtio-serial-pci"]);
        let number = port.as_raw_fd();
        qemu.args(["-chardev", &format!("socket,id=agent,fd={number}")]);
        qemu.args(["-device", "virtserialport,chardev=agent,nr=1,name=agent"]);
        qemu.args(["-chardev", "socket,id=fs,path=fs.sock"]);
        qemu.args(["-device", "vhost-user-fs-pci,chardev=fs,tag=shared"]);
        let mut passed = vec![port];
        for (n, (tap, interface)) in taps.into_iter().zip(&self.network.interfaces).enumerate() {
            let (number, mac) = (tap.as_raw_fd(), &interface.mac);
            qemu.args(["-netdev", &format!("tap,id=n{n},fd={number}")]);
            let device = format!("virtio-net-pci,netdev=n{n},mac={mac},romfile=");
            qemu.args(["-device", &device]);
            passed.push(tap.into());
        }
        spawn(qemu, passed, groups, Some(&self.network.path))
    }

    fn command(&self, program: &str, log: &str) -> Result<Command> {
        let mut command = Command::new(program);
        command.current_dir(&self.bundle).stdin(Stdio::null());
        let log = File::create(self.bundle.join(log))?;
        command.stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }

    fn last_words(&self) -> String {
        let read = |name: &str| {
            let text = fs::read(self.bundle.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            format!(
                "{name}: {}",
                lines[lines.len().saturating_sub(5)..].join(" | ")
            )
        };
        ["qemu.log", "virtiofsd.log", "console"]
            .map(read)
            .join("; ")
    }
}

/// Starts a program with these descriptors, in these cgroups, and in a network namespace.
fn spawn(
    mut command: Command,
    passed: Vec<OwnedFd>,
    groups: &[PathBuf],
    namespace: Option<&str>,
) -> Result<Child> {
    let namespace = namespace.map(File::open).transpose()?;
    let groups = groups.to_vec();
    let inside = move || -> io::Result<()> {
        for group in &groups {
            fs::write(group, "0")?;
        }
        if let Some(namespace) = &namespace {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        for fd in &passed {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: glibc lets a forked child allocate; no lock of this program's is taken.
    unsafe { command.pre_exec(inside) };
    let program = command.get_program().to_owned();
    // What was passed is closed here with the command.
    command
        .spawn()
        .with_context(|| format!("{}", program.display()))
}

/// Kills a child of this process's that has not been waited for.
pub fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// Makes a cgroup in all hierarchies: the files to join it by.
fn make_cgroup(path: &str) -> Result<Vec<PathBuf>> {
    if path.is_empty() || path.contains(':') {
        bail!("no cgroup that this shim can make (it knows no systemd): {path:?}");
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut files = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, place, "cgroup" | "cgroup2", ..] = fields[..] else {
            continue;
        };
        let dir = Path::new(place).join(path.trim_start_matches('/'));
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        // Nobody can join a cpuset (v1) that is empty.
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let (own, parent) = (dir.join(name), dir.with_file_name(name));
            if fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty()) {
                let _ = fs::read(parent).and_then(|bytes| fs::write(&own, bytes));
            }
        }
        files.push(dir.join("cgroup.procs"));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_as_large_as_pod_and_overhead() {
        let pod = |key: &str| match key {
            "sandbox-memory" => 128 << 20,
            "sandbox-overhead-memory" => 64 << 20,
            "sandbox-cpu-period" | "sandbox-cpu-quota" => 100_000,
            "sandbox-overhead-cpu-quota" => 25_000,
            _ => 0,
        };
        let size = Size {
            memory: 192 << 20,
            cpus: 2,
        };
        assert_eq!(Size::of(pod), size);
        let nothing = Size {
            memory: MEMORY,
            cpus: 1,
        };
        assert_eq!(Size::of(|_| 0), nothing);
    }
}
