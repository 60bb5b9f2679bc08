//! What the integration tests share: a BPF machine and a direct reading of profiles.
#![allow(dead_code, reason = "each test crate uses its part")]

pub mod bpf;
pub mod oracle;
pub mod peer;

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompArg};
use slipway_seccomp::{Abi, Instruction, X32_BIT, numbers};

/// `seccomp_data` but for the instruction pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub arch: u32,
    pub nr: u32,
    pub args: [u64; 6],
}

/// A name for a call in a failure message.
pub fn describe(call: &Call) -> String {
    let name = Abi::ALL
        .iter()
        .filter(|a| a.audit() == call.arch)
        .find_map(|a| {
            numbers::all(*a)
                .find(|(_, n)| *n == call.nr)
                .map(|(name, _)| format!("{a:?} {name}"))
        });
    format!(
        "{} (arch {:#x}, nr {}{}) args {:x?}",
        name.as_deref().unwrap_or("?"),
        call.arch,
        call.nr & !X32_BIT,
        if call.nr & X32_BIT != 0 { "|x32" } else { "" },
        call.args
    )
}

/// `SECCOMP_RET_*` in words.
pub fn verdict(ret: u32) -> String {
    let data = ret & 0xffff;
    match ret & 0xffff_0000 {
        0x7fff_0000 => "allow".into(),
        0x7ffc_0000 => "log".into(),
        0x7ff0_0000 => format!("trace {data}"),
        0x0005_0000 => format!("errno {data}"),
        0x0003_0000 => "trap".into(),
        0x8000_0000 => "kill process".into(),
        0x0000_0000 => "kill thread".into(),
        _ => format!("{ret:#x}"),
    }
}

/// Every system call number worth asking about: all that could be one, and the edges of the ranges that
/// mean something else.
pub fn numbers_to_ask() -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..=620).collect();
    numbers.extend((0..=620).map(|n| n | X32_BIT));
    numbers.extend([
        1000,
        0xeffff,
        0xf0000,
        0xf0001,
        0xf0002,
        0xf0005,
        0xf0006,
        0xf0007,
        X32_BIT - 1,
        0x7fff_ffff,
        0x8000_0000,
        0xbfff_ffff,
        0xc000_0000,
        0xffff_fffe,
        0xffff_ffff,
    ]);
    numbers
}

/// The architectures worth asking about: ours, the foreign ones, and nonsense.
pub fn arches_to_ask() -> Vec<u32> {
    vec![
        Abi::X86_64.audit(),
        Abi::X86.audit(),
        Abi::Aarch64.audit(),
        Abi::Arm.audit(),
        0,
        u32::MAX,
    ]
}

/// Argument lists that tell the conditions of `profile` apart: for every entry, each value of its
/// conditions (met, just missed, and with other halves) in its place, beside values of the others.
pub fn arguments_to_ask(profile: &LinuxSeccomp) -> Vec<[u64; 6]> {
    let mut out = vec![[0; 6], [u64::MAX; 6]];
    for args in profile
        .syscalls()
        .iter()
        .flatten()
        .filter_map(|s| s.args().as_ref())
    {
        let met = args.iter().fold([0; 6], |mut met, a| {
            met[a.index()] = meeting(a);
            met
        });
        for arg in args {
            let mut values = Vec::new();
            interesting(arg, &mut values);
            for value in values {
                let mut one = met;
                one[arg.index()] = value;
                out.push(one);
            }
        }
    }
    // The multiplexers' first argument.
    out.extend((0..=25).map(|call| [call, 0, 0, 0, 0, 0]));
    out.sort_unstable();
    out.dedup();
    out
}

/// A value that meets the condition, where there is one.
fn meeting(arg: &LinuxSeccompArg) -> u64 {
    use oci_spec::runtime::LinuxSeccompOperator as Op;
    match arg.op() {
        Op::ScmpCmpEq | Op::ScmpCmpGe | Op::ScmpCmpLe => arg.value(),
        Op::ScmpCmpNe | Op::ScmpCmpGt => arg.value().wrapping_add(1),
        Op::ScmpCmpLt => arg.value().wrapping_sub(1),
        Op::ScmpCmpMaskedEq => arg.value_two().unwrap_or(0) & arg.value(),
    }
}

fn interesting(arg: &LinuxSeccompArg, out: &mut Vec<u64>) {
    let (v, w) = (arg.value(), arg.value_two().unwrap_or(0));
    out.extend([
        0,
        1,
        v,
        v.wrapping_add(1),
        v.wrapping_sub(1),
        v ^ (1 << 32),
        v << 32,
        !v,
        w,
        v & w,
        u64::MAX,
    ]);
    // Each bit of a mask alone.
    out.extend(
        (0..64)
            .map(|bit| 1u64 << bit)
            .filter(|bit| v & bit != 0)
            .take(9),
    );
}

/// The ABI of a call on x86_64.
pub fn abi_of(call: &Call) -> Option<Abi> {
    match (call.arch, call.nr & X32_BIT != 0) {
        (a, false) if a == Abi::X86_64.audit() => Some(Abi::X86_64),
        (a, true) if a == Abi::X86_64.audit() => Some(Abi::X32),
        (a, _) if a == Abi::X86.audit() => Some(Abi::X86),
        _ => None,
    }
}

/// Everything that the two programs see differently, with both answers.
pub fn differences(
    ours: &[Instruction],
    theirs: &[Instruction],
    arguments: &[[u64; 6]],
) -> Vec<(Call, u32, u32)> {
    let mut out = Vec::new();
    for arch in arches_to_ask() {
        for nr in numbers_to_ask() {
            for args in arguments {
                let call = Call {
                    arch,
                    nr,
                    args: *args,
                };
                let (a, b) = (bpf::run(ours, &call), bpf::run(theirs, &call));
                if a.ret != b.ret {
                    out.push((call, a.ret, b.ret));
                }
                if !a.looked_at_arguments && !b.looked_at_arguments {
                    break;
                }
            }
        }
    }
    out
}
