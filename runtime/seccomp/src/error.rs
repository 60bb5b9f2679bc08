//! What can be wrong with a seccomp profile.

use oci_spec::runtime::Arch;

/// Why a profile could not be read or compiled.
///
/// The texts name the place in the profile and say what to write instead, because the reader is the
/// author of a Localhost profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeccompError {
    /// The profile is not JSON, or a value in it is not one that the format knows. The cause has the
    /// line and the column.
    #[error(
        "reading the seccomp profile as JSON: it must be an OCI LinuxSeccomp object or a Docker/containers-common profile"
    )]
    Json(#[source] serde_json::Error),

    /// Two keys of the profile contradict each other, or a required one is missing.
    #[error("seccomp profile, {place}: {problem}")]
    Profile {
        /// Where in the profile, e.g. `syscalls[3]`.
        place: String,
        /// What is wrong and what to write instead.
        problem: String,
    },

    /// Something that the OCI format knows and this build does not do.
    #[error("seccomp profile, {place}: {what} is not supported; {remedy}")]
    Unsupported {
        /// Where in the profile, e.g. `syscalls[3].action`.
        place: String,
        /// The value that is not supported.
        what: String,
        /// What to use instead.
        remedy: &'static str,
    },

    /// No system call table for this architecture in this build.
    #[error(
        "no seccomp filter can be made for {0}: this build has system call tables for x86_64, x32, x86, aarch64 and arm"
    )]
    Architecture(Arch),

    /// The program is longer than the kernel takes (`BPF_MAXINSNS`).
    #[error(
        "the seccomp profile compiles to {instructions} BPF instructions or more and the kernel takes 4096; use fewer argument conditions"
    )]
    TooLong {
        /// Length of the program, as far as it got.
        instructions: usize,
    },

    /// `seccompiler` refused the rules it was given.
    #[error("compiling the seccomp profile with seccompiler")]
    Seccompiler(#[source] Box<seccompiler::Error>),

    /// The bytes are not a filter made by [`crate::Filter::to_bytes`].
    #[error("reading a compiled seccomp filter: {0}")]
    Encoding(&'static str),
}
