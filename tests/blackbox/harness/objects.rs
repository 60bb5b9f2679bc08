//! Pods and containers of a daemon, with the calls that tests make.

use std::path::PathBuf;

use slipway_proto::cri;
use tonic::Status;

use super::log::{self, Line};
use super::probe::Report;
use super::{Context, Daemon, Result, config, ensure, eventually, seconds};

/// A pod sandbox.
#[derive(Clone)]
pub struct Pod {
    pub daemon: Daemon,
    pub id: String,
    pub config: cri::PodSandboxConfig,
}

/// A container.
#[derive(Clone)]
pub struct Container {
    pub daemon: Daemon,
    pub id: String,
    pub config: cri::ContainerConfig,
    /// Its log file.
    pub log: PathBuf,
}

/// Output of ExecSync.
#[derive(Debug)]
pub struct Exec {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

/// The keeper that is the parent of this process, and its v2 cgroup.
pub fn keeper_of(init: i32) -> Result<(i32, String)> {
    let stat = super::read(format!("/proc/{init}/stat"))?;
    let rest = stat.rsplit(") ").next().context("stat")?;
    let keeper: i32 = rest.split(' ').nth(1).context("ppid")?.parse()?;
    let text = super::read(format!("/proc/{keeper}/cgroup"))?;
    let cgroup = text.lines().find_map(|l| l.strip_prefix("0::"));
    Ok((keeper, cgroup.context("no v2 cgroup")?.to_owned()))
}

impl Daemon {
    /// Runs a pod whose usual configuration `change` has changed.
    pub async fn pod(&self, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<Pod> {
        let mut config = config::pod(self);
        change(&mut config);
        self.run_pod(config).await.context("RunPodSandbox")
    }

    /// Runs a pod of exactly this configuration.
    pub async fn run_pod(&self, config: cri::PodSandboxConfig) -> Result<Pod, Status> {
        self.run_pod_under("", config).await
    }

    /// Runs a pod of the usual configuration under a runtime handler.
    pub async fn pod_under(&self, handler: &str) -> Result<Pod, Status> {
        self.run_pod_under(handler, config::pod(self)).await
    }

    /// Runs a pod of exactly this configuration under a runtime handler.
    pub async fn run_pod_under(
        &self,
        handler: &str,
        config: cri::PodSandboxConfig,
    ) -> Result<Pod, Status> {
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = self
            .runtime()
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id;
        Ok(Pod {
            daemon: self.clone(),
            id,
            config,
        })
    }

    /// A pod and a container of it that runs a command.
    pub async fn run(&self, command: &[&str]) -> Result<Container> {
        self.pod(|_| {}).await?.run(command, |_| {}).await
    }
}

impl Pod {
    /// Process id of its keeper. A container's parent may be another: its shim.
    pub fn keeper(&self, env: &super::Env) -> Result<i32> {
        let file = env.root.join(format!("r/pods/{}/keeper.pid", self.id));
        Ok(super::read(file)?.trim().parse()?)
    }

    /// Waits until it is not ready any more, by itself.
    pub async fn not_ready(&self) -> Result<()> {
        super::eventually("the pod's end", super::seconds(10), || async {
            let state = self.status().await?.state();
            Ok((state == cri::PodSandboxState::SandboxNotready).then_some(()))
        })
        .await
    }

    /// Creates a container whose usual configuration `change` has changed.
    pub async fn create(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<Container> {
        let mut config = config::container(&self.daemon, &self.config, command);
        change(&mut config);
        self.create_exactly(config).await.context("CreateContainer")
    }

    /// Creates a container of exactly this configuration.
    pub async fn create_exactly(&self, config: cri::ContainerConfig) -> Result<Container, Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self
            .daemon
            .runtime()
            .create_container(request)
            .await?
            .into_inner()
            .container_id;
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        Ok(Container {
            daemon: self.daemon.clone(),
            id,
            config,
            log,
        })
    }

