//! What there is: `state` and `list`.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use liboci_cli::List;
use serde::Serialize;
use slipway_runtime::cgroup::Hierarchies;

use crate::record::{Container, OCI_VERSION, Status};
use crate::{Context, OciError, Result, print};

/// A container's state: what the specification wants, and what callers of runc look for besides.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    oci_version: &'static str,
    id: String,
    /// 0 when it has stopped.
    pid: i32,
    status: String,
    bundle: PathBuf,
    rootfs: PathBuf,
    created: String,
    owner: String,
    cgroup_path: PathBuf,
    annotations: HashMap<String, String>,
}

impl State {
    fn of(container: Container, cgroups: &Hierarchies) -> Self {
        let status = container.status(cgroups);
        let record = container.record;
        let alive = record.init.filter(|_| status != Status::Stopped);
        let user = nix::unistd::User::from_uid(record.owner.into());
        Self {
            oci_version: OCI_VERSION,
            id: record.id,
            pid: alive.map_or(0, |init| init.pid),
            status: status.to_string(),
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created,
            owner: match user {
                Ok(Some(user)) => user.name,
                _ => record.owner.to_string(),
            },
            cgroup_path: record.cgroup,
            annotations: record.annotations,
        }
    }
}

fn cgroups() -> Result<Hierarchies> {
    Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))
}

fn json(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string_pretty(value);
    text.map_err(|e| OciError::system("write JSON")(std::io::Error::from(e)))
}

/// Prints a container's state.
///
/// # Errors
/// [`OciError::NotFound`].
pub fn state(context: &Context, id: &str) -> Result<()> {
    let container = Container::open(context, id)?;
    let state = State::of(container, &cgroups()?);
    print(&format!("{}\n", json(&state)?))
}

/// Prints all containers.
///
/// # Errors
/// When they can't be read.
pub fn list(context: &Context, args: &List) -> Result<()> {
    if !["table", "json"].contains(&args.format.as_str()) {
        return Err(OciError::Argument {
            option: "--format",
            reason: format!("{:?} is neither table nor json", args.format),
        });
    }
    let mut ids: Vec<String> = match fs::read_dir(&context.root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        entries => entries
            .map_err(OciError::file("read", &context.root))?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect(),
    };
    ids.sort();
    // What is deleted meanwhile, or is no container's, is none.
    let found = ids
        .iter()
        .filter_map(|id| Container::open(context, id).ok());
    if args.quiet {
        let lines: String = found.map(|c| format!("{}\n", c.record.id)).collect();
        return print(&lines);
    }
    let cgroups = cgroups()?;
    let states: Vec<State> = found.map(|c| State::of(c, &cgroups)).collect();
    if args.format == "json" {
        return print(&format!("{}\n", json(&states)?));
    }
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let row = |state: State| {
        [
            state.id,
            state.pid.to_string(),
            state.status,
            state.bundle.display().to_string(),
            state.created,
            state.owner,
        ]
    };
    let rows: Vec<[String; 6]> = std::iter::once(head)
        .chain(states.into_iter().map(row))
        .collect();
    print(&table(&rows))
}

fn table(rows: &[[String; 6]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let line = |row: &[String; 6]| {
        let cells = row.iter().enumerate().map(|(n, cell)| {
            let width = width(n).unwrap_or(0);
            format!("{cell:<width$}")
        });
        let line: Vec<String> = cells.collect();
        format!("{}\n", line.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
