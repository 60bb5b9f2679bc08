//! The Container Device Interface (CDI 1.1): what vendors say, in files on this node, that a container needs to
//! use their devices.
//!
//! ```text
//! names, annotations ── Cdi::resolve (files, read again when they change) ──► Edits ── apply ──► Spec
//! ```
#![forbid(unsafe_code)]

mod edits;
mod file;
mod name;
mod registry;

pub use edits::{Edits, EditsError};
pub use file::FileError;
pub use name::{DeviceName, NameError, from_annotations};
pub use registry::{Cdi, CdiError, Inventory};
