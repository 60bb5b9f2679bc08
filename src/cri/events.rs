//! GetContainerEvents.

use futures_util::stream;
use slipway_proto::cri;
use tonic::Status;

use super::containers::container_status;
use super::pods::{newest_first, pod_status};
use super::stream::Batches;
use crate::pod::Node;
use crate::pod::feed::{End, Happening, Kind};

/// Everything that happens from now on, until the client has had enough.
pub fn follow(node: &Node) -> Batches<cri::ContainerEventResponse> {
    let subscriber = node.feed.subscribe();
    Box::pin(stream::unfold(subscriber, |subscriber| async move {
        let mut subscriber = subscriber?;
        match subscriber.next().await {
            Ok(happening) => Some((Ok(event(&happening)), Some(subscriber))),
            Err(end) => Some((Err(status(end)), None)),
        }
    }))
}

fn event(happening: &Happening) -> cri::ContainerEventResponse {
    let kind = match happening.kind {
        Kind::Created => cri::ContainerEventType::ContainerCreatedEvent,
        Kind::Started => cri::ContainerEventType::ContainerStartedEvent,
        Kind::Stopped => cri::ContainerEventType::ContainerStoppedEvent,
        Kind::Deleted => cri::ContainerEventType::ContainerDeletedEvent,
    };
    let containers = happening.containers.iter();
    cri::ContainerEventResponse {
        container_id: happening.id.clone(),
        container_event_type: kind as i32,
        created_at: happening.at,
        pod_sandbox_status: Some(pod_status(&happening.pod, happening.stage)),
        containers_statuses: newest_first(
            containers
                .map(|(container, status)| container_status(container, status.clone()))
                .collect(),
        ),
    }
}

fn status(end: End) -> Status {
    match end {
        End::Closed => Status::unavailable("the daemon is going down; subscribe to the next one"),
        End::Lost(count) => Status::data_loss(format!(
            "this subscriber is too slow and lost {count} events; subscribe again, and list what there is"
        )),
    }
}
