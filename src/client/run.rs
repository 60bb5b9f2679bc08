//! `slipway run`: a pod with one container, from pull to removal.
//!
//! Whatever happens (an error, Ctrl-C, SIGTERM, a closed pipe), what was made is removed again. A pod
//! whose id never arrived is found by its unique id.
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slipway_proto::cri::*;
use tokio::sync::oneshot;

use crate::Global;
use crate::connection::Cri;
use crate::error::{ClientError, report};
use crate::exec::exit_code;
use crate::interrupt::Interrupts;
use crate::list::pair;
use crate::log_file::{Console, LogFile, Watch};
use crate::pod_config::{PodPlan, Publish, User, Volume, name_from_image};
use crate::quantity::{parse_cpus, parse_duration, parse_size};
use crate::timings::Timings;
use crate::{images, output, remove, wait};

/// How long a start that was interrupted may still take before it is abandoned.
const START_GRACE: Duration = Duration::from_secs(10);

/// When to pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Pull {
    Always,
    Missing,
    Never,
}

/// Options of `slipway run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Image of the container
    image: String,
    /// Command and arguments in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
    /// When to pull the image
    #[arg(long, value_enum, default_value = "missing")]
    pull: Pull,
    /// Name of pod and container (default: from the image)
    #[arg(long)]
    name: Option<String>,
    /// Namespace of the pod
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Environment variable; without a value it is taken from ours; may be repeated
    #[arg(long, short = 'e', value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Mount HOST:CONTAINER[:ro]; may be repeated
    #[arg(long, short = 'v', value_name = "HOST:CONTAINER[:OPTIONS]")]
    volume: Vec<Volume>,
    /// Publish a port, [[IP:]HOST:]CONTAINER[/PROTOCOL]; may be repeated
    #[arg(long, short = 'p', value_name = "PORT")]
    publish: Vec<Publish>,
    /// Host name (default: the pod's name)
    #[arg(long)]
    hostname: Option<String>,
    /// Use the node's network
    #[arg(long)]
    host_network: bool,
    /// User: UID[:GID] or a name
    #[arg(long, short = 'u')]
    user: Option<User>,
    /// Privileged pod and container
    #[arg(long)]
    privileged: bool,
    /// Memory limit, such as 64m or 1Gi
    #[arg(long, short = 'm', value_parser = parse_size)]
    memory: Option<i64>,
    /// Number of CPUs, such as 0.5
    #[arg(long, value_parser = parse_cpus, value_name = "N")]
    cpus: Option<i64>,
    /// Working directory (default: the image's)
    #[arg(long, short = 'w')]
    workdir: Option<String>,
    /// Runtime handler (default: the runtime's default)
    #[arg(long, default_value = "", hide_default_value = true)]
    runtime_handler: String,
    /// Print the ids and leave the pod running
    #[arg(long, short = 'd')]
    detach: bool,
    /// Annotation of pod and container; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    annotation: Vec<(String, String)>,
    /// Label of pod and container; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    /// Directory for the pod's log, kept afterwards (default: one under /var/log/pods, removed)
    #[arg(long)]
    log_dir: Option<PathBuf>,
    /// Show where the time of the start went, and the pod's address, on standard error
    #[arg(long)]
    timings: bool,
    /// How long the container may take to end when interrupted
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
    grace: Duration,
    /// Deadline of the pull
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "30m")]
    pull_timeout: Duration,
}

