//! The directories: read when something in them has changed.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::Spec;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::file::{Entry, Subject};

/// The largest file that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// The hooks of some directories.
#[derive(Debug, Default)]
pub struct Hooks {
    dirs: Vec<PathBuf>,
    last: Mutex<Option<(Vec<Seen>, Arc<Loaded>)>>,
}

/// A file as it was when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    path: PathBuf,
    identity: [u64; 5],
}

/// What was found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// By name of the file, which is their order.
    entries: BTreeMap<String, (PathBuf, Entry)>,
    rejected: Vec<Rejected>,
}

/// A file, or directory, that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rejected {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// What there is, for the operator.
#[derive(Debug, Serialize)]
pub struct Inventory<'a> {
    /// Files whose hooks are applied.
    pub files: Vec<&'a Path>,
    /// Those that can't be.
    pub rejected: &'a [Rejected],
}

impl Hooks {
    /// Those of these directories, of which later ones win; a directory need not exist.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self {
            dirs,
            last: Mutex::default(),
        }
    }

    /// What there is now. Blocks for as long as the directories' file systems do.
    pub fn now(&self) -> Arc<Loaded> {
        let (seen, mut rejected) = self.look();
        let mut last = self.last.lock();
        if let Some((before, loaded)) = &*last
            && *before == seen
        {
            return loaded.clone();
        }
        let mut loaded = Loaded::default();
        for Seen { path, .. } in &seen {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match read(path).and_then(|text| Entry::parse(&text)) {
                Ok(entry) => {
                    let entry = (path.clone(), entry);
                    loaded.entries.insert(name.into_owned(), entry);
                }
                Err(reason) => {
                    // It covers one of its name in an earlier directory all the same: what the operator has put above that is
                    // not to be undone by a slip.
                    loaded.entries.remove(&*name);
                    rejected.push(Rejected {
                        path: path.clone(),
                        reason,
                    });
                }
            }
        }
        for Rejected { path, reason } in &rejected {
            tracing::warn!(file = %path.display(), reason, "OCI hook can't be used");
        }
        loaded.rejected = rejected;
        let loaded = Arc::new(loaded);
        *last = Some((seen, loaded.clone()));
        loaded
    }

    fn look(&self) -> (Vec<Seen>, Vec<Rejected>) {
        let (mut seen, mut rejected) = (Vec::new(), Vec::new());
        for dir in &self.dirs {
            match files(dir) {
                Ok(found) => seen.extend(found),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => rejected.push(Rejected {
                    path: dir.clone(),
                    reason: e.to_string(),
                }),
            }
        }
        (seen, rejected)
    }
}

impl Loaded {
    /// Adds to a specification the hooks that apply to a container, in the order of their files' names.
    pub fn inject(&self, spec: &mut Spec, subject: Subject<'_>) {
        let entries = self.entries.values().map(|(_, entry)| entry);
        for entry in entries.filter(|entry| entry.applies(subject)) {
            entry.add_to(spec);
        }
    }

    /// What there is.
    pub fn inventory(&self) -> Inventory<'_> {
        Inventory {
            files: self
                .entries
                .values()
                .map(|(path, _)| path.as_path())
                .collect(),
            rejected: &self.rejected,
        }
    }
}

/// The files of a directory, by name.
fn files(dir: &Path) -> io::Result<Vec<Seen>> {
    use std::os::unix::fs::MetadataExt as _;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        // One that goes while we look was not there; a link to nothing is told of when it is read.
        let identity = std::fs::metadata(&path).map_or([0; 5], |m| {
            let changed = [m.ctime().cast_unsigned(), m.ctime_nsec().cast_unsigned()];
            [m.dev(), m.ino(), m.size(), changed[0], changed[1]]
        });
        found.push(Seen { path, identity });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    use std::io::Read as _;
    // Not to wait for ever on what isn't a file.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = rustix::fs::open(path, flags, Mode::empty());
    let file = std::fs::File::from(open.map_err(|e| e.to_string())?);
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err("it is no regular file".to_owned());
    }
    let mut text = Vec::new();
    let limited = file.take(LARGEST + 1).read_to_end(&mut text);
    limited.map_err(|e| e.to_string())?;
    if text.len() as u64 > LARGEST {
        return Err(format!("it is larger than {LARGEST} bytes"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(args: &str) -> String {
        format!(
            r#"{{"version":"1.0.0","hook":{{"path":"/bin/sh","args":["{args}"]}},"when":{{"always":true}},
                "stages":["createRuntime"]}}"#
        )
    }

    fn args(hooks: &Hooks) -> Vec<String> {
        let (mut spec, annotations) = (Spec::default(), BTreeMap::new());
        let subject = Subject {
            annotations: &annotations,
            command: "x",
            has_bind_mounts: false,
        };
        hooks.now().inject(&mut spec, subject);
        let hooks = spec.hooks().clone().unwrap_or_default();
        let list = hooks.create_runtime().clone().unwrap_or_default();
        list.iter()
            .flat_map(|h| h.args().clone().unwrap())
            .collect()
    }

    #[test]
    fn later_directories_win_and_changes_are_seen() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let missing = one.path().join("missing");
        let hooks = Hooks::new(vec![missing, one.path().into(), two.path().into()]);
        assert!(args(&hooks).is_empty());
        std::fs::write(one.path().join("20-b.json"), hook("b")).unwrap();
        std::fs::write(one.path().join("10-a.json"), hook("a")).unwrap();
        std::fs::write(one.path().join("notes.txt"), "no hook").unwrap();
        std::fs::write(one.path().join(".hidden.json"), "{").unwrap();
        assert_eq!(args(&hooks), ["a", "b"]);
        std::fs::write(two.path().join("10-a.json"), hook("other")).unwrap();
        assert_eq!(args(&hooks), ["other", "b"]);
        std::fs::write(one.path().join("30-broken.json"), "{").unwrap();
        assert_eq!(args(&hooks), ["other", "b"]);
        let now = hooks.now();
        assert_eq!(now.inventory().files.len(), 2);
        assert_eq!(now.inventory().rejected.len(), 1);
        assert!(now.inventory().rejected[0].path.ends_with("30-broken.json"));
        assert!(
            Arc::ptr_eq(&now, &hooks.now()),
            "read again without a change"
        );
        std::fs::remove_file(one.path().join("20-b.json")).unwrap();
        assert_eq!(args(&hooks), ["other"]);
    }
}
