//! The metrics of ListPodSandboxMetrics: names, help, labels and units as cAdvisor has them, so that what
//! reads a kubelet's `/metrics/cadvisor` needs no change. Values are whole numbers, as the CRI wants: a total
//! in seconds is cut.

use std::collections::BTreeMap;

use crate::cgroup::{Detail, Usage};
use crate::disk::{DiskUsage, FileSystem};
use crate::network::Interface;
use crate::process::Processes;
use crate::{Pressure, Stall};

/// The labels that every metric begins with.
pub const BASE_LABELS: [&str; 5] = ["id", "image", "namespace", "pod", "container"];
/// Value of the label `container` for what belongs to a whole pod.
pub const POD: &str = "POD";

/// Whether a value only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// What a metric is.
#[derive(Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its name.
    pub name: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// Labels beside [`BASE_LABELS`].
    pub labels: &'static [&'static str],
    /// Whether it only grows.
    pub kind: Kind,
}

/// A value of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Which.
    pub metric: &'static Descriptor,
    /// Values of the descriptor's own labels.
    pub labels: Vec<String>,
    /// The value.
    pub value: u64,
}

macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal [$($label:literal)*] $help:literal;)*) => {
        $(const $constant: &Descriptor = &Descriptor {
            name: $name,
            help: $help,
            labels: &[$($label),*],
            kind: Kind::$kind,
        };)*
        /// Every metric there is.
        pub const ALL: &[&Descriptor] = &[$($constant),*];
    };
}

