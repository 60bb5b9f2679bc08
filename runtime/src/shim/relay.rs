//! Terminals of containers and commands that a shim runs: the shim copies between the terminal and two FIFOs, and a process
//! of ours copies between those and a terminal whose other end the daemon and the keeper have, as in native
//! containers. When that one's size changes, the shim is told.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slipway_shim::{Exit, Process, Task, wait_answer};

use super::input::Input;
use super::{DELETE, KILL, Running, SILENT, Silence};
use crate::{cgroup, sys, terminal};

/// Bytes that are under way in one direction.
const CHUNK: usize = 16 << 10;
/// How long the terminal may take to be there.
const READY: Duration = Duration::from_secs(5);

/// The shim's side of a terminal: two FIFOs, both ends of both open.
#[derive(Debug)]
pub struct Terminal {
    stdin: File,
    stdout: File,
}

impl Terminal {
    /// Opens FIFOs that are there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(stdin: &Path, stdout: &Path) -> io::Result<Self> {
        Ok(Self {
            stdin: both_ends(stdin)?,
            stdout: both_ends(stdout)?,
        })
    }
}

/// Opens a FIFO so that neither this process nor the one on its other side waits for somebody.
pub fn both_ends(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(path)
}

/// Leaves a process that serves the terminal of a container until that has ended. Returns when the master end of the terminal
/// has been sent through `socket`.
///
/// # Errors
/// What the kernel says.
pub fn leave(
    terminal: Terminal,
    socket: &OwnedFd,
    running: &Running,
    process: Process<'_>,
) -> io::Result<()> {
    let (ready, say) = crate::descriptor::pipe()?;
    match sys::clone_process(&sys::CloneOptions::default())? {
        sys::Forked::Child => {
            let kept = [
                terminal.stdin.as_raw_fd(),
                terminal.stdout.as_raw_fd(),
                socket.as_raw_fd(),
                say.as_raw_fd(),
            ];
            sys::close_all_but(&kept);
            let served = begin(socket).and_then(|()| {
                rustix::io::write(&say, b".")?;
                drop(say);
                let mut task = running.connect().map_err(io::Error::other)?;
                let mut relay = Relay::new(terminal, running.clone())?;
                relay.run(&mut task, process, &mut Limits::none())
            });
            sys::exit_now(i32::from(served.is_err()))
        }
        sys::Forked::Parent(_) => {
            drop(say);
            let timeout = Timespec::try_from(READY).map_err(io::Error::other)?;
            poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&timeout))?;
            match rustix::io::read(&ready, &mut [0; 1])? {
                1 => Ok(()),
                _ => Err(io::Error::other("the process that serves it ended")),
            }
        }
    }
}

/// Makes this process the leader of a session on a new terminal, whose master end goes through `socket`; the other one
/// is then descriptors 0 to 2.
///
/// # Errors
/// What the kernel says.
pub fn begin(socket: &OwnedFd) -> io::Result<()> {
    // The end of the other side is seen by reading.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGHUP);
    signals.add(Signal::SIGWINCH);
    signals.add(Signal::SIGPIPE);
    signals.add(Signal::SIGTTOU);
    signals.thread_block()?;
    nix::unistd::setsid()?;
    let terminal = terminal::Terminal::open(0)?;
    terminal.take(socket.as_fd())?;
    let slave = io::stdin();
    let mut settings = tcgetattr(&slave)?;
    // The terminal in the container is the one that echoes and edits.
    cfmakeraw(&mut settings);
    tcsetattr(&slave, SetArg::TCSANOW, &settings)?;
    rustix::fs::fcntl_setfl(
        &slave,
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK,
    )?;
    Ok(())
}

