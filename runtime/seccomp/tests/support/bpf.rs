//! A machine for the classic BPF that seccomp filters are made of (seccomp(2), `net/core/filter.c`).

use super::Call;
use slipway_seccomp::Instruction;

/// What a program decided, and whether it looked at the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub ret: u32,
    pub looked_at_arguments: bool,
}

/// Runs `program` on `call`.
///
/// # Panics
/// On anything that the kernel would refuse to load: jumps out of the program, unknown instructions,
/// loads outside `seccomp_data`, an end without a return.
pub fn run(program: &[Instruction], call: &Call) -> Outcome {
    let (mut a, mut x, mut pc) = (0u32, 0u32, 0usize);
    let mut memory = [0u32; 16];
    let mut looked = false;
    loop {
        let i = program
            .get(pc)
            .unwrap_or_else(|| panic!("the program runs over its end at {pc}"));
        pc += 1;
        let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
        match i.code {
            0x20 => {
                looked |= i.k >= 16;
                a = load(call, i.k);
            }
            0x00 => a = i.k,
            0x01 => x = i.k,
            0x02 => memory[i.k as usize] = a,
            0x60 => a = memory[i.k as usize],
            0x61 => x = memory[i.k as usize],
            0x07 => x = a,
            0x87 => a = x,
            0x54 => a &= i.k,
            0x05 => pc += i.k as usize,
            0x15 => pc += jump(a == i.k),
            0x25 => pc += jump(a > i.k),
            0x35 => pc += jump(a >= i.k),
            0x45 => pc += jump(a & i.k != 0),
            0x06 => {
                return Outcome {
                    ret: i.k,
                    looked_at_arguments: looked,
                };
            }
            0x16 => {
                return Outcome {
                    ret: a,
                    looked_at_arguments: looked,
                };
            }
            code => panic!(
                "instruction {code:#x} at {} is not in seccomp's BPF",
                pc - 1
            ),
        }
    }
}

fn load(call: &Call, offset: u32) -> u32 {
    match offset {
        0 => call.nr,
        4 => call.arch,
        8 | 12 => 0,
        16..64 if offset.is_multiple_of(4) => {
            let arg = call.args[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) {
                arg as u32
            } else {
                (arg >> 32) as u32
            }
        }
        _ => panic!("load from {offset}, outside seccomp_data"),
    }
}
