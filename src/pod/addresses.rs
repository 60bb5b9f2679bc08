//! Giving a pod's interfaces their addresses back. A sandbox with a network stack of its own (gVisor's) has taken them off
//! them, and plugins that look there find nothing to clean up: the bridge plugin's masquerading rules would stay.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use slipway_network::NetworkResult;
use slipway_runtime::addresses;

use super::node::Node;
use super::record::PodRecord;

impl Node {
    /// Makes a pod's interfaces look to the network's plugins as they left them, if it has a sandbox that changes them. For
    /// pods whose containers have ended; only says in the log what went wrong, which plugins may do without.
    pub(super) async fn give_addresses_back(&self, record: &PodRecord) {
        let shared = record.driver.as_ref().is_some_and(|d| d.pod_sandbox);
        if shared && !record.namespaces.network.is_empty() {
            let netns = PathBuf::from(&record.namespaces.network);
            self.give_addresses_back_to(&record.id, netns).await;
        }
    }

    /// Likewise, of a pod that has come to no record.
    pub(super) async fn give_addresses_back_to(&self, id: &str, netns: PathBuf) {
        let Some(result) = self.cni.cached(id) else {
            return;
        };
        let wanted = of_pod(&result);
        // A thread of its own, which goes with the namespace that it joins.
        let work = move || {
            let thread = std::thread::spawn(move || add_all(&netns, &wanted));
            thread.join().unwrap_or_default()
        };
        let problems = tokio::task::spawn_blocking(work).await.unwrap_or_default();
        if !problems.is_empty() {
            tracing::warn!(
                pod = id,
                problems = problems.join("; "),
                "its interfaces lack addresses that plugins may look for"
            );
        }
    }
}

/// Interface, address and length of the prefix, of all that a pod has.
fn of_pod(result: &NetworkResult) -> Vec<(String, IpAddr, u8)> {
    let mut all = Vec::new();
    for network in &result.networks {
        let own = network.result.pod_addresses(&network.ifname);
        let addresses = network.result.addresses().iter();
        for address in addresses.filter(|a| own.contains(&a.ip)) {
            all.push((network.ifname.clone(), address.ip, address.prefix));
        }
    }
    all
}

fn add_all(netns: &Path, wanted: &[(String, IpAddr, u8)]) -> Vec<String> {
    let joined = std::fs::File::open(netns)
        .and_then(|namespace| Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?));
    if let Err(e) = joined {
        return vec![format!("{}: {e}", netns.display())];
    }
    let each = wanted.iter().map(|(interface, address, prefix)| {
        let added = addresses::add(interface, *address, *prefix);
        added.map_err(|e| format!("{address} on {interface}: {e}"))
    });
    each.filter_map(Result::err).collect()
}
