//! Records of pods and containers under the run root: written by rename, never synced (they are about
//! this boot), and never believed when they can't be read.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use slipway_config::{Config, Runtime};
use slipway_proto::cri;

use super::error::{PodError, file};
use super::handlers::Driver;
use super::phases::Phase;

/// Version of the records' format. A record of another one is set aside.
const SCHEMA: u32 = 1;
/// Name of the record in the directory of a pod or container.
const RECORD: &str = "record.json";
/// Name of a record that was set aside.
const UNREADABLE: &str = "record.json.unreadable";

/// Paths of a pod's namespaces; empty for the host's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Network.
    pub network: String,
    /// IPC.
    pub ipc: String,
    /// Host name.
    pub uts: String,
    /// PID; only when the pod's containers share one.
    pub pid: String,
    /// User, which owns the others.
    #[serde(default)]
    pub user: String,
}

/// What stays of a pod when the daemon ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Version of this format.
    pub schema: u32,
    /// The pod's id.
    pub id: String,
    /// The boot that it lives in.
    pub boot_id: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// Runtime handler, as resolved.
    pub runtime: String,
    /// Runtime handler, as asked.
    pub handler: String,
    /// What it takes to make and end its containers; none for a native handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<Driver>,
    /// The kubelet's configuration.
    #[serde(with = "proto_base64")]
    pub config: cri::PodSandboxConfig,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Its cgroup, absolute in the hierarchy.
    pub cgroup: String,
    /// Whether the cgroup is ours to remove.
    pub made_cgroup: bool,
    /// SELinux level of its containers; none on a host without SELinux.
    #[serde(default)]
    pub selinux_level: Option<String>,
    /// Its addresses, the primary one first.
    pub ips: Vec<std::net::IpAddr>,
    /// It was stopped completely.
    pub stopped: bool,
    /// Where the time of its start went.
    pub phases: Vec<Phase>,
}

/// What stays of a container when the daemon ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Version of this format.
    pub schema: u32,
    /// The container's id.
    pub id: String,
    /// Its pod.
    pub pod_id: String,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// The kubelet's configuration.
    #[serde(with = "proto_base64")]
    pub config: cri::ContainerConfig,
    /// Id of the image, the same everywhere.
    pub image_id: String,
    /// Repository digest of the image, or its id.
    pub image_ref: String,
    /// A name of the image for people.
    pub image_name: String,
    /// Whom it runs as.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// Supplemental groups.
    pub groups: Vec<u32>,
    /// Process id of its init at creation.
    pub pid: i32,
    /// Its log file; empty when its output is discarded.
    pub log_path: String,
    /// Signal number that asks it to stop.
    pub stop_signal: i32,
    /// Its cgroup, absolute in the hierarchy.
    pub cgroup: String,
    /// The mounts that the request named.
    #[serde(with = "proto_list")]
    pub mounts: Vec<cri::Mount>,
    /// Ids of the images that it has as volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volume_images: Vec<String>,
    /// Milliseconds that its `poststart` hooks may take together; 0: it has none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub poststart_ms: u64,
    /// The same of its `poststop` hooks.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub poststop_ms: u64,
    /// What it was restored from: the path of an archive, or the name of an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// What limits are in force.
    #[serde(with = "proto_base64")]
    pub resources: cri::LinuxContainerResources,
    /// Where the time of its creation went.
    pub phases: Vec<Phase>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl PodRecord {
    /// The current version.
    pub const SCHEMA: u32 = SCHEMA;

    /// What is set of its runtime handler: as it was when the pod was made, where a handler's settings are more than a switch;
    /// else as it is configured now.
    pub fn handler<'a>(&'a self, config: &'a Config) -> Option<&'a Runtime> {
        let own = self.driver.as_ref().map(|driver| &driver.settings);
        own.or(config.runtimes.get(&self.runtime))
    }
}

/// Only what every version has.
#[derive(Deserialize)]
struct Head {
    schema: u32,
}

/// Writes the record of the object whose directory is `dir`.
///
/// # Errors
/// [`PodError::File`].
pub fn write<T: Serialize>(dir: &Path, record: &T) -> Result<(), PodError> {
    let path = dir.join(RECORD);
    let draft = dir.join(".record.json.new");
    let text = serde_json::to_vec(record).map_err(|e| bad(&path, &e))?;
    std::fs::write(&draft, text).map_err(file("write", &draft))?;
    std::fs::rename(&draft, &path).map_err(file("write", &path))
}

