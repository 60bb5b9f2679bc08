//! What the shim and the guest's agent say to each other over one serial port: calls with answers, both in JSON, and streams of
//! bytes. Who sends bytes has a window, so that a reader who is slow holds up its own stream and no other.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::{Condvar, Mutex};
use serde_json::Value;

/// Bytes of a stream that may be under way.
const WINDOW: usize = 64 << 10;
/// The most bytes of one frame of a stream.
const CHUNK: usize = 16 << 10;
/// The longest frame.
const LONGEST: usize = 16 << 20;

const CALL: u8 = 1;
const ANSWER: u8 = 2;
const REFUSAL: u8 = 3;
const DATA: u8 = 4;
const TAKEN: u8 = 5;
const END: u8 = 6;

/// One side of the port.
pub struct Link {
    out: Mutex<File>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    last: u32,
    broken: bool,
    calls: HashMap<u32, Sender<Result<Value, String>>>,
    /// Of streams that are sent: how much more may be.
    credit: HashMap<u32, usize>,
    /// Streams that are received.
    sinks: HashMap<u32, Sender<Vec<u8>>>,
}

impl Link {
    /// Over a descriptor for writing.
    pub fn new(out: File) -> Arc<Self> {
        Arc::new(Self {
            out: Mutex::new(out),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// A number for a call or a stream. The shim alone hands them out.
    pub fn number(&self) -> u32 {
        let mut state = self.state.lock();
        state.last += 1;
        state.last
    }

    fn send(&self, kind: u8, number: u32, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut frame = Vec::with_capacity(9 + payload.len());
        frame.extend(length.to_be_bytes());
        frame.push(kind);
        frame.extend(number.to_be_bytes());
        frame.extend(payload);
        self.out.lock().write_all(&frame)
    }

    /// Calls, and waits for the answer.
    ///
    /// # Errors
    /// What the other side says, or that it is gone.
    pub fn call(&self, request: &Value) -> Result<Value, String> {
        let number = self.number();
        let (sender, answer) = channel();
        let gone = || "the machine is gone".to_owned();
        {
            let mut state = self.state.lock();
            if state.broken {
                return Err(gone());
            }
            state.calls.insert(number, sender);
        }
        let text = request.to_string();
        self.send(CALL, number, text.as_bytes())
            .map_err(|e| e.to_string())?;
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Answers a call.
    pub fn answer(&self, number: u32, answer: &Result<Value, String>) {
        // Whoever is gone does not need it.
        let _ = match answer {
            Ok(value) => self.send(ANSWER, number, value.to_string().as_bytes()),
            Err(text) => self.send(REFUSAL, number, text.as_bytes()),
        };
    }

    /// Sends what is read, to its end or until the link is gone.
    pub fn pump(&self, number: u32, mut from: impl Read) {
        self.state.lock().credit.insert(number, WINDOW);
        let mut buffer = vec![0; CHUNK];
        loop {
            let room = {
                let mut state = self.state.lock();
                loop {
                    match state.credit.get(&number) {
                        None => return,
                        Some(0) => self.changed.wait(&mut state),
                        Some(room) => break *room,
                    }
                }
            };
            // The master side of a terminal says EIO at its end.
            let read = match from.read(&mut buffer[..room.min(CHUNK)]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                read => read.unwrap_or(0),
            };
            if read == 0 || self.send(DATA, number, &buffer[..read]).is_err() {
                break;
            }
            if let Some(credit) = self.state.lock().credit.get_mut(&number) {
                *credit -= read;
            }
        }
        self.state.lock().credit.remove(&number);
        let _ = self.send(END, number, &[]);
    }

    /// Awaits a stream; before anybody may send it.
    pub fn sink(&self, number: u32) -> Receiver<Vec<u8>> {
        let (sender, receiver) = channel();
        self.state.lock().sinks.insert(number, sender);
        receiver
    }

    /// Writes a stream to where it belongs, to its end. What nobody takes any more is passed over.
    pub fn drain(&self, number: u32, chunks: &Receiver<Vec<u8>>, mut to: Option<impl Write>) {
        for chunk in chunks {
            if to.as_mut().is_some_and(|to| to.write_all(&chunk).is_err()) {
                to = None;
            }
            let taken = u32::try_from(chunk.len()).unwrap_or(0).to_be_bytes();
            let _ = self.send(TAKEN, number, &taken);
        }
    }

    /// Takes what the other side sends until it is gone; calls are handed to `serve`.
    pub fn run(&self, from: File, serve: impl Fn(u32, Value)) {
        let _ = self.take(from, serve);
        let mut state = self.state.lock();
        state.broken = true;
        state.calls.clear();
        state.credit.clear();
        state.sinks.clear();
        self.changed.notify_all();
    }

    fn take(&self, mut from: File, serve: impl Fn(u32, Value)) -> io::Result<()> {
        loop {
            let mut head = [0; 9];
            from.read_exact(&mut head)?;
            let word = |at: usize| {
                u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let (length, kind, number) = (word(0) as usize, head[4], word(5));
            if length > LONGEST {
                return Err(io::Error::other("no frame"));
            }
            let mut payload = vec![0; length];
            from.read_exact(&mut payload)?;
            match kind {
                CALL => serve(number, serde_json::from_slice(&payload)?),
                ANSWER | REFUSAL => {
                    let waiting = self.state.lock().calls.remove(&number);
                    let answer = match kind {
                        ANSWER => Ok(serde_json::from_slice(&payload)?),
                        _ => Err(String::from_utf8_lossy(&payload).into_owned()),
                    };
                    if let Some(waiting) = waiting {
                        let _ = waiting.send(answer);
                    }
                }
                DATA => {
                    let sink = self.state.lock().sinks.get(&number).cloned();
                    let length = payload.len();
                    if sink.is_none_or(|sink| sink.send(payload).is_err()) {
                        let taken = u32::try_from(length).unwrap_or(0).to_be_bytes();
                        self.send(TAKEN, number, &taken)?;
                    }
                }
                TAKEN => {
                    let taken = payload.try_into().map_or(0, u32::from_be_bytes) as usize;
                    if let Some(credit) = self.state.lock().credit.get_mut(&number) {
                        *credit += taken;
                    }
                    self.changed.notify_all();
                }
                END => drop(self.state.lock().sinks.remove(&number)),
                _ => return Err(io::Error::other("no frame")),
            }
        }
    }
}

/// A text in a call; empty if it is not there.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// A number in a call; 0 if it is not there.
pub fn number<T: TryFrom<u64> + Default>(value: &Value) -> T {
    let number = value.as_u64().and_then(|n| T::try_from(n).ok());
    number.unwrap_or_default()
}