metrics! {
    LAST_SEEN = Gauge "container_last_seen" [] "Last time a container was seen by the exporter";
    START_TIME = Gauge "container_start_time_seconds" [] "Start time of the container since unix epoch in seconds.";

    CPU_USAGE = Counter "container_cpu_usage_seconds_total" ["cpu"] "Cumulative cpu time consumed in seconds.";
    CPU_USER = Counter "container_cpu_user_seconds_total" [] "Cumulative user cpu time consumed in seconds.";
    CPU_SYSTEM = Counter "container_cpu_system_seconds_total" [] "Cumulative system cpu time consumed in seconds.";
    CFS_PERIODS = Counter "container_cpu_cfs_periods_total" [] "Number of elapsed enforcement period intervals.";
    CFS_THROTTLED = Counter "container_cpu_cfs_throttled_periods_total" [] "Number of throttled period intervals.";
    CFS_THROTTLED_SECONDS = Counter "container_cpu_cfs_throttled_seconds_total" [] "Total time duration the container has been throttled.";

    MEMORY_CACHE = Gauge "container_memory_cache" [] "Number of bytes of page cache memory.";
    MEMORY_RSS = Gauge "container_memory_rss" [] "Size of RSS in bytes.";
    MEMORY_KERNEL = Gauge "container_memory_kernel_usage" [] "Size of kernel memory allocated in bytes.";
    MEMORY_MAPPED = Gauge "container_memory_mapped_file" [] "Size of memory mapped files in bytes.";
    MEMORY_SWAP = Gauge "container_memory_swap" [] "Container swap usage in bytes.";
    MEMORY_FAILCNT = Counter "container_memory_failcnt" [] "Number of memory usage hits limits";
    MEMORY_USAGE = Gauge "container_memory_usage_bytes" [] "Current memory usage in bytes, including all memory regardless of when it was accessed";
    MEMORY_PEAK = Gauge "container_memory_max_usage_bytes" [] "Maximum memory usage recorded in bytes";
    MEMORY_WORKING_SET = Gauge "container_memory_working_set_bytes" [] "Current working set in bytes.";
    MEMORY_FAILURES = Counter "container_memory_failures_total" ["failure_type" "scope"] "Cumulative count of memory allocation failures.";
    OOM_EVENTS = Counter "container_oom_events_total" [] "Count of out of memory events observed for the container";

    HUGETLB_USAGE = Gauge "container_hugetlb_usage_bytes" ["pagesize"] "Current hugepage usage in bytes";
    HUGETLB_PEAK = Gauge "container_hugetlb_max_usage_bytes" ["pagesize"] "Maximum hugepage usage recorded in bytes";

    FS_INODES_FREE = Gauge "container_fs_inodes_free" [] "Number of available Inodes";
    FS_INODES = Gauge "container_fs_inodes_total" [] "Number of Inodes";
    FS_LIMIT = Gauge "container_fs_limit_bytes" [] "Number of bytes that can be consumed by the container on this filesystem.";
    FS_USAGE = Gauge "container_fs_usage_bytes" [] "Number of bytes that are consumed by the container on this filesystem.";
    FS_READ_BYTES = Counter "container_fs_reads_bytes_total" ["device"] "Cumulative count of bytes read";
    FS_READS = Counter "container_fs_reads_total" ["device"] "Cumulative count of reads completed";
    FS_WRITTEN_BYTES = Counter "container_fs_writes_bytes_total" ["device"] "Cumulative count of bytes written";
    FS_WRITES = Counter "container_fs_writes_total" ["device"] "Cumulative count of writes completed";
    BLKIO = Counter "container_blkio_device_usage_total" ["device" "major" "minor" "operation"] "Blkio Device bytes usage";

    RX_BYTES = Counter "container_network_receive_bytes_total" ["interface"] "Cumulative count of bytes received";
    RX_PACKETS = Counter "container_network_receive_packets_total" ["interface"] "Cumulative count of packets received";
    RX_DROPPED = Counter "container_network_receive_packets_dropped_total" ["interface"] "Cumulative count of packets dropped while receiving";
    RX_ERRORS = Counter "container_network_receive_errors_total" ["interface"] "Cumulative count of errors encountered while receiving";
    TX_BYTES = Counter "container_network_transmit_bytes_total" ["interface"] "Cumulative count of bytes transmitted";
    TX_PACKETS = Counter "container_network_transmit_packets_total" ["interface"] "Cumulative count of packets transmitted";
    TX_DROPPED = Counter "container_network_transmit_packets_dropped_total" ["interface"] "Cumulative count of packets dropped while transmitting";
    TX_ERRORS = Counter "container_network_transmit_errors_total" ["interface"] "Cumulative count of errors encountered while transmitting";

    CPU_WAITING = Counter "container_pressure_cpu_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to CPU congestion.";
    CPU_STALLED = Counter "container_pressure_cpu_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to CPU congestion.";
    MEMORY_WAITING = Counter "container_pressure_memory_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to memory congestion.";
    MEMORY_STALLED = Counter "container_pressure_memory_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to memory congestion.";
    IO_WAITING = Counter "container_pressure_io_waiting_seconds_total" [] "Total time duration tasks in the container have waited due to IO congestion.";
    IO_STALLED = Counter "container_pressure_io_stalled_seconds_total" [] "Total time duration no tasks in the container could make progress due to IO congestion.";

    PROCESSES = Gauge "container_processes" [] "Number of processes running inside the container.";
    DESCRIPTORS = Gauge "container_file_descriptors" [] "Number of open file descriptors for the container.";
    SOCKETS = Gauge "container_sockets" [] "Number of open sockets for the container.";
    THREADS = Gauge "container_threads" [] "Number of threads running inside the container";
    THREADS_MAX = Gauge "container_threads_max" [] "Maximum number of threads allowed inside the container, infinity if value is zero";
    ULIMITS = Gauge "container_ulimits_soft" ["ulimit"] "Soft ulimit values for the container root process. Unlimited if 2^64-1";

    SPEC_CPU_PERIOD = Gauge "container_spec_cpu_period" [] "CPU period of the container.";
    SPEC_CPU_QUOTA = Gauge "container_spec_cpu_quota" [] "CPU quota of the container.";
    SPEC_CPU_SHARES = Gauge "container_spec_cpu_shares" [] "CPU share of the container.";
    SPEC_MEMORY = Gauge "container_spec_memory_limit_bytes" [] "Memory limit for the container.";
    SPEC_MEMORY_RESERVATION = Gauge "container_spec_memory_reservation_limit_bytes" [] "Memory reservation limit for the container.";
    SPEC_MEMORY_SWAP = Gauge "container_spec_memory_swap_limit_bytes" [] "Memory swap limit for the container.";
}

