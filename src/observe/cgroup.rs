//! What the cgroup of a container or pod has used.

use std::path::{Path, PathBuf};

use crate::file::{Kept, Reader, keyed};
use crate::{Layout, Pressure, now};

/// cgroup v1 says "no limit" with a number near 2^63; nobody has so much memory.
const NO_LIMIT: u64 = 1 << 62;
const PRESSURES: [&str; 3] = ["cpu.pressure", "memory.pressure", "io.pressure"];

/// What every stats call tells. What the kernel does not account here is absent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// When it was read, in nanoseconds since the epoch.
    pub at: i64,
    /// CPU time in nanoseconds.
    pub cpu: Option<u64>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Swap.
    pub swap: Option<Swap>,
    /// CPU pressure.
    pub cpu_pressure: Option<Pressure>,
    /// Memory pressure.
    pub memory_pressure: Option<Pressure>,
    /// I/O pressure.
    pub io_pressure: Option<Pressure>,
}

/// Memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that is charged, page cache included.
    pub usage: u64,
    /// Page cache that has not been used lately.
    pub inactive_file: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// The limit in force here or above; `None`: none.
    pub limit: Option<u64>,
    /// Page faults, a count.
    pub page_faults: u64,
    /// Those that had to wait for a disk.
    pub major_page_faults: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// Kernel memory, where memory.stat tells it (v2).
    pub kernel: Option<u64>,
}

impl Memory {
    /// What can't be reclaimed without loss: the number that evictions look at.
    pub fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }

    /// What is left below the limit; `None` without one.
    pub fn available(&self) -> Option<u64> {
        self.limit
            .map(|limit| limit.saturating_sub(self.working_set()))
    }
}

/// Swap in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swap {
    /// What is swapped out.
    pub usage: u64,
    /// The limit of swap alone; `None`: none.
    pub limit: Option<u64>,
}

impl Swap {
    /// What is left below the limit; `None` without one.
    pub fn available(&self) -> Option<u64> {
        self.limit.map(|limit| limit.saturating_sub(self.usage))
    }
}

/// What only metrics tell.
#[derive(Debug, Clone, Default)]
pub struct Detail {
    /// CPU time in nanoseconds in user mode.
    pub cpu_user: u64,
    /// CPU time in nanoseconds in the kernel.
    pub cpu_system: u64,
    /// Enforcement periods of the CPU quota.
    pub periods: u64,
    /// Those in which it was used up.
    pub throttled_periods: u64,
    /// Nanoseconds spent throttled.
    pub throttled: u64,
    /// The most memory ever in use, in bytes.
    pub memory_peak: Option<u64>,
    /// How often the memory limit was hit.
    pub memory_failures: u64,
    /// Kernel memory in bytes.
    pub kernel: u64,
    /// Processes that the OOM killer ended.
    pub oom_kills: u64,
    /// Threads.
    pub threads: u64,
    /// Their limit; `None`: none.
    pub threads_max: Option<u64>,
    /// By device.
    pub io: Vec<DeviceIo>,
    /// By size of page.
    pub hugepages: Vec<Hugepages>,
}

/// Block I/O of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hugepages {
    /// Such as `2MB`.
    pub size: String,
    /// Bytes in use.
    pub usage: u64,
    /// The most bytes ever in use, where the kernel tells (v1).
    pub peak: Option<u64>,
}

/// Reads what every stats call tells of one cgroup, again and again: its files stay open, because opening them
/// costs several times what reading them does.
#[derive(Debug, Default)]
pub struct Sampler {
    files: Vec<Kept>,
    threads: Kept,
}

impl Sampler {
    /// What the cgroup (absolute path in each hierarchy) has used until now.
    pub fn usage(&mut self, layout: &Layout, cgroup: &Path) -> Usage {
        let mut usage = Usage {
            at: now(),
            ..Usage::default()
        };
        let mut files = Files {
            kept: &mut self.files,
            next: 0,
        };
        let v2 = || layout.v2(cgroup);
        let [cpu, memory, io] =
            PRESSURES.map(|name| files.with(v2, name, Pressure::parse).flatten());
        usage.cpu_pressure = cpu;
        usage.memory_pressure = memory;
        usage.io_pressure = io;
        if layout.unified() {
            usage.cpu = files.with(v2, "cpu.stat", cpu_time).flatten();
            (usage.memory, usage.swap) = memory_v2(&mut files, v2);
            return usage;
        }
        usage.cpu = files.number(|| layout.v1("cpuacct", cgroup), "cpuacct.usage");
        let v1 = || layout.v1("memory", cgroup);
        let now = files.number(v1, "memory.usage_in_bytes");
        let stat = |text: &str| now.map(|now| memory_v1(now, text));
        if let Some((memory, swap)) = files.with(v1, "memory.stat", stat).flatten() {
            usage.memory = Some(memory);
            usage.swap = swap;
        }
        usage
    }

