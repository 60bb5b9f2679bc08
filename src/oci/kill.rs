//! Signals, and the freezer.

use std::time::{Duration, Instant};

use liboci_cli::Kill;
use nix::sys::signal::Signal;
use slipway_runtime::cgroup::{self, Hierarchies};
use slipway_runtime::freezer::Freezer;

use crate::record::{Container, Status};
use crate::{Context, OciError, Result};

/// How long a container may take to freeze.
const FREEZE: Duration = Duration::from_secs(10);
/// The C library keeps the first two real-time signals.
const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;

fn cgroups() -> Result<Hierarchies> {
    Hierarchies::detect().map_err(OciError::file("read", "/proc/self/mountinfo"))
}

/// Sends a signal to a container's init, or to all of its processes.
///
/// # Errors
/// [`OciError`].
pub fn kill(context: &Context, args: &Kill) -> Result<()> {
    let container = Container::open(context, &args.container_id)?;
    let signal = number(&args.signal)?;
    let cgroups = cgroups()?;
    let status = container.status(&cgroups);
    let init = container.init();
    match (&init, args.all) {
        (Some(init), _) => cgroup::send(init, signal),
        // Without a PID namespace of its own it can outlive its init.
        (None, true) => {}
        (None, false) => {
            return Err(OciError::NotRunning {
                id: args.container_id.clone(),
                status,
            });
        }
    }
    if args.all {
        cgroups.signal_all(&container.record.cgroup, signal);
    } else if signal == Signal::SIGKILL as i32 && status == Status::Paused {
        // In a frozen v1 cgroup it would only wait.
        Freezer::of(&cgroups, &container.record.cgroup)?
            .thaw()
            .map_err(OciError::file("thaw", &container.record.cgroup))?;
    }
    Ok(())
}

/// A signal by number or name, with or without `SIG`; `RTMIN+n` and `RTMAX-n`, too.
fn number(text: &str) -> Result<i32> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let known = || {
        if let Ok(number) = name.parse::<i32>() {
            return (1..=64).contains(&number).then_some(number);
        }
        let offset = |rest: &str, sign: char| match rest {
            "" => Some(0),
            rest => rest.strip_prefix(sign)?.parse::<i32>().ok(),
        };
        if let Some(rest) = name.strip_prefix("RTMIN") {
            return Some(REAL_TIME.start() + offset(rest, '+')?).filter(|n| REAL_TIME.contains(n));
        }
        if let Some(rest) = name.strip_prefix("RTMAX") {
            return Some(REAL_TIME.end() - offset(rest, '-')?).filter(|n| REAL_TIME.contains(n));
        }
        let signal: Signal = format!("SIG{name}").parse().ok()?;
        Some(signal as i32)
    };
    known().ok_or_else(|| OciError::Argument {
        option: "signal",
        reason: format!("{text:?} is none; give a name such as TERM, or a number of 1 to 64"),
    })
}

/// Freezes a container's processes.
///
/// # Errors
/// [`OciError`]; they run on then.
pub fn pause(context: &Context, id: &str) -> Result<()> {
    let container = Container::open(context, id)?;
    let _lock = container.lock()?;
    let cgroups = cgroups()?;
    let status = container.status(&cgroups);
    if !matches!(status, Status::Created | Status::Running) {
        return Err(OciError::State {
            what: "pause",
            id: id.to_owned(),
            status,
        });
    }
    let freezer = Freezer::of(&cgroups, &container.record.cgroup)?;
    let frozen = freezer.freeze(Instant::now() + FREEZE);
    if frozen.is_err() {
        let _ = freezer.thaw();
    }
    Ok(frozen?)
}

/// Lets a frozen container go on.
///
/// # Errors
/// [`OciError`].
pub fn resume(context: &Context, id: &str) -> Result<()> {
    let container = Container::open(context, id)?;
    let _lock = container.lock()?;
    let cgroups = cgroups()?;
    let status = container.status(&cgroups);
    if status != Status::Paused {
        return Err(OciError::State {
            what: "resume",
            id: id.to_owned(),
            status,
        });
    }
    Freezer::of(&cgroups, &container.record.cgroup)?
        .thaw()
        .map_err(OciError::file("thaw", &container.record.cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGTERM", 15),
            ("term", 15),
            ("RTMIN+3", 37),
            ("SIGRTMAX", 64),
            ("SIGRTMAX-2", 62),
            ("34", 34),
        ] {
            assert_eq!(number(text).unwrap(), expected, "{text}");
        }
        for bad in ["", "0", "65", "-1", "NOPE", "SIG", "RTMIN+99", "RTMIN3"] {
            assert!(number(bad).is_err(), "{bad}");
        }
    }
}
