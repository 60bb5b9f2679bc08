//! What a pod asks of its network, and how that is handed to plugins: `CNI_ARGS` and the runtime
//! configuration by capability (the CNI project's CONVENTIONS).

use crate::bandwidth::Bandwidth;
use crate::config::PluginConfig;
use crate::dns::DnsConfig;
use crate::name::{NameError, check_arg, check_container_id, check_ifname, no_container_port};
use serde_json::{Map, Value, json};
use std::net::IpAddr;
use std::path::PathBuf;

/// A transport protocol of a port mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names say it all.
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// A port of the host that leads to a port of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// The host's port; 0 means that the host's ports are not concerned, and is passed over.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address that listens; `None` for all of them.
    pub host_ip: Option<IpAddr>,
}

/// A range that addresses are to be taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpRange {
    /// The subnet, such as `10.1.0.0/24`.
    pub subnet: String,
    /// The first and last address to assign, and the gateway; the plugin's choice when absent.
    pub range_start: Option<IpAddr>,
    /// See `range_start`.
    pub range_end: Option<IpAddr>,
    /// See `range_start`.
    pub gateway: Option<IpAddr>,
}

/// A pod to be attached to the network.
#[derive(Clone, Debug)]
pub struct PodNetwork {
    /// The sandbox's id; names the attachment.
    pub id: String,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// The name of its first interface: `eth0` unless there is a reason.
    pub ifname: String,
    /// Host ports; given to plugins that declare `portMappings`.
    pub port_mappings: Vec<PortMapping>,
    /// DNS of the pod; given to plugins that declare `dns`.
    pub dns: Option<DnsConfig>,
    /// Limits; given to plugins that declare `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// One list of ranges per address wanted; given to plugins that declare `ipRanges`.
    pub ip_ranges: Vec<Vec<IpRange>>,
    /// The interface's hardware address; given to plugins that declare `mac`.
    pub mac: Option<String>,
    /// Addresses with prefix length; given to plugins that declare `ips`.
    pub ips: Vec<String>,
    /// Names for the pod's addresses; given to plugins that declare `aliases`.
    pub aliases: Vec<String>,
    /// The pod's cgroup; given to plugins that declare `cgroupPath`.
    pub cgroup_path: Option<String>,
    /// Directory of the configurations of its networks, in place of the node's.
    pub conf_dir: Option<PathBuf>,
}

impl PodNetwork {
    /// A pod on `eth0` that asks for nothing beyond an address.
    pub fn new(
        id: impl Into<String>,
        namespace: impl Into<String>,
        name: impl Into<String>,
        uid: impl Into<String>,
        netns: impl Into<PathBuf>,
    ) -> Self {
        Self {
            id: id.into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            netns: netns.into(),
            ifname: "eth0".into(),
            port_mappings: Vec::new(),
            dns: None,
            bandwidth: None,
            ip_ranges: Vec::new(),
            mac: None,
            ips: Vec::new(),
            aliases: Vec::new(),
            cgroup_path: None,
            conf_dir: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), NameError> {
        check_container_id(&self.id)?;
        check_ifname(&self.ifname)?;
        check_arg("pod namespace", &self.namespace)?;
        check_arg("pod name", &self.name)?;
        check_arg("pod uid", &self.uid)?;
        // Plugins refuse such a mapping on DEL as well as on ADD, so the pod would never get rid of it.
        match self
            .port_mappings
            .iter()
            .find(|m| m.host_port != 0 && m.container_port == 0)
        {
            Some(mapping) => Err(no_container_port(mapping.host_port)),
            None => Ok(()),
        }
    }

    /// `CNI_ARGS` (the CNI project's CONVENTIONS; the names are those that every kubelet runtime gives).
    pub(crate) fn args(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};\
             K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.id, self.uid
        )
    }

    /// Everything that the pod asks for, by capability.
    pub(crate) fn wishes(&self) -> Map<String, Value> {
        let mut wishes = Map::new();
        let mut wish = |capability: &str, value: Value| {
            wishes.insert(capability.to_owned(), value);
        };
        let ports: Vec<_> = self
            .port_mappings
            .iter()
            .filter(|m| m.host_port != 0)
            .map(port_json)
            .collect();
        if !ports.is_empty() {
            wish("portMappings", ports.into());
        }
        if let Some(dns) = &self.dns {
            wish(
                "dns",
                json!({"servers": dns.servers, "searches": dns.searches, "options": dns.options}),
            );
        }
        if let Some(bandwidth) = self.bandwidth {
            wish("bandwidth", bandwidth.to_json());
        }
        if !self.ip_ranges.is_empty() {
            let sets = self
                .ip_ranges
                .iter()
                .map(|set| set.iter().map(range_json).collect());
            wish("ipRanges", sets.collect::<Vec<Value>>().into());
        }
        if let Some(mac) = &self.mac {
            wish("mac", mac.as_str().into());
        }
        if !self.ips.is_empty() {
            wish("ips", self.ips.clone().into());
        }
        if !self.aliases.is_empty() {
            wish("aliases", self.aliases.clone().into());
        }
        if let Some(path) = &self.cgroup_path {
            wish("cgroupPath", path.as_str().into());
        }
        wishes
    }
}

