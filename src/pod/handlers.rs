//! The table of runtime handlers (CRI `runtime_handler`, Kubernetes RuntimeClass).

use std::collections::BTreeMap;
use std::path::Path;

use slipway_config::{Config, RuntimeKind};

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

/// A configured handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handler {
    /// How it makes containers.
    pub kind: RuntimeKind,
    /// What it can do on this machine.
    pub features: Features,
}

/// The handlers by name.
#[derive(Debug, Clone)]
pub struct Runtimes {
    default: String,
    table: BTreeMap<String, Handler>,
}

impl Runtimes {
    /// The table that the configuration describes, with the features that this machine has.
    pub fn new(config: &Config, here: Features) -> Self {
        let table = config
            .runtimes
            .iter()
            .map(|(name, runtime)| {
                let features = match runtime.kind {
                    RuntimeKind::Native => here,
                };
                (
                    name.clone(),
                    Handler {
                        kind: runtime.kind,
                        features,
                    },
                )
            })
            .collect();
        Self {
            default: config.default_runtime.clone(),
            table,
        }
    }

    /// The handler's name in the table; the empty name is the default's.
    ///
    /// # Errors
    /// [`PodError::UnknownHandler`], which names those that are known.
    pub fn resolve(&self, asked: &str) -> Result<(String, Handler), PodError> {
        let name = if asked.is_empty() {
            &self.default
        } else {
            asked
        };
        match self.table.get(name) {
            Some(handler) => Ok((name.to_owned(), *handler)),
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
    pub fn list(&self) -> Vec<(String, Handler)> {
        let default = self
            .table
            .get(&self.default)
            .map(|handler| (String::new(), *handler));
        let named = self
            .table
            .iter()
            .map(|(name, handler)| (name.clone(), *handler));
        default.into_iter().chain(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_name_is_the_default_and_unknown_ones_are_refused() {
        let here = Features {
            recursive_read_only_mounts: true,
            user_namespaces: false,
        };
        let runtimes = Runtimes::new(&Config::default(), here);
        let (name, handler) = runtimes.resolve("").unwrap();
        assert_eq!(
            (name.as_str(), handler.kind),
            ("native", RuntimeKind::Native)
        );
        assert!(handler.features.recursive_read_only_mounts);
        assert!(!handler.features.user_namespaces);
        assert_eq!(runtimes.resolve("native").unwrap().0, "native");
        let error = runtimes.resolve("kata").unwrap_err().to_string();
        assert!(
            error.contains("\"kata\"") && error.contains("\"native\""),
            "{error}"
        );
        let names: Vec<_> = runtimes.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["", "native"]);
    }
}