impl RunArgs {
    fn plan(&self) -> Result<PodPlan, ClientError> {
        let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(|source| {
            ClientError::System {
                what: "cannot make a unique id",
                source,
            }
        })?;
        let uid = uid.trim().to_owned();
        let name = self.name.clone().unwrap_or_else(|| {
            let suffix: String = uid.chars().take(8).collect();
            format!("{}-{suffix}", name_from_image(&self.image))
        });
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(ClientError::Usage(format!(
                "--name: '{name}' can't be a pod's name"
            )));
        }
        let mut env = Vec::with_capacity(self.env.len());
        for text in &self.env {
            match text.split_once('=') {
                Some(("", _)) => {
                    return Err(ClientError::Usage(format!(
                        "--env {text}: write KEY=VALUE or KEY"
                    )));
                }
                Some((key, value)) => env.push((key.to_owned(), value.to_owned())),
                None => env.extend(std::env::var(text).ok().map(|value| (text.clone(), value))),
            }
        }
        Ok(PodPlan {
            uid,
            name,
            namespace: self.namespace.clone(),
            // The image's entrypoint stays; what is written stands in place of its arguments.
            args: self.command.clone(),
            env,
            mounts: self.volume.iter().map(|volume| volume.0.clone()).collect(),
            ports: self.publish.iter().map(|port| port.0.clone()).collect(),
            hostname: self.hostname.clone().unwrap_or_default(),
            host_network: self.host_network,
            user: self.user.clone(),
            privileged: self.privileged,
            memory: self.memory.unwrap_or(0),
            cpu_quota: self.cpus.unwrap_or(0),
            workdir: self.workdir.clone().unwrap_or_default(),
            labels: self.label.iter().cloned().collect(),
            annotations: self.annotation.iter().cloned().collect(),
            image: self.image.clone(),
            user_image: self.image.clone(),
            ..PodPlan::default()
        })
    }
}

/// The pod's log directory; ours is removed with the pod.
#[derive(Debug)]
struct LogDirectory {
    path: PathBuf,
    ours: bool,
}

impl LogDirectory {
    fn make(args: &RunArgs, plan: &PodPlan) -> Result<LogDirectory, ClientError> {
        let make = |path: &Path| std::fs::create_dir_all(path.join(&plan.name));
        if let Some(path) = &args.log_dir {
            let failed = |source| ClientError::File {
                what: "cannot make the log directory",
                path: path.clone(),
                source,
            };
            let path = std::path::absolute(path).map_err(failed)?;
            make(&path).map_err(failed)?;
            return Ok(LogDirectory { path, ours: false });
        }
        let leaf = format!(
            "{}_{}_{}",
            plan.namespace.replace('/', "_"),
            plan.name,
            plan.uid
        );
        let path = Path::new("/var/log/pods").join(&leaf);
        if make(&path).is_ok() {
            return Ok(LogDirectory { path, ours: true });
        }
        let path = std::env::temp_dir().join(format!("slipway-run-{}", plan.uid));
        make(&path).map_err(|source| ClientError::File {
            what: "cannot make a log directory (name another with --log-dir)",
            path: path.clone(),
            source,
        })?;
        Ok(LogDirectory { path, ours: true })
    }

    fn remove(&self) -> Result<(), ClientError> {
        if !self.ours {
            return Ok(());
        }
        match std::fs::remove_dir_all(&self.path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(ClientError::File {
                    what: "cannot remove the log directory",
                    path: self.path.clone(),
                    source,
                })
            }
            _ => Ok(()),
        }
    }
}

/// What has been made so far.
#[derive(Debug)]
struct Session {
    cri: Cri,
    plan: PodPlan,
    handler: String,
    pod: Option<String>,
    container: Option<String>,
    /// RunPodSandbox was called: there may be a pod even if its id never arrived.
    asked: bool,
    timings: Timings,
}

/// Runs a pod and gives its container's exit code.
///
/// # Errors
/// What the runtime answers, or [`ClientError::Interrupted`]; everything is removed by then.
pub async fn run(args: &RunArgs, global: &Global) -> Result<u8, ClientError> {
    run_interruptible(args, global, &mut Interrupts::new()?).await
}

/// The same, with signals from elsewhere.
///
/// # Errors
/// As [`run`].
pub async fn run_interruptible(
    args: &RunArgs,
    global: &Global,
    interrupts: &mut Interrupts,
) -> Result<u8, ClientError> {
    let mut plan = args.plan()?;
    let cri = Cri::connect(global).await?;
    let image = tokio::select! {
        image = resolve_image(&cri, args) => image?,
        signal = interrupts.next() => return Err(ClientError::Interrupted(signal)),
    };
    plan.image = image;
    let logs = LogDirectory::make(args, &plan)?;
    plan.log_directory = logs.path.to_string_lossy().into_owned();
    let mut session = Session {
        cri,
        plan,
        handler: args.runtime_handler.clone(),
        pod: None,
        container: None,
        asked: false,
        timings: Timings::default(),
    };
    let result = session.live(args, interrupts).await;
    if args.detach && result.is_ok() {
        return result;
    }
    let removed = session.discard().await.and_then(|()| logs.remove());
    match (result, removed) {
        (result, Ok(())) => result,
        (Err(error), Err(second)) => {
            eprintln!("slipway: while removing the pod: {}", report(&second));
            Err(error)
        }
        (Ok(0), Err(second)) => Err(second),
        (Ok(code), Err(second)) => {
            eprintln!("slipway: while removing the pod: {}", report(&second));
            Ok(code)
        }
    }
}

