//! The directory that network configurations are put into, read as libcni reads it.

use crate::config::{ConfigError, Network};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a configuration directory holds.
#[derive(Debug, Default)]
pub struct Directory {
    /// Usable networks in the order of their files' names.
    pub networks: Vec<Network>,
    /// Files that were passed over, and why.
    pub rejected: Vec<ConfigError>,
}

impl Directory {
    /// Reads a configuration directory as libcni does: files ending in `.conf`, `.conflist` and
    /// `.json` in the order of their names, until `limit` usable networks are found (0: all). A file
    /// that can't be used is passed over. A directory that does not exist is empty.
    ///
    /// # Errors
    ///
    /// When the directory exists and can't be listed.
    pub fn read(dir: &Path, limit: usize) -> Result<Self, ConfigError> {
        let mut found = Self::default();
        for path in files_in(dir, &["conf", "conflist", "json"])? {
            match Network::read(&path) {
                Ok(network) => found.networks.push(network),
                Err(error) => found.rejected.push(error),
            }
            if limit != 0 && found.networks.len() == limit {
                break;
            }
        }
        Ok(found)
    }
}

/// Files with one of the extensions, in the order of their names.
pub(crate) fn files_in(dir: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: dir.into(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let wanted = path
            .extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x));
        // A symbolic link counts as what it leads to: ConfigMap mounts are made of them.
        if wanted && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        fs::write(dir.join(name), text).unwrap();
    }

    #[test]
    fn the_first_usable_file_wins_and_the_others_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "00-readme.txt", "hello");
        write(dir.path(), "01-bad.conflist", "{");
        write(
            dir.path(),
            "02-list-in-conf.conf",
            r#"{"name":"x","plugins":[{"type":"a"}]}"#,
        );
        fs::create_dir(dir.path().join("03-dir.conf")).unwrap();
        write(
            dir.path(),
            "10-b.conf",
            r#"{"cniVersion":"1.0.0","name":"b","type":"bridge"}"#,
        );
        write(
            dir.path(),
            "20-c.conf",
            r#"{"cniVersion":"1.0.0","name":"c","type":"bridge"}"#,
        );
        let names = |limit| {
            let found = Directory::read(dir.path(), limit).unwrap();
            assert_eq!(found.rejected.len(), 2);
            found
                .networks
                .iter()
                .map(|n| n.name().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(1), ["b"]);
        assert_eq!(names(0), ["b", "c"]);
        let absent = Directory::read(&dir.path().join("absent"), 1).unwrap();
        assert!(absent.networks.is_empty() && absent.rejected.is_empty());
    }
}
