//! A container's terminal that this process serves itself: `run` and `exec` on a terminal, in the foreground.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use rustix::fs::OFlags;
use slipway_runtime::terminal;

use crate::{OciError, Result};

/// Our end of the socket that the terminal comes through.
#[derive(Debug)]
pub struct Console {
    socket: UnixStream,
}

impl Console {
    /// The container's end of the socket, and ours.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn new() -> Result<(OwnedFd, Self)> {
        let pair = UnixStream::pair();
        let (theirs, socket) = pair.map_err(OciError::system("make a socket"))?;
        Ok((theirs.into(), Self { socket }))
    }

    /// Takes the terminal, which has been sent by now, and makes ours pass on every key.
    ///
    /// # Errors
    /// When none was sent.
    pub fn open(self) -> Result<Relay> {
        let failed = OciError::system("take over the container's terminal");
        let master = terminal::receive(&self.socket).map_err(&failed)?;
        rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)
            .map_err(io::Error::from)
            .map_err(&failed)?;
        let relay = Relay {
            master: master.into(),
            raw: Raw::new(),
            keys: Vec::new(),
            open: true,
        };
        relay.resize();
        Ok(relay)
    }
}

/// Keys in, output out.
pub struct Relay {
    master: File,
    /// Dropped last.
    #[allow(dead_code)]
    raw: Option<Raw>,
    /// What was typed and not yet taken.
    keys: Vec<u8>,
    /// Standard input has not ended.
    open: bool,
}

impl Relay {
    /// The container's side.
    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Whether there is room for more keys.
    pub fn wants_keys(&self) -> bool {
        self.open && self.keys.is_empty()
    }

    /// Whether there are keys that could not be passed on.
    pub fn has_keys(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Reads what was typed.
    pub fn read_keys(&mut self) {
        let mut bytes = [0; 4096];
        match io::stdin().read(&mut bytes) {
            Ok(n) if n > 0 => self.keys.extend_from_slice(&bytes[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ => {
                // What reads on the terminal hears of the end as it would from a keyboard.
                self.open = false;
                self.keys.push(4);
            }
        }
        self.write_keys();
    }

    /// Passes on what was typed, as far as it is taken.
    pub fn write_keys(&mut self) {
        match self.master.write(&self.keys) {
            Ok(n) => drop(self.keys.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.keys.clear(),
        }
    }

    /// Shows what was written; false when nobody has the terminal open any more.
    pub fn show(&mut self) -> bool {
        let mut bytes = [0; 8192];
        loop {
            match self.master.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    let mut out = io::stdout();
                    let _ = out.write_all(&bytes[..n]).and_then(|()| out.flush());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => return false,
            }
        }
    }

    /// Gives the container's terminal the size of ours.
    pub fn resize(&self) {
        if let Ok((width, height)) = terminal::size(io::stdin()) {
            let _ = terminal::resize(&self.master, width, height);
        }
    }
}

/// Standard input as a terminal that passes on every key, until this is dropped.
struct Raw(Termios);

impl Raw {
    /// `None` where standard input is no terminal.
    fn new() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
