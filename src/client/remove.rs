//! `slipway stop`, `rm`, `stopp` and `rmp`.
use std::time::Duration;

use slipway_proto::cri::*;

use crate::Global;
use crate::connection::Cri;
use crate::error::{ClientError, report};
use crate::lookup::{self, Found, Kinds};
use crate::output;
use crate::quantity::parse_duration;

/// Options of `slipway stop`.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    /// Ids (or their beginnings) or names of containers or pods
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
    /// How long a container may take to end before it is killed
    #[arg(long, short = 't', value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
    grace: Duration,
}

/// Options of `slipway stopp`.
#[derive(Debug, clap::Args)]
pub struct StopPodArgs {
    /// Ids (or their beginnings) or names of pods
    #[arg(required = true, value_name = "POD")]
    ids: Vec<String>,
}

/// Options of `slipway rm` and `slipway rmp`.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// Ids (or their beginnings) or names
    #[arg(required_unless_present = "all", value_name = "ID")]
    ids: Vec<String>,
    /// Remove all containers (rm) or pods (rmp)
    #[arg(long, short = 'a')]
    all: bool,
    /// Kill what runs
    #[arg(long, short = 'f')]
    force: bool,
}

/// Stops a container; the call's deadline covers the grace period.
///
/// # Errors
/// What the runtime answers.
pub async fn stop_container(cri: &Cri, id: &str, grace: Duration) -> Result<(), ClientError> {
    let timeout = i64::try_from(grace.as_secs_f64().ceil() as u64).unwrap_or(i64::MAX);
    let request = StopContainerRequest {
        container_id: id.to_owned(),
        timeout,
    };
    cri.with_timeout(grace.saturating_add(cri.timeout()))
        .stop_container(request)
        .await
        .map(drop)
}

/// Stops and removes a pod with all that it holds.
///
/// # Errors
/// What the runtime answers.
pub async fn discard_pod(cri: &Cri, id: &str) -> Result<(), ClientError> {
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    cri.stop_pod_sandbox(stop).await?;
    let remove = RemovePodSandboxRequest {
        pod_sandbox_id: id.to_owned(),
    };
    cri.remove_pod_sandbox(remove).await.map(drop)
}

async fn stop_one(
    cri: &Cri,
    id: &str,
    kinds: Kinds,
    grace: Duration,
) -> Result<String, ClientError> {
    match lookup::find(cri, id, kinds).await? {
        Found::Container(container) => {
            stop_container(cri, &container.id, grace).await?;
            Ok(container.id)
        }
        Found::Pod(pod) => {
            let request = StopPodSandboxRequest {
                pod_sandbox_id: pod.id.clone(),
            };
            cri.stop_pod_sandbox(request).await?;
            Ok(pod.id)
        }
        Found::Image(_) => Err(ClientError::NotFound {
            kinds: "container or pod",
            id: id.to_owned(),
        }),
    }
}

async fn remove_one(cri: &Cri, id: &str, kinds: Kinds, force: bool) -> Result<String, ClientError> {
    match lookup::find(cri, id, kinds).await? {
        Found::Container(container) => {
            if container.state() == ContainerState::ContainerRunning {
                if !force {
                    return Err(ClientError::Running(format!("container {}", container.id)));
                }
                stop_container(cri, &container.id, Duration::ZERO).await?;
            }
            let request = RemoveContainerRequest {
                container_id: container.id.clone(),
            };
            cri.remove_container(request).await?;
            Ok(container.id)
        }
        Found::Pod(pod) => {
            if pod.state() == PodSandboxState::SandboxReady && !force {
                return Err(ClientError::Running(format!("pod {}", pod.id)));
            }
            discard_pod(cri, &pod.id).await?;
            Ok(pod.id)
        }
        Found::Image(_) => Err(ClientError::NotFound {
            kinds: "container or pod",
            id: id.to_owned(),
        }),
    }
}

/// Reports each id's outcome: done ids on standard output, failures on standard error.
#[derive(Debug, Default)]
struct Tally {
    failures: usize,
    total: usize,
}

impl Tally {
    fn add(&mut self, id: &str, result: Result<String, ClientError>) -> Result<(), ClientError> {
        self.total += 1;
        match result {
            Ok(done) => output::print(&format!("{done}\n")),
            Err(error) => {
                eprintln!("slipway: {id}: {}", report(&error));
                self.failures += 1;
                Ok(())
            }
        }
    }

    fn result(self) -> Result<(), ClientError> {
        match self.failures {
            0 => Ok(()),
            failures => Err(ClientError::Some(failures, self.total)),
        }
    }
}

/// Stops containers or pods, going on after a failure.
///
/// # Errors
/// [`ClientError::Some`] when one failed.
pub async fn stop(args: &StopArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut tally = Tally::default();
    for id in &args.ids {
        tally.add(id, stop_one(&cri, id, Kinds::Both, args.grace).await)?;
    }
    tally.result()
}

/// Stops pods, going on after a failure.
///
/// # Errors
/// [`ClientError::Some`] when one failed.
pub async fn stop_pods(args: &StopPodArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut tally = Tally::default();
    for id in &args.ids {
        tally.add(id, stop_one(&cri, id, Kinds::Pods, Duration::ZERO).await)?;
    }
    tally.result()
}

/// Removes containers or pods, going on after a failure; with `pods_only` ids mean pods.
///
/// # Errors
/// [`ClientError::Some`] when one failed.
pub async fn remove(
    args: &RemoveArgs,
    global: &Global,
    pods_only: bool,
) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut ids = args.ids.clone();
    if args.all && pods_only {
        ids.extend(lookup::pods(&cri).await?.into_iter().map(|pod| pod.id));
    } else if args.all {
        ids.extend(
            lookup::containers(&cri)
                .await?
                .into_iter()
                .map(|container| container.id),
        );
    }
    let kinds = if pods_only { Kinds::Pods } else { Kinds::Both };
    let mut tally = Tally::default();
    for id in &ids {
        tally.add(id, remove_one(&cri, id, kinds, args.force).await)?;
    }
    tally.result()
}
