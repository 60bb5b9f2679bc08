//! Creating containers: `create`, and `run`, which also starts them and, unless detached, stays with them.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{SecondsFormat, Utc};
use liboci_cli::{Create, Run};
use oci_spec::runtime::{Hooks, LinuxNamespaceType, Process as OciProcess, Spec};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use slipway_proto::keeper::{CreateContainer, User};
use slipway_runtime::bundle::Bundle as Wanted;
use slipway_runtime::cgroup::{self, Hierarchies};
use slipway_runtime::confine::chain;
use slipway_runtime::creator::{self, Inherited, Stdio};
use slipway_runtime::removal::{self, KILL_DEADLINE};
use slipway_runtime::user::{self, Resolved};
use slipway_runtime::{descriptor, listener, loopback, rootfs, sys};

use crate::agent::Agent;
use crate::bundle::Bundle;
use crate::console::Console;
use crate::copy_up::CopyUp;
use crate::hooks::HookError;
use crate::record::{Container, Process, Record, Status};
use crate::relay::Relay;
use crate::shared_mounts::{self, SharedMounts};
use crate::trace::Trace;
use crate::{Context, OciError, Result, cgroup_path, delete, foreground, hooks, namespaces, start};

/// How long the creator may take, hooks not counted.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long who listens at a socket may take to accept and to read.
const PATIENCE: Duration = Duration::from_secs(30);

/// What `create` and `run` are asked for.
struct Request<'a> {
    id: &'a str,
    bundle: &'a Path,
    console_socket: Option<&'a Path>,
    pid_file: Option<&'a Path>,
    no_pivot: bool,
    new_keyring: bool,
    preserve_fds: i32,
    /// The caller stays, and can serve a terminal.
    stays: bool,
}

/// Creates a container.
///
/// # Errors
/// [`OciError`]; nothing is left of it then.
pub fn create(context: &Context, args: &Create) -> Result<()> {
    let request = Request {
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        no_pivot: args.no_pivot,
        new_keyring: !args.no_new_keyring,
        preserve_fds: args.preserve_fds,
        stays: false,
    };
    make(context, &request).map(drop)
}

