//! A compiled filter: the classic BPF program and the flags to load it with.

use crate::{SeccompError, rules::NEW_LISTENER};

/// `BPF_MAXINSNS`: the longest program the kernel takes.
pub const MAX_INSTRUCTIONS: usize = 4096;

const MAGIC: [u8; 4] = *b"SLF1";
const HEADER: usize = 12;
const INSTRUCTION: usize = 8;

/// One classic BPF instruction, laid out as the kernel's `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jt: u8,
    /// Instructions to skip when it doesn't.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Which of the two compilers made a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Ours: a range tree over the system call numbers of every ABI.
    RangeTree,
    /// The `seccompiler` crate, behind our prologue.
    Seccompiler,
}

/// A compiled seccomp filter. Cheap to send to the process that loads it: see [`Filter::to_bytes`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The program; never empty, at most [`MAX_INSTRUCTIONS`] long.
    pub instructions: Vec<Instruction>,
    /// `SECCOMP_FILTER_FLAG_*` bits for seccomp(2).
    pub flags: u32,
    /// Names of the profile that no ABI of the filter knows, in order, once each. They have no
    /// effect, as under runc; worth a line in the log. Not part of [`Filter::to_bytes`].
    pub unknown: Vec<String>,
    /// Who made the program. After [`Filter::from_bytes`] always [`Engine::RangeTree`].
    pub engine: Engine,
}

impl Filter {
    /// Whether it leaves calls to somebody else (`SCMP_ACT_NOTIFY`), so that it has to be loaded by
    /// [`crate::load_with_listener`].
    pub fn notifies(&self) -> bool {
        self.flags & NEW_LISTENER != 0
    }

    /// Encodes program and flags for another process of the same machine: `SLF1`, flags (u32 LE),
    /// count (u32 LE), then 8 bytes an instruction, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.instructions.len() * INSTRUCTION);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&(self.instructions.len() as u32).to_le_bytes());
        for i in &self.instructions {
            out.extend_from_slice(&i.code.to_le_bytes());
            out.extend_from_slice(&[i.jt, i.jf]);
            out.extend_from_slice(&i.k.to_le_bytes());
        }
        out
    }

    /// Decodes what [`Filter::to_bytes`] made. The kernel verifies the program itself when it is
    /// loaded; here only the frame is checked.
    ///
    /// # Errors
    /// [`SeccompError::Encoding`] when the bytes are cut, too long, or something else altogether.
    pub fn from_bytes(bytes: &[u8]) -> Result<Filter, SeccompError> {
        let word = |at: usize| -> Result<u32, SeccompError> {
            bytes
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .map(u32::from_le_bytes)
                .ok_or(SeccompError::Encoding("it ends before its header does"))
        };
        if bytes.get(..4) != Some(MAGIC.as_slice()) {
            return Err(SeccompError::Encoding(
                "it does not begin with SLF1; both processes must be of the same version",
            ));
        }
        let flags = word(4)?;
        let count = word(8)? as usize;
        if count == 0 || count > MAX_INSTRUCTIONS {
            return Err(SeccompError::Encoding(
                "its length is not 1 to 4096 instructions",
            ));
        }
        let body = &bytes[HEADER..];
        if body.len() != count * INSTRUCTION {
            return Err(SeccompError::Encoding(
                "its length differs from what its header says",
            ));
        }
        let instructions = body
            .chunks_exact(INSTRUCTION)
            .map(|b| Instruction {
                code: u16::from_le_bytes([b[0], b[1]]),
                jt: b[2],
                jf: b[3],
                k: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
            })
            .collect();
        Ok(Filter {
            instructions,
            flags,
            unknown: Vec::new(),
            engine: Engine::RangeTree,
        })
    }
}
