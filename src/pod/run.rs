//! RunPodSandbox: from the kubelet's configuration to a READY pod.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slipway_config::MonitorCgroup;
use slipway_network::{Bandwidth, DnsConfig, PodNetwork, PortMapping, Protocol};
use slipway_nri::Turn;
use slipway_proto::{cri, keeper};
use slipway_runtime::client::{Events, Keeper};
use slipway_spec::SandboxPlan;

use super::assemble;
use super::create::AFTER_RUNTIME;
use super::error::{PodError, file};
use super::events;
use super::feed::Kind;
use super::files::{Files, HOSTNAME, HOSTS, RESOLV_CONF};
use super::leftovers;
use super::names::pod_name;
use super::node::{Node, new_id, now};
use super::phases::{Phases, Trace, describe};
use super::record::{self, Namespaces, PodRecord};
use super::relabel;
use super::sandbox::Pod;
use super::state::PodStage;

impl Node {
    /// Runs a pod sandbox and returns its id. Goes on to its end if the caller gives up; the same
    /// request then gets the finished pod.
    ///
    /// # Errors
    /// What is wrong with the request, or which step failed; nothing is left of the pod then.
    pub async fn run_pod(
        self: &Arc<Self>,
        request: cri::RunPodSandboxRequest,
    ) -> Result<String, PodError> {
        let missing = |what: &str| PodError::Invalid(format!("RunPodSandbox needs {what}"));
        let config = request.config.as_ref().ok_or_else(|| missing("a config"))?;
        let metadata = config
            .metadata
            .as_ref()
            .ok_or_else(|| missing("config.metadata"))?;
        if metadata.name.is_empty() || metadata.namespace.is_empty() {
            return Err(missing("config.metadata with name and namespace"));
        }
        let name = pod_name(
            &metadata.name,
            &metadata.namespace,
            &metadata.uid,
            metadata.attempt,
        );
        let make = self.clone().make_pod(request.clone());
        self.pod_names.make(&name, request, make).await
    }

    async fn make_pod(
        self: Arc<Self>,
        request: cri::RunPodSandboxRequest,
    ) -> Result<String, PodError> {
        let phases = Phases::start();
        let config = request.config.unwrap_or_default();
        let handler = self.runtimes().resolve(&request.runtime_handler)?;
        let driver = handler.driver().await?;
        let runtime = handler.name.clone();
        let id = new_id()?;
        let plan = assemble::pod(&self, &id, &config)?;
        if plan.setup.users.is_some() && !handler.features().user_namespaces {
            let why = handler.no_user_namespaces();
            return Err(PodError::NoUserNamespaces { id, runtime, why });
        }
        let wishes = Wishes::new(&config, &plan)?;
        let dir = self.pods_dir().join(&id);
        let selinux_level = match &self.host.selinux {
            Some(_) => {
                let asked = slipway_spec::level_of_pod(&config);
                let asked = asked.map_err(|source| PodError::Spec {
                    what: format!("pod sandbox {id}"),
                    source,
                })?;
                Some(asked.unwrap_or_else(|| self.levels.take(&id)))
            }
            None => None,
        };
        let draft = PodRecord {
            schema: PodRecord::SCHEMA,
            id: id.clone(),
            boot_id: self.boot_id.clone(),
            created_at: 0,
            runtime,
            handler: request.runtime_handler,
            driver,
            config,
            namespaces: Namespaces::default(),
            cgroup: plan.setup.cgroup.clone(),
            made_cgroup: false,
            selinux_level,
            ips: Vec::new(),
            stopped: false,
            phases: Vec::new(),
        };
        let shared = draft.driver.as_ref().is_some_and(|d| d.pod_sandbox);
        match self.bring_up(draft, plan, wishes, &dir, phases).await {
            Ok((pod, follow, turn)) => {
                let laps = pod.record.phases.clone();
                tracing::info!(pod = id, phases = describe(&laps), "pod sandbox runs");
                self.pods.insert(&id, pod.clone());
                pod.happened(Kind::Created, &id);
                pod.happened(Kind::Started, &id);
                drop(turn);
                events::follow(pod, follow);
                self.traces.add(Trace {
                    method: "RunPodSandbox",
                    pod_id: id.clone(),
                    container_id: String::new(),
                    ended_at: now(),
                    phases: laps,
                });
                Ok(id)
            }
            Err(error) => {
                self.undo_pod(&id, &dir, shared).await;
                Err(error)
            }
        }
    }

