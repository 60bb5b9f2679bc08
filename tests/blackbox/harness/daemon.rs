//! The daemon under test: its configuration, its process, its sockets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slipway_proto::cri::image_service_client::ImageServiceClient;
use slipway_proto::cri::runtime_service_client::RuntimeServiceClient;
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use super::{
    Context, Env, LOGIN_REGISTRY, REGISTRY, Result, bail, config, cri, ensure, eventually, image,
    seconds,
};

/// A call that takes longer has failed.
fn deadline() -> Duration {
    seconds(60)
}
/// In the environment of the daemon, and so of every process of it that keeps its environment.
pub const MARK: &str = "SLIPWAY_BLACKBOX_TEST";
/// The binary: cargo's, or another build of the same sources (`hack/vm` strips it: a daemon copies itself
/// into memory when it starts, which takes a slow machine long).
pub static BINARY: LazyLock<String> = LazyLock::new(|| {
    std::env::var("SLIPWAY_TEST_BINARY")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_slipway").to_owned())
});

/// What a daemon is started with.
pub struct Setup {
    /// Configuration: dotted key → value in TOML.
    pub keys: BTreeMap<String, String>,
    /// CNI configuration list; none: no file.
    pub cni: Option<String>,
    /// Further variables of its environment.
    pub env: Vec<(String, String)>,
}

impl Setup {
    /// The usual one of a test.
    pub fn new(env: &Env) -> Self {
        let quoted = |path: PathBuf| format!("{:?}", path.display().to_string());
        let root = |name: &str| quoted(env.root.join(name));
        let mut setup = Self {
            keys: BTreeMap::new(),
            cni: Some(config::conflist(env)),
            env: Vec::new(),
        };
        setup.set("listen", &root("s.sock"));
        setup.set("run_root", &root("r"));
        setup.set("state_root", &root("state"));
        setup.set("log.level", "\"debug\"");
        setup.set("cgroup.driver", &format!("{:?}", env.driver.name()));
        setup.set(
            "images.insecure_registries",
            &format!("[\"{REGISTRY}\", \"{LOGIN_REGISTRY}\"]"),
        );
        setup.set("nri.socket_path", &root("nri.sock"));
        setup.set("nri.plugin_dir", &root("nri.d"));
        setup.set("nri.config_dir", &root("nri.conf.d"));
        setup.set("images.retries", "1");
        if super::handler() != "native" {
            setup.set("default_runtime", &format!("{:?}", super::handler()));
            let key = |name: &str| format!("runtimes.{}.{name}", super::handler());
            match super::handler().starts_with("shim-") {
                true => {
                    setup.set(&key("type"), "\"shim-v2\"");
                    setup.set(&key("path"), "\"io.containerd.runc.v2\"");
                }
                false => setup.set(&key("type"), "\"oci\""),
            }
        }
        setup.set("network.conf_dir", &root("net.d"));
        setup.set("network.cache_dir", &root("net.cache"));
        setup.set(
            "network.bin_dirs",
            &format!("[{}, \"/usr/lib/cni\", \"/opt/cni/bin\"]", root("plugins")),
        );
        setup
    }

    /// Sets a dotted key to a value in TOML.
    pub fn set(&mut self, key: &str, value: &str) {
        self.keys.insert(key.to_owned(), value.to_owned());
    }
}

/// A daemon; clones are the same one.
#[derive(Clone)]
pub struct Daemon(Arc<Inner>);

struct Inner {
    env: Env,
    variables: Vec<(String, String)>,
    child: Mutex<Option<Child>>,
    channel: Channel,
}

