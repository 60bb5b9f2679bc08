//! CDI devices of a container: those that its configuration names, and those that its annotations ask for.

use slipway_cdi::{Cdi, CdiError};
use slipway_proto::cri;
use slipway_spec::ContainerPlan;

use super::error::PodError;
use super::names::title;

/// Adds to a container's plan what its CDI devices need. Without any this does nothing and looks at nothing.
///
/// # Errors
/// [`PodError::Cdi`] and [`PodError::CdiEdits`], which name the device.
pub fn inject(
    cdi: &Cdi,
    config: &cri::ContainerConfig,
    plan: &mut ContainerPlan,
) -> Result<(), PodError> {
    let failed = |source| PodError::Cdi {
        container: title(config),
        source,
    };
    let mut names: Vec<String> = config.cdi_devices.iter().map(|d| d.name.clone()).collect();
    let annotated = slipway_cdi::from_annotations(&config.annotations)
        .map_err(|e| failed(CdiError::Name(e)))?;
    for name in annotated {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    inject_named(cdi, config, &names, plan)
}

/// Adds to a container's plan what these CDI devices need.
///
/// # Errors
/// As [`inject`].
pub fn inject_named(
    cdi: &Cdi,
    config: &cri::ContainerConfig,
    names: &[String],
    plan: &mut ContainerPlan,
) -> Result<(), PodError> {
    if names.is_empty() {
        return Ok(());
    }
    let edits = cdi.resolve(names).map_err(|source| PodError::Cdi {
        container: title(config),
        source,
    })?;
    edits
        .apply(&mut plan.spec)
        .map_err(|source| PodError::CdiEdits {
            container: title(config),
            source,
        })?;
    carry_over(plan).map_err(|e| PodError::Invalid(format!("{}: {e}", title(config))))
}

/// Makes the keeper's call say what a changed specification says: variables and groups stand in both.
fn carry_over(plan: &mut ContainerPlan) -> Result<(), serde_json::Error> {
    let process = plan.spec.process().as_ref();
    let env = process.and_then(|p| p.env().as_ref()).into_iter().flatten();
    for variable in env {
        let bytes = variable.as_bytes();
        if plan.create.env.iter().any(|other| other == bytes) {
            continue;
        }
        let name = variable.split_once('=').map_or("", |(name, _)| name);
        let same = |other: &[u8]| {
            other
                .strip_prefix(name.as_bytes())
                .is_some_and(|rest| rest.first() == Some(&b'='))
        };
        plan.create.env.retain(|other| !same(other));
        plan.create.env.push(bytes.to_vec());
    }
    let groups = process.and_then(|p| p.user().additional_gids().as_ref());
    let groups: Vec<i64> = groups
        .into_iter()
        .flatten()
        .map(|gid| i64::from(*gid))
        .collect();
    if !groups.is_empty() {
        let user = plan.create.user.get_or_insert_default();
        for gid in groups {
            if !user.supplemental_groups.contains(&gid) {
                user.supplemental_groups.push(gid);
            }
        }
    }
    plan.create.spec = serde_json::to_vec(&plan.spec)?;
    Ok(())
}
