//! The life of a container, and of a pod, as the daemon knows it.

use slipway_proto::keeper::{ContainerState as KeeperState, Phase as KeeperPhase};

/// Exit code of a container whose end nobody saw.
pub const LOST_EXIT_CODE: i32 = 255;
/// Exit code of a container that could not be started for a reason other than its command.
pub const START_ERROR_EXIT_CODE: i32 = 128;

/// Where a container is in its life. It only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Its init waits for the start.
    Created,
    /// Its command runs.
    Running,
    /// It has ended, or never began.
    Exited,
}

impl Stage {
    /// For messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// Why a container ended as it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its process ended.
    Process,
    /// Its command could not be executed.
    CannotRun,
    /// It could not be started.
    StartError,
    /// Nobody saw it end: its keeper is gone.
    Lost,
}

/// A container's state. Times are nanoseconds since the epoch, 0 for what has not happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Where it is in its life.
    pub stage: Stage,
    /// Its init, in the keeper's PID namespace; 0 once exited.
    pub pid: i32,
    /// When it was created.
    pub created_at: i64,
    /// When its command began.
    pub started_at: i64,
    /// When it ended.
    pub finished_at: i64,
    /// Exit status, or 128 + signal.
    pub exit_code: i32,
    /// The kernel killed a process of it for want of memory.
    pub oom_killed: bool,
    /// For a person; empty unless something went wrong.
    pub message: String,
    end: End,
}

impl Status {
    /// A container that has just been created.
    pub fn created(now: i64, pid: i32) -> Self {
        Self {
            stage: Stage::Created,
            pid,
            created_at: now,
            started_at: 0,
            finished_at: 0,
            exit_code: 0,
            oom_killed: false,
            message: String::new(),
            end: End::Process,
        }
    }

    /// Takes over what the keeper says, unless that is older news than what is known. Returns whether
    /// anything changed.
    pub fn apply(&mut self, news: &KeeperState) -> bool {
        let stage = match news.phase() {
            KeeperPhase::Created => Stage::Created,
            KeeperPhase::Running => Stage::Running,
            KeeperPhase::Exited => Stage::Exited,
        };
        if stage < self.stage {
            return false;
        }
        // The start of what has ended is settled; only a keeper's own word replaces our guess of a loss.
        let before = self.clone();
        self.stage = stage;
        self.pid = if stage == Stage::Exited { 0 } else { news.pid };
        for (mine, theirs) in [
            (&mut self.created_at, news.created_at),
            (&mut self.started_at, news.started_at),
            (&mut self.finished_at, news.finished_at),
        ] {
            if theirs != 0 {
                *mine = theirs;
            }
        }
        if stage == Stage::Exited {
            self.exit_code = news.exit_code;
            self.oom_killed = news.oom_killed;
            self.message.clone_from(&news.message);
            self.end = if news.cannot_run {
                End::CannotRun
            } else {
                End::Process
            };
        }
        *self != before
    }

    /// Its command runs, as the keeper answered; the keeper's event brings the exact time.
    pub fn running(&mut self, now: i64) -> bool {
        if self.stage != Stage::Created {
            return false;
        }
        self.stage = Stage::Running;
        self.started_at = now;
        true
    }

    /// It could not be started; nothing of it runs.
    pub fn start_failed(&mut self, now: i64, message: String) -> bool {
        self.end_as(End::StartError, START_ERROR_EXIT_CODE, now, message)
    }

    /// Its keeper is gone and left no word about it.
    pub fn lost(&mut self, now: i64, message: String) -> bool {
        self.end_as(End::Lost, LOST_EXIT_CODE, now, message)
    }

    fn end_as(&mut self, end: End, exit_code: i32, now: i64, message: String) -> bool {
        if self.stage == Stage::Exited {
            return false;
        }
        self.stage = Stage::Exited;
        self.pid = 0;
        self.finished_at = now;
        self.exit_code = exit_code;
        self.message = message;
        self.end = end;
        true
    }

    /// The reason in one word, as the kubelet shows it; empty unless exited.
    pub fn reason(&self) -> &'static str {
        match (self.stage, self.end) {
            (Stage::Created | Stage::Running, _) => "",
            (_, End::CannotRun) => "ContainerCannotRun",
            (_, End::StartError) => "StartError",
            (_, End::Lost) => "Unknown",
            (_, End::Process) if self.oom_killed => "OOMKilled",
            (_, End::Process) if self.exit_code == 0 => "Completed",
            (_, End::Process) => "Error",
        }
    }
}

/// Where a pod is in its life. It only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodStage {
    /// It takes containers.
    Ready,
    /// It takes no more containers; what it has is being taken down, or its keeper died.
    NotReady,
    /// Nothing of it runs and its network is given back.
    Stopped,
}

impl PodStage {
    /// For messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::NotReady => "being stopped, or its keeper died",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn news(phase: KeeperPhase, exit_code: i32, oom_killed: bool, cannot_run: bool) -> KeeperState {
        KeeperState {
            phase: phase as i32,
            pid: 7,
            created_at: 1,
            started_at: if phase == KeeperPhase::Created { 0 } else { 2 },
            finished_at: if phase == KeeperPhase::Exited { 3 } else { 0 },
            exit_code,
            oom_killed,
            cannot_run,
            ..KeeperState::default()
        }
    }

    #[test]
    fn every_end_has_its_reason() {
        for (exit, oom, cannot, reason) in [
            (0, false, false, "Completed"),
            (1, false, false, "Error"),
            (137, true, false, "OOMKilled"),
            (127, false, true, "ContainerCannotRun"),
        ] {
            let mut status = Status::created(1, 7);
            assert_eq!(status.reason(), "");
            assert!(status.apply(&news(KeeperPhase::Exited, exit, oom, cannot)));
            assert_eq!(
                (status.reason(), status.exit_code, status.pid),
                (reason, exit, 0)
            );
        }
        let mut lost = Status::created(1, 7);
        assert!(lost.lost(5, "gone".into()));
        assert_eq!((lost.reason(), lost.exit_code), ("Unknown", LOST_EXIT_CODE));
        assert!(!lost.start_failed(6, "late".into()), "an end is final");
    }

    #[test]
    fn a_keepers_word_replaces_a_guess() {
        let mut status = Status::created(1, 7);
        assert!(status.running(50));
        assert!(!status.running(60));
        assert!(status.apply(&news(KeeperPhase::Running, 0, false, false)));
        assert_eq!(status.started_at, 2);
        status.lost(9, "gone".into());
        assert!(status.apply(&news(KeeperPhase::Exited, 3, false, false)));
        assert_eq!(
            (status.reason(), status.exit_code, status.finished_at),
            ("Error", 3, 3)
        );
    }

    proptest! {
        #[test]
        fn a_container_never_goes_back(events in proptest::collection::vec(0..5u8, 0..12)) {
            let mut status = Status::created(1, 7);
            for event in events {
                let before = status.stage;
                match event {
                    0 => status.apply(&news(KeeperPhase::Created, 0, false, false)),
                    1 => status.apply(&news(KeeperPhase::Running, 0, false, false)),
                    2 => status.apply(&news(KeeperPhase::Exited, 1, false, false)),
                    3 => status.running(4),
                    _ => status.lost(4, String::new()),
                };
                prop_assert!(status.stage >= before);
                prop_assert_eq!(status.reason().is_empty(), status.stage != Stage::Exited);
                prop_assert_eq!(status.finished_at != 0, status.stage == Stage::Exited);
            }
        }
    }
}