async fn resolve_image(cri: &Cri, args: &RunArgs) -> Result<String, ClientError> {
    if args.pull != Pull::Always
        && let Some(image) = images::present(cri, &args.image).await?
    {
        return Ok(image.id);
    }
    if args.pull == Pull::Never {
        return Err(ClientError::ImageAbsent(args.image.clone()));
    }
    images::pull_one(cri, &args.image, None, None, args.pull_timeout).await
}

impl Session {
    async fn live(
        &mut self,
        args: &RunArgs,
        interrupts: &mut Interrupts,
    ) -> Result<u8, ClientError> {
        let log_path = Path::new(&self.plan.log_directory).join(self.plan.log_path());
        // Watched before there is a file, so that the first line is shown when it is written.
        let log = LogFile::new(&log_path);
        let watch_directory = log_path.clone();
        if let Err(error) = uncut(self.start(), interrupts).await? {
            return self.explain(error).await;
        }
        let container = self.container.clone().unwrap_or_default();
        if args.timings {
            self.show_timings(&container).await?;
        }
        if args.detach {
            let pod = self.pod.as_deref().unwrap_or_default();
            output::print(&format!("pod {pod}\ncontainer {container}\n"))?;
            return Ok(0);
        }
        let (end, ended) = oneshot::channel();
        let mut shown = show_log(log, watch_directory, ended);
        let status = tokio::select! {
            status = wait::exit(&self.cri, &container) => status?,
            early = &mut shown => {
                // The log ends before the container only when it can't be read or written.
                early.unwrap_or(Ok(()))?;
                wait::exit(&self.cri, &container).await?
            }
            signal = interrupts.next() => {
                let result = self.stop(&container, args.grace, interrupts).await;
                let _ = end.send(());
                let _ = tokio::time::timeout(START_GRACE, shown).await;
                result?;
                return Err(ClientError::Interrupted(signal));
            }
        };
        let _ = end.send(());
        tokio::select! {
            rest = &mut shown => rest.unwrap_or(Ok(()))?,
            signal = interrupts.next() => return Err(ClientError::Interrupted(signal)),
        }
        if status.reason == "OOMKilled" {
            eprintln!("slipway: the container ran out of memory (OOMKilled): see --memory");
        }
        Ok(exit_code(status.exit_code))
    }

    async fn start(&mut self) -> Result<(), ClientError> {
        let sandbox = self.plan.sandbox();
        let request = RunPodSandboxRequest {
            config: Some(sandbox.clone()),
            runtime_handler: self.handler.clone(),
        };
        self.asked = true;
        let call = self.cri.run_pod_sandbox(request);
        let pod = self
            .timings
            .measure("RunPodSandbox", call)
            .await?
            .pod_sandbox_id;
        self.pod = Some(pod.clone());
        let request = CreateContainerRequest {
            pod_sandbox_id: pod,
            config: Some(self.plan.container()),
            sandbox_config: Some(sandbox),
        };
        let call = self.cri.create_container(request);
        let container = self
            .timings
            .measure("CreateContainer", call)
            .await?
            .container_id;
        self.container = Some(container.clone());
        let call = self.cri.start_container(StartContainerRequest {
            container_id: container,
        });
        self.timings.measure("StartContainer", call).await.map(drop)
    }

    /// A container that can't be run has an exit code all the same (126, 127): that is ours then.
    async fn explain(&self, error: ClientError) -> Result<u8, ClientError> {
        let Some(container) = &self.container else {
            return Err(error);
        };
        match wait::status(&self.cri, container).await {
            Ok((status, _)) if (126..=128).contains(&status.exit_code) => {
                eprintln!("slipway: {}", report(&error));
                Ok(exit_code(status.exit_code))
            }
            _ => Err(error),
        }
    }

