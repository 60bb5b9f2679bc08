//! New limits for a container.

use std::io::Read as _;
use std::path::Path;

use liboci_cli::Update;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPidsBuilder, LinuxResources};
use slipway_runtime::cgroup::Hierarchies;
use slipway_runtime::resize;

use crate::record::{Container, Status, parse};
use crate::{Context, OciError, Result};

/// Largest description of limits that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// Changes the limits of a container: all that are named, or none.
///
/// # Errors
/// [`OciError`]; nothing was changed then.
pub fn update(context: &Context, args: &Update) -> Result<()> {
    let container = Container::open(context, &args.container_id)?;
    let _lock = container.lock()?;
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let status = container.status(&cgroups);
    if matches!(status, Status::Stopped | Status::Creating) {
        return Err(OciError::State {
            what: "update",
            id: args.container_id.clone(),
            status,
        });
    }
    let resources = match &args.resources {
        Some(path) => read(path)?,
        None => options(args)?,
    };
    Ok(resize::update(
        &cgroups,
        &container.record.cgroup,
        &resources,
        // Nobody else keeps them.
        || Ok(()),
    )?)
}

fn read(path: &Path) -> Result<LinuxResources> {
    let failed = OciError::file("read", path);
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        std::io::stdin()
            .take(LARGEST)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
    } else {
        let file = std::fs::File::open(path).map_err(&failed)?;
        file.take(LARGEST).read_to_end(&mut bytes).map_err(failed)?;
    }
    let mut resources: LinuxResources = parse(&bytes, path, "description of limits")?;
    // Devices are not limits; runc passes over them here, too.
    resources.set_devices(None);
    // Callers such as podman name everything, and 0 where nothing is to change.
    if let Some(cpu) = resources.cpu_mut() {
        let said = cpu.clone();
        cpu.set_shares(said.shares().filter(|n| *n > 0))
            .set_period(said.period().filter(|n| *n > 0))
            .set_quota(said.quota().filter(|n| *n != 0))
            .set_cpus(said.cpus().clone().filter(|list| !list.is_empty()))
            .set_mems(said.mems().clone().filter(|list| !list.is_empty()));
    }
    if let Some(memory) = resources.memory_mut() {
        let said = *memory;
        memory
            .set_limit(said.limit().filter(|n| *n != 0))
            .set_swap(said.swap().filter(|n| *n != 0))
            .set_reservation(said.reservation().filter(|n| *n != 0));
    }
    check(resources)
}

fn check(resources: LinuxResources) -> Result<LinuxResources> {
    let memory = resources.memory().as_ref();
    if memory.is_some_and(|m| m.swap().is_some_and(|swap| swap > 0) && m.limit().is_none()) {
        return Err(OciError::Argument {
            option: "--memory-swap",
            reason: "it counts memory and swap together, and so needs a limit of memory beside it"
                .to_owned(),
        });
    }
    Ok(resources)
}

fn options(args: &Update) -> Result<LinuxResources> {
    if args.l3_cache_schema.is_some() || args.mem_bw_schema.is_some() {
        return Err(OciError::Unsupported {
            what: "limits of caches and memory bandwidth (Intel RDT)",
            instead: "leave --l3-cache-schema and --mem-bw-schema out",
        });
    }
    let bytes = |option, number: Option<u64>| {
        let number = number.map(i64::try_from).transpose();
        number.map_err(|_| OciError::Argument {
            option,
            reason: "it is out of range".to_owned(),
        })
    };
    let mut resources = LinuxResources::default();
    resources.set_devices(None);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(args.cpu_share)
        .set_quota(bytes("--cpu-quota", args.cpu_quota)?)
        .set_period(args.cpu_period)
        .set_realtime_runtime(bytes("--cpu-rt-runtime", args.cpu_rt_runtime)?)
        .set_realtime_period(args.cpu_rt_period)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(bytes("--memory", args.memory)?)
        .set_reservation(bytes("--memory-reservation", args.memory_reservation)?)
        .set_swap(args.memory_swap);
    if memory != LinuxMemory::default() {
        resources.set_memory(Some(memory));
    }
    if let Some(limit) = args.pids_limit {
        let pids = LinuxPidsBuilder::default().limit(limit).build();
        let pids = pids.map_err(|e| OciError::Argument {
            option: "--pids-limit",
            reason: e.to_string(),
        })?;
        resources.set_pids(Some(pids));
    }
    if let Some(weight) = args.blkio_weight {
        let weight = u16::try_from(weight)
            .ok()
            .filter(|w| (10..=1000).contains(w));
        let mut block_io = LinuxBlockIo::default();
        block_io.set_weight(Some(weight.ok_or_else(|| OciError::Argument {
            option: "--blkio-weight",
            reason: "it must be between 10 and 1000".to_owned(),
        })?));
        resources.set_block_io(Some(block_io));
    }
    check(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(args: &[&str]) -> Update {
        use liboci_cli::CommonCmd;
        let all = ["update"].iter().chain(args).map(std::ffi::OsString::from);
        match crate::cli::parse(all.collect()).unwrap().command {
            crate::cli::Command::Common(command) => match *command {
                CommonCmd::Update(update) => update,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_name_what_changes() {
        let given = [
            "--memory",
            "1000",
            "--memory-swap",
            "-1",
            "--pids-limit",
            "5",
            "c",
        ];
        assert!(options(&args(&given[4..])).is_ok());
        let given = [
            "--memory",
            "1000",
            "--pids-limit",
            "5",
            "--cpu-share",
            "7",
            "c",
        ];
        let resources = options(&args(&given)).unwrap();
        assert_eq!(resources.memory().unwrap().limit(), Some(1000));
        assert_eq!(resources.cpu().as_ref().unwrap().shares(), Some(7));
        assert_eq!(resources.pids().unwrap().limit(), 5);
        assert!(resources.block_io().is_none());
        assert!(options(&args(&["--memory-swap", "5", "c"])).is_err());
        assert!(options(&args(&["--blkio-weight", "5", "c"])).is_err());
        assert!(options(&args(&["--l3-cache-schema", "x", "c"])).is_err());
    }

    #[test]
    fn nothing_is_changed_to_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text =
            r#"{"memory": {"limit": 0}, "cpu": {"shares": 0, "cpus": ""}, "pids": {"limit": 9}}"#;
        std::fs::write(file.path(), text).unwrap();
        let resources = read(file.path()).unwrap();
        assert_eq!(resources.memory().unwrap().limit(), None);
        assert_eq!(resources.cpu().as_ref().unwrap().cpus(), &None);
        assert_eq!(resources.pids().unwrap().limit(), 9);
        std::fs::write(file.path(), "{").unwrap();
        assert!(read(file.path()).is_err());
    }
}
