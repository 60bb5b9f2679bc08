//! `slipway inspect`.
use serde_json::{Value, json};
use slipway_proto::cri::*;

use crate::Global;
use crate::connection::Cri;
use crate::error::ClientError;
use crate::images;
use crate::lookup::{self, Found, Kinds};
use crate::output::{self, Format};

/// Options of `slipway inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Ids (or their beginnings) or names of containers and pods, ids or references of images
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
    /// Form of the output
    #[arg(long, short = 'o', value_enum, default_value = "json")]
    output: Format,
}

/// Prints the verbose status of each object: one as an object, several as a list.
///
/// # Errors
/// [`ClientError::NotFound`] and its like, or what the runtime answers.
pub async fn inspect(args: &InspectArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut values = Vec::with_capacity(args.ids.len());
    for id in &args.ids {
        let value = match lookup::find(&cri, id, Kinds::All).await? {
            Found::Container(container) => container_value(&cri, container.id).await?,
            Found::Pod(pod) => pod_value(&cri, pod.id).await?,
            Found::Image(image) => image_value(&cri, &image.id).await?,
        };
        values.push(value);
    }
    let value = if values.len() == 1 {
        values.swap_remove(0)
    } else {
        Value::Array(values)
    };
    output::print(&output::render(&value, args.output)?)
}

async fn container_value(cri: &Cri, container_id: String) -> Result<Value, ClientError> {
    let request = ContainerStatusRequest {
        container_id,
        verbose: true,
    };
    let response = cri.container_status(request).await?;
    let status = response.status.unwrap_or_default();
    let times = [
        ("createdAt", status.created_at),
        ("startedAt", status.started_at),
        ("finishedAt", status.finished_at),
    ];
    let mut value = output::to_value("ContainerStatus", &status)?;
    for (key, nanos) in times {
        value[key] = output::rfc3339(nanos).into();
    }
    Ok(json!({ "status": value, "info": output::info_value(&response.info) }))
}

async fn pod_value(cri: &Cri, pod_sandbox_id: String) -> Result<Value, ClientError> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id,
        verbose: true,
    };
    let response = cri.pod_sandbox_status(request).await?;
    let status = response.status.unwrap_or_default();
    let mut value = output::to_value("PodSandboxStatus", &status)?;
    value["createdAt"] = output::rfc3339(status.created_at).into();
    Ok(json!({ "status": value, "info": output::info_value(&response.info) }))
}

async fn image_value(cri: &Cri, id: &str) -> Result<Value, ClientError> {
    let request = ImageStatusRequest {
        image: Some(images::spec(id)),
        verbose: true,
    };
    let response = cri.image_status(request).await?;
    let image = response.image.unwrap_or_default();
    let value = output::to_value("Image", &image)?;
    Ok(json!({ "status": value, "info": output::info_value(&response.info) }))
}
