//! The arguments: those of `liboci-cli`, with what callers of runc rely on and that crate is stricter about.

use std::ffi::OsString;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use liboci_cli::{CommonCmd, GlobalOpts, StandardCmd};

use crate::update::Update;

const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nspec: 1.2.0\nruntime: native (libcontainer 0.7.0)"
);

/// An OCI runtime: containers from bundles, without the daemon
#[derive(Debug, Parser)]
#[command(name = "slipway-oci", bin_name = "slipway oci", version = VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalOpts,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(flatten)]
    Standard(StandardCmd),
    #[command(flatten)]
    Common(Box<CommonCmd>),
    /// New limits for a container
    Update(Box<Update>),
    /// Restore a container from a checkpoint (not supported)
    #[command(hide = true, disable_help_flag = true)]
    Restore {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

const UPDATE: &str = "update";
/// Nobody is to call it.
const OTHER_UPDATE: &str = "update-of-liboci-cli";

fn command() -> clap::Command {
    Cli::command()
        // The crate's, which comes first, knows no sizes, no limits taken away, and not all options.
        .mut_subcommand(UPDATE, |update| update.name(OTHER_UPDATE).hide(true))
        // As in runc: the signal may be left out.
        .mut_subcommand("kill", |kill| {
            kill.mut_arg("signal", |arg| arg.required(false).default_value("SIGTERM"))
        })
        .mut_subcommand("list", |list| list.mut_arg("format", |arg| arg.short('f')))
        // The crate's name for it.
        .mut_subcommand("checkpointt", |checkpoint| {
            checkpoint.visible_alias("checkpoint")
        })
}

/// Reads arguments, those behind `slipway oci`.
///
/// # Errors
/// clap's, which is also the answer to `--help` and `--version`.
pub fn parse(args: Vec<OsString>) -> Result<Cli, clap::Error> {
    let all = std::iter::once(OsString::from("slipway oci")).chain(args);
    let matches = command().try_get_matches_from(all)?;
    if let Some((UPDATE, update)) = matches.subcommand() {
        // By its name the crate would take it for its own.
        return Ok(Cli {
            global: GlobalOpts::from_arg_matches(&matches)?,
            command: Command::Update(Box::new(Update::from_arg_matches(update)?)),
        });
    }
    Cli::from_arg_matches(&matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Command {
        let args = args.iter().map(OsString::from).collect();
        parse(args).unwrap().command
    }

    #[test]
    fn callers_of_runc_are_understood() {
        command().debug_assert();
        // containerd's shim.
        let create = [
            "--root=/r",
            "--log",
            "/l",
            "--log-format=json",
            "create",
            "--bundle",
            "/b",
            "--pid-file",
            "/p",
            "id",
        ];
        assert!(matches!(
            parsed(&create),
            Command::Standard(StandardCmd::Create(_))
        ));
        let Command::Standard(StandardCmd::Kill(kill)) = parsed(&["kill", "--all", "id", "9"])
        else {
            panic!("not kill")
        };
        assert!(kill.all && kill.signal == "9");
        let Command::Standard(StandardCmd::Kill(kill)) = parsed(&["kill", "id"]) else {
            panic!("not kill")
        };
        assert_eq!(kill.signal, "SIGTERM");
        let common = |args: &[&str]| match parsed(args) {
            Command::Common(command) => *command,
            other => panic!("{other:?}"),
        };
        let checkpoint = common(&["checkpoint", "id"]);
        assert!(matches!(checkpoint, CommonCmd::Checkpointt(_)));
        let restore = parsed(&["restore", "--detach", "id"]);
        assert!(matches!(restore, Command::Restore { .. }));
        let update = parsed(&["update", "--memory", "-1", "--cpu-idle", "1", "id"]);
        assert!(matches!(update, Command::Update(_)));
        let CommonCmd::Exec(exec) = common(&["exec", "id", "ls", "-l"]) else {
            panic!("not exec")
        };
        assert_eq!(exec.command, ["ls", "-l"]);
        let list = common(&["list", "-f", "json"]);
        assert!(matches!(list, CommonCmd::List(_)));
        assert!(parse(vec!["nothing".into()]).is_err());
    }
}
