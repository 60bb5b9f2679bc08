//! The shim on the host: the sandbox API, the task API, and the two commands of its program.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::*;
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{CodedInputStream, Message, MessageField};
use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_sync::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc::{
    Code, Error, Result as Answer, Server, TtrpcContext, get_status,
};
use containerd_shim_protos::{Client, EventsClient, Task, create_task};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use crate::link::{Link, number, text};
use crate::machine::{self, Machine, Plan, Size};
use crate::network::Network;

/// How long `Delete` waits for the output of a process that has ended, which others may hold open.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Exit code of what a machine's end has ended.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

fn socket(sandbox: &str) -> PathBuf {
    let short = sandbox.get(..16).unwrap_or(sandbox);
    PathBuf::from(format!("/run/slipway-vm-shim-{short}"))
}

fn specification(bundle: &Path) -> Result<Value> {
    let file = bundle.join("config.json");
    let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("reading {}", file.display()))
}

/// `start`: leaves a shim running for a sandbox, or finds that of a container, and prints where it is.
///
/// # Errors
/// What is wrong with the bundle, which is the working directory.
pub fn start(id: &str) -> Result<()> {
    let spec = specification(Path::new("."))?;
    let annotation = &spec["annotations"]["io.kubernetes.cri.sandbox-id"];
    let sandbox = annotation
        .as_str()
        .context("the annotations name no sandbox")?;
    let path = socket(sandbox);
    if id == sandbox {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path);
        let listener =
            OwnedFd::from(listener.with_context(|| format!("making {}", path.display()))?);
        let log = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("log");
        let mut shim = Command::new(fs::read_link("/proc/self/exe")?);
        shim.args(["-id", id, "serve"])
            .stdin(listener)
            .stdout(Stdio::null())
            .process_group(0);
        match log {
            Ok(log) => shim.stderr(log),
            Err(_) => shim.stderr(Stdio::null()),
        };
        let shim = shim.spawn().context("starting the shim itself")?;
        fs::write("shim.pid", shim.id().to_string())?;
    }
    let address = format!("unix://{}", path.display());
    println!(
        "{}",
        json!({"version": 3, "protocol": "ttrpc", "address": address})
    );
    Ok(())
}

/// `delete`: clears up after a shim that is gone. The machine is Slipway's to end, as it is in the sandbox's cgroup.
///
/// # Errors
/// When the answer can't be written.
pub fn delete(id: &str) -> Result<()> {
    let _ = fs::remove_file(socket(id));
    let mut gone = DeleteResponse::new();
    gone.exit_status = KILLED;
    gone.exited_at = stamp(SystemTime::now());
    Ok(std::io::stdout().write_all(&gone.write_to_bytes()?)?)
}

/// The shim itself, which listens at descriptor 0.
///
/// # Errors
/// When it can't listen.
pub fn serve(id: &str) -> Result<()> {
    nix::unistd::setsid().ok();
    let shim = Arc::new(Shim {
        id: id.to_owned(),
        state: Arc::default(),
    });
    let mut server = Server::new()
        .add_listener(0)?
        // Each call that waits has a thread.
        .set_thread_count_max(256)
        .register_service(create_task(shim.clone()))
        .register_service(create_sandbox(shim));
    server.start()?;
    loop {
        std::thread::park();
    }
}

struct Shim {
    id: String,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    plan: Option<Plan>,
    machine: Option<(Arc<Link>, u32)>,
    began: Option<SystemTime>,
    ended: Option<SystemTime>,
    /// By container and exec.
    processes: HashMap<(String, String), Process>,
}

impl State {
    /// QEMU's process id; 0 without a machine.
    fn machine_pid(&self) -> u32 {
        self.machine.as_ref().map_or(0, |(_, pid)| *pid)
    }
}

#[derive(Default)]
struct Process {
    /// The specification's process.
    spec: Value,
    bundle: PathBuf,
    terminal: bool,
    /// Paths of FIFOs.
    streams: [String; 3],
    pid: u32,
    exit: Option<(u32, SystemTime)>,
    /// Outputs that have not come to their ends.
    open: usize,
    /// Keeps the input open until somebody closes it.
    input: Option<File>,
    paused: bool,
}

fn refused(code: Code, text: impl std::fmt::Display) -> Error {
    Error::RpcStatus(get_status(code, text.to_string()))
}

