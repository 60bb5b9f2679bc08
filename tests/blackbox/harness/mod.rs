//! What the tests stand on: the namespaces, the runner, the daemon, the CRI, the search for leaks.

pub mod cgroups;
pub mod config;
pub mod daemon;
pub mod fake_shim;
pub mod gate;
pub mod leaks;
pub mod liar;
pub mod log;
pub mod objects;
pub mod pace;
pub mod plugin;
pub mod probe;
pub mod runner;
pub mod stage;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

pub use anyhow::{Context, Result, bail, ensure};
pub use cgroups::{Driver, dir, systemctl};
pub use config::{container_security, pod_security};
pub use daemon::{Daemon, Setup};
pub use gate::Gate;
pub use objects::{Container, Pod};
pub use pace::seconds;
pub use slipway_proto::cri;

/// Where the registry listens in our network namespace.
pub const REGISTRY: &str = "127.0.0.1:5000";
/// One that wants a login.
pub const LOGIN_REGISTRY: &str = "127.0.0.1:5001";

/// A test that is under way.
type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// What is changed in a configuration, and its name.
pub type Change<T> = (&'static str, fn(&mut T));

/// One test.
#[derive(Clone, Copy)]
pub struct Test {
    /// Module path and function name.
    pub name: &'static str,
    /// Runs while no other test does.
    pub alone: bool,
    /// The test itself.
    pub run: fn(Env) -> Running,
}

/// The machine lacks what a test needs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Skipped(pub String);

/// Ends a test as skipped.
pub fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skipped(why.into()).into())
}

/// The runtime handler under which this run's pods are (`SLIPWAY_TEST_HANDLER`): a command-line runtime in PATH, or
/// "native".
pub fn handler() -> &'static str {
    static HANDLER: LazyLock<String> = LazyLock::new(|| {
        std::env::var("SLIPWAY_TEST_HANDLER").unwrap_or_else(|_| "native".to_owned())
    });
    HANDLER.as_str()
}

/// Ends a test as skipped unless this run's pods are native: it is about what only those have.
pub fn native_only(why: &str) -> Result<()> {
    match handler() {
        "native" => Ok(()),
        other => skip(format!("under handler {other}: {why}")),
    }
}

/// Whether this run's pods are in gVisor.
pub fn gvisor() -> bool {
    handler() == "runsc"
}

/// Whether this run's pods are made by youki's command line.
pub fn youki() -> bool {
    handler() == "youki"
}

/// Ends a test as skipped if this run's pods are in gVisor, for a reason that is of gVisor's making.
pub fn not_in_gvisor(why: &str) -> Result<()> {
    match gvisor() {
        true => skip(format!("under handler {}: {why}", handler())),
        false => Ok(()),
    }
}

/// Why limits of containers can't be tested in gVisor.
pub const ONE_PROCESS: &str =
    "gVisor runs all containers of a pod in one process, so there are no limits but the pod's";

/// The full reference of a test image.
pub fn image(name: &str) -> String {
    format!("{REGISTRY}/slipway/{name}:latest")
}

/// What one test has: a directory, a cgroup, a number of its own.
#[derive(Clone)]
pub struct Env(std::sync::Arc<Place>);

/// See [`Env`].
pub struct Place {
    /// Different for each test of a run; picks subnets and ports.
    pub number: u32,
    /// Directory of the test, on a tmpfs. Short, as socket paths must be.
    pub root: PathBuf,
    /// cgroup below which all its pods are, absolute in the hierarchies.
    pub cgroup: String,
    /// Who makes cgroups in this run.
    pub driver: Driver,
    /// Set once systemd has made the test's slice.
    slice: tokio::sync::OnceCell<()>,
    next: AtomicU32,
    /// The daemons that it started, for the runner to end.
    daemons: Mutex<Vec<Daemon>>,
}

impl std::ops::Deref for Env {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.0
    }
}

