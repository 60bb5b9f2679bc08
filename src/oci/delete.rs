//! Deleting containers, also those that a killed `create` has left.

use std::fs;
use std::os::fd::OwnedFd;

use oci_spec::runtime::Spec;
use slipway_runtime::cgroup::{self, Hierarchies};
use slipway_runtime::confine::chain;
use slipway_runtime::creator;
use slipway_runtime::removal;

use crate::record::{Container, Record, Status};
use crate::{Context, OciError, Result, create, hooks};

/// Kill, as the kernel numbers it.
const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;

/// Deletes a stopped container; with `force`, one in whatever state, and none is no error.
///
/// # Errors
/// [`OciError`].
pub fn delete(context: &Context, id: &str, force: bool) -> Result<()> {
    let container = match Container::open(context, id) {
        Err(OciError::NotFound { .. }) if force => {
            // Killed before there was a record of it: nothing else was made then.
            let dir = context.root.join(id);
            return match dir.is_dir() {
                true => fs::remove_dir_all(&dir).map_err(OciError::file("remove", &dir)),
                false => Ok(()),
            };
        }
        found => found?,
    };
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let status = container.status(&cgroups);
    if status == Status::Creating && force {
        // It would go on making what is removed here; it holds the lock until it is dead.
        if let Some(creator) = container.record.creator.and_then(|creator| creator.pin()) {
            cgroup::send(&creator, SIGKILL);
        }
    }
    let lock = container.lock()?;
    // What was true before may have changed while the lock was waited for.
    let container = match Container::open(context, id) {
        Err(OciError::NotFound { .. }) if force => return Ok(()),
        found => found?,
    };
    let status = container.status(&cgroups);
    if status != Status::Stopped && !force {
        return Err(OciError::State {
            what: "delete",
            id: id.to_owned(),
            status,
        });
    }
    let init: Vec<OwnedFd> = container.init().into_iter().collect();
    let state = container.dir.join(creator::LIBCONTAINER_ROOT);
    removal::remove_container(&cgroups, &container.record.cgroup, &init, &state)?;
    create::clear_mounts(context, &container.record);
    match container.spec() {
        Ok(spec) => stop_hooks(context, &container.record, &spec),
        // It was killed before it was written: no hook has run, either.
        Err(error) if container.record.init.is_none() => drop(error),
        Err(error) => context.log.warning(&chain(&error)),
    }
    let removed = fs::remove_dir_all(&container.dir);
    drop(lock);
    removed.map_err(OciError::file("remove", &container.dir))
}

/// Runs the hooks of a container's end; runtime.md, "Lifecycle": whatever becomes of them.
pub fn stop_hooks(context: &Context, record: &Record, spec: &Spec) {
    let last = hooks::of(spec.hooks().as_ref(), "poststop");
    if !last.is_empty() {
        let state = hooks::state(record, Status::Stopped, None);
        hooks::run_all("poststop", last, &state, &context.log);
    }
}