    /// What CreateContainer says to a configuration that `change` has changed.
    pub async fn try_create(
        &self,
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<String, Status> {
        let mut config = config::container(&self.daemon, &self.config, &["sleep", "1000"]);
        change(&mut config);
        self.create_exactly(config).await.map(|c| c.id)
    }

    /// Creates and starts.
    pub async fn run(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<Container> {
        let container = self.create(command, change).await?;
        container.start().await.context("StartContainer")?;
        Ok(container)
    }

    /// One that sleeps.
    pub async fn sleeper(&self) -> Result<Container> {
        self.run(&["sleep", "1000"], |_| {}).await
    }

    /// What the command prints to standard output; it must end with 0.
    pub async fn output(
        &self,
        command: &[&str],
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<String> {
        let container = self.run(command, change).await?;
        let status = container.exited().await?;
        let text = container.stdout()?;
        ensure!(
            status.exit_code == 0,
            "{command:?} ended with {}: {text}",
            status.exit_code
        );
        Ok(text)
    }

    /// What the probe reports of itself, as a container's first process and as an exec session in that container.
    pub async fn probes(
        &self,
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<[Report; 2]> {
        let container = self
            .run(&["sh", "-c", "probe status; exec sleep 1000"], change)
            .await?;
        let init = eventually("the probe's report", seconds(10), || async {
            let text = container.stdout()?;
            Ok(text.contains("\nfd.2 ").then_some(text))
        })
        .await?;
        let exec = container.exec(&["/bin/probe", "status"]).await?;
        ensure!(exec.code == 0, "{exec:?}");
        Ok([Report::new(&init), Report::new(&exec.stdout)])
    }

    /// Its status.
    pub async fn status(&self) -> Result<cri::PodSandboxStatus, Status> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .daemon
            .runtime()
            .pod_sandbox_status(request)
            .await?
            .into_inner();
        answer
            .status
            .ok_or_else(|| Status::internal("an answer without status"))
    }

    /// StopPodSandbox.
    pub async fn stop(&self) -> Result<(), Status> {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.daemon
            .runtime()
            .stop_pod_sandbox(request)
            .await
            .map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove(&self) -> Result<(), Status> {
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.daemon
            .runtime()
            .remove_pod_sandbox(request)
            .await
            .map(drop)
    }
}

impl Container {
    /// StartContainer.
    pub async fn start(&self) -> Result<(), Status> {
        let request = cri::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.daemon
            .runtime()
            .start_container(request)
            .await
            .map(drop)
    }

    /// StopContainer, with seconds of grace.
    pub async fn stop(&self, timeout: i64) -> Result<(), Status> {
        let request = cri::StopContainerRequest {
            container_id: self.id.clone(),
            timeout,
        };
        self.daemon
            .runtime()
            .stop_container(request)
            .await
            .map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&self) -> Result<(), Status> {
        let request = cri::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.daemon
            .runtime()
            .remove_container(request)
            .await
            .map(drop)
    }

    /// Its status.
    pub async fn status(&self) -> Result<cri::ContainerStatus, Status> {
        let request = cri::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .daemon
            .runtime()
            .container_status(request)
            .await?
            .into_inner();
        answer
            .status
            .ok_or_else(|| Status::internal("an answer without status"))
    }

    /// ExecSync with a limit in seconds.
    pub async fn exec_limited(
        &self,
        command: &[&str],
        timeout: i64,
    ) -> Result<cri::ExecSyncResponse, Status> {
        let cmd = command.iter().map(|w| (*w).to_owned()).collect();
        let request = cri::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd,
            timeout,
        };
        Ok(self.daemon.runtime().exec_sync(request).await?.into_inner())
    }

    /// ExecSync.
    pub async fn exec(&self, command: &[&str]) -> Result<Exec> {
        let answer = self
            .exec_limited(command, seconds(30).as_secs().cast_signed())
            .await
            .with_context(|| format!("ExecSync {command:?}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Exec {
            stdout: text(&answer.stdout),
            stderr: text(&answer.stderr),
            code: answer.exit_code,
        })
    }

    /// Standard output of a command in it, without the end of the last line; the command must end with 0.
    pub async fn exec_output(&self, command: &[&str]) -> Result<String> {
        let exec = self.exec(command).await?;
        ensure!(exec.code == 0, "{command:?}: {exec:?}");
        Ok(exec.stdout.trim_end_matches('\n').to_owned())
    }

    /// Asks for new limits.
    pub async fn update(&self, linux: cri::LinuxContainerResources) -> Result<(), Status> {
        let request = cri::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        let mut client = self.daemon.runtime();
        client.update_container_resources(request).await.map(drop)
    }

    /// ReopenContainerLog.
    pub async fn reopen_log(&self) -> Result<(), Status> {
        let request = cri::ReopenContainerLogRequest {
            container_id: self.id.clone(),
        };
        self.daemon
            .runtime()
            .reopen_container_log(request)
            .await
            .map(drop)
    }

    /// Waits for the end of its process.
    pub async fn exited(&self) -> Result<cri::ContainerStatus> {
        eventually("the container's end", seconds(30), || async {
            let status = self.status().await?;
            Ok((status.state() == cri::ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// Waits for a line on its standard output.
    pub async fn says(&self, line: &str) -> Result<()> {
        eventually(&format!("{line:?} in the log"), seconds(20), || async {
            Ok(self.stdout()?.lines().any(|l| l == line).then_some(()))
        })
        .await
    }

    /// The lines of its log, each checked to be in the CRI's form.
    pub fn lines(&self) -> Result<Vec<Line>> {
        log::read(&self.log)
    }

    /// What it has written to standard output.
    pub fn stdout(&self) -> Result<String> {
        Ok(log::text(&self.lines()?, "stdout"))
    }

    /// What it has written to standard error.
    pub fn stderr(&self) -> Result<String> {
        Ok(log::text(&self.lines()?, "stderr"))
    }

    /// Process id of its first process, in our PID namespace, found through its cgroup. Its creator may still be in
    /// there, about to end.
    pub fn pid(&self) -> Result<i32> {
        if super::gvisor() {
            return self.attendant();
        }
        let processes = self.processes();
        // The first process is one whose parent is not among them.
        let first = |pid: &i32| {
            let status = super::read(format!("/proc/{pid}/status")).ok()?;
            let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"))?;
            let parent: i32 = parent.trim().parse().ok()?;
            (!processes.contains(&parent)).then_some(*pid)
        };
        let ours = |pid: i32| {
            let binary = std::fs::read_link(format!("/proc/{pid}/exe"));
            // One that has gone is none, either.
            binary.map_or(true, |path| path.to_string_lossy().starts_with("/memfd:"))
        };
        let candidates: Vec<i32> = processes.iter().filter_map(first).collect();
        let started = candidates.iter().copied().find(|pid| !ours(*pid));
        // A container that is only created is still ours; its init is the younger one.
        let found = started.or_else(|| candidates.iter().copied().max());
        found.with_context(|| format!("container {} has no process", self.id))
    }

    /// Process id of the keeper of its pod, and the keeper's v2 cgroup. For a container that runs.
    pub fn keeper(&self) -> Result<(i32, String)> {
        let procs = self.cgroup_file("cgroup.procs")?;
        let init = procs.lines().next().context("nobody is in its cgroup")?;
        keeper_of(init.parse()?)
    }

    /// What stands for it, of a container in gVisor: the process of Slipway's that is in its directory.
    fn attendant(&self) -> Result<i32> {
        let own = |pid: &i32| {
            let at = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}"));
            let there = at("cwd").is_ok_and(|path| path.ends_with(&self.id));
            there && at("exe").is_ok_and(|path| path.to_string_lossy().starts_with("/memfd:"))
        };
        let found = all_processes().into_iter().filter(own).min();
        found.with_context(|| format!("nobody waits for the end of container {}", self.id))
    }

    /// Sends a signal to its first process.
    pub async fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        if super::gvisor() {
            // Nobody outside sees that process.
            let number = (signal as i32).to_string();
            return self
                .exec_output(&["kill", &format!("-{number}"), "1"])
                .await
                .map(drop);
        }
        let pid = nix::unistd::Pid::from_raw(self.pid()?);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }

    /// All processes in its cgroup; in gVisor, those that the runtime has on the host for it alone.
    pub fn processes(&self) -> Vec<i32> {
        if super::gvisor() {
            let own = |pid: &i32| {
                let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&words).contains(&self.id)
            };
            let named = all_processes().into_iter().filter(own);
            return named.chain(self.attendant().ok()).collect();
        }
        let mut pids: Vec<i32> = self
            .cgroup_dirs()
            .iter()
            .filter_map(|d| std::fs::read_to_string(d.join("cgroup.procs")).ok())
            .flat_map(|t| t.lines().filter_map(|l| l.parse().ok()).collect::<Vec<_>>())
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Expects all its processes to be gone; one that was sent SIGKILL may need a moment to die, and its reaper
    /// one to notice.
    pub async fn gone(&self) -> Result<()> {
        let alive = || {
            let status = |pid: &i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
            let all: Vec<String> = self.processes().iter().filter_map(status).collect();
            all.into_iter()
                .filter(|s| !s.contains(") Z "))
                .collect::<Vec<_>>()
        };
        eventually("the end of all processes", seconds(2), || async {
            Ok(alive().is_empty().then_some(()))
        })
        .await
        .with_context(|| format!("{:?}", alive()))
    }

    /// The directories of its cgroup: those below the test's own that are named after it.
    pub fn cgroup_dirs(&self) -> Vec<PathBuf> {
        let tops = super::stage::cgroup_dirs(&self.daemon.env().cgroup);
        let all = tops.iter().flat_map(|t| super::stage::tree(t));
        all.filter(|d| {
            d.file_name()
                .is_some_and(|n| n.to_string_lossy().contains(&self.id))
        })
        .collect()
    }

    /// A file of its cgroup, in the controller's hierarchy (v1) or the only one (v2).
    pub fn cgroup_file(&self, name: &str) -> Result<String> {
        let file = self
            .cgroup_dirs()
            .into_iter()
            .map(|d| d.join(name))
            .find(|f| f.exists());
        super::read(file.with_context(|| format!("the container's cgroup has no {name}"))?)
    }
}

/// Every process that there is.
fn all_processes() -> Vec<i32> {
    let names = super::daemon::names(std::path::Path::new("/proc"));
    names.iter().filter_map(|name| name.parse().ok()).collect()
}
