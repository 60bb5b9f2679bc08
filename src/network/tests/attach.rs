//! ADD, DEL, CHECK and GC against plugins that note what they are asked.
// Helpers are not `#[test]` functions, which alone clippy.toml lets unwrap.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use fake::{LONG, Node, chain, eventually, exists, pod, words};
use serde_json::json;
use slipway_network::{IpRange, NetworkError, PortMapping, Protocol};
use std::fs;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::timeout;

#[tokio::test]
async fn plugins_run_in_order_and_each_sees_what_it_should() {
    let node = Node::with_chain("1.0.0");
    let cni = node.cni();
    let mut pod = pod("pod1");
    pod.port_mappings = vec![PortMapping {
        host_port: 80,
        container_port: 8080,
        protocol: Protocol::Udp,
        host_ip: None,
    }];
    pod.ip_ranges = vec![vec![IpRange {
        subnet: "10.9.0.0/24".into(),
        range_start: None,
        range_end: None,
        gateway: None,
    }]];
    let result = cni.add(&pod).await.unwrap();
    let ip: IpAddr = "10.9.0.2".parse().unwrap();
    assert_eq!(result.ips, [ip]);
    assert_eq!(result.networks[0].network, "net");
    assert_eq!(cni.cached("pod1").as_ref(), Some(&result));
    assert_eq!(node.calls(), ["ADD one", "ADD two", "ADD three"]);

    let (one, two, three) = (
        node.input("one", "ADD"),
        node.input("two", "ADD"),
        node.input("three", "ADD"),
    );
    assert_eq!(
        (one["cniVersion"].as_str(), one["name"].as_str()),
        (Some("1.0.0"), Some("net"))
    );
    assert_eq!(
        one["runtimeConfig"],
        json!({"ipRanges": [[{"subnet": "10.9.0.0/24"}]]})
    );
    assert_eq!(one.get("prevResult"), None);
    assert_eq!(two["own"], "setting");
    assert_eq!(two.get("runtimeConfig"), None);
    assert_eq!(two["prevResult"]["by"], "one");
    assert_eq!(two["prevResult"]["cniVersion"], "1.0.0");
    assert_eq!(three["prevResult"]["by"], "two");
    assert_eq!(three["runtimeConfig"]["portMappings"][0]["protocol"], "udp");

    let env = |name| node.env("one", "ADD", name).unwrap();
    assert_eq!(env("CNI_CONTAINERID"), "pod1");
    assert_eq!(env("CNI_IFNAME"), "eth0");
    assert_eq!(env("CNI_NETNS"), "/proc/self/ns/net");
    let (absent, bin) = (node.path("absent"), node.path("bin"));
    assert_eq!(
        env("CNI_PATH"),
        format!("{}:{}", absent.display(), bin.display())
    );
    assert_eq!(
        env("CNI_ARGS"),
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
         K8S_POD_INFRA_CONTAINER_ID=pod1;K8S_POD_UID=uid-1"
    );
}

