//! The device controller of cgroup v2: a small eBPF program per container, written here instruction by
//! instruction from the container's device rules and attached to its cgroup.
//!
//! A rule later in the list wins over an earlier one, as writes to v1's `devices.allow` and `devices.deny`
//! do; what no rule names is denied.
//!
//! `unsafe` is confined to the two `bpf(2)` calls at the end: both get a zero-initialised attribute block of
//! the size that they are told, whose pointers outlive the call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// What is asked for, as the kernel numbers it (`BPF_DEVCG_ACC_*`).
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// A device rule as the filter sees it; `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    /// 1: block, 2: character.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    /// From a rule of the OCI spec (Linux container configuration, allowed device list).
    pub fn new(rule: &LinuxDeviceCgroup) -> Self {
        let number = |n: Option<i64>| n.filter(|n| *n >= 0).and_then(|n| i32::try_from(n).ok());
        let access = rule
            .access()
            .as_deref()
            .filter(|a| !a.is_empty())
            .unwrap_or("rwm");
        Self {
            allow: rule.allow(),
            kind: match rule.typ() {
                Some(LinuxDeviceType::B) => Some(1),
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(2),
                _ => None,
            },
            major: number(rule.major()),
            minor: number(rule.minor()),
            access: parse_access(access),
        }
    }

    /// From a line as v1's `devices.allow` takes it.
    pub fn allowing(line: &str) -> Option<Self> {
        let mut words = line.split([' ', ':']);
        let kind = match words.next()? {
            "b" => Some(1),
            "c" => Some(2),
            _ => None,
        };
        let (major, minor) = (words.next()?, words.next()?);
        Some(Self {
            allow: true,
            kind,
            major: major.parse().ok(),
            minor: minor.parse().ok(),
            access: parse_access(words.next()?),
        })
    }

    /// Whether it names every access to every device.
    pub fn is_total(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }

    /// Whether it lets through what it names.
    pub fn allows(&self) -> bool {
        self.allow
    }
}

fn parse_access(text: &str) -> i32 {
    let bit = |c| match c {
        'm' => MKNOD,
        'r' => READ,
        'w' => WRITE,
        _ => 0,
    };
    text.chars().map(bit).fold(0, |all, one| all | one)
}

/// One eBPF instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + offset)
const MOVE: u8 = 0xb7; // dst = immediate
const MOVE_REGISTER: u8 = 0xbf; // dst = src
const AND: u8 = 0x57; // dst &= immediate
const SHIFT_RIGHT: u8 = 0x77; // dst >>= immediate
const JUMP_IF_NOT: u8 = 0x55; // if dst != immediate
const JUMP_IF: u8 = 0x15; // if dst == immediate
const EXIT: u8 = 0x95;

const fn op(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: dst | (src << 4),
        offset,
        immediate,
    }
}

/// The program: returns 1 to let an access pass (`struct bpf_cgroup_dev_ctx` in register 1).
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        op(LOAD_WORD, 2, 1, 0, 0), // access_type: the type below, the access above
        op(MOVE_REGISTER, 3, 2, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0), // major
        op(LOAD_WORD, 5, 1, 8, 0), // minor
    ];
    for rule in rules.iter().rev() {
        // Conditions, each of which leads past the rule when it does not hold.
        let mut test = Vec::new();
        if let Some(kind) = rule.kind {
            test.push(op(JUMP_IF_NOT, 2, 0, 0, kind));
        }
        if rule.access != ALL {
            test.push(op(MOVE_REGISTER, 6, 3, 0, 0));
            if rule.allow {
                // All that is asked for must be allowed ...
                test.push(op(AND, 6, 0, 0, ALL & !rule.access));
                test.push(op(JUMP_IF_NOT, 6, 0, 0, 0));
            } else {
                // ... and one thing that is denied is enough.
                test.push(op(AND, 6, 0, 0, rule.access));
                test.push(op(JUMP_IF, 6, 0, 0, 0));
            }
        }
        if let Some(major) = rule.major {
            test.push(op(JUMP_IF_NOT, 4, 0, 0, major));
        }
        if let Some(minor) = rule.minor {
            test.push(op(JUMP_IF_NOT, 5, 0, 0, minor));
        }
        let length = test.len();
        for (at, instruction) in test.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_IF | JUMP_IF_NOT) {
                // Past the rest of the tests and the two instructions of the verdict.
                instruction.offset = (length - at - 1 + 2) as i16;
            }
        }
        code.append(&mut test);
        code.push(op(MOVE, 0, 0, 0, i32::from(rule.allow)));
        code.push(op(EXIT, 0, 0, 0, 0));
        if length == 0 {
            // It matches everything: the verifier refuses code that can't be reached.
            return code;
        }
    }
    code.push(op(MOVE, 0, 0, 0, 0));
    code.push(op(EXIT, 0, 0, 0, 0));
    code
}