/// When a command is to be ended before its time.
pub struct Limits<'a> {
    /// Then.
    pub deadline: Option<Instant>,
    /// When this is closed by the other side.
    pub caller: Option<&'a OwnedFd>,
    /// What ends it.
    pub end: Box<dyn FnMut() + 'a>,
    /// It was ended.
    pub ended: bool,
    /// It was ended because of the deadline.
    pub late: bool,
    /// How it ended.
    pub exit: Option<Exit>,
}

impl Limits<'_> {
    fn none() -> Self {
        Limits {
            deadline: None,
            caller: None,
            end: Box::new(|| {}),
            ended: false,
            late: false,
            exit: None,
        }
    }
}

/// Copying in both directions. On a pair of pipes instead of a terminal there is nothing to copy.
pub struct Relay {
    terminal: Option<Terminal>,
    running: Running,
    resized: Option<SignalFd>,
    /// From the terminal, for the FIFO.
    input: Vec<u8>,
    /// From the FIFO, for the terminal.
    output: Vec<u8>,
    /// Nobody has the other side of the terminal any more.
    hung_up: bool,
    /// Standard input that is no terminal's, and its FIFO.
    stdin: Option<(Input, PathBuf)>,
    /// The process, while it is seen to live.
    process: Option<OwnedFd>,
    /// It is gone.
    silence: Option<Silence>,
}

