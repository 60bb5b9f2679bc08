//! Walks a network's plugins (CNI specification, section 3): each one gets its configuration with
//! the previous result and what the pod asks for.

use crate::config::{Network, PluginConfig};
use crate::error::StepError;
use crate::plugin::{PluginError, Runner, Target, Verb, excerpt};
use crate::pod::runtime_config;
use crate::result::AddResult;
use serde_json::{Map, Value, json};

/// A network and how to run its plugins.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub runner: &'a Runner,
    pub network: &'a Network,
}

/// A pod's attachment as its plugins see it.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub target: Target<'a>,
    pub wishes: &'a Map<String, Value>,
}

impl Walk<'_> {
    /// ADD, first plugin to last; each gets its predecessor's result. The last one's result counts.
    pub async fn add(self, subject: Subject<'_>) -> Result<AddResult, StepError> {
        let version = self.network.version();
        let mut previous: Option<AddResult> = None;
        for plugin in self.network.plugins() {
            let input = self.input(plugin, subject.wishes, previous.as_ref());
            let step = async {
                let output = self
                    .runner
                    .run(plugin.kind(), Verb::Add, subject.target, &input)
                    .await?;
                let result = AddResult::parse(decode(&output)?, version)?;
                if result.version() == version {
                    return Ok(result);
                }
                Ok(AddResult::parse(result.to_version(version), version)?)
            };
            previous = Some(step.await.map_err(self.failed(Verb::Add, plugin))?);
        }
        // A network has at least one plugin; without one there would be nothing in the result.
        match previous {
            Some(result) => Ok(result),
            None => Err(StepError {
                verb: Verb::Add,
                plugin: String::new(),
                network: self.network.name().into(),
                file: self.network.file().into(),
                source: PluginError::Type(String::new()),
            }),
        }
    }

    /// Whether every plugin is installed. Asked before the first one runs: a plugin that is missing could
    /// not take part in undoing the ADD either.
    pub async fn installed(self) -> Result<(), StepError> {
        for plugin in self.network.plugins() {
            let found = self.runner.find(plugin.kind()).await;
            found.map_err(self.failed(Verb::Add, plugin))?;
        }
        Ok(())
    }

    /// DEL, last plugin to first. A failure does not keep the others from being run.
    pub async fn del(self, subject: Subject<'_>, result: Option<&AddResult>) -> Vec<StepError> {
        let result = result.filter(|_| self.network.version().has_check());
        let mut errors = Vec::new();
        for plugin in self.network.plugins().iter().rev() {
            let input = self.input(plugin, subject.wishes, result);
            let run = self
                .runner
                .run(plugin.kind(), Verb::Del, subject.target, &input)
                .await;
            errors.extend(run.map_err(self.failed(Verb::Del, plugin)).err());
        }
        errors
    }

    /// CHECK, first plugin to last; nothing when the network forbids it or its version lacks it.
    pub async fn check(self, subject: Subject<'_>, result: &AddResult) -> Result<(), StepError> {
        if self.network.check_disabled() || !self.network.version().has_check() {
            return Ok(());
        }
        for plugin in self.network.plugins() {
            let input = self.input(plugin, subject.wishes, Some(result));
            let run = self
                .runner
                .run(plugin.kind(), Verb::Check, subject.target, &input)
                .await;
            run.map_err(self.failed(Verb::Check, plugin))?;
        }
        Ok(())
    }

    /// GC with the attachments that are to stay; nothing when the network forbids it or its version
    /// lacks it. A failure does not keep the other plugins from being run.
    pub async fn gc(self, valid: &[(String, String)]) -> Vec<StepError> {
        let mut errors = Vec::new();
        if self.network.gc_disabled() || !self.network.version().has_status_and_gc() {
            return errors;
        }
        let valid: Vec<_> = valid
            .iter()
            .map(|(id, ifname)| json!({"containerID": id, "ifname": ifname}))
            .collect();
        for plugin in self.network.plugins() {
            let mut input = self.input(plugin, &Map::new(), None);
            input["cni.dev/valid-attachments"] = valid.clone().into();
            let run = self
                .runner
                .run(plugin.kind(), Verb::Gc, Target::default(), &input)
                .await;
            errors.extend(run.map_err(self.failed(Verb::Gc, plugin)).err());
        }
        errors
    }

    /// STATUS: whether every plugin can serve an ADD; nothing when the network's version lacks it.
    pub async fn status(self) -> Result<(), StepError> {
        if !self.network.version().has_status_and_gc() {
            return Ok(());
        }
        for plugin in self.network.plugins() {
            let input = self.input(plugin, &Map::new(), None);
            let run = self
                .runner
                .run(plugin.kind(), Verb::Status, Target::default(), &input)
                .await;
            run.map_err(self.failed(Verb::Status, plugin))?;
        }
        Ok(())
    }

    /// VERSION: whether every plugin is installed and speaks the network's version.
    pub async fn versions(self) -> Result<(), StepError> {
        let wanted = self.network.version().as_str();
        let input = json!({ "cniVersion": wanted });
        for plugin in self.network.plugins() {
            let step = async {
                let kind = plugin.kind();
                let output = self
                    .runner
                    .run(kind, Verb::Version, Target::default(), &input)
                    .await?;
                let spoken = spoken(&output)?;
                if spoken.iter().any(|v| v == wanted) {
                    return Ok(());
                }
                Err(PluginError::Version {
                    spoken,
                    wanted: wanted.into(),
                })
            };
            step.await.map_err(self.failed(Verb::Version, plugin))?;
        }
        Ok(())
    }

    /// The configuration that a plugin is executed with.
    fn input(
        self,
        plugin: &PluginConfig,
        wishes: &Map<String, Value>,
        previous: Option<&AddResult>,
    ) -> Value {
        let version = self.network.version();
        let mut input = plugin.body().clone();
        input.insert("cniVersion".into(), version.as_str().into());
        input.insert("name".into(), self.network.name().into());
        let runtime = runtime_config(plugin, wishes);
        if !runtime.is_empty() {
            input.insert("runtimeConfig".into(), runtime.into());
        }
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.to_version(version));
        }
        input.into()
    }

    fn failed(self, verb: Verb, plugin: &PluginConfig) -> impl FnOnce(PluginError) -> StepError {
        move |source| StepError {
            verb,
            plugin: plugin.kind().into(),
            network: self.network.name().into(),
            file: self.network.file().into(),
            source,
        }
    }
}

fn decode(output: &[u8]) -> Result<Value, PluginError> {
    serde_json::from_slice(output).map_err(|source| PluginError::Output {
        excerpt: excerpt(output),
        source,
    })
}

fn spoken(output: &[u8]) -> Result<Vec<String>, PluginError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        supported_versions: Vec<String>,
    }
    serde_json::from_slice(output)
        .map(|answer: Answer| answer.supported_versions)
        .map_err(|source| PluginError::Output {
            excerpt: excerpt(output),
            source,
        })
}
