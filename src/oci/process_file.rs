//! What an exec runs: a process as config.md has it, from a file, or from the container's own with what the options say.

use std::collections::HashSet;
use std::fs;

use liboci_cli::Exec;
use oci_spec::runtime::{Capabilities, Capability, Process, Spec};

use crate::create::process_of;
use crate::record::parse;
use crate::{OciError, Result, bundle};

/// The process of an exec.
///
/// # Errors
/// [`OciError`], naming option or place.
pub fn process(spec: &Spec, args: &Exec) -> Result<Process> {
    let own = process_of(spec)?;
    let mut process = match &args.process {
        Some(path) => {
            let bytes = fs::read(path).map_err(OciError::file("read", path))?;
            let mut process: Process = parse(&bytes, path, "process")?;
            // As the container's, where nothing is said: less would not run, more is not asked for.
            if process.capabilities().is_none() {
                process.set_capabilities(own.capabilities().clone());
            }
            if process.rlimits().is_none() {
                process.set_rlimits(own.rlimits().clone());
            }
            process
        }
        None => {
            let mut process = own.clone();
            process
                .set_args(Some(args.command.clone()))
                .set_terminal(Some(args.tty));
            process
        }
    };
    if process.apparmor_profile().is_none() {
        process.set_apparmor_profile(own.apparmor_profile().clone());
    }
    if process.selinux_label().is_none() {
        process.set_selinux_label(own.selinux_label().clone());
    }
    if args.process.is_none() {
        options(&mut process, args)?;
    }
    bundle::check_process(&process, "process")?;
    Ok(process)
}

fn options(process: &mut Process, args: &Exec) -> Result<()> {
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    let mut env = process.env().clone().unwrap_or_default();
    for (name, value) in &args.env {
        env.retain(|entry| entry.split('=').next() != Some(name));
        env.push(format!("{name}={value}"));
    }
    process.set_env(Some(env));
    let mut user = process.user().clone();
    if let Some((uid, gid)) = args.user {
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !args.additional_gids.is_empty() {
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&args.additional_gids);
        user.set_additional_gids(Some(gids));
    }
    process.set_user(user);
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(label) = &args.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if !args.cap.is_empty() {
        let wanted = args.cap.iter().map(|name| capability(name));
        let wanted: Capabilities = wanted.collect::<Result<_>>()?;
        let mut sets = process.capabilities().clone().unwrap_or_default();
        let with = |set: &Option<Capabilities>| -> Option<HashSet<Capability>> {
            let held = set.iter().flatten().copied();
            Some(held.chain(wanted.iter().copied()).collect())
        };
        // Not the inheritable ones: a program that is not asked for would get them (CVE-2022-29162).
        let [bounding, effective, permitted] =
            [sets.bounding(), sets.effective(), sets.permitted()].map(with);
        sets.set_bounding(bounding)
            .set_effective(effective)
            .set_permitted(permitted);
        process.set_capabilities(Some(sets));
    }
    Ok(())
}

fn capability(name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    let full = match upper.starts_with("CAP_") {
        true => upper,
        false => format!("CAP_{upper}"),
    };
    serde_json::from_value(full.into()).map_err(|_| OciError::Argument {
        option: "--cap",
        reason: format!("{name:?} is no capability"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["sleep"], "cwd": "/", "user": {"uid": 5, "gid": 6}, "env": ["A=1", "B=2"],
                "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
            },
        });
        serde_json::from_value(spec).unwrap()
    }

    fn exec(args: &[&str]) -> Exec {
        use liboci_cli::CommonCmd;
        let all = ["exec"].iter().chain(args).map(std::ffi::OsString::from);
        match crate::cli::parse(all.collect()).unwrap().command {
            crate::cli::Command::Common(command) => match *command {
                CommonCmd::Exec(exec) => exec,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_change_the_containers_own_process() {
        let args = exec(&[
            "-e",
            "B=3",
            "-e",
            "C=4",
            "-u",
            "7:8",
            "-g",
            "9",
            "--cap",
            "net_raw",
            "--no-new-privs",
            "--cwd",
            "/tmp",
            "-t",
            "c",
            "ls",
            "-l",
        ]);
        let process = process(&spec(), &args).unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(process.env().as_deref().unwrap(), ["A=1", "B=3", "C=4"]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.user().additional_gids().as_deref().unwrap(), [9]);
        let sets = process.capabilities().clone().unwrap();
        assert_eq!(sets.bounding().as_ref().unwrap().len(), 2);
        assert!(sets.inheritable().as_ref().is_none_or(HashSet::is_empty));
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.no_new_privileges(), Some(true));
    }

    #[test]
    fn a_file_says_it_all_but_what_it_leaves_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = serde_json::json!({"args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        fs::write(file.path(), own.to_string()).unwrap();
        let process = process(&spec(), &exec(&["-p", file.path().to_str().unwrap(), "c"])).unwrap();
        assert_eq!(process.user().uid(), 0);
        assert!(process.capabilities().is_some() && process.rlimits().is_some());
        fs::write(file.path(), r#"{"args": 5}"#).unwrap();
        let error = super::process(&spec(), &exec(&["-p", file.path().to_str().unwrap(), "c"]));
        assert!(error.unwrap_err().to_string().contains("args"));
    }

    #[test]
    fn what_can_not_be_is_refused() {
        for args in [
            &["c"][..],
            &["--cap", "CAP_EVERYTHING", "c", "x"],
            &["--cwd", "tmp", "c", "x"],
        ] {
            assert!(process(&spec(), &exec(args)).is_err(), "{args:?}");
        }
    }
}
