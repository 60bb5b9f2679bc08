//! Checkpoints: criu, and whether it can work on this kernel.

use std::path::{Path, PathBuf};

use slipway_config::Config;

use crate::finding::Finding;

const ID: &str = "criu";
const WHAT: &str = "checkpoints";

/// Whether the configured criu works here.
pub(crate) fn check(privileged: bool, config: &Config) -> Vec<Finding> {
    let cost = "CheckpointContainer and CheckpointPod are refused";
    let name = &config.checkpoint.criu;
    if name.is_empty() {
        return vec![Finding::ok(
            ID,
            WHAT,
            "switched off (checkpoint.criu is empty)".to_owned(),
        )];
    }
    let Some(path) = find_criu(name) else {
        let found = format!("no program {name:?}");
        let fix = "install criu, or set checkpoint.criu";
        return vec![Finding::warn(ID, WHAT, found).cost(cost).fix(fix)];
    };
    if !privileged {
        return vec![Finding::not_probed(ID, WHAT)];
    }
    let shown = path.display();
    let asked = std::process::Command::new(&path)
        .arg("check")
        .stdin(std::process::Stdio::null())
        .output();
    let finding = match asked {
        Ok(output) if output.status.success() => {
            Finding::ok(ID, WHAT, format!("{shown} works on this kernel"))
        }
        Ok(output) => {
            let found = format!("{shown}: {}", criu_complaint(&output.stderr));
            Finding::warn(ID, WHAT, found)
                .cost(cost)
                .fix("install a criu that is newer than the kernel")
        }
        Err(e) => Finding::warn(ID, WHAT, format!("{shown} can't be run: {e}"))
            .cost(cost)
            .fix("install criu, or set checkpoint.criu"),
    };
    vec![finding]
}

/// The program of this name or path.
pub fn find_criu(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_absolute() && path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = [
        "/usr/local/sbin",
        "/usr/sbin",
        "/sbin",
        "/usr/local/bin",
        "/usr/bin",
    ];
    std::env::split_paths(&path)
        .chain(usual.map(PathBuf::from))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(Path::new(name)))
        .find(|path| path.is_file())
}

/// The first error of what `criu check` writes.
pub fn criu_complaint(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let error = text.lines().find_map(|line| {
        let (_, rest) = line.split_once("Error (")?;
        Some(rest.split_once("): ").map_or(rest, |(_, text)| text))
    });
    let first = error
        .or_else(|| text.lines().next())
        .unwrap_or("no reason given");
    first.trim().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_told() {
        let text = b"Warn  (a.c:1): x\nError (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds\nError (b): c\n";
        assert_eq!(criu_complaint(text), "vdso: Unexpected rt vDSO area bounds");
        assert_eq!(criu_complaint(b""), "no reason given");
        assert_eq!(find_criu("/nonexistent/criu"), None);
    }
}
