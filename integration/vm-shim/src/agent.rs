//! The agent: process 1 of the guest. It makes what a container is in here (mounts, a cgroup), runs processes, and tells how
//! they end.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Gid, Pid, Uid};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use crate::link::{Link, number, text};

/// What the host shares.
const SHARED: &str = "/shared";
const CGROUPS: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+cpu +memory +pids";

#[derive(Default)]
struct Processes {
    /// By container and exec.
    all: HashMap<(String, String), Process>,
    /// Mount points of containers.
    mounts: HashMap<String, Vec<PathBuf>>,
}

struct Process {
    pid: Pid,
    code: Option<i32>,
    oom: bool,
    terminal: Option<Arc<File>>,
}

static PROCESSES: LazyLock<(Mutex<Processes>, Condvar)> = LazyLock::new(Default::default);
/// Held while a process is started: its end belongs to who starts it, if it can't be executed.
static STARTING: Mutex<()> = Mutex::new(());

/// Serves until the shim is gone.
pub fn run() -> ExitCode {
    if let Err(error) = serve() {
        eprintln!("agent: {error:#}");
    }
    // SAFETY: it does not come back, and there is nobody to whom that matters.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    ExitCode::FAILURE
}

fn serve() -> Result<()> {
    for (kind, place) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", CGROUPS),
        ("tmpfs", "/run"),
        ("tmpfs", "/shm"),
    ] {
        fs::create_dir_all(place)?;
        // The kernel may have made the first one.
        let made = mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        );
        made.or_else(|e| if kind == "devtmpfs" { Ok(()) } else { Err(e) })
            .with_context(|| format!("mounting {place}"))?;
    }
    fs::set_permissions("/shm", fs::Permissions::from_mode(0o1777))?;
    fs::write(format!("{CGROUPS}/cgroup.subtree_control"), CONTROLLERS).context("controllers")?;
    let mut modules: Vec<_> = fs::read_dir("/modules")?
        .flatten()
        .map(|e| e.path())
        .collect();
    modules.sort();
    for module in modules {
        load(&module).with_context(|| format!("loading {}", module.display()))?;
    }
    fs::create_dir_all(SHARED)?;
    mount(
        Some("shared"),
        SHARED,
        Some("virtiofs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context("mounting what the host shares")?;

    let port = port()?;
    let link = Link::new(port.try_clone()?);
    std::thread::spawn(reap);
    let caller = link.clone();
    std::thread::spawn(move || caller.call(&json!({"do": "hello"})));
    link.run(port, |call, request| {
        let link = link.clone();
        std::thread::spawn(move || {
            let done = obey(&link, &request).map_err(|e| format!("{e:#}"));
            link.answer(call, &done);
        });
    });
    bail!("the shim is gone")
}

fn load(module: &Path) -> Result<()> {
    let file = File::open(module)?;
    // SAFETY: the descriptor is open, and the parameters are a string.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match nix::errno::Errno::result(done) {
        Ok(_) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The serial port that the shim has named "agent".
fn port() -> Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim() == "agent") {
            let device = Path::new("/dev").join(entry.file_name());
            return Ok(OpenOptions::new().read(true).write(true).open(device)?);
        }
    }
    bail!("there is no port for the agent")
}

fn obey(link: &Arc<Link>, request: &Value) -> Result<Value> {
    let (id, exec) = (text(request, "id"), text(request, "exec"));
    let group = PathBuf::from(format!("{CGROUPS}/{id}"));
    match text(request, "do") {
        "boot" => boot(request)?,
        "create" => create(id, request)?,
        "start" => return start(link, id, exec, request),
        "wait" => return wait(id, exec),
        "kill" => send(id, exec, request)?,
        "resize" => resize(id, exec, request)?,
        "pids" => return Ok(json!(pids(&group))),
        "stats" => return Ok(statistics(&group)),
        "update" => limit(&group, &request["resources"])?,
        "pause" => fs::write(group.join("cgroup.freeze"), "1")?,
        "resume" => fs::write(group.join("cgroup.freeze"), "0")?,
        "delete" => delete(id, exec)?,
        other => bail!("the agent can't {other:?}"),
    }
    Ok(Value::Null)
}

