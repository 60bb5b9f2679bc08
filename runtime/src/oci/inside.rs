//! Processes inside a sandbox: the host does not see them, so the runtime is asked, and told.

use std::path::Path;
use std::time::Duration;

use super::attendant::output;
use super::{CommandError, Runtime};
use crate::cgroup::Hierarchies;

/// How long one of these commands may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// How often what has been born meanwhile is looked for.
const ROUNDS: usize = 4;

/// Kills a process of a container and all that it has started, as far as that can be told by who is whose parent. `root` is its
/// number in the sandbox. Runs in a job.
///
/// # Errors
/// [`CommandError`]; a process that is gone is none.
pub fn kill_tree(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    id: &str,
    dir: &Path,
    root: i32,
) -> Result<(), CommandError> {
    let mut killed = Vec::new();
    for _ in 0..ROUNDS {
        let table = output(runtime, cgroups, &["ps", id], dir, PATIENCE)?;
        let fresh: Vec<i32> = descendants(&processes(&table), root)
            .into_iter()
            .filter(|pid| !killed.contains(pid))
            .collect();
        if fresh.is_empty() {
            break;
        }
        for pid in fresh {
            let number = pid.to_string();
            let args = ["kill", "--pid", &number, id, "9"];
            // It may have ended by itself; the next round tells.
            let _ = super::simple(runtime, cgroups, &args, dir, PATIENCE);
            killed.push(pid);
        }
    }
    Ok(())
}

/// Process and parent, of each line of what `ps` prints.
fn processes(table: &str) -> Vec<(i32, i32)> {
    let mut lines = table.lines();
    let head: Vec<&str> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let column = |name: &str| head.iter().position(|word| *word == name);
    let (Some(pid), Some(parent)) = (column("PID"), column("PPID")) else {
        return Vec::new();
    };
    let number = |words: &[&str], at: usize| words.get(at).and_then(|word| word.parse().ok());
    lines
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some((number(&words, pid)?, number(&words, parent)?))
        })
        .collect()
}

/// The process and all below it that are in the table.
fn descendants(table: &[(i32, i32)], root: i32) -> Vec<i32> {
    let mut found: Vec<i32> = table
        .iter()
        .map(|(pid, _)| *pid)
        .filter(|pid| *pid == root)
        .collect();
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        at += 1;
        let children = table.iter().filter(|(_, of)| *of == parent);
        let new: Vec<i32> = children
            .map(|(pid, _)| *pid)
            .filter(|pid| !found.contains(pid))
            .collect();
        found.extend(new);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_read_from_what_ps_prints() {
        let table = "UID       PID       PPID      C         TTY       STIME     TIME      CMD\n\
                     0         2         0         0         ?         02:55     0s        sh\n\
                     0         7         0         0         ?         02:55     10ms      sh\n\
                     0         9         7         0         ?         02:55     0s        sleep 7\n\
                     0         12        9         0         ?         02:55     0s        sleep\n";
        let table = processes(table);
        assert_eq!(table.len(), 4);
        assert_eq!(descendants(&table, 7), [7, 9, 12]);
        assert_eq!(descendants(&table, 3), [] as [i32; 0]);
        assert_eq!(processes("nothing of the kind\n1 2 3\n"), []);
    }
}
