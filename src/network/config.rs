//! CNI network configurations: what an administrator or a network add-on puts into the
//! configuration directory (CNI specification, section 1).

use crate::directory::files_in;
use crate::name::{NameError, check_network_name, check_plugin_type};
use crate::version::{self, SpecVersion};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A configuration is typed by hand or by an add-on; nothing honest is larger.
const MAX_FILE: u64 = 1 << 20;

/// Why a configuration file can't be used.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages say it.
pub enum ConfigError {
    #[error("cannot read the CNI configuration {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the CNI configuration {} is larger than {MAX_FILE} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("the CNI configuration {} is not valid JSON", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the CNI configuration {}: {problem}", path.display())]
    Shape { path: PathBuf, problem: String },
    #[error("the CNI configuration {} has a bad name", path.display())]
    Name {
        path: PathBuf,
        #[source]
        source: NameError,
    },
}

/// One plugin of a network: its object in the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginConfig {
    kind: String,
    capabilities: BTreeSet<String>,
    body: Map<String, Value>,
}

impl PluginConfig {
    /// The plugin's `type`: the name of its executable.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Whether the plugin declares this capability, so that it may be given its runtime configuration.
    pub fn has_capability(&self, name: &str) -> bool {
        self.capabilities.contains(name)
    }

    /// The object as it stands in the configuration.
    pub fn body(&self) -> &Map<String, Value> {
        &self.body
    }

    fn parse(path: &Path, value: Value) -> Result<Self, ConfigError> {
        let Value::Object(body) = value else {
            return Err(shape(path, "each of its plugins must be an object"));
        };
        let kind = match body.get("type") {
            Some(Value::String(kind)) => kind.clone(),
            _ => {
                return Err(shape(
                    path,
                    "a plugin lacks \"type\", the name of its executable",
                ));
            }
        };
        check_plugin_type(&kind).map_err(|source| ConfigError::Name {
            path: path.into(),
            source,
        })?;
        let capabilities = match body.get("capabilities") {
            None | Some(Value::Null) => BTreeSet::new(),
            Some(Value::Object(map)) => map
                .iter()
                .filter(|(_, on)| on.as_bool() == Some(true))
                .map(|(name, _)| name.clone())
                .collect(),
            Some(_) => {
                let problem = format!("\"capabilities\" of plugin {kind:?} must be an object");
                return Err(shape(path, problem));
            }
        };
        Ok(Self {
            kind,
            capabilities,
            body,
        })
    }
}

/// A network: a named chain of plugins.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    name: String,
    file: PathBuf,
    version: SpecVersion,
    disable_check: bool,
    disable_gc: bool,
    plugins: Vec<PluginConfig>,
}

impl Network {
    /// The network's name; plugins keep their state under it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that the network came from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The specification version that its plugins are spoken to in.
    pub fn version(&self) -> SpecVersion {
        self.version
    }

    /// CHECK must not be run for this network.
    pub fn check_disabled(&self) -> bool {
        self.disable_check
    }

    /// GC must not be run for this network.
    pub fn gc_disabled(&self) -> bool {
        self.disable_gc
    }

    /// The plugins, in the order of ADD. Never empty.
    pub fn plugins(&self) -> &[PluginConfig] {
        &self.plugins
    }

    /// The whole network as one list, to be stored beside an attachment; [`Network::from_stored`]
    /// reads it.
    pub fn to_stored(&self) -> Value {
        serde_json::json!({
            "cniVersion": self.version.as_str(),
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": true,
            "plugins": self.plugins.iter().map(|p| &p.body).collect::<Vec<_>>(),
        })
    }

    /// The network that [`Network::to_stored`] wrote; `file` names where it once came from.
    ///
    /// # Errors
    ///
    /// When the value is not a network list.
    pub fn from_stored(file: &Path, value: Value) -> Result<Self, ConfigError> {
        let Value::Object(list) = value else {
            return Err(shape(file, "a network must be an object"));
        };
        Self::from_list(file, list, Vec::new())
    }

