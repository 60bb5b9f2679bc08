//! Pods on a network made by Debian's CNI plugins: addresses, ports, DNS, host network.

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tonic::Code;

use crate::harness::*;

tests![
    a_pod_has_addresses,
    pods_reach_each_other_and_the_host,
    loopback_is_up,
    ports_are_mapped,
    the_hosts_network,
    an_address_is_given_back,
    dns_of_the_host,
    the_network_outlives_containers,
    a_handlers_own_network,
];

/// The host's address on the test's bridge.
fn gateway(env: &Env) -> String {
    format!("10.{}.{}.1", 100 + env.number / 250, env.number % 250)
}

async fn networked(daemon: &Daemon) -> Result<Pod> {
    daemon.pod(config::own_network).await
}

async fn addresses(pod: &Pod) -> Result<Vec<String>> {
    let network = pod
        .status()
        .await?
        .network
        .context("no network in the status")?;
    let more = network.additional_ips.into_iter().map(|a| a.ip);
    Ok(std::iter::once(network.ip).chain(more).collect())
}

async fn a_pod_has_addresses(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = networked(&daemon).await?;
    let told = addresses(&pod).await?;
    assert_eq!(told.len(), 2, "{told:?}");
    let prefix = gateway(&env).trim_end_matches('1').to_owned();
    assert!(told[0].starts_with(&prefix), "{told:?}");
    assert!(
        told[1].starts_with(&format!("fd00:{}:", env.number)),
        "{told:?}"
    );
    let container = pod.sleeper().await?;
    let text = container
        .exec_output(&["ip", "addr", "show", "eth0"])
        .await?;
    for address in &told {
        assert!(
            text.contains(&format!(" {address}/")),
            "{address} is not in {text}"
        );
    }
    // A stopped pod has none: whoever asks must not connect to another's.
    pod.stop().await?;
    let after = pod
        .status()
        .await?
        .network
        .map(|n| n.ip)
        .unwrap_or_default();
    assert_eq!(after, "");
    Ok(())
}

async fn pods_reach_each_other_and_the_host(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let (one, two) = (networked(&daemon).await?, networked(&daemon).await?);
    let server = one
        .run(
            &[
                "sh",
                "-c",
                "echo up; while :; do echo hello | nc -l -p 8080; done",
            ],
            |_| {},
        )
        .await?;
    server.says("up").await?;
    let to = addresses(&one).await?.remove(0);
    let client = two.sleeper().await?;
    let answer = eventually("an answer from the other pod", seconds(10), || async {
        let exec = client
            .exec(&["sh", "-c", &format!("nc -w 2 {to} 8080 </dev/null")])
            .await?;
        Ok((exec.code == 0 && !exec.stdout.is_empty()).then_some(exec.stdout))
    })
    .await?;
    assert_eq!(answer, "hello\n");
    client
        .exec_output(&["ping", "-c", "1", "-W", "5", &gateway(&env)])
        .await?;
    Ok(())
}

async fn loopback_is_up(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let container = networked(&daemon).await?.sleeper().await?;
    let text = container.exec_output(&["ip", "addr", "show", "lo"]).await?;
    assert!(
        text.contains("127.0.0.1/8") && text.contains("::1/128") && text.contains("UP"),
        "{text}"
    );
    container
        .exec_output(&["ping", "-c", "1", "-W", "5", "127.0.0.1"])
        .await?;
    Ok(())
}

/// What somebody at an address says.
pub async fn hear(address: &str) -> Result<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let mut text = String::new();
    tokio::time::timeout(seconds(5), stream.read_to_string(&mut text)).await??;
    Ok(text)
}

async fn ports_are_mapped(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let (host_port, bound_port) = (
        i32::try_from(20_000 + env.number)?,
        i32::try_from(30_000 + env.number)?,
    );
    let mapping = |host_port: i32, host_ip: &str| cri::PortMapping {
        protocol: cri::Protocol::Tcp.into(),
        container_port: 8080,
        host_port,
        host_ip: host_ip.into(),
    };
    let pod = daemon
        .pod(|c| {
            config::own_network(c);
            // No host port: nothing is mapped, and nothing must fail.
            c.port_mappings = vec![
                mapping(host_port, ""),
                mapping(bound_port, &gateway(&env)),
                mapping(0, ""),
            ];
        })
        .await?;
    let server = pod
        .run(
            &[
                "sh",
                "-c",
                "echo up; while :; do echo mapped | nc -l -p 8080; done",
            ],
            |_| {},
        )
        .await?;
    server.says("up").await?;
    for address in [
        format!("{}:{host_port}", gateway(&env)),
        format!("127.0.0.1:{host_port}"),
        format!("{}:{bound_port}", gateway(&env)),
    ] {
        let heard = eventually(&format!("an answer at {address}"), seconds(10), || async {
            Ok(hear(&address).await.ok().filter(|t| !t.is_empty()))
        })
        .await?;
        assert_eq!(heard, "mapped\n", "{address}");
    }
    pod.stop().await?;
    assert!(
        hear(&format!("127.0.0.1:{host_port}")).await.is_err(),
        "the port is still mapped"
    );
    let rules = output("iptables-save", &[]).await?;
    assert!(!rules.contains(&pod.id), "rules are left: {rules}");
    for bad in [-1, 65536, 70000] {
        let mut config = config::pod(&daemon);
        config::own_network(&mut config);
        config.port_mappings = vec![mapping(bad, "")];
        refused(
            daemon.run_pod(config).await.map(|p| p.id),
            tonic::Code::InvalidArgument,
            &["port"],
        );
    }
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    config.port_mappings = vec![mapping(host_port, "no address")];
    refused(
        daemon.run_pod(config).await.map(|p| p.id),
        tonic::Code::InvalidArgument,
        &["no address"],
    );
    Ok(())
}

