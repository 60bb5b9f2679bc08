//! A connection to systemd: its private socket, or the system bus. Every step waits in the kernel, and no
//! longer than the deadline.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};

use crate::message::{Decoder, Encoder, Kind, LONGEST, Message, Value};
use crate::names;

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";

/// What went wrong, without the context that only the caller has.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// Nobody is there (yet, or any more).
    Connect(io::Error),
    /// The other side went away in the middle: what it was told may have happened or not.
    Lost(io::Error),
    Timeout,
    Refused {
        name: String,
        message: String,
    },
    /// The job's result is not "done".
    Job(String),
    /// The unit is there, in this state, and is not ours.
    Exists(String),
    Protocol(String),
}

/// A moment, and how long it was away when it was set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    pub(crate) after: Duration,
}

impl Deadline {
    pub(crate) fn new(after: Duration) -> Self {
        Self {
            at: Instant::now() + after,
            after,
        }
    }

    pub(crate) fn left(&self) -> Option<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

/// Where systemd can be reached.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(crate) path: PathBuf,
    /// A message bus is in between.
    pub(crate) bus: bool,
}

/// Whose end is waited for.
pub(crate) enum Awaited<'a> {
    Job(&'a str),
    Unit(&'a str),
}

#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    bus: bool,
    deadline: Deadline,
    input: Vec<u8>,
    serial: u32,
    /// Signals that came while an answer was waited for.
    signals: VecDeque<Message>,
}

impl Connection {
    pub(crate) fn open(address: &Address, deadline: Deadline) -> Result<Self, Trouble> {
        let socket = dial(&address.path, deadline)?;
        let mut connection = Self {
            socket,
            bus: address.bus,
            deadline,
            input: Vec::new(),
            serial: 0,
            signals: VecDeque::new(),
        };
        connection.authenticate()?;
        if connection.bus {
            connection.call(BUS, BUS_PATH, BUS, "Hello", "", Vec::new())?;
        }
        Ok(connection)
    }

    /// SASL, mechanism EXTERNAL: the kernel tells the other side who we are.
    ///
    /// BEGIN goes out with AUTH, as sd-bus does it, and nothing more before the answer: a systemd that finds
    /// BEGIN and the first call in one read keeps the call in its buffer until something else arrives (seen
    /// with 252), which then is never.
    fn authenticate(&mut self) -> Result<(), Trouble> {
        let uid = rustix::process::geteuid().as_raw().to_string();
        let hex: String = uid.bytes().map(|b| format!("{b:02x}")).collect();
        self.send(format!("\0AUTH EXTERNAL {hex}\r\nBEGIN\r\n").as_bytes())?;
        let answer = loop {
            if let Some(end) = self.input.windows(2).position(|w| w == b"\r\n") {
                let rest = self.input.split_off(end + 2);
                break std::mem::replace(&mut self.input, rest);
            }
            if self.input.len() > 4096 {
                return Err(Trouble::Protocol("no end of its greeting".into()));
            }
            self.receive()?;
        };
        if !answer.starts_with(b"OK ") {
            let answer = String::from_utf8_lossy(&answer).trim().to_owned();
            let reason = format!("it does not let this user in (uid {uid}): {answer}");
            return Err(Trouble::Protocol(reason));
        }
        Ok(())
    }

    /// Makes sure that the end of this unit's jobs will be heard of. systemd's private socket brings every
    /// signal anyway.
    pub(crate) fn subscribe(&mut self, unit: &str) -> Result<(), Trouble> {
        if !self.bus {
            return Ok(());
        }
        let jobs = format!(
            "type='signal',sender='{SYSTEMD}',path='{MANAGER_PATH}',interface='{MANAGER}',\
             member='JobRemoved',arg2='{unit}'"
        );
        // Tells when systemd leaves the bus to restart itself: then no JobRemoved will come.
        let owner =
            format!("type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{SYSTEMD}'");
        for rule in [jobs, owner] {
            let mut body = Encoder::default();
            body.str(&rule);
            self.call(BUS, BUS_PATH, BUS, "AddMatch", "s", body.into_bytes())?;
        }
        self.manage("Subscribe", "", Vec::new())?;
        Ok(())
    }