fn boot(request: &Value) -> Result<()> {
    nix::unistd::sethostname(text(request, "hostname"))?;
    busybox("ip link set lo up")?;
    let network = &request["network"];
    let mut names = HashMap::new();
    for interface in list(&network["interfaces"]) {
        let name = by_address(text(interface, "mac"))?;
        busybox(&format!("ip link set {name} mtu {} up", interface["mtu"]))?;
        for address in list(&interface["addresses"]).filter_map(Value::as_str) {
            busybox(&format!("ip address add {address} dev {name}"))?;
        }
        names.insert(text(interface, "name"), name);
    }
    // Those by a gateway need the others.
    let (by, direct): (Vec<_>, Vec<_>) =
        list(&network["routes"]).partition(|r| r["gateway"].is_string());
    for route in direct.into_iter().chain(by) {
        let Some(name) = names.get(text(route, "dev")) else {
            continue;
        };
        let to = text(route, "dst");
        let via = match text(route, "gateway") {
            "" => String::new(),
            gateway => format!("via {gateway}"),
        };
        let family = if format!("{to}{via}").contains(':') {
            "-6"
        } else {
            "-4"
        };
        busybox(&format!("ip {family} route add {to} {via} dev {name}"))?;
    }
    Ok(())
}

fn by_address(mac: &str) -> Result<String> {
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        if fs::read_to_string(entry.path().join("address")).is_ok_and(|own| own.trim() == mac) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no interface has the address {mac}")
}

fn busybox(command: &str) -> Result<()> {
    let _starting = STARTING.lock();
    let done = Command::new("/bin/busybox")
        .args(command.split_whitespace())
        .output()?;
    if !done.status.success() {
        bail!(
            "{command}: {}",
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    Ok(())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn root(id: &str) -> PathBuf {
    PathBuf::from(format!("{SHARED}/{id}/rootfs"))
}

fn create(id: &str, request: &Value) -> Result<()> {
    let group = PathBuf::from(format!("{CGROUPS}/{id}"));
    fs::create_dir(&group).context("making its cgroup")?;
    fs::write(group.join("cgroup.subtree_control"), CONTROLLERS)?;
    limit(&group, &request["resources"])?;
    let mut made = Vec::new();
    let done = list(&request["mounts"]).try_for_each(|wanted| {
        let to = root(id).join(text(wanted, "destination").trim_start_matches('/'));
        let mounted = add(id, wanted, &to);
        mounted.with_context(|| format!("mounting {}", to.display()))?;
        made.push(to);
        Ok(())
    });
    PROCESSES.0.lock().mounts.insert(id.to_owned(), made);
    done
}

/// Mounts as the specification says; of what is bound, the host has made a path that is shared.
fn add(id: &str, wanted: &Value, to: &Path) -> Result<()> {
    let kind = text(wanted, "type");
    let source = match (kind, text(wanted, "destination")) {
        (_, "/dev/shm") => Some(PathBuf::from("/shm")),
        ("cgroup", _) => Some(PathBuf::from(format!("{CGROUPS}/{id}"))),
        ("bind", _) => Some(Path::new(SHARED).join(id).join(text(wanted, "source"))),
        _ => None,
    };
    match &source {
        Some(file) if !file.is_dir() => {
            fs::create_dir_all(to.parent().context("no parent")?)?;
            OpenOptions::new().create(true).append(true).open(to)?;
        }
        _ => fs::create_dir_all(to)?,
    }
    if let Some(source) = source {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        return Ok(mount(Some(&source), to, None::<&str>, flags, None::<&str>)?);
    }
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in list(&wanted["options"]).filter_map(Value::as_str) {
        match option {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            option if option.contains('=') || option == "newinstance" => data.push(option),
            _ => {}
        }
    }
    mount(
        Some(kind),
        to,
        Some(kind),
        flags,
        Some(data.join(",").as_str()),
    )?;
    if text(wanted, "destination") == "/dev" {
        devices(to)?;
    }
    Ok(())
}

fn devices(dev: &Path) -> Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
    let mask = umask(Mode::empty());
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&dev.join(name), SFlag::S_IFCHR, mode, makedev(major, minor))?;
    }
    umask(mask);
    for (name, to) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        symlink(to, dev.join(name))?;
    }
    Ok(())
}

