//! Limits of block devices as files of a cgroup: v1's `blkio`, v2's `io`.
//!
//! Weights count among the cgroups that wait for a device, and only with a scheduler that knows them (bfq, or iocost on
//! v2); rates are the kernel's own, whatever the scheduler.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

/// Where weights go: bfq's own file, in which they are as the specification has them, or the other.
pub const WEIGHT_V1: [&str; 2] = ["blkio.bfq.weight", "blkio.weight"];
/// Likewise on v2.
pub const WEIGHT_V2: [&str; 2] = ["io.bfq.weight", "io.weight"];

/// A weight (10 to 1000) in the numbers of a file.
pub fn weight(file: &str, weight: u16) -> u64 {
    match file {
        // 1 to 10000.
        "io.weight" => 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990,
        // bfq's 1 to 1000 needs nothing, nor does v1's own.
        _ => u64::from(weight),
    }
}

/// What says these limits in a cgroup's directory, in the order in which it is to be written.
pub fn files(dir: &Path, v2: bool, io: &LinuxBlockIo) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    let [bfq, plain] = if v2 { WEIGHT_V2 } else { WEIGHT_V1 };
    let file = if dir.join(bfq).exists() { bfq } else { plain };
    if let Some(own) = io.weight().filter(|weight| *weight > 0) {
        put(file, weight(file, own).to_string());
    }
    if let Some(leaf) = io.leaf_weight().filter(|weight| *weight > 0 && !v2) {
        put("blkio.leaf_weight", leaf.to_string());
    }
    for device in io.weight_device().iter().flatten() {
        let (major, minor) = (device.major(), device.minor());
        if let Some(own) = device.weight() {
            let own = weight(file, own);
            let file = if v2 {
                file.to_owned()
            } else {
                format!("{file}_device")
            };
            put(&file, format!("{major}:{minor} {own}"));
        }
        if let Some(leaf) = device.leaf_weight().filter(|_| !v2) {
            put(
                "blkio.leaf_weight_device",
                format!("{major}:{minor} {leaf}"),
            );
        }
    }
    for (list, key, v1) in [
        (io.throttle_read_bps_device(), "rbps", "read_bps"),
        (io.throttle_write_bps_device(), "wbps", "write_bps"),
        (io.throttle_read_iops_device(), "riops", "read_iops"),
        (io.throttle_write_iops_device(), "wiops", "write_iops"),
    ] {
        for device in list.iter().flatten() {
            let (at, rate) = (number(device), device.rate());
            match v2 {
                // 0 is no limit in the specification, and refused there.
                true if rate == 0 => put("io.max", format!("{at} {key}=max")),
                true => put("io.max", format!("{at} {key}={rate}")),
                false => put(
                    &format!("blkio.throttle.{v1}_device"),
                    format!("{at} {rate}"),
                ),
            }
        }
    }
    files
}

fn number(device: &LinuxThrottleDevice) -> String {
    format!("{}:{}", device.major(), device.minor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> LinuxBlockIo {
        serde_json::from_value(serde_json::json!({
            "weight": 100,
            "weightDevice": [{"major": 8, "minor": 16, "weight": 1000}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1048576}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
        }))
        .unwrap()
    }

    fn written(dir: &Path, v2: bool) -> Vec<String> {
        let files = files(dir, v2, &all());
        files
            .into_iter()
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    }

    #[test]
    fn files_of_both_versions_with_and_without_bfq() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = |weight: &str| {
            [
                format!("{weight}=100"),
                format!("{weight}_device=8:16 1000"),
                "blkio.throttle.read_bps_device=8:0 1048576".to_owned(),
                "blkio.throttle.write_iops_device=8:0 0".to_owned(),
            ]
        };
        assert_eq!(written(dir.path(), false), v1("blkio.weight"));
        let v2 = |file: &str, own: u16, device: u16| {
            [
                format!("{file}={own}"),
                format!("{file}=8:16 {device}"),
                "io.max=8:0 rbps=1048576".to_owned(),
                "io.max=8:0 wiops=max".to_owned(),
            ]
        };
        assert_eq!(written(dir.path(), true), v2("io.weight", 910, 10_000));
        for file in [WEIGHT_V1[0], WEIGHT_V2[0]] {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        assert_eq!(written(dir.path(), false), v1("blkio.bfq.weight"));
        assert_eq!(written(dir.path(), true), v2("io.bfq.weight", 100, 1000));
    }
}
