//! The zygote: a small single-threaded process that forks keepers.
//!
//! The daemon starts it by executing a **sealed memfd copy** of its own binary, before it has read
//! configuration, keys or credentials: keepers share no secret with the daemon, and no container can reach
//! the host's binary through `/proc/<pid>/exe` (CVE-2019-5736).

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use slipway_proto::keeper::{SpawnKeeper, ZygoteRequest, ZygoteResponse};
use tokio::sync::Mutex;

use crate::cgroup::Hierarchies;
use crate::client::{receive, send_all};
use crate::keeper::Birth;
use crate::placement::{self, Placement};
use crate::{keeper, scope, sys, wire};

/// Subcommand of the binary that becomes the zygote.
pub const ZYGOTE_COMMAND: &str = "zygote";

/// How long a fork may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel's OOM killer takes everything else first.
const KEEPER_OOM_SCORE: i32 = -999;

/// Why there is no zygote, or no keeper from it.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The sealed copy could not be made.
    #[error("can't copy the slipway binary into sealed memory")]
    Copy(#[source] io::Error),
    /// The copy could not be executed.
    #[error("can't execute the zygote")]
    Exec(#[source] io::Error),
    /// The zygote died in the middle of a call.
    #[error("the zygote does not answer")]
    Lost(#[source] io::Error),
    /// The zygote is not where keepers are to be.
    #[error("keepers can't be placed: {0}")]
    Place(String),
    /// The zygote could not fork.
    #[error("the zygote can't fork a keeper: {0}")]
    Fork(String),
}

/// The daemon's handle on the zygote. When it has died, the next call starts another.
#[derive(Debug)]
pub struct ZygoteProcess {
    running: Mutex<Running>,
    placement: std::sync::OnceLock<Placement>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Registered with tokio at the first call: the zygote is started before tokio is.
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Plain(UnixStream),
    Async(tokio::net::UnixStream),
    Broken,
}

impl ZygoteProcess {
    /// Starts a zygote.
    ///
    /// # Errors
    /// [`ZygoteError::Copy`], [`ZygoteError::Exec`].
    pub fn launch() -> Result<Self, ZygoteError> {
        Ok(Self {
            running: Mutex::new(Running::launch()?),
            placement: std::sync::OnceLock::new(),
        })
    }

    /// Says where keepers are to be, from now on and of every later zygote.
    ///
    /// # Errors
    /// [`ZygoteError::Place`], [`ZygoteError::Lost`]; keepers are where the zygote is, then.
    pub async fn place(&self, placement: Placement) -> Result<(), ZygoteError> {
        let placed = self.running.lock().await.place(&placement).await;
        if placed.is_ok() {
            let _ = self.placement.set(placement);
        }
        placed
    }

    /// Forks a keeper for a pod; it serves `listener`.
    ///
    /// # Errors
    /// [`ZygoteError::Fork`]. [`ZygoteError::Lost`] when the zygote died or hung, with or without having
    /// forked; another has been started then. What starting it says.
    pub async fn spawn_keeper(
        &self,
        pod_id: &str,
        pod_dir: &Path,
        listener: BorrowedFd<'_>,
        cgroup: Option<&str>,
    ) -> Result<i32, ZygoteError> {
        let request = wire::frame(&ZygoteRequest {
            spawn_keeper: Some(SpawnKeeper {
                pod_id: pod_id.to_owned(),
                pod_dir: pod_dir.to_string_lossy().into_owned(),
                cgroup: cgroup.unwrap_or_default().to_owned(),
            }),
            place: None,
        });
        let mut running = self.running.lock().await;
        let asked = tokio::time::timeout(PATIENCE, running.ask(&request, &[listener])).await;
        let answer = match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(answer) => answer,
            Err(error) => {
                *running = Running::launch()?;
                if let Some(placement) = self.placement.get() {
                    running.place(placement).await?;
                }
                return Err(ZygoteError::Lost(error));
            }
        };
        match answer.error {
            Some(error) => Err(ZygoteError::Fork(error.message)),
            None => Ok(answer.pid),
        }
    }
}

impl Running {
    fn launch() -> Result<Self, ZygoteError> {
        let binary = sealed_copy().map_err(ZygoteError::Copy)?;
        let (ours, theirs) = UnixStream::pair().map_err(ZygoteError::Exec)?;
        ours.set_nonblocking(true).map_err(ZygoteError::Exec)?;
        let child = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()))
            .arg0("slipway")
            .arg(ZYGOTE_COMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(ZygoteError::Exec)?;
        Ok(Self {
            child,
            socket: Socket::Plain(ours),
        })
    }

    async fn place(&mut self, placement: &Placement) -> Result<(), ZygoteError> {
        let Some(place) = placement.call() else {
            return Ok(());
        };
        let request = wire::frame(&ZygoteRequest {
            spawn_keeper: None,
            place: Some(place),
        });
        let answer = self.ask(&request, &[]).await.map_err(ZygoteError::Lost)?;
        match answer.error {
            Some(error) => Err(ZygoteError::Place(error.message)),
            None => Ok(()),
        }
    }

    async fn ask(&mut self, request: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<ZygoteResponse> {
        // Until the answer is in, the connection is not fit for another call (this future may be dropped).
        let mut stream = match std::mem::replace(&mut self.socket, Socket::Broken) {
            Socket::Plain(stream) => tokio::net::UnixStream::from_std(stream)?,
            Socket::Async(stream) => stream,
            Socket::Broken => return Err(io::ErrorKind::NotConnected.into()),
        };
        send_all(&mut stream, request, fds).await?;
        let answer = receive(&mut stream).await?;
        self.socket = Socket::Async(stream);
        Ok(answer)
    }
}

impl Drop for Running {
    /// The zygote ends when its socket closes; keepers live on.
    fn drop(&mut self) {
        self.socket = Socket::Broken;
        // One that is stopped would not see that.
        let _ = self.child.kill();
        // Without a wait the old zygote would stay a zombie of the daemon.
        let _ = self.child.wait();
    }
}

/// This program's binary in memory that nobody can change any more.
fn sealed_copy() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let mut source = File::open("/proc/self/exe")?;
    let memfd = memfd_create("slipway", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut copy = File::from(memfd);
    io::copy(&mut source, &mut copy)?;
    fcntl_add_seals(
        &copy,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    // Executed through a read-only descriptor: a file open for writing is "text file busy".
    let read_only = File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))?;
    Ok(read_only)
}