#[tokio::test]
async fn del_gets_what_add_had_though_the_configuration_is_gone_and_the_daemon_new() {
    let node = Node::with_chain("1.0.0");
    let mut pod = pod("pod1");
    pod.port_mappings = vec![PortMapping {
        host_port: 80,
        container_port: 8080,
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    let result = node.cni().add(&pod).await.unwrap();
    fs::remove_file(node.config.conf_dir.join("10-net.conflist")).unwrap();
    node.forget_calls();

    let cni = node.cni();
    assert_eq!(cni.cached("pod1"), Some(result));
    cni.del("pod1", None).await.unwrap();
    assert_eq!(node.calls(), ["DEL three", "DEL two", "DEL one"]);
    for kind in ["one", "two", "three"] {
        assert_eq!(
            node.input(kind, "DEL")["prevResult"]["by"],
            "three",
            "{kind}"
        );
        assert_eq!(
            node.env(kind, "DEL", "CNI_ARGS"),
            node.env(kind, "ADD", "CNI_ARGS")
        );
        assert_eq!(
            node.env(kind, "DEL", "CNI_NETNS").unwrap(),
            "/proc/self/ns/net"
        );
    }
    let add = node.input("three", "ADD");
    assert_eq!(
        node.input("three", "DEL")["runtimeConfig"],
        add["runtimeConfig"]
    );
    assert!(node.records().is_empty());
    assert_eq!(cni.cached("pod1"), None);
    // Idempotent, also for a pod that never was.
    cni.del("pod1", None).await.unwrap();
    cni.del("never", None).await.unwrap();
    assert_eq!(node.calls().len(), 3);
}

#[tokio::test]
async fn before_0_4_0_del_gets_no_previous_result() {
    let node = Node::with_chain("0.3.1");
    let cni = node.cni();
    cni.add(&pod("pod1")).await.unwrap();
    assert_eq!(
        node.input("two", "ADD")["prevResult"]["ips"][0]["version"],
        "4"
    );
    cni.del("pod1", None).await.unwrap();
    assert_eq!(node.input("two", "DEL").get("prevResult"), None);
    cni.check("pod1").await.unwrap_err();
}

#[tokio::test]
async fn a_result_of_another_version_is_converted_for_the_next_plugin() {
    let node = Node::with_chain("1.0.0");
    let old = r#"echo '{"cniVersion":"0.2.0","ip4":{"ip":"10.9.0.7/24","gateway":"10.9.0.1"}}'"#;
    node.hook("one", "ADD", old);
    let new = r#"echo '{"cniVersion":"1.1.0","ips":[{"address":"10.9.0.8/24"},{"address":"fd00::8/64"}],
        "interfaces":[{"name":"eth0","mtu":9000}]}'"#;
    node.hook("two", "ADD", new);
    node.hook("three", "ADD", new);
    let result = node.cni().add(&pod("pod1")).await.unwrap();
    let seen = node.input("two", "ADD")["prevResult"].clone();
    assert_eq!(
        seen,
        json!({"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.7/24", "gateway": "10.9.0.1"}]})
    );
    let seen = node.input("three", "ADD")["prevResult"].clone();
    assert_eq!(
        (&seen["cniVersion"], seen["interfaces"][0].get("mtu")),
        (&json!("1.0.0"), None)
    );
    let dual: [IpAddr; 2] = ["10.9.0.8".parse().unwrap(), "fd00::8".parse().unwrap()];
    assert_eq!(result.ips, dual);
}