/// The limits that were asked for; 0 for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// Microseconds.
    pub cpu_period: u64,
    /// Microseconds per period.
    pub cpu_quota: u64,
    /// Relative weight.
    pub cpu_shares: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes that are kept for it (memory.min).
    pub memory_reservation: u64,
    /// Bytes of memory and swap together.
    pub memory_swap: u64,
}

/// Everything that is known of a container's use.
#[derive(Debug)]
pub struct ContainerView<'a> {
    /// When it was started, in nanoseconds since the epoch.
    pub started_at: i64,
    /// What it was asked to get.
    pub asked: Asked,
    /// What every stats call tells.
    pub usage: &'a Usage,
    /// The rest.
    pub detail: &'a Detail,
    /// Its processes.
    pub processes: Processes,
    /// Its writable layer.
    pub disk: Option<DiskUsage>,
    /// The file system of that.
    pub file_system: Option<FileSystem>,
    /// Names of block devices by number.
    pub devices: &'a BTreeMap<(u32, u32), String>,
}

const SECOND: u64 = 1_000_000_000;

/// The metrics of a container.
pub fn of_container(view: &ContainerView<'_>) -> Vec<Sample> {
    let mut samples = Samples(Vec::with_capacity(ALL.len()));
    let (usage, detail) = (view.usage, view.detail);
    let seconds = |nanos: i64| u64::try_from(nanos).unwrap_or(0) / SECOND;
    samples.add(LAST_SEEN, seconds(usage.at));
    samples.add(START_TIME, seconds(view.started_at));
    if let Some(cpu) = usage.cpu {
        samples.labelled(CPU_USAGE, &["total"], cpu / SECOND);
    }
    samples.add(CPU_USER, detail.cpu_user / SECOND);
    samples.add(CPU_SYSTEM, detail.cpu_system / SECOND);
    samples.add(CFS_PERIODS, detail.periods);
    samples.add(CFS_THROTTLED, detail.throttled_periods);
    samples.add(CFS_THROTTLED_SECONDS, detail.throttled / SECOND);
    memory(&mut samples, usage, detail);
    for pages in &detail.hugepages {
        samples.labelled(HUGETLB_USAGE, &[&pages.size], pages.usage);
        if let Some(peak) = pages.peak {
            samples.labelled(HUGETLB_PEAK, &[&pages.size], peak);
        }
    }
    if let Some(disk) = view.disk {
        samples.add(FS_USAGE, disk.bytes);
    }
    if let Some(fs) = view.file_system {
        samples.add(FS_LIMIT, fs.bytes);
        samples.add(FS_INODES, fs.inodes);
        samples.add(FS_INODES_FREE, fs.free_inodes);
    }
    block_io(&mut samples, view);
    for (pressure, waiting, stalled) in [
        (usage.cpu_pressure, CPU_WAITING, CPU_STALLED),
        (usage.memory_pressure, MEMORY_WAITING, MEMORY_STALLED),
        (usage.io_pressure, IO_WAITING, IO_STALLED),
    ] {
        if let Some(Pressure { some, full }) = pressure {
            let seconds = |stall: Stall| stall.total / 1_000_000;
            samples.add(waiting, seconds(some));
            samples.add(stalled, seconds(full));
        }
    }
    samples.add(PROCESSES, view.processes.count);
    samples.add(DESCRIPTORS, view.processes.descriptors);
    samples.add(SOCKETS, view.processes.sockets);
    samples.add(THREADS, detail.threads);
    samples.add(THREADS_MAX, detail.threads_max.unwrap_or(0));
    if let Some(limit) = view.processes.open_files_limit {
        samples.labelled(ULIMITS, &["max_open_files"], limit);
    }
    let asked = &view.asked;
    for (metric, value) in [
        (SPEC_CPU_PERIOD, asked.cpu_period),
        (SPEC_CPU_QUOTA, asked.cpu_quota),
        (SPEC_CPU_SHARES, asked.cpu_shares),
        (SPEC_MEMORY, asked.memory),
        (SPEC_MEMORY_RESERVATION, asked.memory_reservation),
        (SPEC_MEMORY_SWAP, asked.memory_swap),
    ] {
        samples.add(metric, value);
    }
    samples.0
}