/// What the zygote process runs: serves the socket on descriptor 0 until the daemon closes it.
pub fn main() -> ! {
    let code = match serve() {
        Ok(()) => 0,
        Err(_) => 1,
    };
    std::process::exit(code)
}

fn serve() -> io::Result<()> {
    // SAFETY: descriptor 0 is the socket that the daemon gave this process and nobody else here uses it.
    let mut socket = unsafe { UnixStream::from_raw_fd(0) };
    // Files and directories have the modes that are asked for, whoever started us.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // Keepers are to outlive the daemon whatever happens to its terminal or process group.
    let _ = nix::unistd::setsid();
    // From here on, and in all that is forked: /proc/<pid> belongs to root and can't be traced from a
    // container that shares the PID namespace.
    sys::prctl(libc::PR_SET_DUMPABLE, 0)?;
    // Lack of memory must not end a keeper, and with it a pod, before anything that the pod runs; whatever a
    // keeper starts for a container gets the container's own.
    crate::creator::set_oom_score(KEEPER_OOM_SCORE);
    // Keepers are nobody's to wait for; what dies is reaped by the kernel.
    // SAFETY: setting a disposition to SIG_IGN has no preconditions.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    loop {
        let (request, fds) = match read_request(&mut socket) {
            Ok(request) => request,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let answer = answer(request, fds);
        let frame = wire::frame(&answer);
        io::Write::write_all(&mut socket, &frame)?;
    }
}

