//! Whether the state root's file system counts by itself what each container writes.

use crate::attempt::existing;
use crate::finding::Finding;
use slipway_observe::quota::{Projects, QuotaError};
use std::path::Path;

const ID: &str = "accounting";
const WHAT: &str = "accounting";

/// How writable layers will be measured.
pub(crate) fn check(state_root: &Path) -> Finding {
    let base = existing(&state_root.join("containers"));
    let shown = base.display();
    match Projects::on(&base) {
        Ok(_) => Finding::ok(
            ID,
            WHAT,
            format!("{shown}: each writable layer by a project quota"),
        ),
        Err(error) => {
            let found = match &error {
                QuotaError::Off { .. } => format!("{shown}: no project quotas"),
                _ => error.to_string(),
            };
            Finding::info(ID, WHAT, found)
                .cost("writable layers are walked to measure them, so their use is told late")
                .fix(
                    "have the state root on a file system of its own, ext4 made with -O quota,project -E \
                     quotatype=prjquota or XFS mounted with pquota (docs/operations.md)",
                )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Status;

    #[test]
    fn a_file_system_without_quotas_is_no_fault() {
        let finding = check(Path::new("/proc/nothing/here"));
        assert_eq!(finding.status, Status::Info);
        assert!(finding.found.contains("/proc"), "{}", finding.found);
        assert!(finding.cost.is_some() && finding.fix.is_some());
    }
}