/// Attaches a filter for `rules` to a cgroup v2 directory. It stays with the cgroup.
///
/// # Errors
/// What `bpf(2)` says; `EPERM` without CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN.
pub fn attach(cgroup: BorrowedFd<'_>, rules: &[Rule]) -> io::Result<()> {
    let program = load(&program(rules))?;
    attach_program(cgroup, &program)
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn load(code: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: code.len() as u32,
        instructions: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        name: *b"slipway_devices\0",
        ..LoadAttributes::default()
    };
    // SAFETY: see the module's header; the descriptor that comes back is nobody else's.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            std::mem::size_of::<LoadAttributes>(),
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn attach_program(cgroup: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: see the module's header.
    let status = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            std::mem::size_of::<AttachAttributes>(),
        )
    };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    use super::*;
    use crate::cgroup::Hierarchies;
    use crate::sys;

    /// Runs the program by hand.
    fn verdict(rules: &[Rule], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let code = program(rules);
        let context = [(access << 16) | kind, major, minor];
        let (mut r, mut at) = ([0i32; 11], 0);
        loop {
            let i = code[at];
            let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD_WORD => r[dst] = context[i.offset as usize / 4],
                MOVE => r[dst] = i.immediate,
                MOVE_REGISTER => r[dst] = r[src],
                AND => r[dst] &= i.immediate,
                SHIFT_RIGHT => r[dst] >>= i.immediate,
                JUMP_IF if r[dst] == i.immediate => at += i.offset as usize,
                JUMP_IF_NOT if r[dst] != i.immediate => at += i.offset as usize,
                JUMP_IF | JUMP_IF_NOT => {}
                EXIT => return r[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn deny_all() -> Rule {
        Rule {
            allow: false,
            kind: None,
            major: None,
            minor: None,
            access: ALL,
        }
    }

    #[test]
    fn the_last_rule_that_matches_wins() {
        let allow = |line| Rule::allowing(line).unwrap();
        let rules = [
            deny_all(),
            allow("c 1:3 rw"),
            allow("b 8:* r"),
            allow("c *:* m"),
        ];
        assert!(verdict(&rules, 2, READ | WRITE, 1, 3));
        assert!(!verdict(&rules, 2, READ, 1, 4));
        assert!(!verdict(&rules, 1, READ, 1, 3));
        assert!(verdict(&rules, 1, READ, 8, 17));
        assert!(!verdict(&rules, 1, READ | WRITE, 8, 17));
        assert!(verdict(&rules, 2, MKNOD, 99, 99));
        assert!(!verdict(&[], 2, READ, 1, 3));
        let denied = Rule {
            allow: false,
            access: WRITE,
            ..allow("c 1:3 rwm")
        };
        let rules = [allow("a *:* rwm"), denied];
        assert!(verdict(&rules, 2, READ, 1, 3));
        assert!(!verdict(&rules, 2, READ | WRITE, 1, 3));
        assert!(verdict(&rules, 1, READ, 8, 0));
        assert!(verdict(&[deny_all(), allow("a *:* rwm")], 1, READ, 8, 0));
    }

    #[test]
    fn the_kernel_obeys_it() {
        let host = Hierarchies::detect().unwrap();
        let cgroup = PathBuf::from(format!("/slipway-devices-{}", std::process::id()));
        let root = nix::unistd::geteuid().is_root();
        let Some((dir, fd)) = root.then(|| host.make_leaf(&cgroup, "").unwrap()).flatten() else {
            println!("SKIPPED: needs root and a cgroup v2 hierarchy");
            return;
        };
        let attached = attach(
            fd.as_fd(),
            &[deny_all(), Rule::allowing("c 1:3 rw").unwrap()],
        );
        let options = sys::CloneOptions {
            cgroup: Some(fd.as_fd()),
            ..Default::default()
        };
        let status = match sys::clone_process(&options).unwrap() {
            sys::Forked::Child => {
                let null = std::fs::File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/null");
                let zero = std::fs::File::open("/dev/zero").map_err(|e| e.raw_os_error());
                let right = null.is_ok() && zero.err() == Some(Some(libc::EPERM));
                sys::exit_now(i32::from(!right))
            }
            sys::Forked::Parent(pid) => {
                nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap()
            }
        };
        std::fs::remove_dir(dir).unwrap();
        attached.unwrap();
        assert!(
            matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)),
            "{status:?}"
        );
    }
}
