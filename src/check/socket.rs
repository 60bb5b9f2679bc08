//! The socket on which the CRI is to be served.

use crate::finding::Finding;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Whether it is free.
pub(crate) fn check(listen: &Path) -> Vec<Finding> {
    vec![look(listen)]
}

fn look(listen: &Path) -> Finding {
    let (id, what) = ("socket", "socket");
    let shown = listen.display();
    let cost = "the daemon does not start";
    match fs::symlink_metadata(listen) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Finding::ok(id, what, format!("{shown} is free"));
        }
        Err(e) => {
            return Finding::warn(id, what, format!("{shown} can't be looked at: {e}"))
                .cost("the daemon may not be able to listen there")
                .fix("choose another path for listen");
        }
        Ok(there) if !there.file_type().is_socket() => {
            return Finding::fail(id, what, format!("{shown} is no socket"))
                .cost(cost)
                .fix("remove it, or choose another path for listen");
        }
        Ok(_) => {}
    }
    match UnixStream::connect(listen) {
        Ok(stream) => match owner(&stream) {
            Some((pid, name)) if name.starts_with("slipway") => Finding::info(
                id,
                what,
                format!("{shown}: a slipway daemon serves there (process {pid})"),
            ),
            owner => {
                let who = owner.map_or_else(
                    || "another process".to_owned(),
                    |(pid, name)| format!("process {pid} ({name})"),
                );
                Finding::fail(id, what, format!("{shown}: {who} listens there"))
                    .cost(cost)
                    .fix("stop it, or choose another path for listen")
            }
        },
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            let found = format!("{shown} is left from a dead process and will be replaced");
            Finding::ok(id, what, found)
        }
        Err(e) => Finding::info(id, what, format!("{shown}: {e}")).fix("run slipway check as root"),
    }
}

fn owner(stream: &UnixStream) -> Option<(i32, String)> {
    let pid = getsockopt(stream, PeerCredentials).ok()?.pid();
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some((pid, name.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use std::os::unix::net::UnixListener;

    #[test]
    fn each_kind_of_path_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        assert_eq!(look(&path).status, Status::Ok);
        let listener = UnixListener::bind(&path).unwrap();
        let finding = look(&path);
        // This test's own process listens.
        assert!(finding.found.contains("process"), "{}", finding.found);
        assert_ne!(finding.status, Status::Ok);
        drop(listener);
        assert!(look(&path).found.contains("dead"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(look(&dir.path().join("file")).status, Status::Fail);
    }
}
