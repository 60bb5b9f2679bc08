//! Records of attachments: what ADD was given and what it gave, so that DEL and CHECK get the same
//! even after a restart of the daemon or a change of the configuration.

use crate::config::{ConfigError, Network};
use crate::result::{AddResult, ResultError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The format of the records; one of another schema is not understood.
const SCHEMA: u32 = 1;
const SUFFIX: &str = ".json";

/// Why a record can't be read or written.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum RecordError {
    #[error("cannot {action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a record of a network attachment", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("{} has schema version {found}, but this program reads {SCHEMA}", path.display())]
    Schema { path: PathBuf, found: u64 },
    #[error("{} holds a network that can't be used", path.display())]
    Network {
        path: PathBuf,
        #[source]
        source: ConfigError,
    },
    #[error("{} holds a result that can't be used", path.display())]
    Result {
        path: PathBuf,
        #[source]
        source: ResultError,
    },
}

impl RecordError {
    /// The record is there but can't be understood, now or later.
    pub(crate) fn is_damage(&self) -> bool {
        !matches!(self, Self::File { .. })
    }
}

/// One network that a pod is attached to.
#[derive(Clone, Debug, PartialEq)]
pub struct Attached {
    /// The network as it was configured at the time of ADD.
    pub network: Network,
    /// The pod's interface on it.
    pub ifname: String,
    /// What ADD gave; `None` while it runs, and after one that was cut off.
    pub result: Option<AddResult>,
}

/// A pod's attachment to its networks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Attachment {
    pub id: String,
    pub netns: String,
    pub args: String,
    pub wishes: Map<String, Value>,
    /// In the order of ADD; the first one gives the pod its addresses.
    pub networks: Vec<Attached>,
}

impl Attachment {
    /// What the attachment gave, once every ADD has ended well.
    pub fn result(&self) -> Option<NetworkResult> {
        let networks: Vec<_> = self
            .networks
            .iter()
            .map(|a| {
                Some(NetworkAttachment {
                    network: a.network.name().to_owned(),
                    ifname: a.ifname.clone(),
                    result: a.result.clone()?,
                })
            })
            .collect::<Option<_>>()?;
        let ips = networks
            .first()
            .map(|a| a.result.pod_addresses(&a.ifname))
            .unwrap_or_default();
        Some(NetworkResult { ips, networks })
    }
}

/// What a pod got from its networks.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkResult {
    /// The pod's addresses on its first network, the primary one first. Empty when that network
    /// assigns none.
    pub ips: Vec<IpAddr>,
    /// Every network that the pod is on.
    pub networks: Vec<NetworkAttachment>,
}

/// One of a pod's networks.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkAttachment {
    /// The network's name.
    pub network: String,
    /// The pod's interface on it.
    pub ifname: String,
    /// The plugins' result: interfaces, addresses, and the JSON as they wrote it.
    pub result: AddResult,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    schema: u32,
    id: String,
    netns: String,
    args: String,
    wishes: Map<String, Value>,
    networks: Vec<StoredNetwork>,
}

#[derive(Serialize, Deserialize)]
struct StoredNetwork {
    file: PathBuf,
    network: Value,
    ifname: String,
    result: Option<Value>,
}

/// The directory of records: one file per pod. Its functions block on a few small files.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The pods with a record, readable or not.
    pub fn ids(&self) -> Result<Vec<String>, RecordError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(failed("list", &self.dir)(source)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &self.dir))?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
            ids.extend(id.filter(|id| !id.starts_with('.')).map(str::to_owned));
        }
        ids.sort();
        Ok(ids)
    }

    /// The record of a pod; `None` when there is none.
    pub fn read(&self, id: &str) -> Result<Option<Attachment>, RecordError> {
        let path = self.path(id);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("read", &path)(source)),
        };
        decode(&path, &text).map(Some)
    }

    /// Writes a record by rename: a reader sees the old one or the new one whole.
    pub fn write(&self, attachment: &Attachment) -> Result<(), RecordError> {
        let path = self.path(&attachment.id);
        let draft = self.dir.join(format!(".{}{SUFFIX}.new", attachment.id));
        let json = |source| RecordError::Json {
            path: path.clone(),
            source,
        };
        let text = serde_json::to_vec(&encode(attachment)).map_err(json)?;
        // Configurations may hold secrets, so only the owner reads.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed("create", &self.dir))?;
        let write = || {
            let mut options = fs::OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&draft)?.write_all(&text)?;
            fs::rename(&draft, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&draft);
            failed("write", &path)(source)
        })
    }

    /// Removes a record; one that is gone is no error.
    pub fn remove(&self, id: &str) -> Result<(), RecordError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Keeps a record that can't be read under another name, for people to look at.
    pub fn set_aside(&self, id: &str) -> Result<PathBuf, RecordError> {
        let path = self.path(id);
        let aside = self.dir.join(format!("{id}{SUFFIX}.unreadable"));
        fs::rename(&path, &aside).map_err(failed("set aside", &path))?;
        Ok(aside)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}{SUFFIX}"))
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    move |source| RecordError::File {
        action,
        path: path.into(),
        source,
    }
}

