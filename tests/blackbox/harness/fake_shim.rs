//! A shim with the sandbox API, on the server that others wrote. It stands in for one that boots a virtual machine: what it is asked
//! is written down in the order in which it came, and "in the guest" a container is a process without a cgroup of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest,
    StartResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
    StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc::{Code, Error, Result, Server, TtrpcContext, get_status};
use containerd_shim_protos::{Task, create_task};

/// Set for this program to be a shim: the directory that it writes to.
pub const VARIABLE: &str = "SLIPWAY_FAKE_SHIM";
const SERVE: &str = "SLIPWAY_FAKE_SHIM_SERVES";

/// Is a shim.
pub fn run(dir: &Path) -> ExitCode {
    if let Some(id) = std::env::var_os(SERVE) {
        return serve(dir, &id.to_string_lossy());
    }
    let words: Vec<String> = std::env::args().collect();
    match words.last().map(String::as_str) {
        Some("-v") => println!("fake: 1"),
        Some("start") => start(dir, &words),
        // No answer is an answer of nothing but zeros.
        _ => {}
    }
    ExitCode::SUCCESS
}

fn socket(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{}.sock", id.get(..8).unwrap_or(id)))
}

fn note(dir: &Path, text: &str) {
    let mut log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))
        .expect("the log");
    writeln!(log, "{text}").expect("the log");
}

fn start(dir: &Path, words: &[String]) {
    let id = words
        .iter()
        .skip_while(|w| *w != "-id")
        .nth(1)
        .expect("-id");
    let spec = std::fs::read_to_string("config.json").expect("a bundle");
    let spec: serde_json::Value = serde_json::from_str(&spec).expect("a specification");
    let kind = &spec["annotations"]["io.kubernetes.cri.container-type"];
    let sandbox = spec["annotations"]["io.kubernetes.cri.sandbox-id"]
        .as_str()
        .expect("a sandbox");
    note(dir, &format!("start {}", kind.as_str().expect("a type")));
    let socket = socket(dir, sandbox);
    if id == sandbox {
        let shim = Command::new(std::env::current_exe().expect("this program"))
            .args(["-id", id])
            .env(SERVE, id)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("the shim itself");
        // It outlives this process, and is somebody else's to wait for.
        std::mem::forget(shim);
        for _ in 0..500 {
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    println!(
        "{}",
        serde_json::json!({"version": 3, "protocol": "ttrpc", "address": format!("unix://{}", socket.display())})
    );
}

fn serve(dir: &Path, id: &str) -> ExitCode {
    let shim = Arc::new(Shim {
        dir: dir.to_owned(),
        processes: Arc::default(),
        changed: Arc::default(),
    });
    let address = format!("unix://{}", socket(dir, id).display());
    let server = Server::new().bind(&address).expect("its socket");
    let server = server.register_service(create_task(shim.clone()));
    let mut server = server.register_service(create_sandbox(shim));
    server.start().expect("a server");
    loop {
        std::thread::park();
    }
}

/// What runs, or ran, by the names of container and exec.
#[derive(Default)]
struct Process {
    args: Vec<String>,
    stdout: String,
    pid: Option<u32>,
    code: Option<u32>,
}

struct Shim {
    dir: PathBuf,
    processes: Arc<Mutex<HashMap<(String, String), Process>>>,
    changed: Arc<Condvar>,
}

fn refused(code: Code, text: &str) -> Error {
    Error::RpcStatus(get_status(code, text.to_owned()))
}

/// The names of the interfaces in a network namespace.
fn links(path: &str) -> Vec<String> {
    let path = path.to_owned();
    let look = move || {
        let namespace = File::open(&path).expect("the network namespace");
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("to go in");
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").expect("its interfaces");
        let lines = text.lines().skip(2);
        lines
            .filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned()))
            .collect()
    };
    std::thread::spawn(look).join().expect("its interfaces")
}

impl Shim {
    fn with<T>(&self, id: &str, exec: &str, f: impl FnOnce(&mut Process) -> T) -> Result<T> {
        let mut all = self.processes.lock().expect("a lock");
        let process = all.get_mut(&(id.to_owned(), exec.to_owned()));
        process
            .map(f)
            .ok_or_else(|| refused(Code::NOT_FOUND, "no such process"))
    }

    fn end_all(&self) {
        for process in self.processes.lock().expect("a lock").values() {
            if let (Some(pid), None) = (process.pid, process.code) {
                kill(pid, 9);
            }
        }
    }
}

fn kill(pid: u32, signal: u32) {
    let signal = nix::sys::signal::Signal::try_from(signal.cast_signed()).ok();
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal);
}

fn leave() {
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(50));
        std::process::exit(0);
    });
}

impl Sandbox for Shim {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let network = match r.netns_path.as_str() {
            "" => Vec::new(),
            path => links(path),
        };
        let annotations = serde_json::json!(r.annotations);
        std::fs::write(self.dir.join("annotations"), annotations.to_string()).expect("a file");
        note(&self.dir, &format!("CreateSandbox {}", network.join(",")));
        Ok(CreateSandboxResponse::new())
    }

    fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        note(&self.dir, "StartSandbox");
        let mut response = StartSandboxResponse::new();
        response.pid = std::process::id();
        Ok(response)
    }

    fn stop_sandbox(&self, _: &TtrpcContext, _: StopSandboxRequest) -> Result<StopSandboxResponse> {
        note(&self.dir, "StopSandbox");
        self.end_all();
        Ok(StopSandboxResponse::new())
    }

    fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        note(&self.dir, "ShutdownSandbox");
        leave();
        Ok(ShutdownSandboxResponse::new())
    }
}

