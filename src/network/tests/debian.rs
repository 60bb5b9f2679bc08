//! The CNI client against the plugins of Debian's `containernetworking-plugins`, on a node that is a
//! network namespace of its own. Skipped where that package or the privilege is missing.
// Helpers are not `#[test]` functions, which alone clippy.toml lets unwrap.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use fake::{LONG, exists, is_ready, until, words};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use slipway_network::{Bandwidth, Cni, CniConfig, IpRange, PodNetwork, PortMapping, Protocol};
use slipway_runtime::loopback::bring_loopback_up;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const PLUGINS: &str = "/usr/lib/cni";

/// Runs a test on a thread in a new network namespace. Everything that it starts is in there too: its
/// runtime has no other thread, and children inherit.
fn on_a_node(needs: &[&str], test: impl AsyncFnOnce(&Path) + Send + 'static) {
    for kind in needs {
        if !exists(&Path::new(PLUGINS).join(kind)) {
            println!("SKIPPED: {PLUGINS}/{kind} is missing (Debian: containernetworking-plugins)");
            return;
        }
    }
    for tool in ["ip", "iptables-save"] {
        if Command::new(tool).arg("-V").output().is_err() {
            println!("SKIPPED: {tool} is missing (Debian: iproute2, iptables)");
            return;
        }
    }
    let run = move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            println!("SKIPPED: unshare(CLONE_NEWNET) needs CAP_SYS_ADMIN");
            return;
        }
        bring_loopback_up().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(dir.path()));
    };
    thread::spawn(run).join().unwrap();
}

/// A pod's network namespace, held open by this process.
struct Namespace(File);

impl Namespace {
    fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            bring_loopback_up().unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Self(thread::spawn(make).join().unwrap())
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Answers one connection to each port with the pod's name.
    fn serve(&self, address: SocketAddr, name: &'static str) {
        let namespace = self.0.try_clone().unwrap();
        let (listening, listens) = mpsc::channel();
        thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let listener = TcpListener::bind(address).unwrap();
            listening.send(()).unwrap();
            for stream in listener.incoming() {
                let _ = stream.unwrap().write_all(name.as_bytes());
            }
        });
        listens.recv_timeout(LONG).unwrap();
    }
}

/// What answers at an address, from the node's namespace.
fn ask(address: SocketAddr) -> String {
    let begun = Instant::now();
    loop {
        // IPv6 addresses are of no use until the kernel has looked for their double.
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(mut stream) => {
                let mut answer = String::new();
                stream.set_read_timeout(Some(LONG)).unwrap();
                stream.read_to_string(&mut answer).unwrap();
                return answer;
            }
            Err(error) if begun.elapsed() > LONG => panic!("{address}: {error}"),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The node's interfaces of a kind.
fn links(kind: &str) -> usize {
    let links: Value =
        serde_json::from_str(&output("ip", &["-j", "link", "show", "type", kind])).unwrap();
    // Nothing to show is `[{},…]` with some versions of iproute2.
    links
        .as_array()
        .unwrap()
        .iter()
        .filter(|link| link.get("ifname").is_some())
        .count()
}

fn reservations(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir.join("ipam/real")).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| name.starts_with("10.") || name.starts_with("fd"))
        .collect()
}

