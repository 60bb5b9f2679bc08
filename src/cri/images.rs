//! The ImageService.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::json;
use slipway_image::{Credentials, Image, ImageError};
use slipway_proto::cri;
use slipway_proto::cri::image_service_server::ImageService;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::call::{Kind, call, image_span, node_span};
use super::stream::{self, Batches};
use crate::pod::{Node, PodError, now};

/// The ImageService.
#[derive(Clone)]
pub struct Images(pub Arc<Node>);

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(
        &self,
        request: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        let asked = request
            .into_inner()
            .filter
            .and_then(|f| f.image)
            .unwrap_or_default()
            .image;
        let work = async { Ok(list(&self.0, &asked)) };
        call(Kind::Look, work)
            .instrument(image_span("ListImages", &asked))
            .await
    }

    type StreamImagesStream = Batches<cri::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let filter = request.into_inner().filter;
        let asked = filter.and_then(|f| f.image).unwrap_or_default().image;
        let images = chosen(&self.0, &asked).into_iter().map(|i| on_wire(&i));
        let message = |images| cri::StreamImagesResponse { images };
        let work = async { Ok(stream::of(images, message)) };
        call(Kind::Look, work)
            .instrument(image_span("StreamImages", &asked))
            .await
    }

    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let asked = request.image.unwrap_or_default().image;
        let work = async { status(&self.0, &asked, request.verbose) };
        call(Kind::Look, work)
            .instrument(image_span("ImageStatus", &asked))
            .await
    }

    async fn pull_image(
        &self,
        request: Request<cri::PullImageRequest>,
    ) -> Result<Response<cri::PullImageResponse>, Status> {
        let request = request.into_inner();
        let asked = request.image.unwrap_or_default().image;
        let work = pull(&self.0, &asked, request.auth.map(credentials));
        call(Kind::Change, work)
            .instrument(image_span("PullImage", &asked))
            .await
    }

    async fn remove_image(
        &self,
        request: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        let asked = request.into_inner().image.unwrap_or_default().image;
        let work = remove(&self.0, asked.clone());
        call(Kind::Change, work)
            .instrument(image_span("RemoveImage", &asked))
            .await
    }

    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        let work = async { Ok(fs_info(&self.0)) };
        call(Kind::Look, work)
            .instrument(node_span("ImageFsInfo"))
            .await
    }
}

fn list(node: &Node, asked: &str) -> cri::ListImagesResponse {
    let found = chosen(node, asked);
    cri::ListImagesResponse {
        images: found.iter().map(|image| on_wire(image)).collect(),
    }
}

fn chosen(node: &Node, asked: &str) -> Vec<Arc<Image>> {
    match asked {
        "" => node.images.list(),
        name => node.images.resolve(name).into_iter().collect(),
    }
}

fn status(node: &Node, asked: &str, verbose: bool) -> Result<cri::ImageStatusResponse, PodError> {
    needs_name(asked)?;
    let Some(image) = node.images.resolve(asked) else {
        return Ok(cri::ImageStatusResponse::default());
    };
    let info = if verbose {
        info(&image)
    } else {
        HashMap::new()
    };
    Ok(cri::ImageStatusResponse {
        image: Some(on_wire(&image)),
        info,
    })
}

async fn pull(
    node: &Arc<Node>,
    asked: &str,
    auth: Option<Credentials>,
) -> Result<cri::PullImageResponse, PodError> {
    needs_name(asked)?;
    let image = node.pull(asked, auth, None).await?;
    Ok(cri::PullImageResponse {
        image_ref: image.id.clone(),
    })
}

async fn remove(node: &Arc<Node>, asked: String) -> Result<cri::RemoveImageResponse, PodError> {
    needs_name(&asked)?;
    let store = node.images.clone();
    let work = async move { store.remove(&asked).await.map_err(failed("remove", &asked)) };
    node.complete("RemoveImage", work).await?;
    Ok(cri::RemoveImageResponse {})
}

fn fs_info(node: &Node) -> cri::ImageFsInfoResponse {
    let info = node.images.fs_info();
    let usage = |mountpoint: &std::path::Path, bytes: u64, inodes: u64| cri::FilesystemUsage {
        timestamp: now(),
        fs_id: Some(cri::FilesystemIdentifier {
            mountpoint: mountpoint.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(cri::UInt64Value { value: bytes }),
        inodes_used: Some(cri::UInt64Value { value: inodes }),
    };
    let images = usage(&info.mountpoint, info.used_bytes, info.inodes_used);
    // Containers write to the same file system; what they wrote is told by the stats calls.
    cri::ImageFsInfoResponse {
        image_filesystems: vec![images.clone()],
        container_filesystems: vec![images],
    }
}

fn needs_name(asked: &str) -> Result<(), PodError> {
    if asked.is_empty() {
        return Err(PodError::Invalid("the request names no image".to_owned()));
    }
    Ok(())
}

fn failed(action: &'static str, image: &str) -> impl FnOnce(ImageError) -> PodError {
    let image = image.to_owned();
    move |source| PodError::Image {
        action,
        image,
        source,
    }
}

/// The four forms of the CRI's AuthConfig.
fn credentials(auth: cri::AuthConfig) -> Credentials {
    Credentials {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
        server_address: auth.server_address,
    }
}

fn on_wire(image: &Image) -> cri::Image {
    let (uid, username) = user(image.user.as_deref().unwrap_or_default());
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid,
        username,
        spec: Some(cri::ImageSpec {
            image: image.id.clone(),
            ..cri::ImageSpec::default()
        }),
        pinned: image.pinned,
    }
}

/// The image's user for the kubelet's runAsNonRoot check: a number or a name, without the group.
fn user(user: &str) -> (Option<cri::Int64Value>, String) {
    let user = user.split(':').next().unwrap_or_default();
    match user.parse() {
        Ok(value) => (Some(cri::Int64Value { value }), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

/// What `crictl inspecti` shows beside the status.
fn info(image: &Image) -> HashMap<String, String> {
    let layers: Vec<_> = image
        .layers
        .iter()
        .map(|layer| layer.diff_id.as_str())
        .collect();
    let info = json!({
        "imageSpec": {
            "created": image.created,
            "architecture": image.architecture,
            "os": image.os,
            "variant": image.variant,
            "config": image.config,
            "rootfs": { "type": "layers", "diff_ids": layers },
        },
    });
    HashMap::from([("info".to_owned(), info.to_string())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_user_is_a_number_or_a_name() {
        let uid = |value| Some(cri::Int64Value { value });
        for (text, expected) in [
            ("", (None, String::new())),
            ("1000", (uid(1000), String::new())),
            ("1000:5", (uid(1000), String::new())),
            ("web", (None, "web".to_owned())),
            ("web:www", (None, "web".to_owned())),
        ] {
            assert_eq!(user(text), expected, "{text}");
        }
    }
}
