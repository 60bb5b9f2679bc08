//! Making a container by its runtime: what the creator is for native ones ([`crate::creator`]), up to where that calls
//! libcontainer.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;
use oci_spec::runtime::Spec;
use slipway_proto::keeper::{CreateContainer, CreateContainerResult, ErrorKind};

use super::attendant::{self, Attended};
use super::command::{self, Call, Streams};
use super::prepare::{self, PrepareError};
use super::{CommandError, Runtime, bundle};
use crate::cgroup::Hierarchies;
use crate::creator::{self, Stdio};
use crate::ids::IdMaps;
use crate::users::Users;
use crate::{detach, terminal, wire};

/// How long a terminal may trail the end of the runtime that made it.
const TERMINAL: Duration = Duration::from_secs(2);
/// How long a runtime may take to delete what it failed to create.
const UNDO: Duration = Duration::from_secs(5);

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// What precedes the runtime's part.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The runtime.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The runtime says that the command can't be executed. No defect of the container's, which StartContainer is to
    /// tell.
    #[error("{0}")]
    NoCommand(String),
    /// What the runtime left is not what it should.
    #[error("runtime handler {handler:?} created the container, but {problem}")]
    Result {
        /// The handler.
        handler: String,
        /// What is wrong.
        problem: String,
    },
}

impl CreateError {
    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Prepare(error) => error.kind(),
            Self::Command(error) => error.kind(),
            Self::Result { .. } => ErrorKind::Internal,
            Self::NoCommand(_) => ErrorKind::CannotRun,
        }
    }
}

/// What the job takes over from the keeper.
pub struct Inherited<'a> {
    /// The call.
    pub create: &'a CreateContainer,
    /// The directory below which all pods' run directories are.
    pub run_root: &'a Path,
    /// The host's cgroups.
    pub cgroups: &'a Hierarchies,
    /// The container's standard streams.
    pub stdio: Stdio,
    /// Path of the PID namespace to join instead of the spec's (mode TARGET); in a sandbox only a name for it.
    pub pid_namespace: Option<PathBuf>,
    /// The attendant's end, of a container in a sandbox.
    pub control: Option<OwnedFd>,
}

