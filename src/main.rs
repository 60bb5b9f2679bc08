//! The `slipway` command: the daemon, its administration, and a small CRI client.
#![forbid(unsafe_code)]

mod import;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use slipway::serve::{Settings, serve};
use slipway_config::Config;
use slipway_runtime::client::Keepers;
use slipway_runtime::zygote::ZYGOTE_COMMAND;

/// A Kubernetes container runtime that creates containers in-process
#[derive(Debug, Parser)]
#[command(name = "slipway", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: slipway_client::Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve(Settings),
    /// Look at what this machine offers for running pods, what is missing, and how to mend it
    Check(CheckArgs),
    /// Work with the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Work with the images of the daemon on this machine
    #[command(subcommand)]
    Image(ImageCommand),
    /// Print the version
    Version,
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Be an OCI runtime for podman, containerd or conmon, without the daemon (see "slipway oci --help")
    #[command(disable_help_flag = true)]
    Oci {
        /// What it takes in the place of runc
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    #[command(flatten)]
    Client(slipway_client::Command),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// How the report is written
    #[arg(long, short, value_name = "FORMAT", value_enum, default_value_t)]
    output: ReportFormat,
    /// Configuration file; drop-ins are read from config.d beside it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// As for serve
    #[arg(long, value_name = "PATH")]
    listen: Option<PathBuf>,
    /// As for serve
    #[arg(long, value_name = "DIR")]
    run_root: Option<PathBuf>,
    /// As for serve
    #[arg(long, value_name = "DIR")]
    state_root: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum ReportFormat {
    /// Columns for people
    #[default]
    Table,
    /// One JSON object for programs
    Json,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the default configuration, every key explained
    Default,
    /// Check the configuration as the daemon would read it
    Check {
        /// Configuration file; drop-ins are read from config.d beside it
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Import an OCI layout or archive, or a docker-archive
    Import {
        /// The file or directory
        path: PathBuf,
        /// Name for an image that has none in there
        #[arg(long, short, value_name = "NAME")]
        tag: Option<String>,
    },
}

fn main() -> ExitCode {
    // The zygote takes no options and must not grow by a parser's memory.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == ZYGOTE_COMMAND)
    {
        slipway_runtime::zygote::main();
    }
    // An OCI runtime's arguments are its own: its --root has the letter of our --runtime-endpoint.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == slipway_oci::COMMAND)
    {
        return slipway_oci::main(std::env::args_os().skip(2));
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Client(command) => return slipway_client::run(command, &cli.global),
        Command::Oci { args } => return slipway_oci::main(args),
        Command::Check(args) => match check(args) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Command::Serve(settings) => daemon(&settings),
        Command::Config(ConfigCommand::Default) => default_config(),
        Command::Config(ConfigCommand::Check { config }) => check_config(config),
        Command::Image(ImageCommand::Import { path, tag }) => {
            import::import(&cli.global, &path, tag.as_deref())
        }
        Command::Version => {
            println!("slipway {}", slipway::VERSION);
            Ok(())
        }
        Command::Completion { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "slipway",
                &mut std::io::stdout(),
            );
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slipway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn daemon(settings: &Settings) -> anyhow::Result<()> {
    // Before any thread, and before configuration or credentials are in memory: keepers are forked from it.
    let keepers = Keepers::launch()?;
    serve(settings, keepers)
}

/// Exits with 1 when something is missing without which pods do not run.
fn check(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let CheckArgs {
        output,
        config,
        listen,
        run_root,
        state_root,
    } = args;
    let settings = Settings {
        config,
        listen,
        run_root,
        state_root,
        ..Settings::default()
    };
    let (config, _) = settings.load()?;
    let output = match output {
        ReportFormat::Table => slipway_check::Output::Table,
        ReportFormat::Json => slipway_check::Output::Json,
    };
    let (report, ok) = slipway_check::run(&config, output);
    // Not print!: a closed pipe (| head) is no reason to panic.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), report.as_bytes());
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn default_config() -> anyhow::Result<()> {
    print!("{}", Config::default().to_toml_with_docs()?);
    Ok(())
}

fn check_config(config: Option<PathBuf>) -> anyhow::Result<()> {
    let (config, files) = Settings {
        config,
        ..Settings::default()
    }
    .load()?;
    slipway::serve::fits_host(&config, &slipway_spec::HostFacts::detect())?;
    if files.is_empty() {
        println!("no configuration file: the defaults apply");
    }
    for file in files {
        println!("{}: ok", file.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["slipway", "serve", "--log-level", "debug", "--listen", "/x"]);
        let Command::Serve(settings) = cli.unwrap().command else {
            panic!("not serve")
        };
        assert_eq!(settings.log_level, Some(slipway_config::LogLevel::Debug));
        assert!(Cli::try_parse_from(["slipway", "serve", "--log-level", "loud"]).is_err());
        let cli =
            Cli::try_parse_from(["slipway", "check", "-o", "json", "--config", "/x"]).unwrap();
        assert!(matches!(
            cli.command,
            Command::Check(CheckArgs {
                output: ReportFormat::Json,
                ..
            })
        ));
    }

    #[test]
    fn what_is_written_about_the_configuration_is_what_is_printed() {
        let printed = Config::default().to_toml_with_docs().unwrap();
        // "slipway config default" mends both.
        assert_eq!(printed, include_str!("../hack/packaging/config.toml"));
        let page = include_str!("../docs/configuration.md");
        assert!(
            page.contains(&format!("```toml\n{printed}```")),
            "docs/configuration.md is behind"
        );
    }
}
