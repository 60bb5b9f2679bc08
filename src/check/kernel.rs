//! The kernel's version, and the system calls that nothing works without.

use crate::finding::Finding;
use crate::sys;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::io;

/// The oldest kernel that has all that pods can't run without: close_range(2) with its flag.
const OLDEST: (u32, u32) = (5, 11);
/// The oldest that has all that Slipway uses: overlay layers one by one.
const COMPLETE: (u32, u32) = (6, 5);

/// Version and system calls.
pub(crate) fn check() -> Vec<Finding> {
    vec![version(), system_calls()]
}

fn version() -> Finding {
    let (id, what) = ("kernel", "kernel");
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let found = format!("Linux {release}, {}", uname.machine().to_string_lossy());
    match parse_release(&release) {
        Some(version) if version < OLDEST => Finding::fail(id, what, found)
            .cost("pods can't be run safely")
            .fix("upgrade to Linux 5.14 or later; 6.5 has all that Slipway uses"),
        Some(version) if version < COMPLETE => Finding::info(id, what, found)
            .fix("nothing needs to be done; Linux 6.5 has all that Slipway uses"),
        Some(_) => Finding::ok(id, what, found),
        None => Finding::warn(id, what, found).cost("the version can't be judged"),
    }
}

/// The first two numbers of `6.1.0-13-amd64`.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.splitn(3, '.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(minor.len());
    Some((major, minor.get(..digits)?.parse().ok()?))
}

fn system_calls() -> Finding {
    let (id, what) = ("system-calls", "system calls");
    let calls = [
        ("clone3", clone3(), "5.3"),
        ("pidfd_open", pidfd(), "5.3"),
        ("openat2", openat2(), "5.6"),
        ("close_range", sys::close_range(), "5.11"),
    ];
    let missing: Vec<_> = calls
        .iter()
        .filter_map(|(name, result, since)| {
            let error = result.as_ref().err()?;
            Some(format!("{name} (Linux {since}): {error}"))
        })
        .collect();
    if missing.is_empty() {
        let names: Vec<_> = calls.iter().map(|(name, ..)| *name).collect();
        return Finding::ok(id, what, names.join(", "));
    }
    Finding::fail(id, what, format!("missing: {}", missing.join("; ")))
        .cost("no container can be made safely")
        .fix("upgrade the kernel; if it is new enough, a seccomp filter around this process is in the way")
}

fn clone3() -> io::Result<()> {
    sys::Sleeper::start(0, None).map(drop)
}

fn pidfd() -> io::Result<()> {
    pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(())
}

fn openat2() -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(parse_release("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.10-rc1"), Some((5, 10)));
        assert_eq!(parse_release("4.8"), Some((4, 8)));
        for bad in ["", "6", "6.", "six.one", "6.x", "99999999999.1"] {
            assert_eq!(parse_release(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_release_panics(text in ".*") {
            let _ = parse_release(&text);
        }
    }
}
