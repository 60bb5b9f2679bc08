//! The daemon: put together, started, reloaded, stopped. Pods outlive it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use slipway_config::{CgroupDriver, Config, LogFormat, LogLevel, diff_reloadable};
use slipway_image::{ImageStore, Platform, RegistryConfig, StoreConfig};
use slipway_network::{Cni, CniConfig};
use slipway_proto::admin::admin_server::AdminServer;
use slipway_proto::cri::image_service_server::ImageServiceServer;
use slipway_proto::cri::runtime_service_server::RuntimeServiceServer;
use slipway_runtime::client::Keepers;
use slipway_runtime::placement::Placement;
use slipway_spec::HostFacts;
use slipway_stream::{StreamServer, TlsFiles};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::admin::Administration;
use crate::cri::{Images, Runtime};
use crate::grpc;
use crate::logging::{self, Level};
use crate::memory;
use crate::pod::{Node, Sessions};
use crate::run_root::{self, RunRoot};

/// How long calls in flight and their work may take when the daemon is asked to end.
const DRAIN: Duration = Duration::from_secs(20);
/// What is left after that is cut off.
const CUT_OFF: Duration = Duration::from_secs(2);
/// More threads than this serve nobody: the work is in the keepers and the kernel.
const THREADS: usize = 8;
/// An idle thread for blocking work is given back soon, with its stack.
const BLOCKING_IDLE: Duration = Duration::from_secs(2);

/// Where the configuration comes from, and what the command line puts above it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Settings {
    /// Configuration file; drop-ins are read from config.d beside it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Unix socket on which the CRI is served
    #[arg(long, value_name = "PATH")]
    pub listen: Option<PathBuf>,
    /// State that lives until the next boot
    #[arg(long, value_name = "DIR")]
    pub run_root: Option<PathBuf>,
    /// Durable state: images and containers' writable layers
    #[arg(long, value_name = "DIR")]
    pub state_root: Option<PathBuf>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", value_parser = level)]
    pub log_level: Option<LogLevel>,
    /// text or json
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    pub log_format: Option<LogFormat>,
}

fn level(text: &str) -> Result<LogLevel, String> {
    named(text, "error, warn, info, debug or trace")
}

fn format(text: &str) -> Result<LogFormat, String> {
    named(text, "text or json")
}

/// The same names as in the configuration file.
fn named<T: serde::de::DeserializeOwned>(text: &str, allowed: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|_| format!("must be {allowed}"))
}

impl Settings {
    /// The configuration as it shall be.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn load(&self) -> anyhow::Result<(Config, Vec<PathBuf>)> {
        let (mut config, files) = Config::load(self.config.as_deref())?;
        let own = self.clone();
        for (value, place) in [
            (own.listen, &mut config.listen),
            (own.run_root, &mut config.run_root),
            (own.state_root, &mut config.state_root),
        ] {
            if let Some(path) = value {
                *place = std::path::absolute(&path)
                    .with_context(|| format!("{} can't be made absolute", path.display()))?;
            }
        }
        config.log.level = self.log_level.unwrap_or(config.log.level);
        config.log.format = self.log_format.unwrap_or(config.log.format);
        Ok((config, files))
    }
}

/// Whether this machine has what the configuration asks of it.
///
/// # Errors
/// What it lacks, and which key to change.
pub fn fits_host(config: &Config, host: &HostFacts) -> anyhow::Result<()> {
    if config.cgroup.driver == CgroupDriver::Systemd {
        // v1: systemd delegates no v1 hierarchy, and its properties for v1 are going away.
        anyhow::ensure!(
            host.cgroup_v2,
            "cgroup.driver: \"systemd\" needs a host with pure cgroup v2, and this one has v1 or both \
             (/sys/fs/cgroup is not cgroup2); use \"cgroupfs\", or boot with \
             systemd.unified_cgroup_hierarchy=1"
        );
        anyhow::ensure!(
            host.systemd,
            "cgroup.driver: \"systemd\" needs systemd as PID 1, and it is not (there is no \
             /run/systemd/system); use \"cgroupfs\""
        );
    }
    let monitor = config.cgroup.monitor.as_str();
    anyhow::ensure!(
        !monitor.ends_with(".slice") || monitor.starts_with('/') || host.systemd,
        "cgroup.monitor: {monitor:?} is a slice, and systemd is not PID 1 here; use \"own\" or a path"
    );
    anyhow::ensure!(
        !monitor.starts_with('/') || !host.systemd,
        "cgroup.monitor: {monitor:?} is a path, and systemd is PID 1 here, which knows slices; use \"own\" \
         or name.slice"
    );
    Ok(())
}

