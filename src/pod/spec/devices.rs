//! Devices, and which of them the device cgroup lets through.

use crate::HostDevice;
use crate::error::{Result, SpecError, quoted};
use crate::paths;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType as Kind, Mount};
use slipway_proto::cri;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A container's devices.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices {
    /// Nodes made in `/dev`.
    pub nodes: Vec<LinuxDevice>,
    /// Device files that lie elsewhere, which are bound.
    pub mounts: Vec<Mount>,
    /// Rules of the device cgroup, in order.
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// What every container may use beside making nodes: (major, minor).
const STANDARD: [(i64, Option<i64>); 9] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(1)), // console
    (5, Some(2)), // ptmx
    (136, None),  // pts
];

/// A container's devices: those it asks for, each with its own permissions; when privileged, all of the
/// host's, and no rules.
pub(crate) fn of_container(
    requests: &[cri::Device],
    found: &[Vec<HostDevice>],
    host: Option<&[HostDevice]>,
    mounts: &[PathBuf],
) -> Result<Devices> {
    let mut devices = Devices {
        rules: standard(host.is_some()),
        ..Devices::default()
    };
    // Where the container has a mount of its own, that has the nodes: none is made in somebody else's files.
    let covered = |place: &Path| {
        place.starts_with("/dev") && mounts.iter().any(|mount| place.starts_with(mount))
    };
    let mut taken = BTreeSet::new();
    for (i, request) in requests.iter().enumerate() {
        let field = format!("devices[{i}]");
        let permissions = permissions(&field, &request.permissions)?;
        let place = match request.container_path.as_str() {
            "" => &request.host_path,
            path => path,
        };
        paths::absolute(&format!("{field}.container_path"), place)?;
        let Some(sources) = found.get(i) else {
            return Err(SpecError::invalid(field, "was not looked up on the host"));
        };
        for source in sources {
            // Joined to nothing a path would end in a slash.
            let place: PathBuf = paths::clean(place)
                .components()
                .chain(source.below.components())
                .collect();
            if !taken.insert(place.clone()) {
                let what = format!("{} is named twice", quoted(&place.to_string_lossy()));
                return Err(SpecError::invalid(format!("{field}.container_path"), what));
            }
            if !covered(&place) {
                devices.place(place, source);
            }
            if host.is_none() {
                let numbers = (i64::from(source.major), Some(i64::from(source.minor)));
                devices
                    .rules
                    .push(rule(Some(source.kind), numbers, &permissions));
            }
        }
    }
    for source in host.into_iter().flatten() {
        if taken.insert(source.path.clone()) && !covered(&source.path) {
            devices.place(source.path.clone(), source);
        }
    }
    Ok(devices)
}

impl Devices {
    fn place(&mut self, place: PathBuf, source: &HostDevice) {
        if place.starts_with("/dev") && place != Path::new("/dev") {
            let mut node = LinuxDevice::default();
            node.set_path(place)
                .set_typ(source.kind)
                .set_major(source.major.into())
                .set_minor(source.minor.into())
                .set_file_mode(Some(source.mode))
                .set_uid(Some(source.uid))
                .set_gid(Some(source.gid));
            self.nodes.push(node);
        } else {
            // libcontainer makes nodes below /dev only.
            let options = ["bind", "rprivate", "nosuid", "noexec"]
                .map(str::to_owned)
                .to_vec();
            let mut mount = Mount::default();
            mount
                .set_destination(place)
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(source.path.clone()))
                .set_options(Some(options));
            self.mounts.push(mount);
        }
    }
}

fn permissions(field: &str, text: &str) -> Result<String> {
    let mut seen = BTreeSet::new();
    if text.chars().all(|c| "rwm".contains(c) && seen.insert(c)) {
        // Nothing said: everything, as with the peers.
        return Ok(if text.is_empty() { "rwm" } else { text }.to_owned());
    }
    let what = format!("{} must be made of r, w and m, each once", quoted(text));
    Err(SpecError::invalid(format!("{field}.permissions"), what))
}

fn standard(everything: bool) -> Vec<LinuxDeviceCgroup> {
    if everything {
        return vec![rule(Some(Kind::A), (-1, None), "rwm")];
    }
    let mut deny = rule(Some(Kind::A), (-1, None), "rwm");
    deny.set_allow(false);
    let mut rules = vec![
        deny,
        rule(Some(Kind::C), (-1, None), "m"),
        rule(Some(Kind::B), (-1, None), "m"),
    ];
    rules.extend(STANDARD.map(|numbers| rule(Some(Kind::C), numbers, "rwm")));
    rules
}

