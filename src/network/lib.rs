//! Pod networking: CNI and DNS files.
//!
//! [`Cni`] attaches pods to the node's network by executing the CNI plugins that the node's
//! configuration names (CNI specification 1.1.0, back to 0.3.1 and before). [`dns`]
//! is usable without it.

#![forbid(unsafe_code)]

mod attachment;
mod bandwidth;
mod chain;
mod cni;
mod config;
mod directory;
pub mod dns;
mod error;
mod name;
mod plugin;
mod pod;
mod readiness;
mod result;
mod turns;
mod version;
mod watch;

pub use attachment::{Attached, NetworkAttachment, NetworkResult, RecordError};
pub use bandwidth::{Bandwidth, BandwidthError, EGRESS_ANNOTATION, INGRESS_ANNOTATION};
pub use cni::{Cni, CniConfig};
pub use config::{ConfigError, Network, PluginConfig};
pub use directory::Directory;
pub use dns::{DnsConfig, DnsError};
pub use error::{NetworkError, StepError, StepErrors};
pub use name::{
    NameError, check_container_id, check_ifname, check_network_name, check_plugin_type,
};
pub use plugin::{PluginError, Verb};
pub use pod::{IpRange, PodNetwork, PortMapping, Protocol};
pub use readiness::NetworkStatus;
pub use result::{AddResult, Address, Interface, ResultError};
pub use version::SpecVersion;
