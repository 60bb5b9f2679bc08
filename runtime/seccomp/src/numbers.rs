//! System call names to numbers, per ABI.
//!
//! The numbers come from the `syscalls` crate, which generates them from the kernel's tables. It has
//! no x32 and no names that the kernel does not export as system calls, so those few are here.

use crate::arch::{Abi, X32_BIT};
use std::{collections::HashMap, sync::LazyLock};

/// x32 numbers that differ from x86_64's: calls whose arguments hold pointers or longs in memory.
/// They are 512 to 547, in this order (`arch/x86/entry/syscalls/syscall_64.tbl`).
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
const X32_OWN_BASE: u32 = 512;

/// x86_64 calls that x32 has not at all.
const X32_ABSENT: [&str; 11] = [
    "uselib",
    "_sysctl",
    "create_module",
    "get_kernel_syms",
    "query_module",
    "nfsservctl",
    "set_thread_area",
    "get_thread_area",
    "epoll_ctl_old",
    "epoll_wait_old",
    "vserver",
];

/// Calls newer than the `syscalls` crate. Since Linux 5.1 a new call has one number everywhere.
const NEW: [(&str, u32); 2] = [("listns", 470), ("rseq_slice_yield", 471)];

/// 64-bit ARM has no separate calls for 64-bit time, although the crate lists them there.
const TIME64: std::ops::RangeInclusive<u32> = 403..=423;

/// 32-bit ARM's private calls (`__ARM_NR_*`), numbered from `0xf0000`.
const ARM_PRIVATE: [(&str, u32); 6] = [
    ("breakpoint", 0xf_0001),
    ("cacheflush", 0xf_0002),
    ("usr26", 0xf_0003),
    ("usr32", 0xf_0004),
    ("set_tls", 0xf_0005),
    ("get_tls", 0xf_0006),
];

/// First of 32-bit ARM's private numbers; they say nothing about how new a profile is.
pub(crate) const ARM_PRIVATE_BASE: u32 = 0xf_0000;

/// The calls that i386 also makes through socketcall(2), by the number in its first argument.
const SOCKETCALLS: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// The calls that i386 also makes through ipc(2), by the number in its first argument.
const IPC_CALLS: [(&str, u32); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// `socketcall` and `ipc` on i386.
const X86_SOCKETCALL: u32 = 102;
const X86_IPC: u32 = 117;

type Numbers = [Option<u32>; Abi::ALL.len()];

/// The calls of one machine as its generated table has them. Its `iter` leaves out the last.
macro_rules! generated {
    ($machine:ident) => {{
        use syscalls::$machine::Sysno;
        // The enum can't have a variant `break` by its own name.
        let name = |s: &Sysno| s.name().strip_prefix("r#").unwrap_or(s.name());
        Sysno::iter()
            .filter(|s| *s != Sysno::last())
            .chain([Sysno::last()])
            .map(move |s| (name(&s), s.id().cast_unsigned()))
    }};
}

static TABLE: LazyLock<HashMap<&'static str, Numbers>> = LazyLock::new(|| {
    let mut table: HashMap<&'static str, Numbers> = HashMap::with_capacity(640);
    let mut add = |abi: Abi, name: &'static str, number: u32| {
        table.entry(name).or_default()[abi as usize] = Some(number);
    };
    for (name, number) in generated!(x86_64).chain(NEW) {
        add(Abi::X86_64, name, number);
        if !X32_ABSENT.contains(&name) {
            let own = X32_OWN.iter().position(|n| *n == name);
            let number = own.map_or(number, |i| X32_OWN_BASE + i as u32);
            add(Abi::X32, name, X32_BIT | number);
        }
    }
    for (name, number) in generated!(x86).chain(NEW) {
        add(Abi::X86, name, number);
    }
    for (name, number) in generated!(aarch64).chain(NEW) {
        if !TIME64.contains(&number) {
            // The generic table's older name for it.
            add(
                Abi::Aarch64,
                if name == "fstatat" {
                    "newfstatat"
                } else {
                    name
                },
                number,
            );
        }
    }
    for (name, number) in generated!(arm).chain(NEW).chain(ARM_PRIVATE) {
        add(Abi::Arm, name, number);
    }
    table
});

/// The number of system call `name` in `abi`, as the kernel puts it into `seccomp_data.nr` (so with
/// [`X32_BIT`] for x32); `None` when that ABI has no such call.
pub fn number(abi: Abi, name: &str) -> Option<u32> {
    TABLE.get(name).and_then(|n| n[abi as usize])
}

/// Every name and number of `abi`, in no order.
pub fn all(abi: Abi) -> impl Iterator<Item = (&'static str, u32)> {
    TABLE
        .iter()
        .filter_map(move |(name, n)| n[abi as usize].map(|n| (*name, n)))
}

/// How `name` is also called through a multiplexer: the multiplexer's number and the value of its
/// first argument. Only i386 has these.
pub(crate) fn multiplexed(abi: Abi, name: &str) -> Option<(u32, u64)> {
    if abi != Abi::X86 {
        return None;
    }
    if let Some(i) = SOCKETCALLS.iter().position(|n| *n == name) {
        return Some((X86_SOCKETCALL, i as u64 + 1));
    }
    IPC_CALLS
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, call)| (X86_IPC, u64::from(*call)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors() {
        assert_eq!(number(Abi::X86_64, "read"), Some(0));
        assert_eq!(number(Abi::X86_64, "clone3"), Some(435));
        assert_eq!(number(Abi::X86_64, "socketcall"), None);
        assert_eq!(number(Abi::X86, "socketcall"), Some(102));
        assert_eq!(number(Abi::X86, "ipc"), Some(117));
        assert_eq!(number(Abi::X86, "socket"), Some(359));
        assert_eq!(number(Abi::X32, "read"), Some(X32_BIT));
        assert_eq!(number(Abi::X32, "execve"), Some(X32_BIT | 520));
        assert_eq!(number(Abi::X32, "pwritev2"), Some(X32_BIT | 547));
        assert_eq!(number(Abi::X32, "uselib"), None);
        assert_eq!(number(Abi::Aarch64, "openat"), Some(56));
        assert_eq!(number(Abi::Aarch64, "open"), None);
        assert_eq!(number(Abi::Aarch64, "newfstatat"), Some(79));
        assert_eq!(number(Abi::Aarch64, "futex_time64"), None);
        assert_eq!(number(Abi::Arm, "set_tls"), Some(0xf0005));
        assert_eq!(number(Abi::X86, "break"), Some(17));
        for abi in Abi::ALL {
            let x32 = if abi == Abi::X32 { X32_BIT } else { 0 };
            assert_eq!(number(abi, "file_setattr"), Some(x32 | 469));
            assert_eq!(number(abi, "listns"), Some(x32 | 470));
        }
        assert_eq!(multiplexed(Abi::X86, "sendmmsg"), Some((102, 20)));
        assert_eq!(multiplexed(Abi::X86_64, "socket"), None);
    }

    #[test]
    fn numbers_are_unique_in_each_abi() {
        for abi in Abi::ALL {
            let mut seen = HashMap::new();
            for (name, n) in all(abi) {
                assert_eq!(seen.insert(n, name), None, "{abi:?} {n} {name}");
            }
            assert!(seen.len() > 300, "{abi:?} has only {}", seen.len());
        }
    }
}
