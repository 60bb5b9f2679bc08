//! Against a peer that speaks D-Bus as systemd does, and misbehaves as it can.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Instant;

use super::*;
use crate::message::{Decoder, Encoder, Kind, Message};

const SOON: Duration = Duration::from_millis(300);
const ENOUGH: Duration = Duration::from_secs(20);
const JOB: &str = "/org/freedesktop/systemd1/job/7";

/// One connection, seen from systemd.
struct Peer {
    stream: UnixStream,
    input: Vec<u8>,
    serial: u32,
}

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(ENOUGH)).unwrap();
        let mut peer = Self {
            stream,
            input: Vec::new(),
            serial: 100,
        };
        let auth = peer.line();
        assert!(auth.starts_with("\0AUTH EXTERNAL 3"), "{auth:?}");
        // Sent before the answer, and nothing after it: see Connection::authenticate.
        assert_eq!(peer.line(), "BEGIN\r\n");
        peer.stream.set_nonblocking(true).unwrap();
        let more = peer.stream.read(&mut [0]).unwrap_err();
        assert_eq!(more.kind(), std::io::ErrorKind::WouldBlock);
        peer.stream.set_nonblocking(false).unwrap();
        peer.stream.write_all(b"OK 0123456789abcdef\r\n").unwrap();
        peer
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = Message::decode(&mut self.input).unwrap() {
                return Some(message);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
            }
        }
    }

    /// The next call, which must be this one.
    fn expect(&mut self, member: &str) -> Message {
        let call = self.next().expect(member);
        assert_eq!((call.kind, call.member.as_str()), (Kind::Call, member));
        call
    }

    fn send(&mut self, mut message: Message, signature: &str, fill: impl FnOnce(&mut Encoder)) {
        let mut body = Encoder::default();
        fill(&mut body);
        self.serial += 1;
        message.serial = self.serial;
        message.signature = signature.into();
        message.body = body.into_bytes();
        self.stream.write_all(&message.encode()).unwrap();
    }

    fn reply(&mut self, to: &Message, signature: &str, fill: impl FnOnce(&mut Encoder)) {
        let mut answer = Message::new(Kind::Return);
        answer.reply_to = to.serial;
        self.send(answer, signature, fill);
    }

    fn refuse(&mut self, to: &Message, name: &str) {
        let mut answer = Message::new(Kind::Error);
        answer.reply_to = to.serial;
        answer.error = name.into();
        self.send(answer, "s", |e| e.str("because"));
    }

    fn text_property(&mut self, to: &Message, value: &str) {
        self.reply(to, "v", |e| e.variant(&Value::Str(value.into())));
    }

    fn job_property(&mut self, to: &Message, job: u32) {
        self.reply(to, "v", |e| {
            e.signature("(uo)");
            e.align(8);
            e.u32(job);
            e.str(if job == 0 { "/" } else { JOB });
        });
    }

    fn signal(&mut self, member: &str, signature: &str, fill: impl FnOnce(&mut Encoder)) {
        let mut signal = Message::new(Kind::Signal);
        signal.path = "/org/freedesktop/systemd1".into();
        signal.interface = "org.freedesktop.systemd1.Manager".into();
        signal.member = member.into();
        self.send(signal, signature, fill);
    }

    fn job_removed(&mut self, job: &str, unit: &str, result: &str) {
        self.signal("JobRemoved", "uoss", |e| {
            e.u32(7);
            e.str(job);
            e.str(unit);
            e.str(result);
        });
    }
}

/// A systemd that behaves as `script` says.
struct Fake {
    systemd: Systemd,
    thread: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

fn fake(bus: bool, script: impl FnOnce(UnixListener) + Send + 'static) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("private");
    let listener = UnixListener::bind(&path).unwrap();
    Fake {
        systemd: Systemd::at(&path, bus),
        thread: std::thread::spawn(move || script(listener)),
        _dir: dir,
    }
}

const SCOPE: Scope<'_> = Scope {
    unit: "slipway-4f.scope",
    slice: "kubepods.slice",
    process: 0,
    description: "container 4f",
    properties: &[],
};

impl Fake {
    fn start(self, within: Duration) -> Result<(), SystemdError> {
        let result = self.systemd.start_scope(&SCOPE, within, &|| false);
        self.thread.join().unwrap();
        result
    }
}

