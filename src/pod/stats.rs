//! What pods and containers use, sampled when somebody asks.
//!
//! The files of cgroups and the namespaces of pods are read in the call, off the runtime's threads. Remembered between
//! calls are the last CPU sample of each container and pod, for nanocores; the size of each writable layer that its file
//! system keeps no account of ([`slipway_observe::disk::Ledger`]); and the last sample of each container, so that several
//! who ask for all of them within [`SHARED`] cost as much as one.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use slipway_observe::cgroup::{self, Sampler, Usage};
use slipway_observe::disk::{self, Counted, Layer};
use slipway_observe::metrics::{self, Asked, ContainerView, Sample};
use slipway_observe::network::{self, Interface};
use slipway_observe::quota::Projects;
use slipway_observe::{Layout, Rate, process};

use super::container::Container;
use super::node::Node;
use super::sandbox::Pod;
use super::state::{PodStage, Stage};

/// Whoever asks for all containers may be told samples of so long ago, with the time at which they were taken. It is the
/// least interval of nanocores, too, and less than what `crictl stats` leaves between its two samples.
pub const SHARED: Duration = Duration::from_millis(500);
/// How long a call waits for writable layers that were never counted before.
const PATIENCE: Duration = Duration::from_millis(100);
/// Fewer cgroups than this are read faster by one thread.
const WORTH_A_THREAD: usize = 32;
/// So many cgroups are taken by a thread at once.
const PIECE: usize = 8;
/// The most threads of one call.
const THREADS: usize = 4;

/// What is remembered of a container or pod between two samples.
#[derive(Debug, Default)]
pub struct Meter {
    files: Sampler,
    rate: Rate,
    /// What was read last, and in which state of the container.
    last: Option<(Stage, Usage, Option<u64>)>,
}

impl Meter {
    /// A sample that is not older than `age`, and was taken in the same state.
    fn read_container(
        &mut self,
        container: &Container,
        age: Duration,
        read: impl FnOnce(&mut Self) -> (Usage, Option<u64>),
    ) -> (Usage, Option<u64>) {
        let stage = container.stage();
        if let Some((then, usage, nano_cores)) = self.last
            && then == stage
            && is_young(usage.at, slipway_observe::now(), age)
        {
            return (usage, nano_cores);
        }
        let (usage, nano_cores) = read(self);
        self.last = Some((stage, usage, nano_cores));
        (usage, nano_cores)
    }

    /// What was read last is not what would be read now.
    pub fn outdate(&mut self) {
        self.last = None;
    }

    /// A sample, and the nanocores used lately.
    fn read(&mut self, layout: &Layout, cgroup: &str) -> (Usage, Option<u64>) {
        self.read_as(layout, cgroup, |usage| usage)
    }

    /// Likewise, of what somebody else tells.
    fn take(&mut self, usage: Usage) -> (Usage, Option<u64>) {
        let nano_cores = usage.cpu.and_then(|cpu| self.rate.sample(usage.at, cpu));
        (usage, nano_cores)
    }

    /// Likewise, of what is made of a sample.
    fn read_as(
        &mut self,
        layout: &Layout,
        cgroup: &str,
        make: impl FnOnce(Usage) -> Usage,
    ) -> (Usage, Option<u64>) {
        let usage = make(self.files.usage(layout, Path::new(cgroup)));
        self.take(usage)
    }
}

/// What a container uses.
pub struct ContainerSample {
    /// The container.
    pub container: Arc<Container>,
    /// What its cgroup tells; `None` once it has exited.
    pub usage: Option<Usage>,
    /// CPU use lately; `None` until there are two samples.
    pub nano_cores: Option<u64>,
    /// Its writable layer; `None` until it was counted.
    pub layer: Option<Counted>,
}