    /// StartTransientUnit; returns the job.
    pub(crate) fn start_transient(
        &mut self,
        unit: &str,
        properties: &[(&str, Value)],
    ) -> Result<String, Trouble> {
        let mut body = Encoder::default();
        body.str(unit);
        body.str("fail");
        body.properties(properties);
        // No auxiliary units.
        body.array(8, |_| ());
        let answer = self.manage("StartTransientUnit", "ssa(sv)a(sa(sv))", body.into_bytes())?;
        text(&answer)
    }

    /// StopUnit; returns the job.
    pub(crate) fn stop(&mut self, unit: &str) -> Result<String, Trouble> {
        let mut body = Encoder::default();
        body.str(unit);
        body.str("replace");
        let answer = self.manage("StopUnit", "ss", body.into_bytes())?;
        text(&answer)
    }

    /// SetUnitProperties: for as long as the unit runs.
    pub(crate) fn set_properties(
        &mut self,
        unit: &str,
        properties: &[(&str, Value)],
    ) -> Result<(), Trouble> {
        let mut body = Encoder::default();
        body.str(unit);
        body.u32(1); // runtime: true
        body.properties(properties);
        self.manage("SetUnitProperties", "sba(sv)", body.into_bytes())?;
        Ok(())
    }

    pub(crate) fn reset_failed(&mut self, unit: &str) -> Result<(), Trouble> {
        let mut body = Encoder::default();
        body.str(unit);
        self.manage("ResetFailedUnit", "s", body.into_bytes())?;
        Ok(())
    }

    /// The unit's ActiveState.
    pub(crate) fn state(&mut self, unit: &str) -> Result<String, Trouble> {
        let answer = self.property(&names::object_path(unit), UNIT, "ActiveState")?;
        let mut d = Decoder::new(&answer.body);
        d.signature()
            .filter(|s| *s == "s")
            .and_then(|_| d.str())
            .map(str::to_owned)
            .ok_or_else(|| Trouble::Protocol("ActiveState is no string".into()))
    }

    /// The unit's job, if it has one.
    pub(crate) fn job(&mut self, unit: &str) -> Result<Option<String>, Trouble> {
        let answer = self.property(&names::object_path(unit), UNIT, "Job")?;
        let mut d = Decoder::new(&answer.body);
        let job = d.signature().filter(|s| *s == "(uo)").and_then(|_| {
            d.align(8);
            Some((d.u32()?, d.str()?))
        });
        match job {
            Some((0, _)) => Ok(None),
            Some((_, path)) => Ok(Some(path.to_owned())),
            None => Err(Trouble::Protocol("Job is no job".into())),
        }
    }

    /// A property of the manager that is a string.
    pub(crate) fn manager_text(&mut self, name: &str) -> Result<String, Trouble> {
        let answer = self.property(MANAGER_PATH, MANAGER, name)?;
        let mut d = Decoder::new(&answer.body);
        let value = d.signature().filter(|s| *s == "s").and_then(|_| d.str());
        value
            .map(str::to_owned)
            .ok_or_else(|| Trouble::Protocol(format!("{name} is no string")))
    }

    fn property(&mut self, path: &str, interface: &str, name: &str) -> Result<Message, Trouble> {
        let mut body = Encoder::default();
        body.str(interface);
        body.str(name);
        self.call(SYSTEMD, path, PROPERTIES, "Get", "ss", body.into_bytes())
    }

    /// Waits for the end of a job and returns its result.
    pub(crate) fn wait(&mut self, awaited: &Awaited<'_>) -> Result<String, Trouble> {
        loop {
            let signal = match self.signals.pop_front() {
                Some(signal) => signal,
                None => self.next()?,
            };
            if signal.kind != Kind::Signal {
                continue;
            }
            if signal.interface == BUS && signal.member == "NameOwnerChanged" {
                return Err(Trouble::Lost(io::ErrorKind::ConnectionReset.into()));
            }
            if signal.interface != MANAGER || signal.member != "JobRemoved" {
                continue;
            }
            let mut d = Decoder::new(&signal.body);
            let (Some(_), Some(job), Some(unit), Some(result)) =
                (d.u32(), d.str(), d.str(), d.str())
            else {
                return Err(Trouble::Protocol("JobRemoved without its fields".into()));
            };
            let is_it = match awaited {
                Awaited::Job(path) => job == *path,
                Awaited::Unit(name) => unit == *name,
            };
            if is_it {
                return Ok(result.to_owned());
            }
        }
    }

