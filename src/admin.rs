//! What the command line asks of a running daemon beyond the CRI (`slipway.admin.v1`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use slipway_image::{Credentials, ErrorKind, ImageError, LayerProgress, LayerStatus, PullProgress};
use slipway_proto::admin;
use slipway_proto::admin::admin_server::Admin;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use crate::memory;
use crate::pod::Node;

/// Between two events of a pull.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);

/// The administration of a running daemon.
#[derive(Clone)]
pub struct Administration(pub Arc<Node>);

#[tonic::async_trait]
impl Admin for Administration {
    async fn import_image(
        &self,
        request: Request<admin::ImportImageRequest>,
    ) -> Result<Response<admin::ImportImageResponse>, Status> {
        let request = request.into_inner();
        let path = PathBuf::from(&request.path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument(format!(
                "path {:?} must be absolute",
                request.path
            )));
        }
        let tag = Some(request.tag).filter(|tag| !tag.is_empty());
        let store = self.0.images.clone();
        let own = path.clone();
        let work = self
            .0
            .tasks
            .spawn(async move { import(&store, &own, tag.as_deref()).await });
        let imported = work.await;
        memory::effort();
        match imported {
            Ok(Ok(images)) => {
                tracing::info!(path = %path.display(), images = images.len(), "images imported");
                Ok(Response::new(admin::ImportImageResponse { images }))
            }
            Ok(Err(error)) => Err(Status::new(code(&error), error.chain())),
            Err(error) => Err(Status::internal(format!(
                "the import ended without a result: {error}"
            ))),
        }
    }

    type PullImageStream = ReceiverStream<Result<admin::PullImageEvent, Status>>;

    async fn pull_image(
        &self,
        request: Request<admin::PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        let r = request.into_inner();
        if r.image.is_empty() {
            return Err(Status::invalid_argument("the request names no image"));
        }
        let auth = Credentials {
            username: r.username,
            password: r.password,
            auth: r.auth,
            server_address: r.server_address,
            identity_token: r.identity_token,
            registry_token: r.registry_token,
        };
        let (events, stream) = mpsc::channel(1);
        let node = self.0.clone();
        tokio::spawn(async move { pull(&node, &r.image, auth, events).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn traces(
        &self,
        request: Request<admin::TracesRequest>,
    ) -> Result<Response<admin::TracesResponse>, Status> {
        let request = request.into_inner();
        let limit = match request.limit {
            0 => usize::MAX,
            limit => usize::try_from(limit).unwrap_or(usize::MAX),
        };
        let on_wire = |trace: crate::pod::phases::Trace| admin::Trace {
            method: trace.method.to_owned(),
            pod_id: trace.pod_id,
            container_id: trace.container_id,
            ended_at: trace.ended_at,
            phases: trace
                .phases
                .into_iter()
                .map(|phase| admin::Phase {
                    name: phase.name,
                    micros: phase.micros,
                })
                .collect(),
        };
        let traces = self
            .0
            .traces
            .of_pod(&request.pod_id, limit)
            .into_iter()
            .map(on_wire)
            .collect();
        Ok(Response::new(admin::TracesResponse { traces }))
    }
}

/// Pulls until it is done, or nobody listens any more.
async fn pull(
    node: &Node,
    image: &str,
    auth: Credentials,
    events: mpsc::Sender<Result<admin::PullImageEvent, Status>>,
) {
    let (progress, mut state) = watch::channel(PullProgress::default());
    let pulling = node.pull(image, Some(auth), Some(progress));
    tokio::pin!(pulling);
    let mut tick = tokio::time::interval(EVENT_INTERVAL);
    let last = loop {
        tokio::select! {
            pulled = &mut pulling => break pulled,
            () = events.closed() => return,
            _ = tick.tick() => {
                if state.has_changed().unwrap_or(false) {
                    let event = event(&state.borrow_and_update());
                    // One that is not taken yet says nearly the same.
                    let _ = events.try_send(Ok(event));
                }
            }
        }
    };
    let last = last.map_err(|e| crate::cri::status(&e)).map(|image| {
        let image_ref = image.id.clone();
        admin::PullImageEvent {
            image_ref,
            ..event(&state.borrow())
        }
    });
    let _ = events.send(last).await;
}

fn event(progress: &PullProgress) -> admin::PullImageEvent {
    let layers = &progress.layers;
    let here = |l: &&LayerProgress| matches!(l.status, LayerStatus::Done | LayerStatus::Present);
    let arrived = layers.iter().map(|l| match here(&l) {
        true => l.total,
        false => l.downloaded.min(l.total),
    });
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    admin::PullImageEvent {
        total: layers.iter().map(|l| l.total).sum(),
        arrived: arrived.sum(),
        layers: count(layers.len()),
        finished: count(layers.iter().filter(here).count()),
        image_ref: String::new(),
    }
}

async fn import(
    store: &slipway_image::ImageStore,
    path: &Path,
    tag: Option<&str>,
) -> Result<Vec<admin::ImportedImage>, ImageError> {
    let images = store.import(path, tag).await?;
    let on_wire = |image: &Arc<slipway_image::Image>| admin::ImportedImage {
        id: image.id.clone(),
        names: image
            .repo_tags
            .iter()
            .chain(&image.repo_digests)
            .cloned()
            .collect(),
    };
    Ok(images.iter().map(on_wire).collect())
}

fn code(error: &ImageError) -> Code {
    match error.kind() {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::InvalidArgument | ErrorKind::DataLoss => Code::InvalidArgument,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        _ => Code::Internal,
    }
}