    /// Reads one file: a list when it is named `.conflist`, else a single plugin, which becomes a
    /// list of one.
    ///
    /// # Errors
    ///
    /// When the file can't be read or is not what its name promises.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let body = read_object(path)?;
        if path.extension().is_some_and(|e| e == "conflist") {
            let more = inlined_only(path, &body)?;
            let more = if more {
                Vec::new()
            } else {
                read_plugin_directory(path, &body)?
            };
            Self::from_list(path, body, more)
        } else {
            Self::from_single(path, body)
        }
    }

    /// The directory whose `.conf` files add plugins to this network, unless the list forbids it
    /// (CNI 1.1): named like the network, beside its file.
    pub(crate) fn plugin_directory(&self) -> Option<PathBuf> {
        self.file.parent().map(|dir| dir.join(&self.name))
    }

    fn from_single(path: &Path, body: Map<String, Value>) -> Result<Self, ConfigError> {
        if body.contains_key("plugins") && !body.contains_key("type") {
            return Err(shape(
                path,
                "this is a list of plugins: name the file .conflist",
            ));
        }
        let name = network_name(path, &body)?;
        let version = spec_version(path, &body)?;
        let plugin = PluginConfig::parse(path, Value::Object(body))?;
        Ok(Self {
            name,
            file: path.into(),
            version,
            disable_check: false,
            disable_gc: false,
            plugins: vec![plugin],
        })
    }

    fn from_list(
        path: &Path,
        mut body: Map<String, Value>,
        more: Vec<PluginConfig>,
    ) -> Result<Self, ConfigError> {
        let name = network_name(path, &body)?;
        let version = spec_version(path, &body)?;
        let mut plugins = match body.remove("plugins") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(values)) => values
                .into_iter()
                .map(|value| PluginConfig::parse(path, value))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(shape(path, "\"plugins\" must be a list")),
        };
        plugins.extend(more);
        if plugins.is_empty() {
            return Err(shape(path, "it names no plugin: add one to \"plugins\""));
        }
        Ok(Self {
            name,
            file: path.into(),
            version,
            disable_check: flag(path, &body, "disableCheck")?,
            disable_gc: flag(path, &body, "disableGC")?,
            plugins,
        })
    }
}

fn shape(path: &Path, problem: impl Into<String>) -> ConfigError {
    ConfigError::Shape {
        path: path.into(),
        problem: problem.into(),
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    use std::io::Read;
    let failed = |source| ConfigError::Read {
        path: path.into(),
        source,
    };
    // Opening a FIFO would wait for a writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(shape(path, "it is not a regular file"));
    }
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLarge(path.into()));
    }
    serde_json::from_slice(&text).map_err(|source| ConfigError::Json {
        path: path.into(),
        source,
    })
}

fn inlined_only(path: &Path, body: &Map<String, Value>) -> Result<bool, ConfigError> {
    flag(path, body, "loadOnlyInlinedPlugins")
}

fn read_plugin_directory(
    path: &Path,
    body: &Map<String, Value>,
) -> Result<Vec<PluginConfig>, ConfigError> {
    // The name is checked before it becomes part of a path.
    let name = network_name(path, body)?;
    let Some(dir) = path.parent().map(|dir| dir.join(name)) else {
        return Ok(Vec::new());
    };
    files_in(&dir, &["conf"])?
        .iter()
        .map(|file| PluginConfig::parse(file, Value::Object(read_object(file)?)))
        .collect()
}

fn network_name(path: &Path, body: &Map<String, Value>) -> Result<String, ConfigError> {
    let Some(Value::String(name)) = body.get("name") else {
        return Err(shape(path, "it lacks \"name\", the network's name"));
    };
    check_network_name(name).map_err(|source| ConfigError::Name {
        path: path.into(),
        source,
    })?;
    Ok(name.clone())
}

