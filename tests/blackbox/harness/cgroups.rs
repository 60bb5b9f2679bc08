//! Where the tests' pods have their cgroups, under the driver that a run is for: directories below the test's
//! own, or slices below the test's own slice, which systemd makes and stops.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Context as _, Env, Result, ensure, output, stage};

/// Names the driver: `cgroupfs` (without it, too), or `systemd`.
const DRIVER: &str = "SLIPWAY_TEST_CGROUP_DRIVER";
/// Who asks systemd: over the bus, because its own socket is not for clients in another PID namespace.
const SYSTEMCTL: [&str; 2] = ["SYSTEMCTL_FORCE_BUS=1", "systemctl"];

/// The daemons' cgroup driver, where a test does not say another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Directories.
    Cgroupfs,
    /// Slices and scopes.
    Systemd,
}

impl Driver {
    /// The driver of this run, checked against the machine. The error is for people.
    pub fn of_run() -> Result<Self, String> {
        match std::env::var(DRIVER).as_deref() {
            Err(_) | Ok("" | "cgroupfs") => Ok(Self::Cgroupfs),
            Ok("systemd") if stage::systemd() && stage::unified() => Ok(Self::Systemd),
            Ok("systemd") => Err(format!(
                "{DRIVER}=systemd needs systemd as PID 1 on pure cgroup v2; hack/vm test --guest systemd has that"
            )),
            Ok(other) => Err(format!(
                "{DRIVER}={other} is no driver; there are cgroupfs and systemd"
            )),
        }
    }

    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        }
    }

    /// The parent of all tests' cgroups, for a test program with this process id: a name in the hierarchies.
    pub fn top(self, pid: u32) -> String {
        match self {
            Self::Cgroupfs => format!("slipway-test-{pid}"),
            Self::Systemd => format!("slt{pid}.slice"),
        }
    }

    /// The cgroup `names` (separated by slashes) below another one, as a kubelet writes it: with the systemd
    /// driver each is a slice that has the names of those above it in its own.
    pub fn below(self, cgroup: &str, names: &str) -> String {
        let mut path = cgroup.to_owned();
        for name in names.split('/') {
            let above = path.rsplit('/').next().unwrap_or_default();
            let own = match self {
                Self::Cgroupfs => name.to_owned(),
                Self::Systemd => format!("{}-{name}.slice", above.trim_end_matches(".slice")),
            };
            path = format!("{path}/{own}");
        }
        path
    }
}

/// A cgroup's directory in the only hierarchy, or the one that systemd's units are in.
pub fn dir(cgroup: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(cgroup.trim_start_matches('/'))
}

/// What systemctl(1) says; its failure is ours.
pub async fn systemctl(args: &[&str]) -> Result<String> {
    output("env", &[&SYSTEMCTL, args].concat()).await
}

/// The unit of a cgroup.
fn unit(cgroup: &str) -> &str {
    cgroup.rsplit('/').next().unwrap_or(cgroup)
}

impl Env {
    /// A parent for pods below the test's own cgroup: what a kubelet would send, and where it is.
    pub fn below(&self, names: &str) -> String {
        self.driver.below(&self.cgroup, names)
    }

    /// Makes the test's own cgroup where only systemd may: a slice that nobody has made for a pod, so that it
    /// stays while pods come and go, as the kubelet's do.
    pub(super) async fn make_cgroup(&self) -> Result<()> {
        if self.driver == Driver::Systemd {
            let made = self.slice.get_or_try_init(|| async {
                systemctl(&["start", unit(&self.cgroup)]).await.map(drop)
            });
            made.await.context("making the test's slice")?;
        }
        Ok(())
    }

    /// Removes a cgroup below the test's own that no pod was made the owner of; it must be empty.
    pub async fn remove_below(&self, names: &str) -> Result<()> {
        let cgroup = self.below(names);
        match self.driver {
            Driver::Cgroupfs => {
                std::fs::remove_dir(dir(&cgroup)).with_context(|| format!("removing {cgroup}"))
            }
            Driver::Systemd => {
                let procs = super::read(dir(&cgroup).join("cgroup.procs"))?;
                ensure!(procs.is_empty(), "{cgroup} holds {procs}");
                systemctl(&["stop", unit(&cgroup)]).await.map(drop)
            }
        }
    }

    /// Ends the test's slice with all in it, if it was made.
    pub(super) async fn stop_slice(&self) {
        if self.slice.initialized() {
            systemctl(&["stop", unit(&self.cgroup)]).await.ok();
        }
    }
}

/// Ends the slice of all tests; run by the outermost process.
pub fn stop_top(top: &str) {
    let command = Command::new("env")
        .args(SYSTEMCTL)
        .args(["stop", top])
        .stdin(Stdio::null())
        .status();
    if !command.is_ok_and(|status| status.success()) {
        eprintln!("can't stop {top}");
    }
}