/// What a pod uses.
pub struct PodSample<C> {
    /// The pod.
    pub pod: Arc<Pod>,
    /// What its cgroup tells; `None` once it is stopped.
    pub usage: Option<Usage>,
    /// CPU use lately; `None` until there are two samples.
    pub nano_cores: Option<u64>,
    /// Its interfaces, the one of its first network first; `None` in the host's network, and once it is
    /// stopped.
    pub interfaces: Option<Vec<Interface>>,
    /// Processes in it.
    pub processes: Option<u64>,
    /// Its containers, in the caller's form.
    pub containers: Vec<C>,
}

/// The metrics of a pod.
pub struct PodMetrics {
    /// The pod.
    pub pod: Arc<Pod>,
    /// When they were taken, in nanoseconds since the epoch.
    pub at: i64,
    /// Those of its network.
    pub samples: Vec<Sample>,
    /// Those of its running containers.
    pub containers: Vec<(Arc<Container>, Vec<Sample>)>,
}

impl Node {
    /// Samples these containers; a sample is at most `age` old. `tell` makes of each what is wanted, on the thread that
    /// took it. Call it within the daemon's runtime, as all that follow.
    pub fn sample_containers<R: Send>(
        &self,
        containers: Vec<Arc<Container>>,
        age: Duration,
        tell: impl Fn(ContainerSample) -> R + Sync,
    ) -> Vec<R> {
        here(|| self.containers_now(containers, age, tell))
    }

    /// Samples these pods now, and their containers, whose samples are at most `age` old and are turned by `tell` into
    /// what is wanted.
    pub fn sample_pods<C: Send>(
        &self,
        pods: Vec<Arc<Pod>>,
        age: Duration,
        tell: impl Fn(ContainerSample) -> C + Sync,
    ) -> Vec<PodSample<C>> {
        here(|| self.pods_now(pods, age, tell))
    }

    /// The metrics of these pods; those that are not ready have none.
    pub fn measure_pods(&self, pods: Vec<Arc<Pod>>) -> Vec<PodMetrics> {
        here(|| self.metrics_now(pods))
    }

    fn containers_now<R: Send>(
        &self,
        containers: Vec<Arc<Container>>,
        age: Duration,
        tell: impl Fn(ContainerSample) -> R + Sync,
    ) -> Vec<R> {
        let layers_dir = self.layers_dir();
        let layers: Vec<_> = containers
            .iter()
            .map(|c| {
                let (id, dir) = (c.id().to_owned(), layers_dir.join(c.id()));
                let ended = c.stage() == Stage::Exited;
                Layer { id, dir, ended }
            })
            .collect();
        let counts = self.ledger.usage(&layers, PATIENCE);
        let each = containers.into_iter().zip(counts).collect();
        side_by_side(each, |(container, layer)| {
            let share = match container.stage() {
                Stage::Exited => None,
                _ => self.share(&container),
            };
            let mut meter = container.meter.lock();
            let read = match (container.stage(), share) {
                (Stage::Exited, _) => {
                    meter.files.close();
                    None
                }
                (_, Some(share)) => {
                    Some(meter.read_as(&self.layout, &share.cgroup, |all| share.of(all)))
                }
                (_, None) => Some(meter.read_container(&container, age, |meter| {
                    match self.in_machine(&container) {
                        true => meter.take(self.told_by_shim(&container)),
                        false => meter.read(&self.layout, &container.record.cgroup),
                    }
                })),
            };
            drop(meter);
            let (usage, nano_cores) = read.map_or((None, None), |(u, n)| (Some(u), n));
            tell(ContainerSample {
                usage,
                nano_cores,
                layer,
                container,
            })
        })
    }