/// Creates a container and starts it; unless detached, waits for its end and deletes it. Returns the exit code.
///
/// # Errors
/// [`OciError`]; nothing is left of it then.
pub fn run(context: &Context, args: &Run) -> Result<u8> {
    let request = Request {
        id: &args.container_id,
        bundle: &args.bundle,
        console_socket: args.console_socket.as_deref(),
        pid_file: args.pid_file.as_deref(),
        no_pivot: args.no_pivot,
        new_keyring: !args.no_new_keyring,
        preserve_fds: args.preserve_fds,
        stays: !args.detach,
    };
    if !args.detach && !args.no_subreaper {
        // What a container without a PID namespace leaves behind is collected here.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    }
    let (container, console) = make(context, &request)?;
    let started = start::start(context, request.id);
    let code = match (&started, args.detach, container.record.init) {
        (Ok(()), false, Some(init)) => foreground::Signals::block()
            .and_then(|signals| foreground::stay(init.pid, &signals, console)),
        _ => Ok(0),
    };
    if started.is_err() || (request.stays && !args.keep) {
        let deleted = delete::delete(context, request.id, true);
        started?;
        let code = code?;
        return deleted.map(|()| code);
    }
    started?;
    code
}

fn make(context: &Context, request: &Request<'_>) -> Result<(Container, Option<Console>)> {
    crate::record::check_id(request.id)?;
    let mut bundle = Bundle::load(request.bundle)?;
    bundle
        .warnings
        .iter()
        .for_each(|text| context.log.warning(text));
    keep_descriptors(context, request.preserve_fds)?;
    let (socket, console) = console(&bundle, request)?;
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let linux = bundle.spec.linux().as_ref();
    let wanted = linux.and_then(|l| l.cgroups_path().clone());
    let cgroup = cgroup_path::resolve(wanted.as_deref(), request.id, context.systemd)?;
    if context.systemd && !(cgroups.unified() && slipway_systemd::booted()) {
        return Err(OciError::Argument {
            option: "--systemd-cgroup",
            reason: "this host has not both: systemd as process 1, and cgroup v2 only".to_owned(),
        });
    }
    let record = Record {
        id: request.id.to_owned(),
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        cgroup,
        created: Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true),
        owner: rustix::process::geteuid().as_raw(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        has_process: bundle.has_process,
        new_keyring: request.new_keyring,
        shared_mounts: SharedMounts::of(&bundle.spec, &bundle.rootfs)?,
        creator: Process::own(),
        init: None,
    };
    let (mut container, _lock) = Container::make(context, record, &bundle.spec)?;
    // All in it is ended with the container: what is there already is somebody else's.
    let pids = cgroups.pids(&container.record.cgroup);
    if !pids.is_empty() {
        let cgroup = container.record.cgroup;
        let _ = fs::remove_dir_all(&container.dir);
        return Err(OciError::CgroupTaken { cgroup, pids });
    }
    let mut hooked = false;
    let built = build(
        &mut container,
        &cgroups,
        &mut bundle.spec,
        socket,
        request,
        context.systemd,
        &mut hooked,
    );
    match built {
        Ok(()) => Ok((container, console)),
        Err(error) => {
            undo(context, &container, &cgroups, hooked);
            Err(error)
        }
    }
}

/// The descriptors that the container is to get must be there, or something of ours would get one of their numbers.
/// What else the caller left open is nobody's.
///
/// # Errors
/// [`OciError::Argument`].
pub fn keep_descriptors(context: &Context, preserve: i32) -> Result<()> {
    let refused = |reason: String| OciError::Argument {
        option: "--preserve-fds",
        reason,
    };
    let count = u32::try_from(preserve).ok();
    let count = count.and_then(|count| count.checked_add(listen_fds()));
    let count = count.ok_or_else(|| refused(format!("{preserve} is no number of descriptors")))?;
    if count > context.passed {
        return Err(refused(format!(
            "descriptor {} is not open",
            3 + context.passed
        )));
    }
    sys::cloexec_from(3 + count);
    Ok(())
}

/// How many descriptors systemd's socket activation passes (sd_listen_fds(3)).
pub fn listen_fds() -> u32 {
    let count = std::env::var("LISTEN_FDS").ok();
    count.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Where the master end of the container's terminal goes, and the terminal's other user if that is this process.
fn console(bundle: &Bundle, request: &Request<'_>) -> Result<(Option<OwnedFd>, Option<Console>)> {
    let process = bundle.spec.process().as_ref();
    let terminal = process.is_some_and(|p| p.terminal() == Some(true));
    let refused = |reason: &str| {
        Err(OciError::Argument {
            option: "--console-socket",
            reason: reason.to_owned(),
        })
    };
    match (terminal, request.console_socket) {
        (false, None) => Ok((None, None)),
        (false, Some(_)) => refused("config.json asks for no terminal (process.terminal)"),
        (true, Some(path)) => Ok((Some(connect(path)?), None)),
        (true, None) if request.stays => {
            let (theirs, console) = Console::new()?;
            Ok((Some(theirs), Some(console)))
        }
        (true, None) => refused("config.json asks for a terminal, and nobody is there to serve it"),
    }
}

/// Connects to a socket of the caller's, however long its path is.
///
/// # Errors
/// [`OciError::File`].
pub fn connect(path: &Path) -> Result<OwnedFd> {
    let failed = OciError::file("connect to the socket", path);
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())
        .map_err(io::Error::from)
        .map_err(&failed)?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name);
    dial(&short).map_err(&failed)
}

/// Not for ever, whoever listens there.
fn dial(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
    let kind = (
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
    );
    let socket = rustix::net::socket_with(kind.0, kind.1, kind.2, None)?;
    // It holds for connect(2) on such sockets, too.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What the creator answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Made(i32),
    Failed(String),
}

