//! `slipway image import`: hands a path to the daemon, which alone may write to the image store.

use std::path::Path;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use slipway_proto::admin::ImportImageRequest;
use slipway_proto::admin::admin_client::AdminClient;
use tonic::transport::{Endpoint, Uri};

/// Imports what is at `path` and prints the images' ids and names.
///
/// # Errors
/// When there is no such path, no daemon, or the daemon can't import it.
pub fn import(
    global: &slipway_client::Global,
    path: &Path,
    tag: Option<&str>,
) -> anyhow::Result<()> {
    let path = path
        .canonicalize()
        .with_context(|| format!("can't import {}", path.display()))?;
    let path = path.to_str().context("the path must be UTF-8")?.to_owned();
    let endpoint = global
        .image_endpoint
        .as_ref()
        .unwrap_or(&global.runtime_endpoint);
    let socket = endpoint
        .strip_prefix("unix://")
        .unwrap_or(endpoint)
        .to_owned();
    let request = ImportImageRequest {
        path,
        tag: tag.unwrap_or_default().to_owned(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime.block_on(async {
        let own = socket.clone();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = own.clone();
            async move {
                tokio::net::UnixStream::connect(socket)
                    .await
                    .map(TokioIo::new)
            }
        });
        let channel = Endpoint::from_static("http://slipway")
            .connect_with_connector(connect)
            .await
            .with_context(|| {
                format!("no daemon answers at {socket}; start it with 'slipway serve'")
            })?;
        let answer = AdminClient::new(channel).import_image(request).await;
        answer.map_err(|status| anyhow::anyhow!("{}", status.message()))
    })?;
    for image in answer.into_inner().images {
        println!("{} {}", image.id, image.names.join(" "));
    }
    Ok(())
}
