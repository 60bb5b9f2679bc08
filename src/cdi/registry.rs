//! The devices that this node's CDI files describe.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::edits::Edits;
use crate::file::{CdiFile, FileError};
use crate::name::{DeviceName, NameError};

/// The node's CDI files. They are looked at only when a device is asked for, and read only when they changed;
/// so a vendor's tool may write them at any time.
#[derive(Debug)]
pub struct Cdi {
    dirs: Vec<PathBuf>,
    read: Mutex<Option<(Vec<Stamp>, Arc<Contents>)>>,
}

/// Why devices can't be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CdiError {
    /// A name that can't be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No file describes it.
    #[error(
        "there is no CDI device {name}; searched {}{}",
        listed(searched),
        rejected_too(rejected)
    )]
    Unknown {
        /// The device.
        name: String,
        /// The directories.
        searched: Vec<PathBuf>,
        /// Files that can't be used, among which it may have been.
        rejected: Vec<FileError>,
    },
    /// Several files of one directory describe it.
    #[error("CDI device {name} stands in {} files of the same priority: {}; remove all but one", files.len(), listed(files))]
    Conflict {
        /// The device.
        name: String,
        /// The files.
        files: Vec<PathBuf>,
    },
}

fn listed(paths: &[PathBuf]) -> String {
    let shown: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    if shown.is_empty() {
        return "no directories".to_owned();
    }
    shown.join(", ")
}

fn rejected_too(rejected: &[FileError]) -> String {
    let shown: Vec<_> = rejected.iter().take(3).map(ToString::to_string).collect();
    if shown.is_empty() {
        return String::new();
    }
    format!("; passed over: {}", shown.join("; "))
}

/// What was found on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Full names of the devices that can be used, sorted.
    pub devices: Vec<String>,
    /// Devices that several files of the same priority describe.
    pub conflicts: Vec<String>,
    /// Files that can't be used.
    pub rejected: Vec<FileError>,
}

/// What changes when a file or directory does.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    size: u64,
    changed: Option<SystemTime>,
    status_changed: (i64, i64),
}

#[derive(Debug, Default)]
struct Contents {
    devices: BTreeMap<String, Place>,
    rejected: Vec<FileError>,
}

#[derive(Debug)]
struct Place {
    priority: usize,
    path: PathBuf,
    file: Arc<CdiFile>,
    index: usize,
    /// Further files of the same priority.
    others: Vec<PathBuf>,
}

impl Cdi {
    /// Files of these directories, of which later ones win. None has to exist.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self {
            dirs,
            read: Mutex::default(),
        }
    }

    /// What the devices of these names need. Blocks on the file system.
    ///
    /// # Errors
    /// [`CdiError`], which names the device.
    pub fn resolve<S: AsRef<str>>(&self, names: &[S]) -> Result<Edits, CdiError> {
        let mut edits = Edits::default();
        if names.is_empty() {
            return Ok(edits);
        }
        let contents = self.contents();
        for name in names {
            let name = DeviceName::parse(name.as_ref())?.to_string();
            let Some(place) = contents.devices.get(&name) else {
                return Err(CdiError::Unknown {
                    name,
                    searched: self.dirs.clone(),
                    rejected: contents.rejected.clone(),
                });
            };
            if !place.others.is_empty() {
                let first = std::iter::once(&place.path);
                let files = first.chain(&place.others).cloned().collect();
                return Err(CdiError::Conflict { name, files });
            }
            edits.add(&place.path, &place.file, place.index);
        }
        Ok(edits)
    }

    /// What is there now. Blocks on the file system.
    pub fn inventory(&self) -> Inventory {
        let contents = self.contents();
        let names = |conflict: bool| {
            let some = contents.devices.iter();
            some.filter(|(_, place)| place.others.is_empty() != conflict)
                .map(|(name, _)| name.clone())
                .collect()
        };
        Inventory {
            devices: names(false),
            conflicts: names(true),
            rejected: contents.rejected.clone(),
        }
    }

    fn contents(&self) -> Arc<Contents> {
        let mut read = self.read.lock();
        let (stamps, files, unreadable) = look(&self.dirs);
        if let Some((known, contents)) = &*read
            && *known == stamps
            && unreadable.is_empty()
        {
            return Arc::clone(contents);
        }
        let mut contents = Contents {
            rejected: unreadable,
            ..Contents::default()
        };
        for (priority, path) in files {
            match CdiFile::read(&path) {
                Ok(file) => contents.add(priority, &path, &Arc::new(file)),
                Err(error) => {
                    tracing::warn!(%error, "a CDI file is passed over");
                    contents.rejected.push(error);
                }
            }
        }
        let contents = Arc::new(contents);
        *read = Some((stamps, Arc::clone(&contents)));
        contents
    }
}

impl Contents {
    fn add(&mut self, priority: usize, path: &Path, file: &Arc<CdiFile>) {
        for (index, device) in file.devices.iter().enumerate() {
            let name = format!("{}={}", file.kind, device.name);
            match self.devices.get_mut(&name) {
                Some(place) if place.priority == priority => place.others.push(path.to_owned()),
                // Directories come in the order of their priority.
                _ => {
                    let place = Place {
                        priority,
                        path: path.to_owned(),
                        file: Arc::clone(file),
                        index,
                        others: Vec::new(),
                    };
                    self.devices.insert(name, place);
                }
            }
        }
    }
}

