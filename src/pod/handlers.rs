//! The table of runtime handlers (CRI `runtime_handler`, Kubernetes RuntimeClass).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use slipway_check::{Identity, RuntimeFacts};
use slipway_config::{Config, Runtime, RuntimeKind};
use slipway_proto::keeper;

use super::error::PodError;
use super::probe;

/// What pods of a handler can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Mounts that are read-only with all their submounts.
    pub recursive_read_only_mounts: bool,
    /// User namespaces, with the pod's own network and with the host's.
    pub user_namespaces: bool,
}

impl Features {
    /// What this machine has, found by trying it.
    pub fn detect(state_root: &Path) -> Self {
        let users = slipway_check::user_namespaces(state_root);
        if let Err(e) = &users {
            tracing::info!(
                reason = e.to_string(),
                "pods can't have user namespaces on this machine"
            );
        }
        Self {
            recursive_read_only_mounts: probe::recursive_read_only_mounts(),
            user_namespaces: users.is_ok(),
        }
    }
}

/// What a pod keeps of its handler, whatever becomes of the configuration: with this its containers are made, stopped
/// and removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Driver {
    /// The handler as it was described when the pod was made.
    pub settings: Runtime,
    /// Its program; absolute.
    pub path: PathBuf,
    /// Directory of its state.
    pub root: PathBuf,
    /// Its containers of a pod share a sandbox, which is made first.
    #[serde(default)]
    pub pod_sandbox: bool,
    /// It is youki's command line.
    #[serde(default)]
    pub youki: bool,
}

impl Driver {
    /// For the pod's keeper.
    pub fn for_keeper(&self, handler: &str, config: &Config) -> keeper::Runtime {
        let kind = match self.settings.kind {
            RuntimeKind::Native => keeper::RuntimeKind::Native,
            RuntimeKind::Oci => keeper::RuntimeKind::Oci,
            RuntimeKind::ShimV2 => keeper::RuntimeKind::ShimV2,
        };
        let timeout = self.settings.create_timeout;
        let timeout = timeout.unwrap_or(config.limits.create_timeout);
        keeper::Runtime {
            kind: kind.into(),
            handler: handler.to_owned(),
            path: self.path.to_string_lossy().into_owned(),
            root: self.root.to_string_lossy().into_owned(),
            arguments: self.settings.options.arguments().to_vec(),
            create_timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            options: self.settings.options.toml(),
            pod_sandbox: self.pod_sandbox,
            youki: self.youki,
        }
    }
}

impl Driver {
    /// Ends what a keeper that died has left of a container in its runtime's state. Blocks, for a few seconds at most; does
    /// nothing where nothing is left.
    pub fn forget(&self, id: &str) {
        let state = self.root.join(id);
        if !state.is_dir() {
            return;
        }
        let root = self.root.to_string_lossy();
        let arguments = ["--root", &root, "delete", "--force", id];
        if let Err(reason) = slipway_check::tell_runtime(&self.path, &arguments) {
            tracing::warn!(container = id, reason, "its runtime can't delete it");
        }
        if let Err(error) = std::fs::remove_dir_all(&state)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(container = id, state = %state.display(), %error, "its state can't be removed");
        }
    }
}

/// What is known of a runtime's program.
#[derive(Debug, Clone)]
struct Known {
    path: PathBuf,
    /// The file that gave the answer.
    file: Identity,
    facts: RuntimeFacts,
}

/// A configured handler.
#[derive(Debug)]
pub struct Handler {
    /// Its name in the table.
    pub name: String,
    /// As it is configured.
    pub settings: Runtime,
    /// What this machine has.
    here: Features,
    root: PathBuf,
    /// What its program said last; not of a native one.
    answer: Mutex<Option<Result<Known, String>>>,
    /// Held while the program is asked, so that many pods ask once.
    asking: tokio::sync::Mutex<()>,
}