/// The wishes that a plugin declares itself able to fulfil.
pub(crate) fn runtime_config(
    plugin: &PluginConfig,
    wishes: &Map<String, Value>,
) -> Map<String, Value> {
    wishes
        .iter()
        .filter(|(capability, _)| plugin.has_capability(capability))
        .map(|(capability, value)| (capability.clone(), value.clone()))
        .collect()
}

fn port_json(mapping: &PortMapping) -> Value {
    let protocol = match mapping.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": protocol,
        "hostIP": mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
    })
}

fn range_json(range: &IpRange) -> Value {
    let mut json = json!({ "subnet": range.subnet });
    for (key, ip) in [
        ("rangeStart", range.range_start),
        ("rangeEnd", range.range_end),
        ("gateway", range.gateway),
    ] {
        if let Some(ip) = ip {
            json[key] = ip.to_string().into();
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Network;
    use std::path::Path;

    #[test]
    fn a_plugin_gets_only_what_it_declares() {
        let mut pod = PodNetwork::new("id", "ns", "name", "uid", "/run/netns/x");
        assert!(pod.wishes().is_empty());
        let port = |host_port, host_ip| PortMapping {
            host_port,
            container_port: 80,
            protocol: Protocol::Tcp,
            host_ip,
        };
        pod.port_mappings = vec![
            port(0, None),
            port(8080, None),
            port(81, "::1".parse().ok()),
        ];
        pod.ip_ranges = vec![vec![IpRange {
            subnet: "10.0.0.0/8".into(),
            range_start: None,
            range_end: None,
            gateway: "10.0.0.1".parse().ok(),
        }]];
        pod.mac = Some("02:00:00:00:00:01".into());
        let list = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [
            {"type": "a", "capabilities": {"portMappings": true, "mac": false, "dns": true}},
            {"type": "b", "capabilities": {"ipRanges": true}},
        ]});
        let network = Network::from_stored(Path::new("x"), list).unwrap();
        let wishes = pod.wishes();
        assert_eq!(
            Value::from(runtime_config(&network.plugins()[0], &wishes)),
            json!({"portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
                {"hostPort": 81, "containerPort": 80, "protocol": "tcp", "hostIP": "::1"},
            ]})
        );
        assert_eq!(
            Value::from(runtime_config(&network.plugins()[1], &wishes)),
            json!({"ipRanges": [[{"subnet": "10.0.0.0/8", "gateway": "10.0.0.1"}]]})
        );
    }

    #[test]
    fn names_that_would_add_an_argument_are_refused() {
        let pod = PodNetwork::new("id", "ns", "a;K8S_POD_NAMESPACE=kube-system", "u", "/x");
        pod.check().unwrap_err();
        let mut pod = PodNetwork::new("id", "ns", "a", "u", "/x");
        pod.port_mappings = vec![PortMapping {
            host_port: 80,
            container_port: 0,
            protocol: Protocol::Tcp,
            host_ip: None,
        }];
        pod.check().unwrap_err();
        pod.port_mappings[0].host_port = 0;
        pod.check().unwrap();
        assert_eq!(
            pod.args(),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=a;\
             K8S_POD_INFRA_CONTAINER_ID=id;K8S_POD_UID=u"
        );
    }
}