    /// How many threads are in the cgroup and below it; `None` where the kernel does not count them.
    pub fn threads(&mut self, layout: &Layout, cgroup: &Path) -> Option<u64> {
        let dir = || match layout.unified() {
            true => layout.v2(cgroup),
            false => layout.v1("pids", cgroup),
        };
        let number = |text: &str| text.trim_ascii().parse().ok();
        self.threads.with(dir, "pids.current", number).flatten()
    }

    /// Closes the files: the cgroup has ended.
    pub fn close(&mut self) {
        *self = Self::default();
    }
}

/// The files of a [`Sampler`] in the order in which it reads them, which is always the same.
struct Files<'a> {
    kept: &'a mut Vec<Kept>,
    next: usize,
}

impl Files<'_> {
    fn with<T>(
        &mut self,
        dir: impl FnOnce() -> Option<PathBuf>,
        name: &str,
        read: impl FnOnce(&str) -> T,
    ) -> Option<T> {
        if self.kept.len() == self.next {
            self.kept.push(Kept::default());
        }
        let file = &mut self.kept[self.next];
        self.next += 1;
        file.with(dir, name, read)
    }

    fn number(&mut self, dir: impl FnOnce() -> Option<PathBuf>, name: &str) -> Option<u64> {
        let number = |text: &str| text.trim_ascii().parse().ok();
        self.with(dir, name, number).flatten()
    }

    /// A limit; `None` for `max`, too.
    fn limit(&mut self, dir: impl FnOnce() -> Option<PathBuf>, name: &str) -> Option<u64> {
        self.number(dir, name)
    }
}

fn cpu_time(stat: &str) -> Option<u64> {
    let found = keyed(stat).find(|(key, _)| *key == "usage_usec");
    found.map(|(_, micros)| micros.saturating_mul(1000))
}

fn memory_v2(
    files: &mut Files<'_>,
    dir: impl Fn() -> Option<PathBuf> + Copy,
) -> (Option<Memory>, Option<Swap>) {
    // All are read, whatever the others say: see Files.
    let usage = files.number(dir, "memory.current");
    let memory = files.with(dir, "memory.stat", |text| {
        let mut memory = Memory::default();
        for (key, value) in keyed(text) {
            match key {
                "anon" => memory.rss = value,
                "file" => memory.cache = value,
                "file_mapped" => memory.mapped_file = value,
                "kernel" => memory.kernel = Some(value),
                "inactive_file" => memory.inactive_file = value,
                "pgfault" => memory.page_faults = value,
                "pgmajfault" => memory.major_page_faults = value,
                _ => {}
            }
        }
        memory
    });
    let limit = files.limit(dir, "memory.max");
    let swapped = files.number(dir, "memory.swap.current");
    let swap_limit = files.limit(dir, "memory.swap.max");
    let memory = memory.zip(usage).map(|(memory, usage)| Memory {
        usage,
        limit,
        ..memory
    });
    let swap = swapped.map(|usage| Swap {
        usage,
        limit: swap_limit,
    });
    (memory, swap)
}

fn memory_v1(now: u64, stat: &str) -> (Memory, Option<Swap>) {
    let mut memory = Memory {
        usage: now,
        ..Memory::default()
    };
    let (mut swap, mut with_swap) = (None, None);
    let limited = |value: u64| Some(value).filter(|v| *v < NO_LIMIT);
    for (key, value) in keyed(stat) {
        match key {
            "total_rss" => memory.rss = value,
            "total_cache" => memory.cache = value,
            "total_mapped_file" => memory.mapped_file = value,
            "total_inactive_file" => memory.inactive_file = value,
            "total_pgfault" => memory.page_faults = value,
            "total_pgmajfault" => memory.major_page_faults = value,
            "total_swap" => swap = Some(value),
            "hierarchical_memory_limit" => memory.limit = limited(value),
            "hierarchical_memsw_limit" => with_swap = limited(value),
            _ => {}
        }
    }
    let limit = with_swap.map(|both| both.saturating_sub(memory.limit.unwrap_or(both)));
    (memory, swap.map(|usage| Swap { usage, limit }))
}

