//! Driving criu: one `criu swrk` process for each request, over a socket (see criu's `rpc.proto`).
//!
//! Not the command line: over the socket criu says how it ended in fields of their own, and takes directories as
//! descriptors.
//!
//! criu dies with the process that started it. Whatever it had stopped by ptrace then goes on by itself; what
//! was frozen does not, which is [`crate::freezer`]'s part.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message as _;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};

use crate::{sys, wire};

pub mod image;
pub mod rpc;

/// The longest message of criu's.
const MESSAGE: usize = 64 << 10;
/// How often it is looked for the end of what criu restores, and how often in a row that is seen before criu, which
/// may be about to answer, is given up.
const LOOK: Duration = Duration::from_millis(500);
const LOST: u32 = 4;
/// How many lines of criu's log go into an error.
const LOG_LINES: usize = 4;
/// What criu itself starts (`tar`, `iptables`) is looked up here.
const ENVIRONMENT: &[&std::ffi::CStr] = &[
    c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    c"LC_ALL=C",
];

/// Why criu did not do it.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// There is no such program, or it can't be started.
    #[error(
        "can't run criu ({}); install criu or set checkpoint.criu in the configuration", path.display()
    )]
    Start {
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It ended without an answer.
    #[error("criu ({}) ended without an answer{log}", path.display())]
    Lost {
        /// The program.
        path: PathBuf,
        /// What its log says, with a colon before it.
        log: String,
    },
    /// It answered with an error.
    #[error("criu can't {action} it{log}")]
    Failed {
        /// The verb.
        action: &'static str,
        /// What its log says, with a colon before it.
        log: String,
    },
    /// It took too long and was killed.
    #[error("criu did not {action} it in time, and was killed")]
    Late {
        /// The verb.
        action: &'static str,
    },
}

/// A request to criu.
pub struct Call<'a> {
    /// The program, an absolute path.
    pub criu: &'a Path,
    /// What is asked.
    pub kind: rpc::Kind,
    /// How; `images_dir_fd` and `work_dir_fd` are descriptors of this process.
    pub options: Option<rpc::Options>,
    /// Descriptors that criu inherits, by their numbers.
    pub inherit: &'a [RawFd],
    /// When it is killed.
    pub deadline: Instant,
    /// Where criu's log is.
    pub log: Option<PathBuf>,
}

/// What criu has done.
#[derive(Debug, Default)]
pub struct Done {
    /// Its answer.
    pub response: rpc::Response,
    /// The master end of the terminal that it has made anew.
    pub terminal: Option<OwnedFd>,
}

/// Runs criu and returns what it has done. `born` is told criu's process id before criu does anything.
///
/// # Errors
/// [`CriuError`].
pub fn run(call: Call<'_>, born: impl FnOnce(i32)) -> Result<Done, CriuError> {
    let action = match call.kind {
        rpc::Kind::Dump => "dump",
        rpc::Kind::Restore => "restore",
        _ => "ask",
    };
    let started = |source: io::Error| CriuError::Start {
        path: call.criu.to_owned(),
        source,
    };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| started(e.into()))?;
    let child = start(&call, &theirs).map_err(started)?;
    drop(theirs);
    born(child);
    let request = rpc::Request {
        kind: call.kind as i32,
        opts: call.options.clone(),
        notify_success: None,
    };
    let answer = converse(&ours, &request, call.deadline, || has_ended_child(child));
    if !matches!(&answer, Ok(Some(done)) if done.response.success) {
        // It may be in the middle of anything.
        sys::kill_child(child);
    }
    drop(ours);
    let status = sys::wait_child(child);
    match answer {
        Ok(Some(done)) if done.response.success => Ok(done),
        Ok(Some(done)) => Err(CriuError::Failed {
            action,
            log: reason(&call, done.response.cr_errmsg.as_deref()),
        }),
        Ok(None) | Err(Errno::CONNRESET | Errno::PIPE) => match status {
            NOT_FOUND => Err(started(io::ErrorKind::NotFound.into())),
            _ => Err(CriuError::Lost {
                path: call.criu.to_owned(),
                log: reason(&call, None),
            }),
        },
        Err(Errno::TIMEDOUT) => Err(CriuError::Late { action }),
        Err(e) => Err(started(e.into())),
    }
}

/// What the child that should have become criu exits with when it can't.
const NOT_FOUND: i32 = 127;

fn start(call: &Call<'_>, socket: &OwnedFd) -> io::Result<i32> {
    let program = CString::new(call.criu.as_os_str().as_bytes())?;
    let number = CString::new(socket.as_raw_fd().to_string())?;
    let args = [c"criu".to_owned(), c"swrk".to_owned(), number];
    let environment: Vec<CString> = ENVIRONMENT.iter().map(|v| (*v).to_owned()).collect();
    let parent = std::process::id().cast_signed();
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Parent(pid) => Ok(pid),
        sys::Forked::Child => {
            if sys::die_with(parent).is_err() {
                sys::exit_now(1);
            }
            let mut kept = call.inherit.to_vec();
            kept.push(socket.as_raw_fd());
            sys::close_all_but(&kept);
            for fd in kept {
                sys::keep_over_exec(fd);
            }
            let _ = sys::execve(&program, &args, &environment);
            sys::exit_now(NOT_FOUND)
        }
    }
}