fn missing(id: &str, exec: &str) -> Error {
    let text = format!("there is no process {id:?} {exec:?}");
    refused(Code::NOT_FOUND, text)
}

fn internal(error: impl std::fmt::Display) -> Error {
    refused(Code::INTERNAL, format!("{error:#}"))
}

fn stamp(at: SystemTime) -> MessageField<Timestamp> {
    Some(Timestamp::from(at)).into()
}

fn any(name: &str, message: &impl Message) -> MessageField<Any> {
    let mut any = Any::new();
    any.type_url = name.to_owned();
    any.value = message.write_to_bytes().unwrap_or_default();
    Some(any).into()
}

/// `ConfigPath` of `runtimeoptions.v1.Options`: its second field.
fn config_path(options: &Any) -> Result<PathBuf> {
    let mut input = CodedInputStream::from_bytes(&options.value);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let text = input.read_string()?;
        if tag >> 3 == 2 {
            return Ok(text.into());
        }
    }
    bail!("the option ConfigPath is not set")
}

impl Shim {
    fn with<T>(&self, id: &str, exec: &str, f: impl FnOnce(&mut Process) -> T) -> Answer<T> {
        let mut state = self.state.0.lock();
        let process = state.processes.get_mut(&(id.to_owned(), exec.to_owned()));
        process.map(f).ok_or_else(|| missing(id, exec))
    }

    fn link(&self) -> Answer<Arc<Link>> {
        let state = self.state.0.lock();
        let running = state.machine.as_ref().filter(|_| state.ended.is_none());
        let link = running.map(|(link, _)| link.clone());
        link.ok_or_else(|| refused(Code::FAILED_PRECONDITION, "the machine does not run"))
    }

    fn ask(&self, request: &Value) -> Answer<Value> {
        self.link()?.call(request).map_err(internal)
    }