#[allow(clippy::too_many_arguments)]
fn build(
    container: &mut Container,
    cgroups: &Hierarchies,
    spec: &mut Spec,
    socket: Option<OwnedFd>,
    request: &Request<'_>,
    systemd: bool,
    hooked: &mut bool,
) -> Result<()> {
    let oci_hooks = spec.hooks().clone();
    let agent = Agent::of(spec)?;
    let relay = relay_for(spec)?;
    // Must live until the container is there.
    let _users = namespaces::users(spec)?;
    let shared = container.record.shared_mounts.as_ref();
    let shared = shared
        .map(|shared| shared.open(spec))
        .transpose()?
        .map(Rc::new);
    let copies = Rc::new(CopyUp::take(spec, &container.record.rootfs)?);
    let fifo = make_fifo(container)?;
    let call = call(container, spec, systemd)?;
    let stdio = match socket {
        Some(socket) => Stdio::Terminal(socket),
        None => {
            let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
            let failed = OciError::system("copy a standard stream");
            Stdio::Pipes {
                stdin: Some(own(io::stdin().as_fd()).map_err(&failed)?),
                stdout: own(io::stdout().as_fd()).map_err(&failed)?,
                stderr: own(io::stderr().as_fd()).map_err(&failed)?,
            }
        }
    };
    let mut wanted = wanted(
        container,
        spec,
        oci_hooks.as_ref(),
        request,
        &copies,
        &shared,
    )?;
    let mut line = None;
    if agent.is_some() {
        let (ours, theirs) = listener::line().map_err(OciError::system("make a socket"))?;
        wanted.listener = Some(Arc::new(theirs));
        line = Some(ours);
    }
    let (answer, answer_write) = descriptor::pipe().map_err(OciError::system("make a pipe"))?;
    let cgroup = container.record.cgroup.clone();
    let in_cgroup = |step| {
        let cgroup = cgroup.clone();
        move |source| OciError::Cgroup {
            step,
            cgroup,
            source,
        }
    };
    let born_in = match systemd {
        true => None,
        false => {
            cgroups.ensure(&cgroup).map_err(in_cgroup("make"))?;
            cgroups.open_v2(&cgroup).map_err(in_cgroup("open"))?
        }
    };
    let options = sys::CloneOptions {
        cgroup: born_in.as_ref().map(|fd| fd.as_fd()),
        ..Default::default()
    };
    let parent = std::process::id().cast_signed();
    let trace = Trace::collect();
    let creator = match sys::clone_process(&options).map_err(OciError::system("fork"))? {
        sys::Forked::Parent(pid) => pid,
        sys::Forked::Child => {
            if sys::die_with(parent).is_err() {
                sys::exit_now(1);
            }
            let mut kept = stdio.descriptors();
            kept.extend([fifo.as_raw_fd(), answer_write.as_raw_fd()]);
            kept.extend(_users.iter().map(|fd| fd.as_raw_fd()));
            kept.extend(relay.iter().flat_map(|relay| relay.descriptors()));
            let passed = request.preserve_fds.saturating_add_unsigned(listen_fds());
            kept.extend(3..3 + passed);
            kept.extend(Trace::descriptors());
            kept.extend(copies.descriptors());
            kept.extend(shared.iter().map(|fd| fd.as_raw_fd()));
            kept.extend(wanted.listener.iter().map(|fd| fd.as_raw_fd()));
            sys::reset_signals();
            sys::close_all_but(&kept);
            relay.iter().for_each(Relay::pass_on);
            let inherited = Inherited {
                create: &call,
                run_root: Path::new("/"),
                cgroups,
                cgroup: &cgroup,
                stdio,
                start_pipe: fifo.as_fd(),
                pid_namespace: None,
                bundle: Some(&wanted),
            };
            let answer = match creator::create(inherited) {
                Ok(made) => Answer::Made(made.pid),
                Err(error) => Answer::Failed(chain(&error)),
            };
            let text = serde_json::to_vec(&answer).unwrap_or_default();
            let sent = File::from(answer_write).write_all(&text);
            sys::exit_now(i32::from(sent.is_err()))
        }
    };
    drop((answer_write, stdio));
    let asking = Asking {
        relay: relay.as_ref(),
        listener: agent.as_ref().zip(line.as_ref()),
        record: &container.record,
    };
    let told = follow(creator, &answer, &asking, |init| {
        *hooked = true;
        create_hooks(&container.record, oci_hooks.as_ref(), init)
    });
    // It has answered, or is of no use any more.
    sys::kill_child(creator);
    sys::wait_child(creator);
    let pid = match told? {
        Answer::Made(pid) => pid,
        Answer::Failed(reason) => {
            let said = trace.map_or_else(String::new, |trace| trace.text(&reason));
            return Err(OciError::Container {
                what: "create",
                id: container.record.id.clone(),
                reason: reason + &said,
            });
        }
    };
    container.record.init = Process::of(pid);
    if container.record.init.is_none() {
        return Err(OciError::Container {
            what: "create",
            id: container.record.id.clone(),
            reason: "its init has ended".to_owned(),
        });
    }
    container.save()?;
    request.pid_file.map_or(Ok(()), |file| write_pid(file, pid))
}