fn encode(attachment: &Attachment) -> Stored {
    let network = |a: &Attached| StoredNetwork {
        file: a.network.file().into(),
        network: a.network.to_stored(),
        ifname: a.ifname.clone(),
        result: a.result.as_ref().map(|r| r.to_version(r.version())),
    };
    Stored {
        schema: SCHEMA,
        id: attachment.id.clone(),
        netns: attachment.netns.clone(),
        args: attachment.args.clone(),
        wishes: attachment.wishes.clone(),
        networks: attachment.networks.iter().map(network).collect(),
    }
}

fn decode(path: &Path, text: &[u8]) -> Result<Attachment, RecordError> {
    let json = |source| RecordError::Json {
        path: path.into(),
        source,
    };
    let value: Value = serde_json::from_slice(text).map_err(json)?;
    // The schema first: a later one may have another shape altogether.
    if let Some(found) = value.get("schema").and_then(Value::as_u64)
        && found != u64::from(SCHEMA)
    {
        return Err(RecordError::Schema {
            path: path.into(),
            found,
        });
    }
    let stored: Stored = serde_json::from_value(value).map_err(json)?;
    let network = |s: StoredNetwork| {
        let network =
            Network::from_stored(&s.file, s.network).map_err(|source| RecordError::Network {
                path: path.into(),
                source,
            })?;
        let result = s
            .result
            .map(|result| AddResult::parse(result, network.version()))
            .transpose()
            .map_err(|source| RecordError::Result {
                path: path.into(),
                source,
            })?;
        Ok(Attached {
            network,
            ifname: s.ifname,
            result,
        })
    };
    Ok(Attachment {
        id: stored.id,
        netns: stored.netns,
        args: stored.args,
        wishes: stored.wishes,
        networks: stored
            .networks
            .into_iter()
            .map(network)
            .collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn attachment(result: Option<Value>) -> Attachment {
        let list =
            json!({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "a", "secret": 1}]});
        let network = Network::from_stored(Path::new("/etc/x.conflist"), list).unwrap();
        let result = result.map(|r| AddResult::parse(r, network.version()).unwrap());
        Attachment {
            id: "pod".into(),
            netns: "/run/ns".into(),
            args: "IgnoreUnknown=1".into(),
            wishes: json!({"portMappings": [1]}).as_object().unwrap().clone(),
            networks: vec![Attached {
                network,
                ifname: "eth0".into(),
                result,
            }],
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("cni/results"));
        assert_eq!(store.read("pod").unwrap(), None);
        assert!(store.ids().unwrap().is_empty());
        let begun = attachment(None);
        store.write(&begun).unwrap();
        assert_eq!(store.read("pod").unwrap(), Some(begun.clone()));
        assert_eq!(begun.result(), None);
        let done = attachment(Some(
            json!({"ips": [{"address": "10.0.0.1/8"}], "extra": 1}),
        ));
        store.write(&done).unwrap();
        assert_eq!(store.read("pod").unwrap(), Some(done.clone()));
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        assert_eq!(done.result().unwrap().ips, [ip]);
        assert_eq!(store.ids().unwrap(), ["pod"]);
        let mode = fs::metadata(store.path("pod"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        store.remove("pod").unwrap();
        store.remove("pod").unwrap();
        assert_eq!(fs::read_dir(&store.dir).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_record_is_told_apart_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().into());
        let good = serde_json::to_value(encode(&attachment(None))).unwrap();
        let mut newer = good.clone();
        newer["schema"] = 2.into();
        let mut bad_network = good.clone();
        bad_network["networks"][0]["network"]["plugins"] = json!([]);
        let mut bad_result = good;
        bad_result["networks"][0]["result"] = json!({"ips": 1});
        let texts = [
            "".into(),
            "{".into(),
            "{}".into(),
            newer.to_string(),
            bad_network.to_string(),
            bad_result.to_string(),
        ];
        for text in texts {
            fs::write(store.path("pod"), &text).unwrap();
            let error = store.read("pod").unwrap_err();
            assert!(error.is_damage(), "{error}");
            let aside = store.set_aside("pod").unwrap();
            assert_eq!(fs::read_to_string(aside).unwrap(), text);
            assert_eq!(store.read("pod").unwrap(), None);
        }
        assert!(store.ids().unwrap().is_empty());
    }
}