    fn manage(&mut self, member: &str, signature: &str, body: Vec<u8>) -> Result<Message, Trouble> {
        self.call(SYSTEMD, MANAGER_PATH, MANAGER, member, signature, body)
    }

    fn call(
        &mut self,
        destination: &str,
        path: &str,
        interface: &str,
        member: &str,
        signature: &str,
        body: Vec<u8>,
    ) -> Result<Message, Trouble> {
        self.serial += 1;
        let call = Message {
            serial: self.serial,
            destination: destination.to_owned(),
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            signature: signature.to_owned(),
            body,
            ..Message::new(Kind::Call)
        };
        self.send(&call.encode())?;
        loop {
            let message = self.next()?;
            match message.kind {
                Kind::Return if message.reply_to == self.serial => return Ok(message),
                Kind::Error if message.reply_to == self.serial => return Err(refusal(message)),
                Kind::Signal => self.signals.push_back(message),
                _ => {}
            }
        }
    }

    fn next(&mut self) -> Result<Message, Trouble> {
        loop {
            match Message::decode(&mut self.input) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => self.receive()?,
                Err(reason) => return Err(Trouble::Protocol(reason.to_owned())),
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), Trouble> {
        while !bytes.is_empty() {
            self.wait_for(PollFlags::OUT)?;
            match send(
                &self.socket,
                bytes,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(Trouble::Lost(e.into())),
            }
        }
        Ok(())
    }

    /// Adds what has come, at least one byte, to the input.
    fn receive(&mut self) -> Result<(), Trouble> {
        if self.input.len() > 2 * LONGEST {
            return Err(Trouble::Protocol("a message without an end".into()));
        }
        let mut buffer = [0; 16 << 10];
        loop {
            self.wait_for(PollFlags::IN)?;
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => return Err(Trouble::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    self.input.extend_from_slice(&buffer[..n]);
                    return Ok(());
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(Trouble::Lost(e.into())),
            }
        }
    }

    fn wait_for(&self, what: PollFlags) -> Result<(), Trouble> {
        loop {
            let left = self.deadline.left().ok_or(Trouble::Timeout)?;
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.socket, what)], timeout.as_ref()) {
                Ok(0) => return Err(Trouble::Timeout),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Trouble::Lost(e.into())),
            }
        }
    }
}

/// Connects. Where the backlog of the socket is full, as when hundreds ask at once, the kernel lets us wait
/// for our turn, until the deadline.
fn dial(path: &Path, deadline: Deadline) -> Result<OwnedFd, Trouble> {
    let failed = |e: Errno| Trouble::Connect(e.into());
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(failed)?;
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    loop {
        let left = deadline.left().ok_or(Trouble::Timeout)?;
        set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::INTR) => {}
            // How the kernel says that SO_SNDTIMEO is over.
            Err(Errno::AGAIN) => return Err(Trouble::Timeout),
            Err(e) => return Err(failed(e)),
        }
    }
}

/// The text that an answer consists of.
fn text(answer: &Message) -> Result<String, Trouble> {
    Decoder::new(&answer.body)
        .str()
        .map(str::to_owned)
        .ok_or_else(|| Trouble::Protocol("an answer without a job".into()))
}

fn refusal(error: Message) -> Trouble {
    let name = error.error.as_str();
    let bus = name.strip_prefix("org.freedesktop.DBus.Error.");
    // The bus says so when systemd goes away to restart itself.
    if let Some("NoReply" | "Disconnected" | "NameHasNoOwner" | "ServiceUnknown") = bus {
        return Trouble::Lost(io::Error::other(error.error));
    }
    let message = match error.signature.starts_with('s') {
        true => Decoder::new(&error.body)
            .str()
            .unwrap_or_default()
            .to_owned(),
        false => String::new(),
    };
    Trouble::Refused {
        name: error.error,
        message,
    }
}