    async fn bring_up(
        &self,
        mut record: PodRecord,
        plan: SandboxPlan,
        wishes: Wishes,
        dir: &Path,
        mut phases: Phases,
    ) -> Result<(Arc<Pod>, Events, Option<Turn>), PodError> {
        let failed = |action| {
            let what = format!("pod sandbox {}", record.id);
            move |source| PodError::Keeper {
                action,
                what,
                source,
            }
        };
        let (spawn_failed, setup_failed, sandbox_failed, follow_failed) = (
            failed("start the keeper of"),
            failed("make the namespaces of"),
            failed("start the shim of"),
            failed("follow"),
        );
        make_dirs(dir, plan.log_directory.as_deref())?;
        phases.mark("prepare");
        let mut plan = plan;
        let in_pod = match record.handler(&self.config()) {
            Some(settings) if settings.monitor_cgroup == Some(MonitorCgroup::Pod) => true,
            _ => self.config().cgroup.monitor == "pod",
        };
        let beside = self.host.cgroup_v2 && in_pod;
        plan.setup.keeper_in_slice = beside && plan.setup.systemd;
        let leaf = (beside && !plan.setup.systemd).then_some(plan.setup.cgroup.as_str());
        let keeper = self
            .keepers
            .spawn(&record.id, dir, leaf)
            .await
            .map_err(spawn_failed)?;
        phases.mark("keeper");
        let timeout = self.config().limits.sandbox_timeout;
        let sandbox = (plan.hostname.clone(), plan.setup.systemd);
        let made = keeper
            .setup_sandbox(plan.setup, timeout)
            .await
            .map_err(setup_failed)?;
        let follow = keeper.subscribe().await.map_err(follow_failed)?;
        record.made_cgroup = made.made_cgroup;
        record.namespaces = namespaces(made);
        phases.mark("namespaces");
        if !record.namespaces.network.is_empty() {
            record.ips = self.attach(&record, &wishes).await?;
            phases.mark("network");
        }
        wishes.files.write(dir, &record.ips)?;
        if let (Some(selinux), Some(level)) = (&self.host.selinux, &record.selinux_level) {
            label_files(dir, &format!("{}:{level}", selinux.file.join(":")))?;
        }
        phases.mark("files");
        if let Some(start) = super::shim::start(&record, sandbox, &self.config()) {
            // The keeper ends it in time, and says what the shim said.
            let timeout =
                Duration::from_millis(start.runtime.as_ref().map_or(0, |r| r.create_timeout_ms));
            keeper
                .start_sandbox(start, timeout + AFTER_RUNTIME)
                .await
                .map_err(sandbox_failed)?;
            phases.mark("shim");
        }
        record.created_at = now();
        // Held until the pod can be seen: see `slipway_nri`.
        let turn = self.tell_run(&record).await?;
        record.phases = phases.laps().to_vec();
        if let Err(error) = record::write(dir, &record) {
            self.untell_run(turn.as_ref(), &record).await;
            return Err(error);
        }
        phases.mark("record");
        record.phases = phases.finish();
        let pod = Pod::new(record, dir, PodStage::Ready, self.feed.clone());
        Ok((pod, follow, turn))
    }

    async fn attach(&self, record: &PodRecord, wishes: &Wishes) -> Result<Vec<IpAddr>, PodError> {
        let metadata = record.config.metadata.clone().unwrap_or_default();
        let netns = record.namespaces.network.as_str();
        let mut pod = PodNetwork::new(
            &record.id,
            metadata.namespace,
            metadata.name,
            metadata.uid,
            netns,
        );
        pod.port_mappings.clone_from(&wishes.port_mappings);
        pod.dns.clone_from(&wishes.dns);
        pod.bandwidth = wishes.bandwidth;
        pod.cgroup_path = Some(record.cgroup.clone());
        let config = self.config();
        let handler = record.handler(&config);
        pod.conf_dir = handler.and_then(|handler| handler.network_conf_dir.clone());
        let result = self
            .cni
            .add(&pod)
            .await
            .map_err(|source| PodError::Network {
                action: "set up",
                id: record.id.clone(),
                source,
            })?;
        Ok(result.ips)
    }

