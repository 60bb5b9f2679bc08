//! A `config.json` to start from: `spec`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use liboci_cli::Spec as Args;
use oci_spec::runtime::Spec;

use crate::record::OCI_VERSION;
use crate::{OciError, Result};

/// Writes a specification into a bundle that has none.
///
/// # Errors
/// [`OciError`], also when there is one.
pub fn write(args: &Args) -> Result<()> {
    if args.rootless {
        return Err(OciError::Unsupported {
            what: "a container without root's privileges",
            instead: "this runtime runs as root; a user namespace (linux.uidMappings) confines the container",
        });
    }
    let bundle = args.bundle.as_deref().unwrap_or(Path::new("."));
    let path = bundle.join("config.json");
    let failed = OciError::file("write", &path);
    let text = serde_json::to_string_pretty(&spec());
    let text = text.map_err(|e| failed(e.into()))?;
    let mut options = File::options();
    let file = options.write(true).create_new(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()));
    written.map_err(failed)
}

/// A shell on a terminal, with few capabilities and namespaces of its own.
fn spec() -> Spec {
    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_hostname(Some("slipway".to_owned()))
        .set_annotations(None);
    if let Some(process) = spec.process_mut() {
        process
            .set_terminal(Some(true))
            .set_args(Some(vec!["sh".to_owned()]))
            .set_no_new_privileges(Some(true));
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_a_bundles() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let args = |rootless| Args {
            bundle: Some(dir.path().to_owned()),
            rootless,
        };
        assert!(write(&args(true)).is_err());
        write(&args(false)).unwrap();
        crate::bundle::Bundle::load(dir.path()).unwrap();
        // Never over one that is there.
        assert!(write(&args(false)).is_err());
    }
}
