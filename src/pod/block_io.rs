//! Classes of block I/O: names for limits of block devices, which the node's operator writes into a file.
//!
//! The file is the one that CRI-O and containerd read (`goresctrl`'s), and a container's class comes from the same
//! places: an NRI plugin, the container's annotation [`CONTAINER`], the pod's for that container ([`POD_CONTAINER`]), the
//! pod's for all ([`POD`]). It is read when a container has a class, so changes hold for the next one.
//!
//! ```yaml
//! Classes:
//!   slow:
//!   - Devices: ["/dev/sd[a-z]"]     # names or patterns (glob(7)) of block devices
//!     ThrottleReadBps: 60M          # bytes per second, as Kubernetes writes quantities
//!     ThrottleWriteIOPS: 1k         # operations per second
//!   - Weight: 40                    # 10 to 1000; without Devices: of all
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxBlockIo, LinuxThrottleDevice, LinuxThrottleDeviceBuilder, LinuxWeightDevice,
    LinuxWeightDeviceBuilder,
};
use serde::Deserialize;
use slipway_proto::cri;
use slipway_spec::ContainerPlan;

/// The container's annotation with its class.
pub const CONTAINER: &str = "io.kubernetes.cri.blockio-class";
/// The pod's annotation with the class of the container whose name follows.
pub const POD_CONTAINER: &str = "blockio.resources.beta.kubernetes.io/container.";
/// The pod's annotation with the class of all its containers.
pub const POD: &str = "blockio.resources.beta.kubernetes.io/pod";

const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;

/// Why a container can't be in its class.
#[derive(Debug, thiserror::Error)]
pub enum BlockIoError {
    /// The specification can't be written.
    #[error("the OCI specification can't be written")]
    Spec(#[source] serde_json::Error),
    /// There are no classes.
    #[error(
        "{place} asks for the block I/O class {class:?}, and this node has no classes: name a file with them in \
         pod.blockio_config_file"
    )]
    NoClasses {
        /// Who names the class.
        place: String,
        /// The class.
        class: String,
    },
    /// There is no such class.
    #[error("{place} asks for the block I/O class {class:?}, which is not in {}; it has {known}", file.display())]
    UnknownClass {
        /// Who names the class.
        place: String,
        /// The class.
        class: String,
        /// The file.
        file: PathBuf,
        /// Those that are.
        known: String,
    },
    /// The file can't be read.
    #[error("can't read the block I/O classes in {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is none.
    #[error("{} is no file of block I/O classes", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// The cause, with the line.
        #[source]
        source: serde_yaml_ng::Error,
    },
    /// A class that makes no sense.
    #[error("block I/O class {class:?} in {}: {problem}", file.display())]
    Class {
        /// The class.
        class: String,
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Classes {
    #[serde(rename = "Classes", default)]
    classes: BTreeMap<String, Option<Vec<Parameters>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
struct Parameters {
    devices: Vec<String>,
    throttle_read_bps: Option<Quantity>,
    throttle_write_bps: Option<Quantity>,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: Option<Quantity>,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: Option<Quantity>,
    weight: Option<Quantity>,
}

/// A number as YAML has it, or with a suffix.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Quantity {
    Number(u64),
    Text(String),
}

impl Quantity {
    /// In units; `None` when it is no quantity, or no whole number.
    fn value(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => quantity(text.trim()),
        }
    }
}

