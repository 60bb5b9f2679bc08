//! A pod's life against one runtime, timed call by call.
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use slipway_proto::cri::*;

use crate::connection::Cri;
use crate::error::{ClientError, report};
use crate::pod_config::PodPlan;
use crate::remove;

/// Name of the sum RunPodSandbox + CreateContainer + StartContainer.
pub const READY: &str = "pod ready";
/// Name of the sum CreateContainer + StartContainer, and of the same two commands of a bare runtime.
pub const MADE: &str = "create and start";
/// Name of the sum of all calls that take a pod down.
pub const TEARDOWN: &str = "teardown";
/// Label of all pods of a run, to find those whose id never arrived.
const RUN_LABEL: &str = "slipway.dev/bench";

/// What runs in the pods.
#[derive(Debug, Clone)]
pub struct Workload {
    /// The image, by its id.
    pub image: String,
    /// Command of the containers.
    pub command: Vec<String>,
    /// Run in a container before it is stopped, unmeasured; returns once the command can be told to end.
    pub await_ready: Option<Vec<String>>,
    /// Command of ExecSync.
    pub exec: Vec<String>,
    /// Containers in a pod.
    pub containers: usize,
    /// Grace period of StopContainer.
    pub grace: Duration,
    /// Directory for logs.
    pub logs: PathBuf,
    /// Value of the run's label.
    pub run: String,
}

