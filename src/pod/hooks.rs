//! OCI hooks that the node's directories give to a container.

use std::collections::BTreeMap;

use slipway_hooks::{Hooks, Subject};
use slipway_proto::cri;
use slipway_spec::ContainerPlan;

use super::error::PodError;
use super::record::PodRecord;

/// Adds to a container's plan the hooks that apply to it. Looks at the directories.
///
/// # Errors
/// [`PodError::Invalid`] when the specification can't be written.
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
    let before = plan.spec.hooks().clone();
    hooks.now().inject(&mut plan.spec, subject);
    if *plan.spec.hooks() != before {
        plan.create.spec = serde_json::to_vec(&plan.spec)
            .map_err(|e| PodError::Invalid(format!("container {id}: {e}")))?;
    }
    Ok(())
}
