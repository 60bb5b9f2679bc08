//! Filters of the List calls: all given fields must match.

use std::collections::HashMap;

use slipway_proto::cri;

use crate::pod::state::{PodStage, Stage};

/// Whether an id begins with what was asked; everything does with nothing.
fn id_fits(id: &str, asked: &str) -> bool {
    id.starts_with(asked)
}

/// Whether an object has all labels of the selector.
fn labels_fit(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// A pod's state on the wire.
pub fn pod_state(stage: PodStage) -> cri::PodSandboxState {
    match stage {
        PodStage::Ready => cri::PodSandboxState::SandboxReady,
        PodStage::NotReady | PodStage::Stopped => cri::PodSandboxState::SandboxNotready,
    }
}

/// A container's state on the wire.
pub fn container_state(stage: Stage) -> cri::ContainerState {
    match stage {
        Stage::Created => cri::ContainerState::ContainerCreated,
        Stage::Running => cri::ContainerState::ContainerRunning,
        Stage::Exited => cri::ContainerState::ContainerExited,
    }
}

/// Whether a pod passes the filter.
pub fn pod_fits(
    filter: Option<&cri::PodSandboxFilter>,
    id: &str,
    stage: PodStage,
    labels: &HashMap<String, String>,
) -> bool {
    filter.is_none_or(|f| {
        id_fits(id, &f.id)
            && f.state
                .as_ref()
                .is_none_or(|s| s.state == pod_state(stage) as i32)
            && labels_fit(labels, &f.label_selector)
    })
}

/// Whether a container passes the filter.
pub fn container_fits(
    filter: Option<&cri::ContainerFilter>,
    id: &str,
    pod_id: &str,
    stage: Stage,
    labels: &HashMap<String, String>,
) -> bool {
    filter.is_none_or(|f| {
        id_fits(id, &f.id)
            && id_fits(pod_id, &f.pod_sandbox_id)
            && f.state
                .as_ref()
                .is_none_or(|s| s.state == container_state(stage) as i32)
            && labels_fit(labels, &f.label_selector)
    })
}

/// Whether a container's statistics are asked for.
pub fn container_stats_fit(
    filter: Option<&cri::ContainerStatsFilter>,
    id: &str,
    pod_id: &str,
    labels: &HashMap<String, String>,
) -> bool {
    filter.is_none_or(|f| {
        id_fits(id, &f.id)
            && id_fits(pod_id, &f.pod_sandbox_id)
            && labels_fit(labels, &f.label_selector)
    })
}

/// Whether a pod's statistics are asked for.
pub fn pod_stats_fit(
    filter: Option<&cri::PodSandboxStatsFilter>,
    id: &str,
    labels: &HashMap<String, String>,
) -> bool {
    filter.is_none_or(|f| id_fits(id, &f.id) && labels_fit(labels, &f.label_selector))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(list: &[(&str, &str)]) -> HashMap<String, String> {
        list.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn every_given_field_must_match() {
        let has = labels(&[("app", "web"), ("tier", "front")]);
        let fits =
            |f: &cri::ContainerFilter| container_fits(Some(f), "c123", "p1", Stage::Running, &has);
        let none = cri::ContainerFilter::default();
        let state = |state| Some(cri::ContainerStateValue { state });
        assert!(container_fits(None, "c", "p", Stage::Exited, &labels(&[])));
        assert!(fits(&none));
        assert!(fits(&cri::ContainerFilter {
            id: "c1".into(),
            ..none.clone()
        }));
        assert!(!fits(&cri::ContainerFilter {
            id: "c2".into(),
            ..none.clone()
        }));
        assert!(fits(&cri::ContainerFilter {
            pod_sandbox_id: "p1".into(),
            ..none.clone()
        }));
        assert!(!fits(&cri::ContainerFilter {
            pod_sandbox_id: "p2".into(),
            ..none.clone()
        }));
        // The wire's zero is a state of its own, not "any".
        assert!(!fits(&cri::ContainerFilter {
            state: state(0),
            ..none.clone()
        }));
        assert!(fits(&cri::ContainerFilter {
            state: state(1),
            ..none.clone()
        }));
        let selector = |list: &[(&str, &str)]| cri::ContainerFilter {
            label_selector: labels(list),
            ..none.clone()
        };
        assert!(fits(&selector(&[("app", "web")])));
        assert!(!fits(&selector(&[("app", "db")])));
        assert!(!fits(&selector(&[("app", "web"), ("x", "y")])));
    }

    #[test]
    fn a_pod_is_ready_or_not() {
        let filter = |state| cri::PodSandboxFilter {
            state: Some(cri::PodSandboxStateValue { state }),
            ..Default::default()
        };
        let fits = |stage, state| pod_fits(Some(&filter(state)), "p", stage, &labels(&[]));
        assert!(fits(PodStage::Ready, 0) && !fits(PodStage::Ready, 1));
        for stage in [PodStage::NotReady, PodStage::Stopped] {
            assert!(fits(stage, 1) && !fits(stage, 0));
        }
    }
}
