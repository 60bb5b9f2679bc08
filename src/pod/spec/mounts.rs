//! Mounts.
use crate::error::{Result, SpecError};
use slipway_proto::cri;

pub(crate) fn unsupported(field: &str, mount: &cri::Mount) -> Result<()> {
    if mount.image.is_some() || !mount.image_sub_path.is_empty() {
        let what = "volumes from images are not there yet in this version; use a host path";
        return Err(SpecError::unsupported(format!("{field}.image"), what));
    }
    Ok(())
}
