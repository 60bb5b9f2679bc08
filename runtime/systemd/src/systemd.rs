//! Starting and stopping units, whatever systemd is doing meanwhile: restarting itself, being slow, or
//! remembering a unit of the same name.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use crate::connection::{Address, Awaited, Connection, Deadline, Trouble};
use crate::error::SystemdError;
use crate::message::Value;

/// systemd's own socket: no bus in between, and there before the bus is.
const PRIVATE: &str = "/run/systemd/private";
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// How many talk to systemd directly at a time; whoever comes beside them goes over the bus. Directly is faster
/// for one (half the time, with systemd 252), but systemd tells everybody on its private socket of everything:
/// two hundred would each be told of two hundred units, while the bus brings each only what it asked for.
const DIRECT: usize = 4;

/// How often a lost or refused connection is made anew. With the pauses between, this takes as long as a
/// systemd that executes itself again may need, and then ends.
const TRIES: usize = 60;
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Whether systemd is PID 1 here (sd_booted(3)).
pub fn booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A scope to be made around a process.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// Its name, which ends in `.scope`.
    pub unit: &'a str,
    /// The slice that it lies in, which systemd makes if it is not there.
    pub slice: &'a str,
    /// The process; 0: the one that asks. Another number is right only where systemd counts processes as we do.
    pub process: u32,
    /// For people.
    pub description: &'a str,
    /// Its limits.
    pub properties: &'a [(&'a str, Value)],
}

/// The way to systemd. Holds nothing open: every call connects, because calls are rare and systemd drops
/// its connections when it executes itself again.
#[derive(Debug, Clone)]
pub struct Systemd {
    addresses: Vec<Address>,
}

/// What is being done, for messages.
struct Task<'a> {
    action: &'static str,
    unit: &'a str,
    deadline: Deadline,
}

impl Systemd {
    /// The systemd of this machine.
    ///
    /// # Errors
    /// [`SystemdError::NotRunning`].
    pub fn here() -> Result<Self, SystemdError> {
        if !booted() {
            return Err(SystemdError::NotRunning);
        }
        let address = |path: &str, bus| Address {
            path: PathBuf::from(path),
            bus,
        };
        Ok(Self {
            addresses: vec![address(PRIVATE, false), address(SYSTEM_BUS, true)],
        })
    }

    #[cfg(test)]
    pub(crate) fn at(path: &Path, bus: bool) -> Self {
        Self {
            addresses: vec![Address {
                path: path.to_owned(),
                bus,
            }],
        }
    }