fn rule(kind: Option<Kind>, numbers: (i64, Option<i64>), access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(kind)
        .set_major((numbers.0 >= 0).then_some(numbers.0))
        .set_minor(numbers.1)
        .set_access(Some(access.to_owned()));
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, below: &str, major: u32) -> HostDevice {
        HostDevice {
            path: path.into(),
            below: below.into(),
            kind: Kind::C,
            major,
            minor: 1,
            mode: 0o660,
            uid: 0,
            gid: 6,
        }
    }

    fn request(container_path: &str, permissions: &str) -> cri::Device {
        cri::Device {
            container_path: container_path.into(),
            host_path: "/dev/fuse".into(),
            permissions: permissions.into(),
        }
    }

    fn rules(devices: &Devices) -> Vec<String> {
        let text = |r: &LinuxDeviceCgroup| format!("{}{r}", if r.allow() { "+" } else { "-" });
        devices.rules.iter().map(text).collect()
    }

    #[test]
    fn the_standard_rules() {
        let found = of_container(&[], &[], None, &[]).expect("good");
        let expected = [
            "-a *:* rwm",
            "+c *:* m",
            "+b *:* m",
            "+c 1:3 rwm",
            "+c 1:5 rwm",
            "+c 1:7 rwm",
            "+c 1:8 rwm",
            "+c 1:9 rwm",
            "+c 5:0 rwm",
            "+c 5:1 rwm",
            "+c 5:2 rwm",
            "+c 136:* rwm",
        ];
        assert_eq!(rules(&found), expected);
        assert!(found.nodes.is_empty() && found.mounts.is_empty());
    }

    #[test]
    fn a_device_gets_a_node_and_a_rule() {
        let source = vec![vec![device("/dev/fuse", "", 10)]];
        let found = of_container(&[request("/dev/x/y", "rw")], &source, None, &[]).expect("good");
        let node = &found.nodes[0];
        assert_eq!(node.path(), Path::new("/dev/x/y"));
        assert_eq!(
            (node.major(), node.minor(), node.file_mode()),
            (10, 1, Some(0o660))
        );
        assert_eq!((node.uid(), node.gid()), (Some(0), Some(6)));
        assert_eq!(rules(&found).last().map(String::as_str), Some("+c 10:1 rw"));
        let found = of_container(&[request("", "")], &source, None, &[]).expect("good");
        assert_eq!(found.nodes[0].path(), Path::new("/dev/fuse"));
        assert_eq!(
            rules(&found).last().map(String::as_str),
            Some("+c 10:1 rwm")
        );
    }

    #[test]
    fn a_directory_of_devices() {
        let source = vec![vec![
            device("/dev/snd/a", "a", 116),
            device("/dev/snd/b/c", "b/c", 117),
        ]];
        let found = of_container(&[request("/dev/sound/", "r")], &source, None, &[]).expect("good");
        let places: Vec<_> = found
            .nodes
            .iter()
            .map(|n| n.path().display().to_string())
            .collect();
        assert_eq!(places, ["/dev/sound/a", "/dev/sound/b/c"]);
    }

    #[test]
    fn elsewhere_it_is_bound() {
        let source = vec![vec![device("/dev/fuse", "", 10)]];
        let found = of_container(&[request("/opt/fuse", "rw")], &source, None, &[]).expect("good");
        assert!(found.nodes.is_empty());
        assert_eq!(found.mounts[0].destination(), Path::new("/opt/fuse"));
        assert_eq!(
            found.mounts[0].source().as_deref(),
            Some(Path::new("/dev/fuse"))
        );
        assert!(rules(&found).contains(&"+c 10:1 rw".to_owned()));
    }

    #[test]
    fn privileged_gets_all_and_no_bounds() {
        let host = [
            device("/dev/fuse", "fuse", 10),
            device("/dev/kmsg", "kmsg", 1),
        ];
        let source = vec![vec![device("/dev/other", "", 99)]];
        let found =
            of_container(&[request("/dev/fuse", "r")], &source, Some(&host), &[]).expect("good");
        assert_eq!(rules(&found), ["+a *:* rwm"]);
        let nodes: Vec<_> = found
            .nodes
            .iter()
            .map(|n| (n.path().display().to_string(), n.major()))
            .collect();
        // What was asked for by name comes before what is there.
        assert_eq!(
            nodes,
            [("/dev/fuse".to_owned(), 99), ("/dev/kmsg".to_owned(), 1)]
        );
    }

    #[test]
    fn bad_requests() {
        let source = vec![vec![device("/dev/fuse", "", 10)]; 2];
        for (path, permissions) in [
            ("relative", "rw"),
            ("/dev/../etc/x", "rw"),
            ("/dev/x\n", "rw"),
            ("/dev/x", "rwx"),
            ("/dev/x", "rr"),
            ("/dev/x", "R"),
        ] {
            assert!(
                of_container(&[request(path, permissions)], &source, None, &[]).is_err(),
                "{path} {permissions}"
            );
        }
        let twice = [request("/dev/x", "r"), request("/dev//x", "r")];
        assert!(of_container(&twice, &source, None, &[]).is_err());
        assert!(of_container(&[request("/dev/x", "r")], &[], None, &[]).is_err());
    }
}