async fn the_hosts_network(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let container = pod.sleeper().await?;
    let here = std::fs::read_link("/proc/self/ns/net")?
        .display()
        .to_string();
    assert_eq!(
        container
            .exec_output(&["readlink", "/proc/self/ns/net"])
            .await?,
        here
    );
    // The kubelet takes the node's addresses by itself.
    assert_eq!(
        pod.status()
            .await?
            .network
            .map(|n| n.ip)
            .unwrap_or_default(),
        ""
    );
    Ok(())
}

async fn an_address_is_given_back(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = networked(&daemon).await?;
    let address = addresses(&pod).await?.remove(0);
    let held = env
        .root
        .join(format!("net.addresses/test{}/{address}", env.number));
    assert!(held.exists(), "{}", held.display());
    pod.stop().await?;
    assert!(
        !held.exists(),
        "the address is still reserved after StopPodSandbox"
    );
    Ok(())
}

async fn dns_of_the_host(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    // Without a DNS configuration the pod has the node's.
    let pod = networked(&daemon).await?;
    let text = pod.output(&["cat", "/etc/resolv.conf"], |_| {}).await?;
    let servers = |text: &str| {
        text.lines()
            .filter(|l| l.starts_with("nameserver"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        servers(&text),
        servers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
    );
    Ok(())
}

async fn the_network_outlives_containers(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = networked(&daemon).await?;
    let one = pod.sleeper().await?;
    let address = one
        .exec_output(&["sh", "-c", "ip -o -4 addr show eth0"])
        .await?;
    one.stop(0).await?;
    one.remove().await?;
    let two = pod.sleeper().await?;
    assert_eq!(
        two.exec_output(&["sh", "-c", "ip -o -4 addr show eth0"])
            .await?,
        address
    );
    Ok(())
}

/// A handler has networks of its own, from a directory that is read for each pod.
async fn a_handlers_own_network(env: Env) -> Result<()> {
    let dir = env.root.join("net-of-apart");
    let shown = dir.display().to_string();
    let daemon = env
        .daemon_with(|s| {
            s.set("runtimes.apart.type", "\"native\"");
            s.set("runtimes.apart.network_conf_dir", &format!("{shown:?}"));
        })
        .await?;
    daemon.pull("test").await?;
    let apart = || {
        let mut pod = config::pod(&daemon);
        config::own_network(&mut pod);
        pod
    };
    let refusal = daemon.run_pod_under("apart", apart()).await;
    refused(refusal.map(|pod| pod.id), Code::Unavailable, &[&shown]);

    let subnet = format!("10.{}.{}", 180 + env.number / 250, env.number % 250);
    let addresses_dir = env.root.join("apart.addresses");
    let network = serde_json::json!({
        "cniVersion": "1.0.0", "name": "apart", "plugins": [{
            "type": "ptp",
            "ipam": {"type": "host-local", "dataDir": addresses_dir, "subnet": format!("{subnet}.0/24")},
        }],
    });
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("10-apart.conflist"), network.to_string())?;
    let pod = daemon.run_pod_under("apart", apart()).await?;
    let beside = networked(&daemon).await?;
    let told = addresses(&pod).await?;
    assert!(told[0].starts_with(&format!("{subnet}.")), "{told:?}");
    let others = addresses(&beside).await?;
    let prefix = gateway(&env).trim_end_matches('1').to_owned();
    assert!(others[0].starts_with(&prefix), "{others:?}");

    // It is detached by what it was attached by.
    let held = addresses_dir.join("apart").join(&told[0]);
    assert!(held.exists());
    std::fs::remove_dir_all(&dir)?;
    daemon.kill(Signal::SIGKILL).await?;
    daemon.launch().await?;
    pod.stop().await?;
    assert!(!held.exists(), "{} is still held", told[0]);
    Ok(())
}