type Look = (Vec<Stamp>, Vec<(usize, PathBuf)>, Vec<FileError>);

/// The CDI files that there are, without reading them.
fn look(dirs: &[PathBuf]) -> Look {
    use std::os::unix::fs::MetadataExt;
    let (mut stamps, mut files, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
    for (priority, dir) in dirs.iter().enumerate() {
        let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut paths: Vec<_> = match entries {
            Ok(entries) => entries.iter().map(std::fs::DirEntry::path).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => {
                let (path, reason) = (dir.clone(), format!("can't list the directory: {e}"));
                unreadable.push(FileError { path, reason });
                continue;
            }
        };
        paths.retain(|path| path.extension().is_some_and(|e| e == "json" || e == "yaml"));
        paths.sort();
        for path in paths {
            // One that goes meanwhile is not there; a broken link is told when it is read.
            let found = std::fs::metadata(&path);
            if found.as_ref().is_ok_and(std::fs::Metadata::is_dir) {
                continue;
            }
            stamps.push(Stamp {
                path: path.clone(),
                inode: found.as_ref().map_or(0, MetadataExt::ino),
                size: found.as_ref().map_or(0, std::fs::Metadata::len),
                changed: found.as_ref().ok().and_then(|f| f.modified().ok()),
                status_changed: found
                    .as_ref()
                    .map_or((0, 0), |f| (f.ctime(), f.ctime_nsec())),
            });
            files.push((priority, path));
        }
    }
    (stamps, files, unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(version: &str, kind: &str, devices: &[&str]) -> String {
        let device = |name: &&str| {
            format!(r#"{{"name":"{name}","containerEdits":{{"env":["FROM={version}{name}"]}}}}"#)
        };
        let devices: Vec<_> = devices.iter().map(device).collect();
        format!(
            r#"{{"cdiVersion":"{version}","kind":"{kind}","devices":[{}]}}"#,
            devices.join(",")
        )
    }

    fn env(cdi: &Cdi, name: &str) -> Vec<String> {
        let mut spec = oci_spec::runtime::Spec::default();
        spec.set_process(Some(Default::default()));
        cdi.resolve(&[name]).unwrap().apply(&mut spec).unwrap();
        let process = spec.process().clone().unwrap();
        let own = process.env().clone().unwrap_or_default();
        own.into_iter().filter(|v| v.starts_with("FROM=")).collect()
    }

    #[test]
    fn later_directories_win_and_changes_are_seen() {
        let (low, high) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let missing = low.path().join("missing");
        let dirs = [missing.as_path(), low.path(), high.path()].map(Path::to_owned);
        let cdi = Cdi::new(dirs.to_vec());
        let error = cdi.resolve(&["v/c=a"]).unwrap_err().to_string();
        assert!(error.contains("v/c=a") && error.contains(&*low.path().to_string_lossy()));
        std::fs::write(low.path().join("x.json"), file("0.3.0", "v/c", &["a", "b"])).unwrap();
        assert_eq!(env(&cdi, "v/c=a"), ["FROM=0.3.0a"]);
        std::fs::write(high.path().join("y.yaml"), file("0.5.0", "v/c", &["a"])).unwrap();
        assert_eq!(env(&cdi, "v/c=a"), ["FROM=0.5.0a"]);
        assert_eq!(env(&cdi, "v/c=b"), ["FROM=0.3.0b"]);
        std::fs::remove_file(high.path().join("y.yaml")).unwrap();
        assert_eq!(env(&cdi, "v/c=a"), ["FROM=0.3.0a"]);
        assert_eq!(cdi.inventory().devices, ["v/c=a", "v/c=b"]);
    }

    #[test]
    fn a_broken_file_and_a_conflict_spoil_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("a.json", &file("0.6.0", "v/c", &["one", "both"]));
        write("b.json", &file("0.6.0", "v/c", &["two", "both"]));
        write("c.json", "{");
        write("d.yaml", ": :\n- x");
        write("readme.txt", "not for us");
        std::os::unix::fs::symlink("/no/such", dir.path().join("e.json")).unwrap();
        let cdi = Cdi::new(vec![dir.path().to_owned()]);
        let both = cdi.resolve(&["v/c=one", "v/c=two"]).unwrap();
        assert!(!both.is_empty());
        let error = cdi.resolve(&["v/c=both"]).unwrap_err().to_string();
        assert!(
            error.contains("a.json") && error.contains("b.json"),
            "{error}"
        );
        let error = cdi.resolve(&["v/c=three"]).unwrap_err().to_string();
        assert!(error.contains("c.json"), "{error}");
        let found = cdi.inventory();
        assert_eq!(found.devices, ["v/c=one", "v/c=two"]);
        assert_eq!(found.conflicts, ["v/c=both"]);
        assert_eq!(found.rejected.len(), 3);
        // A directory that is none.
        let cdi = Cdi::new(vec![dir.path().join("a.json")]);
        assert_eq!(cdi.inventory().rejected.len(), 1);
    }
}
