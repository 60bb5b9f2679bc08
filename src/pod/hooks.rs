//! OCI hooks that the node's directories give to a container.

use std::collections::BTreeMap;

use slipway_hooks::{Hooks, Stage, Subject};
use slipway_proto::cri;
use slipway_spec::ContainerPlan;

use super::error::PodError;
use super::record::PodRecord;

/// What nobody runs for native containers in this version.
const NOT_NATIVE: &[Stage] = &[Stage::Poststart, Stage::Poststop];

/// Adds to a container's plan the hooks that apply to it. Looks at the directories.
///
/// # Errors
/// [`PodError::Unsupported`] for one that would never run; [`PodError::Invalid`] when the specification can't be
/// written.
pub fn inject(
    hooks: &Hooks,
    id: &str,
    pod: &PodRecord,
    config: &cri::ContainerConfig,
    plan: &mut ContainerPlan,
) -> Result<(), PodError> {
    let mut annotations = BTreeMap::new();
    annotations.extend(plan.spec.annotations().clone().unwrap_or_default());
    for more in [&pod.config.annotations, &config.annotations] {
        annotations.extend(more.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    let args = plan.spec.process().as_ref().and_then(|p| p.args().clone());
    let command = args
        .and_then(|args| args.into_iter().next())
        .unwrap_or_default();
    let subject = Subject {
        annotations: &annotations,
        command: &command,
        has_bind_mounts: !config.mounts.is_empty(),
    };
    let beyond = match pod.driver {
        None => NOT_NATIVE,
        Some(_) => &[],
    };
    let before = plan.spec.hooks().clone();
    let loaded = hooks.now();
    loaded
        .inject(&mut plan.spec, subject, beyond)
        .map_err(|(file, program)| {
            PodError::Unsupported(format!(
                "container {id}: the hook {} of {} would never run: hooks of kind poststart and poststop are not there \
                 yet in this version for handlers of type \"native\"; createRuntime, createContainer, startContainer \
                 and prestart are",
                program.display(),
                file.display()
            ))
        })?;
    if *plan.spec.hooks() != before {
        plan.create.spec = serde_json::to_vec(&plan.spec)
            .map_err(|e| PodError::Invalid(format!("container {id}: {e}")))?;
    }
    Ok(())
}