fn memory(samples: &mut Samples, usage: &Usage, detail: &Detail) {
    let Some(memory) = usage.memory else { return };
    samples.add(MEMORY_CACHE, memory.cache);
    samples.add(MEMORY_RSS, memory.rss);
    samples.add(MEMORY_KERNEL, memory.kernel.unwrap_or(detail.kernel));
    samples.add(MEMORY_MAPPED, memory.mapped_file);
    samples.add(MEMORY_SWAP, usage.swap.map_or(0, |swap| swap.usage));
    samples.add(MEMORY_FAILCNT, detail.memory_failures);
    samples.add(MEMORY_USAGE, memory.usage);
    // Before Linux 5.19, cgroup v2 does not remember the peak.
    samples.add(MEMORY_PEAK, detail.memory_peak.unwrap_or(memory.usage));
    samples.add(MEMORY_WORKING_SET, memory.working_set());
    for scope in ["container", "hierarchy"] {
        samples.labelled(MEMORY_FAILURES, &["pgfault", scope], memory.page_faults);
        let major = memory.major_page_faults;
        samples.labelled(MEMORY_FAILURES, &["pgmajfault", scope], major);
    }
    samples.add(OOM_EVENTS, detail.oom_kills);
}

fn block_io(samples: &mut Samples, view: &ContainerView<'_>) {
    for io in &view.detail.io {
        let unknown = String::new();
        let name = view.devices.get(&(io.major, io.minor)).unwrap_or(&unknown);
        samples.labelled(FS_READ_BYTES, &[name], io.read_bytes);
        samples.labelled(FS_READS, &[name], io.reads);
        samples.labelled(FS_WRITTEN_BYTES, &[name], io.written_bytes);
        samples.labelled(FS_WRITES, &[name], io.writes);
        let (major, minor) = (io.major.to_string(), io.minor.to_string());
        for (operation, value) in [("Read", io.read_bytes), ("Write", io.written_bytes)] {
            samples.labelled(BLKIO, &[name, &major, &minor, operation], value);
        }
    }
}

/// The metrics of a pod's interfaces.
pub fn of_interfaces(interfaces: &[Interface]) -> Vec<Sample> {
    let mut samples = Samples(Vec::with_capacity(interfaces.len() * 8));
    for interface in interfaces {
        let (rx, tx) = (interface.rx, interface.tx);
        for (metric, value) in [
            (RX_BYTES, rx.bytes),
            (RX_PACKETS, rx.packets),
            (RX_DROPPED, rx.dropped),
            (RX_ERRORS, rx.errors),
            (TX_BYTES, tx.bytes),
            (TX_PACKETS, tx.packets),
            (TX_DROPPED, tx.dropped),
            (TX_ERRORS, tx.errors),
        ] {
            samples.labelled(metric, &[&interface.name], value);
        }
    }
    samples.0
}

struct Samples(Vec<Sample>);

impl Samples {
    fn add(&mut self, metric: &'static Descriptor, value: u64) {
        self.labelled(metric, &[], value);
    }

    fn labelled(&mut self, metric: &'static Descriptor, labels: &[&str], value: u64) {
        debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
        self.0.push(Sample {
            metric,
            labels: labels.iter().map(|l| (*l).to_owned()).collect(),
            value,
        });
    }
}

