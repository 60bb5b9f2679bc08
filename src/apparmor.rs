//! The AppArmor profile of containers that name none, loaded when the daemon starts.
//!
//! The kernel takes compiled policy, and AppArmor's own parser is the only compiler there is, so this is
//! the one program that the daemon executes for itself; never on the way to a pod.

use std::process::Stdio;
use std::time::Duration;

use slipway_spec::AppArmor;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Name of the profile that is ours.
pub const PROFILE: &str = "slipway-default";

const TEXT: &str = include_str!("apparmor.profile");
const PARSER: &str = "apparmor_parser";
/// It compiles in well under a second.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the profile is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The parser is missing.
    #[error("{PARSER} can't be executed; install the package apparmor")]
    Parser(#[source] std::io::Error),
    /// It got no answer.
    #[error("{PARSER} did not end within {PATIENCE:?}")]
    Timeout,
    /// It refused.
    #[error("{PARSER}: {0}")]
    Refused(String),
}

/// Loads the profile, or puts this version's in the place of an older one, where AppArmor is on and
/// `wanted` (`pod.apparmor_profile`) is ours. What runs under the older one goes over to the new one.
///
/// # Errors
/// [`AppArmorError`].
pub async fn load(wanted: &str) -> Result<(), AppArmorError> {
    if wanted != PROFILE || AppArmor::detect() == AppArmor::Off {
        return Ok(());
    }
    let own = std::fs::read_to_string("/proc/self/attr/apparmor/current")
        .or_else(|_| std::fs::read_to_string("/proc/self/attr/current"));
    let mut parser = Command::new(PARSER)
        .args(["--replace", "--skip-cache", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(AppArmorError::Parser)?;
    if let Some(mut stdin) = parser.stdin.take() {
        // A parser that ends early says why.
        let _ = stdin
            .write_all(text(&own.unwrap_or_default()).as_bytes())
            .await;
    }
    let ended = tokio::time::timeout(PATIENCE, parser.wait_with_output()).await;
    let output = ended
        .map_err(|_| AppArmorError::Timeout)?
        .map_err(AppArmorError::Parser)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(AppArmorError::Refused(format!("{}: {said}", output.status)))
}

/// The profile for a daemon that is confined as `own` says (`name (mode)`): keepers are as confined as it is,
/// and must be able to stop containers.
fn text(own: &str) -> String {
    let name = own
        .trim()
        .rsplit_once(" (")
        .map_or(own.trim(), |(name, _)| name);
    let rule = match name {
        "" | "unconfined" => String::new(),
        name => format!("  signal (receive) peer={name:?},\n"),
    };
    TEXT.replace("@RUNTIME@\n", &rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_own_profile_may_signal() {
        assert!(TEXT.contains("\n@RUNTIME@\n") && TEXT.contains(&format!("profile {PROFILE} ")));
        for own in ["", "unconfined", "unconfined\n"] {
            assert!(!text(own).contains("@RUNTIME@"));
            assert_eq!(text(own).matches("peer=").count(), 3, "{own}");
        }
        for own in ["/usr/bin/slipway (enforce)\n", "/usr/bin/slipway"] {
            assert!(text(own).contains("  signal (receive) peer=\"/usr/bin/slipway\",\n"));
        }
    }

    #[test]
    fn the_parser_understands_it() {
        // Without loading: the parser needs no AppArmor in the kernel for that.
        let parser = std::process::Command::new(PARSER)
            .args(["--skip-kernel-load", "--skip-cache", "--debug"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        let Ok(mut parser) = parser else {
            println!("SKIPPED: {PARSER} is not installed");
            return;
        };
        use std::io::Write as _;
        let mut stdin = parser.stdin.take().expect("piped");
        stdin
            .write_all(text("x (enforce)").as_bytes())
            .expect("reads");
        drop(stdin);
        assert!(parser.wait().expect("ends").success());
    }
}