/// The hooks before the container's root is entered run here, when libcontainer's one hook says that it is time.
fn relay_for(spec: &mut Spec) -> Result<Option<Relay>> {
    let hooks = spec.hooks().as_ref();
    let early = ["prestart", "createRuntime", "createContainer"];
    let wanted = early.iter().any(|kind| !hooks::of(hooks, kind).is_empty());
    spec.set_hooks(None);
    if !wanted {
        return Ok(None);
    }
    let relay = Relay::new()?;
    let mut hooks = Hooks::default();
    hooks.set_create_runtime(Some(vec![relay.hook()?]));
    spec.set_hooks(Some(hooks));
    Ok(Some(relay))
}

fn create_hooks(
    record: &Record,
    hooks: Option<&Hooks>,
    init: i32,
) -> std::result::Result<(), HookError> {
    let state = hooks::state(record, Status::Creating, Some(init));
    for kind in ["prestart", "createRuntime"] {
        hooks::run(kind, hooks::of(hooks, kind), &state, &[])?;
    }
    let kind = "createContainer";
    let inside = hooks::of(hooks, kind);
    if inside.is_empty() {
        return Ok(());
    }
    let failed = |reason: String| HookError::Enter { kind, reason };
    let (read, write) = descriptor::pipe().map_err(|e| failed(e.to_string()))?;
    let own = namespaces::inner_pid(init);
    let process = cgroup::pin(init).ok_or_else(|| failed("its init has ended".to_owned()))?;
    match sys::clone_process(&sys::CloneOptions::default()).map_err(|e| failed(e.to_string()))? {
        sys::Forked::Child => {
            let state = hooks::state(record, Status::Creating, own);
            let done = namespaces::enter(init, &process)
                .map_err(failed)
                .and_then(|()| hooks::run(kind, inside, &state, &[]));
            if let Err(error) = &done {
                let _ = File::from(write).write_all(chain(error).as_bytes());
            }
            sys::exit_now(i32::from(done.is_err()))
        }
        sys::Forked::Parent(pid) => {
            drop(write);
            let mut said = String::new();
            let _ = File::from(read).read_to_string(&mut said);
            match sys::wait_child(pid) {
                0 => Ok(()),
                _ => Err(HookError::Failed {
                    kind,
                    path: inside[0].path().clone(),
                    how: "or one after it failed".to_owned(),
                    said: format!(": {said}"),
                }),
            }
        }
    }
}

/// What the creator and the init may ask for before the container is there.
struct Asking<'a> {
    /// Hooks.
    relay: Option<&'a Relay>,
    /// That the agent is given the listener of the seccomp filter.
    listener: Option<(&'a Agent, &'a OwnedFd)>,
    record: &'a Record,
}