/// A quantity of Kubernetes: digits, perhaps with a fraction, and a suffix.
fn quantity(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let power = |base: u128, names: &str| {
        let at = names.find(suffix.chars().next()?)?;
        base.checked_pow(u32::try_from(at).ok()? + 1)
    };
    let unit = match suffix {
        "" => 1,
        "k" => 1000,
        "M" | "G" | "T" | "P" | "E" => power(1000, "kMGTPE")?,
        "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei" => power(1024, "KMGTPE")?,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let number: u128 = format!("{whole}{fraction}").parse().ok()?;
    let below = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let product = number.checked_mul(unit)?;
    (product % below == 0).then(|| u64::try_from(product / below).ok())?
}

/// Puts a container into the class that annotations name, if they do.
///
/// # Errors
/// [`BlockIoError`].
pub fn inject(
    file: Option<&Path>,
    pod: &cri::PodSandboxConfig,
    container: &cri::ContainerConfig,
    plan: &mut ContainerPlan,
) -> Result<(), BlockIoError> {
    let name = container.metadata.as_ref().map_or("", |m| &m.name);
    let of_container = format!("{POD_CONTAINER}{name}");
    let places = [
        (&container.annotations, CONTAINER),
        (&pod.annotations, of_container.as_str()),
        (&pod.annotations, POD),
    ];
    let found = places
        .into_iter()
        .find_map(|(annotations, key)| Some((key, annotations.get(key)?)));
    match found {
        Some((key, class)) => inject_class(file, &format!("the annotation {key}"), class, plan),
        None => Ok(()),
    }
}

/// Puts a container into a class; the empty name stands for none. `place`: who names it, for messages.
///
/// # Errors
/// [`BlockIoError`].
pub fn inject_class(
    file: Option<&Path>,
    place: &str,
    class: &str,
    plan: &mut ContainerPlan,
) -> Result<(), BlockIoError> {
    let limits = match class {
        "" => None,
        class => Some(resolve(file, place, class)?),
    };
    let Some(linux) = plan.spec.linux_mut() else {
        return Ok(());
    };
    let mut resources = linux.resources().clone().unwrap_or_default();
    if resources.block_io() == &limits {
        return Ok(());
    }
    resources.set_block_io(limits);
    linux.set_resources(Some(resources));
    plan.create.spec = serde_json::to_vec(&plan.spec).map_err(BlockIoError::Spec)?;
    Ok(())
}

fn resolve(file: Option<&Path>, place: &str, class: &str) -> Result<LinuxBlockIo, BlockIoError> {
    let (place, class) = (place.to_owned(), class.to_owned());
    let Some(file) = file else {
        return Err(BlockIoError::NoClasses { place, class });
    };
    let own = || file.to_owned();
    let text = fs::read_to_string(file).map_err(|source| BlockIoError::Read {
        file: own(),
        source,
    })?;
    let mut all: Classes =
        serde_yaml_ng::from_str(&text).map_err(|source| BlockIoError::Parse {
            file: own(),
            source,
        })?;
    match all.classes.remove(&class) {
        Some(parameters) => {
            let parameters = parameters.unwrap_or_default();
            limits(&parameters).map_err(|problem| BlockIoError::Class {
                class,
                file: own(),
                problem,
            })
        }
        None => Err(BlockIoError::UnknownClass {
            place,
            class,
            file: own(),
            known: match all.classes.len() {
                0 => "none".to_owned(),
                _ => all.classes.into_keys().collect::<Vec<_>>().join(", "),
            },
        }),
    }
}

fn limits(all: &[Parameters]) -> Result<LinuxBlockIo, String> {
    let mut io = LinuxBlockIo::default();
    let mut weights: Vec<LinuxWeightDevice> = Vec::new();
    let mut rates: [Vec<LinuxThrottleDevice>; 4] = Default::default();
    for entry in all {
        let number = |name: &str, quantity: &Option<Quantity>| match quantity {
            None => Ok(None),
            Some(quantity) => match quantity.value() {
                Some(value) => Ok(Some(value)),
                None => Err(format!(
                    "{name}: {quantity:?} is no whole number such as 60M"
                )),
            },
        };
        let weight = match number("Weight", &entry.weight)? {
            None => None,
            Some(weight) => match u16::try_from(weight) {
                Ok(fits) if WEIGHTS.contains(&weight) => Some(fits),
                _ => return Err(format!("Weight: {weight} is not between 10 and 1000")),
            },
        };
        let wanted = [
            ("ThrottleReadBps", &entry.throttle_read_bps),
            ("ThrottleWriteBps", &entry.throttle_write_bps),
            ("ThrottleReadIOPS", &entry.throttle_read_iops),
            ("ThrottleWriteIOPS", &entry.throttle_write_iops),
        ];
        if entry.devices.is_empty() {
            if let Some((name, _)) = wanted.iter().find(|(_, quantity)| quantity.is_some()) {
                return Err(format!(
                    "{name} without Devices: a rate is of single devices"
                ));
            }
            if weight.is_some() {
                io.set_weight(weight);
            }
            continue;
        }
        let devices = devices(&entry.devices)?;
        // Of two entries about one device the later one counts.
        if let Some(weight) = weight {
            weights.retain(|old| !devices.contains(&(old.major(), old.minor())));
            for (major, minor) in &devices {
                let built = LinuxWeightDeviceBuilder::default()
                    .major(*major)
                    .minor(*minor)
                    .weight(weight);
                weights.push(built.build().map_err(|e| e.to_string())?);
            }
        }
        for ((name, quantity), list) in wanted.into_iter().zip(&mut rates) {
            let Some(rate) = number(name, quantity)? else {
                continue;
            };
            list.retain(|old| !devices.contains(&(old.major(), old.minor())));
            for (major, minor) in &devices {
                let built = LinuxThrottleDeviceBuilder::default()
                    .major(*major)
                    .minor(*minor)
                    .rate(rate);
                list.push(built.build().map_err(|e| e.to_string())?);
            }
        }
    }
    let some = |list: Vec<LinuxThrottleDevice>| (!list.is_empty()).then_some(list);
    let [read_bps, write_bps, read_iops, write_iops] = rates;
    io.set_weight_device((!weights.is_empty()).then_some(weights))
        .set_throttle_read_bps_device(some(read_bps))
        .set_throttle_write_bps_device(some(write_bps))
        .set_throttle_read_iops_device(some(read_iops))
        .set_throttle_write_iops_device(some(write_iops));
    Ok(io)
}

/// The numbers of the block devices that these patterns name. Something else that a pattern matches is passed over, if there
/// is a device as well: `/dev/sd*` has partitions, whose limits would be those of another device.
fn devices(patterns: &[String]) -> Result<Vec<(i64, i64)>, String> {
    let mut found = Vec::new();
    for pattern in patterns {
        let before = found.len();
        let matches =
            glob::glob(pattern).map_err(|e| format!("Devices: {pattern:?} is no pattern: {e}"))?;
        for path in matches.flatten() {
            let is_block = |meta: &fs::Metadata| meta.file_type().is_block_device();
            let Some(meta) = fs::metadata(&path).ok().filter(is_block) else {
                continue;
            };
            let number = rustix::fs::major(meta.rdev());
            let number = (i64::from(number), i64::from(rustix::fs::minor(meta.rdev())));
            let partition = format!("/sys/dev/block/{}:{}/partition", number.0, number.1);
            if !found.contains(&number) && !Path::new(&partition).exists() {
                found.push(number);
            }
        }
        if found.len() == before && !pattern.contains(['*', '?', '[']) {
            return Err(format!(
                "Devices: {pattern} is no whole block device of this host"
            ));
        }
    }
    match found.is_empty() {
        true => Err(format!(
            "Devices: no block device has a name like {}",
            patterns.join(", ")
        )),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_as_kubernetes_writes_them() {
        for (text, value) in [
            ("0", Some(0)),
            ("60M", Some(60_000_000)),
            ("1k", Some(1000)),
            ("2Ki", Some(2048)),
            ("1.5Gi", Some(1_610_612_736)),
            ("16E", Some(16_000_000_000_000_000_000)),
            ("1000E", None),
            ("0.5", None),
            ("", None),
            (".", None),
            ("1.2.3", None),
            ("-1", None),
            ("5m", None),
            ("1KB", None),
        ] {
            assert_eq!(quantity(text), value, "{text:?}");
        }
    }

    fn class_of(text: &str, class: &str) -> Result<LinuxBlockIo, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("classes.yaml");
        fs::write(&file, text).unwrap();
        resolve(Some(&file), "the annotation x", class).map_err(|e| {
            let cause = std::error::Error::source(&e).map(ToString::to_string);
            format!("{e}: {}", cause.unwrap_or_default())
        })
    }

    #[test]
    fn weights_and_empty_classes() {
        let text = "Classes:\n  low:\n  - Weight: 40\n  high:\n  - Weight: \"400\"\n  none:\n  empty: []\n";
        assert_eq!(class_of(text, "low").unwrap().weight(), Some(40));
        assert_eq!(class_of(text, "high").unwrap().weight(), Some(400));
        for class in ["none", "empty"] {
            assert_eq!(class_of(text, class).unwrap(), LinuxBlockIo::default());
        }
        let error = class_of(text, "huge").unwrap_err();
        assert!(
            error.contains("the annotation x") && error.contains("empty, high, low, none"),
            "{error}"
        );
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (entry, word) in [
            ("Weight: 5", "between 10 and 1000"),
            ("Weight: many", "Weight"),
            ("ThrottleReadBps: 1M", "without Devices"),
            ("{Devices: [/dev/null], ThrottleReadBps: 1M}", "/dev/null"),
            (
                "{Devices: [\"/dev/nothing-*\"], ThrottleReadBps: 1M}",
                "/dev/nothing-*",
            ),
            ("{Devices: [\"/dev/[\"], Weight: 10}", "pattern"),
            ("{Device: [/dev/sda], Weight: 10}", "Device"),
        ] {
            let error = class_of(&format!("Classes:\n  c:\n  - {entry}\n"), "c").unwrap_err();
            assert!(error.contains(word), "{entry}: {error}");
            assert!(error.contains("classes.yaml"), "{entry}: {error}");
        }
        let error = class_of("[", "c").unwrap_err();
        assert!(error.contains("no file of block I/O classes"), "{error}");
        let error = resolve(None, "the annotation x", "c")
            .unwrap_err()
            .to_string();
        assert!(error.contains("pod.blockio_config_file"), "{error}");
    }

    #[test]
    fn rates_of_whole_devices() {
        let disk = fs::read_dir("/sys/block")
            .ok()
            .into_iter()
            .flatten()
            .flatten();
        let mut disks = disk.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let path = PathBuf::from(format!("/dev/{name}"));
            fs::metadata(&path)
                .ok()?
                .file_type()
                .is_block_device()
                .then_some(path)
        });
        let Some(disk) = disks.next() else {
            println!("SKIPPED: no block device here");
            return;
        };
        let text = format!(
            "Classes:\n  c:\n  - {{Devices: [{0}, \"{0}*\"], ThrottleReadBps: 1M, Weight: 50}}\n  \
             - {{Devices: [{0}], ThrottleReadBps: 2M, ThrottleWriteIOPS: 7}}\n",
            disk.display()
        );
        let io = class_of(&text, "c").unwrap();
        let number = fs::metadata(&disk).unwrap().rdev();
        let ours = |device: &&LinuxThrottleDevice| {
            device.major() == i64::from(rustix::fs::major(number))
                && device.minor() == i64::from(rustix::fs::minor(number))
        };
        let rates = |list: &Option<Vec<LinuxThrottleDevice>>| -> Vec<u64> {
            list.iter()
                .flatten()
                .filter(ours)
                .map(|d| d.rate())
                .collect()
        };
        assert_eq!(rates(io.throttle_read_bps_device()), [2_000_000]);
        assert_eq!(rates(io.throttle_write_iops_device()), [7]);
        assert!(
            io.weight_device()
                .iter()
                .flatten()
                .any(|d| d.weight() == Some(50))
        );
        assert_eq!(io.weight(), None);
    }
}