/// How a handler is, for the operator.
#[derive(Debug, Serialize)]
pub struct Report {
    /// "native", "oci" or "shim-v2".
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Whether pods can have it; `None`: nobody has asked yet.
    pub usable: Option<bool>,
    /// Its program, if it was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What the program says of itself.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub facts: Option<RuntimeFacts>,
    /// Why pods can't have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Handler {
    fn new(name: &str, settings: &Runtime, config: &Config, here: Features) -> Self {
        let root = settings.root.clone();
        Self {
            name: name.to_owned(),
            settings: settings.clone(),
            here,
            root: root.unwrap_or_else(|| config.run_root.join("runtimes").join(name)),
            answer: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    /// What its pods can use on this machine, as far as is known by now.
    pub fn features(&self) -> Features {
        let user_namespaces = match self.settings.kind {
            RuntimeKind::Native => true,
            // Owners of files are mapped before the runtime sees a mount, so it only has to join the namespace.
            RuntimeKind::Oci => {
                let answer = self.answer.lock();
                matches!(&*answer, Some(Ok(known)) if known.facts.user_namespaces)
                    && slipway_runtime::stage_places().is_ok()
            }
            // A shim mounts in a namespace that it shares with its pod's other containers.
            RuntimeKind::ShimV2 => false,
        };
        Features {
            user_namespaces: user_namespaces && self.here.user_namespaces,
            // Recursive options are set before the runtime binds what has them.
            ..self.here
        }
    }

    /// Why its pods have no user namespaces, at the end of a sentence.
    pub fn no_user_namespaces(&self) -> String {
        let why = match self.settings.kind {
            _ if !self.here.user_namespaces => "on this machine; slipway check says why",
            RuntimeKind::ShimV2 => {
                "in this version: only those of type \"native\" and \"oci\" have"
            }
            _ if slipway_runtime::stage_places().is_err() => {
                "on a kernel with neither debugfs nor pstore: there is no place where they could find their files"
            }
            _ => {
                let answer = self.answer.lock();
                let facts = answer.as_ref().and_then(|known| known.as_ref().ok());
                let notes = facts.map(|known| known.facts.notes.join("; "));
                return format!("that can be relied on ({})", notes.unwrap_or_default());
            }
        };
        why.to_owned()
    }

    /// What a new pod of this handler keeps of it; `None` for a native one. Asks the program what it can do, unless that
    /// is known and the program's file is still the same.
    ///
    /// # Errors
    /// [`PodError::HandlerUnusable`].
    pub async fn driver(self: &Arc<Self>) -> Result<Option<Driver>, PodError> {
        if self.settings.kind == RuntimeKind::Native {
            return Ok(None);
        }
        let known = match self.current() {
            Some(known) => known,
            None => self
                .ask()
                .await
                .map_err(|reason| PodError::HandlerUnusable {
                    handler: self.name.clone(),
                    reason,
                })?,
        };
        Ok(Some(Driver {
            settings: self.settings.clone(),
            path: known.path,
            root: self.root.clone(),
            pod_sandbox: known.facts.pod_sandbox,
            youki: known.facts.youki,
        }))
    }

    /// What is known, if it still holds.
    fn current(&self) -> Option<Known> {
        let known = self.answer.lock().clone()?.ok()?;
        (Identity::of(&known.path) == Some(known.file)).then_some(known)
    }

    /// Asks the program, or waits for who is asking.
    async fn ask(self: &Arc<Self>) -> Result<Known, String> {
        let _one = self.asking.lock().await;
        if let Some(known) = self.current() {
            return Ok(known);
        }
        let (kind, program) = (self.settings.kind, self.settings.program(&self.name));
        let asked = tokio::task::spawn_blocking(move || ask(kind, &program));
        let answer = asked.await.unwrap_or_else(|e| Err(e.to_string()));
        let before = self.answer.lock().replace(answer.clone());
        match &answer {
            Ok(known) => {
                tracing::info!(handler = self.name, path = %known.path.display(), version = known.facts.version,
                    "runtime handler can be used");
            }
            Err(reason) if !matches!(&before, Some(Err(old)) if old == reason) => {
                tracing::warn!(handler = self.name, reason, "runtime handler can't be used");
            }
            Err(_) => {}
        }
        answer
    }

    /// How it is.
    pub fn report(&self) -> Report {
        let mut report = Report {
            kind: self.settings.kind.as_str(),
            usable: Some(true),
            path: None,
            facts: None,
            reason: None,
        };
        if self.settings.kind == RuntimeKind::Native {
            return report;
        }
        match self.answer.lock().clone() {
            None => report.usable = None,
            Some(Ok(known)) => {
                (report.path, report.facts) = (Some(known.path), Some(known.facts));
            }
            Some(Err(reason)) => {
                report.usable = Some(false);
                report.reason = Some(reason);
            }
        }
        report
    }
}

fn ask(kind: RuntimeKind, program: &Path) -> Result<Known, String> {
    let shim = kind == RuntimeKind::ShimV2;
    let name = match shim {
        true => slipway_check::shim_program(program),
        false => program.to_owned(),
    };
    let path = slipway_check::find_program(&name)?;
    let file = Identity::of(&path).ok_or_else(|| format!("{} is gone", path.display()))?;
    let facts = match shim {
        true => slipway_check::ask_shim(&path)?,
        false => slipway_check::ask_runtime(&path)?,
    };
    Ok(Known { path, file, facts })
}

/// The handlers by name.
#[derive(Debug, Clone)]
pub struct Runtimes {
    default: String,
    table: BTreeMap<String, Arc<Handler>>,
}

impl Runtimes {
    /// The table that the configuration describes, with the features that this machine has. What is known of handlers
    /// that are in `before` as they are here is kept.
    pub fn new(config: &Config, here: Features, before: Option<&Self>) -> Self {
        let entries = config.runtimes.iter().map(|(name, settings)| {
            let new = Handler::new(name, settings, config, here);
            let old = before.and_then(|before| before.table.get(name));
            let same = |old: &&Arc<Handler>| old.settings == new.settings && old.root == new.root;
            let handler = old.filter(same).cloned().unwrap_or_else(|| Arc::new(new));
            (name.clone(), handler)
        });
        Self {
            default: config.default_runtime.clone(),
            table: entries.collect(),
        }
    }

    /// Asks every runtime of others that was not asked, or whose program is another now.
    pub async fn ask_all(self: Arc<Self>) {
        let others = self.table.values();
        let others = others.filter(|handler| handler.settings.kind != RuntimeKind::Native);
        let stale = others.filter(|handler| handler.current().is_none());
        let asked: Vec<_> = stale.map(Handler::ask).collect();
        futures_util::future::join_all(asked).await;
    }

    /// Whether there is a runtime of others that nobody has asked yet.
    pub fn unasked(&self) -> bool {
        let mut others = self.table.values();
        others.any(|handler| {
            handler.settings.kind != RuntimeKind::Native && handler.answer.lock().is_none()
        })
    }

    /// The handler of this name; the empty name is the default's.
    ///
    /// # Errors
    /// [`PodError::UnknownHandler`], which names those that are known.
    pub fn resolve(&self, asked: &str) -> Result<Arc<Handler>, PodError> {
        let name = if asked.is_empty() {
            &self.default
        } else {
            asked
        };
        match self.table.get(name) {
            Some(handler) => Ok(handler.clone()),
            None => {
                let known: Vec<_> = self.table.keys().map(|name| format!("{name:?}")).collect();
                let known = known.join(", ");
                Err(PodError::UnknownHandler {
                    handler: name.to_owned(),
                    known,
                })
            }
        }
    }

    /// Every name that a pod may ask for, the empty one first.
    pub fn list(&self) -> Vec<(String, Arc<Handler>)> {
        let default = self
            .table
            .get(&self.default)
            .map(|handler| (String::new(), handler.clone()));
        let named = self
            .table
            .iter()
            .map(|(name, handler)| (name.clone(), handler.clone()));
        default.into_iter().chain(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Features = Features {
        recursive_read_only_mounts: true,
        user_namespaces: false,
    };

    #[test]
    fn the_empty_name_is_the_default_and_unknown_ones_are_refused() {
        let runtimes = Runtimes::new(&Config::default(), HERE, None);
        let handler = runtimes.resolve("").unwrap();
        assert_eq!(
            (handler.name.as_str(), handler.settings.kind),
            ("native", RuntimeKind::Native)
        );
        assert!(handler.features().recursive_read_only_mounts);
        assert!(!handler.features().user_namespaces);
        assert_eq!(runtimes.resolve("native").unwrap().name, "native");
        let error = runtimes.resolve("kata").unwrap_err().to_string();
        assert!(
            error.contains("\"kata\"") && error.contains("\"native\""),
            "{error}"
        );
        let names: Vec<_> = runtimes.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["", "native"]);
    }

    #[tokio::test]
    async fn a_program_is_asked_once_and_again_when_it_is_another() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crun");
        let mut config = Config::default();
        let settings = Runtime {
            kind: RuntimeKind::Oci,
            path: Some(path.clone()),
            ..Runtime::default()
        };
        config.runtimes.insert("crun".into(), settings.clone());
        let runtimes = Runtimes::new(&config, HERE, None);
        let handler = runtimes.resolve("crun").unwrap();
        assert_eq!(handler.report().usable, None);
        let error = handler.driver().await.unwrap_err().to_string();
        assert!(
            error.contains("crun") && error.contains(&*path.to_string_lossy()),
            "{error}"
        );
        assert_eq!(handler.report().usable, Some(false));
        let install = |version: &str| {
            let draft = dir.path().join("draft");
            std::fs::write(&draft, format!("#!/bin/sh\necho {version}\n")).unwrap();
            std::fs::set_permissions(&draft, PermissionsExt::from_mode(0o755)).unwrap();
            let _ = std::fs::remove_file(&path);
            let copied = std::process::Command::new("cp")
                .args([&draft, &path])
                .status();
            assert!(copied.unwrap().success());
        };
        install("one");
        let driver = handler.driver().await.unwrap().unwrap();
        assert_eq!(driver.path, path);
        assert_eq!(driver.root, Path::new("/run/slipway/runtimes/crun"));
        assert_eq!(handler.report().facts.unwrap().version, "one");
        // The same table after a reload, and another program.
        let runtimes = Runtimes::new(&config, HERE, Some(&runtimes));
        assert!(Arc::ptr_eq(&handler, &runtimes.resolve("crun").unwrap()));
        install("two, which is longer");
        Arc::new(runtimes.clone()).ask_all().await;
        assert_eq!(
            handler.report().facts.unwrap().version,
            "two, which is longer"
        );
        config.runtimes.insert(
            "crun".into(),
            Runtime {
                root: Some("/x".into()),
                ..settings
            },
        );
        let runtimes = Runtimes::new(&config, HERE, Some(&runtimes));
        let driver = runtimes.resolve("crun").unwrap().driver().await.unwrap();
        assert_eq!(driver.unwrap().root, Path::new("/x"));
    }
}
