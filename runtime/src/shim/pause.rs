//! The process of a sandbox container, for shims that have no sandbox API and want one container that is the pod.
//!
//! Slipway has no pause image, and pulls none: the program is the few instructions below, in an ELF file of its own. It
//! ignores SIGCHLD, so that the kernel reaps what is left to it as process 1, and sleeps for ever. Being process 1, it heeds
//! no signal but SIGKILL.

/// The program, for this machine.
pub fn program() -> Option<Vec<u8>> {
    match std::env::consts::ARCH {
        "x86_64" => Some(elf(62, &X86_64)),
        "aarch64" => {
            let code: Vec<u8> = AARCH64.iter().flat_map(|word| word.to_le_bytes()).collect();
            Some(elf(183, &code))
        }
        _ => None,
    }
}

/// `rt_sigaction(SIGCHLD, &act, NULL, 8)`, then `pause()` again and again; `act` stands behind them.
const X86_64: [u8; 72] = [
    0xb8, 13, 0, 0, 0, // mov eax, 13
    0xbf, 17, 0, 0, 0, // mov edi, 17
    0x48, 0x8d, 0x35, 23, 0, 0, 0, // lea rsi, [rip + 23]
    0x31, 0xd2, // xor edx, edx
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, 34
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the last mov
    0, 0, 0, 0, // up to a multiple of eight
    1, 0, 0, 0, 0, 0, 0, 0, // handler: SIG_IGN
    0, 0, 0, 0, 0, 0, 0, 0, // flags
    0, 0, 0, 0, 0, 0, 0, 0, // restorer
    0, 0, 0, 0, 0, 0, 0, 0, // mask
];

/// The same, with `ppoll()` of nothing, as there is no `pause()`.
const AARCH64: [u32; 22] = [
    0xd280_10c8, // mov x8, #134
    0xd280_0220, // mov x0, #17
    0x1000_0181, // adr x1, act
    0xd280_0002, // mov x2, #0
    0xd280_0103, // mov x3, #8
    0xd400_0001, // svc #0
    0xd280_0000, // mov x0, #0
    0xd280_0001, // mov x1, #0
    0xd280_0002, // mov x2, #0
    0xd280_0003, // mov x3, #0
    0xd280_0928, // mov x8, #73
    0xd400_0001, // svc #0
    0x17ff_fffa, // b to the sixth before
    0,           // up to a multiple of eight
    1,
    0,
    0,
    0,
    0,
    0,
    0,
    0, // act
];

/// A file that is loaded as it is, and begins behind its headers.
fn elf(machine: u16, code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut file = Vec::new();
    // Class 64 bits, little-endian, version 1.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    file.extend([0; 8]);
    file.extend(2u16.to_le_bytes()); // ET_EXEC
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(5u32.to_le_bytes()); // readable, executable
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;
    use std::time::Duration;

    #[test]
    fn it_sleeps_and_ignores_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pause");
        let mut options = std::fs::File::options();
        let file = options.write(true).create_new(true).mode(0o700).open(&path);
        std::io::Write::write_all(&mut file.unwrap(), &program().unwrap()).unwrap();
        let mut child = std::process::Command::new(&path).spawn().unwrap();
        // Signal 17 is bit 16.
        let ignores = |status: &str| {
            let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:\t"));
            mask.is_some_and(|m| u64::from_str_radix(m, 16).is_ok_and(|m| m & (1 << 16) != 0))
        };
        let there = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
            status.is_ok_and(|s| ignores(&s) && s.contains("State:\tS"))
        });
        assert!(there && child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
