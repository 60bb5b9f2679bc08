//! A container's processes: `ps`.

use std::collections::HashSet;
use std::process::{Command, Stdio};

use liboci_cli::Ps;
use slipway_runtime::cgroup::Hierarchies;

use crate::record::Container;
use crate::{Context, OciError, Result, print};

/// Prints the numbers of a container's processes, or what the host's ps(1) says of them.
///
/// # Errors
/// [`OciError`], also without a ps(1).
pub fn ps(context: &Context, args: &Ps) -> Result<()> {
    let container = Container::open(context, &args.container_id)?;
    let cgroups = Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))?;
    let pids = cgroups.pids(&container.record.cgroup);
    match args.format.as_str() {
        "json" => {
            let text = serde_json::to_string(&pids);
            let text = text.map_err(|e| OciError::system("write JSON")(std::io::Error::from(e)))?;
            return print(&format!("{text}\n"));
        }
        "table" => {}
        other => {
            return Err(OciError::Argument {
                option: "--format",
                reason: format!("{other:?} is neither table nor json"),
            });
        }
    }
    let usual = ["-ef".to_owned()];
    let options = match args.ps_options.as_slice() {
        [] => &usual[..],
        given => given,
    };
    let said = Command::new("ps")
        .args(options)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(OciError::system("execute ps; --format json needs none"))?;
    if !said.status.success() {
        return Err(OciError::Argument {
            option: "ps options",
            reason: format!("ps {} failed ({})", options.join(" "), said.status),
        });
    }
    let text = String::from_utf8_lossy(&said.stdout);
    let rows = select(&text, &pids.into_iter().collect()).ok_or_else(|| OciError::Argument {
        option: "ps options",
        reason: "with them, ps prints no column PID".to_owned(),
    })?;
    print(&rows)
}

/// The head of a table, and the rows whose column PID is one of these.
fn select(text: &str, pids: &HashSet<i32>) -> Option<String> {
    let mut lines = text.lines();
    let head = lines.next()?;
    let column = head.split_whitespace().position(|name| name == "PID")?;
    let ours = |line: &&str| {
        let cell = line.split_whitespace().nth(column);
        cell.and_then(|cell| cell.parse().ok())
            .is_some_and(|pid| pids.contains(&pid))
    };
    let rows = std::iter::once(head).chain(lines.filter(ours));
    Some(rows.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_their_column() {
        let text = "UID PID CMD\nroot 7 sleep 12\nroot 12 sh\n";
        let rows = select(text, &HashSet::from([12])).unwrap();
        assert_eq!(rows, "UID PID CMD\nroot 12 sh\n");
        assert_eq!(select("CMD\nx\n", &HashSet::new()), None);
    }
}
