//! What the command line asks of a running daemon beyond the CRI (`slipway.admin.v1`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_image::{ErrorKind, ImageError};
use slipway_proto::admin;
use slipway_proto::admin::admin_server::Admin;
use tonic::{Code, Request, Response, Status};

use crate::pod::Node;

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
        match work.await {
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
