//! The command-line CRI client and the benchmark.
//!
//! Works against any CRI v1 socket (Slipway, containerd, CRI-O): everything it knows about a runtime
//! comes through the CRI, the container's log file and, for memory measurements, `/proc`.
#![deny(unsafe_code)]

mod bench;
mod connection;
mod error;
mod exec;
mod images;
mod inspect;
mod interrupt;
mod list;
mod log_file;
mod log_line;
mod logs;
mod lookup;
mod output;
mod pod_config;
mod quantity;
mod remove;
mod run;
mod table;
mod timings;
mod wait;

#[cfg(test)]
mod behaviour;
#[cfg(test)]
mod fake;

use std::process::ExitCode;
use std::time::Duration;

pub use error::{ClientError, report};

/// Where Slipway's daemon listens unless configured otherwise.
pub const DEFAULT_ENDPOINT: &str = "unix:///run/slipway/slipway.sock";

/// Options that every client command takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// CRI socket of the runtime: unix:///path or a path
    #[arg(
        long,
        short = 'r',
        global = true,
        env = "CONTAINER_RUNTIME_ENDPOINT",
        value_name = "ENDPOINT",
        default_value = DEFAULT_ENDPOINT
    )]
    pub runtime_endpoint: String,
    /// CRI socket for images, when it is another one
    #[arg(
        long,
        global = true,
        env = "IMAGE_SERVICE_ENDPOINT",
        value_name = "ENDPOINT"
    )]
    pub image_endpoint: Option<String>,
    /// Deadline of one call to the runtime; pulls and stops have their own (2m, 500ms, …)
    #[arg(long, global = true, value_name = "DURATION", default_value = "2m", value_parser = quantity::parse_duration)]
    pub timeout: Duration,
}

/// The client's commands, to be flattened into the binary's own.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Run a pod with one container, show its output, and remove both when it ends
    Run(Box<run::RunArgs>),
    /// Pull images
    Pull(images::PullArgs),
    /// List images
    Images(images::ImagesArgs),
    /// Remove images
    Rmi(images::RemoveImageArgs),
    /// List pods
    Pods(list::PodsArgs),
    /// List containers
    Ps(list::PsArgs),
    /// Show a container's log
    Logs(logs::LogsArgs),
    /// Run a command in a container and show its output
    Exec(exec::ExecArgs),
    /// Show all that the runtime tells about pods, containers and images
    Inspect(inspect::InspectArgs),
    /// Stop containers or pods
    Stop(remove::StopArgs),
    /// Remove containers or pods
    Rm(remove::RemoveArgs),
    /// Stop pods
    Stopp(remove::StopPodArgs),
    /// Remove pods
    Rmp(remove::RemoveArgs),
    /// Measure runtimes: pods, containers, memory, and the distance to the kernel's floor
    Bench(Box<bench::BenchArgs>),
    /// A helper process of bench
    #[command(name = "bench-helper", hide = true)]
    BenchHelper(bench::HelperArgs),
}

/// Runs a command to its end and says how it went: 0, the container's or exec's exit code, or 1.
///
/// Starts its own single-threaded tokio runtime: call it from a thread that has none.
pub fn run(command: Command, global: &Global) -> ExitCode {
    if let Command::BenchHelper(args) = command {
        return finish(bench::helper(&args).map(|()| 0));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| ClientError::System {
            what: "cannot start the event loop",
            source,
        });
    finish(runtime.and_then(|runtime| {
        let result = runtime.block_on(dispatch(command, global));
        // A blocked read of a terminal or a file must not keep us from ending.
        runtime.shutdown_background();
        result
    }))
}

async fn dispatch(command: Command, global: &Global) -> Result<u8, ClientError> {
    // Boxed, so that the largest command's state is not on the stack of each.
    match command {
        Command::Run(args) => return Box::pin(run::run(&args, global)).await,
        Command::Exec(args) => return Box::pin(exec::exec(&args, global)).await,
        Command::Pull(args) => Box::pin(images::pull(&args, global)).await?,
        Command::Images(args) => Box::pin(images::list(&args, global)).await?,
        Command::Rmi(args) => Box::pin(images::remove(&args, global)).await?,
        Command::Pods(args) => Box::pin(list::pods(&args, global)).await?,
        Command::Ps(args) => Box::pin(list::containers(&args, global)).await?,
        Command::Logs(args) => Box::pin(logs::logs(&args, global)).await?,
        Command::Inspect(args) => Box::pin(inspect::inspect(&args, global)).await?,
        Command::Stop(args) => Box::pin(remove::stop(&args, global)).await?,
        Command::Rm(args) => Box::pin(remove::remove(&args, global, false)).await?,
        Command::Stopp(args) => Box::pin(remove::stop_pods(&args, global)).await?,
        Command::Rmp(args) => Box::pin(remove::remove(&args, global, true)).await?,
        Command::Bench(args) => Box::pin(bench::bench(&args, global)).await?,
        Command::BenchHelper(args) => bench::helper(&args)?,
    }
    Ok(0)
}

fn finish(result: Result<u8, ClientError>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is_broken_pipe() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("slipway: {}", report(&error));
            match error {
                ClientError::Interrupted("SIGINT") => ExitCode::from(130),
                ClientError::Interrupted("SIGTERM") => ExitCode::from(143),
                ClientError::Interrupted(_) => ExitCode::from(129),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        global: Global,
        #[command(subcommand)]
        command: Command,
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from([
            "slipway",
            "run",
            "-e",
            "A=1",
            "--name",
            "x",
            "busybox",
            "sh",
            "-c",
            "echo -n $A",
        ])
        .unwrap();
        let Command::Run(args) = cli.command else {
            panic!("not run")
        };
        assert_eq!(args.command, ["sh", "-c", "echo -n $A"]);
        let cli =
            Cli::try_parse_from(["slipway", "exec", "-r", "/x.sock", "abc", "ls", "-l"]).unwrap();
        assert_eq!(cli.global.runtime_endpoint, "/x.sock");
    }
}
