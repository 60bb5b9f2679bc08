//! Pods whose containers share a sandbox of their runtime's: the sandbox in its keeper, and what is different about containers
//! in it. The keeper sees of each only its attendant ([`crate::oci`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use slipway_proto::keeper::{
    Empty, Error as WireError, ErrorKind, Phase, StartSandbox, response::Result as Answer,
};

use super::Driver;
use crate::cgroup::{self, Hierarchies};
use crate::confine::chain;
use crate::keeper::container::not_found;
use crate::keeper::job::{Origin, Purpose};
use crate::keeper::{Keeper, wire_error};
use crate::oci::{self, Pod, PodSandbox, Runtime};
use crate::removal::{self, RemovalError};
use crate::shim::Start;

/// How long the process that stands for an exec may outlive what it stands for.
const LAG: Duration = Duration::from_secs(2);

/// The pod's sandbox.
pub(in crate::keeper) struct OciSandbox {
    runtime: Runtime,
    sandbox: PodSandbox,
    /// Its process, once it is there.
    pid: i32,
    process: Option<OwnedFd>,
    lost: bool,
}

/// A sandbox that is to be ended, for a job.
pub(in crate::keeper) struct Doomed {
    runtime: Runtime,
    sandbox: PodSandbox,
    process: Option<OwnedFd>,
}

impl OciSandbox {
    pub(in crate::keeper) fn doomed(&self) -> Doomed {
        Doomed {
            runtime: self.runtime.clone(),
            sandbox: self.sandbox.clone(),
            process: self.process.as_ref().and_then(|p| p.try_clone().ok()),
        }
    }
}

impl Doomed {
    /// What the job must keep.
    pub(in crate::keeper) fn descriptor(&self) -> Option<RawFd> {
        self.process.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Kills it with everything in it: the runtime finds its containers dead then. What went wrong.
    pub(in crate::keeper) fn kill(&self, cgroups: &Hierarchies) -> Option<String> {
        let killed = removal::kill_cgroup(cgroups, &self.sandbox.cgroup, self.process.as_slice());
        killed.err().map(|e| chain(&e))
    }

    /// Removes what is left of it. What went wrong.
    pub(in crate::keeper) fn remove(&self, cgroups: &Hierarchies) -> Option<String> {
        let removed: Result<(), RemovalError> = oci::end_sandbox(
            &self.runtime,
            &self.sandbox,
            cgroups,
            self.process.as_slice(),
        );
        removed.err().map(|e| chain(&e))
    }
}

impl Driver {
    /// Names the PID namespace of a container in a sandbox.
    pub(in crate::keeper) fn call_pids(&mut self, name: Option<&Path>) {
        if let (Some(oci), Some(name)) = (self.oci(), name) {
            name.clone_into(&mut oci.pids);
        }
    }

    /// What the PID namespace of a container in a sandbox is called; `None` where it is the host's to see.
    pub(in crate::keeper) fn pids(&self) -> Option<&Path> {
        match self {
            Self::Oci(oci) if oci.runtime.sandbox.is_some() => Some(&oci.pids),
            _ => None,
        }
    }
}

impl Keeper {
    pub(in crate::keeper) fn begin_oci_sandbox(
        &mut self,
        connection: u64,
        call: StartSandbox,
    ) -> Result<(), WireError> {
        let failed = |step: &str, e: &dyn std::fmt::Display| {
            let message = format!("can't start the sandbox: {step}: {e}");
            wire_error(ErrorKind::Internal, message)
        };
        if self.oci_sandbox.is_some() {
            let message = "the pod's sandbox is started already";
            return Err(wire_error(ErrorKind::AlreadyExists, message));
        }
        let settings = call.runtime.clone().unwrap_or_default();
        let pod_cgroup = self.sandbox.cgroup.clone();
        let pod_cgroup = pod_cgroup.ok_or_else(|| failed("look for its cgroup", &"it has none"))?;
        let pod = Pod {
            id: &self.pod_id,
            cgroup: &pod_cgroup,
            systemd: call.systemd,
        };
        let runtime = Runtime::new(&settings, &pod);
        let Some(sandbox) = runtime.sandbox.clone() else {
            return Err(failed("look for what makes it", &"its runtime has none"));
        };
        let born_in = match call.systemd {
            // It asks for a scope around itself.
            true => Ok(None),
            false => self
                .cgroups
                .ensure(&sandbox.cgroup)
                .and_then(|_| self.cgroups.open_v2(&sandbox.cgroup)),
        };
        let born_in = born_in.map_err(|e| failed("make its cgroup", &e))?;
        let (cgroups, own, own_runtime) = (self.cgroups.clone(), sandbox.clone(), runtime.clone());
        let namespaces = self.sandbox.result.clone();
        let (pod_dir, run_root) = (self.pod_dir.clone(), self.run_root());
        let origin = Origin {
            namespaces: libc::CLONE_NEWNS as u64,
            cgroup: born_in.as_ref().map(AsFd::as_fd),
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Sandbox, connection, origin, move || {
            let start = Start {
                call: &call,
                namespaces: &namespaces,
                cgroup: &pod_cgroup,
                cgroups: &cgroups,
                pod_dir: &pod_dir,
                run_root: &run_root,
            };
            oci::start_sandbox(&own_runtime, &own, &cgroups, &start)
                .map(Answer::StartSandbox)
                .map_err(|e| wire_error(e.kind(), chain(&e)))
        });
        if let Err(e) = job {
            let _ = self.cgroups.remove(&sandbox.cgroup);
            return Err(failed("fork", &e));
        }
        self.oci_sandbox = Some(OciSandbox {
            runtime,
            sandbox,
            pid: 0,
            process: None,
            lost: false,
        });
        Ok(())
    }