/// Waits for the creator's answer, and does what is asked for on the way.
fn follow(
    creator: i32,
    answer: &OwnedFd,
    asking: &Asking<'_>,
    mut run_hooks: impl FnMut(i32) -> std::result::Result<(), HookError>,
) -> Result<Answer> {
    let process = cgroup::pin(creator);
    let mut deadline = Instant::now() + DEADLINE;
    let mut text = Vec::new();
    let mut refused = None;
    let relay = asking.relay;
    let mut listener = asking.listener;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(OciError::System {
                step: "create the container: what makes it has not answered in time",
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        let mut fds = vec![PollFd::new(answer, PollFlags::IN)];
        fds.extend(process.iter().map(|p| PollFd::new(p, PollFlags::IN)));
        fds.extend(relay.iter().map(|r| PollFd::new(&r.asked, PollFlags::IN)));
        fds.extend(
            listener
                .iter()
                .map(|(_, line)| PollFd::new(line, PollFlags::IN)),
        );
        let timeout = rustix::event::Timespec::try_from(left).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(OciError::system("wait for the creator"))?,
        };
        let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
        let asked = relay.filter(|_| ready(1 + process.iter().len()));
        let confined = listener.filter(|_| ready(1 + process.iter().len() + relay.iter().len()));
        let (answered, ended) = (ready(0), process.is_some() && ready(1));
        if let Some(relay) = asked
            && let Some(init) = relay.init()
        {
            let done = run_hooks(init);
            relay.reply(done.is_ok());
            refused = done.err();
            deadline = Instant::now() + DEADLINE;
            continue;
        }
        if let Some((agent, line)) = confined {
            agent.serve(line, |init| {
                hooks::state(asking.record, Status::Creating, Some(init))
            })?;
            listener = None;
            deadline = Instant::now() + DEADLINE;
            continue;
        }
        let mut more = answered;
        if answered {
            let mut bytes = [0; 4096];
            let read = rustix::io::read(answer, &mut bytes).unwrap_or(0);
            text.extend_from_slice(&bytes[..read]);
            more = read > 0;
        }
        match serde_json::from_slice(&text) {
            // What the hook said is the cause of what libcontainer says.
            Ok(Answer::Failed(reason)) => {
                return match refused {
                    Some(hook) => Err(hook.into()),
                    None => Ok(Answer::Failed(reason)),
                };
            }
            Ok(made) => return Ok(made),
            Err(_) if !more && (ended || answered) => {
                return Ok(Answer::Failed(
                    "the process that makes it ended without a word".to_owned(),
                ));
            }
            Err(_) => {}
        }
    }
}

/// Every init that waits has it open.
fn make_fifo(container: &Container) -> Result<OwnedFd> {
    let path = container.start_fifo();
    let failed = OciError::file("make", &path);
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0)
        .map_err(io::Error::from)
        .map_err(&failed)?;
    // For reading, too: so it can be opened before anybody reads, and tells those who look that it is open.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty())
        .map_err(io::Error::from)
        .map_err(&failed)
}