    fn plan(&self, r: &CreateSandboxRequest) -> Result<Plan> {
        let bundle = PathBuf::from(&r.bundle_path);
        let spec = specification(&bundle)?;
        if r.netns_path.is_empty() {
            bail!("a machine can't be in the host's network");
        }
        let size = |key: &str| {
            let text = r.annotations.get(&format!("io.kubernetes.cri.{key}"));
            text.and_then(|t| t.parse().ok()).unwrap_or(0)
        };
        let hostname = spec["hostname"].as_str().unwrap_or("machine").to_owned();
        Ok(Plan {
            kernel: config_path(&r.options)?,
            size: Size::of(size),
            cgroup: spec["linux"]["cgroupsPath"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            network: Network::look(&r.netns_path)?,
            hostname,
            bundle,
        })
    }

    /// Directory that the guest sees, and in it what is a container's.
    fn shared(&self, id: &str) -> Answer<PathBuf> {
        let state = self.state.0.lock();
        let plan = state
            .plan
            .as_ref()
            .ok_or_else(|| internal("there is no sandbox"))?;
        Ok(plan.bundle.join("shared").join(id))
    }

    fn make(&self, r: &CreateTaskRequest) -> Result<()> {
        let bundle = Path::new(&r.bundle);
        let mut spec = specification(bundle)?;
        let shared = self.shared(&r.id)?;
        let rootfs = bundle.join("rootfs");
        for wanted in &r.rootfs {
            fs::create_dir_all(&rootfs)?;
            let data = wanted.options.join(",");
            let (source, kind) = (wanted.source.as_str(), wanted.type_.as_str());
            mount(
                Some(source),
                &rootfs,
                Some(kind),
                MsFlags::empty(),
                Some(data.as_str()),
            )
            .with_context(|| format!("mounting {}", rootfs.display()))?;
        }
        share(
            &rootfs,
            &shared.join("rootfs"),
            spec["root"]["readonly"] == true,
        )?;
        let mounts = spec["mounts"].as_array_mut();
        for (n, wanted) in mounts.into_iter().flatten().enumerate() {
            let has = |option: &str| {
                let options = wanted["options"].as_array();
                options.is_some_and(|o| o.iter().any(|own| own == option))
            };
            if wanted["type"] != "bind" && !has("bind") && !has("rbind") {
                continue;
            }
            let name = format!("mount-{n}");
            share(
                Path::new(text(wanted, "source")),
                &shared.join(&name),
                has("ro"),
            )?;
            (wanted["type"], wanted["source"]) = (json!("bind"), json!(name));
        }
        let request = json!({
            "do": "create", "id": r.id, "mounts": spec["mounts"], "resources": spec["linux"]["resources"],
        });
        self.link()?.call(&request).map_err(anyhow::Error::msg)?;
        let process = Process {
            spec: spec["process"].take(),
            bundle: bundle.to_owned(),
            terminal: r.terminal,
            streams: [&r.stdin, &r.stdout, &r.stderr].map(String::clone),
            ..Process::default()
        };
        self.add(&r.id, "", process);
        Ok(())
    }

    fn add(&self, id: &str, exec: &str, process: Process) {
        let name = (id.to_owned(), exec.to_owned());
        self.state.0.lock().processes.insert(name, process);
    }

    /// Runs what was prepared, and follows it to its end.
    fn run(&self, id: &str, exec: &str) -> Answer<u32> {
        let link = self.link()?;
        let (spec, terminal, paths) = self.with(id, exec, |p| {
            (p.spec.clone(), p.terminal, p.streams.clone())
        })?;
        let numbers = paths.each_ref().map(|path| match path.as_str() {
            "" => 0,
            _ => link.number(),
        });
        let sinks: Vec<_> = [1, 2].into_iter().filter(|n| numbers[*n] != 0).collect();
        let sinks: Vec<_> = sinks
            .into_iter()
            .map(|n| (n, link.sink(numbers[n])))
            .collect();
        let mut outputs = Vec::new();
        for (n, chunks) in sinks {
            let file = OpenOptions::new().write(true).open(&paths[n]);
            let file = file.map_err(|e| internal(format!("opening {}: {e}", paths[n])))?;
            outputs.push((numbers[n], chunks, file));
        }
        let input = match numbers[0] {
            0 => None,
            _ => Some(both_ends(&paths[0]).map_err(internal)?),
        };
        let started = link.call(&json!({
            "do": "start", "id": id, "exec": exec, "process": spec, "terminal": terminal, "streams": numbers,
        }));
        let started = started.map_err(internal)?;
        let pid = number(&started["pid"]);
        let open = outputs.len();
        let (reader, writer) = input.map_or((None, None), |(r, w)| (Some(r), Some(w)));
        self.with(id, exec, |p| (p.pid, p.open, p.input) = (pid, open, writer))?;
        if let Some(reader) = reader {
            let (link, number) = (link.clone(), numbers[0]);
            std::thread::spawn(move || link.pump(number, reader));
        }
        for (number, chunks, file) in outputs {
            let (link, state) = (link.clone(), self.state.clone());
            let name = (id.to_owned(), exec.to_owned());
            std::thread::spawn(move || {
                link.drain(number, &chunks, Some(file));
                if let Some(process) = state.0.lock().processes.get_mut(&name) {
                    process.open -= 1;
                }
                state.1.notify_all();
            });
        }
        let (state, name) = (self.state.clone(), (id.to_owned(), exec.to_owned()));
        std::thread::spawn(move || {
            let end = link.call(&json!({"do": "wait", "id": name.0, "exec": name.1}));
            // A machine that is gone is told of by its own end.
            let Ok(end) = end else { return };
            if end["oom"] == true && name.1.is_empty() {
                tell_of_oom(&name.0);
            }
            if let Some(process) = state.0.lock().processes.get_mut(&name) {
                process.exit = Some((number(&end["code"]), SystemTime::now()));
            }
            state.1.notify_all();
        });
        Ok(pid)
    }

    fn remove(&self, id: &str, exec: &str) -> Answer<Process> {
        let name = (id.to_owned(), exec.to_owned());
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        let deadline = std::time::Instant::now() + LAST_OUTPUT;
        loop {
            let process = state
                .processes
                .get(&name)
                .ok_or_else(|| missing(id, exec))?;
            if process.exit.is_none() && process.pid != 0 {
                return Err(refused(Code::FAILED_PRECONDITION, "the process is running"));
            }
            if process.open == 0 || changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        let process = state
            .processes
            .remove(&name)
            .ok_or_else(|| missing(id, exec))?;
        drop(state);
        if let Ok(link) = self.link() {
            let request = json!({"do": "delete", "id": id, "exec": exec});
            link.call(&request).map_err(internal)?;
        }
        if exec.is_empty() {
            unshare(&self.shared(id)?);
        }
        Ok(process)
    }
}

/// Opens a FIFO for reading and for writing, without waiting for anybody.
fn both_ends(path: &str) -> std::io::Result<(File, File)> {
    let mut options = OpenOptions::new();
    let both = options.read(true).write(true).open(path)?;
    let reader = File::open(path)?;
    let writer = OpenOptions::new().write(true).open(path)?;
    drop(both);
    Ok((reader, writer))
}

/// Binds a file or directory where the guest sees it.
fn share(from: &Path, to: &Path, readonly: bool) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    if from.is_dir() {
        fs::create_dir_all(to)?;
    } else {
        fs::create_dir_all(to.parent().context("no parent")?)?;
        File::create(to)?;
    }
    mount(Some(from), to, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("sharing {}", from.display()))?;
    if readonly {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, to, None::<&str>, flags, None::<&str>)?;
    }
    Ok(())
}