/// Creates the container. Runs in a job.
///
/// # Errors
/// [`CreateError`]; what the runtime made until then it was told to delete.
pub fn create(
    runtime: &Runtime,
    inherited: Inherited<'_>,
) -> Result<CreateContainerResult, CreateError> {
    let until = Instant::now() + runtime.create_timeout;
    let Inherited {
        create,
        run_root,
        cgroups,
        stdio,
        mut pid_namespace,
        control,
    } = inherited;
    if let Some(sandbox) = &runtime.sandbox {
        let joined = cgroups.join_v1(&sandbox.cgroup);
        joined.map_err(|source| CreateError::Result {
            handler: runtime.handler.clone(),
            problem: format!("its sandbox's cgroup can't be joined: {source}"),
        })?;
    }
    let mut spec = prepare::read(create)?;
    let shared_pids = !creator::has_own_pid_namespace(&spec) || !create.pid_target.is_empty();
    let dir = Path::new(&create.dir);
    let mut private = fs::DirBuilder::new();
    private.recursive(true).mode(0o700);
    private
        .create(&runtime.root)
        .map_err(|source| creator::CreateError::Bundle {
            path: runtime.root.clone(),
            source,
        })
        .map_err(PrepareError::from)?;

    // As for native containers: the root file system is mounted here and nowhere else.
    let namespace = |e| PrepareError::from(creator::CreateError::Namespace(e));
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|e| namespace(e.into()))?;
    let mut kept = detach::run_root(&mut spec, run_root, &dir.join("kept")).map_err(namespace)?;
    let users = match IdMaps::of_spec(&spec) {
        None => None,
        Some(ids) => {
            let target = pid_namespace.take();
            let users = Users::prepare(&mut spec, ids, &mut kept, target);
            Some(users.map_err(PrepareError::from)?)
        }
    };
    if cgroups.hidden_v2().is_some() {
        // What the container is to see of the host's must be taken before it is hidden.
        bundle::arrange_cgroups(&mut spec, &dir.join("cgroups")).map_err(PrepareError::from)?;
    }
    command::hide_v2(cgroups).map_err(namespace)?;
    let pid_namespace = pid_namespace.as_deref();
    // An attendant that is killed for want of memory would be a container that only seems to have ended.
    let of_process = runtime.sandbox.is_none();
    let user = prepare::prepare(
        &mut spec,
        &runtime.handler,
        create,
        pid_namespace,
        users.as_ref(),
        of_process,
    )?;
    if let (
        Some(users),
        Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        },
    ) = (&users, &stdio)
    {
        // What a runtime gives to the user from within the namespace has to be somebody's who is in there.
        for pipe in stdin.iter().chain([stdout, stderr]) {
            users.ids.own_pipe(pipe, user.uid);
        }
    }
    if runtime.sandbox.is_some() {
        bundle::for_sandbox(&mut spec, &runtime.handler).map_err(PrepareError::from)?;
    }
    if runtime.youki {
        bundle::for_youki(&mut spec, &dir.join("mounts")).map_err(PrepareError::from)?;
    }
    creator::write_spec(&dir.join("config.json"), &spec).map_err(PrepareError::from)?;

    let result = match &control {
        Some(control) => {
            let attended = Attended {
                runtime,
                cgroups,
                dir,
                id: &create.id,
                shared_pids,
            };
            run_attended(&attended, &stdio, control, until)
        }
        None => run(runtime, create, cgroups, dir, &stdio, until),
    };
    drop(kept);
    // It would be the host's root.
    let result = result.and_then(|pid| {
        let ids = users.as_ref().map(|users| &users.ids);
        match ids.map_or(Ok(true), |ids| ids.are_of(pid)) {
            Ok(true) => Ok(pid),
            _ => Err(CreateError::Result {
                handler: runtime.handler.clone(),
                problem: format!("its process {pid} is not in the pod's user namespace"),
            }),
        }
    });
    match result {
        Ok(pid) => Ok(user.created(pid)),
        // Found now, and told when the container is started, as by those who find it then.
        Err(CreateError::NoCommand(cannot_run)) => Ok(CreateContainerResult {
            cannot_run,
            ..user.created(0)
        }),
        Err(error) => {
            let args = ["delete", "--force", create.id.as_str()];
            let _ = super::simple(runtime, cgroups, &args, dir, UNDO);
            Err(error)
        }
    }
}

/// The container's command, for messages.
fn command(create: &CreateContainer) -> String {
    let spec: Option<Spec> = serde_json::from_slice(&create.spec).ok();
    let args = spec.and_then(|spec| spec.process().clone()?.args().clone());
    args.and_then(|args| args.into_iter().next())
        .unwrap_or_default()
}

fn run(
    runtime: &Runtime,
    create: &CreateContainer,
    cgroups: &Hierarchies,
    dir: &Path,
    stdio: &Stdio,
    until: Instant,
) -> Result<i32, CreateError> {
    let wrong = |problem: String| CreateError::Result {
        handler: runtime.handler.clone(),
        problem,
    };
    let pid_file = dir.join("init.pid");
    let _ = fs::remove_file(&pid_file);
    let texts = (dir.to_string_lossy(), pid_file.to_string_lossy());
    let mut args = vec!["create", "--bundle", &texts.0, "--pid-file", &texts.1];
    let console = match stdio {
        Stdio::Terminal(_) => {
            Some(Console::listen(dir).map_err(|e| wrong(format!("no terminal can be made: {e}")))?)
        }
        Stdio::Pipes { .. } => None,
    };
    if let Some(console) = &console {
        args.extend(["--console-socket", &console.path]);
    }
    args.push(&create.id);
    let mut streams = Streams::default();
    if let Stdio::Pipes {
        stdin,
        stdout,
        stderr,
    } = stdio
    {
        streams.stdin = stdin.as_ref().map(AsFd::as_fd);
        streams.stdout = Some(stdout.as_fd());
        streams.stderr = Some(stderr.as_fd());
    }
    let systemd: &[&str] = match create.systemd {
        true => &["--systemd-cgroup"],
        false => &[],
    };
    let call = Call::new(&args, dir, until)
        .of(runtime.create_timeout)
        .streams(streams);
    let ran = command::run(runtime, cgroups, call.prepared().global(systemd));
    ran.map_err(|error| match super::command_failure(error.said()) {
        Some(_) => CreateError::NoCommand(super::of_command(&command(create), error.said())),
        None => CreateError::Command(error),
    })?;
    let pid = fs::read_to_string(&pid_file).unwrap_or_default();
    let pid: i32 = pid
        .trim()
        .parse()
        .ok()
        .filter(|pid| *pid > 1)
        .ok_or_else(|| wrong(format!("wrote no process id to {}", pid_file.display())))?;
    // The keeper will signal whatever has this number.
    if let Some(parent) = parent_of(pid)
        && parent != nix::unistd::getppid().as_raw()
    {
        let problem = format!("its process {pid} is a child of {parent}, and none of the pod's");
        return Err(wrong(problem));
    }
    if let (Some(console), Stdio::Terminal(socket)) = (console, stdio) {
        console
            .forward(socket)
            .map_err(|e| wrong(format!("its terminal did not come: {e}")))?;
    }
    Ok(pid)
}