#[test]
fn a_scope_is_asked_for_and_waited_for() {
    let (tell, told) = mpsc::channel();
    let fake = fake(false, move |listener| {
        let mut peer = Peer::accept(&listener);
        // Signals of others come at any time.
        peer.job_removed("/other", "other.scope", "failed");
        let call = peer.expect("StartTransientUnit");
        assert_eq!(call.destination, "org.freedesktop.systemd1");
        assert_eq!(call.signature, "ssa(sv)a(sa(sv))");
        peer.signal("UnitNew", "so", |e| {
            e.str("slipway-4f.scope");
            e.str("/unit");
        });
        peer.reply(&call, "o", |e| e.str(JOB));
        peer.job_removed("/other", "slipway-4f.scope", "failed");
        peer.job_removed(JOB, "slipway-4f.scope", "done");
        tell.send(call.body).unwrap();
    });
    let limits = [("MemoryMax", Value::U64(64 << 20))];
    let scope = Scope {
        properties: &limits,
        ..SCOPE
    };
    fake.systemd.start_scope(&scope, ENOUGH, &|| false).unwrap();
    fake.thread.join().unwrap();

    let body = told.recv().unwrap();
    let mut d = Decoder::new(&body);
    assert_eq!((d.str(), d.str()), (Some("slipway-4f.scope"), Some("fail")));
    let mut list = d.array(8).unwrap();
    let mut properties = Vec::new();
    while !list.at_end() {
        list.align(8);
        properties.push((list.str().unwrap().to_owned(), list.variant().unwrap()));
    }
    let text = |t: &str| Value::Str(t.into());
    for (name, value) in [
        ("Slice", text("kubepods.slice")),
        ("PIDs", Value::U32s(vec![0])),
        ("Delegate", Value::Bool(true)),
        ("DefaultDependencies", Value::Bool(false)),
        ("CollectMode", text("inactive-or-failed")),
        ("MemoryMax", Value::U64(64 << 20)),
    ] {
        let found = properties.iter().find(|(n, _)| n == name);
        assert_eq!(found.map(|(_, v)| v), Some(&value), "{name}");
    }
    assert!(d.array(8).unwrap().at_end() && d.at_end());
}

#[test]
fn over_the_bus_it_is_said_first_what_is_to_be_heard() {
    let fake = fake(true, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("Hello");
        peer.reply(&call, "s", |e| e.str(":1.7"));
        for member in ["AddMatch", "AddMatch", "Subscribe"] {
            let call = peer.expect(member);
            peer.reply(&call, "", |_| ());
        }
        let call = peer.expect("StartTransientUnit");
        peer.reply(&call, "o", |e| e.str(JOB));
        peer.job_removed(JOB, "slipway-4f.scope", "done");
    });
    fake.start(ENOUGH).unwrap();
}

#[test]
fn a_failed_job_is_told_with_its_result() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        // The end may be heard of before the beginning.
        peer.job_removed(JOB, "slipway-4f.scope", "failed");
        peer.reply(&call, "o", |e| e.str(JOB));
    });
    let error = fake.start(ENOUGH).unwrap_err();
    assert!(matches!(&error, SystemdError::Job { result, .. } if result == "failed"));
    assert!(error.to_string().contains("slipway-4f.scope"), "{error}");
}

#[test]
fn a_refusal_is_told_in_systemds_words() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        peer.refuse(&call, "org.freedesktop.DBus.Error.PropertyReadOnly");
    });
    let error = fake.start(ENOUGH).unwrap_err().to_string();
    assert!(
        error.contains("because") && error.contains("PropertyReadOnly"),
        "{error}"
    );
}

#[test]
fn a_systemd_that_says_nothing_is_not_waited_for_for_ever() {
    // Not a word, not even a greeting; then, no answer to the call; then, no end of the job.
    for silent_after in 0..3 {
        let (end, ended) = mpsc::channel::<()>();
        let fake = fake(false, move |listener| {
            let _kept = match silent_after {
                0 => listener.accept().unwrap().0,
                _ => {
                    let mut peer = Peer::accept(&listener);
                    let call = peer.expect("StartTransientUnit");
                    if silent_after == 2 {
                        peer.reply(&call, "o", |e| e.str(JOB));
                    }
                    peer.stream
                }
            };
            let _ = ended.recv();
        });
        let began = Instant::now();
        let error = fake
            .systemd
            .start_scope(&SCOPE, SOON, &|| false)
            .unwrap_err();
        assert!(began.elapsed() >= SOON && began.elapsed() < ENOUGH);
        let text = error.to_string();
        assert!(matches!(error, SystemdError::Timeout { .. }), "{text}");
        assert!(
            text.contains("slipway-4f.scope") && text.contains("private"),
            "{text}"
        );
        drop(end);
        fake.thread.join().unwrap();
    }
}