    fn pods_now<C: Send>(
        &self,
        pods: Vec<Arc<Pod>>,
        age: Duration,
        tell: impl Fn(ContainerSample) -> C + Sync,
    ) -> Vec<PodSample<C>> {
        // While the containers are looked at.
        let reading = Interfaces::read(&pods);
        let members: Vec<_> = pods.iter().map(|pod| self.containers_of_pod(pod)).collect();
        let all = members.iter().flatten().cloned().collect();
        let mut containers = self.containers_now(all, age, tell).into_iter();
        let interfaces = reading.wait();
        let each: Vec<_> = pods
            .into_iter()
            .zip(interfaces)
            .zip(members)
            .map(|((pod, interfaces), members)| {
                let own: Vec<_> = containers.by_ref().take(members.len()).collect();
                (pod, interfaces, own)
            })
            .collect();
        side_by_side(each, |(pod, interfaces, containers)| {
            let mut meter = pod.meter.lock();
            let (read, processes) = match pod.stage() {
                PodStage::Stopped => {
                    meter.files.close();
                    (None, None)
                }
                _ => {
                    let cgroup = &pod.record.cgroup;
                    let read = meter.read(&self.layout, cgroup);
                    let processes = meter.files.threads(&self.layout, Path::new(cgroup));
                    (Some(read), processes)
                }
            };
            drop(meter);
            let (usage, nano_cores) = read.map_or((None, None), |(u, n)| (Some(u), n));
            PodSample {
                usage,
                nano_cores,
                interfaces,
                processes,
                containers,
                pod,
            }
        })
    }

    fn metrics_now(&self, mut pods: Vec<Arc<Pod>>) -> Vec<PodMetrics> {
        pods.retain(|pod| pod.stage() == PodStage::Ready);
        let interfaces = Interfaces::read(&pods);
        let members: Vec<_> = pods
            .iter()
            .map(|pod| {
                let mut members = self.containers_of_pod(pod);
                members.retain(|c| c.stage() == Stage::Running);
                members
            })
            .collect();
        let file_system = disk::file_system(&self.layers_dir()).ok();
        let devices = metrics::block_devices();
        let all = members.iter().flatten().cloned().collect();
        let mut measured = self
            .containers_now(all, Duration::ZERO, |sample| {
                let container = sample.container;
                let cgroup = Path::new(&container.record.cgroup);
                // It may have ended since it was picked.
                let samples = sample.usage.map(|usage| {
                    let status = container.status();
                    metrics::of_container(&ContainerView {
                        started_at: status.started_at,
                        asked: asked(&container),
                        usage: &usage,
                        detail: &cgroup::detail(&self.layout, cgroup),
                        processes: process::look(&self.layout, cgroup, status.pid),
                        disk: sample.layer.map(|layer| layer.usage),
                        file_system,
                        devices: &devices,
                    })
                });
                (container, samples.unwrap_or_default())
            })
            .into_iter();
        let interfaces = interfaces.wait();
        pods.into_iter()
            .zip(interfaces)
            .zip(members)
            .map(|((pod, interfaces), members)| PodMetrics {
                pod,
                at: slipway_observe::now(),
                samples: metrics::of_interfaces(&interfaces.unwrap_or_default()),
                containers: measured.by_ref().take(members.len()).collect(),
            })
            .collect()
    }
}

/// The interfaces of pods, which are being read.
struct Interfaces {
    /// Which of the pods have some.
    connected: Vec<bool>,
    reading: network::Reading,
}

impl Interfaces {
    fn read(pods: &[Arc<Pod>]) -> Self {
        let connected: Vec<bool> = pods
            .iter()
            .map(|pod| pod.has_network() && pod.stage() != PodStage::Stopped)
            .collect();
        let those = pods.iter().zip(&connected).filter(|(_, yes)| **yes);
        let paths = those.map(|(pod, _)| pod.record.namespaces.network.clone().into());
        Self {
            reading: network::start(paths.collect()),
            connected,
        }
    }

    /// Those of each pod, its primary one first; `None` for one without.
    fn wait(self) -> Vec<Option<Vec<Interface>>> {
        let mut found = self.reading.wait().into_iter();
        let each = self.connected.into_iter();
        each.map(|yes| if yes { found.next().flatten() } else { None })
            .collect()
    }
}