/// Names of block devices (`/dev/vda`) by number.
pub fn block_devices() -> BTreeMap<(u32, u32), String> {
    let entries = std::fs::read_dir("/sys/dev/block");
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().into_string().ok()?;
            let (major, minor) = number.split_once(':')?;
            let target = std::fs::read_link(entry.path()).ok()?;
            let name = target.file_name()?.to_string_lossy().into_owned();
            let number = (major.parse().ok()?, minor.parse().ok()?);
            Some((number, format!("/dev/{name}")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{DeviceIo, Hugepages, Memory, Swap};
    use crate::network::Counters;
    use std::collections::BTreeSet;

    /// What `critest` expects of a runtime (pkg/validate/pod.go of Kubernetes 1.37's cri-tools): the names that
    /// a kubelet with cAdvisor has.
    const EXPECTED: &str = "
        container_blkio_device_usage_total container_cpu_cfs_periods_total
        container_cpu_cfs_throttled_periods_total container_cpu_cfs_throttled_seconds_total
        container_cpu_system_seconds_total container_cpu_usage_seconds_total container_cpu_user_seconds_total
        container_file_descriptors container_fs_inodes_free container_fs_inodes_total container_fs_limit_bytes
        container_fs_reads_bytes_total container_fs_reads_total container_fs_usage_bytes
        container_fs_writes_bytes_total container_fs_writes_total container_hugetlb_max_usage_bytes
        container_hugetlb_usage_bytes container_last_seen container_memory_cache container_memory_failcnt
        container_memory_failures_total container_memory_kernel_usage container_memory_mapped_file
        container_memory_max_usage_bytes container_memory_rss container_memory_swap
        container_memory_usage_bytes container_memory_working_set_bytes container_network_receive_bytes_total
        container_network_receive_errors_total container_network_receive_packets_dropped_total
        container_network_receive_packets_total container_network_transmit_bytes_total
        container_network_transmit_errors_total container_network_transmit_packets_dropped_total
        container_network_transmit_packets_total container_oom_events_total
        container_pressure_cpu_stalled_seconds_total container_pressure_cpu_waiting_seconds_total
        container_pressure_io_stalled_seconds_total container_pressure_io_waiting_seconds_total
        container_pressure_memory_stalled_seconds_total container_pressure_memory_waiting_seconds_total
        container_processes container_sockets container_spec_cpu_period container_spec_cpu_quota
        container_spec_cpu_shares container_spec_memory_limit_bytes
        container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes
        container_start_time_seconds container_threads container_threads_max container_ulimits_soft";

    #[test]
    fn every_expected_metric_is_described_and_has_a_value() {
        let expected: BTreeSet<_> = EXPECTED.split_whitespace().collect();
        let described: BTreeSet<_> = ALL.iter().map(|d| d.name).collect();
        assert_eq!(described, expected);
        assert_eq!(ALL.len(), described.len(), "no name twice");
        let usage = Usage {
            at: 5_000_000_000,
            cpu: Some(3_500_000_000),
            memory: Some(Memory::default()),
            swap: Some(Swap::default()),
            cpu_pressure: Some(Pressure::default()),
            memory_pressure: Some(Pressure::default()),
            io_pressure: Some(Pressure::default()),
        };
        let detail = Detail {
            io: vec![DeviceIo {
                major: 8,
                ..DeviceIo::default()
            }],
            hugepages: vec![Hugepages {
                size: "2MB".into(),
                usage: 1,
                peak: Some(2),
            }],
            ..Detail::default()
        };
        let mut samples = of_container(&ContainerView {
            started_at: 2_000_000_001,
            asked: Asked::default(),
            usage: &usage,
            detail: &detail,
            processes: Processes {
                open_files_limit: Some(1024),
                ..Processes::default()
            },
            disk: Some(DiskUsage::default()),
            file_system: Some(FileSystem::default()),
            devices: &BTreeMap::from([((8, 0), "/dev/sda".to_owned())]),
        });
        let value = |name: &str| samples.iter().find(|s| s.metric.name == name).unwrap();
        assert_eq!(value("container_last_seen").value, 5);
        assert_eq!(value("container_start_time_seconds").value, 2);
        assert_eq!(value("container_cpu_usage_seconds_total").value, 3);
        assert_eq!(value("container_fs_reads_total").labels, ["/dev/sda"]);
        samples.extend(of_interfaces(&[Interface {
            name: "eth0".into(),
            rx: Counters::default(),
            tx: Counters::default(),
        }]));
        let told: BTreeSet<_> = samples.iter().map(|s| s.metric.name).collect();
        assert_eq!(told, expected);
        for sample in &samples {
            assert_eq!(sample.labels.len(), sample.metric.labels.len());
            assert!(!sample.metric.help.is_empty());
        }
    }
}