    /// Its version, as systemd writes it.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub fn version(&self, within: Duration) -> Result<String, SystemdError> {
        let task = Task {
            action: "tell the version of",
            unit: "systemd",
            deadline: Deadline::new(within),
        };
        self.session(&task, |c| c.manager_text("Version"))
    }

    /// Makes a delegated scope with the process in it, and waits until it is there. `joined` tells
    /// whether the process is in it: asked when the answer got lost.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub fn start_scope(
        &self,
        scope: &Scope<'_>,
        within: Duration,
        joined: &dyn Fn() -> bool,
    ) -> Result<(), SystemdError> {
        let text = |s: &str| Value::Str(s.to_owned());
        let mut properties = vec![
            ("Description", text(scope.description)),
            ("Slice", text(scope.slice)),
            ("PIDs", Value::U32s(vec![scope.process])),
            // What is below the scope is ours, and every controller is there.
            ("Delegate", Value::Bool(true)),
            // Not to be stopped early in a shutdown, before the kubelet has had its say.
            ("DefaultDependencies", Value::Bool(false)),
            // Forgotten as soon as it is over, also if it failed.
            ("CollectMode", text("inactive-or-failed")),
        ];
        properties.extend_from_slice(scope.properties);
        self.start(scope.unit, &properties, within, joined)
    }

    /// Makes a slice and those that it lies in; one that is there already is fine. `exists` tells whether its
    /// cgroup is there.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub fn start_slice(
        &self,
        unit: &str,
        description: &str,
        within: Duration,
        exists: &dyn Fn() -> bool,
    ) -> Result<(), SystemdError> {
        let text = |s: &str| Value::Str(s.to_owned());
        let properties = [
            ("Description", text(description)),
            ("DefaultDependencies", Value::Bool(false)),
            ("CollectMode", text("inactive-or-failed")),
        ];
        self.start(unit, &properties, within, exists)
    }

    /// Gives a unit that is there other limits, all or none of them, and waits until systemd has written
    /// them to the unit's cgroup.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub fn set_properties(
        &self,
        unit: &str,
        properties: &[(&str, Value)],
        within: Duration,
    ) -> Result<(), SystemdError> {
        let task = Task {
            action: "change the limits of",
            unit,
            deadline: Deadline::new(within),
        };
        self.session(&task, |c| {
            c.set_properties(unit, properties)?;
            // systemd answers first and writes afterwards, but before it hears the next call.
            c.state(unit).map(drop)
        })
    }

    /// Stops a unit and waits until it is gone; one that is not there is fine. Of a slice, everything in it
    /// is stopped.
    ///
    /// # Errors
    /// [`SystemdError`].
    pub fn stop(&self, unit: &str, within: Duration) -> Result<(), SystemdError> {
        let task = Task {
            action: "stop",
            unit,
            deadline: Deadline::new(within),
        };
        self.session(&task, |c| {
            c.subscribe(unit)?;
            match c.stop(unit) {
                // However it ended: whether the cgroup is gone is for the caller to see.
                Ok(job) => c.wait(&Awaited::Job(&job)).map(drop),
                Err(Trouble::Refused { name, .. }) if name == NO_SUCH_UNIT => Ok(()),
                Err(e) => Err(e),
            }
        })
    }

    fn start(
        &self,
        unit: &str,
        properties: &[(&str, Value)],
        within: Duration,
        done: &dyn Fn() -> bool,
    ) -> Result<(), SystemdError> {
        let task = Task {
            action: "start",
            unit,
            deadline: Deadline::new(within),
        };
        let (mut asked, mut cleared) = (false, false);
        self.session(&task, |c| {
            // What was asked on a connection that then broke may have been done.
            if asked && done() {
                return Ok(());
            }
            c.subscribe(unit)?;
            loop {
                asked = true;
                match c.start_transient(unit, properties) {
                    Ok(job) => return ended(&c.wait(&Awaited::Job(&job))?),
                    Err(Trouble::Refused { name, .. }) if name == UNIT_EXISTS => {}
                    Err(e) => return Err(e),
                }
                if done() {
                    return Ok(());
                }
                // Asked for before, and not yet done?
                if c.job(unit)?.is_some() {
                    let result = c.wait(&Awaited::Unit(unit))?;
                    return match ended(&result) {
                        Ok(()) if done() => Ok(()),
                        // Of somebody else who asked at the same time.
                        Ok(()) => Err(Trouble::Exists("active".to_owned())),
                        Err(e) => Err(e),
                    };
                }
                let state = c.state(unit)?;
                if done() {
                    return Ok(());
                }
                if cleared || !["failed", "inactive"].contains(&state.as_str()) {
                    return Err(Trouble::Exists(state));
                }
                // The remains of one that failed.
                cleared = true;
                match c.reset_failed(unit) {
                    Ok(()) => {}
                    Err(Trouble::Refused { name, .. }) if name == NO_SUCH_UNIT => {}
                    Err(e) => return Err(e),
                }
            }
        })
    }

    /// Runs `work` with a connection, with another one when systemd goes away in the middle.
    fn session<T>(
        &self,
        task: &Task<'_>,
        mut work: impl FnMut(&mut Connection) -> Result<T, Trouble>,
    ) -> Result<T, SystemdError> {
        let mut pause = SHORTEST_PAUSE;
        let mut tries = 0;
        loop {
            tries += 1;
            let slot = take_slot();
            let (trouble, address) = match self.connect(slot.is_some(), task.deadline) {
                Ok((mut connection, address)) => match work(&mut connection) {
                    Ok(result) => return Ok(result),
                    Err(trouble) => (trouble, address),
                },
                Err(failed) => failed,
            };
            let passing = matches!(trouble, Trouble::Connect(_) | Trouble::Lost(_));
            let time = task.deadline.left().is_some_and(|left| left > pause);
            if !passing || !time || tries >= TRIES {
                return Err(task.error(trouble, address));
            }
            drop(slot);
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Connects, directly or over the bus, and if that is not to be had, the other way.
    fn connect(
        &self,
        direct: bool,
        deadline: Deadline,
    ) -> Result<(Connection, PathBuf), (Trouble, PathBuf)> {
        let mut first = None;
        let (preferred, rest): (Vec<_>, Vec<_>) =
            self.addresses.iter().partition(|a| a.bus != direct);
        for address in preferred.into_iter().chain(rest) {
            match Connection::open(address, deadline) {
                Ok(connection) => return Ok((connection, address.path.clone())),
                Err(trouble) => {
                    first.get_or_insert((trouble, address.path.clone()));
                }
            }
        }
        Err(first.unwrap_or_else(|| (Trouble::Timeout, PathBuf::new())))
    }
}

/// One of the places at systemd's private socket, if one is free: a name in the abstract namespace, which
/// its owner cannot forget to give back.
fn take_slot() -> Option<OwnedFd> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .ok()?;
    let free = |i| {
        let name = format!("slipway/systemd/{i}");
        SocketAddrUnix::new_abstract_name(name.as_bytes())
            .is_ok_and(|address| bind(&socket, &address).is_ok())
    };
    (0..DIRECT).any(free).then_some(socket)
}

/// A start job's result.
fn ended(result: &str) -> Result<(), Trouble> {
    match result {
        "done" => Ok(()),
        other => Err(Trouble::Job(other.to_owned())),
    }
}

impl Task<'_> {
    fn error(&self, trouble: Trouble, address: PathBuf) -> SystemdError {
        let (action, unit) = (self.action, self.unit.to_owned());
        match trouble {
            Trouble::Connect(source) | Trouble::Lost(source) => SystemdError::Connect {
                action,
                unit,
                address,
                source,
            },
            Trouble::Timeout => SystemdError::Timeout {
                action,
                unit,
                address,
                waited: self.deadline.after,
            },
            Trouble::Refused { name, message } => SystemdError::Refused {
                action,
                unit,
                name,
                message,
            },
            Trouble::Job(result) => SystemdError::Job {
                action,
                unit,
                result,
            },
            Trouble::Exists(state) => SystemdError::Exists { unit, state },
            Trouble::Protocol(reason) => SystemdError::Protocol { address, reason },
        }
    }
}

#[cfg(test)]
mod tests;