    /// Leaves nothing of a pod that could not be made; `shared`: its containers were to share a sandbox. Every step is tried;
    /// what fails is logged.
    async fn undo_pod(self: &Arc<Self>, id: &str, dir: &Path, shared: bool) {
        self.levels.release(id);
        let mut problems = Vec::new();
        if shared {
            let netns = dir.join("ns").join("net");
            self.give_addresses_back_to(id, netns).await;
        }
        if let Err(e) = self.cni.del(id, None).await {
            problems.push(super::error::chain(&e));
            self.detach_later(id.to_owned());
        }
        let keeper = Keeper::at(id, dir);
        if let Err(e) = keeper.teardown(self.config().limits.delete_timeout).await {
            problems.push(super::error::chain(&e));
        }
        let (own_id, dir) = (id.to_owned(), dir.to_owned());
        let sweep = tokio::task::spawn_blocking(move || {
            leftovers::end_pod(&own_id, &dir);
            leftovers::remove_tree(&dir)
        });
        match sweep.await {
            Ok(more) => problems.extend(more),
            Err(e) => problems.push(e.to_string()),
        }
        if !problems.is_empty() {
            tracing::error!(
                pod = id,
                problems = problems.join("; "),
                "a failed pod left something behind"
            );
        }
    }
}

fn namespaces(made: keeper::SetupSandboxResult) -> Namespaces {
    Namespaces {
        network: made.network,
        ipc: made.ipc,
        uts: made.uts,
        pid: made.pid,
        user: made.user,
    }
}

/// Every container of the pod reads these, so they have the pod's level.
fn label_files(dir: &Path, label: &str) -> Result<(), PodError> {
    for name in [RESOLV_CONF, HOSTS, HOSTNAME, "shm"] {
        let path = dir.join(name);
        relabel::relabel(&path, label).map_err(file("label", &path))?;
    }
    Ok(())
}

/// The pod's own directories are root's alone; the log directory is everybody's to read.
fn make_dirs(dir: &Path, log_directory: Option<&Path>) -> Result<(), PodError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut private = std::fs::DirBuilder::new();
    private.mode(0o700);
    private.create(dir).map_err(file("create", dir))?;
    for name in ["ns", "shm", "containers", "exits"] {
        let path = dir.join(name);
        private.create(&path).map_err(file("create", &path))?;
    }
    if let Some(log_directory) = log_directory {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(log_directory)
            .map_err(file("create the log directory", log_directory))?;
    }
    Ok(())
}

/// What a pod asks of its network and its files, checked before anything is made.
struct Wishes {
    port_mappings: Vec<PortMapping>,
    dns: Option<DnsConfig>,
    bandwidth: Option<Bandwidth>,
    files: Files,
}

impl Wishes {
    fn new(config: &cri::PodSandboxConfig, plan: &SandboxPlan) -> Result<Self, PodError> {
        let dns = config.dns_config.as_ref().map(|d| DnsConfig {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        });
        let port_mappings = plan.port_mappings.iter().map(|m| PortMapping {
            host_port: m.host_port,
            container_port: m.container_port,
            protocol: match m.protocol {
                cri::Protocol::Tcp => Protocol::Tcp,
                cri::Protocol::Udp => Protocol::Udp,
                cri::Protocol::Sctp => Protocol::Sctp,
            },
            host_ip: m.host_ip,
        });
        let bandwidth = Bandwidth::from_annotations(&config.annotations)
            .map_err(|e| PodError::Invalid(super::error::chain(&e)))?;
        Ok(Self {
            port_mappings: port_mappings.collect(),
            files: Files::new(dns.as_ref(), &plan.hostname, plan.host_network)?,
            dns,
            bandwidth,
        })
    }
}
