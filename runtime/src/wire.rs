//! Framing of the keeper protocol: a big-endian `u32` length, then a protobuf message; file descriptors
//! ride beside the first bytes (`SCM_RIGHTS`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Version of the protocol that this build speaks; see `keeper.proto` for what changes may do.
pub const PROTOCOL: u32 = 4;

/// The first version with terminals, open standard input and attach.
pub const SESSIONS: u32 = 2;

/// The first version with checkpoints and restores.
pub const CHECKPOINTS: u32 = 3;

/// Largest message that either side accepts, in bytes (an OCI spec with a large environment fits).
pub const MAX_MESSAGE: usize = 16 << 20;

/// Most descriptors that travel with one message.
pub const MAX_FDS: usize = 8;

/// A message with its length in front.
pub fn frame(message: &impl Message) -> Vec<u8> {
    let len = message.encoded_len();
    let mut out = Vec::with_capacity(4 + len);
    out.extend_from_slice(&(len as u32).to_be_bytes());
    // A Vec grows as it must, so encoding into one cannot fail.
    message.encode_raw(&mut out);
    out
}

/// The length that a frame's first four bytes announce.
///
/// # Errors
/// `InvalidData` when it is over [`MAX_MESSAGE`].
pub fn announced_len(head: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_be_bytes(head) as usize;
    if len > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {len} bytes is over the limit of {MAX_MESSAGE}"),
        ));
    }
    Ok(len)
}

/// Decodes a message.
///
/// # Errors
/// `InvalidData` when the bytes are no such message.
pub fn decode<M: Message + Default>(bytes: &[u8]) -> io::Result<M> {
    M::decode(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Sends as much of `bytes` as the socket takes, with `fds` beside the first byte.
///
/// # Errors
/// What `sendmsg(2)` says; `EAGAIN` on a non-blocking socket that is full (then nothing was sent).
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    Ok(rustix::net::sendmsg(
        socket,
        &[io::IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?)
}

/// Receives into `buffer`; descriptors that came along are appended to `fds`, close-on-exec.
///
/// # Errors
/// What `recvmsg(2)` says; `EAGAIN` on an empty non-blocking socket.
pub fn recv_with_fds(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [io::IoSliceMut::new(buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use slipway_proto::keeper::{Request, Signal, request::Call};

    use super::*;

    #[test]
    fn a_frame_and_its_descriptors_arrive_together() {
        let (a, b) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let sent = Request {
            call: Some(Call::Signal(Signal {
                id: "c1".into(),
                signal: 15,
                all: false,
            })),
        };
        let bytes = frame(&sent);
        assert_eq!(
            send_with_fds(&a, &bytes, &[file.as_fd()]).unwrap(),
            bytes.len()
        );
        let (mut buffer, mut fds) = (vec![0; 1024], Vec::new());
        let n = recv_with_fds(&b, &mut buffer, &mut fds).unwrap();
        assert_eq!(
            announced_len(buffer[..4].try_into().unwrap()).unwrap(),
            n - 4
        );
        assert_eq!(decode::<Request>(&buffer[4..n]).unwrap(), sent);
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn absurd_lengths_are_refused() {
        assert!(announced_len([0xff; 4]).is_err());
        assert!(decode::<Request>(&[0xff, 0xff, 0xff]).is_err());
    }
}