    pub(in crate::keeper) fn oci_sandbox_started(
        &mut self,
        connection: u64,
        answer: Result<Answer, WireError>,
    ) {
        let answer = answer.and_then(|answer| {
            if let (Answer::StartSandbox(made), Some(own)) = (&answer, &mut self.oci_sandbox) {
                own.process = cgroup::pin(made.pid);
                own.pid = made.pid;
                if own.process.is_none() {
                    let handler = &own.runtime.handler;
                    let message = format!(
                        "the sandbox that runtime handler {handler:?} made for the pod ended at once"
                    );
                    return Err(wire_error(ErrorKind::Internal, message));
                }
            }
            Ok(answer)
        });
        // The caller of a failed one has the pod taken down.
        self.reply(connection, answer);
    }

    pub(in crate::keeper) fn is_oci_sandbox(&self, pid: i32) -> bool {
        self.oci_sandbox.as_ref().is_some_and(|own| own.pid == pid)
    }

    /// The sandbox is gone, and with it all that ran in it: the pod is of no use any more.
    pub(in crate::keeper) fn oci_sandbox_lost(&mut self, code: i32) {
        let ending = self.tearing_down();
        let Some(own) = &mut self.oci_sandbox else {
            return;
        };
        own.lost = true;
        if ending {
            return;
        }
        let oom = self.cgroups.oom_kills(&own.sandbox.cgroup) > 0;
        let how = match code {
            129.. => format!("was ended by signal {}", code - 128),
            _ => format!("has exited with {code}"),
        };
        let why = if oom {
            ": it needed more memory than there was"
        } else {
            ""
        };
        let message = format!(
            "the sandbox that runtime handler {:?} made for the pod {how}{why}",
            own.runtime.handler
        );
        self.doomed = true;
        self.kill_makers();
        for container in self.containers.values_mut().filter(|c| !c.has_exited()) {
            container.state.message.clone_from(&message);
            if let Some(oci) = container.driver.oci() {
                oci.oom = oom;
            }
            if let Some(attendant) = &container.pidfd {
                cgroup::send(attendant, libc::SIGKILL);
            }
        }
    }

    /// Makes what the keeper and the attendant of a container in a sandbox talk by, and names its PID namespace. `None` for
    /// other containers.
    pub(in crate::keeper) fn enter_sandbox(
        &self,
        driver: &mut Driver,
        spec: &Spec,
        id: &str,
    ) -> Result<Option<(OwnedFd, PathBuf)>, WireError> {
        let Some(oci) = driver.oci().filter(|oci| oci.runtime.sandbox.is_some()) else {
            return Ok(None);
        };
        if self.oci_sandbox.as_ref().is_none_or(|own| own.lost) {
            let handler = &oci.runtime.handler;
            let message = format!(
                "the sandbox that runtime handler {handler:?} makes for the pod is not there, or not any more"
            );
            return Err(wire_error(ErrorKind::WrongState, message));
        }
        let (ours, theirs) = UnixStream::pair().map_err(|e| {
            wire_error(
                ErrorKind::Internal,
                format!("can't make a socket pair: {e}"),
            )
        })?;
        oci.control = Some(ours.into());
        let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().clone());
        let pids = namespaces.unwrap_or_default().into_iter();
        let pids = pids.filter(|n| n.typ() == LinuxNamespaceType::Pid);
        let pids = pids.filter_map(|n| n.path().clone()).next();
        // Only whether two are the same matters.
        let pids = pids.unwrap_or_else(|| Path::new("/slipway/pids").join(id));
        Ok(Some((theirs.into(), pids)))
    }