fn start(link: &Arc<Link>, id: &str, exec: &str, request: &Value) -> Result<Value> {
    let process = &request["process"];
    let words: Vec<&str> = list(&process["args"]).filter_map(Value::as_str).collect();
    let (program, arguments) = words.split_first().context("no command")?;
    let name = if exec.is_empty() { "init" } else { exec };
    let group = PathBuf::from(format!("{CGROUPS}/{id}/{name}"));
    // One of an exec that has left something behind may be there.
    fs::create_dir_all(&group).context("making its cgroup")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    let environment = list(&process["env"]).filter_map(|v| v.as_str()?.split_once('='));
    command.envs(environment);
    let cwd = text(process, "cwd").to_owned();
    let _ = fs::create_dir_all(root(id).join(cwd.trim_start_matches('/')));

    let stream = |n: usize| number::<u32>(&request["streams"][n]);
    let mut terminal = None;
    // What is copied once it runs: its input, and outputs by their numbers.
    let mut stdin: Option<File> = None;
    let mut outputs: Vec<(u32, File)> = Vec::new();
    if request["terminal"] == true {
        let (master, slave) = open_terminal(id)?;
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        (stdin, terminal) = (
            Some(master.try_clone()?),
            Some(Arc::new(master.try_clone()?)),
        );
        outputs.push((stream(1), master));
    } else {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if stream(0) != 0 {
            let (theirs, ours) = io::pipe()?;
            command.stdin(theirs);
            stdin = Some(OwnedFd::from(ours).into());
        }
        if stream(1) != 0 {
            let (ours, theirs) = io::pipe()?;
            command.stdout(theirs);
            outputs.push((stream(1), OwnedFd::from(ours).into()));
        }
        if stream(2) != 0 {
            let (ours, theirs) = io::pipe()?;
            command.stderr(theirs);
            outputs.push((stream(2), OwnedFd::from(ours).into()));
        }
    }
    let inside = inside(&group, id, &cwd, &process["user"], terminal.is_some())?;
    // SAFETY: glibc lets a forked child allocate, and the closure takes no lock of this program's.
    unsafe { command.pre_exec(inside) };
    let pid = {
        let _starting = STARTING.lock();
        let child = command.spawn().map_err(|e| {
            let _ = fs::remove_dir(&group);
            anyhow::anyhow!("exec: {program:?}: {e}")
        })?;
        let pid = Pid::from_raw(child.id().cast_signed());
        let process = Process {
            pid,
            code: None,
            oom: false,
            terminal,
        };
        PROCESSES
            .0
            .lock()
            .all
            .insert((id.to_owned(), exec.to_owned()), process);
        pid
    };
    drop(command);
    if let Some(to) = stdin.filter(|_| stream(0) != 0) {
        let (link, stdin) = (link.clone(), stream(0));
        let chunks = link.sink(stdin);
        std::thread::spawn(move || link.drain(stdin, &chunks, Some(to)));
    }
    for (number, from) in outputs {
        let link = link.clone();
        std::thread::spawn(move || link.pump(number, from));
    }
    Ok(json!({"pid": pid.as_raw()}))
}

/// What a process does before it executes its command.
fn inside(
    group: &Path,
    id: &str,
    cwd: &str,
    user: &Value,
    terminal: bool,
) -> Result<impl FnMut() -> io::Result<()> + Send + Sync + 'static> {
    let (root, cwd) = (
        root(id),
        CString::new(if cwd.is_empty() { "/" } else { cwd })?,
    );
    let (uid, gid) = (
        Uid::from_raw(number(&user["uid"])),
        Gid::from_raw(number(&user["gid"])),
    );
    let groups: Vec<Gid> = list(&user["additionalGids"])
        .map(|g| Gid::from_raw(number(g)))
        .collect();
    let join = group.join("cgroup.procs");
    Ok(move || {
        fs::write(&join, "0")?;
        nix::unistd::setsid()?;
        if terminal {
            // SAFETY: descriptor 0 is the terminal.
            nix::errno::Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        }
        nix::unistd::chroot(&root)?;
        nix::unistd::chdir(cwd.as_c_str())?;
        nix::unistd::setgroups(&groups)?;
        nix::unistd::setgid(gid)?;
        nix::unistd::setuid(uid)?;
        Ok(())
    })
}