impl Task for Shim {
    fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> Result<CreateTaskResponse> {
        note(&self.dir, "Create");
        let text =
            std::fs::read_to_string(Path::new(&r.bundle).join("config.json")).expect("a bundle");
        let spec: serde_json::Value = serde_json::from_str(&text).expect("a specification");
        let args = serde_json::from_value(spec["process"]["args"].clone()).expect("arguments");
        // What a guest is given is there.
        assert!(
            Path::new(&r.bundle).join("rootfs/bin").exists(),
            "no root file system"
        );
        let process = Process {
            args,
            stdout: r.stdout,
            ..Process::default()
        };
        self.processes
            .lock()
            .expect("a lock")
            .insert((r.id, String::new()), process);
        let mut response = CreateTaskResponse::new();
        // The virtual machine's, as shims tell it; no signal of a container's must ever go there.
        response.pid = std::process::id();
        Ok(response)
    }

    fn start(&self, _: &TtrpcContext, r: StartRequest) -> Result<StartResponse> {
        note(&self.dir, "Start");
        let (args, stdout) =
            self.with(&r.id, &r.exec_id, |p| (p.args.clone(), p.stdout.clone()))?;
        let stdout = File::options()
            .write(true)
            .open(&stdout)
            .map_err(|e| refused(Code::INTERNAL, &e.to_string()))?;
        let child = Command::new(&args[0])
            .args(&args[1..])
            .stdin(Stdio::null())
            .stdout(stdout)
            .spawn();
        let mut child =
            child.map_err(|e| refused(Code::INTERNAL, &format!("exec: {:?}: {e}", args[0])))?;
        self.with(&r.id, &r.exec_id, |p| p.pid = Some(child.id()))?;
        let mut response = StartResponse::new();
        response.pid = std::process::id();
        let (all, changed) = (self.processes.clone(), self.changed.clone());
        std::thread::spawn(move || {
            let status = child.wait().expect("its end");
            let code = status
                .code()
                .or(status.signal().map(|s| 128 + s))
                .unwrap_or(255);
            if let Some(process) = all.lock().expect("a lock").get_mut(&(r.id, r.exec_id)) {
                process.code = Some(code.cast_unsigned());
            }
            changed.notify_all();
        });
        Ok(response)
    }

    fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> Result<WaitResponse> {
        let mut response = WaitResponse::new();
        let name = (r.id, r.exec_id);
        let mut all = self.processes.lock().expect("a lock");
        loop {
            match all.get(&name).map(|p| p.code) {
                None => return Err(refused(Code::NOT_FOUND, "no such process")),
                Some(Some(code)) => {
                    response.exit_status = code;
                    return Ok(response);
                }
                Some(None) => all = self.changed.wait(all).expect("a lock"),
            }
        }
    }

    fn kill(&self, _: &TtrpcContext, r: KillRequest) -> Result<Empty> {
        note(&self.dir, &format!("Kill {}", r.signal));
        self.with(&r.id, &r.exec_id, |p| {
            if p.pid.is_none() && r.signal == 9 {
                p.code = Some(137);
            }
            if let (Some(pid), None) = (p.pid, p.code) {
                kill(pid, r.signal);
            }
        })?;
        self.changed.notify_all();
        Ok(Empty::new())
    }

    fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> Result<DeleteResponse> {
        let mut response = DeleteResponse::new();
        response.exit_status = self.with(&r.id, &r.exec_id, |p| p.code.unwrap_or(0))?;
        self.processes
            .lock()
            .expect("a lock")
            .remove(&(r.id, r.exec_id));
        note(&self.dir, "Delete");
        Ok(response)
    }

    fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Result<Empty> {
        note(&self.dir, "Exec");
        self.with(&r.id, "", |_| ())?;
        let spec: serde_json::Value = serde_json::from_slice(&r.spec.value).expect("a process");
        let process = Process {
            args: serde_json::from_value(spec["args"].clone()).expect("arguments"),
            stdout: r.stdout,
            ..Process::default()
        };
        self.processes
            .lock()
            .expect("a lock")
            .insert((r.id, r.exec_id), process);
        Ok(Empty::new())
    }

    fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> Result<Empty> {
        note(
            &self.dir,
            &format!("Update {}", String::from_utf8_lossy(&r.resources.value)),
        );
        Ok(Empty::new())
    }

    fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> Result<StatsResponse> {
        self.with(&r.id, "", |_| ())?;
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 1234;
        let memory = metrics.memory.mut_or_insert_default();
        (memory.usage, memory.inactive_file) = (5000, 1000);
        memory.usage_limit = 9000;
        let mut response = StatsResponse::new();
        let any = response.stats.mut_or_insert_default();
        any.type_url = "io.containerd.cgroups.v2.Metrics".to_owned();
        any.value = metrics.write_to_bytes().expect("bytes");
        Ok(response)
    }

    fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Result<ConnectResponse> {
        let mut response = ConnectResponse::new();
        response.shim_pid = std::process::id();
        Ok(response)
    }

    fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        leave();
        Ok(Empty::new())
    }
}