    async fn stop(
        &self,
        container: &str,
        grace: Duration,
        interrupts: &mut Interrupts,
    ) -> Result<(), ClientError> {
        tokio::select! {
            stopped = remove::stop_container(&self.cri, container, grace) => return stopped,
            _ = interrupts.next() => {}
        }
        // A second signal: no more patience.
        remove::stop_container(&self.cri, container, Duration::ZERO).await
    }

    async fn show_timings(&mut self, container: &str) -> Result<(), ClientError> {
        let pod = self.pod.clone().unwrap_or_default();
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod,
            verbose: true,
        };
        let response = self.cri.pod_sandbox_status(request).await?;
        self.timings.add_phases("RunPodSandbox", &response.info);
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: true,
        };
        let info = self.cri.container_status(request).await?.info;
        self.timings.add_phases("CreateContainer", &info);
        let network = response
            .status
            .and_then(|status| status.network)
            .unwrap_or_default();
        let mut addresses = vec![network.ip];
        addresses.extend(network.additional_ips.into_iter().map(|ip| ip.ip));
        addresses.retain(|address| !address.is_empty());
        let addresses = match addresses.is_empty() {
            true => "the node's".to_owned(),
            false => addresses.join(", "),
        };
        eprintln!("{}pod address: {addresses}", self.timings.render());
        Ok(())
    }

    /// Removes the pod, and with it the container.
    async fn discard(&mut self) -> Result<(), ClientError> {
        let mut pods: Vec<String> = self.pod.iter().cloned().collect();
        if pods.is_empty() && self.asked {
            let filter = PodSandboxFilter {
                label_selector: [(PodPlan::UID_LABEL.to_owned(), self.plan.uid.clone())].into(),
                ..Default::default()
            };
            let request = ListPodSandboxRequest {
                filter: Some(filter),
            };
            let response = self.cri.list_pod_sandbox(request).await?;
            pods.extend(response.items.into_iter().map(|pod| pod.id));
        }
        if let Some(container) = &self.container {
            let request = RemoveContainerRequest {
                container_id: container.clone(),
            };
            match self.cri.remove_container(request).await {
                Err(error) if error.code() != Some(tonic::Code::NotFound) => {
                    // The pod's removal takes it along.
                    eprintln!("slipway: {}", report(&error));
                }
                _ => {}
            }
        }
        for pod in pods {
            remove::discard_pod(&self.cri, &pod).await?;
        }
        Ok(())
    }
}

/// Awaits a call to its end even when a signal arrives, so that what it makes is known; then fails with
/// the signal. Gives the call up after [`START_GRACE`] or at the second signal.
async fn uncut<T>(
    call: impl Future<Output = Result<T, ClientError>>,
    interrupts: &mut Interrupts,
) -> Result<Result<T, ClientError>, ClientError> {
    tokio::pin!(call);
    let signal = tokio::select! {
        result = &mut call => return Ok(result),
        signal = interrupts.next() => signal,
    };
    tokio::select! {
        _ = tokio::time::timeout(START_GRACE, &mut call) => {}
        _ = interrupts.next() => {}
    }
    Err(ClientError::Interrupted(signal))
}

/// Shows the log in a thread of its own, because a terminal or pipe that nobody reads blocks it, and
/// signals must be heard all the same. Ends once `ended` has fired and the file has been read.
fn show_log(
    mut log: LogFile,
    path: PathBuf,
    mut ended: oneshot::Receiver<()>,
) -> oneshot::Receiver<Result<(), ClientError>> {
    let (done, shown) = oneshot::channel();
    std::thread::spawn(move || {
        let pump = async {
            let watch = Watch::new(&path)?;
            let mut console = Console::new(false);
            loop {
                log.drain(&mut console)?;
                tokio::select! {
                    changed = watch.changed() => changed?,
                    _ = &mut ended => return log.drain(&mut console),
                }
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let result = runtime
            .map_err(|source| ClientError::System {
                what: "cannot start the log's loop",
                source,
            })
            .and_then(|runtime| runtime.block_on(pump));
        let _ = done.send(result);
    });
    shown
}