impl Daemon {
    pub(super) async fn start(env: Env, setup: Setup) -> Result<Self> {
        for dir in ["net.d", "plugins", "logs"] {
            env.dir(dir)?;
        }
        if let Some(text) = &setup.cni {
            std::fs::write(env.root.join("net.d/10-test.conflist"), text)?;
        }
        let text: String = setup
            .keys
            .iter()
            .map(|(k, v)| format!("{k} = {v}\n"))
            .collect();
        std::fs::write(env.root.join("config.toml"), text)?;
        let socket = env.root.join("s.sock");
        let channel = tonic::transport::Endpoint::from_static("http://slipway")
            .timeout(deadline())
            .connect_with_connector_lazy(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(socket).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
                }
            }));
        let inner = Inner {
            env,
            variables: setup.env,
            child: Mutex::default(),
            channel,
        };
        let daemon = Self(Arc::new(inner));
        daemon.launch().await?;
        Ok(daemon)
    }

    /// Starts the process (again) and waits until it answers.
    pub async fn launch(&self) -> Result<()> {
        let env = &self.0.env;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file())?;
        let mut child = Command::new(BINARY.as_str())
            .args(["serve", "--config"])
            .arg(env.root.join("config.toml"))
            .env(MARK, env.number.to_string())
            .envs(self.0.variables.iter().map(|(k, v)| (k, v)))
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", *BINARY))?;
        let until = tokio::time::Instant::now() + seconds(20);
        loop {
            let request = cri::VersionRequest {
                version: "v1".to_owned(),
            };
            if self.runtime().version(request).await.is_ok() {
                break;
            }
            if let Some(status) = child.try_wait()? {
                bail!("the daemon ended with {status}:\n{}", self.last_words());
            }
            ensure!(
                tokio::time::Instant::now() < until,
                "the daemon does not answer"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        *self.0.child.lock().unwrap() = Some(child);
        Ok(())
    }

    /// The test that it belongs to.
    pub fn env(&self) -> &Env {
        &self.0.env
    }

    /// The socket that it serves the CRI on.
    pub fn socket(&self) -> PathBuf {
        self.0.env.root.join("s.sock")
    }

    /// Client of the runtime service.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.0.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Client of the image service.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.0.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Pulls a test image by its short name; its id.
    pub async fn pull(&self, name: &str) -> Result<String> {
        let spec = cri::ImageSpec {
            image: image(name),
            ..Default::default()
        };
        let request = cri::PullImageRequest {
            image: Some(spec),
            ..Default::default()
        };
        let answer = self
            .images()
            .pull_image(request)
            .await
            .with_context(|| format!("pulling {name}"))?;
        Ok(answer.into_inner().image_ref)
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> Result<Pid> {
        let child = self.0.child.lock().unwrap();
        let id = child
            .as_ref()
            .and_then(Child::id)
            .context("the daemon is not running")?;
        Ok(Pid::from_raw(id.cast_signed()))
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid()?, signal).context("signalling the daemon")
    }

    /// Ends the daemon by a signal and returns how it ended; pods go on.
    pub async fn kill(&self, signal: Signal) -> Result<std::process::ExitStatus> {
        self.signal(signal)?;
        let mut child = self
            .0
            .child
            .lock()
            .unwrap()
            .take()
            .context("the daemon is not running")?;
        let status = tokio::time::timeout(seconds(20), child.wait()).await;
        Ok(status.with_context(|| format!("the daemon does not end on {signal}"))??)
    }

    /// Ends the daemon in an orderly way, if it runs.
    pub async fn end(&self) -> Result<()> {
        if self.pid().is_err() {
            return Ok(());
        }
        let status = self.kill(Signal::SIGTERM).await?;
        ensure!(
            status.success(),
            "the daemon ended with {status} on SIGTERM"
        );
        Ok(())
    }

    /// Stops and removes every pod.
    pub async fn remove_everything(&self) -> Result<()> {
        if self.pid().is_err() {
            return Ok(());
        }
        let pods = self
            .runtime()
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?;
        for pod in pods.into_inner().items {
            let request = cri::StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            self.runtime()
                .stop_pod_sandbox(request)
                .await
                .context("StopPodSandbox")?;
            let request = cri::RemovePodSandboxRequest {
                pod_sandbox_id: pod.id,
            };
            self.runtime()
                .remove_pod_sandbox(request)
                .await
                .context("RemovePodSandbox")?;
        }
        Ok(())
    }

    /// Runs the command line against this daemon: exit code, standard output, standard error.
    pub async fn command(&self, args: &[&str]) -> Result<(i32, String, String)> {
        let mut command = Command::new(BINARY.as_str());
        let endpoint = format!("unix://{}", self.socket().display());
        command
            .args(args)
            .env("CONTAINER_RUNTIME_ENDPOINT", endpoint)
            .stdin(std::process::Stdio::null());
        let done = tokio::time::timeout(deadline(), command.kill_on_drop(true).output()).await;
        let done = done.with_context(|| format!("slipway {args:?} does not end"))??;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((
            done.status.code().unwrap_or(-1),
            text(done.stdout),
            text(done.stderr),
        ))
    }

    /// File of the daemon's own log.
    pub fn log_file(&self) -> PathBuf {
        self.0.env.root.join("daemon.log")
    }

    /// Waits until the daemon's own log has a line with all these words in it, after its first `skip` bytes.
    pub async fn logged(&self, skip: usize, words: &[&str]) -> Result<()> {
        let path = self.log_file();
        eventually(
            &format!("{words:?} in the daemon's log"),
            seconds(10),
            || async {
                let text = std::fs::read(&path)?;
                let text =
                    String::from_utf8_lossy(text.get(skip..).unwrap_or_default()).into_owned();
                Ok(text
                    .lines()
                    .any(|l| words.iter().all(|w| l.contains(w)))
                    .then_some(()))
            },
        )
        .await
    }

    /// The end of the daemon's own log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(self.log_file()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Directory for logs of pods.
    pub fn logs(&self) -> PathBuf {
        self.0.env.root.join("logs")
    }

    /// Names of the directories of pods in the run root.
    pub fn pod_dirs(&self) -> Vec<String> {
        // What is being removed has been renamed first.
        names(&self.0.env.root.join("r/pods"))
            .into_iter()
            .filter(|n| !n.starts_with('.'))
            .collect()
    }
}

/// Names in a directory, none when it is missing.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}
