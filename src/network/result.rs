//! What a plugin's ADD gave: reading it, and converting it between the result formats of the
//! specification's versions (CNI specification, section 5).

use crate::version::{self, SpecVersion};
use serde_json::{Map, Value, json};
use std::net::IpAddr;
use thiserror::Error;

/// Why a plugin's result can't be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the result is not one of CNI {version}: {problem}")]
pub struct ResultError {
    version: String,
    problem: String,
}

/// A network interface that a plugin made or used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name in its namespace.
    pub name: String,
    /// Its hardware address as the plugin gave it; empty when it gave none.
    pub mac: String,
    /// The path of its network namespace; empty for one of the host's.
    pub sandbox: String,
}

/// An address that a plugin assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// The length of its network's prefix in bits.
    pub prefix: u8,
    /// The gateway, if the plugin named one.
    pub gateway: Option<IpAddr>,
    /// Which of the result's interfaces has it.
    pub interface: Option<usize>,
}

/// The result of an ADD, kept as the plugin wrote it (unknown keys included) and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct AddResult {
    version: SpecVersion,
    raw: Map<String, Value>,
    interfaces: Vec<Interface>,
    addresses: Vec<Address>,
}

impl AddResult {
    /// Reads a result. Without a `cniVersion` it is taken to be of `assumed`, the configuration's.
    ///
    /// # Errors
    ///
    /// When the value is no result of its version.
    pub fn parse(value: Value, assumed: SpecVersion) -> Result<Self, ResultError> {
        let bad = |problem: String| ResultError {
            version: assumed.to_string(),
            problem,
        };
        let Value::Object(mut raw) = value else {
            return Err(bad("it is not a JSON object".into()));
        };
        let version = match raw.get("cniVersion") {
            None | Some(Value::Null) => assumed,
            Some(Value::String(text)) if text.is_empty() => assumed,
            Some(Value::String(text)) => SpecVersion::parse(text).ok_or_else(|| {
                bad(format!(
                    "it claims version {:?}, but only {} are supported",
                    shorten(text),
                    version::supported()
                ))
            })?,
            Some(_) => return Err(bad("\"cniVersion\" is not a string".into())),
        };
        let bad = |problem: String| ResultError {
            version: version.to_string(),
            problem,
        };
        let (interfaces, addresses) = if version <= SpecVersion::V0_2_0 {
            (Vec::new(), old_addresses(&raw).map_err(bad)?)
        } else {
            let interfaces = interfaces(&raw).map_err(bad)?;
            let addresses = addresses(&raw, interfaces.len()).map_err(bad)?;
            (interfaces, addresses)
        };
        raw.insert("cniVersion".into(), version.as_str().into());
        Ok(Self {
            version,
            raw,
            interfaces,
            addresses,
        })
    }

    /// The version that the result is written in.
    pub fn version(&self) -> SpecVersion {
        self.version
    }

    /// The interfaces, in the plugin's order.
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// The addresses, in the plugin's order.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The addresses that the pod has on interface `ifname`, in the plugin's order: those on that
    /// interface, and those that the plugin ties to no interface.
    pub fn pod_addresses(&self, ifname: &str) -> Vec<IpAddr> {
        let of_pod = |address: &&Address| match address.interface {
            None => true,
            Some(index) => self.interfaces.get(index).is_some_and(|i| i.name == ifname),
        };
        self.addresses
            .iter()
            .filter(of_pod)
            .map(|address| address.ip)
            .collect()
    }

    /// The result in the format of `version`: unchanged when it is written in it, else converted with
    /// what that format can't express left out.
    pub fn to_version(&self, version: SpecVersion) -> Value {
        let mut raw = self.raw.clone();
        raw.insert("cniVersion".into(), version.as_str().into());
        if version < SpecVersion::V1_1_0 {
            drop_keys(&mut raw, "interfaces", &["mtu", "socketPath", "pciID"]);
            drop_keys(
                &mut raw,
                "routes",
                &["mtu", "advmss", "priority", "table", "scope"],
            );
        }
        let old = |v| v <= SpecVersion::V0_2_0;
        match (old(self.version), old(version)) {
            (true, true) => {}
            (true, false) => raw = self.upgraded(raw),
            (false, true) => raw = self.downgraded(raw),
            (false, false) => {}
        }
        if !old(version) {
            tag_families(&mut raw, version < SpecVersion::V1_0_0);
        }
        Value::Object(raw)
    }

    /// 0.2.0 and before have one address per family and no interfaces.
    fn upgraded(&self, mut raw: Map<String, Value>) -> Map<String, Value> {
        for key in ["ips", "interfaces", "routes"] {
            raw.remove(key);
        }
        let mut routes = Vec::new();
        for key in ["ip4", "ip6"] {
            if let Some(Value::Array(more)) =
                raw.remove(key).and_then(|mut f| take(&mut f, "routes"))
            {
                routes.extend(more);
            }
        }
        let ips: Vec<Value> = self.addresses.iter().map(address_json).collect();
        raw.insert("ips".into(), ips.into());
        if !routes.is_empty() {
            raw.insert("routes".into(), routes.into());
        }
        raw
    }

