//! The system call ABIs that a filter can tell apart.

use crate::SeccompError;
use oci_spec::runtime::Arch;

/// `__X32_SYSCALL_BIT`: set in the numbers of x32 system calls, which share x86_64's audit value.
pub const X32_BIT: u32 = 0x4000_0000;

/// A system call ABI: one numbering of the system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Abi {
    /// 64-bit x86.
    X86_64,
    /// x86_64 with 32-bit pointers; audit value of x86_64, [`X32_BIT`] set in the number.
    X32,
    /// i386.
    X86,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM, EABI.
    Arm,
}

impl Abi {
    /// Every ABI this crate has a table for.
    pub const ALL: [Abi; 5] = [Abi::X86_64, Abi::X32, Abi::X86, Abi::Aarch64, Abi::Arm];

    /// `AUDIT_ARCH_*`, what the kernel puts into `seccomp_data.arch`.
    pub const fn audit(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::X32 => 0xc000_003e,
            Abi::X86 => 0x4000_0003,
            Abi::Aarch64 => 0xc000_00b7,
            Abi::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments are compared in all 64 bits. On 32-bit ABIs (x32 included) only the low half
    /// counts, as in libseccomp.
    pub const fn wide_arguments(self) -> bool {
        matches!(self, Abi::X86_64 | Abi::Aarch64)
    }

    /// The ABI that a value of the OCI list `architectures` names; `None` for those without a table.
    pub fn from_oci(arch: Arch, native: Abi) -> Option<Abi> {
        match arch {
            Arch::ScmpArchNative => Some(native),
            Arch::ScmpArchX86_64 => Some(Abi::X86_64),
            Arch::ScmpArchX32 => Some(Abi::X32),
            Arch::ScmpArchX86 => Some(Abi::X86),
            Arch::ScmpArchAarch64 => Some(Abi::Aarch64),
            Arch::ScmpArchArm => Some(Abi::Arm),
            _ => None,
        }
    }

    /// The OCI name of this ABI.
    pub const fn to_oci(self) -> Arch {
        match self {
            Abi::X86_64 => Arch::ScmpArchX86_64,
            Abi::X32 => Arch::ScmpArchX32,
            Abi::X86 => Arch::ScmpArchX86,
            Abi::Aarch64 => Arch::ScmpArchAarch64,
            Abi::Arm => Arch::ScmpArchArm,
        }
    }

    /// Whether a kernel whose native ABI is `native` can see calls of this ABI.
    pub const fn runs_on(self, native: Abi) -> bool {
        match native {
            Abi::X86_64 | Abi::X32 => matches!(self, Abi::X86_64 | Abi::X32 | Abi::X86),
            Abi::Aarch64 => matches!(self, Abi::Aarch64 | Abi::Arm),
            Abi::X86 => matches!(self, Abi::X86),
            Abi::Arm => matches!(self, Abi::Arm),
        }
    }

    /// The ABI this program was built for.
    ///
    /// # Errors
    /// [`SeccompError::Architecture`] on machines without a table.
    pub fn native() -> Result<Abi, SeccompError> {
        Abi::from_oci(native_arch(), Abi::X86_64).ok_or(SeccompError::Architecture(native_arch()))
    }
}

/// The OCI name of the machine this program was built for.
pub const fn native_arch() -> Arch {
    if cfg!(target_arch = "x86_64") {
        Arch::ScmpArchX86_64
    } else if cfg!(target_arch = "x86") {
        Arch::ScmpArchX86
    } else if cfg!(target_arch = "aarch64") {
        Arch::ScmpArchAarch64
    } else if cfg!(target_arch = "arm") {
        Arch::ScmpArchArm
    } else if cfg!(target_arch = "riscv64") {
        Arch::ScmpArchRiscv64
    } else if cfg!(target_arch = "s390x") {
        Arch::ScmpArchS390x
    } else if cfg!(target_arch = "loongarch64") {
        Arch::ScmpArchLoongarch64
    } else if cfg!(all(target_arch = "powerpc64", target_endian = "little")) {
        Arch::ScmpArchPpc64le
    } else {
        Arch::ScmpArchNative
    }
}