/// Where keepers are to be born.
fn placement(config: &Config, host: &HostFacts) -> Placement {
    match config.cgroup.monitor.as_str() {
        _ if !host.cgroup_v2 => Placement::Daemon,
        "own" if host.systemd => Placement::Slice("system.slice".to_owned()),
        "own" => Placement::Cgroup("/slipway-keepers".into()),
        // From there into the pod's cgroup.
        "daemon" | "pod" => Placement::Daemon,
        path if path.starts_with('/') => Placement::Cgroup(path.into()),
        slice => Placement::Slice(slice.to_owned()),
    }
}

/// Runs the daemon until it is asked to end.
///
/// # Errors
/// When it can't start, or its server fails.
pub fn serve(settings: &Settings, keepers: Keepers) -> anyhow::Result<()> {
    let (mut config, files) = settings.load()?;
    let host = HostFacts::detect();
    fits_host(&config, &host)?;
    let level = logging::start(config.log.format, config.log.level);
    // Files have the modes that are asked for, whoever started us.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    memory::share_heaps();
    let run_root = RunRoot::take(&config.run_root)?;
    config.run_root.clone_from(&run_root.path);
    tracing::info!(version = crate::VERSION, config = ?files, run_root = %config.run_root.display(),
        state_root = %config.state_root.display(), "slipway starts");
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_keep_alive(BLOCKING_IDLE)
        .enable_all()
        .build()
        .context("can't start the event loop")?;
    let result = runtime.block_on(run(settings, config, host, keepers, level));
    runtime.shutdown_timeout(CUT_OFF);
    drop(run_root);
    result
}