/// Reads what only metrics tell.
pub fn detail(layout: &Layout, cgroup: &Path) -> Detail {
    let mut detail = Detail::default();
    let mut reader = Reader::new();
    if layout.unified() {
        if let Some(dir) = layout.v2(cgroup) {
            detail_v2(&mut detail, reader.enter(&dir));
            detail.hugepages = hugepages(&mut reader, &dir, ".current");
        }
        return detail;
    }
    let mut each = |controller: &str, read: &mut dyn FnMut(&mut Reader, &Path)| {
        if let Some(dir) = layout.v1(controller, cgroup) {
            read(reader.enter(&dir), &dir);
        }
    };
    each("cpuacct", &mut |r, _| {
        detail.cpu_user = r.number("cpuacct.usage_user").unwrap_or(0);
        detail.cpu_system = r.number("cpuacct.usage_sys").unwrap_or(0);
    });
    each("cpu", &mut |r, _| {
        for (key, value) in keyed(r.text("cpu.stat").unwrap_or_default()) {
            match key {
                "nr_periods" => detail.periods = value,
                "nr_throttled" => detail.throttled_periods = value,
                "throttled_time" => detail.throttled = value,
                _ => {}
            }
        }
    });
    each("memory", &mut |r, _| {
        detail.memory_peak = r.number("memory.max_usage_in_bytes");
        detail.memory_failures = r.number("memory.failcnt").unwrap_or(0);
        detail.kernel = r.number("memory.kmem.usage_in_bytes").unwrap_or(0);
        for (key, value) in keyed(r.text("memory.oom_control").unwrap_or_default()) {
            if key == "oom_kill" {
                detail.oom_kills = value;
            }
        }
    });
    each("pids", &mut |r, _| threads(&mut detail, r));
    each("blkio", &mut |r, _| {
        blkio(&mut detail.io, r);
    });
    each("hugetlb", &mut |r, dir| {
        detail.hugepages = hugepages(r, dir, ".usage_in_bytes");
    });
    detail
}

fn threads(detail: &mut Detail, reader: &mut Reader) {
    detail.threads = reader.number("pids.current").unwrap_or(0);
    detail.threads_max = reader.limit("pids.max").flatten();
}

