//! The guest's initial RAM disk, made at run time: this program with its libraries as `/init`, the kernel's modules that are needed,
//! and busybox for `ip`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Modules that the agent loads, with those that they need.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "virtio_net"];

/// The RAM disk's bytes: a cpio archive.
///
/// # Errors
/// Names the file that is missing.
pub fn make(kernel: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let init = fs::read("/proc/self/exe").context("reading this program")?;
    archive.add("init", 0o100_755, &init);
    for library in libraries()? {
        let name = library.rsplit('/').next().unwrap_or_default();
        // The dynamic linker is looked for by its whole path, the others in a list of directories.
        let dir = if name.starts_with("ld-") {
            "lib64"
        } else {
            "lib"
        };
        let bytes = fs::read(&library).with_context(|| format!("reading {library}"))?;
        archive.add(&format!("{dir}/{name}"), 0o100_755, &bytes);
    }
    let busybox = kernel.join("initrd/bin/busybox");
    let bytes = fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;
    archive.add("bin/busybox", 0o100_755, &bytes);
    for (n, (name, bytes)) in modules(kernel)?.iter().enumerate() {
        archive.add(&format!("modules/{n:02}-{name}"), 0o100_644, bytes);
    }
    Ok(archive.end())
}

/// Shared libraries of this process, the dynamic linker among them.
fn libraries() -> Result<BTreeSet<String>> {
    let maps = fs::read_to_string("/proc/self/maps").context("reading /proc/self/maps")?;
    let paths = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    let paths = paths.filter(|p| p.starts_with('/') && p.contains(".so"));
    Ok(paths.map(str::to_owned).collect())
}

/// The modules in the order in which they are to be loaded. Those that are built in are left out.
fn modules(kernel: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let all = kernel.join("lib/modules");
    let release = fs::read_dir(&all).with_context(|| format!("reading {}", all.display()))?;
    let release = release.flatten().next().context("no modules")?.path();
    let list = release.join("modules.dep");
    let list = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let mut paths: Vec<&str> = Vec::new();
    for wanted in MODULES {
        let file = format!("/{wanted}.ko");
        let line = list.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            path.ends_with(&file).then_some((path, needs))
        });
        let Some((path, needs)) = line else { continue };
        // A line names all that a module needs, the deepest last.
        let mut order: Vec<&str> = needs.split_whitespace().collect();
        order.reverse();
        order.push(path);
        for path in order {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    let read = paths.into_iter().map(|path| {
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let bytes = fs::read(release.join(path)).with_context(|| format!("reading {path}"))?;
        Ok((name, bytes))
    });
    read.collect()
}

/// In the "newc" format.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    made: BTreeSet<String>,
}

impl Archive {
    /// A file, and the directories that it is in.
    fn add(&mut self, path: &str, mode: u32, content: &[u8]) {
        for (at, _) in path.match_indices('/') {
            if self.made.insert(path[..at].to_owned()) {
                self.entry(&path[..at], 0o040_755, &[]);
            }
        }
        self.entry(path, mode, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let mut head = "070701".to_owned();
        let inode = self.bytes.len() + 1;
        for field in [inode, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0] {
            head.push_str(&format!("{field:08x}"));
        }
        head.push_str(&format!("{:08x}{:08x}{name}\0", name.len() + 1, 0));
        self.bytes.extend(head.as_bytes());
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