/// The highest version that both we and the configuration speak: `cniVersion`, or one of
/// `cniVersions` (CNI 1.1). Without either it is 0.1.0.
fn spec_version(path: &Path, body: &Map<String, Value>) -> Result<SpecVersion, ConfigError> {
    let mut named = Vec::new();
    match body.get("cniVersion") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => named.push(text.as_str()),
        Some(_) => return Err(shape(path, "\"cniVersion\" must be a string")),
    }
    match body.get("cniVersions") {
        None | Some(Value::Null) => {}
        Some(Value::Array(values)) => {
            for value in values {
                let Value::String(text) = value else {
                    return Err(shape(path, "\"cniVersions\" must be a list of strings"));
                };
                named.push(text);
            }
        }
        Some(_) => return Err(shape(path, "\"cniVersions\" must be a list of strings")),
    }
    if let Some(bad) = named.iter().find(|text| version::parts(text).is_none()) {
        return Err(shape(
            path,
            format!("{bad:?} is not a CNI version such as \"1.0.0\""),
        ));
    }
    if named.is_empty() {
        return Ok(SpecVersion::V0_1_0);
    }
    named
        .iter()
        .filter_map(|text| SpecVersion::parse(text))
        .max()
        .ok_or_else(|| {
            let problem = format!(
                "it asks for CNI version {}, but only {} are supported: change \"cniVersion\"",
                named.join(" or "),
                version::supported()
            );
            shape(path, problem)
        })
}

