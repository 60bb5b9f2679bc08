//! Filters in the kernel: loaded by forked children, which then try what they may and may not do.
//!
//! Children of a threaded process: until they exit they make system calls only, and allocate nothing.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use oci_spec::runtime::{Arch, Capabilities, LinuxSeccomp};
use slipway_seccomp::{
    CompileOptions, EngineChoice, Filter, compile, default_profile, load, running_kernel,
};
use std::{io, time::Instant};

/// Child exit codes that say that loading failed, or that a call succeeded.
const NOT_LOADED: i32 = 250;
const SUCCEEDED: i32 = 0;

/// How a child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}

fn in_child(body: impl FnOnce() -> i32) -> End {
    // SAFETY: the child calls `body`, which by the rule above makes system calls only, and _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        let code = body();
        // SAFETY: ends the child without running the parent's destructors and handlers.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `pid` is our child and `status` lives.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

/// The error of one call made under `filter`.
fn errno_under(filter: &Filter, nr: libc::c_long, args: [libc::c_ulong; 4]) -> End {
    in_child(|| {
        if load(filter).is_err() {
            return NOT_LOADED;
        }
        // SAFETY: the tests pass null pointers and numbers that no call can do harm with.
        let ret = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3]) };
        if ret >= 0 {
            return SUCCEEDED;
        }
        // SAFETY: errno of this thread.
        unsafe { *libc::__errno_location() }
    })
}

fn runtime_default() -> Filter {
    let profile = default_profile(
        &Capabilities::new(),
        slipway_seccomp::native_arch(),
        running_kernel(),
    );
    compile(&profile, &CompileOptions::default()).expect("our own profile")
}

fn may_load() -> bool {
    let open =
        compile(&LinuxSeccomp::default(), &CompileOptions::default()).expect("an empty profile");
    let can = in_child(|| if load(&open).is_ok() { 0 } else { 1 }) == End::Exit(0);
    if !can {
        println!("SKIPPED: loading a filter needs CAP_SYS_ADMIN");
    }
    can
}

