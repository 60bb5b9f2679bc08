//! The pod's network in the guest: each interface that CNI has made gets a tap device beside it, and all frames that come in at the one
//! leave by the other, as Kata Containers has it. The guest's interface has the address of the pod's, whose own stay where they
//! are, so that plugins find what they have left.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

/// What the guest is to take over.
#[derive(Debug, Default)]
pub struct Network {
    /// Path of the namespace.
    pub path: String,
    /// Its interfaces.
    pub interfaces: Vec<Interface>,
    /// Routes, as `ip` prints them.
    routes: Vec<Value>,
}

/// One interface of the pod.
#[derive(Debug)]
pub struct Interface {
    name: String,
    /// Its hardware address.
    pub mac: String,
    mtu: u64,
    addresses: Vec<String>,
}

impl Network {
    /// Looks at a namespace, which must be configured by now.
    ///
    /// # Errors
    /// When it has no interface with an address.
    pub fn look(path: &str) -> Result<Self> {
        let mut network = Self {
            path: path.to_owned(),
            ..Self::default()
        };
        for link in list(&network.json(&["ip", "-j", "address", "show", "up"])?) {
            let text = |key: &str| link[key].as_str().unwrap_or_default().to_owned();
            let addresses: Vec<String> = list(&link["addr_info"])
                .filter(|a| a["scope"] == "global")
                .filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"])))
                .collect();
            if text("link_type") == "ether" && !addresses.is_empty() {
                network.interfaces.push(Interface {
                    name: text("ifname"),
                    mac: text("address"),
                    mtu: link["mtu"].as_u64().unwrap_or(1500),
                    addresses,
                });
            }
        }
        if network.interfaces.is_empty() {
            bail!("{path} has no interface with an address");
        }
        for family in ["-4", "-6"] {
            let routes = network.json(&["ip", "-j", family, "route", "show"])?;
            // The kernel makes those to its own addresses.
            network
                .routes
                .extend(list(&routes).filter(|r| r["protocol"] != "kernel").cloned());
        }
        Ok(network)
    }

    /// For the agent.
    pub fn describe(&self) -> Value {
        let interfaces = self.interfaces.iter();
        let interfaces: Vec<Value> = interfaces
            .map(|i| json!({"name": i.name, "mac": i.mac, "mtu": i.mtu, "addresses": i.addresses}))
            .collect();
        json!({"interfaces": interfaces, "routes": self.routes})
    }

    /// Makes the tap devices, which go when their descriptors are closed.
    ///
    /// # Errors
    /// What the kernel or `tc` says.
    pub fn connect(&self) -> Result<Vec<File>> {
        let mut taps = Vec::new();
        for (n, interface) in self.interfaces.iter().enumerate() {
            let (tap, name) = (format!("tap{n}"), interface.name.as_str());
            taps.push(make_tap(&self.path, &tap).with_context(|| format!("making {tap}"))?);
            let mtu = interface.mtu.to_string();
            self.run(&["ip", "link", "set", &tap, "mtu", &mtu, "up"])?;
            for (from, to) in [(name, tap.as_str()), (&tap, name)] {
                self.run(&["tc", "qdisc", "add", "dev", from, "ingress"])?;
                let filter = format!(
                    "tc filter add dev {from} parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect \
                     dev {to}"
                );
                let words: Vec<&str> = filter.split_whitespace().collect();
                self.run(&words)?;
            }
        }
        Ok(taps)
    }

    fn json(&self, command: &[&str]) -> Result<Value> {
        let said = self.run(command)?;
        let text = if said.trim().is_empty() { "[]" } else { &said };
        serde_json::from_str(text).with_context(|| format!("reading what {command:?} says"))
    }

    fn run(&self, command: &[&str]) -> Result<String> {
        let inside = format!("--net={}", self.path);
        let done = Command::new("nsenter").arg(inside).args(command).output();
        let done = done.context("running nsenter")?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            bail!("{command:?} in {}: {}", self.path, said.trim());
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A tap device belongs to the namespace of the thread that opens it.
fn make_tap(namespace: &str, name: &str) -> Result<File> {
    let (namespace, name) = (File::open(namespace)?, name.to_owned());
    let make = move || -> Result<File> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let tap = options
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        // struct ifreq: a name of 16 bytes, and flags.
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let flags = u16::try_from(flags)?.to_ne_bytes();
        request[16..18].copy_from_slice(&flags);
        // SAFETY: the request is as long as the kernel's structure and lives through the call.
        let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        nix::errno::Errno::result(made)?;
        Ok(tap)
    };
    let made = std::thread::spawn(make).join();
    made.map_err(|_| anyhow::anyhow!("the thread that makes it died"))?
}
