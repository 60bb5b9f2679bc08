//! The sealed copy of the binary that keepers run from.

use crate::finding::Finding;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};
use std::io;

const ID: &str = "sealed-binary";
const WHAT: &str = "sealed memfd";

/// Whether a memfd can be sealed, and executed.
pub(crate) fn check() -> Vec<Finding> {
    let cost = "the daemon can't start: keepers run from a sealed copy of the binary, which no container can overwrite";
    let found = match probe() {
        Ok(Sealed::Yes) => Finding::ok(ID, WHAT, "can be sealed and executed"),
        Ok(Sealed::NotExecutable) => Finding::fail(ID, WHAT, "a memfd can't be executed")
            .cost(cost)
            .fix("sysctl -w vm.memfd_noexec=0 (in a container: of the PID namespaces above, too)"),
        Ok(Sealed::StillWritable) => Finding::fail(ID, WHAT, "a sealed memfd takes writes")
            .cost(cost)
            .fix("use a kernel whose memfd_create(2) has seals"),
        Err(e) => Finding::fail(ID, WHAT, format!("can't be made: {e}"))
            .cost(cost)
            .fix("use a kernel with CONFIG_MEMFD_CREATE; sysctl -w vm.memfd_noexec=0"),
    };
    vec![found]
}

enum Sealed {
    Yes,
    NotExecutable,
    StillWritable,
}

fn probe() -> io::Result<Sealed> {
    let memfd = memfd_create(
        "slipway-check",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::io::write(&memfd, b"x")?;
    // With vm.memfd_noexec the kernel takes the execute bits away, for good.
    if fstat(&memfd)?.st_mode & 0o111 == 0 {
        return Ok(Sealed::NotExecutable);
    }
    fcntl_add_seals(
        &memfd,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    match rustix::io::write(&memfd, b"y") {
        Ok(_) => Ok(Sealed::StillWritable),
        Err(_) => Ok(Sealed::Yes),
    }
}
