//! criu: which one, and whether it can work on this machine.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use parking_lot::Mutex;
use slipway_proto::keeper;

use crate::pod::error::PodError;
use crate::pod::node::Node;

/// How long `criu check` may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The criu that was found to work.
#[derive(Debug, Default)]
pub struct Tool(Mutex<Option<PathBuf>>);

impl Node {
    /// The configured criu; asked once whether this kernel has what it needs.
    ///
    /// # Errors
    /// [`PodError::Unsupported`], with what it says.
    pub(in crate::pod) async fn criu(&self) -> Result<keeper::Criu, PodError> {
        let config = self.config().checkpoint.clone();
        let refused =
            |reason: String| PodError::Unsupported(format!("no checkpoints here: {reason}"));
        if config.criu.is_empty() {
            return Err(refused(
                "checkpoint.criu is empty in the configuration".into(),
            ));
        }
        let path = slipway_check::find_criu(&config.criu).ok_or_else(|| {
            refused(format!(
                "there is no program {:?}; install criu or set checkpoint.criu in the configuration",
                config.criu
            ))
        })?;
        if self.tool.0.lock().as_deref() != Some(&path) {
            check(&path).await.map_err(refused)?;
            *self.tool.0.lock() = Some(path.clone());
        }
        Ok(keeper::Criu {
            path: path.to_string_lossy().into_owned(),
            tcp_established: config.tcp_established,
        })
    }
}

async fn check(path: &Path) -> Result<(), String> {
    let mut command = tokio::process::Command::new(path);
    command
        .arg("check")
        .stdin(Stdio::null())
        .current_dir("/")
        .kill_on_drop(true);
    let shown = path.display();
    let output = tokio::time::timeout(PATIENCE, command.output());
    match output.await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(format!(
            "{shown} can't work on this kernel ({}); a newer criu may",
            slipway_check::criu_complaint(&output.stderr)
        )),
        Ok(Err(e)) => Err(format!("can't run {shown}: {e}")),
        Err(_) => Err(format!("{shown} check did not end within {PATIENCE:?}")),
    }
}