/// One request, its notifications and its answer; `None` when criu closes the socket before that.
fn converse(
    socket: &OwnedFd,
    request: &rpc::Request,
    deadline: Instant,
    is_lost: impl Fn() -> bool,
) -> Result<Option<Done>, Errno> {
    send(socket, request)?;
    let mut buffer = vec![0; MESSAGE];
    let mut terminal = None;
    let mut lost = 0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            rustix::event::Timespec::try_from(left.min(LOOK)).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left <= LOOK => return Err(Errno::TIMEDOUT),
            Ok(0) => {
                lost = if is_lost() { lost + 1 } else { 0 };
                match lost {
                    LOST => return Ok(None),
                    _ => continue,
                }
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e),
        }
        let mut descriptors = Vec::new();
        let received = wire::recv_with_fds(socket, &mut buffer, &mut descriptors);
        let length = received.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        if length == 0 {
            return Ok(None);
        }
        let response = rpc::Response::decode(&buffer[..length]).map_err(|_| Errno::BADMSG)?;
        if response.kind != rpc::Kind::Notify as i32 {
            return Ok(Some(Done { response, terminal }));
        }
        if response.notify.and_then(|n| n.script).as_deref() == Some(rpc::TERMINAL) {
            terminal = descriptors.pop().or(terminal);
        }
        let go_on = rpc::Request {
            kind: rpc::Kind::Notify as i32,
            opts: None,
            notify_success: Some(true),
        };
        send(socket, &go_on)?;
    }
}

/// Whether a child of this process other than criu has ended: what it was restoring. criu does not notice that of one
/// that is not its own child.
fn has_ended_child(criu: i32) -> bool {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    let others = children
        .split_whitespace()
        .filter_map(|pid| pid.parse::<i32>().ok());
    others.filter(|pid| *pid != criu).any(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with(['Z', 'X']))
    })
}

fn send(socket: &OwnedFd, request: &rpc::Request) -> Result<(), Errno> {
    let bytes = request.encode_to_vec();
    rustix::net::send(socket.as_fd(), &bytes, SendFlags::NOSIGNAL).map(drop)
}

/// What to say of a failure: criu's first error, or the errors of its log.
fn reason(call: &Call<'_>, message: Option<&str>) -> String {
    let log = call.log.as_deref().and_then(read_log).unwrap_or_default();
    let errors = error_lines(&log);
    match (errors.as_slice(), message.map(str::trim)) {
        ([], None | Some("")) => String::new(),
        ([], Some(message)) => format!(": {message}"),
        (errors, _) => format!(": {}", errors.join("; ")),
    }
}

fn read_log(path: &Path) -> Option<String> {
    use std::io::Read as _;
    let mut text = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(16 << 20).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// The first errors of a log, without times and source lines.
fn error_lines(log: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in log.lines() {
        let Some((_, rest)) = line.split_once("Error (") else {
            continue;
        };
        let text = rest.split_once("): ").map_or(rest, |(_, text)| text);
        // Not fatal where CAP_SYS_RESOURCE is missing, and first in every log.
        let text = text.trim();
        if !text.starts_with("rlimit: Can't setup") && !found.iter().any(|f| f == text) {
            found.push(text.to_owned());
        }
    }
    found.truncate(LOG_LINES);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_told_by_its_errors() {
        let log = "(00.1) Warn  (a.c:1): b\n(00.2) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: x\n\
                   (00.3)      1: Error (criu/sk-inet.c:1): inet: Connected TCP socket\n(00.4) Error (criu/x.c:2): Dumping FAILED.\n\
                   (00.5) Error (criu/x.c:2): Dumping FAILED.\n";
        assert_eq!(
            error_lines(log),
            ["inet: Connected TCP socket", "Dumping FAILED."]
        );
    }

    #[test]
    fn the_end_of_what_is_restored_is_seen() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        assert!(!has_ended_child(0));
        // Its input ends, and so it does; nobody waits for it.
        drop(child.stdin.take());
        let patience = Instant::now() + Duration::from_secs(20);
        while !has_ended_child(0) {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
        assert!(!has_ended_child(pid));
        child.wait().unwrap();
        assert!(!has_ended_child(0));
    }

    #[test]
    fn a_missing_program_is_named() {
        let call = Call {
            criu: Path::new("/nonexistent/criu"),
            kind: rpc::Kind::Version,
            options: None,
            inherit: &[],
            deadline: Instant::now() + std::time::Duration::from_secs(5),
            log: None,
        };
        let error = run(call, |_| {}).unwrap_err();
        assert!(matches!(error, CriuError::Start { .. }), "{error:?}");
        assert!(error.to_string().contains("/nonexistent/criu"));
    }
}