/// The call that a keeper would get.
fn call(container: &Container, spec: &Spec, systemd: bool) -> Result<CreateContainer> {
    let process = process_of(spec)?;
    let mut env: Vec<Vec<u8>> = process
        .env()
        .iter()
        .flatten()
        .map(|e| e.clone().into_bytes())
        .collect();
    if listen_fds() > 0 {
        env.push(format!("LISTEN_FDS={}", listen_fds()).into_bytes());
        env.push(b"LISTEN_PID=1".to_vec());
    }
    let own_score = || {
        let text = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    Ok(CreateContainer {
        id: container.record.id.clone(),
        dir: container.dir.to_string_lossy().into_owned(),
        spec: serde_json::to_vec(spec).map_err(|e| OciError::spec("", e.to_string()))?,
        env,
        seccomp: seccomp(spec)?,
        oom_score_adj: process.oom_score_adj().unwrap_or_else(own_score),
        working_dir: process.cwd().to_string_lossy().into_owned(),
        systemd,
        ..CreateContainer::default()
    })
}

/// The process of a specification, which has one.
///
/// # Errors
/// [`OciError::Spec`] when it has none.
pub fn process_of(spec: &Spec) -> Result<&OciProcess> {
    let process = spec.process().as_ref();
    process.ok_or_else(|| OciError::spec("process", "it is missing"))
}

/// The compiled profile of a specification, as the creator and an exec want it; empty: none.
///
/// # Errors
/// [`OciError::Seccomp`].
pub fn seccomp(spec: &Spec) -> Result<Vec<u8>> {
    let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    profile.map_or(Ok(Vec::new()), |profile| {
        let options = slipway_seccomp::CompileOptions {
            notify: true,
            ..Default::default()
        };
        let filter = slipway_seccomp::compile(profile, &options).map_err(OciError::Seccomp)?;
        Ok(filter.to_bytes())
    })
}

/// Whom a process runs as: ids and groups of the specification, the home directory that a root file system has for them.
///
/// # Errors
/// When the root file system, or its list of users, can't be read.
pub fn user_of(process: &OciProcess, rootfs: &Path) -> Result<Resolved> {
    let root = rootfs::open_root(rootfs).map_err(OciError::from_create)?;
    let asked = process.user();
    let known = User {
        run_as_user: Some(asked.uid().into()),
        ..User::default()
    };
    let known = user::resolve(root.as_fd(), &known).map_err(OciError::from_create)?;
    Ok(Resolved {
        uid: asked.uid(),
        gid: asked.gid(),
        groups: asked.additional_gids().clone().unwrap_or_default(),
        home: known.home,
    })
}

fn wanted(
    container: &Container,
    spec: &Spec,
    hooks: Option<&Hooks>,
    request: &Request<'_>,
    copies: &Rc<CopyUp>,
    shared: &Option<Rc<OwnedFd>>,
) -> Result<Wanted> {
    let process = process_of(spec)?;
    let lone = namespaces::has_new(spec, LinuxNamespaceType::Network);
    let new_keyring = request.new_keyring;
    let copies = copies.clone();
    let (shared, rootfs) = (shared.clone(), container.record.rootfs.clone());
    let entered = move || {
        copies.copy()?;
        if new_keyring {
            match sys::new_session_keyring() {
                Err(e) if e.raw_os_error() != Some(rustix::io::Errno::NOSYS.raw_os_error()) => {
                    let text =
                        format!("can't join a new session keyring ({e}); see --no-new-keyring");
                    return Err(io::Error::new(e.kind(), text));
                }
                _ => {}
            }
        }
        if lone {
            loopback::bring_loopback_up().map_err(|e| io::Error::other(chain(&e)))?;
        }
        match &shared {
            Some(namespace) => shared_mounts::enter(namespace, &rootfs),
            None => Ok(()),
        }
    };
    let start: Vec<_> = hooks::of(hooks, "startContainer").to_vec();
    let env = process.env().clone().unwrap_or_default();
    let record = container.record.clone();
    let starting = move || {
        let pid = std::process::id().cast_signed();
        let state = hooks::state(&record, Status::Created, Some(pid));
        hooks::run("startContainer", &start, &state, &env).map_err(|e| io::Error::other(chain(&e)))
    };
    Ok(Wanted {
        rootfs: container.record.rootfs.clone(),
        user: user_of(process, &container.record.rootfs)?,
        no_pivot: request.no_pivot,
        preserve_fds: request.preserve_fds,
        listener: None,
        has_process: container.record.has_process,
        entered: Rc::new(entered),
        starting: Rc::new(starting),
    })
}

/// Writes a process number for whoever waits for the file: complete as soon as it is there.
///
/// # Errors
/// [`OciError::File`].
pub fn write_pid(path: &Path, pid: i32) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    fs::write(&partial, pid.to_string())
        .and_then(|()| fs::rename(&partial, path))
        .map_err(OciError::file("write", path))
}

/// Takes away what others see of a container's mounts.
pub fn clear_mounts(context: &Context, record: &Record) {
    if let Some(shared) = &record.shared_mounts
        && let Err(error) = shared.clear(&record.rootfs)
    {
        let rootfs = record.rootfs.display();
        let text = format!("can't unmount the container's root {rootfs}: {error}");
        context.log.warning(&text);
    }
}

/// Removes what a failed create has made.
fn undo(context: &Context, container: &Container, cgroups: &Hierarchies, hooked: bool) {
    let init: Vec<OwnedFd> = container.init().into_iter().collect();
    let state = container.dir.join(creator::LIBCONTAINER_ROOT);
    let removed = removal::remove_container(cgroups, &container.record.cgroup, &init, &state);
    if let Err(error) = removed {
        context.log.warning(&chain(&error));
        // There is something left: its name must stay, so that it can be deleted.
        return;
    }
    clear_mounts(context, &container.record);
    // Intermediate process and init are this process's children.
    let until = Instant::now() + KILL_DEADLINE;
    while sys::collect_child().is_some() && Instant::now() < until {}
    if hooked && let Ok(spec) = container.spec() {
        delete::stop_hooks(context, &container.record, &spec);
    }
    if let Err(error) = fs::remove_dir_all(&container.dir) {
        context.log.warning(&format!(
            "can't remove {}: {error}",
            container.dir.display()
        ));
    }
}
