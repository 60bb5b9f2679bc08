//! What libcontainer says of its failures. Its errors carry only the outermost step; what failed in it is in the events
//! that it traces on the way, in whichever of its processes that was.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::sync::Mutex;

use rustix::fs::{MemfdFlags, memfd_create};
use tracing_subscriber::filter::LevelFilter;

/// How much of it is quoted, in bytes.
const LONGEST: u64 = 2048;

/// A file in memory that the events of this process, and of those that it forks, go to.
pub struct Trace(File);

impl Trace {
    /// Collects errors from now on. `None` where that can't be: it is worth no failure.
    pub fn collect() -> Option<Self> {
        let file: File = memfd_create("trace", MemfdFlags::CLOEXEC).ok()?.into();
        let writer = Mutex::new(file.try_clone().ok()?);
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::ERROR)
            .with_writer(writer)
            .with_ansi(false)
            .with_level(false)
            .with_target(false)
            .without_time()
            .finish();
        tracing::subscriber::set_global_default(subscriber).ok()?;
        Some(Self(file))
    }

    /// The descriptors that a fork must not close.
    pub fn descriptors() -> Vec<i32> {
        // The subscriber's own is known to nobody else; by its name it is found.
        let entries = std::fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .flatten();
        let ours = entries.filter(|entry| {
            let link = std::fs::read_link(entry.path()).unwrap_or_default();
            link.to_string_lossy().starts_with("/memfd:trace")
        });
        ours.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// The end of a message: the first thing that failed, unless `known` says as much.
    pub fn text(&self, known: &str) -> String {
        let mut file = &self.0;
        let mut bytes = Vec::new();
        let read = file
            .rewind()
            .and_then(|()| file.take(LONGEST).read_to_end(&mut bytes));
        let said = String::from_utf8_lossy(&bytes);
        match (read, said.lines().next().map(str::trim)) {
            (Ok(_), Some(line)) => match line.rsplit(": ").next() {
                Some(cause) if !cause.is_empty() && !known.contains(cause) => format!(" ({line})"),
                _ => String::new(),
            },
            _ => String::new(),
        }
    }
}
