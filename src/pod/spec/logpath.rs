//! Where a container's log goes.

use crate::error::Result;
use crate::paths;
use std::path::PathBuf;

/// The pod's log directory, if it has one.
pub(crate) fn directory(log_directory: &str) -> Result<Option<PathBuf>> {
    if log_directory.is_empty() {
        return Ok(None);
    }
    paths::absolute("log_directory", log_directory)?;
    Ok(Some(paths::clean(log_directory)))
}

/// The container's log file, which lies below the pod's log directory. `None`: output is discarded, with
/// a warning when it was only the directory that was missing.
pub(crate) fn file(
    log_directory: &str,
    log_path: &str,
    warnings: &mut Vec<String>,
) -> Result<Option<PathBuf>> {
    let directory = directory(log_directory)?;
    if log_path.is_empty() {
        return Ok(None);
    }
    paths::relative("log_path", log_path)?;
    let Some(directory) = directory else {
        warnings.push("log_path is discarded, for the pod has no log_directory".to_owned());
        return Ok(None);
    };
    Ok(Some(directory.join(paths::clean(log_path))))
}

/// Whether a path stays below another; for tests.
#[cfg(test)]
fn below(path: &std::path::Path, top: &std::path::Path) -> bool {
    path.starts_with(top)
        && path != top
        && path
            .components()
            .all(|c| c != std::path::Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn joined_or_refused() {
        let mut warnings = Vec::new();
        let mut at = |dir: &str, path: &str| file(dir, path, &mut warnings);
        assert_eq!(
            at("/var/log/pods/x", "c/0.log"),
            Ok(Some("/var/log/pods/x/c/0.log".into()))
        );
        assert_eq!(
            at("/var/log//x/", "./0.log"),
            Ok(Some("/var/log/x/0.log".into()))
        );
        assert_eq!(at("/var/log", ""), Ok(None));
        assert_eq!(at("", ""), Ok(None));
        for bad in [
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a\nb",
            "a\0",
            ".",
            "/",
            "a/..",
        ] {
            assert_eq!(at("/var/log", bad).expect_err(bad).field(), "log_path");
        }
        for bad in ["log", "/var/../etc", "/var\n", "/var\0"] {
            assert_eq!(at(bad, "x").expect_err(bad).field(), "log_directory");
        }
        assert_eq!(at("", "0.log"), Ok(None));
        assert_eq!(warnings.len(), 1);
    }

    proptest! {
        #[test]
        fn logs_stay_below_their_directory(path in prop_oneof!["[./a\n]{0,10}", "\\PC{0,20}"]) {
            if let Ok(Some(found)) = file("/var/log/pods/p", &path, &mut Vec::new()) {
                prop_assert!(below(&found, std::path::Path::new("/var/log/pods/p")), "{}", found.display());
                prop_assert!(!found.to_string_lossy().contains(['\n', '\0']));
            }
        }
    }
}
