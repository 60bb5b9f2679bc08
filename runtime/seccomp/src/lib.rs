//! Seccomp: the RuntimeDefault profile, and OCI profiles compiled to BPF.
//!
//! ```text
//! RuntimeDefault ─ default_profile ─┐
//! Localhost file ─ parse_profile ───┼─ LinuxSeccomp ─ compile ─ Filter ─ to_bytes ⇢ from_bytes ─ load
//! OCI spec ─────────────────────────┘         └────── ProfileCache ──────┘    (another process)
//! ```
//!
//! # What a filter means
//!
//! What runc with libseccomp would make of the same profile:
//!
//! - Calls of an architecture that the profile does not list kill the thread; the native one is always
//!   listed. x32 is an architecture of its own. On 32-bit ABIs arguments are compared by their low half.
//! - `SCMP_CMP_MASKED_EQ` tests `(argument & value) == valueTwo`.
//! - A rule without conditions beats those with; conditions of one entry must all hold, but two on the same
//!   argument are alternatives; several entries for one call are alternatives.
//! - Where such alternatives with different actions both match, libseccomp's order of tests decides
//!   (`rules`); an unambiguous profile is always taken at its word.
//! - i386's socket and System V calls are judged in socketcall(2) and ipc(2), too.
//! - Names that no listed architecture knows have no effect and are reported in [`Filter::unknown`].
//! - Calls newer than every call that the profile names fail with `ENOSYS`, whatever the default action,
//!   unless that lets them pass. (runc leaves this out for architectures that the profile does not list
//!   and for 32-bit ARM; we don't.)
//! - `SCMP_ACT_NOTIFY` is refused, unless [`CompileOptions::notify`] says that there is somebody to ask.
//!
//! # Two compilers
//!
//! Profiles that the `seccompiler` crate can express (one 64-bit architecture, one action beside the
//! default, few calls) are compiled by it, behind a prologue of ours that settles foreign architectures, x32
//! and newer calls. It tests one call after the other, knows one action, and kills every 32-bit call, so all
//! others, RuntimeDefault among them, go through our own emitter: a balanced tree over ranges of system call
//! numbers, for every architecture in one program, a tenth of the length and so of the loading time.
//! Tests hold the two against each other.
#![deny(unsafe_code)]

mod arch;
mod cache;
mod compile;
mod default;
mod default_tables;
mod emit;
mod errno;
mod error;
mod filter;
mod kernel;
mod load;
pub mod numbers;
mod profile;
mod rules;

pub use arch::{Abi, X32_BIT, native_arch};
pub use cache::{ProfileCache, Source, resolve};
pub use compile::{CompileOptions, EngineChoice, compile};
pub use default::default_profile;
pub use error::SeccompError;
pub use filter::{Engine, Filter, Instruction, MAX_INSTRUCTIONS};
pub use kernel::running_kernel;
pub use load::{load, load_program, load_with_listener};
pub use profile::{Subject, parse_profile};
