//! What an administrator sets for a shim, in the form that the shim takes it.

use std::path::Path;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message};
use containerd_shim_protos::shim::oci::Options as RuncOptions;

/// Name of runc's options.
const RUNC: &str = "containerd.runc.v1.Options";
/// Name of everybody else's.
const GENERIC: &str = "runtimeoptions.v1.Options";

/// Why options can't be handed over.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// They are no TOML.
    #[error("the options of the shim can't be read")]
    Toml(#[source] Box<toml::de::Error>),
    /// The runc shim has no such option, or not of this type.
    #[error(
        "the shim for runc has no option {key:?} of this type; it has BinaryName, Root, SystemdCgroup, NoPivotRoot, \
         NoNewKeyring, ShimCgroup, IoUid, IoGid, CriuImagePath, CriuWorkPath"
    )]
    Unknown {
        /// The key.
        key: String,
    },
    /// They can't be written.
    #[error("the options of the shim can't be encoded: {0}")]
    Encode(String),
}

/// Options in their final form.
#[derive(Debug, Clone, PartialEq)]
pub struct Options(Any);

/// Things that the shim for runc is told, if nothing else is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Defaults<'a> {
    /// Directory of the runtime's state.
    pub root: &'a str,
    /// cgroups are systemd's to make.
    pub systemd: bool,
    /// User and group that the pipes of its streams belong to.
    pub owner: (u32, u32),
}

impl Options {
    /// The options in a TOML table, for a shim by the name of its program. The keys are those of
    /// containerd's configuration: for `containerd-shim-runc-v2` the fields of its own options; for any other `TypeUrl`,
    /// `ConfigPath` and `ConfigBody`, or, without a `ConfigPath`, whatever the shim understands, which gets the table as
    /// it is.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn new(
        program: &Path,
        table: &str,
        defaults: Defaults<'_>,
    ) -> Result<Option<Self>, OptionsError> {
        let read: toml::Table =
            toml::from_str(table).map_err(|e| OptionsError::Toml(Box::new(e)))?;
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("containerd-shim-runc-") {
            return runc(&read, defaults).map(Some);
        }
        match read.is_empty() {
            true => Ok(None),
            false => generic(&read, table).map(Some),
        }
    }

    /// As a field of a message.
    pub fn any(&self) -> Any {
        self.0.clone()
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.0.write_to_bytes().unwrap_or_default()
    }
}

fn packed(name: &str, value: Vec<u8>) -> Options {
    let mut any = Any::new();
    any.type_url = name.to_owned();
    any.value = value;
    Options(any)
}

fn runc(table: &toml::Table, defaults: Defaults<'_>) -> Result<Options, OptionsError> {
    let mut options = RuncOptions::new();
    options.root = defaults.root.to_owned();
    options.systemd_cgroup = defaults.systemd;
    (options.io_uid, options.io_gid) = defaults.owner;
    for (key, value) in table {
        let unknown = || OptionsError::Unknown { key: key.clone() };
        let text = || value.as_str().map(str::to_owned).ok_or_else(unknown);
        let truth = || value.as_bool().ok_or_else(unknown);
        let number = || {
            let number = value.as_integer().and_then(|n| u32::try_from(n).ok());
            number.ok_or_else(unknown)
        };
        match key.as_str() {
            "BinaryName" => options.binary_name = text()?,
            "Root" => options.root = text()?,
            "SystemdCgroup" => options.systemd_cgroup = truth()?,
            "NoPivotRoot" => options.no_pivot_root = truth()?,
            "NoNewKeyring" => options.no_new_keyring = truth()?,
            "ShimCgroup" => options.shim_cgroup = text()?,
            "IoUid" => options.io_uid = number()?,
            "IoGid" => options.io_gid = number()?,
            "CriuImagePath" => options.criu_image_path = text()?,
            "CriuWorkPath" => options.criu_work_path = text()?,
            _ => return Err(unknown()),
        }
    }
    let value = options.write_to_bytes();
    value
        .map(|value| packed(RUNC, value))
        .map_err(|e| OptionsError::Encode(e.to_string()))
}

/// `runtimeoptions.v1.Options`, which is in none of the published crates: three fields.
fn generic(table: &toml::Table, text: &str) -> Result<Options, OptionsError> {
    let field = |key: &str| table.get(key).and_then(toml::Value::as_str);
    let (path, body) = match (field("ConfigPath"), field("ConfigBody")) {
        (None, None) => ("", text),
        (path, body) => (path.unwrap_or_default(), body.unwrap_or_default()),
    };
    let mut value = Vec::new();
    let write = || -> Result<(), containerd_shim_protos::protobuf::Error> {
        let mut out = CodedOutputStream::vec(&mut value);
        for (number, content) in [
            (1, field("TypeUrl").unwrap_or_default()),
            (2, path),
            (3, body),
        ] {
            if !content.is_empty() {
                out.write_bytes(number, content.as_bytes())?;
            }
        }
        out.flush()
    };
    let mut write = write;
    write().map_err(|e| OptionsError::Encode(e.to_string()))?;
    Ok(packed(GENERIC, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

    #[test]
    fn options_of_runc() {
        let defaults = Defaults {
            root: "/run/r",
            systemd: true,
            owner: (7, 8),
        };
        let options = Options::new(Path::new(SHIM), "", defaults)
            .unwrap()
            .unwrap();
        let read = RuncOptions::parse_from_bytes(&options.any().value).unwrap();
        assert_eq!(options.any().type_url, RUNC);
        assert_eq!((read.root.as_str(), read.systemd_cgroup), ("/run/r", true));
        assert_eq!((read.io_uid, read.io_gid), (7, 8));
        let table = "BinaryName = \"/usr/bin/crun\"\nSystemdCgroup = false\nIoUid = 5";
        let options = Options::new(Path::new(SHIM), table, defaults)
            .unwrap()
            .unwrap();
        let read = RuncOptions::parse_from_bytes(&options.any().value).unwrap();
        assert_eq!(read.binary_name, "/usr/bin/crun");
        assert_eq!((read.systemd_cgroup, read.io_uid), (false, 5));
        for table in [
            "Nonsense = 1",
            "Root = 1",
            "IoUid = -1",
            "SystemdCgroup = \"yes\"",
        ] {
            let error = Options::new(Path::new(SHIM), table, defaults).unwrap_err();
            assert!(
                matches!(error, OptionsError::Unknown { .. }),
                "{table}: {error}"
            );
        }
        let error = Options::new(Path::new(SHIM), "=", defaults).unwrap_err();
        assert!(matches!(error, OptionsError::Toml(_)));
    }

    #[test]
    fn options_of_others() {
        let shim = Path::new("/opt/containerd-shim-kata-v2");
        let none = Options::new(shim, "", Defaults::default()).unwrap();
        assert_eq!(none, None);
        let path = Options::new(
            shim,
            "ConfigPath = \"/c\"\nTypeUrl = \"t\"",
            Defaults::default(),
        );
        let path = path.unwrap().unwrap().any();
        assert_eq!(
            (path.type_url.as_str(), path.value.as_slice()),
            (GENERIC, &b"\x0a\x01t\x12\x02/c"[..])
        );
        let body = Options::new(shim, "a = 1", Defaults::default())
            .unwrap()
            .unwrap();
        assert_eq!(body.any().value, b"\x1a\x05a = 1");
    }
}
