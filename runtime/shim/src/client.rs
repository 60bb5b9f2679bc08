//! A connection to a shim, for one call after the other. Every call has a deadline.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect as connect_to, send,
    socket_with,
};

use crate::error::ShimError;
use crate::program::Address;
use crate::wire::{self, Inbox, Incoming};

/// How often a connection is tried again whose other side has no room for one more.
const RETRY: Duration = Duration::from_millis(10);
/// Bytes read at once.
const CHUNK: usize = 16 << 10;

/// Connects to a shim. The socket does not block.
///
/// # Errors
/// [`ShimError::Connect`].
pub fn connect(address: &Address, timeout: Duration) -> Result<OwnedFd, ShimError> {
    let until = Instant::now() + timeout;
    let failed = |source: io::Error| ShimError::Connect {
        address: address.socket.clone(),
        source,
    };
    let path = address
        .socket
        .strip_prefix("unix://")
        .unwrap_or(&address.socket);
    let to = match path.strip_prefix(['@', '\0']) {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
        None => SocketAddrUnix::new(path),
    };
    let to = to.map_err(|e| failed(e.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| failed(e.into()))?;
        match connect_to(&socket, &to) {
            Ok(()) => return Ok(socket),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if Instant::now() < until => {
                let _ = wait(&mut [], Instant::now() + RETRY);
            }
            Err(e) => return Err(failed(e.into())),
        }
    }
}

/// Waits for descriptors; false when time is up.
fn wait(fds: &mut [PollFd<'_>], until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    inbox: Inbox,
    /// Number of the last call; those of clients are odd.
    stream: u32,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ShimError::Connect`].
    pub fn new(address: &Address, timeout: Duration) -> Result<Self, ShimError> {
        Ok(Self {
            socket: connect(address, timeout)?,
            inbox: Inbox::default(),
            stream: 0,
        })
    }

    /// Calls a method and waits for the answer.
    ///
    /// # Errors
    /// [`ShimError`]; after any but [`ShimError::Refused`] and [`ShimError::TimedOut`] the connection is of no use.
    pub fn call<A: Message>(
        &mut self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Duration,
    ) -> Result<A, ShimError> {
        let until = Instant::now() + timeout;
        let stream = self.send(service, method, request, timeout)?;
        loop {
            if let Some(answer) = self.take(stream, method)? {
                return Ok(answer);
            }
            let ready = wait(&mut [PollFd::new(&self.socket, PollFlags::IN)], until);
            match ready.map_err(|source| broken(method, source))? {
                true => self.receive(method)?,
                false => {
                    return Err(ShimError::TimedOut {
                        method: method.to_owned(),
                        timeout,
                    });
                }
            }
        }
    }

    /// Sends a request, whose answer is for [`Client::take`]. It is sent within `timeout`, or, if that is zero, within ten
    /// seconds, and the shim knows of no limit.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn send(
        &mut self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Duration,
    ) -> Result<u32, ShimError> {
        let unreadable = |problem| ShimError::Protocol {
            method: method.to_owned(),
            problem,
        };
        self.stream = match self.stream {
            0 => 1,
            last => last.wrapping_add(2),
        };
        let payload = request
            .write_to_bytes()
            .map_err(|e| unreadable(e.to_string()))?;
        let bytes =
            wire::request(self.stream, service, method, payload, timeout).map_err(unreadable)?;
        let patience = if timeout.is_zero() {
            Duration::from_secs(10)
        } else {
            timeout
        };
        self.write(&bytes, Instant::now() + patience, method, patience)?;
        Ok(self.stream)
    }

    fn write(
        &self,
        mut bytes: &[u8],
        until: Instant,
        method: &str,
        timeout: Duration,
    ) -> Result<(), ShimError> {
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let ready = wait(&mut [PollFd::new(&self.socket, PollFlags::OUT)], until);
                    if !ready.map_err(|source| broken(method, source))? {
                        return Err(ShimError::TimedOut {
                            method: method.to_owned(),
                            timeout,
                        });
                    }
                }
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ShimError::Closed {
                        method: method.to_owned(),
                    });
                }
                Err(e) => return Err(broken(method, e.into())),
            }
        }
        Ok(())
    }

    /// Reads what is there; `method` is for messages.
    ///
    /// # Errors
    /// [`ShimError`], of which [`ShimError::Closed`] is the end of the shim.
    pub fn receive(&mut self, method: &str) -> Result<(), ShimError> {
        let mut buffer = [0; CHUNK];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::CONNRESET) => Err(ShimError::Closed {
                method: method.to_owned(),
            }),
            Ok(n) => {
                self.inbox.feed(&buffer[..n]);
                Ok(())
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(broken(method, e.into())),
        }
    }

    /// The answer to a call of [`Client::send`], if it has been received; those to earlier calls are dropped.
    ///
    /// # Errors
    /// [`ShimError`].
    pub fn take<A: Message>(&mut self, stream: u32, method: &str) -> Result<Option<A>, ShimError> {
        while let Some((of, result)) = self.next(method)? {
            if of == stream {
                return answer(method, result).map(Some);
            }
        }
        Ok(None)
    }

    /// The next answer that has been received, and the number of its call.
    ///
    /// # Errors
    /// [`ShimError::Protocol`].
    #[expect(clippy::type_complexity, reason = "it is what a message says")]
    pub fn next(
        &mut self,
        method: &str,
    ) -> Result<Option<(u32, Result<Vec<u8>, (i32, String)>)>, ShimError> {
        loop {
            let message = self.inbox.next().map_err(|problem| ShimError::Protocol {
                method: method.to_owned(),
                problem,
            })?;
            match message {
                None => return Ok(None),
                Some(Incoming::Response { stream, result }) => return Ok(Some((stream, result))),
                // Shims ask nothing on this connection.
                Some(Incoming::Request { .. }) => {}
            }
        }
    }
}

/// What an answer says.
///
/// # Errors
/// [`ShimError::Refused`], [`ShimError::Protocol`].
pub fn answer<A: Message>(
    method: &str,
    result: Result<Vec<u8>, (i32, String)>,
) -> Result<A, ShimError> {
    let bytes = result.map_err(|(code, message)| ShimError::Refused {
        method: method.to_owned(),
        code,
        message,
    })?;
    A::parse_from_bytes(&bytes).map_err(|e| ShimError::Protocol {
        method: method.to_owned(),
        problem: e.to_string(),
    })
}

fn broken(method: &str, source: io::Error) -> ShimError {
    ShimError::Connection {
        method: method.to_owned(),
        source,
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