fn open_terminal(id: &str) -> Result<(File, File)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOCTTY);
    let master = options
        .open(root(id).join("dev/pts/ptmx"))
        .context("opening a terminal")?;
    let unlocked: libc::c_int = 0;
    // SAFETY: both calls are for a terminal's master end, and the number lives through the first.
    let slave = unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked);
        libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCGPTPEER,
            libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
        )
    };
    let slave = nix::errno::Errno::result(slave).context("opening a terminal's other end")?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok((master, unsafe { File::from_raw_fd(slave) }))
}

/// Takes the ends of all processes.
fn reap() {
    loop {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let Ok(seen) = waitid(Id::All, flags) else {
            // There is none; the next one will be somebody's to wait for.
            std::thread::sleep(std::time::Duration::from_millis(20));
            continue;
        };
        let _starting = STARTING.lock();
        let code = match seen
            .pid()
            .map(|pid| waitpid(pid, Some(WaitPidFlag::WNOHANG)))
        {
            Some(Ok(WaitStatus::Exited(pid, code))) => (pid, code),
            Some(Ok(WaitStatus::Signaled(pid, signal, _))) => (pid, 128 + signal as i32),
            _ => continue,
        };
        ended(code.0, code.1);
    }
}

fn ended(pid: Pid, code: i32) {
    let (processes, changed) = &*PROCESSES;
    let mut processes = processes.lock();
    let found = processes
        .all
        .iter_mut()
        .find(|(_, p)| p.pid == pid && p.code.is_none());
    if let Some(((id, exec), process)) = found {
        let group = PathBuf::from(format!("{CGROUPS}/{id}"));
        // With a container's first process all of them end.
        if exec.is_empty() {
            let _ = fs::write(group.join("cgroup.kill"), "1");
        }
        process.oom = value(&group, "memory.events", "oom_kill") > 0;
        process.code = Some(code);
        changed.notify_all();
    }
}

fn wait(id: &str, exec: &str) -> Result<Value> {
    let (processes, changed) = &*PROCESSES;
    let mut processes = processes.lock();
    loop {
        let process = processes.all.get(&(id.to_owned(), exec.to_owned()));
        let process = process.context("no such process")?;
        if let Some(code) = process.code {
            return Ok(json!({"code": code, "oom": process.oom}));
        }
        changed.wait(&mut processes);
    }
}

fn send(id: &str, exec: &str, request: &Value) -> Result<()> {
    let signal: i32 = number(&request["signal"]);
    let name = if exec.is_empty() { "init" } else { exec };
    if request["all"] == true {
        let group = match exec {
            "" => PathBuf::from(format!("{CGROUPS}/{id}")),
            _ => PathBuf::from(format!("{CGROUPS}/{id}/{name}")),
        };
        if signal == libc::SIGKILL {
            return Ok(fs::write(group.join("cgroup.kill"), "1")?);
        }
        for pid in pids(&group) {
            let _ = kill(Pid::from_raw(pid), Signal::try_from(signal)?);
        }
        return Ok(());
    }
    let processes = PROCESSES.0.lock();
    let process = processes.all.get(&(id.to_owned(), exec.to_owned()));
    let process = process.context("no such process")?;
    if process.code.is_none() {
        // SAFETY: no memory is involved; the number may be that of a real-time signal.
        nix::errno::Errno::result(unsafe { libc::kill(process.pid.as_raw(), signal) })?;
    }
    Ok(())
}

