//! Calls from the daemon to what answers them.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use slipway_proto::keeper::{
    Error as WireError, ErrorKind, HelloResult, Request, SetupSandbox, SnapshotResult,
    request::Call, response::Result as Answer,
};
use slipway_systemd::SystemdError;

use super::job::{Origin, Purpose, done};
use super::oom::OomLedger;
use super::{Keeper, oci, wire_error};
use crate::confine::chain;
use crate::scope::ScopeError;
use crate::{hooks, placement, removal, sandbox, wire};

impl Keeper {
    pub(super) fn dispatch(&mut self, connection: u64, request: Request, fds: Vec<OwnedFd>) {
        let answer = match request.call {
            Some(Call::SetupSandbox(call)) => return self.setup_sandbox(connection, call),
            Some(Call::CreateContainer(call)) => return self.create_container(connection, call),
            Some(Call::StartContainer(call)) => return self.start_container(connection, &call.id),
            Some(Call::Exec(call)) => return self.exec(connection, &call, fds),
            Some(Call::DeleteContainer(call)) => {
                return self.delete_container(connection, &call.id);
            }
            Some(Call::UpdateContainer(call)) => return self.update_container(connection, &call),
            Some(Call::Checkpoint(call)) => return self.checkpoint(connection, &call),
            Some(Call::StartSandbox(call)) => return self.start_sandbox(connection, call),
            Some(Call::Teardown(_)) => return self.tear_down(connection),
            Some(Call::Subscribe(_)) => return self.subscribe(connection),
            Some(Call::Hello(_)) => Ok(Answer::Hello(HelloResult {
                protocol: wire::PROTOCOL,
                pid: std::process::id() as i32,
                version: env!("CARGO_PKG_VERSION").to_owned(),
            })),
            Some(Call::Signal(call)) => {
                return self.signal_container(connection, &call.id, call.signal, call.all);
            }
            Some(Call::Attach(call)) => self.attach(&call, fds),
            Some(Call::CloseStdin(call)) => self.close_stdin(&call.id),
            Some(Call::ReopenLog(call)) => self.reopen_log(&call.id),
            Some(Call::Snapshot(_)) => Ok(Answer::Snapshot(SnapshotResult {
                containers: self
                    .containers
                    .values()
                    .filter(|c| !c.is_creating())
                    .map(|c| c.state().clone())
                    .collect(),
                sandbox: Some(self.sandbox.result.clone()),
            })),
            None => Err(wire_error(
                ErrorKind::Unsupported,
                format!(
                    "this keeper (version {}) does not know the call",
                    env!("CARGO_PKG_VERSION")
                ),
            )),
        };
        self.reply(connection, answer);
    }

    fn subscribe(&mut self, connection: u64) {
        let states: Vec<_> = self
            .containers
            .values()
            .filter(|c| !c.is_creating())
            .map(|c| wire::frame(c.state()))
            .collect();
        if let Some(c) = self.connections.get_mut(&connection) {
            c.subscribed = true;
            for state in states {
                c.queue(&state);
            }
        }
        self.flush(connection);
    }

    fn setup_sandbox(&mut self, connection: u64, setup: SetupSandbox) {
        if self.sandbox.ns_dir.is_some() {
            let error = wire_error(ErrorKind::AlreadyExists, "the sandbox is set up already");
            return self.reply(connection, Err(error));
        }
        let path = |p: &str| Some(PathBuf::from(p)).filter(|p| !p.as_os_str().is_empty());
        self.sandbox.ns_dir = path(&setup.ns_dir);
        self.sandbox.shm_dir = path(&setup.shm_dir);
        self.sandbox.cgroup = path(&setup.cgroup);
        self.setup = Some(setup.clone()).filter(|s| s.new_pid);
        if setup.keeper_in_slice
            && let Err(e) = self.enter_slice(&setup)
        {
            return self.reply(connection, Err(e));
        }
        let cgroups = self.cgroups.clone();
        let job = self.start_job(Purpose::Setup, connection, Origin::default(), move || {
            sandbox::make(&setup, &cgroups)
                .map(Answer::SetupSandbox)
                .map_err(|e| {
                    let kind = match e {
                        sandbox::SandboxError::Sysctl { .. } => ErrorKind::Invalid,
                        sandbox::SandboxError::Slice(ScopeError::Systemd(
                            SystemdError::Timeout { .. },
                        )) => ErrorKind::TimedOut,
                        _ => ErrorKind::Internal,
                    };
                    wire_error(kind, chain(&e))
                })
        });
        // For a daemon that has to end a keeper which does not answer; written while the job works.
        let _ = std::fs::write(
            self.pod_dir.join(super::PID_FILE),
            std::process::id().to_string(),
        );
        if let Err(e) = job {
            let error = wire_error(ErrorKind::Internal, format!("can't fork: {e}"));
            self.reply(connection, Err(error));
        }
    }

