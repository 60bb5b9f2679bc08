//! CDI: which devices are described, and which files are passed over?

use crate::attempt::apart;
use crate::finding::Finding;
use slipway_cdi::Cdi;
use slipway_config::Config;

const ID: &str = "cdi";
const WHAT: &str = "CDI devices";

/// The files in the configured directories.
pub(crate) fn check(config: &Config) -> Vec<Finding> {
    let dirs = config.pod.cdi_dirs.clone();
    let found = match apart(move || Ok(Cdi::new(dirs).inventory())) {
        Ok(found) => found,
        Err(e) => return vec![Finding::warn(ID, WHAT, e.to_string())],
    };
    let rejected = found.rejected.iter().map(|error| {
        Finding::warn("cdi-rejected", WHAT, error.to_string())
            .cost("its devices can't be given to containers")
            .fix("mend or remove it; it is read again at once")
    });
    let conflicts = found.conflicts.iter().map(|name| {
        Finding::warn(
            "cdi-conflict",
            WHAT,
            format!("{name} stands in several files"),
        )
        .cost("containers that ask for it are refused")
        .fix("leave it in one file of a directory")
    });
    let text = match found.devices.len() {
        0 => "none are described".to_owned(),
        n => format!("{n}: {}", found.devices.join(", ")),
    };
    rejected
        .chain(conflicts)
        .chain([Finding::info(ID, WHAT, text)])
        .collect()
}