impl Relay {
    /// Of the terminal that [`begin`] has opened.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(terminal: Terminal, running: Running) -> io::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGWINCH);
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self {
            terminal: Some(terminal),
            resized: Some(SignalFd::with_flags(&signals, flags)?),
            ..Self::none(running)
        })
    }

    /// Of nothing: the process has its streams.
    pub fn none(running: Running) -> Self {
        Self {
            terminal: None,
            running,
            resized: None,
            input: Vec::new(),
            output: Vec::new(),
            hung_up: false,
            stdin: None,
            process: None,
            silence: None,
        }
    }

    /// And of this.
    pub fn with_input(self, input: Input, fifo: PathBuf) -> Self {
        Self {
            stdin: Some((input, fifo)),
            ..self
        }
    }

    /// The shim has started the process, which, `on_host`, is one that can be watched.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn started(&mut self, pid: u32, on_host: bool) -> io::Result<()> {
        if let Some((input, fifo)) = &mut self.stdin {
            input.started(fifo)?;
        }
        let pid = i32::try_from(pid).ok().filter(|pid| on_host && *pid > 1);
        if let Some(pid) = pid {
            self.process = cgroup::pin(pid);
            if self.process.is_none() {
                self.silence = Some(Silence::after(SILENT));
            }
        }
        Ok(())
    }

    /// Copies until the process has ended, or, if that takes too long, has been ended.
    ///
    /// # Errors
    /// When the shim is gone.
    pub fn run(
        &mut self,
        task: &mut Task,
        process: Process<'_>,
        limits: &mut Limits<'_>,
    ) -> io::Result<()> {
        let number = task.send_wait(process).map_err(io::Error::other)?;
        if self.resized.is_some() {
            self.resize(process);
        }
        let mut patience: Option<Instant> = None;
        loop {
            while let Some((of, result)) = task.client().next("Wait").map_err(io::Error::other)? {
                if of == number {
                    limits.exit = Some(wait_answer(result).map_err(io::Error::other)?);
                }
            }
            let asks = self.silence.as_mut();
            if let Some(silence) =
                asks.filter(|s| limits.exit.is_none() && s.next() <= Instant::now())
            {
                limits.exit = silence.ask(&self.running, process);
            }
            if limits.exit.is_some() {
                break;
            }
            let now = Instant::now();
            if !limits.ended && limits.deadline.is_some_and(|d| d <= now) {
                limits.late = true;
                limits.ended = true;
                (limits.end)();
                patience = Some(Instant::now() + DELETE);
            }
            if patience.is_some_and(|p| p <= Instant::now()) {
                return Err(io::Error::other("it does not end"));
            }
            let wake = patience.or(limits.deadline.filter(|_| !limits.ended));
            let asks = self.silence.as_ref().map(Silence::next);
            let wake = wake.into_iter().chain(asks).min();
            let gone = self.turn(
                Some(&mut *task),
                process,
                limits.caller.filter(|_| !limits.ended),
                wake,
            )?;
            if gone {
                limits.ended = true;
                (limits.end)();
                patience = Some(Instant::now() + DELETE);
            }
        }
        (self.stdin, self.process) = (None, None);
        // What it wrote last is on its way, and all there when this is answered. The container itself is the keeper's to forget.
        let until = Instant::now() + DELETE;
        if process.exec.is_empty() {
            self.drain(process, until, Duration::from_millis(500))
        } else {
            let mut second = self.running.connect().map_err(io::Error::other)?;
            // Meanwhile the FIFO may be full.
            let asked = second.send_delete(process).map_err(io::Error::other)?;
            let mut answered = false;
            while !answered && Instant::now() < until {
                while let Some((of, _)) =
                    second.client().next("Delete").map_err(io::Error::other)?
                {
                    answered |= of == asked;
                }
                if !answered {
                    self.turn(Some(&mut second), process, None, Some(until))?;
                }
            }
            self.drain(process, until, Duration::ZERO)
        }
    }

    /// Copies what is under way, until nothing has come for a while.
    fn drain(&mut self, process: Process<'_>, until: Instant, quiet: Duration) -> io::Result<()> {
        while self.terminal.is_some() && !self.hung_up && Instant::now() < until {
            let before = Instant::now();
            let pending = self.pending();
            if pending == 0 && quiet.is_zero() {
                break;
            }
            let wake = before + if pending == 0 { quiet } else { DELETE };
            self.turn(None, process, None, Some(wake.min(until)))?;
            if pending == 0 && self.pending() == 0 && before.elapsed() >= quiet {
                break;
            }
        }
        Ok(())
    }

    /// Output that is not on the terminal yet.
    fn pending(&self) -> u64 {
        let fifo = self
            .terminal
            .as_ref()
            .map(|t| rustix::io::ioctl_fionread(&t.stdout));
        fifo.and_then(Result::ok).unwrap_or(0) + self.output.len() as u64
    }

    /// Waits for something to do, and does it; true when the caller has gone.
    fn turn(
        &mut self,
        task: Option<&mut Task>,
        process: Process<'_>,
        caller: Option<&OwnedFd>,
        until: Option<Instant>,
    ) -> io::Result<bool> {
        let slave = io::stdin();
        let socket = task.as_ref().map(|task| task.as_fd());
        let [
            mut at_socket,
            mut at_caller,
            mut at_slave,
            mut at_fifo,
            mut at_input,
            mut at_signal,
            mut at_stdin,
            mut at_process,
        ] = [None; 8];
        let mut fds = Vec::with_capacity(8);
        let add =
            |fds: &mut Vec<PollFd<'_>>, place: &mut Option<usize>| *place = Some(fds.len() - 1);
        if let Some(socket) = &socket {
            fds.push(PollFd::new(socket, PollFlags::IN));
            add(&mut fds, &mut at_socket);
        }
        if let Some(caller) = caller {
            fds.push(PollFd::new(caller, PollFlags::IN));
            add(&mut fds, &mut at_caller);
        }
        if let Some(terminal) = &self.terminal {
            if !self.hung_up {
                let mut wanted = PollFlags::empty();
                if self.input.is_empty() {
                    wanted |= PollFlags::IN;
                }
                if !self.output.is_empty() {
                    wanted |= PollFlags::OUT;
                }
                if !wanted.is_empty() {
                    fds.push(PollFd::new(&slave, wanted));
                    add(&mut fds, &mut at_slave);
                }
            }
            if self.output.is_empty() {
                fds.push(PollFd::new(&terminal.stdout, PollFlags::IN));
                add(&mut fds, &mut at_fifo);
            }
            if !self.input.is_empty() {
                fds.push(PollFd::new(&terminal.stdin, PollFlags::OUT));
                add(&mut fds, &mut at_input);
            }
        }
        if let Some(resized) = &self.resized {
            fds.push(PollFd::new(resized, PollFlags::IN));
            add(&mut fds, &mut at_signal);
        }
        let stdin = self.stdin.as_ref();
        if let Some((fd, flags)) = stdin.and_then(|(input, _)| input.wants()) {
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            add(&mut fds, &mut at_stdin);
        }
        if let Some(process) = &self.process {
            fds.push(PollFd::new(process, PollFlags::IN));
            add(&mut fds, &mut at_process);
        }
        let look = stdin.and_then(|(input, _)| input.wake());
        let until = until.into_iter().chain(look).min();
        let left = until.map(|until| {
            until.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
        });
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let has = |place: Option<usize>| place.is_some_and(|n| !fds[n].revents().is_empty());
        let (gone, told) = (has(at_caller), has(at_signal));
        let (message, terminal, output) = (has(at_socket), has(at_slave), has(at_fifo));
        let input = has(at_input);
        let (stdin, ended) = (has(at_stdin) || look.is_some(), has(at_process));
        drop(fds);
        if ended {
            self.process = None;
            self.silence = Some(Silence::after(SILENT));
        }
        if stdin && let Some((input, _)) = &mut self.stdin {
            input.turn(&self.running, process);
        }
        if message && let Some(task) = task {
            task.client().receive("Wait").map_err(io::Error::other)?;
        }
        if output {
            self.read_fifo();
        }
        if terminal || output {
            self.serve_terminal();
        }
        // A size that was set before something was typed is known once that has been read, and goes first.
        if (told || terminal || output) && self.take_signals() {
            self.resize(process);
        }
        if input || terminal {
            self.write_fifo();
        }
        Ok(gone)
    }

    /// Whether the terminal has got a new size.
    fn take_signals(&self) -> bool {
        let mut any = false;
        while let Some(Ok(Some(_))) = self.resized.as_ref().map(SignalFd::read_signal) {
            any = true;
        }
        any
    }

    fn read_fifo(&mut self) {
        let Some(terminal) = &self.terminal else {
            return;
        };
        let mut buffer = [0; CHUNK];
        if let Ok(n) = rustix::io::read(&terminal.stdout, &mut buffer) {
            // With nobody there to read it, it goes the way of all that nobody reads.
            if !self.hung_up {
                self.output.extend_from_slice(&buffer[..n]);
            }
        }
    }

    fn serve_terminal(&mut self) {
        let slave = io::stdin();
        if !self.output.is_empty() {
            match rustix::io::write(&slave, &self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => self.hang_up(),
            }
        }
        if self.input.is_empty() && !self.hung_up {
            let mut buffer = [0; CHUNK];
            match rustix::io::read(&slave, &mut buffer) {
                Ok(0) => self.hang_up(),
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => self.hang_up(),
            }
        }
    }

    fn hang_up(&mut self) {
        self.hung_up = true;
        self.output.clear();
    }

    fn write_fifo(&mut self) {
        let Some(terminal) = &self.terminal else {
            return;
        };
        if self.input.is_empty() {
            return;
        }
        match rustix::io::write(&terminal.stdin, &self.input) {
            Ok(n) => drop(self.input.drain(..n)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.input.clear(),
        }
    }

    /// Tells the shim how large the terminal is, over a connection of its own: an answer to something else may be under
    /// way on the other.
    fn resize(&self, process: Process<'_>) {
        let size = terminal::size(io::stdin());
        // Nobody has set one yet.
        let Some((width, height)) = size
            .ok()
            .filter(|(width, height)| *width > 0 && *height > 0)
        else {
            return;
        };
        if let Ok(mut task) = self.running.connect() {
            let _ = task.resize(process, (width, height), KILL);
        }
    }
}
