//! The ends of containers that a shim makes, and the end of the shim.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use slipway_proto::keeper::{
    CreateContainerResult, Empty, Error as WireError, ErrorKind, ExecResult, Phase,
    response::Result as Answer,
};
use slipway_shim::{Process, wait_answer};

use super::{Call, UNKNOWN, gone};
use crate::confine::{NOT_EXECUTABLE, chain};
use crate::keeper::job::{Origin, Purpose};
use crate::keeper::{Keeper, Source, wire_error};
use crate::oci;
use crate::shim::{self, Silence};

impl Keeper {
    /// A container was made, maybe by the shim.
    pub(in crate::keeper) fn follow_made(
        &mut self,
        id: &str,
        made: &CreateContainerResult,
    ) -> Result<(), WireError> {
        let container = self.containers.get_mut(id);
        let of_shim = container.is_some_and(|c| c.driver.shim().is_some());
        // Of one whose command is not there, there is nothing to wait for.
        if !of_shim || !made.cannot_run.is_empty() {
            return Ok(());
        }
        self.follow_container(id)?;
        self.watch_init(id).map_err(|e| {
            let message = format!("can't watch the first process of container {id}: {e}");
            wire_error(ErrorKind::Internal, message)
        })
    }

    /// Watches a container's init, if it is a process of the host: the shim may miss its end.
    fn watch_init(&mut self, id: &str) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(id) else {
            return Ok(());
        };
        if container.pid().is_none() {
            return Ok(());
        }
        let Some(init) = container.pidfd.as_ref() else {
            // It was gone before it could be pinned.
            self.ask_later(id);
            return Ok(());
        };
        let init = init.try_clone()?;
        let token = self.watch(&init, Source::ShimInit(id.to_owned()))?;
        let container = self.containers.get_mut(id);
        if let Some(own) = container.and_then(|c| c.driver.shim()) {
            own.process = Some((init, token));
        }
        Ok(())
    }

    /// The init of a container is gone. The shim knows it as soon, and will tell.
    pub(in crate::keeper) fn init_gone(&mut self, id: &str, token: u64) {
        if !self.unwatch_init(id) {
            self.sources.remove(&token);
        }
        self.ask_later(id);
    }

    fn unwatch_init(&mut self, id: &str) -> bool {
        let container = self.containers.get_mut(id);
        let own = container.and_then(|c| c.driver.shim());
        let watched = own.and_then(|own| {
            own.ask_at = None;
            own.process.take()
        });
        watched.is_some_and(|(init, token)| {
            self.forget(&init, token);
            true
        })
    }

    fn ask_later(&mut self, id: &str) {
        let waits = self.waits_for(id);
        let container = self.containers.get_mut(id);
        if let Some(own) = container.and_then(|c| c.driver.shim()) {
            own.ask_at = waits.then(|| Instant::now() + shim::SILENT);
        }
    }

    /// Whether the end of a container is still to be told.
    fn waits_for(&self, id: &str) -> bool {
        let pod = self.shim.as_ref();
        pod.is_some_and(|pod| pod.waits.values().any(|other| other == id))
    }

    /// When a shim is to be asked for an end.
    pub(in crate::keeper) fn next_question(&self) -> Option<Instant> {
        self.shim.as_ref()?;
        let containers = self.containers.values();
        containers.filter_map(|c| c.driver.ask_at()).min()
    }

    /// Asks for the ends of which the shim has not told in time.
    pub(in crate::keeper) fn ask_for_ends(&mut self) {
        let now = Instant::now();
        if self.next_question().is_none_or(|at| at > now) {
            return;
        }
        let mut due = Vec::new();
        for (id, container) in &mut self.containers {
            if let Some(own) = container.driver.shim()
                && own.ask_at.take_if(|at| *at <= now).is_some()
            {
                due.push(id.clone());
            }
        }
        for id in due
            .into_iter()
            .filter(|id| self.waits_for(id))
            .collect::<Vec<_>>()
        {
            let Ok(Call {
                running: Some(running),
                ..
            }) = self.shim_call()
            else {
                return;
            };
            let own = id.clone();
            let job = self.start_job(Purpose::Ask(id.clone()), 0, Origin::default(), move || {
                let mut silence = Silence::after(Duration::ZERO);
                let exit = silence.end(&running, Process::init(&own));
                Ok(Answer::Exec(ExecResult {
                    exit_code: i32::try_from(exit.code).unwrap_or(UNKNOWN),
                    timed_out: false,
                }))
            });
            if job.is_err() {
                self.ask_later(&id);
            }
        }
    }

    /// The shim was asked for an end. It may have told of it by itself meanwhile.
    pub(in crate::keeper) fn end_asked(&mut self, id: &str, answer: Result<Answer, WireError>) {
        let Some(pod) = &mut self.shim else { return };
        let waits = pod.waits.len();
        pod.waits.retain(|_, other| other != id);
        if pod.waits.len() == waits {
            return;
        }
        let code = match answer {
            Ok(Answer::Exec(end)) => end.exit_code,
            _ => UNKNOWN,
        };
        let handler = pod.shim.handler.clone();
        if code == UNKNOWN
            && let Some(container) = self.containers.get_mut(id)
        {
            container.state.message = format!(
                "its first process is gone, and the shim of runtime handler {handler:?} does not tell how it ended"
            );
        }
        self.reap_container(id, code);
    }

    /// A container of the shim's is removed: if its end was not seen yet, it was this.
    pub(in crate::keeper) fn end_of_shim(&mut self, id: &str) {
        let container = self.containers.get_mut(id);
        if container.is_some_and(|c| c.driver.shim().is_some()) {
            self.shim_exited(id, 128 + libc::SIGKILL);
        }
    }

    /// All that the shim made is gone with its pod.
    pub(in crate::keeper) fn end_all_of_shim(&mut self) {
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.end_of_shim(&id);
        }
    }

    fn follow_container(&mut self, id: &str) -> Result<(), WireError> {
        let Some(pod) = &mut self.shim else {
            return Ok(());
        };
        let Some((task, _)) = &mut pod.link else {
            return Err(gone(&pod.shim.handler));
        };
        let number = task
            .send_wait(Process::init(id))
            .map_err(|e| wire_error(ErrorKind::Internal, chain(&e)))?;
        pod.waits.insert(number, id.to_owned());
        Ok(())
    }

    /// The shim has something to say, or is gone.
    pub(in crate::keeper) fn shim_readable(&mut self) {
        let Some(pod) = &mut self.shim else { return };
        let Some((task, _)) = &mut pod.link else {
            return;
        };
        let (mut ended, mut sandbox_ended) = (Vec::new(), false);
        let mut broken = task.client().receive("Wait").err();
        loop {
            match task.client().next("Wait") {
                Ok(Some((number, result))) => {
                    if let Some(id) = pod.waits.remove(&number) {
                        let exit = wait_answer(result);
                        if id == self.pod_id {
                            // One that does not have the call ends with its sandbox.
                            sandbox_ended = !exit.is_err_and(|e| e.is_unimplemented());
                            continue;
                        }
                        let code = exit.map(|e| i32::try_from(e.code).unwrap_or(UNKNOWN));
                        ended.push((id, code.unwrap_or(UNKNOWN)));
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    broken = Some(e);
                    break;
                }
            }
        }
        for (id, code) in ended {
            self.reap_container(&id, code);
        }
        if sandbox_ended {
            self.shim_lost("its sandbox has ended");
        }
        if broken.is_some() {
            self.shim_lost("it has ended");
        }
    }

    /// A container has ended: when the shim has forgotten it, all of its output is there.
    fn reap_container(&mut self, id: &str, code: i32) {
        self.unwatch_init(id);
        // The cgroup goes with what the shim knows of it: its count is taken down first.
        if let Some(cgroup) = self.containers.get(id).map(|c| c.cgroup.clone()) {
            self.oom_kills(id, &cgroup);
        }
        let reaped = self.shim_call().ok().and_then(|call| {
            let running = call.running?;
            let own = id.to_owned();
            let purpose = Purpose::Reap(id.to_owned(), code);
            let job = self.start_job(purpose, 0, Origin::default(), move || {
                shim::reap(&running, &own)
                    .map(|()| Answer::Empty(Empty {}))
                    .map_err(|e| wire_error(shim::kind(&e), chain(&e)))
            });
            job.ok()
        });
        if reaped.is_none() {
            self.shim_exited(id, code);
        }
    }

    /// A container of the shim's has ended, and nothing more comes of it.
    pub(in crate::keeper) fn shim_exited(&mut self, id: &str, code: i32) {
        let open = self.containers.get(id).is_some_and(|c| !c.has_exited());
        if open {
            self.unwatch_init(id);
            self.release_fifos(id);
            self.container_exited(id, code);
        }
    }

    /// A shim has started a container, or not. Those of virtual machines find only then that there is no such command, and have
    /// no process whose end they could tell of.
    pub(in crate::keeper) fn never_ran_by_shim(&mut self, id: &str, error: Option<&WireError>) {
        let error = error.filter(|e| e.kind() == ErrorKind::CannotRun);
        let container = self.containers.get_mut(id);
        let created = container.is_some_and(|c| {
            c.driver.shim().is_some() && c.pid().is_none() && c.state.phase() == Phase::Created
        });
        if let (Some(error), true) = (error, created) {
            let code = oci::command_failure(&error.message);
            self.never_ran(id, code.unwrap_or(NOT_EXECUTABLE), &error.message);
        }
    }

    pub(super) fn release_fifos(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id)
            && let Some(own) = container.driver.shim()
        {
            own.held.clear();
        }
    }

    /// The shim is gone, or what it made for the pod: nothing of the pod can be used any more.
    pub(super) fn shim_lost(&mut self, why: &str) {
        let Some(pod) = &mut self.shim else { return };
        let Some((task, token)) = pod.link.take() else {
            return;
        };
        pod.running = None;
        pod.waits.clear();
        self.end_turns();
        self.forget(&task, token);
        drop(task);
        self.read_shim_log();
        if self.tearing_down() {
            return;
        }
        self.kill_makers();
        let said = self.shim_said();
        let Some(pod) = &self.shim else { return };
        let mut message = format!("the shim of runtime handler {:?}: {why}", pod.shim.handler);
        if !said.is_empty() {
            message.push_str(&format!("; its log: {said}"));
        }
        let shim = pod.shim.clone();
        let mounts = pod.mounts.as_ref().and_then(|m| m.try_clone().ok());
        let mut doomed = Vec::new();
        for (id, container) in &mut self.containers {
            if !container.has_exited() && container.driver.shim().is_some() {
                container.state.message.clone_from(&message);
                doomed.push((id.clone(), container.dir.clone(), container.cgroup.clone()));
            }
        }
        let (cgroups, pod_dir) = (self.cgroups.clone(), self.pod_dir.clone());
        let pod_cgroup = self.sandbox.cgroup.clone();
        let keep: Vec<_> = mounts.iter().map(AsRawFd::as_raw_fd).collect();
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let job = self.start_job(Purpose::Clear, 0, origin, move || {
            let pod = (pod_dir.as_path(), pod_cgroup.as_deref());
            shim::clear(&shim, mounts.as_ref(), &cgroups, &doomed, pod);
            Ok(Answer::Empty(Empty {}))
        });
        if job.is_err() {
            self.shim_cleared();
        }
    }

    /// What the shim has left is removed.
    pub(in crate::keeper) fn shim_cleared(&mut self) {
        let mut lost = Vec::new();
        for (id, container) in &mut self.containers {
            let open = !container.has_exited() && !container.is_creating();
            if open && container.driver.shim().is_some() {
                lost.push(id.clone());
            }
        }
        for id in lost {
            self.shim_exited(&id, UNKNOWN);
        }
        self.doomed = true;
    }
}