#[test]
fn a_systemd_that_restarts_is_asked_again() {
    let moved = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let joined = moved.clone();
    let fake = fake(false, move |listener| {
        // Gone before a word, then after the call.
        drop(listener.accept().unwrap());
        let mut peer = Peer::accept(&listener);
        peer.expect("StartTransientUnit");
        drop(peer);
        // It remembers the unit, and its job goes on.
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        peer.refuse(&call, UNIT_EXISTS);
        let call = peer.expect("Get");
        assert_eq!(
            call.path,
            "/org/freedesktop/systemd1/unit/slipway_2d4f_2escope"
        );
        peer.job_property(&call, 7);
        moved.store(true, std::sync::atomic::Ordering::SeqCst);
        peer.job_removed(JOB, "slipway-4f.scope", "done");
    });
    let joined = || joined.load(std::sync::atomic::Ordering::SeqCst);
    fake.systemd.start_scope(&SCOPE, ENOUGH, &joined).unwrap();
    fake.thread.join().unwrap();
}

#[test]
fn somebody_elses_scope_of_the_name_is_not_taken_for_ours() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        peer.refuse(&call, UNIT_EXISTS);
        let call = peer.expect("Get");
        peer.job_property(&call, 7);
        peer.job_removed(JOB, "slipway-4f.scope", "done");
    });
    let error = fake.start(ENOUGH).unwrap_err();
    assert!(matches!(error, SystemdError::Exists { .. }), "{error}");
}

#[test]
fn what_was_done_although_the_answer_got_lost_is_not_done_again() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        peer.expect("StartTransientUnit");
        drop(peer);
        Peer::accept(&listener);
    });
    let asked = std::cell::Cell::new(false);
    let joined = || {
        asked.set(true);
        true
    };
    fake.systemd.start_scope(&SCOPE, ENOUGH, &joined).unwrap();
    fake.thread.join().unwrap();
    assert!(asked.get());
}

#[test]
fn the_remains_of_a_failed_unit_are_cleared_away_once() {
    let remains = |peer: &mut Peer| {
        let call = peer.expect("StartTransientUnit");
        peer.refuse(&call, UNIT_EXISTS);
        let call = peer.expect("Get");
        peer.job_property(&call, 0);
        let call = peer.expect("Get");
        peer.text_property(&call, "failed");
    };
    let mended = fake(false, move |listener| {
        let mut peer = Peer::accept(&listener);
        remains(&mut peer);
        let call = peer.expect("ResetFailedUnit");
        peer.reply(&call, "", |_| ());
        let call = peer.expect("StartTransientUnit");
        peer.reply(&call, "o", |e| e.str(JOB));
        peer.job_removed(JOB, "slipway-4f.scope", "done");
    });
    mended.start(ENOUGH).unwrap();
    let stubborn = fake(false, move |listener| {
        let mut peer = Peer::accept(&listener);
        remains(&mut peer);
        let call = peer.expect("ResetFailedUnit");
        peer.refuse(&call, NO_SUCH_UNIT);
        remains(&mut peer);
    });
    let error = stubborn.start(ENOUGH).unwrap_err();
    assert!(matches!(error, SystemdError::Exists { state, .. } if state == "failed"));
}

#[test]
fn a_unit_of_somebody_else_is_left_alone() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        peer.refuse(&call, UNIT_EXISTS);
        let call = peer.expect("Get");
        peer.job_property(&call, 0);
        let call = peer.expect("Get");
        peer.text_property(&call, "active");
    });
    let error = fake.start(ENOUGH).unwrap_err();
    assert!(matches!(error, SystemdError::Exists { state, .. } if state == "active"));
}

