//! Puts addresses on interfaces of the calling thread's network namespace, by netlink, as plugins have done it before.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::loopback::{LoopbackError, NLM_F_ACK, NLM_F_REQUEST, exchange};

const RTM_NEWADDR: u16 = 20;
const NLM_F_CREATE: u16 = 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// No search for others that have it, which would leave it unusable for a second (IPv6).
const IFA_F_NODAD: u8 = 2;

/// Gives an interface an address with this length of its network's prefix. One that it has already is no error.
///
/// # Errors
/// What the kernel says; `ENODEV` without such an interface.
pub fn add(interface: &str, address: IpAddr, prefix: u8) -> io::Result<()> {
    // Any socket does for this.
    let named = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let index = name_to_index(&named, interface)?;
    match exchange(&request(index, address, prefix)) {
        Ok(()) | Err(LoopbackError::Refused(Errno::EXIST)) => Ok(()),
        Err(LoopbackError::Refused(e) | LoopbackError::Socket { source: e, .. }) => Err(e.into()),
        Err(LoopbackError::Answer(_)) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// `RTM_NEWADDR` with an `ifaddrmsg` and two attributes (rtnetlink(7)).
fn request(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, flags, bytes) = match address {
        IpAddr::V4(v4) => (libc::AF_INET as u8, 0, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6 as u8, IFA_F_NODAD, v6.octets().to_vec()),
    };
    let mut body = vec![family, prefix, flags, 0];
    body.extend(index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend((4 + bytes.len() as u16).to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(&bytes);
    }
    let mut message = Vec::new();
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(RTM_NEWADDR.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE).to_ne_bytes());
    // Sequence; the port is the kernel's to fill.
    message.extend(1u32.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.extend(body);
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn an_address_can_be_used_once_it_is_there() {
        // A thread of its own: it never comes back from the namespace.
        std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                println!("SKIPPED: unshare(CLONE_NEWNET) needs CAP_SYS_ADMIN");
                return;
            }
            crate::loopback::bring_loopback_up().unwrap();
            let v4 = IpAddr::from(Ipv4Addr::new(192, 0, 2, 7));
            TcpListener::bind((v4, 0)).unwrap_err();
            add("lo", v4, 24).unwrap();
            add("lo", v4, 24).unwrap();
            TcpListener::bind((v4, 0)).unwrap();
            if std::path::Path::new("/proc/sys/net/ipv6").exists() {
                let v6: IpAddr = "2001:db8::7".parse().unwrap();
                add("lo", v6, 64).unwrap();
                TcpListener::bind((v6, 0)).unwrap();
            }
            let error = add("none0", v4, 24).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        })
        .join()
        .unwrap();
    }
}
