//! OCI hooks that the node gives to containers: the directories of files in schema 1.0.0 that Podman and CRI-O read
//! (oci-hooks(5)).
//!
//! ```text
//! hooks.d/*.json ─ Hooks::now ─ Loaded ─ inject(container) ⇢ hooks of an OCI specification
//! ```
//!
//! A file that can't be used is reported, and the others count. Files are looked at when a container asks, not watched:
//! a look at directories that are not there, or that have not changed, costs a few system calls.
#![forbid(unsafe_code)]

mod directory;
mod file;

pub use directory::{Hooks, Inventory, Loaded, Rejected};
pub use file::Subject;
