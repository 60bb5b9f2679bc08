//! A process that is gone, while its shim says nothing of its end.
//!
//! Shims have lost ends: of processes that end while they are being started, or of all while they are overrun. Whoever waits for
//! one looks at the process itself, too, and asks when it is gone.

use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};
use slipway_shim::{Exit, Process, ShimError};

use super::Running;

/// How long a shim may say nothing of a process that is gone before it is asked.
pub const SILENT: Duration = Duration::from_secs(5);
/// How often it is asked.
const AGAIN: Duration = Duration::from_secs(1);
/// How long it is asked before the end is taken for one of which nothing is known.
const LOST: Duration = Duration::from_secs(30);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(2);
/// Exit code of an end of which nobody knows more.
pub const UNKNOWN: u32 = 255;

/// Since when.
#[derive(Debug)]
pub struct Silence {
    next: Instant,
    last: Instant,
}

impl Silence {
    /// The process is gone; the shim is asked for the first time after `grace`.
    pub fn after(grace: Duration) -> Self {
        let next = Instant::now() + grace;
        Self {
            next,
            last: next + LOST,
        }
    }

    /// When it is asked next.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Asks; `None` if it still takes the process for a running one, or does not answer.
    pub fn ask(&mut self, running: &Running, process: Process<'_>) -> Option<Exit> {
        let state = running
            .connect()
            .and_then(|mut task| task.state(process, ANSWER));
        let now = Instant::now();
        self.next = now + AGAIN;
        told(state, now >= self.last)
    }

    /// Asks until there is an answer, or no hope of one. Runs in a job.
    pub fn end(&mut self, running: &Running, process: Process<'_>) -> Exit {
        loop {
            if let Some(exit) = self.ask(running, process) {
                return exit;
            }
            let left = self.next.saturating_duration_since(Instant::now());
            if let Ok(left) = Timespec::try_from(left) {
                let _ = poll(&mut [], Some(&left));
            }
        }
    }
}

fn told(state: Result<Option<Exit>, ShimError>, last: bool) -> Option<Exit> {
    match state {
        Ok(Some(exit)) => Some(exit),
        // It has forgotten the process: there is nothing more to come.
        Err(e) if e.is_not_found() => Some(Exit { code: UNKNOWN }),
        _ if last => Some(Exit { code: UNKNOWN }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_unknown_only_when_nobody_will_tell() {
        let refused = |code| {
            Err(ShimError::Refused {
                method: "State".into(),
                code,
                message: "so".into(),
            })
        };
        assert_eq!(told(Ok(Some(Exit { code: 3 })), true).unwrap().code, 3);
        assert_eq!(told(Ok(None), false), None);
        assert_eq!(told(refused(2), false), None);
        assert_eq!(told(refused(5), false).unwrap().code, UNKNOWN);
        for state in [Ok(None), refused(2)] {
            assert_eq!(told(state, true).unwrap().code, UNKNOWN);
        }
    }
}
