//! Connections from the daemon: requests in, answers and events out, none of them blocking the loop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::{self, EventData, EventFlags};
use slipway_proto::keeper::{ContainerState, ErrorKind, Request};

use super::{Keeper, Source, wire_error};
use crate::wire;

/// Most bytes that wait for a subscriber that does not read; one that is further behind is cut off, and
/// finds the present state when it subscribes again.
const MAX_BACKLOG: usize = 4 << 20;

/// One connection; it carries one call, or the event stream.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    output: Vec<u8>,
    pub(super) subscribed: bool,
    /// Whether epoll is asked to tell when the socket takes output again.
    waiting_for_room: bool,
    broken: bool,
}

impl Connection {
    /// Appends bytes to be sent.
    pub(super) fn queue(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        if self.output.len() > MAX_BACKLOG {
            self.broken = true;
        }
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.output.is_empty() || self.broken
    }

    /// Reads what is there; true at the end of the stream.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match wire::recv_with_fds(self.stream.as_fd(), &mut buffer, &mut self.fds) {
                Ok(0) => return Ok(true),
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The request, once all of it has come.
    fn request(&mut self) -> io::Result<Option<Request>> {
        let Some(head) = self.input.first_chunk::<4>() else {
            return Ok(None);
        };
        let len = wire::announced_len(*head)?;
        if self.input.len() < 4 + len {
            return Ok(None);
        }
        let request = wire::decode(&self.input[4..4 + len])?;
        self.input = Vec::new();
        Ok(Some(request))
    }

    /// Writes what the socket takes; true when all is written.
    fn write(&mut self) -> io::Result<bool> {
        while !self.output.is_empty() {
            match wire::send_with_fds(self.stream.as_fd(), &self.output, &[]) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.output = Vec::new();
        Ok(true)
    }
}

impl Keeper {
    pub(super) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            self.unused_until = None;
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let Ok(token) = self.watch(&stream, Source::Connection) else {
                continue;
            };
            self.connections.insert(
                token,
                Connection {
                    stream,
                    input: Vec::new(),
                    fds: Vec::new(),
                    output: Vec::new(),
                    subscribed: false,
                    waiting_for_room: false,
                    broken: false,
                },
            );
        }
    }

    pub(super) fn serve_connection(&mut self, token: u64, flags: EventFlags) {
        if flags.contains(EventFlags::OUT) {
            self.flush(token);
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let end = connection.read();
        match connection.request() {
            Ok(Some(request)) => {
                let fds = std::mem::take(&mut connection.fds);
                self.dispatch(token, request, fds);
            }
            Ok(None) => {}
            Err(e) => {
                let error = wire_error(ErrorKind::Invalid, format!("can't read the call: {e}"));
                self.reply(token, Err(error));
                self.close(token);
                return;
            }
        }
        if !matches!(end, Ok(false)) {
            self.close(token);
        }
    }

    /// Sends what is queued, and asks to be told when the socket takes more.
    pub(super) fn flush(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.broken {
            self.close(token);
            return;
        }
        match connection.write() {
            Ok(done) if done != connection.waiting_for_room => {}
            Ok(done) => {
                connection.waiting_for_room = !done;
                let mut interest = EventFlags::IN;
                interest.set(EventFlags::OUT, !done);
                let stream = connection.stream.as_fd();
                let _ = epoll::modify(&self.epoll, stream, EventData::new_u64(token), interest);
            }
            Err(_) => self.close(token),
        }
    }

    /// Forgets a connection. An exec whose caller has gone is killed: nobody would ever know how it ended.
    pub(super) fn close(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            self.forget(&connection.stream, token);
        }
        self.abandon_execs(token);
        self.abandon_checkpoints(token);
    }

    /// Tells every subscriber of a change.
    pub(super) fn publish(&mut self, state: &ContainerState) {
        let frame = wire::frame(state);
        let subscribers: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| c.subscribed)
            .map(|(t, _)| *t)
            .collect();
        for token in subscribers {
            if let Some(connection) = self.connections.get_mut(&token) {
                connection.queue(&frame);
            }
            self.flush(token);
        }
    }
}