    /// Goes into a scope in the pod's slice. That may block: nothing else happens in this pod yet.
    fn enter_slice(&mut self, setup: &SetupSandbox) -> Result<(), WireError> {
        let home = crate::scope::own_cgroup().unwrap_or_else(|_| PathBuf::from("/"));
        let cgroup = PathBuf::from(&setup.cgroup);
        let entered = crate::scope::make_slice(&self.cgroups, &cgroup).and_then(|made| {
            self.birth.made_cgroup = made;
            placement::enter_slice(&cgroup, &self.pod_id)
        });
        entered.map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))?;
        self.birth.home = Some(home);
        Ok(())
    }

    pub(super) fn sandbox_made(&mut self, connection: u64, answer: Result<Answer, WireError>) {
        let setup = self.setup.take();
        let answer = answer.and_then(|answer| {
            let Answer::SetupSandbox(mut made) = answer else {
                return Ok(answer);
            };
            made.made_cgroup |= self.birth.made_cgroup;
            if let Some(cgroup) = &self.sandbox.cgroup {
                self.oom = OomLedger::new(self.cgroups.oom_kills(cgroup));
            }
            self.sandbox.result = made.clone();
            if let Some(setup) = setup {
                let (pid, path) = sandbox::start_init(&setup, &made)
                    .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))?;
                self.pod_init = Some(pid);
                made.pid.clone_from(&path);
                self.sandbox.result.pid = path;
            }
            Ok(Answer::SetupSandbox(made))
        });
        self.reply(connection, answer);
    }

    /// Kills everything, removes everything, and ends the keeper.
    fn tear_down(&mut self, connection: u64) {
        let cgroups = self.cgroups.clone();
        if let Some(home) = &self.birth.home {
            placement::leave(&cgroups, home);
        }
        let mut doomed = Vec::new();
        let mut inits = Vec::new();
        for container in self.containers.values() {
            let id = container.state().id.clone();
            let (dir, runtime) = (container.dir.clone(), container.driver.runtime());
            let init = container.pidfd.as_ref().and_then(|p| p.try_clone().ok());
            inits.extend(init.iter().map(std::os::fd::AsRawFd::as_raw_fd));
            doomed.push((container.cgroup.clone(), init, id, dir, runtime));
        }
        let sandbox = self.oci_sandbox.as_ref().map(oci::OciSandbox::doomed);
        inits.extend(sandbox.iter().flat_map(|s| s.descriptor()));
        let by_shim = self.shim.is_some().then(|| self.shim_call().ok()).flatten();
        let mounts = by_shim.as_ref().and_then(|call| call.mounts.as_ref());
        inits.extend(mounts.map(std::os::fd::AsRawFd::as_raw_fd));
        let pod_dir = self.pod_dir.clone();
        self.kill_makers();
        if let Some(pid) = self.pod_init {
            crate::sys::kill_child(pid);
        }
        let made_cgroup = self.sandbox.result.made_cgroup;
        let pod_cgroup = self.sandbox.cgroup.clone();
        let origin = Origin {
            keep: &inits,
            ..Origin::default()
        };
        let (ns_dir, shm_dir) = (self.sandbox.ns_dir.clone(), self.sandbox.shm_dir.clone());
        let job = self.start_job(Purpose::Teardown, connection, origin, move || {
            let (mut failures, mut warnings) = (Vec::new(), Vec::new());
            // One failure must not keep the rest of the pod.
            let until = std::time::Instant::now() + crate::oci::DELETE;
            if let Some(sandbox) = &sandbox {
                failures.extend(sandbox.kill(&cgroups));
            }
            for (cgroup, init, id, dir, runtime) in &doomed {
                let init = init.as_slice();
                let container = crate::oci::Removed {
                    id,
                    dir,
                    cgroup,
                    init,
                };
                let removed = match &by_shim {
                    Some(call) => super::shim::remove(call, &cgroups, &container, until),
                    None => super::oci::remove(runtime.as_ref(), &cgroups, &container, until),
                };
                match removed {
                    Ok(()) => warnings.extend(hooks::run_poststop(dir)),
                    Err(e) => failures.push(chain(&e)),
                }
            }
            if let Some(sandbox) = &sandbox {
                failures.extend(sandbox.remove(&cgroups));
            }
            if let Some(call) = &by_shim {
                let cgroup = pod_cgroup.as_deref();
                failures.extend(super::shim::tear_down(
                    call, &pod_dir, cgroup, &cgroups, until,
                ));
            }
            if let Some(ns_dir) = &ns_dir {
                sandbox::remove(ns_dir, shm_dir.as_deref());
            }
            if let Some(cgroup) = &pod_cgroup {
                removal::remove_pod_cgroup(&cgroups, cgroup, made_cgroup);
            }
            match failures.as_slice() {
                [] => Ok(done(warnings)),
                _ => Err(wire_error(ErrorKind::Internal, failures.join("; "))),
            }
        });
        if let Err(e) = job {
            let error = wire_error(ErrorKind::Internal, format!("can't fork: {e}"));
            self.reply(connection, Err(error));
        }
    }

    pub(super) fn torn_down(&mut self, connection: u64, answer: Result<Answer, WireError>) {
        // The exits that the job caused, so that subscribers hear of them before the end.
        self.reap();
        self.end_all_of_shim();
        // What could not be killed keeps its keeper: there may be a second try.
        self.ending = answer.is_ok();
        self.reply(connection, answer);
    }
}