fn detail_v2(detail: &mut Detail, reader: &mut Reader) {
    for (key, value) in keyed(reader.text("cpu.stat").unwrap_or_default()) {
        let nanos = value.saturating_mul(1000);
        match key {
            "user_usec" => detail.cpu_user = nanos,
            "system_usec" => detail.cpu_system = nanos,
            "nr_periods" => detail.periods = value,
            "nr_throttled" => detail.throttled_periods = value,
            "throttled_usec" => detail.throttled = nanos,
            _ => {}
        }
    }
    // Since Linux 5.19.
    detail.memory_peak = reader.number("memory.peak");
    for (key, value) in keyed(reader.text("memory.events").unwrap_or_default()) {
        match key {
            "max" => detail.memory_failures = value,
            "oom_kill" => detail.oom_kills = value,
            _ => {}
        }
    }
    for (key, value) in keyed(reader.text("memory.stat").unwrap_or_default()) {
        if key == "kernel" {
            detail.kernel = value;
        }
    }
    threads(detail, reader);
    for line in reader.text("io.stat").unwrap_or_default().lines() {
        detail.io.extend(io_line(line));
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn io_line(line: &str) -> Option<DeviceIo> {
    let (device, fields) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut io = DeviceIo {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..DeviceIo::default()
    };
    for (key, value) in fields.split(' ').filter_map(|f| f.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => io.read_bytes = value,
            "wbytes" => io.written_bytes = value,
            "rios" => io.reads = value,
            "wios" => io.writes = value,
            _ => {}
        }
    }
    Some(io)
}

/// `8:0 Read 4096`, one line for each operation and a total.
fn blkio(devices: &mut Vec<DeviceIo>, reader: &mut Reader) {
    // The names that the hierarchy and the flat policy have; which of them counts depends on the kernel.
    let families = [
        ("blkio.throttle.io_service_bytes_recursive", true),
        ("blkio.throttle.io_serviced_recursive", false),
    ];
    for (name, bytes) in families {
        for line in reader.text(name).unwrap_or_default().lines() {
            let mut words = line.split(' ');
            let (Some(device), Some(operation), Some(value)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let Some((Ok(major), Ok(minor))) = device
                .split_once(':')
                .map(|(major, minor)| (major.parse(), minor.parse()))
            else {
                continue;
            };
            let found = devices
                .iter()
                .position(|d| (d.major, d.minor) == (major, minor));
            let at = found.unwrap_or_else(|| {
                devices.push(DeviceIo {
                    major,
                    minor,
                    ..DeviceIo::default()
                });
                devices.len() - 1
            });
            let value = value.parse().unwrap_or(0);
            match (operation, bytes) {
                ("Read", true) => devices[at].read_bytes = value,
                ("Write", true) => devices[at].written_bytes = value,
                ("Read", false) => devices[at].reads = value,
                ("Write", false) => devices[at].writes = value,
                _ => {}
            }
        }
    }
}

fn hugepages(reader: &mut Reader, dir: &Path, current: &str) -> Vec<Hugepages> {
    let mut pages: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(current)?;
            // `hugetlb.2MB.rsvd.current` counts reservations.
            if size.contains('.') {
                return None;
            }
            Some(Hugepages {
                usage: reader.number(&name)?,
                peak: reader.number(&format!("hugetlb.{size}.max_usage_in_bytes")),
                size: size.to_owned(),
            })
        })
        .collect();
    pages.sort_by(|a, b| a.size.cmp(&b.size));
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_version_one() {
        let stat = "cache 1\nrss 2\nhierarchical_memory_limit 1000\nhierarchical_memsw_limit 1500\n\
                    total_cache 300\ntotal_rss 200\ntotal_mapped_file 7\ntotal_swap 100\n\
                    total_pgfault 5\ntotal_pgmajfault 1\ntotal_inactive_file 150\n";
        let (memory, swap) = memory_v1(600, stat);
        assert_eq!((memory.working_set(), memory.available()), (450, Some(550)));
        assert_eq!(
            (memory.rss, memory.cache, memory.page_faults),
            (200, 300, 5)
        );
        let swap = swap.unwrap();
        assert_eq!((swap.usage, swap.limit), (100, Some(500)));
        assert_eq!(swap.available(), Some(400));
        let unlimited = "hierarchical_memory_limit 9223372036854771712\ntotal_inactive_file 900\n";
        let (memory, swap) = memory_v1(600, unlimited);
        assert_eq!((memory.limit, memory.available(), swap), (None, None, None));
        assert_eq!(
            memory.working_set(),
            0,
            "the files are read one after the other"
        );
    }

    #[test]
    fn memory_of_version_two() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let mut kept = Vec::new();
        let mut read = || {
            let mut files = Files {
                kept: &mut kept,
                next: 0,
            };
            memory_v2(&mut files, || Some(dir.path().to_owned()))
        };
        assert_eq!(read(), (None, None));
        put("memory.current", "1000\n");
        put(
            "memory.stat",
            "anon 400\nfile 500\nkernel 90\nfile_mapped 4\ninactive_file 300\npgfault 8\npgmajfault 2\n",
        );
        put("memory.max", "max\n");
        let (memory, swap) = read();
        let memory = memory.unwrap();
        assert_eq!((memory.working_set(), memory.available()), (700, None));
        assert_eq!((memory.rss, memory.kernel, swap), (400, Some(90), None));
        put("memory.max", "2000\n");
        put("memory.swap.current", "30\n");
        put("memory.swap.max", "100\n");
        let (memory, swap) = read();
        assert_eq!(memory.unwrap().available(), Some(1300));
        assert_eq!(swap.unwrap().available(), Some(70));
    }

    #[test]
    fn block_io_of_both_versions() {
        let io = io_line("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        let expected = DeviceIo {
            major: 8,
            minor: 16,
            read_bytes: 1,
            written_bytes: 2,
            reads: 3,
            writes: 4,
        };
        assert_eq!(io, expected);
        assert_eq!(io_line("nonsense"), None);
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put(
            "blkio.throttle.io_service_bytes_recursive",
            "8:16 Read 1\n8:16 Write 2\n8:16 Total 3\nTotal 3\n",
        );
        put(
            "blkio.throttle.io_serviced_recursive",
            "8:16 Read 3\n8:16 Write 4\n",
        );
        let mut devices = Vec::new();
        blkio(&mut devices, Reader::new().enter(dir.path()));
        assert_eq!(devices, [expected]);
    }

    #[test]
    fn huge_pages_by_size() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("hugetlb.2MB.current", "4194304\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            ("hugetlb.1GB.current", "0\n"),
            ("memory.current", "1\n"),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let found = hugepages(Reader::new().enter(dir.path()), dir.path(), ".current");
        let sizes: Vec<_> = found.iter().map(|h| (h.size.as_str(), h.usage)).collect();
        assert_eq!(sizes, [("1GB", 0), ("2MB", 4_194_304)]);
    }

    #[test]
    fn a_cgroup_that_is_not_there_has_used_nothing() {
        let layout = Layout::detect().unwrap();
        let mut sampler = Sampler::default();
        let usage = sampler.usage(&layout, Path::new("/slipway-no-such-cgroup"));
        assert!(usage.cpu.is_none() && usage.memory.is_none() && usage.io_pressure.is_none());
        assert_eq!(
            detail(&layout, Path::new("/slipway-no-such-cgroup")).threads,
            0
        );
    }
}