async fn run(
    settings: &Settings,
    config: Config,
    host: HostFacts,
    keepers: Keepers,
    level: Level,
) -> anyhow::Result<()> {
    // From here on a signal is ours to handle.
    let mut terminate = signal(SignalKind::terminate()).context("can't handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't handle SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("can't handle SIGHUP")?;

    if let Err(error) = keepers.place(placement(&config, &host)).await {
        // Nothing that pods need depends on it.
        tracing::warn!(
            error = crate::pod::chain(&error),
            "keepers are where the daemon is"
        );
    }
    let apparmor = config.pod.apparmor_profile.clone();
    let apparmor = tokio::spawn(async move { crate::apparmor::load(&apparmor).await });
    let store = store_config(&config);
    let images = tokio::task::spawn_blocking(move || ImageStore::open(store))
        .await?
        .context("can't open the image store")?;
    let cni = Cni::new(cni_config(&config));
    let listen = config.listen.clone();
    let max_message = usize::try_from(config.limits.max_message.bytes()).unwrap_or(usize::MAX);
    let node = Node::new(config, host, keepers, images, cni);
    // Nobody waits for them but their own pods.
    node.tasks.spawn(node.runtimes().ask_all());
    let found = node
        .recover()
        .await
        .context("can't find out what runs on this node")?;
    tracing::info!(
        pods = found.pods,
        containers = found.containers,
        set_aside = found.set_aside,
        "state recovered"
    );

    if let Ok(Err(error)) = apparmor.await {
        tracing::warn!(
            error = crate::pod::chain(&error),
            "containers have no AppArmor profile unless they name one"
        );
    }
    let end_plugins = CancellationToken::new();
    (node.start_plugins(end_plugins.clone()).await).context("can't let NRI plugins take part")?;
    let listener = run_root::listen(&listen)?;
    listener
        .set_nonblocking(true)
        .context("can't prepare the socket")?;
    let listener = UnixListener::from_std(listener)?;
    let streams = StreamServer::new(stream_config(&node.config()), Sessions(node.clone()));
    let streams = Arc::new(streams.await.context("can't serve streams")?);
    tracing::info!(address = %streams.address(), "streaming exec, attach and port-forward");
    let end_streams = CancellationToken::new();
    let streaming = {
        let (streams, ended) = (streams.clone(), end_streams.clone());
        tokio::spawn(async move { streams.serve(ended).await })
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut routes = Routes::builder();
    routes
        .add_service(
            RuntimeServiceServer::new(Runtime(node.clone(), streams))
                .max_decoding_message_size(max_message)
                .max_encoding_message_size(max_message),
        )
        .add_service(
            ImageServiceServer::new(Images(node.clone()))
                .max_decoding_message_size(max_message)
                .max_encoding_message_size(max_message),
        )
        .add_service(AdminServer::new(Administration(node.clone())));
    let server = grpc::serve(listener, routes.routes(), async {
        let _ = stopped.await;
    });
    let mut server = tokio::spawn(server);
    tracing::info!(socket = %listen.display(), "listening");
    notify(&[NotifyState::Ready]);
    memory::give_back();
    tokio::spawn(memory::keep_small());

    let asked_by = loop {
        tokio::select! {
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hangup.recv() => reload(settings, &node, &level).await,
            ended = &mut server => {
                ended.context("the server failed")?;
                anyhow::bail!("the server ended by itself");
            }
        }
    };
    tracing::info!(signal = asked_by, "shutting down; pods go on");
    notify(&[NotifyState::Stopping]);
    // New daemons must not mistake ours for a live one's while it drains.
    let _ = std::fs::remove_file(&listen);
    // Subscribers would hold their connections for ever.
    node.feed.close();
    let _ = stop.send(());
    // Clients of streams have to come back anyway.
    end_streams.cancel();
    let drained = tokio::time::timeout(DRAIN, async {
        let _ = (&mut server).await;
        let _ = streaming.await;
        node.tasks.close();
        node.tasks.wait().await;
    });
    if drained.await.is_err() {
        tracing::warn!(patience = ?DRAIN, "calls in flight are cut off; the next start settles what they leave");
        server.abort();
    }
    end_plugins.cancel();
    node.stop_plugins().await;
    Ok(())
}

/// Takes over what can change in a running daemon; says what can't.
async fn reload(settings: &Settings, node: &Arc<Node>, level: &Level) {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
    let old = node.config();
    match settings.load() {
        Ok((new, _)) => {
            let changes = diff_reloadable(&old, &new);
            let merged = old.reloaded(&new);
            level.set(merged.log.level);
            let registry = registry_config(&merged);
            if let Err(error) = node
                .images
                .set_registry(registry, merged.images.pull_progress_timeout)
            {
                tracing::error!(error = error.chain(), "registry settings stay as they were");
            }
            node.reconfigure(merged);
            node.cni.reload();
            tracing::info!(changed = ?changes.reloadable, "configuration reloaded");
            if !changes.restart.is_empty() {
                tracing::warn!(keys = ?changes.restart, "these settings change at the next start only");
            }
        }
        Err(error) => tracing::error!(error = format!("{error:#}"), "configuration not reloaded"),
    }
    notify(&[NotifyState::Ready]);
}

/// Tells systemd, if it asked to be told.
fn notify(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "can't notify the service manager");
    }
}

fn store_config(config: &Config) -> StoreConfig {
    StoreConfig {
        root: config.state_root.clone(),
        registry: registry_config(config),
        max_parallel_downloads: config.images.max_parallel_downloads,
        pull_progress_timeout: config.images.pull_progress_timeout,
        platform: Platform::host(),
        pinned: config.images.pinned.clone(),
    }
}

fn registry_config(config: &Config) -> RegistryConfig {
    let images = &config.images;
    RegistryConfig {
        insecure: images.insecure_registries.clone(),
        ca_files: images.ca_files.clone(),
        mirrors: images.mirrors.clone(),
        connect_timeout: images.connect_timeout,
        request_timeout: images.request_timeout,
        retries: images.retries,
    }
}

fn stream_config(config: &Config) -> slipway_stream::Config {
    let stream = &config.stream;
    let tls = stream.tls_certificate.clone().zip(stream.tls_key.clone());
    slipway_stream::Config {
        address: stream.address,
        base_url: stream.base_url.clone(),
        tls: tls.map(|(certificate, key)| TlsFiles { certificate, key }),
        idle_timeout: stream.idle_timeout,
        ..slipway_stream::Config::default()
    }
}

fn cni_config(config: &Config) -> CniConfig {
    let network = &config.network;
    CniConfig {
        conf_dir: network.conf_dir.clone(),
        bin_dirs: network.bin_dirs.clone(),
        cache_dir: network.cache_dir.clone(),
        timeout: network.timeout,
        ..CniConfig::default()
    }
}
