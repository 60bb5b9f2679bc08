//! The CRI's names of signals. Its numbers are an alphabetical list, not the kernel's.

use nix::libc;
use slipway_proto::cri::Signal;

/// The CRI's name of a Linux signal number.
pub fn on_wire(number: i32) -> Signal {
    let named = [
        (libc::SIGABRT, Signal::Sigabrt),
        (libc::SIGALRM, Signal::Sigalrm),
        (libc::SIGBUS, Signal::Sigbus),
        (libc::SIGCHLD, Signal::Sigchld),
        (libc::SIGCONT, Signal::Sigcont),
        (libc::SIGFPE, Signal::Sigfpe),
        (libc::SIGHUP, Signal::Sighup),
        (libc::SIGILL, Signal::Sigill),
        (libc::SIGINT, Signal::Sigint),
        (libc::SIGIO, Signal::Sigio),
        (libc::SIGKILL, Signal::Sigkill),
        (libc::SIGPIPE, Signal::Sigpipe),
        (libc::SIGPROF, Signal::Sigprof),
        (libc::SIGPWR, Signal::Sigpwr),
        (libc::SIGQUIT, Signal::Sigquit),
        (libc::SIGSEGV, Signal::Sigsegv),
        (libc::SIGSTKFLT, Signal::Sigstkflt),
        (libc::SIGSTOP, Signal::Sigstop),
        (libc::SIGSYS, Signal::Sigsys),
        (libc::SIGTERM, Signal::Sigterm),
        (libc::SIGTRAP, Signal::Sigtrap),
        (libc::SIGTSTP, Signal::Sigtstp),
        (libc::SIGTTIN, Signal::Sigttin),
        (libc::SIGTTOU, Signal::Sigttou),
        (libc::SIGURG, Signal::Sigurg),
        (libc::SIGUSR1, Signal::Sigusr1),
        (libc::SIGUSR2, Signal::Sigusr2),
        (libc::SIGVTALRM, Signal::Sigvtalrm),
        (libc::SIGWINCH, Signal::Sigwinch),
        (libc::SIGXCPU, Signal::Sigxcpu),
        (libc::SIGXFSZ, Signal::Sigxfsz),
    ];
    let name = named
        .iter()
        .find(|(n, _)| *n == number)
        .map(|(_, signal)| *signal);
    // SIGRTMIN as the C library counts it is 34; the CRI's real-time signals follow each other as the
    // kernel's do.
    let real_time = || Signal::try_from(number - 34 + Signal::Sigrtmin as i32).ok();
    name.or_else(|| (34..=64).contains(&number).then(real_time).flatten())
        .unwrap_or(Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_its_name() {
        let names: std::collections::HashSet<_> = (1..=64)
            .filter(|n| !(32..34).contains(n))
            .map(|n| {
                let name = on_wire(n).as_str_name();
                assert_ne!(name, "SIGNAL_RUNTIME_DEFAULT", "{n}");
                name
            })
            .collect();
        assert_eq!(names.len(), 62);
        assert_eq!(on_wire(15), Signal::Sigterm);
        assert_eq!(on_wire(34), Signal::Sigrtmin);
        assert_eq!(on_wire(64), Signal::Sigrtmax);
        assert_eq!(on_wire(0), Signal::RuntimeDefault);
    }
}