fn resize(id: &str, exec: &str, request: &Value) -> Result<()> {
    let processes = PROCESSES.0.lock();
    let process = processes.all.get(&(id.to_owned(), exec.to_owned()));
    let terminal = process
        .and_then(|p| p.terminal.as_ref())
        .context("it has no terminal")?;
    let size = libc::winsize {
        ws_row: number(&request["height"]),
        ws_col: number(&request["width"]),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the size lives through the call.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// Processes in a cgroup and in those below it.
fn pids(group: &Path) -> Vec<i32> {
    let own = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let mut all: Vec<i32> = own.lines().filter_map(|l| l.parse().ok()).collect();
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            all.extend(pids(&entry.path()));
        }
    }
    all
}

/// A number in a file of a cgroup; that after a key, if there is one.
fn value(group: &Path, file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(group.join(file)).unwrap_or_default();
    let mut lines = text.lines();
    let found = match key {
        "" => lines.next(),
        key => lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')),
    };
    found.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn statistics(group: &Path) -> Value {
    let cpu = |key| value(group, "cpu.stat", key);
    let memory = |key| value(group, "memory.stat", key);
    json!({
        "usage_usec": cpu("usage_usec"), "user_usec": cpu("user_usec"), "system_usec": cpu("system_usec"),
        "memory": value(group, "memory.current", ""), "memory_max": value(group, "memory.max", ""),
        "anon": memory("anon"), "file": memory("file"), "inactive_file": memory("inactive_file"),
        "pgfault": memory("pgfault"), "pgmajfault": memory("pgmajfault"),
        "pids": value(group, "pids.current", ""),
    })
}

/// Writes the limits that are set in the specification's resources.
fn limit(group: &Path, resources: &Value) -> Result<()> {
    let set = |file: &str, text: String| {
        fs::write(group.join(file), &text).with_context(|| format!("writing {text:?} to {file}"))
    };
    let positive = |value: &Value| value.as_i64().filter(|n| *n > 0);
    if let Some(limit) = positive(&resources["memory"]["limit"]) {
        set("memory.max", limit.to_string())?;
    }
    if let Some(quota) = positive(&resources["cpu"]["quota"]) {
        let period = positive(&resources["cpu"]["period"]).unwrap_or(100_000);
        set("cpu.max", format!("{quota} {period}"))?;
    }
    if let Some(limit) = positive(&resources["pids"]["limit"]) {
        set("pids.max", limit.to_string())?;
    }
    Ok(())
}

fn delete(id: &str, exec: &str) -> Result<()> {
    let group = PathBuf::from(format!("{CGROUPS}/{id}"));
    let name = (id.to_owned(), exec.to_owned());
    if !exec.is_empty() {
        PROCESSES.0.lock().all.remove(&name);
        // What it has left behind goes on in there.
        let _ = fs::remove_dir(group.join(exec));
        return Ok(());
    }
    let _ = fs::write(group.join("cgroup.kill"), "1");
    empty(&group)?;
    let mounts = {
        let mut processes = PROCESSES.0.lock();
        processes.all.retain(|(of, _), _| of != id);
        processes.mounts.remove(id).unwrap_or_default()
    };
    for place in mounts.iter().rev() {
        let _ = umount2(place, MntFlags::MNT_DETACH);
    }
    for entry in fs::read_dir(&group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            fs::remove_dir(entry.path())?;
        }
    }
    if group.exists() {
        fs::remove_dir(&group).context("removing its cgroup")?;
    }
    // So that the host's file server lets go of its files.
    let mut drop = OpenOptions::new()
        .write(true)
        .open("/proc/sys/vm/drop_caches")?;
    Ok(drop.write_all(b"2")?)
}

/// Waits until nothing runs in a cgroup any more.
fn empty(group: &Path) -> Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    for _ in 0..10 {
        let Ok(mut events) = File::open(group.join("cgroup.events")) else {
            return Ok(());
        };
        // What changes after it was read is told by poll.
        let mut text = String::new();
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            return Ok(());
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, PollTimeout::from(1000_u16))?;
    }
    bail!("its processes do not end")
}