/// Named durations.
pub type Timed = Vec<(&'static str, Duration)>;

/// A runtime under measurement.
#[derive(Debug)]
pub struct Bencher {
    /// Name in reports.
    pub name: String,
    /// The socket.
    pub endpoint: String,
    /// Runtime handler.
    pub handler: String,
    /// The connection.
    pub cri: Cri,
    /// What runs.
    pub work: Workload,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// The containers' ids.
    pub containers: Vec<String>,
}

/// Pods that were started at once.
#[derive(Debug)]
pub struct Batch {
    /// Each pod's durations.
    pub pods: Vec<Result<Timed, ClientError>>,
    /// How many became ready.
    pub ready: usize,
    /// Time until the last was ready.
    pub wall: Duration,
}

async fn timed<T>(
    times: &mut Timed,
    name: &'static str,
    call: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let started = Instant::now();
    let result = call.await?;
    times.push((name, started.elapsed()));
    Ok(result)
}

impl Bencher {
    fn plan(&self, host_network: bool) -> Result<PodPlan, ClientError> {
        let uid = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let name = format!("bench-{}", &uid[..12]);
        let logs = self.work.logs.join(&name);
        std::fs::create_dir_all(logs.join(&name)).map_err(|source| ClientError::File {
            what: "cannot make",
            path: logs.clone(),
            source,
        })?;
        Ok(PodPlan {
            name,
            uid,
            namespace: "slipway-bench".to_owned(),
            log_directory: logs.to_string_lossy().into_owned(),
            image: self.work.image.clone(),
            user_image: self.work.image.clone(),
            command: self.work.command.clone(),
            host_network,
            labels: [(RUN_LABEL.to_owned(), self.work.run.clone())].into(),
            ..PodPlan::default()
        })
    }

    /// Starts a pod. What was made of a pod that fails is removed.
    ///
    /// # Errors
    /// What the runtime answers.
    pub async fn start(&self, host_network: bool, times: &mut Timed) -> Result<Pod, ClientError> {
        let plan = self.plan(host_network)?;
        let sandbox = plan.sandbox();
        let requests: Vec<ContainerConfig> = (0..self.work.containers)
            .map(|index| {
                let mut config = plan.container();
                if index > 0 {
                    config.log_path = format!("{}/{index}.log", plan.name);
                    config.metadata = Some(ContainerMetadata {
                        name: format!("{}-{index}", plan.name),
                        attempt: 0,
                    });
                }
                config
            })
            .collect();
        let began = Instant::now();
        let request = RunPodSandboxRequest {
            config: Some(sandbox.clone()),
            runtime_handler: self.handler.clone(),
        };
        let call = self.cri.run_pod_sandbox(request);
        let id = timed(times, "RunPodSandbox", call).await?.pod_sandbox_id;
        let mut pod = Pod {
            id,
            containers: Vec::new(),
        };
        for config in requests {
            if let Err(error) = self.add_container(&mut pod, config, &sandbox, times).await {
                self.discard(&pod).await;
                return Err(error);
            }
        }
        times.push((READY, began.elapsed()));
        Ok(pod)
    }

    async fn add_container(
        &self,
        pod: &mut Pod,
        config: ContainerConfig,
        sandbox: &PodSandboxConfig,
        times: &mut Timed,
    ) -> Result<(), ClientError> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        };
        let began = Instant::now();
        let call = self.cri.create_container(request);
        let id = timed(times, "CreateContainer", call).await?.container_id;
        pod.containers.push(id.clone());
        let call = self
            .cri
            .start_container(StartContainerRequest { container_id: id });
        timed(times, "StartContainer", call).await?;
        times.push((MADE, began.elapsed()));
        Ok(())
    }

    /// Takes a pod down in the kubelet's order.
    ///
    /// # Errors
    /// What the runtime answers; the rest of the pod is removed in any case.
    pub async fn stop(&self, pod: &Pod, times: &mut Timed) -> Result<(), ClientError> {
        let result = self.stop_steps(pod, times).await;
        if result.is_err() {
            self.discard(pod).await;
        }
        result
    }

    async fn stop_steps(&self, pod: &Pod, times: &mut Timed) -> Result<(), ClientError> {
        let cri = &self.cri;
        for (id, command) in pod
            .containers
            .iter()
            .zip(self.work.await_ready.iter().cycle())
        {
            cri.exec_sync(ExecSyncRequest {
                container_id: id.clone(),
                cmd: command.clone(),
                timeout: 60,
            })
            .await?;
        }
        let began = Instant::now();
        for id in &pod.containers {
            let call = remove::stop_container(cri, id, self.work.grace);
            timed(times, "StopContainer", call).await?;
        }
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        timed(times, "StopPodSandbox", cri.stop_pod_sandbox(request)).await?;
        for id in &pod.containers {
            let request = RemoveContainerRequest {
                container_id: id.clone(),
            };
            timed(times, "RemoveContainer", cri.remove_container(request)).await?;
        }
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        timed(times, "RemovePodSandbox", cri.remove_pod_sandbox(request)).await?;
        times.push((TEARDOWN, began.elapsed()));
        Ok(())
    }

    async fn discard(&self, pod: &Pod) {
        if let Err(error) = remove::discard_pod(&self.cri, &pod.id).await {
            eprintln!(
                "slipway: {}: pod {} stays: {}",
                self.name,
                pod.id,
                report(&error)
            );
        }
    }

    async fn execute(&self, pod: &Pod, times: &mut Timed) -> Result<(), ClientError> {
        let Some(container) = pod.containers.first() else {
            return Ok(());
        };
        let request = ExecSyncRequest {
            container_id: container.clone(),
            cmd: self.work.exec.clone(),
            timeout: 60,
        };
        let response = timed(times, "ExecSync", self.cri.exec_sync(request)).await?;
        match response.exit_code {
            0 => Ok(()),
            code => {
                let command = self.work.exec.join(" ");
                Err(ClientError::Usage(format!(
                    "--exec-cmd '{command}' ended with exit code {code}"
                )))
            }
        }
    }

    /// A pod's whole life.
    ///
    /// # Errors
    /// What the runtime answers; the pod is removed.
    pub async fn one(&self, host_network: bool, exec: usize) -> Result<Timed, ClientError> {
        let mut times = Timed::new();
        let pod = self.start(host_network, &mut times).await?;
        for _ in 0..exec {
            if let Err(error) = self.execute(&pod, &mut times).await {
                self.discard(&pod).await;
                return Err(error);
            }
        }
        self.stop(&pod, &mut times).await?;
        Ok(times)
    }

    /// Starts a pod that stays, and returns the OCI specification of its container, as the runtime tells it (JSON).
    ///
    /// # Errors
    /// What the runtime answers, or that it tells none.
    pub async fn spec_of_one(&self, host_network: bool) -> Result<String, ClientError> {
        let pod = self.start(host_network, &mut Timed::new()).await?;
        let request = ContainerStatusRequest {
            container_id: pod.containers.first().cloned().unwrap_or_default(),
            verbose: true,
        };
        let mut answer = self.cri.container_status(request).await?;
        let info = answer.info.remove("info").unwrap_or_default();
        let mut info: serde_json::Value = serde_json::from_str(&info).unwrap_or_default();
        match info["runtimeSpec"].take() {
            spec @ serde_json::Value::Object(_) => Ok(spec.to_string()),
            _ => Err(ClientError::Usage(format!(
                "--oci-like {}: its verbose ContainerStatus has no runtimeSpec",
                self.name
            ))),
        }
    }

    /// Starts `count` pods at once, and when all are ready takes them down at once.
    pub async fn batch(&self, host_network: bool, count: usize) -> Batch {
        let began = Instant::now();
        let started = join_all((0..count).map(|_| async {
            let mut times = Timed::new();
            self.start(host_network, &mut times)
                .await
                .map(|pod| (pod, times))
        }))
        .await;
        let wall = began.elapsed();
        let ready = started.iter().filter(|pod| pod.is_ok()).count();
        let pods = join_all(started.into_iter().map(|started| async {
            let (pod, mut times) = started?;
            self.stop(&pod, &mut times).await?;
            Ok(times)
        }))
        .await;
        Batch { pods, ready, wall }
    }

    /// Removes every pod of this run that is left, such as one whose start was interrupted.
    pub async fn sweep(&self) {
        let filter = PodSandboxFilter {
            label_selector: [(RUN_LABEL.to_owned(), self.work.run.clone())].into(),
            ..Default::default()
        };
        let request = ListPodSandboxRequest {
            filter: Some(filter),
        };
        match self.cri.list_pod_sandbox(request).await {
            Ok(response) => {
                for pod in response.items {
                    self.discard(&Pod {
                        id: pod.id,
                        containers: Vec::new(),
                    })
                    .await;
                }
            }
            Err(error) => eprintln!("slipway: {}: {}", self.name, report(&error)),
        }
    }
}
