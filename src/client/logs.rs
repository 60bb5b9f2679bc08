//! `slipway logs`.
use std::path::Path;

use crate::Global;
use crate::connection::Cri;
use crate::error::ClientError;
use crate::log_file::{Console, LogFile, Watch};
use crate::{lookup, wait};

/// Options of `slipway logs`.
#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// The container's id, the beginning of it, or its name
    container: String,
    /// Go on until the container ends
    #[arg(long, short = 'f')]
    follow: bool,
    /// Begin with the last N lines
    #[arg(long, value_name = "N")]
    tail: Option<u64>,
    /// Put each line's time before it
    #[arg(long, short = 't')]
    timestamps: bool,
}

/// Shows a container's log from its file.
///
/// # Errors
/// [`ClientError::NotFound`] and its like, or the file's error.
pub async fn logs(args: &LogsArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let container = lookup::container(&cri, &args.container).await?;
    let (status, _) = wait::status(&cri, &container.id).await?;
    if status.log_path.is_empty() {
        let text = format!(
            "container {} writes no log: its pod has no log directory",
            container.id
        );
        return Err(ClientError::Usage(text));
    }
    let mut log = LogFile::new(Path::new(&status.log_path));
    let mut console = Console::new(args.timestamps);
    // Watched before the first look, so that nothing written in between is missed.
    let watch = if args.follow {
        Some(Watch::new(log.path())?)
    } else {
        None
    };
    log.open()?;
    if let Some(lines) = args.tail {
        log.seek_tail(lines)?;
    }
    log.drain(&mut console)?;
    let Some(watch) = watch else { return Ok(()) };
    let ended = wait::exit(&cri, &container.id);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            changed = watch.changed() => {
                changed?;
                log.drain(&mut console)?;
            }
            ended = &mut ended => {
                log.drain(&mut console)?;
                return match ended {
                    // Removed while it was followed: that is an end too.
                    Err(e) if e.code() == Some(tonic::Code::NotFound) => Ok(()),
                    other => other.map(drop),
                };
            }
        }
    }
}