#[test]
fn runtime_default_holds() {
    if !may_load() {
        return;
    }
    let filter = runtime_default();
    let ask = |nr, args| errno_under(&filter, nr, args);
    assert_eq!(ask(libc::SYS_getppid, [0; 4]), End::Exit(SUCCEEDED));
    assert_eq!(
        ask(libc::SYS_personality, [0xffff_ffff, 0, 0, 0]),
        End::Exit(SUCCEEDED)
    );
    assert_eq!(
        ask(libc::SYS_personality, [0x0040_0000, 0, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(ask(libc::SYS_mount, [0; 4]), End::Exit(libc::EPERM));
    assert_eq!(
        ask(libc::SYS_keyctl, [u64::from(u32::MAX), 0, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(libc::SYS_bpf, [u64::from(u32::MAX), 0, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(libc::SYS_io_uring_setup, [0; 4]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(
            libc::SYS_clone,
            [(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0, 0, 0]
        ),
        End::Exit(libc::EPERM)
    );
    assert_eq!(ask(libc::SYS_clone3, [0; 4]), End::Exit(libc::ENOSYS));
    assert_eq!(
        ask(libc::SYS_socket, [libc::AF_ALG as u64, 5, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(libc::SYS_socket, [libc::AF_VSOCK as u64, 1, 0, 0]),
        End::Exit(libc::EPERM)
    );
    assert_eq!(
        ask(libc::SYS_socket, [libc::AF_UNIX as u64, 1, 0, 0]),
        End::Exit(SUCCEEDED)
    );
    // A number that no kernel has: newer than the profile.
    assert_eq!(ask(511, [0; 4]), End::Exit(libc::ENOSYS));
}

/// 32-bit programs go on working, confined by the same profile.
#[test]
#[cfg(target_arch = "x86_64")]
fn runtime_default_holds_for_32_bit_calls() {
    /// `int 0x80`: an i386 call from a 64-bit process.
    fn call32(nr: u32, arg: u32) -> i32 {
        let ret: i32;
        // SAFETY: the calls made here take no pointer but null; rbx is saved and restored around them.
        unsafe {
            core::arch::asm!(
                "push rbx", "mov ebx, {arg:e}", "int 0x80", "pop rbx",
                arg = in(reg) arg, inlateout("eax") nr as i32 => ret,
                in("ecx") 0, in("edx") 0, in("esi") 0, in("edi") 0,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        ret
    }
    if !may_load() {
        return;
    }
    if in_child(|| call32(20, 0)) == End::Signal(libc::SIGSEGV) {
        println!("SKIPPED: this kernel has no 32-bit calls");
        return;
    }
    let filter = runtime_default();
    let ask = |nr, arg| {
        in_child(|| {
            if load(&filter).is_err() {
                NOT_LOADED
            } else {
                -call32(nr, arg).min(0)
            }
        })
    };
    assert_eq!(ask(20, 0), End::Exit(SUCCEEDED), "getpid");
    assert_eq!(ask(21, 0), End::Exit(libc::EPERM), "mount");
    assert_eq!(
        ask(310, libc::CLONE_NEWUSER as u32),
        End::Exit(libc::EPERM),
        "unshare"
    );
    assert_eq!(
        ask(120, (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32),
        End::Exit(libc::EPERM),
        "clone"
    );
    assert_eq!(ask(435, 0), End::Exit(libc::ENOSYS), "clone3");
    // An architecture that the profile does not list is killed.
    let mut only64 = LinuxSeccomp::default();
    only64.set_architectures(Some(vec![Arch::ScmpArchX86_64]));
    let only64 = compile(&only64, &CompileOptions::default()).expect("a filter");
    assert_eq!(
        in_child(|| if load(&only64).is_err() {
            NOT_LOADED
        } else {
            call32(20, 0)
        }),
        End::Signal(libc::SIGSYS)
    );
}

#[test]
fn every_action_acts() {
    if !may_load() {
        return;
    }
    let under = |action: &str, flags: &str| {
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":[{flags}],"syscalls":[{{"names":["getppid"],"action":"{action}","errnoRet":77}}]}}"#
        );
        let profile: LinuxSeccomp = serde_json::from_str(&json).expect("a profile");
        let tree = CompileOptions {
            engine: EngineChoice::RangeTree,
            ..CompileOptions::default()
        };
        let both: Vec<_> = [tree, CompileOptions::default()]
            .iter()
            .map(|o| {
                errno_under(
                    &compile(&profile, o).expect(action),
                    libc::SYS_getppid,
                    [0; 4],
                )
            })
            .collect();
        assert_eq!(both[0], both[1], "{action}: the two compilers differ");
        both.into_iter().next().expect("two")
    };
    assert_eq!(under("SCMP_ACT_ERRNO", ""), End::Exit(77));
    assert_eq!(under("SCMP_ACT_ALLOW", ""), End::Exit(0));
    assert_eq!(
        under("SCMP_ACT_LOG", r#""SECCOMP_FILTER_FLAG_LOG""#),
        End::Exit(0)
    );
    assert_eq!(under("SCMP_ACT_KILL", ""), End::Signal(libc::SIGSYS));
    assert_eq!(under("SCMP_ACT_KILL_THREAD", ""), End::Signal(libc::SIGSYS));
    assert_eq!(
        under("SCMP_ACT_KILL_PROCESS", ""),
        End::Signal(libc::SIGSYS)
    );
    assert_eq!(under("SCMP_ACT_TRAP", ""), End::Signal(libc::SIGSYS));
    // Nobody traces.
    assert_eq!(under("SCMP_ACT_TRACE", ""), End::Exit(libc::ENOSYS));
    assert_eq!(
        under("SCMP_ACT_ERRNO", r#""SECCOMP_FILTER_FLAG_TSYNC""#),
        End::Exit(77)
    );
    assert_eq!(
        under("SCMP_ACT_ERRNO", r#""SECCOMP_FILTER_FLAG_SPEC_ALLOW""#),
        End::Exit(77)
    );
}

#[test]
fn loading_needs_a_privilege_or_no_new_privs() {
    if !may_load() {
        return;
    }
    let filter = runtime_default();
    let become_nobody = || {
        // SAFETY: numbers only; raw calls, because libc's wrapper would talk to threads that aren't here.
        unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) == 0 }
    };
    let denied = in_child(|| match (become_nobody(), load(&filter)) {
        (true, Err(e)) => e.raw_os_error().unwrap_or(-1),
        _ => NOT_LOADED,
    });
    assert_eq!(denied, End::Exit(libc::EACCES));
    let allowed = in_child(|| {
        // SAFETY: numbers only.
        let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 };
        i32::from(!(become_nobody() && set && load(&filter).is_ok()))
    });
    assert_eq!(allowed, End::Exit(0));
    // The kernel checks programs itself.
    let mut broken = filter.clone();
    broken.instructions.truncate(3);
    let refused = in_child(|| {
        load(&broken)
            .err()
            .and_then(|e| e.raw_os_error())
            .unwrap_or(0)
    });
    assert_eq!(refused, End::Exit(libc::EINVAL));
}

/// How long RuntimeDefault is and how long it takes; the bound is far above what it should be (0.1 ms), because
/// the machine is shared.
#[test]
fn runtime_default_is_short_and_loads_fast() {
    if !may_load() {
        return;
    }
    let profile = default_profile(
        &Capabilities::new(),
        slipway_seccomp::native_arch(),
        running_kernel(),
    );
    let started = Instant::now();
    let filter = compile(&profile, &CompileOptions::default()).expect("our own profile");
    let first = started.elapsed();
    let started = Instant::now();
    for _ in 0..20 {
        compile(&profile, &CompileOptions::default()).expect("our own profile");
    }
    let compile_time = started.elapsed() / 20;
    let mut times: Vec<i32> = (0..50)
        .map(|_| {
            // In units of 2 µs, to fit an exit code.
            let end = in_child(|| {
                let started = Instant::now();
                if load(&filter).is_err() {
                    return 255;
                }
                (started.elapsed().as_nanos() / 2000).min(254) as i32
            });
            let End::Exit(units) = end else {
                panic!("{end:?}")
            };
            assert_ne!(units, 255, "loading failed");
            units * 2
        })
        .collect();
    times.sort_unstable();
    println!(
        "RuntimeDefault: {} instructions, loaded in {} µs (median of 50; best {}, worst {}), compiled in {compile_time:?} (first {first:?})",
        filter.instructions.len(),
        times[25],
        times[0],
        times[49]
    );
    assert!(
        filter.instructions.len() < 300,
        "{} instructions",
        filter.instructions.len()
    );
    assert!(times[25] < 400, "median {} µs", times[25]);
}