#[tokio::test]
async fn del_goes_on_after_a_failure_and_can_be_repeated() {
    let node = Node::with_chain("1.0.0");
    let cni = node.cni();
    cni.add(&pod("pod1")).await.unwrap();
    node.forget_calls();
    node.hook(
        "three",
        "DEL",
        r#"echo '{"code":7,"msg":"no iptables","details":"here"}'; exit 1"#,
    );
    node.hook("two", "DEL", "echo two is ill >&2; exit 3");
    let error = words(&cni.del("pod1", None).await.unwrap_err());
    assert_eq!(node.calls(), ["DEL three", "DEL two", "DEL one"]);
    for part in [
        "pod1",
        "\"three\"",
        "no iptables",
        "here",
        "\"two\"",
        "two is ill",
        "10-net.conflist",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert_eq!(cni.attached().await.unwrap(), ["pod1"]);
    // Addresses are still known: the pod may still be there.
    assert!(cni.cached("pod1").is_some());
    node.unhook("three", "DEL");
    node.unhook("two", "DEL");
    cni.del("pod1", None).await.unwrap();
    assert!(node.records().is_empty());
}

#[tokio::test]
async fn an_add_that_fails_midway_is_undone() {
    let node = Node::with_chain("1.0.0");
    node.hook(
        "two",
        "ADD",
        r#"echo '{"cniVersion":"1.0.0","code":11,"msg":"try later"}'; exit 1"#,
    );
    let cni = node.cni();
    let error = cni.add(&pod("pod1")).await.unwrap_err();
    assert!(
        matches!(&error, NetworkError::Attach { cleanup: None, .. }),
        "{error:?}"
    );
    let error = words(&error);
    for part in [
        "pod1",
        "ADD",
        "\"two\"",
        "\"net\"",
        "10-net.conflist",
        "try later",
        "11",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert_eq!(
        node.calls(),
        ["ADD one", "ADD two", "DEL three", "DEL two", "DEL one"]
    );
    assert!(node.records().is_empty());
    assert_eq!(cni.cached("pod1"), None);

    // When undoing fails as well, it is said and stays on record for the next DEL.
    node.hook("one", "DEL", "exit 1");
    let error = cni.add(&pod("pod1")).await.unwrap_err();
    assert!(
        matches!(
            &error,
            NetworkError::Attach {
                cleanup: Some(_),
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("\"one\""), "{error}");
    assert_eq!(cni.attached().await.unwrap(), ["pod1"]);
    node.unhook("one", "DEL");
    node.unhook("two", "ADD");
    node.forget_calls();
    // An attachment that was never completed is cleared away before a new one.
    cni.add(&pod("pod1")).await.unwrap();
    assert_eq!(
        node.calls(),
        [
            "DEL three",
            "DEL two",
            "DEL one",
            "ADD one",
            "ADD two",
            "ADD three"
        ]
    );
    let again = cni.add(&pod("pod1")).await.unwrap_err();
    assert!(matches!(again, NetworkError::AlreadyAttached(_)), "{again}");
}

#[tokio::test]
async fn hostile_names_reach_no_plugin() {
    let node = Node::with_chain("1.0.0");
    let cni = node.cni();
    cni.add(&pod("../pod")).await.unwrap_err();
    cni.del("../pod", None).await.unwrap_err();
    let mut bad = pod("pod");
    bad.ifname = "../eth0".into();
    cni.add(&bad).await.unwrap_err();
    let mut bad = pod("pod");
    bad.name = "x;K8S_POD_NAMESPACE=kube-system".into();
    cni.add(&bad).await.unwrap_err();
    let mut bad = pod("pod");
    bad.netns = "relative".into();
    cni.add(&bad).await.unwrap_err();
    assert!(node.calls().is_empty() && node.records().is_empty());
}

#[tokio::test]
async fn check_asks_every_plugin_unless_forbidden() {
    let node = Node::with_chain("1.0.0");
    let cni = node.cni();
    assert!(matches!(
        cni.check("pod1").await,
        Err(NetworkError::NotAttached(_))
    ));
    cni.add(&pod("pod1")).await.unwrap();
    node.forget_calls();
    cni.check("pod1").await.unwrap();
    assert_eq!(node.calls(), ["CHECK one", "CHECK two", "CHECK three"]);
    assert_eq!(node.input("one", "CHECK")["prevResult"]["by"], "three");
    node.hook(
        "two",
        "CHECK",
        r#"echo '{"code":100,"msg":"the veth is gone"}'; exit 1"#,
    );
    let error = words(&cni.check("pod1").await.unwrap_err());
    assert!(
        error.contains("the veth is gone") && error.contains("\"two\""),
        "{error}"
    );

    let node = Node::with_chain("1.0.0");
    node.network(
        "10-net.conflist",
        &chain("1.0.0", r#""disableCheck":true,"#),
    );
    let cni = node.cni();
    cni.add(&pod("pod1")).await.unwrap();
    node.forget_calls();
    cni.check("pod1").await.unwrap();
    assert!(node.calls().is_empty());
}

#[tokio::test]
async fn gc_detaches_the_stale_and_names_the_valid() {
    let node = Node::with_chain("1.1.0");
    let cni = node.cni();
    for id in ["keep", "stale"] {
        cni.add(&pod(id)).await.unwrap();
    }
    node.forget_calls();
    cni.gc(&["keep".into(), "unknown".into()], &[])
        .await
        .unwrap();
    assert_eq!(
        node.calls(),
        [
            "DEL three",
            "DEL two",
            "DEL one",
            "GC one",
            "GC two",
            "GC three"
        ]
    );
    assert_eq!(node.env("one", "DEL", "CNI_CONTAINERID").unwrap(), "stale");
    assert_eq!(
        node.input("two", "GC")["cni.dev/valid-attachments"],
        json!([{"containerID": "keep", "ifname": "eth0"}])
    );
    assert_eq!(cni.attached().await.unwrap(), ["keep"]);
    node.hook("one", "GC", "echo no >&2; exit 1");
    node.forget_calls();
    let error = words(&cni.gc(&["keep".into()], &[]).await.unwrap_err());
    assert!(error.contains("\"one\""), "{error}");
    assert_eq!(node.calls(), ["GC one", "GC two", "GC three"]);

    for (version, more) in [("1.0.0", ""), ("1.1.0", r#""disableGC":true,"#)] {
        let node = Node::with_chain(version);
        node.network("10-net.conflist", &chain(version, more));
        node.cni().gc(&[], &[]).await.unwrap();
        assert!(node.calls().is_empty());
    }
}

#[tokio::test]
async fn an_add_under_way_is_spared_by_gc_and_waited_for_by_del() {
    let node = Node::with_chain("1.0.0");
    let gate = node.path("gate");
    node.hook(
        "one",
        "ADD",
        &format!(
            r#"if [ "$CNI_CONTAINERID" = slow ]; then while [ ! -e {} ]; do sleep 0.02; done; fi
            echo '{{"ips":[]}}'"#,
            gate.display()
        ),
    );
    let cni = node.cni();
    let slow = tokio::spawn({
        let cni = cni.clone();
        async move { cni.add(&pod("slow")).await }
    });
    eventually("the slow ADD starts", || {
        node.calls().contains(&"ADD one".into())
    })
    .await;
    // Another pod does not wait for it.
    timeout(LONG, cni.add(&pod("quick")))
        .await
        .unwrap()
        .unwrap();
    cni.gc(&["quick".into()], &[]).await.unwrap();
    assert!(!node.calls().iter().any(|call| call.starts_with("DEL")));
    let mut del = tokio::spawn({
        let cni = cni.clone();
        async move { cni.del("slow", None).await }
    });
    assert!(timeout(Duration::from_millis(200), &mut del).await.is_err());
    // The caller of ADD gives up; the ADD itself goes on, then DEL has its turn.
    slow.abort();
    node.forget_calls();
    fs::write(&gate, "").unwrap();
    timeout(LONG, del).await.unwrap().unwrap().unwrap();
    assert_eq!(
        node.calls(),
        ["ADD two", "ADD three", "DEL three", "DEL two", "DEL one"]
    );
    assert_eq!(cni.attached().await.unwrap(), ["quick"]);
}

#[test]
fn a_daemon_that_dies_in_an_add_leaves_a_record_for_the_next() {
    let node = Node::with_chain("1.0.0");
    node.hook("two", "ADD", "sleep 1000");
    let dying = tokio::runtime::Runtime::new().unwrap();
    dying.block_on(async {
        let cni = node.cni();
        tokio::spawn(async move { cni.add(&pod("pod1")).await });
        eventually("ADD gets to the second plugin", || {
            exists(&node.path("env/two.ADD"))
        })
        .await;
    });
    dying.shutdown_timeout(Duration::ZERO);
    node.forget_calls();

    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let cni = node.cni();
        assert_eq!(cni.cached("pod1"), None);
        assert_eq!(cni.attached().await.unwrap(), ["pod1"]);
        cni.del("pod1", None).await.unwrap();
        assert_eq!(node.calls(), ["DEL three", "DEL two", "DEL one"]);
        assert_eq!(node.input("one", "DEL").get("prevResult"), None);
        assert!(node.records().is_empty());
    });
}

#[tokio::test]
async fn a_damaged_record_is_set_aside_and_the_pod_detached_all_the_same() {
    let node = Node::with_chain("1.0.0");
    node.cni().add(&pod("pod1")).await.unwrap();
    fs::write(node.config.cache_dir.join("pod1.json"), "{\"schema\":99}").unwrap();
    node.forget_calls();
    let cni = node.cni();
    assert_eq!(cni.cached("pod1"), None);
    assert_eq!(cni.attached().await.unwrap(), ["pod1"]);
    cni.del("pod1", Some("/proc/self/ns/net".as_ref()))
        .await
        .unwrap();
    assert_eq!(node.calls(), ["DEL three", "DEL two", "DEL one"]);
    assert_eq!(
        node.env("one", "DEL", "CNI_NETNS").unwrap(),
        "/proc/self/ns/net"
    );
    assert_eq!(node.records(), ["pod1.json.unreadable"]);
    assert!(cni.attached().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_not_named_to_del() {
    let node = Node::with_chain("1.0.0");
    let cni = node.cni();
    for gone in [node.path("nowhere"), node.path("log")] {
        cni.add(&pod("pod1")).await.unwrap();
        cni.del("pod1", Some(&gone)).await.unwrap();
        assert_eq!(node.env("one", "DEL", "CNI_NETNS").unwrap(), "");
    }
}

#[tokio::test]
async fn several_networks_give_several_interfaces() {
    let mut node = Node::with_chain("1.0.0");
    node.plugin("second");
    node.network(
        "20-b.conf",
        r#"{"cniVersion":"1.0.0","name":"b","type":"second"}"#,
    );
    node.hook(
        "second",
        "ADD",
        r#"echo '{"ips":[{"address":"10.8.0.1/24"}]}'"#,
    );
    node.config.max_conf_num = 0;
    let cni = node.cni();
    let result = cni.add(&pod("pod1")).await.unwrap();
    let on: Vec<_> = result
        .networks
        .iter()
        .map(|n| (n.network.as_str(), n.ifname.as_str()))
        .collect();
    assert_eq!(on, [("net", "eth0"), ("b", "eth1")]);
    assert_eq!(node.env("second", "ADD", "CNI_IFNAME").unwrap(), "eth1");
    // The pod's addresses are those of its first network.
    assert_eq!(result.ips, ["10.9.0.2".parse::<IpAddr>().unwrap()]);
    node.hook("one", "ADD", "exit 1");
    cni.del("pod1", None).await.unwrap();
    assert_eq!(node.env("second", "DEL", "CNI_IFNAME").unwrap(), "eth1");
    assert_eq!(
        node.calls()
            .iter()
            .filter(|call| call.starts_with("DEL"))
            .count(),
        4
    );
}
