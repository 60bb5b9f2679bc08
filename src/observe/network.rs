//! Counters of the interfaces in a network namespace.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Counters of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name in the namespace.
    pub name: String,
    /// Received.
    pub rx: Counters,
    /// Transmitted.
    pub tx: Counters,
}

/// Counters of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Dropped packets.
    pub dropped: u64,
}

/// Reads the interfaces of each of these network namespaces, loopback left out; `None` for one that can't be
/// entered, because it has just gone. Blocks for a few dozen microseconds per namespace.
///
/// A thread of its own visits them one after the other and ends: no thread that anybody else uses is ever in
/// a foreign namespace, and nothing is executed.
pub fn read(namespaces: Vec<PathBuf>) -> Vec<Option<Vec<Interface>>> {
    start(namespaces).wait()
}

/// Interfaces that are being read.
pub struct Reading {
    count: usize,
    thread: Option<std::thread::JoinHandle<Vec<Option<Vec<Interface>>>>>,
}

impl Reading {
    /// What [`read`] returns.
    pub fn wait(self) -> Vec<Option<Vec<Interface>>> {
        let read = self.thread.and_then(|thread| thread.join().ok());
        read.unwrap_or_else(|| vec![None; self.count])
    }
}

/// [`read`], for who has something else to do meanwhile.
pub fn start(namespaces: Vec<PathBuf>) -> Reading {
    let count = namespaces.len();
    if count == 0 {
        return Reading {
            count,
            thread: None,
        };
    }
    let visit = move || {
        let each = namespaces.iter().map(|path| visit(path).ok());
        each.collect::<Vec<_>>()
    };
    let thread = std::thread::Builder::new()
        .name("interfaces".to_owned())
        .stack_size(128 << 10)
        .spawn(visit);
    Reading {
        count,
        thread: thread.ok(),
    }
}

fn visit(namespace: &Path) -> io::Result<Vec<Interface>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(namespace, flags, Mode::empty())?;
    move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&fd),
        Some(LinkNameSpaceType::Network),
    )?;
    Ok(parse(&std::fs::read_to_string(
        "/proc/thread-self/net/dev",
    )?))
}

/// Reads /proc/net/dev (proc(5)).
fn parse(text: &str) -> Vec<Interface> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> = numbers
                .split_ascii_whitespace()
                .map_while(|n| n.parse().ok())
                .collect();
            let at = |first: usize| {
                Some(Counters {
                    bytes: *numbers.get(first)?,
                    packets: *numbers.get(first + 1)?,
                    errors: *numbers.get(first + 2)?,
                    dropped: *numbers.get(first + 3)?,
                })
            };
            let name = name.trim();
            (name != "lo").then_some(())?;
            Some(Interface {
                name: name.to_owned(),
                rx: at(0)?,
                tx: at(8)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_and_loopback_is_left_out() {
        let text = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  900      9    0    0    0     0          0         0      900       9    0    0    0     0       0          0
  eth0: 1000     10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0
";
        let found = parse(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "eth0");
        let counters = |bytes, packets, errors, dropped| Counters {
            bytes,
            packets,
            errors,
            dropped,
        };
        assert_eq!(found[0].rx, counters(1000, 10, 1, 2));
        assert_eq!(found[0].tx, counters(2000, 20, 3, 4));
        assert_eq!(parse("eth0: 1 2 three\n"), []);
    }

    #[test]
    fn namespaces_are_visited_and_missing_ones_are_none() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let own = PathBuf::from("/proc/self/ns/net");
        let found = read(vec![own.clone(), "/nowhere".into(), own]);
        assert!(found[0].is_some() && found[1].is_none() && found[2].is_some());
        assert!(read(Vec::new()).is_empty());
    }
}
