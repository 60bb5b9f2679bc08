//! What a shim tells by itself: its events and its log.

use std::io::Write;

use slipway_shim::events::{Event, Receiver};

use crate::keeper::{Keeper, Source};

/// How much is kept of what the shim logs, in bytes: the last of it.
const LONGEST_LOG: usize = 2048;

impl Keeper {
    pub(in crate::keeper) fn shim_delivers(&mut self) {
        while let Some((stream, _)) = self
            .shim
            .as_ref()
            .and_then(|pod| pod.events.0.accept().ok())
        {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let Ok(token) = self.watch(&stream, Source::ShimDelivery) else {
                return;
            };
            if let Some(pod) = &mut self.shim {
                pod.deliveries.insert(token, (stream, Receiver::default()));
            }
        }
    }

    pub(in crate::keeper) fn shim_delivery(&mut self, token: u64) {
        let mut buffer = [0; 16 << 10];
        let Some((stream, receiver)) = self
            .shim
            .as_mut()
            .and_then(|p| p.deliveries.get_mut(&token))
        else {
            self.sources.remove(&token);
            return;
        };
        let taken = match rustix::io::read(&*stream, &mut buffer) {
            Ok(0) => Err(String::new()),
            Ok(n) => receiver.feed(&buffer[..n]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(e) => Err(e.to_string()),
        };
        let written = taken.and_then(|(answers, events)| {
            stream.write_all(&answers).map_err(|e| e.to_string())?;
            Ok(events)
        });
        match written {
            Ok(events) => {
                for Event::Oom { id } in events {
                    // Of a process on the host its cgroup says more.
                    let container = self.containers.get_mut(&id).filter(|c| c.pid().is_none());
                    if let Some(own) = container.and_then(|c| c.driver.shim()) {
                        own.oom = true;
                    }
                }
            }
            // It connects again.
            Err(_) => {
                if let Some((stream, _)) =
                    self.shim.as_mut().and_then(|p| p.deliveries.remove(&token))
                {
                    self.forget(&stream, token);
                }
            }
        }
    }

    pub(in crate::keeper) fn read_shim_log(&mut self) {
        let Some(pod) = &mut self.shim else { return };
        let mut buffer = [0; 16 << 10];
        // A shim that writes without end must not keep everybody else waiting.
        for _ in 0..16 {
            match rustix::io::read(&pod.log.0, &mut buffer) {
                Ok(n) if n > 0 => {
                    pod.logged.extend_from_slice(&buffer[..n]);
                    let beyond = pod.logged.len().saturating_sub(LONGEST_LOG);
                    pod.logged.drain(..beyond);
                }
                _ => return,
            }
        }
    }

    /// The last errors of the shim's log.
    pub(super) fn shim_said(&self) -> String {
        let logged = self.shim.as_ref().map(|pod| pod.logged.as_slice());
        let text = String::from_utf8_lossy(logged.unwrap_or_default());
        let bad = |line: &&str| {
            [
                "level=error",
                "level=fatal",
                "panic",
                "\"level\":\"error\"",
                "ERRO",
            ]
            .iter()
            .any(|word| line.contains(word))
        };
        let lines: Vec<&str> = text.lines().filter(bad).collect();
        let last = lines.len().saturating_sub(3);
        lines[last..].join("; ")
    }
}
