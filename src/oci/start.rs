//! Starting a container: its init is let go, and tells until its execve what goes wrong.

use std::fs::File;
use std::io::{self, Read as _};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use slipway_runtime::cgroup::Hierarchies;
use slipway_runtime::creator;

use crate::record::{Container, Status};
use crate::{Context, OciError, Result, hooks};

/// Starts a created container.
///
/// # Errors
/// [`OciError`]; a container whose init could not become its process has ended.
pub fn start(context: &Context, id: &str) -> Result<()> {
    let container = Container::open(context, id)?;
    let _lock = container.lock()?;
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let status = container.status(&cgroups);
    if status != Status::Created {
        return Err(OciError::State {
            what: "start",
            id: id.to_owned(),
            status,
        });
    }
    if !container.record.has_process {
        return Err(OciError::NoProcess(id.to_owned()));
    }
    let fifo = container.start_fifo();
    let failed = OciError::file("read", &fifo);
    // Opened before the init is let go: what it says would be lost.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let words = rustix::fs::open(&fifo, flags, Mode::empty()).map_err(io::Error::from);
    let words = File::from(words.map_err(&failed)?);
    creator::release(&container.dir, id).map_err(|e| OciError::Container {
        what: "start",
        id: id.to_owned(),
        reason: format!("can't let its init go: {e}"),
    })?;
    // Its startContainer hooks have their own deadlines, or by their author's will none.
    let told = read_all(&words).map_err(&failed)?;
    if let Some((_, reason)) = told.split_first() {
        return Err(OciError::Container {
            what: "start",
            id: id.to_owned(),
            reason: String::from_utf8_lossy(reason).into_owned(),
        });
    }
    let spec = container.spec()?;
    let after = hooks::of(spec.hooks().as_ref(), "poststart");
    if !after.is_empty() {
        let pid = container.record.init.map(|init| init.pid);
        let state = hooks::state(&container.record, Status::Running, pid);
        // runtime.md, "Lifecycle": the container goes on as if they had succeeded.
        hooks::run_all("poststart", after, &state, &context.log);
    }
    Ok(())
}

/// What the init says until nobody holds the other end any more: with its execve, or its death.
fn read_all(mut words: &File) -> io::Result<Vec<u8>> {
    let mut told = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match words.read(&mut bytes) {
            Ok(0) => return Ok(told),
            Ok(n) => told.extend_from_slice(&bytes[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(&words, PollFlags::IN)], None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Err(e) => return Err(e),
        }
    }
}