/// A boolean; libcni takes it as a string as well.
fn flag(path: &Path, body: &Map<String, Value>, key: &str) -> Result<bool, ConfigError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(shape(path, format!("\"{key}\" must be true or false"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_list_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(
            dir.path(),
            "10-a.conflist",
            r#"{"cniVersion":"1.0.0","name":"a","disableCheck":true,"plugins":[
                {"type":"bridge","x":1},
                {"type":"portmap","capabilities":{"portMappings":true,"dns":false}}]}"#,
        );
        let network = Network::read(&path).unwrap();
        assert_eq!(
            (network.name(), network.version()),
            ("a", SpecVersion::V1_0_0)
        );
        assert!(network.check_disabled() && !network.gc_disabled());
        let kinds: Vec<_> = network.plugins().iter().map(PluginConfig::kind).collect();
        assert_eq!(kinds, ["bridge", "portmap"]);
        assert!(network.plugins()[1].has_capability("portMappings"));
        assert!(!network.plugins()[1].has_capability("dns"));
        assert_eq!(network.plugins()[0].body()["x"], 1);
        assert_eq!(
            Network::from_stored(&path, network.to_stored()).unwrap(),
            network
        );
    }

    #[test]
    fn a_single_plugin_becomes_a_list_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"cniVersion":"0.3.1","name":"a","type":"bridge"}"#;
        for name in ["a.conf", "a.json"] {
            let network = Network::read(&write(dir.path(), name, text)).unwrap();
            assert_eq!(
                (network.plugins().len(), network.version()),
                (1, SpecVersion::V0_3_1)
            );
        }
    }

    #[test]
    fn the_plugin_directory_adds_plugins_unless_forbidden() {
        let dir = tempfile::tempdir().unwrap();
        let list = |inlined: &str| {
            format!(
                r#"{{"cniVersion":"1.1.0","name":"net","loadOnlyInlinedPlugins":{inlined},
                    "plugins":[{{"type":"one"}}]}}"#
            )
        };
        write(dir.path(), "net/20.conf", r#"{"type":"three"}"#);
        write(dir.path(), "net/10.conf", r#"{"type":"two"}"#);
        write(dir.path(), "net/05.conflist", "not looked at");
        let kinds = |path: &Path| -> Vec<String> {
            let network = Network::read(path).unwrap();
            network
                .plugins()
                .iter()
                .map(|p| p.kind().to_owned())
                .collect()
        };
        assert_eq!(
            kinds(&write(dir.path(), "a.conflist", &list("false"))),
            ["one", "two", "three"]
        );
        assert_eq!(
            kinds(&write(dir.path(), "b.conflist", &list("true"))),
            ["one"]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        for (text, part) in [
            (r#"{"plugins":[{"type":"a"}]}"#, "lacks \"name\""),
            (r#"{"name":"a"}"#, "names no plugin"),
            (r#"{"name":"a","plugins":[]}"#, "names no plugin"),
            (r#"{"name":"a","plugins":{}}"#, "must be a list"),
            (r#"{"name":"a","plugins":[{}]}"#, "lacks \"type\""),
            (r#"{"name":"a","plugins":[1]}"#, "must be an object"),
            (
                r#"{"name":"a","cniVersion":"9.0.0","plugins":[{"type":"a"}]}"#,
                "9.0.0",
            ),
            (
                r#"{"name":"a","cniVersion":1,"plugins":[{"type":"a"}]}"#,
                "must be a string",
            ),
            (
                r#"{"name":"a","cniVersion":"x","plugins":[{"type":"a"}]}"#,
                "not a CNI version",
            ),
            (
                r#"{"name":"a","disableGC":1,"plugins":[{"type":"a"}]}"#,
                "disableGC",
            ),
            (r#"{"name":"a","plugins":[{"type":"../sh"}]}"#, "bad name"),
            (r#"{"name":"a","plugins":[{"type":"/bin/sh"}]}"#, "bad name"),
            (r#"{"name":"../a","plugins":[{"type":"a"}]}"#, "bad name"),
            ("[]", "not valid JSON"),
            ("", "not valid JSON"),
        ] {
            let path = write(dir.path(), "a.conflist", text);
            let error = Network::read(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(error.contains("a.conflist"), "{error}");
        }
        let path = write(dir.path(), "a.conflist", &" ".repeat(MAX_FILE as usize + 1));
        assert!(matches!(
            Network::read(&path),
            Err(ConfigError::TooLarge(_))
        ));
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let path = Path::new("x.conflist");
        let version = |text: &str| {
            let body: Map<String, Value> = serde_json::from_str(text).unwrap();
            spec_version(path, &body)
        };
        assert_eq!(version("{}").unwrap(), SpecVersion::V0_1_0);
        let both = r#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","1.1.0","7.1.0"]}"#;
        assert_eq!(version(both).unwrap(), SpecVersion::V1_1_0);
        assert_eq!(
            version(r#"{"cniVersions":["0.4.0"]}"#).unwrap(),
            SpecVersion::V0_4_0
        );
        version(r#"{"cniVersions":["7.0.0"]}"#).unwrap_err();
        version(r#"{"cniVersions":[1]}"#).unwrap_err();
    }

    proptest! {
        #[test]
        fn no_file_content_panics(text in "\\PC{0,200}") {
            let dir = tempfile::tempdir().unwrap();
            for name in ["a.conf", "a.conflist"] {
                drop(Network::read(&write(dir.path(), name, &text)));
            }
        }

        #[test]
        fn a_network_survives_being_stored(
            name in "[a-z][a-z0-9-]{0,12}",
            kinds in proptest::collection::vec("[a-z][a-z-]{0,8}", 1..5),
            check in any::<bool>(),
        ) {
            let stored = serde_json::json!({
                "cniVersion": "1.1.0", "name": name, "disableCheck": check,
                "plugins": kinds.iter().map(|k| serde_json::json!({"type": k})).collect::<Vec<_>>(),
            });
            let path = Path::new("/etc/cni/net.d/x.conflist");
            let network = Network::from_stored(path, stored).unwrap();
            let again = Network::from_stored(path, network.to_stored()).unwrap();
            prop_assert_eq!(network, again);
        }
    }
}
