//! New limits for a container.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::Args;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPidsBuilder, LinuxResources};
use slipway_runtime::cgroup::Hierarchies;
use slipway_runtime::resize;

use crate::record::{Container, Status, parse};
use crate::{Context, OciError, Result};

/// Largest description of limits that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// The options, which are runc's. Sizes may have a unit (`64M`), and -1 takes a limit away.
#[derive(Debug, Clone, Default, Args)]
#[command(allow_negative_numbers = true)]
pub struct Update {
    /// A file with the new limits as JSON, - for standard input; the other options are passed over then
    #[arg(short, long)]
    resources: Option<PathBuf>,
    /// Share of block devices, 10 to 1000
    #[arg(long)]
    blkio_weight: Option<u16>,
    /// Period of the CPU quota, in microseconds
    #[arg(long)]
    cpu_period: Option<u64>,
    /// CPU time in a period, in microseconds
    #[arg(long)]
    cpu_quota: Option<i64>,
    /// CPU time beyond the quota that may be saved up, in microseconds
    #[arg(long)]
    cpu_burst: Option<u64>,
    /// Period of real-time scheduling, in microseconds
    #[arg(long)]
    cpu_rt_period: Option<u64>,
    /// Time of real-time scheduling in a period, in microseconds
    #[arg(long)]
    cpu_rt_runtime: Option<i64>,
    /// Share of the CPUs
    #[arg(long)]
    cpu_share: Option<u64>,
    /// 1: only CPU time that nobody else wants
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..=1))]
    cpu_idle: Option<i64>,
    /// CPUs, as 0-3,7
    #[arg(long)]
    cpuset_cpus: Option<String>,
    /// Memory nodes, as 0-3,7
    #[arg(long)]
    cpuset_mems: Option<String>,
    /// Memory, in bytes
    #[arg(long, value_parser = size)]
    memory: Option<i64>,
    /// Memory that is kept for the container, in bytes
    #[arg(long, value_parser = size)]
    memory_reservation: Option<i64>,
    /// Memory and swap together, in bytes
    #[arg(long, value_parser = size)]
    memory_swap: Option<i64>,
    /// Processes and threads
    #[arg(long)]
    pids_limit: Option<i64>,
    /// Limits of caches (not supported)
    #[arg(long, hide = true)]
    l3_cache_schema: Option<String>,
    /// Limits of memory bandwidth (not supported)
    #[arg(long, hide = true)]
    mem_bw_schema: Option<String>,
    /// The container
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    container_id: String,
}

/// Bytes, with or without one of the binary units k, m, g, t, p; -1.
fn size(text: &str) -> std::result::Result<i64, String> {
    let lower = text.trim().to_ascii_lowercase();
    if lower == "-1" {
        return Ok(-1);
    }
    let end = lower
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let factor = match unit.trim().trim_end_matches('b').trim_end_matches('i') {
        "" if !unit.contains('i') => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(UNITS.to_owned()),
    };
    let number: i64 = number.parse().map_err(|_| UNITS.to_owned())?;
    number
        .checked_mul(1 << factor)
        .ok_or_else(|| "it is out of range".to_owned())
}

const UNITS: &str =
    "it must be a number of bytes, with or without a unit (k, m, g, t, p), or -1 for no limit";

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
    let mut resources = LinuxResources::default();
    resources.set_devices(None);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(args.cpu_share)
        .set_quota(args.cpu_quota)
        .set_period(args.cpu_period)
        .set_burst(args.cpu_burst)
        .set_idle(args.cpu_idle)
        .set_realtime_runtime(args.cpu_rt_runtime)
        .set_realtime_period(args.cpu_rt_period)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(args.memory)
        .set_reservation(args.memory_reservation)
        // A limit of both together would still be one of memory.
        .set_swap(
            args.memory_swap
                .or(args.memory.filter(|limit| *limit == -1)),
        );
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
        let weight = Some(weight).filter(|w| (10..=1000).contains(w));
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
        let all = ["update"].iter().chain(args).map(std::ffi::OsString::from);
        match crate::cli::parse(all.collect()).unwrap().command {
            crate::cli::Command::Update(update) => *update,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_name_what_changes() {
        let given = [
            "--memory",
            "64M",
            "--memory-swap=-1",
            "--pids-limit",
            "-1",
            "--cpu-burst",
            "7",
            "c",
        ];
        let resources = options(&args(&given)).unwrap();
        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(-1)));
        assert_eq!(resources.pids().unwrap().limit(), -1);
        assert_eq!(resources.cpu().as_ref().unwrap().burst(), Some(7));
        let memory = options(&args(&["--memory", "-1", "--cpu-idle", "1", "c"])).unwrap();
        assert_eq!(memory.memory().unwrap().swap(), Some(-1));
        assert_eq!(memory.cpu().as_ref().unwrap().idle(), Some(1));
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
    fn sizes_may_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("2k", 2048),
            ("3MiB", 3 << 20),
            ("1gb", 1 << 30),
            ("-1", -1),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "M", "-2", "1.5g", "5x", "5i", "99999999p"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        let idle = ["update", "--cpu-idle", "2", "c"].map(std::ffi::OsString::from);
        assert!(crate::cli::parse(idle.to_vec()).is_err());
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
