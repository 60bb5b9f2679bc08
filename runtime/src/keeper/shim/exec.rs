//! Commands in containers that a shim makes.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use slipway_proto::keeper::{
    Error as WireError, ErrorKind, Exec as ExecCall, response::Result as Answer,
};

use super::turns::Step;
use crate::confine::chain;
use crate::keeper::exec::kill_tree_of;
use crate::keeper::job::{Origin, Purpose};
use crate::keeper::{Keeper, wire_error};
use crate::shim::{self, Session};
use crate::{descriptor, oci};

/// A command that the shim runs.
pub(in crate::keeper) struct ShimExec {
    /// Who waits for it.
    pub(in crate::keeper) connection: u64,
    container: String,
    /// When this is closed, the job knows that nobody waits any more.
    _held: OwnedFd,
}

impl Keeper {
    pub(in crate::keeper) fn begin_shim_exec(
        &mut self,
        connection: u64,
        call: &ExecCall,
        stdio: Vec<OwnedFd>,
    ) -> Result<(), WireError> {
        let id = call.container_id.clone();
        let container = self.executes(call, &stdio)?;
        let (dir, cgroup) = (container.dir.clone(), container.cgroup.clone());
        let on_host = container.pid().is_some();
        let shim = self.shim_call()?;
        let running = shim.running()?.clone();
        let failed = |e: io::Error| {
            let message = format!("can't exec in container {id}: {e}");
            wire_error(ErrorKind::Internal, message)
        };
        let (caller, held) = descriptor::pipe().map_err(failed)?;
        let mut keep = oci::descriptors(&stdio);
        keep.push(caller.as_raw_fd());
        let turn = self.turn(Step::Start).map_err(failed)?;
        keep.push(turn.descriptor());
        let origin = Origin {
            keep: &keep,
            ..Origin::default()
        };
        let timeout = (call.timeout_ms > 0).then(|| Duration::from_millis(call.timeout_ms));
        let (args, tty, own_id) = (call.args.clone(), call.tty, id.clone());
        let (cgroups, shim) = (self.cgroups.clone(), shim.shim);
        let job = self.start_job(Purpose::ShimExec, connection, origin, move || {
            let session = Session {
                id: &own_id,
                dir: &dir,
                args: &args,
                tty,
                stdio: &stdio,
                timeout,
                caller: &caller,
                turn,
                on_host,
                // In a virtual machine the number is another's.
                kill_tree: &|pid| {
                    if cgroups.pids(&cgroup).contains(&pid) {
                        kill_tree_of(pid);
                    }
                },
            };
            shim::exec(&shim, &running, session)
                .map(Answer::Exec)
                .map_err(|e| wire_error(e.kind(), format!("can't exec: {}", chain(&e))))
        });
        let pid = job.map_err(failed)?;
        let exec = ShimExec {
            connection,
            container: id,
            _held: held,
        };
        self.shim_execs.insert(pid, exec);
        Ok(())
    }

    /// What the shim ran has ended. If it was for want of memory, that is not what ends the container.
    pub(in crate::keeper) fn shim_exec_ended(
        &mut self,
        job: i32,
        answer: &Result<Answer, WireError>,
    ) {
        let Some(exec) = self.shim_execs.remove(&job) else {
            return;
        };
        if let Ok(Answer::Exec(end)) = answer
            && end.exit_code == 128 + libc::SIGKILL
            && let Some(container) = self.containers.get_mut(&exec.container)
        {
            let kills = self.cgroups.oom_kills(&container.cgroup);
            container.oom_kills_of_execs = kills.min(container.oom_kills_of_execs + 1);
        }
    }
}