/// Takes back what is shared of a container.
fn unshare(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let place = entry.path();
        let _ = umount2(&place, MntFlags::MNT_DETACH);
        // Never what is mounted, should that have failed.
        let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
    }
    let _ = fs::remove_dir(dir);
}

/// As an event, by the socket that `start` was told.
fn tell_of_oom(id: &str) {
    let Ok(address) = std::env::var("TTRPC_ADDRESS") else {
        return;
    };
    let mut oom = TaskOOM::new();
    oom.container_id = id.to_owned();
    let mut request = ForwardRequest::new();
    let envelope = request.envelope.mut_or_insert_default();
    envelope.topic = "/tasks/oom".to_owned();
    envelope.namespace = std::env::var("NAMESPACE").unwrap_or_default();
    envelope.timestamp = stamp(SystemTime::now());
    envelope.event = any("containerd.events.TaskOOM", &oom);
    let context = containerd_shim_protos::ttrpc::context::with_timeout(2_000_000_000);
    let told = Client::connect(&format!("unix://{address}"))
        .and_then(|client| EventsClient::new(client).forward(context, &request));
    if let Err(error) = told {
        eprintln!("level=error msg=\"can't tell of an OOM kill: {error}\"");
    }
}

impl Sandbox for Shim {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> Answer<CreateSandboxResponse> {
        let plan = self
            .plan(&r)
            .map_err(|e| refused(Code::INVALID_ARGUMENT, format!("{e:#}")))?;
        self.state.0.lock().plan = Some(plan);
        Ok(CreateSandboxResponse::new())
    }

    fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> Answer<StartSandboxResponse> {
        let plan = self.state.0.lock().plan.take();
        let plan = plan.ok_or_else(|| refused(Code::FAILED_PRECONDITION, "there is no sandbox"))?;
        let state = self.state.clone();
        let ended = move || {
            let now = SystemTime::now();
            let mut own = state.0.lock();
            own.ended = Some(now);
            for process in own.processes.values_mut() {
                process.exit.get_or_insert((KILLED, now));
            }
            state.1.notify_all();
        };
        let booted = plan.boot(ended);
        let mut state = self.state.0.lock();
        state.plan = Some(plan);
        let Machine { link, pid } = booted.map_err(internal)?;
        let now = SystemTime::now();
        (state.machine, state.began) = (Some((link, pid)), Some(now));
        let mut response = StartSandboxResponse::new();
        (response.pid, response.created_at) = (pid, stamp(now));
        Ok(response)
    }

    fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Answer<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        (platform.os, platform.architecture) = ("linux".into(), "amd64".into());
        Ok(response)
    }

    fn stop_sandbox(&self, _: &TtrpcContext, _: StopSandboxRequest) -> Answer<StopSandboxResponse> {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        while let Some((_, pid)) = state.machine.as_ref().filter(|_| state.ended.is_none()) {
            machine::kill(*pid);
            changed.wait(&mut state);
        }
        Ok(StopSandboxResponse::new())
    }

    fn wait_sandbox(&self, _: &TtrpcContext, _: WaitSandboxRequest) -> Answer<WaitSandboxResponse> {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        loop {
            if let Some(at) = state.ended {
                let mut response = WaitSandboxResponse::new();
                (response.exit_status, response.exited_at) = (KILLED, stamp(at));
                return Ok(response);
            }
            changed.wait(&mut state);
        }
    }

    fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> Answer<SandboxStatusResponse> {
        let state = self.state.0.lock();
        let mut response = SandboxStatusResponse::new();
        response.sandbox_id = r.sandbox_id;
        response.pid = state.machine_pid();
        let ready = state.machine.is_some() && state.ended.is_none();
        response.state = if ready {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        }
        .to_owned();
        response.created_at = state.began.map_or_else(MessageField::none, stamp);
        response.exited_at = state.ended.map_or_else(MessageField::none, stamp);
        Ok(response)
    }

    fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> Answer<PingResponse> {
        self.link()?;
        Ok(PingResponse::new())
    }

    fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        let pid = self.state.0.lock().machine_pid();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(internal)?;
        let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let fields: Vec<u64> = fields.map(|f| f.parse().unwrap_or(0)).collect();
        let field = |n: usize| fields.get(n).copied().unwrap_or(0);
        let mut metrics = Metrics::new();
        let mut cpu = CPUStat::new();
        // In hundredths of a second, and in pages.
        (cpu.user_usec, cpu.system_usec) = (field(11) * 10_000, field(12) * 10_000);
        cpu.usage_usec = cpu.user_usec + cpu.system_usec;
        let mut memory = MemoryStat::new();
        memory.usage = field(21) * 4096;
        (metrics.cpu, metrics.memory) = (Some(cpu).into(), Some(memory).into());
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        (metric.id, metric.timestamp) = (self.id.clone(), stamp(SystemTime::now()));
        metric.data = any("io.containerd.cgroups.v2.Metrics", &metrics);
        Ok(response)
    }

    fn shutdown_sandbox(
        &self,
        context: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Answer<ShutdownSandboxResponse> {
        self.stop_sandbox(context, StopSandboxRequest::new())?;
        let _ = fs::remove_file(socket(&self.id));
        std::thread::spawn(|| {
            // The answer is on its way.
            std::thread::sleep(Duration::from_millis(50));
            std::process::exit(0);
        });
        Ok(ShutdownSandboxResponse::new())
    }
}