impl Env {
    fn new(number: u32, root: PathBuf, top: &str, driver: Driver) -> Self {
        let (next, daemons) = (AtomicU32::new(0), Mutex::default());
        Self(std::sync::Arc::new(Place {
            number,
            root,
            cgroup: driver.below(&format!("/{top}"), &format!("t{number}")),
            driver,
            slice: tokio::sync::OnceCell::new(),
            next,
            daemons,
        }))
    }

    /// A daemon with the usual configuration that has the image `test`.
    pub async fn daemon(&self) -> Result<Daemon> {
        let daemon = self.bare_daemon().await?;
        daemon.pull("test").await?;
        Ok(daemon)
    }

    /// One without images.
    pub async fn bare_daemon(&self) -> Result<Daemon> {
        self.daemon_with(|_| {}).await
    }

    /// One without images whose configuration `change` has changed.
    pub async fn daemon_with(&self, change: impl FnOnce(&mut Setup)) -> Result<Daemon> {
        let mut setup = Setup::new(self);
        change(&mut setup);
        self.make_cgroup().await?;
        let daemon = Daemon::start(self.clone(), setup).await?;
        self.daemons.lock().unwrap().push(daemon.clone());
        Ok(daemon)
    }

    /// A number that was not given out in this test before.
    pub fn fresh(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A directory below the test's own.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// The daemons that this test has started.
    pub fn daemons_now(&self) -> Vec<Daemon> {
        self.daemons()
    }

    fn daemons(&self) -> Vec<Daemon> {
        self.daemons.lock().unwrap().clone()
    }
}

/// A tmpfs of the test's own; unmounted when dropped.
pub struct Tmpfs(pub PathBuf);

impl Tmpfs {
    /// Mounts one with this propagation.
    pub fn new(at: PathBuf, propagation: nix::mount::MsFlags) -> Result<Self> {
        Self::sized(at, propagation, "100%")
    }

    /// One that is full after so many bytes.
    pub fn sized(at: PathBuf, propagation: nix::mount::MsFlags, size: &str) -> Result<Self> {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir_all(&at)?;
        let options = format!("size={size}");
        mount(
            Some("blackbox"),
            &at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .context("tmpfs")?;
        mount(None::<&str>, &at, None::<&str>, propagation, None::<&str>).context("propagation")?;
        Ok(Self(at))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

/// Sends a signal to a process.
pub fn signal(pid: i32, signal: nix::sys::signal::Signal) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(pid);
    Ok(nix::sys::signal::kill(pid, signal)?)
}

/// Asks again until the answer is there; `what` is waited for in vain after `limit`.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut ask: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let until = tokio::time::Instant::now() + limit;
    loop {
        if let Some(answer) = ask()
            .await
            .with_context(|| format!("while waiting for {what}"))?
        {
            return Ok(answer);
        }
        ensure!(
            tokio::time::Instant::now() < until,
            "{what}: not within {limit:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The words of a file of the kernel, such as a cgroup's.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

/// Expects a gRPC failure with this code whose message names all of these.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(
    answer: Result<T, tonic::Status>,
    code: tonic::Code,
    names: &[&str],
) {
    match answer {
        Ok(answer) => panic!("accepted ({answer:?}), expected {code:?}"),
        Err(status) => {
            assert_eq!(status.code(), code, "message: {}", status.message());
            for name in names {
                assert!(
                    status.message().contains(name),
                    "{:?} does not name {name:?}",
                    status.message()
                );
            }
        }
    }
}

/// Output of a program; its failure is ours.
pub async fn output(program: &str, args: &[&str]) -> Result<String> {
    let mut command = tokio::process::Command::new(program);
    let done = command.args(args).kill_on_drop(true).output();
    let done = tokio::time::timeout(seconds(60), done)
        .await
        .with_context(|| format!("{program} {args:?} does not end"))?
        .with_context(|| format!("running {program}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(
        done.status.success(),
        "{program} {args:?}: {}: {}",
        done.status,
        text(&done.stderr)
    );
    Ok(text(&done.stdout))
}
