//! The moment of the hooks. Only libcontainer knows it: the container's namespaces and mounts are made, its root is not
//! entered yet. It is given one hook of ours, this program, which tells the command that creates the container and waits
//! for its word. So hooks run where they belong: in the runtime's namespaces, which the creator has left, and with the
//! bundle's own path in the state.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use oci_spec::runtime::{Hook, HookBuilder};
use slipway_runtime::{descriptor, sys};

use crate::{OciError, Result};

/// The word that leads to [`main`].
pub const COMMAND: &str = "hook-relay";
/// Longest state that is read, in bytes.
const LONGEST: u64 = 4 << 20;
const GO: &str = "go";

/// Both pipes of a relay.
pub struct Relay {
    /// What libcontainer's hook says, and where it says it.
    pub asked: OwnedFd,
    ask: OwnedFd,
    /// Where it hears the answer, and where that is written.
    hear: OwnedFd,
    answer: OwnedFd,
}

impl Relay {
    /// Makes the pipes.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn new() -> Result<Self> {
        let failed = OciError::system("make a pipe");
        let (asked, ask) = descriptor::pipe().map_err(&failed)?;
        let (hear, answer) = descriptor::pipe().map_err(&failed)?;
        Ok(Self {
            asked,
            ask,
            hear,
            answer,
        })
    }

    /// What the creator must keep open.
    pub fn descriptors(&self) -> [i32; 2] {
        [self.ask.as_raw_fd(), self.hear.as_raw_fd()]
    }

    /// In the creator: libcontainer's hook inherits the descriptors. The init closes them.
    pub fn pass_on(&self) {
        self.descriptors().into_iter().for_each(sys::keep_over_exec);
    }

    /// The hook for libcontainer.
    ///
    /// # Errors
    /// Never, for a path and arguments.
    pub fn hook(&self) -> Result<Hook> {
        let [ask, hear] = self.descriptors().map(|fd| fd.to_string());
        let args = ["slipway", crate::COMMAND, COMMAND, &ask, &hear].map(str::to_owned);
        let hook = HookBuilder::default()
            .path(PathBuf::from("/proc/self/exe"))
            .args(args.to_vec());
        hook.build()
            .map_err(|e| OciError::spec("hooks", e.to_string()))
    }

    /// The number of the init that the hook told, once `asked` can be read.
    pub fn init(&self) -> Option<i32> {
        let mut text = [0; 64];
        let length = rustix::io::read(&self.asked, &mut text).ok()?;
        String::from_utf8_lossy(&text[..length]).trim().parse().ok()
    }

    /// Lets libcontainer go on, or fail.
    pub fn reply(&self, go: bool) {
        let word = if go { GO } else { "stop" };
        let _ = rustix::io::write(&self.answer, format!("{word}\n").as_bytes());
    }
}

/// What libcontainer's hook does: `args` are the two descriptors.
pub fn main(args: &[OsString]) -> ExitCode {
    match relay(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("can't ask for the hooks: {error}");
            ExitCode::FAILURE
        }
    }
}

fn relay(args: &[OsString]) -> io::Result<bool> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let [ask, hear] = args else {
        return Err(invalid());
    };
    // Pipes can be opened anew by their descriptors.
    let path = |fd: &OsString| PathBuf::from("/proc/self/fd").join(fd);
    let mut state = Vec::new();
    io::stdin().take(LONGEST).read_to_end(&mut state)?;
    let state: serde_json::Value = serde_json::from_slice(&state)?;
    let pid = state["pid"].as_i64().ok_or_else(invalid)?;
    let mut ask = File::options().write(true).open(path(ask))?;
    ask.write_all(format!("{pid}\n").as_bytes())?;
    let mut answer = String::new();
    io::BufReader::new(File::open(path(hear))?).read_line(&mut answer)?;
    Ok(answer.trim() == GO)
}
