//! Processes inside a sandbox: the host does not see them, so the runtime is asked, and told.
//!
//! gVisor has two numbers for a process. A command that was executed has, for `exec`, `wait` and `kill`, that of its
//! container's PID namespace; `ps` tells those of the sandbox's, which `kill` takes for all other processes.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::attendant::output;
use super::exec::INNER;
use super::{CommandError, Runtime};
use crate::cgroup::Hierarchies;

/// How long one of these commands may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// Kills a command that was executed in a container, whose number there is `command`, and all that it has started, as far
/// as that can be told by who is whose parent. Runs in a job.
///
/// # Errors
/// [`CommandError`], of the command itself, also when it is gone already.
pub fn kill_tree(
    runtime: &Runtime,
    cgroups: &Hierarchies,
    id: &str,
    dir: &Path,
    command: i32,
) -> Result<(), CommandError> {
    let send = |process: i32, signal: i32| {
        let (process, signal) = (process.to_string(), signal.to_string());
        let args = ["kill", "--pid", &process, id, &signal];
        super::simple(runtime, cgroups, &args, dir, PATIENCE)
    };
    // So that it starts nothing more while it is looked at.
    let _ = send(command, libc::SIGSTOP);
    let table = output(runtime, cgroups, &["ps", id], dir, PATIENCE);
    let table = table.map(|text| processes(&text)).unwrap_or_default();
    if let Some(root) = root_of(&table, &running(dir), command) {
        for process in descendants(&table, root).into_iter().skip(1) {
            let _ = send(process, libc::SIGKILL);
        }
    }
    send(command, libc::SIGKILL)
}

/// The numbers of the commands that run in a container, as their own files have them.
fn running(dir: &Path) -> Vec<i32> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.filter(|e| e.file_name().to_string_lossy().ends_with(INNER));
    let numbers = files.filter_map(|e| fs::read_to_string(e.path()).ok()?.trim().parse().ok());
    numbers.collect()
}

/// Which process of the table a command is. Both kinds of numbers rise, and after the container's first process only
/// commands have no parent in there. While one begins or ends that may not fit; then it is not told.
fn root_of(table: &[(i32, i32)], commands: &[i32], command: i32) -> Option<i32> {
    let mut roots: Vec<i32> = table
        .iter()
        .filter(|(_, parent)| *parent == 0)
        .map(|(process, _)| *process)
        .collect();
    roots.sort_unstable();
    let mut commands = commands.to_vec();
    commands.sort_unstable();
    let at = commands.iter().position(|c| *c == command)?;
    (roots.len() == commands.len() + 1).then(|| roots[at + 1])
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
    let (Some(process), Some(parent)) = (column("PID"), column("PPID")) else {
        return Vec::new();
    };
    let number = |words: &[&str], at: usize| words.get(at).and_then(|word| word.parse().ok());
    lines
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some((number(&words, process)?, number(&words, parent)?))
        })
        .collect()
}

/// The process, and all below it that are in the table.
fn descendants(table: &[(i32, i32)], root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut at = 0;
    while let Some(parent) = found.get(at).copied() {
        at += 1;
        let children = table.iter().filter(|(_, of)| *of == parent);
        let new: Vec<i32> = children
            .map(|(process, _)| *process)
            .filter(|process| !found.contains(process))
            .collect();
        found.extend(new);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_tree_is_found_in_what_ps_prints() {
        let table = "UID       PID       PPID      C         TTY       STIME     TIME      CMD\n\
                     0         2         0         0         ?         02:55     0s        sh\n\
                     0         7         0         0         ?         02:55     10ms      sh\n\
                     0         9         7         0         ?         02:55     0s        sleep 7\n\
                     0         10        0         0         ?         02:55     0s        sh\n\
                     0         11        2         0         ?         02:55     0s        sleep\n\
                     0         12        9         0         ?         02:55     0s        sleep\n";
        let table = processes(table);
        assert_eq!(table.len(), 6);
        assert_eq!(root_of(&table, &[8, 4], 4), Some(7));
        assert_eq!(root_of(&table, &[8, 4], 8), Some(10));
        // Another command is beginning, or over.
        assert_eq!(root_of(&table, &[8, 4, 9], 4), None);
        assert_eq!(root_of(&table, &[4], 4), None);
        assert_eq!(root_of(&table, &[8, 5], 4), None);
        assert_eq!(descendants(&table, 7), [7, 9, 12]);
        assert_eq!(descendants(&table, 10), [10]);
        assert_eq!(processes("nothing of the kind\n1 2 3\n"), []);
    }
}