/// A network of the bridge plugin, one of its own address ranges, and host ports.
fn network(dir: &Path, version: &str, ranges: Value) -> Value {
    let mut ipam = json!({
        "type": "host-local", "dataDir": dir.join("ipam"), "routes": [{"dst": "0.0.0.0/0"}],
    });
    if !ranges.is_null() {
        ipam["ranges"] = ranges;
    }
    json!({
        "cniVersion": version, "name": "real",
        "plugins": [
            {"type": "bridge", "bridge": "cni-test0", "isGateway": true, "ipMasq": true,
             "hairpinMode": true, "capabilities": {"ipRanges": true}, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn cni_on(dir: &Path, network: &Value) -> Cni {
    let conf_dir = dir.join("net.d");
    fs::create_dir_all(&conf_dir).unwrap();
    fs::write(conf_dir.join("10-real.conflist"), network.to_string()).unwrap();
    Cni::new(CniConfig {
        conf_dir,
        bin_dirs: vec![PLUGINS.into()],
        cache_dir: dir.join("results"),
        ..CniConfig::default()
    })
}

fn to_port_8080(host_port: u16) -> PortMapping {
    PortMapping {
        host_port,
        container_port: 8080,
        protocol: Protocol::Tcp,
        host_ip: None,
    }
}

fn pod(id: &str, namespace: &Namespace) -> PodNetwork {
    PodNetwork::new(id, "default", id, "uid", namespace.path())
}

#[test]
fn a_pod_is_reached_through_the_bridge_and_leaves_nothing() {
    on_a_node(
        &["bridge", "host-local", "portmap", "bandwidth"],
        async |dir| {
            let mut config = network(dir, "1.0.0", json!([[{"subnet": "10.87.0.0/24"}]]));
            let cni = cni_on(dir, &config);
            until(&cni, is_ready).await;
            let (first, second) = (Namespace::new(), Namespace::new());
            let mut with_port = pod("first", &first);
            with_port.port_mappings = vec![to_port_8080(18080)];
            let one = cni.add(&with_port).await.unwrap();
            let two = cni.add(&pod("second", &second)).await.unwrap();
            assert_eq!((one.ips.len(), two.ips.len()), (1, 1));
            assert_ne!(one.ips, two.ips);
            assert_eq!(links("veth"), 2);
            assert_eq!(reservations(dir).len(), 2);

            first.serve("0.0.0.0:8080".parse().unwrap(), "first");
            second.serve("0.0.0.0:8080".parse().unwrap(), "second");
            assert_eq!(ask((one.ips[0], 8080).into()), "first");
            assert_eq!(ask((two.ips[0], 8080).into()), "second");
            let gateway: IpAddr = "10.87.0.1".parse().unwrap();
            assert_eq!(ask((gateway, 18080).into()), "first");
            let target = format!("--to-destination {}:8080", one.ips[0]);
            assert!(output("iptables-save", &["-t", "nat"]).contains(&target));
            cni.check("second").await.unwrap();

            // DEL after a restart of the daemon, with another configuration in place.
            config["plugins"][0]["bridge"] = "cni-test1".into();
            let cni = cni_on(dir, &config);
            assert_eq!(cni.cached("first"), Some(one));
            cni.del("first", Some(&first.path())).await.unwrap();
            assert_eq!(links("veth"), 1);
            assert_eq!(reservations(dir), [two.ips[0].to_string()]);
            assert!(!output("iptables-save", &["-t", "nat"]).contains(&target));
            cni.check("second").await.unwrap();
            cni.del("first", Some(&first.path())).await.unwrap();

            // A namespace that went before its DEL.
            let path = second.path();
            drop(second);
            cni.del("second", Some(&path)).await.unwrap();
            assert!(reservations(dir).is_empty());
        },
    );
}

#[test]
fn a_pod_gets_an_address_of_each_family() {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        println!("SKIPPED: the kernel has no IPv6");
        return;
    }
    on_a_node(
        &["bridge", "host-local", "portmap", "bandwidth"],
        async |dir| {
            for version in ["0.3.1", "0.4.0", "1.0.0"] {
                let cni = cni_on(dir, &network(dir, version, Value::Null));
                until(&cni, is_ready).await;
                let namespace = Namespace::new();
                let mut pod = pod("dual", &namespace);
                // By the ipRanges capability, as a cluster's pod CIDRs would be.
                pod.ip_ranges = ["10.86.0.0/24", "fd00:86::/64"]
                    .map(|subnet| {
                        vec![IpRange {
                            subnet: subnet.into(),
                            range_start: None,
                            range_end: None,
                            gateway: None,
                        }]
                    })
                    .into();
                let result = cni.add(&pod).await.unwrap();
                assert!(
                    matches!(result.ips[..], [IpAddr::V4(_), IpAddr::V6(_)]),
                    "{version}: {:?}",
                    result.ips
                );
                namespace.serve("[::]:8080".parse().unwrap(), "dual");
                for ip in result.ips {
                    assert_eq!(ask((ip, 8080).into()), "dual");
                }
                cni.check("dual").await.unwrap();
                cni.del("dual", None).await.unwrap();
                assert!(reservations(dir).is_empty(), "{version}");
                assert_eq!(links("veth"), 0);
            }
        },
    );
}

#[test]
fn a_limit_from_an_annotation_reaches_the_kernel() {
    on_a_node(
        &["bridge", "host-local", "portmap", "bandwidth"],
        async |dir| {
            let mut config = network(dir, "1.0.0", json!([[{"subnet": "10.85.0.0/24"}]]));
            config["plugins"][1] =
                json!({"type": "bandwidth", "capabilities": {"bandwidth": true}});
            let cni = cni_on(dir, &config);
            let namespace = Namespace::new();
            let mut pod = pod("slow", &namespace);
            let annotation = (
                "kubernetes.io/ingress-bandwidth".to_owned(),
                "10M".to_owned(),
            );
            pod.bandwidth = Bandwidth::from_annotations(&[annotation].into()).unwrap();
            if let Err(error) = cni.add(&pod).await {
                let text = words(&error);
                assert!(text.contains("qdisc"), "{text}");
                println!("SKIPPED: the kernel has no token bucket filter: {text}");
                return;
            }
            let qdiscs = output("tc", &["qdisc", "show"]);
            assert!(
                qdiscs.contains("tbf") && qdiscs.contains("rate 10Mbit"),
                "{qdiscs}"
            );
            cni.del("slow", None).await.unwrap();
        },
    );
}

#[test]
fn a_plugins_own_words_reach_the_operator_and_the_address_is_given_back() {
    on_a_node(
        &["bridge", "host-local", "portmap", "bandwidth"],
        async |dir| {
            let mut config = network(dir, "1.0.0", json!([[{"subnet": "10.84.0.0/24"}]]));
            config["plugins"][1]["conditionsV4"] = json!(["--no-such-option"]);
            let cni = cni_on(dir, &config);
            let namespace = Namespace::new();
            let mut bad = pod("bad", &namespace);
            bad.port_mappings = vec![to_port_8080(18080)];
            // The bridge plugin has done its part when portmap fails.
            let error = words(&cni.add(&bad).await.unwrap_err());
            assert!(
                error.contains("\"portmap\"") && error.contains("no-such-option"),
                "{error}"
            );
            assert!(reservations(dir).is_empty());
            assert_eq!(links("veth"), 0);
            assert!(cni.attached().await.unwrap().is_empty());
            // A network namespace that isn't one.
            let mut bad = pod("bad", &namespace);
            bad.netns = dir.to_path_buf();
            let error = words(&cni.add(&bad).await.unwrap_err());
            assert!(
                error.contains("\"bridge\"") && error.contains("netns"),
                "{error}"
            );
        },
    );
}