    pub(super) fn begin_attended_start(
        &mut self,
        connection: u64,
        id: &str,
    ) -> Result<(), WireError> {
        self.may_start(id)?;
        let container = self.containers.get_mut(id).ok_or_else(|| not_found(id))?;
        let control = container.driver.oci().and_then(|oci| oci.control.as_ref());
        let control = control.map(OwnedFd::try_clone).transpose();
        let control = control.map_err(|e| wire_error(ErrorKind::Internal, e.to_string()))?;
        let control = control.ok_or_else(|| {
            let message = format!("container {id} can't be started: it was started before");
            wire_error(ErrorKind::WrongState, message)
        })?;
        let own_id = id.to_owned();
        let keep = [control.as_raw_fd()];
        self.start_in_job(connection, id, &keep, move || {
            oci::start_attended(control, &own_id)
        })
    }

    /// An attendant has started its container, or not: then it ends when it hears that this is known.
    pub(super) fn attendant_answered(&mut self, id: &str, error: Option<&WireError>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let created = container.state.phase() == Phase::Created;
        let attended = container.driver.oci().and_then(|oci| oci.control.take());
        if let (Some(_), Some(error), true) = (attended, error, created) {
            container.state.cannot_run = error.kind() == ErrorKind::CannotRun;
        }
    }

    /// Has the runtime send a signal to a container in a sandbox: there is nothing else to send it to.
    pub(super) fn signal_inside(
        &mut self,
        connection: u64,
        id: &str,
        signal: i32,
        runtime: &Runtime,
    ) -> bool {
        let Some(container) = self.containers.get(id) else {
            return false;
        };
        let (dir, cgroups, id) = (container.dir.clone(), self.cgroups.clone(), id.to_owned());
        let runtime = runtime.clone();
        let job = self.start_job(Purpose::Kill, connection, Origin::default(), move || {
            let number = signal.to_string();
            let mut args = vec!["kill"];
            if signal == libc::SIGKILL {
                args.push("--all");
            }
            args.extend([id.as_str(), number.as_str()]);
            oci::simple(&runtime, &cgroups, &args, &dir, oci::KILL)
                .map(|()| Answer::Empty(Empty {}))
                .map_err(|e| wire_error(e.kind(), chain(&e)))
        });
        job.is_ok()
    }

    /// Kills an exec in a sandbox, in a job; false when this is none.
    pub(in crate::keeper) fn end_inside(&mut self, pid: i32) -> bool {
        let Some(exec) = self.execs.get(&pid) else {
            return false;
        };
        let Some(inner) = exec.inner.clone() else {
            return false;
        };
        let id = exec.container.clone();
        let Some(container) = self.containers.get(&id) else {
            return false;
        };
        let Some(runtime) = container.driver.runtime() else {
            return false;
        };
        let (dir, cgroups) = (container.dir.clone(), self.cgroups.clone());
        let Some(process) = cgroup::pin(pid) else {
            return true;
        };
        let keep = [process.as_raw_fd()];
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        // Nobody waits for this answer: the end of the exec is one.
        let job = self.start_job(Purpose::Kill, 0, origin, move || {
            let number = std::fs::read_to_string(&inner)
                .and_then(|text| text.trim().parse().map_err(io::Error::other));
            if let Ok(number) = number {
                let _ = oci::kill_inside(&runtime, &cgroups, &id, &dir, number);
            }
            removal::wait(&process, std::time::Instant::now() + LAG);
            // What stands for it goes by itself, unless the sandbox does not answer.
            cgroup::send(&process, libc::SIGKILL);
            Ok(Answer::Empty(Empty {}))
        });
        job.is_ok()
    }
}
