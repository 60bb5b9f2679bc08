//! `slipway exec`.
use std::io::{self, Write};
use std::time::Duration;

use slipway_proto::cri::ExecSyncRequest;

use crate::Global;
use crate::connection::Cri;
use crate::error::ClientError;
use crate::lookup;
use crate::quantity::parse_duration;

/// Beyond the command's own limit: the time a runtime may take to kill it and answer.
const ANSWER_MARGIN: Duration = Duration::from_secs(15);
/// Without a limit, the call still has a deadline.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Options of `slipway exec`.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// The container's id, the beginning of it, or its name
    container: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    /// Kill the command when it takes longer (default: never)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    kill_after: Option<Duration>,
}

/// Runs a command in a container, prints its output when it has ended, and gives its exit code.
///
/// # Errors
/// [`ClientError::NotFound`] and its like, or what the runtime answers.
pub async fn exec(args: &ExecArgs, global: &Global) -> Result<u8, ClientError> {
    let cri = Cri::connect(global).await?;
    let container = lookup::container(&cri, &args.container).await?;
    let limit = args
        .kill_after
        .map(|limit| limit.max(Duration::from_secs(1)));
    let request = ExecSyncRequest {
        container_id: container.id,
        cmd: args.command.clone(),
        timeout: limit.map_or(0, |limit| limit.as_secs_f64().ceil() as i64),
    };
    let deadline = limit.map_or(LONGEST, |limit| limit + ANSWER_MARGIN);
    let response = cri.with_timeout(deadline).exec_sync(request).await?;
    let write = |to: &mut dyn Write, bytes: &[u8]| to.write_all(bytes).and_then(|()| to.flush());
    write(&mut io::stdout(), &response.stdout)
        .and_then(|()| write(&mut io::stderr(), &response.stderr))
        .map_err(ClientError::Output)?;
    Ok(exit_code(response.exit_code))
}

/// An exit code as a process can have it: what doesn't fit (a runtime's -1) is 255.
pub fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(255)
}
