//! Staying with a container's process until it ends: passing signals on, serving its terminal, collecting its end.

use std::io;
use std::os::fd::AsFd as _;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use slipway_runtime::{cgroup, sys};

use crate::console::{Console, Relay};
use crate::{OciError, Result};

/// The signals of this process, taken through a descriptor.
pub struct Signals(SignalFd);

impl Signals {
    /// Takes all signals that can be taken. Hooks must have run by now: they would inherit it.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn block() -> Result<Self> {
        let set = SigSet::all();
        let failed = OciError::system("take signals");
        set.thread_block().map_err(&failed)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags).map_err(&failed)?))
    }
}

/// Waits for the end of a child of this process; its exit code, or 128 and the signal.
///
/// # Errors
/// When waiting fails.
pub fn stay(pid: i32, signals: &Signals, console: Option<Console>) -> Result<u8> {
    let mut relay = console.map(Console::open).transpose()?;
    loop {
        // Before the first wait: it may have ended already.
        while let Some((ended, code)) = sys::collect_child() {
            if ended == pid {
                if let Some(relay) = &mut relay {
                    relay.show();
                }
                return Ok(u8::try_from(code).unwrap_or(u8::MAX));
            }
        }
        wait(pid, signals, &mut relay)?;
    }
}

fn wait(pid: i32, signals: &Signals, console: &mut Option<Relay>) -> Result<()> {
    let stdin = io::stdin();
    let mut fds = vec![PollFd::new(&signals.0, PollFlags::IN)];
    if let Some(relay) = console.as_ref() {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, relay.has_keys());
        fds.push(PollFd::from_borrowed_fd(relay.master(), wanted));
        if relay.wants_keys() {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(OciError::system("wait for the container")(e)),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    drop(fds);
    if let Some(relay) = console {
        if ready.get(2) == Some(&true) {
            relay.read_keys();
        }
        if ready.get(1) == Some(&true) {
            relay.write_keys();
            if !relay.show() {
                // Its terminal has gone before it; what it wrote has been shown.
                *console = None;
            }
        }
    }
    while let Ok(Some(info)) = signals.0.read_signal() {
        let number = info.ssi_signo.cast_signed();
        match Signal::try_from(number) {
            Ok(Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGURG) => {}
            Ok(Signal::SIGWINCH) if console.is_some() => {
                console.iter().for_each(Relay::resize);
            }
            _ => {
                if let Some(process) = cgroup::pin(pid) {
                    cgroup::send(&process, number);
                }
            }
        }
    }
    Ok(())
}