fn read_request(socket: &mut UnixStream) -> io::Result<(ZygoteRequest, Vec<OwnedFd>)> {
    let (mut head, mut fds) = ([0u8; 4], Vec::new());
    let n = wire::recv_with_fds(socket.as_fd(), &mut head, &mut fds)?;
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    socket.read_exact(&mut head[n..])?;
    let mut body = vec![0; wire::announced_len(head)?];
    socket.read_exact(&mut body)?;
    Ok((wire::decode(&body)?, fds))
}

fn answer(request: ZygoteRequest, fds: Vec<OwnedFd>) -> ZygoteResponse {
    let failure = |message: String| ZygoteResponse {
        pid: 0,
        error: Some(slipway_proto::keeper::Error { kind: 0, message }),
    };
    if let Some(place) = request.place {
        return match placement::place(&place) {
            Ok(()) => ZygoteResponse::default(),
            Err(message) => failure(message),
        };
    }
    let Some(spawn) = request.spawn_keeper else {
        return failure("a call that this zygote does not know".into());
    };
    let Some(listener) = fds.into_iter().next() else {
        return failure("no listening socket came with the call".into());
    };
    let birth = match birthplace(&spawn.cgroup) {
        Ok(birth) => birth,
        Err(e) => return failure(format!("in cgroup {}: {e}", spawn.cgroup)),
    };
    let options = sys::CloneOptions {
        cgroup: birth.as_ref().map(|(_, fd)| fd.as_fd()),
        ..Default::default()
    };
    match sys::clone_process(&options) {
        Ok(sys::Forked::Parent(pid)) => ZygoteResponse { pid, error: None },
        Err(e) => failure(e.to_string()),
        Ok(sys::Forked::Child) => {
            sys::reset_signals();
            sys::close_all_but(&[listener.as_raw_fd()]);
            // Descriptor 0 was the zygote's socket: held open here, its end would never be seen.
            redirect_to_null(0);
            name_process(&spawn.pod_id);
            // Its cgroup's descriptor was closed with the others: to close it once more might hit another's.
            let birth = birth.map(|(birth, cgroup)| {
                let _ = cgroup.into_raw_fd();
                birth
            });
            let birth = birth.unwrap_or_default();
            keeper::main(&spawn.pod_id, Path::new(&spawn.pod_dir), listener, birth)
        }
    }
}

/// Makes the leaf of a pod's cgroup that its keeper is born in. `None`: it is born where the zygote is.
fn birthplace(cgroup: &str) -> io::Result<Option<(Birth, OwnedFd)>> {
    if cgroup.is_empty() {
        return Ok(None);
    }
    let (cgroups, cgroup) = (Hierarchies::detect()?, Path::new(cgroup));
    if !cgroups.unified() {
        return Ok(None);
    }
    let made_cgroup = cgroups.ensure(cgroup)?;
    let leaf = cgroups.make_leaf(cgroup, placement::LEAF)?;
    let home = scope::own_cgroup()?;
    Ok(leaf.map(|(_, fd)| {
        let birth = Birth {
            made_cgroup,
            home: Some(home),
        };
        (birth, fd)
    }))
}

fn redirect_to_null(fd: i32) {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        // SAFETY: replaces a descriptor that this process owns and that no Rust object refers to any more.
        unsafe { libc::dup2(null.as_raw_fd(), fd) };
    }
}

/// What `ps -o comm` shows of a keeper.
fn name_process(pod_id: &str) {
    let short: String = pod_id.chars().take(8).collect();
    if let Ok(name) = CString::new(format!("slipway:{short}")) {
        // SAFETY: PR_SET_NAME reads a NUL-terminated string of at most 16 bytes.
        unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    }
}