#[test]
fn what_is_no_systemd_is_refused() {
    let fake = fake(false, |listener| {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let error = fake.start(ENOUGH).unwrap_err().to_string();
    assert!(error.contains("does not let this user in"), "{error}");
}

#[test]
fn where_nobody_listens_is_named() {
    let systemd = Systemd::at(Path::new("/nowhere/private"), false);
    let error = systemd.start_scope(&SCOPE, SOON, &|| false).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("/nowhere/private") && text.contains("slipway-4f.scope"),
        "{text}"
    );
}

#[test]
fn limits_are_changed_and_written_before_the_answer_is_believed() {
    let (tell, told) = mpsc::channel();
    let fake = fake(false, move |listener| {
        // Lost in the middle: asked again, as twice is the same as once.
        let mut peer = Peer::accept(&listener);
        peer.expect("SetUnitProperties");
        drop(peer);
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("SetUnitProperties");
        assert_eq!(call.signature, "sba(sv)");
        peer.reply(&call, "", |_| ());
        let next = peer.expect("Get");
        tell.send(call.body).unwrap();
        peer.text_property(&next, "active");
    });
    let limits = [("MemoryMax", Value::U64(32 << 20))];
    fake.systemd
        .set_properties("slipway-4f.scope", &limits, ENOUGH)
        .unwrap();
    fake.thread.join().unwrap();
    let body = told.recv().unwrap();
    let mut d = Decoder::new(&body);
    assert_eq!((d.str(), d.u32()), (Some("slipway-4f.scope"), Some(1)));
    let mut list = d.array(8).unwrap();
    list.align(8);
    assert_eq!(list.str(), Some("MemoryMax"));
    assert_eq!(list.variant(), Some(Value::U64(32 << 20)));
    assert!(list.at_end() && d.at_end());
}

#[test]
fn limits_that_systemd_does_not_know_are_told() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("SetUnitProperties");
        peer.refuse(&call, "org.freedesktop.DBus.Error.PropertyReadOnly");
    });
    let error = fake
        .systemd
        .set_properties("slipway-4f.scope", &[], ENOUGH)
        .unwrap_err();
    fake.thread.join().unwrap();
    let text = error.to_string();
    assert!(matches!(error, SystemdError::Refused { .. }), "{text}");
    assert!(
        text.contains("change the limits of slipway-4f.scope"),
        "{text}"
    );
}

#[test]
fn a_slow_answer_is_waited_for() {
    let fake = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StartTransientUnit");
        let mut answer = Message::new(Kind::Return);
        (answer.serial, answer.reply_to) = (101, call.serial);
        answer.signature = "o".into();
        let mut body = Encoder::default();
        body.str(JOB);
        answer.body = body.into_bytes();
        // Byte by byte, all of it longer than a moment.
        for byte in answer.encode() {
            peer.stream.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        peer.job_removed(JOB, "slipway-4f.scope", "done");
    });
    fake.start(ENOUGH).unwrap();
}

#[test]
fn stopping_waits_for_the_end_and_needs_no_unit() {
    let there = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StopUnit");
        peer.reply(&call, "o", |e| e.str(JOB));
        peer.job_removed(JOB, "a.slice", "done");
    });
    there.systemd.stop("a.slice", ENOUGH).unwrap();
    there.thread.join().unwrap();
    let gone = fake(false, |listener| {
        let mut peer = Peer::accept(&listener);
        let call = peer.expect("StopUnit");
        peer.refuse(&call, NO_SUCH_UNIT);
    });
    gone.systemd.stop("a.scope", ENOUGH).unwrap();
    gone.thread.join().unwrap();
}

#[test]
fn hundreds_may_ask_at_once() {
    const ALL: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("private");
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    // The shortest queue there is: all but a few find it full.
    rustix::net::listen(&socket, 0).unwrap();
    let listener = UnixListener::from(socket);
    let server = std::thread::spawn(move || {
        for _ in 0..ALL {
            let mut peer = Peer::accept(&listener);
            let call = peer.expect("StartTransientUnit");
            let unit = Decoder::new(&call.body).str().unwrap().to_owned();
            peer.reply(&call, "o", |e| e.str(JOB));
            peer.job_removed(JOB, &unit, "done");
        }
    });
    let clients: Vec<_> = (0..ALL)
        .map(|i| {
            let systemd = Systemd::at(&path, false);
            std::thread::spawn(move || {
                let unit = format!("slipway-{i}.scope");
                let scope = Scope {
                    unit: &unit,
                    ..SCOPE
                };
                systemd.start_scope(&scope, ENOUGH, &|| false)
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap().unwrap();
    }
    server.join().unwrap();
}
