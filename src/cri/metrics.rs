//! ListMetricDescriptors and ListPodSandboxMetrics.

use std::sync::Arc;

use slipway_observe::metrics::{self, BASE_LABELS, Kind, POD, Sample};
use slipway_proto::cri;

use crate::pod::stats::PodMetrics;
use crate::pod::{Node, Pod, PodError};

pub fn descriptors() -> cri::ListMetricDescriptorsResponse {
    let descriptors = metrics::ALL.iter().map(|metric| cri::MetricDescriptor {
        name: metric.name.to_owned(),
        help: metric.help.to_owned(),
        label_keys: BASE_LABELS
            .iter()
            .chain(metric.labels)
            .map(|key| (*key).to_owned())
            .collect(),
    });
    cri::ListMetricDescriptorsResponse {
        descriptors: descriptors.collect(),
    }
}

pub async fn list(node: &Arc<Node>) -> Result<cri::ListPodSandboxMetricsResponse, PodError> {
    Ok(cri::ListPodSandboxMetricsResponse {
        pod_metrics: of_pods(node, node.pods.all()),
    })
}

/// The metrics of these pods.
pub fn of_pods(node: &Node, pods: Vec<Arc<Pod>>) -> Vec<cri::PodSandboxMetrics> {
    let measured = node.measure_pods(pods);
    measured.into_iter().map(on_wire).collect()
}

fn on_wire(measured: PodMetrics) -> cri::PodSandboxMetrics {
    let PodMetrics {
        pod,
        at,
        samples,
        containers,
    } = measured;
    let metadata = pod.metadata();
    let base = |id: &str, image: &str, container: &str| -> [String; 5] {
        [id, image, &metadata.namespace, &metadata.name, container].map(str::to_owned)
    };
    let container_metrics = containers.into_iter().map(|(container, samples)| {
        let base = base(
            container.id(),
            &container.record.image_name,
            &container.metadata().name,
        );
        cri::ContainerMetrics {
            container_id: container.id().to_owned(),
            metrics: samples.into_iter().map(|s| metric(s, at, &base)).collect(),
        }
    });
    let of_pod = base(pod.id(), "", POD);
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.id().to_owned(),
        container_metrics: container_metrics.collect(),
        metrics: samples
            .into_iter()
            .map(|s| metric(s, at, &of_pod))
            .collect(),
    }
}

fn metric(sample: Sample, timestamp: i64, base: &[String; 5]) -> cri::Metric {
    let kind = match sample.metric.kind {
        Kind::Counter => cri::MetricType::Counter,
        Kind::Gauge => cri::MetricType::Gauge,
    };
    cri::Metric {
        name: sample.metric.name.to_owned(),
        timestamp,
        metric_type: kind as i32,
        label_values: base.iter().cloned().chain(sample.labels).collect(),
        value: Some(cri::UInt64Value {
            value: sample.value,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_as_many_labels_as_their_descriptor_has_keys() {
        let descriptors = descriptors().descriptors;
        assert_eq!(descriptors.len(), metrics::ALL.len());
        let base = [(); 5].map(|()| "x".to_owned());
        let eth0 = slipway_observe::network::Interface::default();
        for sample in metrics::of_interfaces(&[eth0]) {
            let metric = metric(sample, 1, &base);
            let descriptor = descriptors.iter().find(|d| d.name == metric.name).unwrap();
            assert_eq!(metric.label_values.len(), descriptor.label_keys.len());
        }
    }
}