/// Reads the record of the object whose directory is `dir`; `None` when there is none.
///
/// # Errors
/// [`PodError::Record`] for one that can't be understood, [`PodError::File`].
pub fn read<T: DeserializeOwned>(dir: &Path) -> Result<Option<T>, PodError> {
    let path = dir.join(RECORD);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(file("read", &path)(e)),
    };
    let head: Head = serde_json::from_slice(&text).map_err(|e| bad(&path, &e))?;
    if head.schema != SCHEMA {
        let reason = format!(
            "it has schema version {}, this version reads {SCHEMA}",
            head.schema
        );
        return Err(PodError::Record { path, reason });
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| bad(&path, &e))
}

/// Puts a record that can't be understood out of the way, where an operator finds it.
///
/// # Errors
/// [`PodError::File`].
pub fn set_aside(dir: &Path) -> Result<PathBuf, PodError> {
    let to = dir.join(UNREADABLE);
    std::fs::rename(dir.join(RECORD), &to).map_err(file("set aside the record in", dir))?;
    Ok(to)
}

/// Whether the record in `dir` was set aside.
pub fn is_set_aside(dir: &Path) -> bool {
    dir.join(UNREADABLE).exists()
}

fn bad(path: &Path, error: &serde_json::Error) -> PodError {
    PodError::Record {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// Protobuf keeps unknown fields out and known ones whole, whatever version wrote them.
mod proto_base64 {
    use super::{Deserialize, Deserializer, Message, STANDARD, Serializer};
    use base64::Engine as _;
    use serde::de::Error;

    pub fn serialize<M: Message, S: Serializer>(message: &M, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(message.encode_to_vec()))
    }

    pub fn deserialize<'de, M: Message + Default, D: Deserializer<'de>>(
        from: D,
    ) -> Result<M, D::Error> {
        let text = String::deserialize(from)?;
        let bytes = STANDARD.decode(text).map_err(Error::custom)?;
        M::decode(bytes.as_slice()).map_err(Error::custom)
    }
}

/// A list of messages, likewise.
mod proto_list {
    use super::{Deserialize, Deserializer, Message, STANDARD, Serializer};
    use base64::Engine as _;
    use serde::de::Error;

    pub fn serialize<M: Message, S: Serializer>(list: &[M], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(
            list.iter()
                .map(|message| STANDARD.encode(message.encode_to_vec())),
        )
    }

    pub fn deserialize<'de, M: Message + Default, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<M>, D::Error> {
        let decode = |text: String| {
            let bytes = STANDARD.decode(text).map_err(Error::custom)?;
            M::decode(bytes.as_slice()).map_err(Error::custom)
        };
        Vec::<String>::deserialize(from)?
            .into_iter()
            .map(decode)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ContainerRecord {
        ContainerRecord {
            schema: SCHEMA,
            id: "c1".into(),
            pod_id: "p1".into(),
            created_at: 5,
            config: cri::ContainerConfig {
                working_dir: "/x".into(),
                envs: vec![cri::KeyValue {
                    key: "K".into(),
                    value: vec![0xff, 0],
                }],
                ..Default::default()
            },
            image_id: "sha256:1".into(),
            image_ref: "r@sha256:2".into(),
            image_name: "r:latest".into(),
            uid: 1,
            gid: 2,
            groups: vec![2, 3],
            pid: 9,
            log_path: "/l".into(),
            stop_signal: 15,
            cgroup: "/k".into(),
            mounts: vec![cri::Mount {
                container_path: "/m".into(),
                ..Default::default()
            }],
            volume_images: vec!["sha256:3".into()],
            poststart_ms: 0,
            poststop_ms: 0,
            checkpoint: Some("/c.tar".into()),
            resources: cri::LinuxContainerResources {
                cpu_shares: 3,
                ..Default::default()
            },
            phases: Vec::new(),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read::<ContainerRecord>(dir.path()).unwrap(), None);
        write(dir.path(), &record()).unwrap();
        write(dir.path(), &record()).unwrap();
        assert_eq!(read::<ContainerRecord>(dir.path()).unwrap(), Some(record()));
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no draft is left"
        );
    }

    #[test]
    fn what_cannot_be_read_is_set_aside_and_not_lost() {
        for text in ["", "{", "{\"schema\":1}", "{\"schema\":2,\"id\":\"x\"}"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(RECORD), text).unwrap();
            let error = read::<ContainerRecord>(dir.path()).unwrap_err();
            assert!(matches!(error, PodError::Record { .. }), "{text}: {error}");
            assert!(!is_set_aside(dir.path()));
            let kept = set_aside(dir.path()).unwrap();
            assert_eq!(std::fs::read_to_string(kept).unwrap(), text);
            assert!(is_set_aside(dir.path()));
            assert_eq!(read::<ContainerRecord>(dir.path()).unwrap(), None);
        }
    }
}
