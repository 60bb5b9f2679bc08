//! Brings `lo` up in the calling thread's network namespace, by netlink, without a plugin.
//!
//! Synchronous, allocation-free and without any state, so that a forked single-threaded process can
//! call it. Uses nothing but rustix.

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use std::time::Duration;
use thiserror::Error;

/// The kernel gives the loopback device this index in every network namespace.
const LOOPBACK_INDEX: i32 = 1;
const RTM_NEWLINK: u16 = 16;
const NLMSG_ERROR: u16 = 2;
pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;
const HEADER: usize = 16;
/// The kernel answers at once; this only bounds the unthinkable.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why the loopback device could not be brought up.
#[derive(Debug, Error)]
pub enum LoopbackError {
    /// A system call of the netlink conversation failed.
    #[error("cannot bring lo up: {step} of the netlink request failed")]
    Socket {
        /// Which call.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// The kernel refused the request.
    #[error(
        "cannot bring lo up: the kernel refused it (CAP_NET_ADMIN over the network namespace is needed)"
    )]
    Refused(#[source] Errno),
    /// The kernel's answer was not an acknowledgement.
    #[error("cannot bring lo up: the kernel's answer of {0} bytes is not an acknowledgement")]
    Answer(usize),
}

/// Brings `lo` up in the current network namespace. The kernel then gives it `127.0.0.1/8`, and
/// `::1/128` unless IPv6 is off. Does nothing when it is up already.
///
/// # Errors
///
/// See [`LoopbackError`]; without `CAP_NET_ADMIN` it is [`LoopbackError::Refused`] with `EPERM`.
pub fn bring_loopback_up() -> Result<(), LoopbackError> {
    exchange(&request())
}

/// Sends a request of rtnetlink(7), in the calling thread's network namespace, and waits for its acknowledgement.
///
/// # Errors
/// [`LoopbackError`].
pub(crate) fn exchange(request: &[u8]) -> Result<(), LoopbackError> {
    let step = |step| move |source| LoopbackError::Socket { step, source };
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None, // NETLINK_ROUTE is protocol 0
    )
    .map_err(step("socket"))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(DEADLINE)).map_err(step("deadline"))?;
    send(&socket, request, SendFlags::empty()).map_err(step("send"))?;

    let mut answer = [0u8; 256];
    let received = loop {
        match recv(&socket, &mut answer, RecvFlags::empty()) {
            Ok((received, _)) => break received,
            Err(Errno::INTR) => {}
            Err(source) => return Err(step("receive")(source)),
        }
    };
    match acknowledgement(answer.get(..received).unwrap_or(&answer)) {
        Some(0) => Ok(()),
        Some(error) => Err(LoopbackError::Refused(Errno::from_raw_os_error(
            error.saturating_neg(),
        ))),
        None => Err(LoopbackError::Answer(received)),
    }
}

/// `RTM_NEWLINK` with an `ifinfomsg` that sets `IFF_UP` on the loopback device (rtnetlink(7)).
fn request() -> [u8; 32] {
    let mut message = [0u8; 32];
    message[0..4].copy_from_slice(&32u32.to_ne_bytes());
    message[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message[8..12].copy_from_slice(&1u32.to_ne_bytes()); // sequence; the port is the kernel's to fill
    message[20..24].copy_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    message[24..28].copy_from_slice(&IFF_UP.to_ne_bytes());
    message[28..32].copy_from_slice(&IFF_UP.to_ne_bytes()); // change mask: only this flag
    message
}

/// The error number of an `NLMSG_ERROR` message: 0 is success, else negative.
fn acknowledgement(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    let error = i32::from_ne_bytes(answer.get(HEADER..HEADER + 4)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    #[test]
    fn lo_gets_both_addresses_in_a_new_namespace() {
        // A thread of its own: it never comes back from the namespace.
        std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                println!("SKIPPED: unshare(CLONE_NEWNET) needs CAP_SYS_ADMIN");
                return;
            }
            let reach = |ip: IpAddr| {
                let listener = TcpListener::bind((ip, 0))?;
                TcpStream::connect(listener.local_addr()?)
            };
            reach(Ipv4Addr::LOCALHOST.into()).unwrap_err();
            bring_loopback_up().unwrap();
            bring_loopback_up().unwrap();
            reach(Ipv4Addr::LOCALHOST.into()).unwrap();
            if std::path::Path::new("/proc/sys/net/ipv6").exists() {
                reach(Ipv6Addr::LOCALHOST.into()).unwrap();
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_short_answer_is_no_acknowledgement() {
        for length in 0..20 {
            assert_eq!(acknowledgement(&[0; 20][..length]), None);
        }
        let mut done = [0u8; 20];
        done[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledgement(&done), Some(0));
        done[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledgement(&done), Some(-1));
    }
}