    fn downgraded(&self, mut raw: Map<String, Value>) -> Map<String, Value> {
        for key in ["ips", "interfaces", "ip4", "ip6"] {
            raw.remove(key);
        }
        let routes = match raw.remove("routes") {
            Some(Value::Array(routes)) => routes,
            _ => Vec::new(),
        };
        for (key, v6) in [("ip4", false), ("ip6", true)] {
            let Some(address) = self.addresses.iter().find(|a| a.ip.is_ipv6() == v6) else {
                continue;
            };
            let mut family = json!({ "ip": format!("{}/{}", address.ip, address.prefix) });
            if let Some(gateway) = address.gateway {
                family["gateway"] = gateway.to_string().into();
            }
            let own = |r: &&Value| {
                r.get("dst")
                    .and_then(Value::as_str)
                    .is_some_and(|dst| dst.contains(':') == v6)
            };
            family["routes"] = routes
                .iter()
                .filter(own)
                .cloned()
                .collect::<Vec<_>>()
                .into();
            raw.insert(key.into(), family);
        }
        raw
    }
}

fn take(value: &mut Value, key: &str) -> Option<Value> {
    value.as_object_mut()?.remove(key)
}

fn address_json(address: &Address) -> Value {
    let mut ip = json!({ "address": format!("{}/{}", address.ip, address.prefix) });
    if let Some(gateway) = address.gateway {
        ip["gateway"] = gateway.to_string().into();
    }
    ip
}

/// Formats before 1.0.0 say the family of each address in `version`; later ones have no such key.
fn tag_families(raw: &mut Map<String, Value>, tag: bool) {
    let Some(Value::Array(ips)) = raw.get_mut("ips") else {
        return;
    };
    for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
        if !tag {
            ip.remove("version");
        } else if let Some(address) = ip.get("address").and_then(Value::as_str) {
            let family = if address.contains(':') { "6" } else { "4" };
            ip.insert("version".into(), family.into());
        }
    }
}

fn drop_keys(raw: &mut Map<String, Value>, list: &str, keys: &[&str]) {
    let Some(Value::Array(items)) = raw.get_mut(list) else {
        return;
    };
    for item in items.iter_mut().filter_map(Value::as_object_mut) {
        keys.iter().for_each(|key| drop(item.remove(*key)));
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(64).collect()
}

/// The objects of a list that may be absent or null.
fn objects<'a>(
    raw: &'a Map<String, Value>,
    key: &str,
) -> Result<Vec<&'a Map<String, Value>>, String> {
    match raw.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| {
                item.as_object()
                    .ok_or(format!("\"{key}\" holds something but objects"))
            })
            .collect(),
        Some(_) => Err(format!("\"{key}\" is not a list")),
    }
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("\"{key}\" is not a string")),
    }
}

fn interfaces(raw: &Map<String, Value>) -> Result<Vec<Interface>, String> {
    objects(raw, "interfaces")?
        .into_iter()
        .map(|object| {
            Ok(Interface {
                name: text(object, "name")?.to_owned(),
                mac: text(object, "mac")?.to_owned(),
                sandbox: text(object, "sandbox")?.to_owned(),
            })
        })
        .collect()
}

fn addresses(raw: &Map<String, Value>, interfaces: usize) -> Result<Vec<Address>, String> {
    objects(raw, "ips")?
        .into_iter()
        .map(|object| {
            let interface = match object.get("interface") {
                None | Some(Value::Null) => None,
                // Some plugins say "none" with -1.
                Some(value) if value.as_i64() == Some(-1) => None,
                Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                    Some(index) if index < interfaces => Some(index),
                    _ => {
                        return Err(format!(
                            "an address is on interface {value}, which it lacks"
                        ));
                    }
                },
            };
            address(object, "address", interface)
        })
        .collect()
}

fn old_addresses(raw: &Map<String, Value>) -> Result<Vec<Address>, String> {
    let mut found = Vec::new();
    for key in ["ip4", "ip6"] {
        match raw.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Object(object)) => found.push(address(object, "ip", None)?),
            Some(_) => return Err(format!("\"{key}\" is not an object")),
        }
    }
    Ok(found)
}