impl Task for Shim {
    fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        if let Err(error) = self.make(&r) {
            let _ = self.ask(&json!({"do": "delete", "id": r.id, "exec": ""}));
            unshare(&self.shared(&r.id)?);
            return Err(internal(format!("{error:#}")));
        }
        let mut response = CreateTaskResponse::new();
        // Of the host's processes it is QEMU that has the container.
        response.pid = self.state.0.lock().machine_pid();
        Ok(response)
    }

    fn start(&self, _: &TtrpcContext, r: StartRequest) -> Answer<StartResponse> {
        let mut response = StartResponse::new();
        response.pid = self.run(&r.id, &r.exec_id)?;
        Ok(response)
    }

    fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Answer<Empty> {
        let bundle = self.with(&r.id, "", |p| p.bundle.clone())?;
        let process = Process {
            spec: serde_json::from_slice(&r.spec.value).map_err(internal)?,
            bundle,
            terminal: r.terminal,
            streams: [r.stdin, r.stdout, r.stderr],
            ..Process::default()
        };
        self.add(&r.id, &r.exec_id, process);
        Ok(Empty::new())
    }

    fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> Answer<WaitResponse> {
        let name = (r.id, r.exec_id);
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        loop {
            match state.processes.get(&name).map(|p| p.exit) {
                None => return Err(missing(&name.0, &name.1)),
                Some(Some((code, at))) => {
                    let mut response = WaitResponse::new();
                    (response.exit_status, response.exited_at) = (code, stamp(at));
                    return Ok(response);
                }
                Some(None) => changed.wait(&mut state),
            }
        }
    }

    fn kill(&self, _: &TtrpcContext, r: KillRequest) -> Answer<Empty> {
        let ended = self.with(&r.id, &r.exec_id, |p| {
            if p.pid == 0 && r.signal == libc::SIGKILL as u32 {
                p.exit.get_or_insert((KILLED, SystemTime::now()));
            }
            p.exit.is_some() || p.pid == 0
        })?;
        self.state.1.notify_all();
        if !ended || r.all {
            self.ask(&json!({
                "do": "kill", "id": r.id, "exec": r.exec_id, "signal": r.signal, "all": r.all,
            }))?;
        }
        Ok(Empty::new())
    }

    fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> Answer<DeleteResponse> {
        let process = self.remove(&r.id, &r.exec_id)?;
        let mut response = DeleteResponse::new();
        response.pid = process.pid;
        let (code, at) = process.exit.unwrap_or((0, SystemTime::now()));
        (response.exit_status, response.exited_at) = (code, stamp(at));
        Ok(response)
    }

    fn state(&self, _: &TtrpcContext, r: StateRequest) -> Answer<StateResponse> {
        self.with(&r.id, &r.exec_id, |p| {
            let mut response = StateResponse::new();
            response.bundle = p.bundle.display().to_string();
            response.pid = p.pid;
            let [stdin, stdout, stderr] = p.streams.clone();
            (response.stdin, response.stdout, response.stderr) = (stdin, stdout, stderr);
            response.terminal = p.terminal;
            let status = match (p.exit, p.pid) {
                (Some((code, at)), _) => {
                    (response.exit_status, response.exited_at) = (code, stamp(at));
                    Status::STOPPED
                }
                (None, 0) => Status::CREATED,
                _ if p.paused => Status::PAUSED,
                _ => Status::RUNNING,
            };
            response.status = status.into();
            (response.id, response.exec_id) = (r.id.clone(), r.exec_id.clone());
            response
        })
    }

    fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> Answer<Empty> {
        self.with(&r.id, &r.exec_id, |_| ())?;
        self.ask(&json!({
            "do": "resize", "id": r.id, "exec": r.exec_id, "width": r.width, "height": r.height,
        }))?;
        Ok(Empty::new())
    }

    fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> Answer<Empty> {
        // What is in the FIFO is read, and then there is its end.
        self.with(&r.id, &r.exec_id, |p| p.input = None)?;
        Ok(Empty::new())
    }

    fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> Answer<PidsResponse> {
        self.with(&r.id, "", |_| ())?;
        let pids = self.ask(&json!({"do": "pids", "id": r.id}))?;
        let mut response = PidsResponse::new();
        for pid in pids.as_array().into_iter().flatten() {
            let mut info = containerd_shim_protos::types::task::ProcessInfo::new();
            info.pid = number(pid);
            response.processes.push(info);
        }
        Ok(response)
    }

    fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> Answer<StatsResponse> {
        self.with(&r.id, "", |_| ())?;
        let told = self.ask(&json!({"do": "stats", "id": r.id}))?;
        let of = |key: &str| number::<u64>(&told[key]);
        let mut cpu = CPUStat::new();
        (cpu.usage_usec, cpu.user_usec) = (of("usage_usec"), of("user_usec"));
        cpu.system_usec = of("system_usec");
        let mut memory = MemoryStat::new();
        (memory.usage, memory.usage_limit) = (of("memory"), of("memory_max"));
        (memory.anon, memory.file) = (of("anon"), of("file"));
        memory.inactive_file = of("inactive_file");
        (memory.pgfault, memory.pgmajfault) = (of("pgfault"), of("pgmajfault"));
        let mut pids = PidsStat::new();
        pids.current = of("pids");
        let mut metrics = Metrics::new();
        (metrics.cpu, metrics.memory) = (Some(cpu).into(), Some(memory).into());
        metrics.pids = Some(pids).into();
        let mut response = StatsResponse::new();
        response.stats = any("io.containerd.cgroups.v2.Metrics", &metrics);
        Ok(response)
    }

    fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> Answer<Empty> {
        let resources: Value = serde_json::from_slice(&r.resources.value).map_err(internal)?;
        self.with(&r.id, "", |_| ())?;
        self.ask(&json!({"do": "update", "id": r.id, "resources": resources}))?;
        Ok(Empty::new())
    }

    fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> Answer<Empty> {
        self.with(&r.id, "", |p| p.paused = true)?;
        self.ask(&json!({"do": "pause", "id": r.id}))
            .map(|_| Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> Answer<Empty> {
        self.with(&r.id, "", |p| p.paused = false)?;
        self.ask(&json!({"do": "resume", "id": r.id}))
            .map(|_| Empty::new())
    }

    fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Answer<ConnectResponse> {
        let mut response = ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.task_pid = self.state.0.lock().machine_pid();
        Ok(response)
    }

    fn shutdown(&self, context: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        // The machine is the sandbox's, and goes with ShutdownSandbox.
        let alive = self.link().is_ok() && self.state.0.lock().machine.is_some();
        if !alive {
            self.shutdown_sandbox(context, ShutdownSandboxRequest::new())?;
        }
        Ok(Empty::new())
    }
}