/// The limits that a container was asked to get, with the kernel's defaults where nothing was said.
fn asked(container: &Container) -> Asked {
    let asked = container.resources();
    let or = |value: i64, default: u64| match u64::try_from(value) {
        Ok(0) => default,
        Ok(value) => value,
        // Negative: no limit.
        Err(_) => 0,
    };
    let memory = or(asked.memory_limit_in_bytes, 0);
    let reservation = asked.unified.get("memory.min");
    Asked {
        cpu_period: or(asked.cpu_period, 100_000),
        cpu_quota: or(asked.cpu_quota, 0),
        cpu_shares: or(asked.cpu_shares, 1024),
        memory,
        memory_reservation: reservation.and_then(|v| v.parse().ok()).unwrap_or(0),
        memory_swap: or(asked.memory_swap_limit_in_bytes, memory),
    }
}

/// Whether a sample (nanoseconds since the epoch) is at most `age` old. None is when the clock was set back since.
fn is_young(at: i64, now: i64, age: Duration) -> bool {
    let passed = now.checked_sub(at).and_then(|n| u64::try_from(n).ok());
    passed.is_some_and(|nanos| u128::from(nanos) < age.as_nanos())
}

/// Does `work` for each, on several threads when that is worth it; the answers are in the same order. They take
/// small pieces by turns, because nobody says that all processors are ours. (Threads that are started earlier, to wait for the
/// list, have to be woken up once more, which takes longer than to start them.)
fn side_by_side<T: Send, R: Send>(list: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    // To look takes files of this process's own cgroup.
    static CPUS: OnceLock<usize> = OnceLock::new();
    let cpus = *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    let threads = (list.len() / WORTH_A_THREAD).clamp(1, cpus.min(THREADS));
    if threads == 1 {
        return list.into_iter().map(work).collect();
    }
    let mut answers: Vec<Option<R>> = std::iter::repeat_with(|| None).take(list.len()).collect();
    let waiting = Mutex::new((list.into_iter(), answers.chunks_mut(PIECE)));
    let run = || {
        let mut items = Vec::with_capacity(PIECE);
        loop {
            let places = {
                let mut waiting = waiting.lock();
                let (list, pieces) = &mut *waiting;
                let Some(places) = pieces.next() else { return };
                items.extend(list.take(places.len()));
                places
            };
            for (place, item) in places.iter_mut().zip(items.drain(..)) {
                *place = Some(work(item));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // One that can't be had is one fewer.
            let _ = std::thread::Builder::new().spawn_scoped(scope, run);
        }
        // This thread is one of them.
        run();
    });
    answers.into_iter().flatten().collect()
}

/// Does what waits for the kernel, on this thread: its other tasks go to another one meanwhile. To wake one up for this, and this
/// one again afterwards, takes longer than the files of a hundred containers where processors fall asleep.
fn here<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

impl Node {
    /// Decides, once, how writable layers are measured.
    pub(super) fn keep_accounts(&self) {
        match Projects::on(&self.layers_dir()) {
            Ok(projects) => {
                tracing::info!("the file system accounts for writable layers: each gets a project");
                self.ledger.keep_accounts(projects);
            }
            Err(error) => tracing::info!(
                reason = error.to_string(),
                "writable layers are walked to measure them"
            ),
        }
    }
}

/// Where the controllers are; nothing when that can't be read, and statistics are empty then.
pub(super) fn layout() -> Layout {
    Layout::detect().unwrap_or_else(|error| {
        tracing::error!(%error, "can't read where cgroups are mounted; statistics will be empty");
        Layout::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_young_for_a_while() {
        let second = 1_000_000_000;
        let young = |at, now| is_young(at, now, SHARED);
        assert!(young(second, second) && young(second, second + 499_999_999));
        assert!(!young(second, second + 500_000_000));
        assert!(!young(second, second - 1), "the clock was set back");
        assert!(!young(i64::MIN, i64::MAX));
        assert!(!is_young(second, second, Duration::ZERO));
    }

    #[test]
    fn work_side_by_side_keeps_its_order() {
        for length in [0, 1, 31, 64, 65, 1000] {
            let list: Vec<usize> = (0..length).collect();
            let doubled = side_by_side(list.clone(), |n| n * 2);
            assert_eq!(doubled, list.iter().map(|n| n * 2).collect::<Vec<_>>());
        }
    }
}