fn address(
    object: &Map<String, Value>,
    key: &str,
    interface: Option<usize>,
) -> Result<Address, String> {
    let cidr = text(object, key)?;
    let no_cidr = || format!("{:?} is not an address with a prefix length", shorten(cidr));
    let (ip, prefix) = cidr.split_once('/').ok_or_else(no_cidr)?;
    let ip: IpAddr = ip.parse().map_err(|_| no_cidr())?;
    let prefix: u8 = prefix.parse().map_err(|_| no_cidr())?;
    if prefix > if ip.is_ipv4() { 32 } else { 128 } {
        return Err(no_cidr());
    }
    let gateway = match text(object, "gateway")? {
        "" => None,
        gateway => Some(
            gateway
                .parse()
                .map_err(|_| format!("gateway {:?} is not an address", shorten(gateway)))?,
        ),
    };
    Ok(Address {
        ip,
        prefix,
        gateway,
        interface,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dual() -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "cni0", "mac": "aa:bb:cc:dd:ee:00"},
                {"name": "eth0", "mac": "aa:bb:cc:dd:ee:ff", "sandbox": "/run/ns", "mtu": 1400}
            ],
            "ips": [
                {"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1},
                {"address": "fd00::5/64", "interface": 1},
                {"address": "10.1.0.1/24", "interface": 0}
            ],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1", "priority": 5}, {"dst": "::/0"}],
            "dns": {"nameservers": ["10.1.0.1"]},
            "vendor": {"kept": true}
        })
    }

    #[test]
    fn the_pods_addresses_are_those_of_its_interface() {
        let result = AddResult::parse(dual(), SpecVersion::V1_0_0).unwrap();
        assert_eq!(result.version(), SpecVersion::V1_1_0);
        let expected: [IpAddr; 2] = ["10.1.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(result.pod_addresses("eth0"), expected);
        assert_eq!(result.addresses().len(), 3);
        assert_eq!(result.to_version(SpecVersion::V1_1_0), dual());
    }

    #[test]
    fn an_older_format_gets_families_and_loses_what_it_lacks() {
        let result = AddResult::parse(dual(), SpecVersion::V1_1_0).unwrap();
        let old = result.to_version(SpecVersion::V0_4_0);
        assert_eq!(old["cniVersion"], "0.4.0");
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["interfaces"][1].get("mtu"), None);
        assert_eq!(
            old["routes"][0],
            json!({"dst": "0.0.0.0/0", "gw": "10.1.0.1"})
        );
        assert_eq!(old["vendor"]["kept"], true);
        let back = AddResult::parse(old, SpecVersion::V0_4_0).unwrap();
        let new = back.to_version(SpecVersion::V1_0_0);
        assert_eq!(new["ips"][0].get("version"), None);
        assert_eq!(new["ips"], dual()["ips"]);
    }

    #[test]
    fn the_format_of_one_address_per_family_converts_both_ways() {
        let result = AddResult::parse(dual(), SpecVersion::V1_1_0).unwrap();
        let oldest = result.to_version(SpecVersion::V0_2_0);
        assert_eq!(
            oldest["ip4"],
            json!({"ip": "10.1.0.5/24", "gateway": "10.1.0.1",
                   "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]})
        );
        assert_eq!(
            oldest["ip6"],
            json!({"ip": "fd00::5/64", "routes": [{"dst": "::/0"}]})
        );
        assert_eq!((oldest.get("ips"), oldest.get("interfaces")), (None, None));
        let back = AddResult::parse(oldest, SpecVersion::V0_2_0).unwrap();
        assert_eq!(back.pod_addresses("eth0").len(), 2);
        let new = back.to_version(SpecVersion::V0_3_1);
        assert_eq!(
            new["ips"][1],
            json!({"address": "fd00::5/64", "version": "6"})
        );
        assert_eq!(new["routes"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn rubbish_is_refused_with_its_reason() {
        for (value, part) in [
            (json!([]), "not a JSON object"),
            (json!({"cniVersion": "9.9.9"}), "9.9.9"),
            (json!({"cniVersion": 1}), "not a string"),
            (json!({"ips": {}}), "not a list"),
            (json!({"ips": [1]}), "but objects"),
            (json!({"ips": [{}]}), "prefix length"),
            (json!({"ips": [{"address": "10.0.0.1"}]}), "prefix length"),
            (
                json!({"ips": [{"address": "10.0.0.1/33"}]}),
                "prefix length",
            ),
            (json!({"ips": [{"address": "x/8"}]}), "prefix length"),
            (
                json!({"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]}),
                "gateway",
            ),
            (
                json!({"ips": [{"address": "10.0.0.1/8", "interface": 0}]}),
                "interface 0",
            ),
            (json!({"interfaces": [{"name": 1}]}), "not a string"),
        ] {
            let error = AddResult::parse(value, SpecVersion::V1_0_0)
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{error}");
        }
        let none = AddResult::parse(json!({}), SpecVersion::V1_0_0).unwrap();
        assert!(none.pod_addresses("eth0").is_empty());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            Just(Value::from("10.0.0.1/8")),
            Just(Value::from("0.2.0")),
        ];
        let keys = prop_oneof![
            Just("cniVersion"),
            Just("ips"),
            Just("ip4"),
            Just("ip6"),
            Just("ip"),
            Just("address"),
            Just("interface"),
            Just("interfaces"),
            Just("name"),
            Just("routes"),
            Just("dst"),
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::hash_map(keys.clone().prop_map(str::to_owned), inner, 0..5)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_converts_to_every_version(value in any_json()) {
            if let Ok(result) = AddResult::parse(value, SpecVersion::V1_0_0) {
                for version in SpecVersion::ALL {
                    let converted = AddResult::parse(result.to_version(version), version);
                    let converted = converted.expect("a conversion is a result");
                    prop_assert_eq!(converted.version(), version);
                }
            }
        }
    }
}