/// Creates a container in its pod's sandbox, and leaves an attendant for it.
fn run_attended(
    container: &Attended<'_>,
    stdio: &Stdio,
    control: &OwnedFd,
    until: Instant,
) -> Result<i32, CreateError> {
    let Attended {
        runtime,
        cgroups,
        dir,
        id,
        ..
    } = container;
    let wrong = |problem: String| CreateError::Result {
        handler: runtime.handler.clone(),
        problem,
    };
    let console = match stdio {
        Stdio::Terminal(_) => {
            Some(Console::listen(dir).map_err(|e| wrong(format!("no terminal can be made: {e}")))?)
        }
        Stdio::Pipes { .. } => None,
    };
    let bundle = dir.to_string_lossy();
    let mut args = vec!["create", "--bundle", &bundle];
    if let Some(console) = &console {
        args.extend(["--console-socket", &console.path]);
    }
    args.push(id);
    let call = Call::new(&args, dir, until).of(runtime.create_timeout);
    command::run(runtime, cgroups, call.prepared())?;
    if let (Some(console), Stdio::Terminal(socket)) = (console, stdio) {
        console
            .forward(socket)
            .map_err(|e| wrong(format!("its terminal did not come: {e}")))?;
    }
    attendant::fork(container, stdio, control)
        .map_err(|e| wrong(format!("no process can be made to wait for it: {e}")))
}

/// The parent of a process; `None` when it is gone.
pub fn parent_of(pid: i32) -> Option<i32> {
    let read = || parent_by(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    // The kernel looks at the state first: one that was reaped in between seems to be alive, once.
    read().filter(|parent| *parent != 0).or_else(read)
}

/// By the text of `/proc/<pid>/stat`. One that is just being reaped still has an entry, and no parent.
fn parent_by(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (parent != 0 || state != "X").then_some(parent)
}

/// Where a runtime sends the master end of the terminal that it made.
pub struct Console {
    listener: UnixListener,
    /// For the runtime's `--console-socket`.
    pub path: String,
    _dir: OwnedFd,
}

impl Console {
    /// In this directory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(dir: &Path) -> io::Result<Self> {
        let name = format!("console-{}.sock", std::process::id());
        let file = dir.join(&name);
        let _ = fs::remove_file(&file);
        let dir = OwnedFd::from(fs::File::open(dir)?);
        // sun_path holds 108 bytes.
        let path = command::short_path(&dir, &name);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            _dir: dir,
        })
    }

    /// Takes the terminal from the runtime, which has ended, and sends it on.
    ///
    /// # Errors
    /// When there is none.
    pub fn forward(&self, to: &OwnedFd) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TERMINAL))?;
        let master = terminal::receive(&stream)?;
        wire::send_with_fds(to.as_fd(), b"t", &[master.as_fd()])?;
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_of_the_living_and_the_dead() {
        assert_eq!(parent_by("7 (a) b) S 3 7 7 0"), Some(3));
        assert_eq!(parent_by("2 (kthreadd) S 0 0 0 0"), Some(0));
        assert_eq!(parent_by("7 (x) X 0 7 7 0"), None);
        assert_eq!(parent_by(""), None);
        assert_eq!(
            parent_of(std::process::id().cast_signed()),
            Some(nix::unistd::getppid().as_raw())
        );
        assert_eq!(parent_of(i32::MAX), None);
    }
}
