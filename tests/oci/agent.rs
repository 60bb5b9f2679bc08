//! Seccomp profiles that leave calls to an agent (`SCMP_ACT_NOTIFY`).

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::Test;
use crate::bundle::{Bundle, LONG, ended};

pub const TESTS: &[Test] = &[
    (
        "agent::decides_calls_of_init_and_exec",
        decides_calls_of_init_and_exec,
    ),
    ("agent::that_is_not_there", that_is_not_there),
];

fn asking(script: &str) -> Bundle {
    let mut bundle = Bundle::new(script);
    let socket = bundle.path().join("agent");
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": socket,
        "listenerMetadata": "of this test",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
    });
    bundle
}

/// What an agent is sent.
fn told(agent: &UnixListener) -> (Value, OwnedFd) {
    readable(agent, "a connection");
    let (connection, _) = agent.accept().unwrap();
    let mut bytes = vec![0; 1 << 16];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg(&connection, &mut parts, &mut control, RecvFlags::empty()).unwrap();
    let length = message.bytes;
    let listener = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    let state = serde_json::from_slice(&bytes[..length]).unwrap();
    (state, listener.unwrap())
}

#[track_caller]
fn readable(fd: impl std::os::fd::AsFd, what: &str) {
    let time = Timespec::try_from(LONG).unwrap();
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)).unwrap();
    assert_eq!(ready, 1, "not in time: {what}");
}

fn decides_calls_of_init_and_exec() {
    let bundle = asking("mkdir /tmp/x 2>/said; echo $? >>/said; sleep 1000");
    let agent = UnixListener::bind(bundle.path().join("agent")).unwrap();
    bundle.create();
    // Before anything of it runs, so that nobody is asked too early.
    let (state, listener) = told(&agent);
    let pid = bundle.state()["pid"].clone();
    assert_eq!(state["fds"], json!(["seccompFd"]), "{state}");
    assert_eq!(state["metadata"], "of this test", "{state}");
    assert_eq!(
        (&state["pid"], &state["state"]["pid"]),
        (&pid, &pid),
        "{state}"
    );
    assert_eq!(state["state"]["id"], bundle.id.as_str(), "{state}");
    assert_eq!(state["state"]["status"], "creating", "{state}");
    assert_eq!(bundle.state()["status"], "created");
    bundle.done(&["start", &bundle.id]);
    readable(&listener, "the call of the container's process");
    assert!(!bundle.inside("tmp/x").exists());
    // Calls that nobody decides any more are unknown to the kernel.
    drop(listener);
    let said = || fs::read_to_string(bundle.inside("said")).unwrap_or_default();
    crate::bundle::until(
        || said().ends_with("1\n"),
        "the container's process goes on",
    );
    assert!(said().contains("not implemented"), "{}", said());

    let mut exec = bundle.command(&["exec", &bundle.id, "mkdir", "/tmp/y"]);
    let exec = exec
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (state, listener) = told(&agent);
    assert_ne!(state["pid"], pid, "{state}");
    assert_eq!(state["state"]["pid"], pid, "{state}");
    assert_eq!(state["state"]["status"], "running", "{state}");
    readable(&listener, "the call of the exec");
    drop(listener);
    assert_eq!(ended(exec), 1);
    assert!(!bundle.inside("tmp/y").exists());
}

fn that_is_not_there() {
    let bundle = asking("true");
    let path = bundle.path().to_str().unwrap();
    let create = ["create", "-b", path, &bundle.id];
    let error = bundle.refused(&create);
    assert!(
        error.contains("agent") && error.contains("No such file"),
        "{error}"
    );
    bundle.nothing_left();
    // An exec says so, too, and does not run.
    let bundle = asking("sleep 1000");
    let socket = bundle.path().join("agent");
    let agent = UnixListener::bind(&socket).unwrap();
    bundle.create_and_start();
    drop(told(&agent));
    fs::remove_file(&socket).unwrap();
    let error = bundle.refused(&["exec", &bundle.id, "touch", "/ran"]);
    assert!(error.contains("No such file"), "{error}");
    assert!(!bundle.inside("ran").exists());
    // What can't be asked for.
    let mut bundle = asking("true");
    bundle.spec["linux"]["seccomp"]["syscalls"][0]["names"] = json!(["write"]);
    let path = bundle.path().to_str().unwrap();
    let error = bundle.refused(&["create", "-b", path, &bundle.id]);
    assert!(
        error.contains("SCMP_ACT_NOTIFY can't be used for write"),
        "{error}"
    );
    bundle.nothing_left();
}
