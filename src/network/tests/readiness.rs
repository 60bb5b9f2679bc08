//! NetworkReady follows what is on disk, and what plugins say of themselves.
// Helpers are not `#[test]` functions, which alone clippy.toml lets unwrap.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fake;

use fake::{LONG, Node, complains, is_ready, pod, until, words};
use slipway_network::{NetworkError, NetworkStatus};
use std::fs;
use tokio::time::timeout;

#[tokio::test]
async fn a_configuration_that_appears_makes_it_ready_and_one_that_goes_does_not() {
    let node = Node::new();
    node.plugin("one");
    let cni = node.cni();
    // The directory does not exist yet.
    until(&cni, complains("net.d")).await;
    let error = cni.add(&pod("pod1")).await.unwrap_err();
    assert!(matches!(error, NetworkError::NotReady(_)));
    assert!(words(&error).contains("net.d"), "{error}");

    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"one"}"#,
    );
    let status = until(&cni, is_ready).await;
    assert_eq!(
        status,
        NetworkStatus::Ready {
            network: "a".into()
        }
    );
    assert_eq!(cni.status(), status);
    cni.add(&pod("pod1")).await.unwrap();

    // One that sorts before it takes over.
    node.network(
        "05-b.conf",
        r#"{"cniVersion":"1.0.0","name":"b","type":"one"}"#,
    );
    until(&cni, |s| {
        *s == NetworkStatus::Ready {
            network: "b".into(),
        }
    })
    .await;
    fs::remove_dir_all(&node.config.conf_dir).unwrap();
    until(&cni, complains("no usable CNI network")).await;
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"c","type":"one"}"#,
    );
    until(&cni, |s| {
        *s == NetworkStatus::Ready {
            network: "c".into(),
        }
    })
    .await;
    // Rubbish in its place is named; mended, it works again.
    node.network("10-a.conf", "{");
    until(&cni, complains("10-a.conf")).await;
    fs::write(
        node.path("new"),
        r#"{"cniVersion":"1.0.0","name":"d","type":"one"}"#,
    )
    .unwrap();
    fs::rename(node.path("new"), node.config.conf_dir.join("10-a.conf")).unwrap();
    until(&cni, is_ready).await;
}

#[tokio::test]
async fn a_plugin_that_is_installed_later_makes_it_ready() {
    let node = Node::new();
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"one"}"#,
    );
    let cni = node.cni();
    until(&cni, complains("\"one\"")).await;
    node.plugin("one");
    until(&cni, is_ready).await;
    fs::remove_file(node.path("bin/one")).unwrap();
    until(&cni, complains("install the plugin")).await;
}

#[tokio::test]
async fn a_plugin_of_the_wrong_version_is_named() {
    let node = Node::new();
    node.plugin("one");
    node.hook(
        "one",
        "VERSION",
        r#"echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.1","0.4.0"]}'"#,
    );
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"one"}"#,
    );
    let cni = node.cni();
    until(
        &cni,
        complains("it speaks CNI 0.3.1, 0.4.0, but the configuration asks for 1.0.0"),
    )
    .await;
    node.hook("one", "VERSION", "echo rubbish");
    cni.reload();
    until(&cni, complains("rubbish")).await;
    node.unhook("one", "VERSION");
    cni.reload();
    until(&cni, is_ready).await;
}

#[tokio::test]
async fn a_plugin_that_says_it_cannot_serve_is_believed_and_asked_again() {
    let node = Node::new();
    node.plugin("one");
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.1.0","name":"a","type":"one"}"#,
    );
    node.hook(
        "one",
        "STATUS",
        r#"echo '{"code":50,"msg":"the agent is starting"}'; exit 1"#,
    );
    let cni = node.cni();
    until(&cni, complains("the agent is starting")).await;
    node.unhook("one", "STATUS");
    // Nothing on disk tells; only that somebody looks at the status now and then.
    let looked = async {
        while !is_ready(&cni.status()) {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    timeout(LONG, looked).await.unwrap();
    node.hook(
        "one",
        "STATUS",
        r#"echo '{"code":51,"msg":"the agent died"}'; exit 1"#,
    );
    let looked = async {
        while is_ready(&cni.status()) {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    timeout(LONG, looked).await.unwrap();
    until(&cni, complains("the agent died")).await;
    // Before 1.1.0 there is no STATUS, so it is not asked.
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"one"}"#,
    );
    until(&cni, is_ready).await;
}

#[tokio::test]
async fn a_plugin_that_hangs_when_looked_at_does_not_hold_up_a_mended_configuration() {
    let node = Node::new();
    node.plugin("one");
    node.plugin("two");
    node.hook("one", "VERSION", "sleep 1000");
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"one"}"#,
    );
    let cni = node.cni();
    fake::eventually("the plugin is asked", || {
        fake::exists(&node.path("env/one.VERSION"))
    })
    .await;
    node.network(
        "10-a.conf",
        r#"{"cniVersion":"1.0.0","name":"b","type":"two"}"#,
    );
    timeout(LONG / 2, until(&cni, is_ready)).await.unwrap();
}

#[tokio::test]
async fn a_plugin_file_added_beside_the_list_is_picked_up() {
    let node = Node::new();
    node.plugin("one");
    node.plugin("two");
    let list = r#"{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"one"}]}"#;
    node.network("10-a.conflist", list);
    let cni = node.cni();
    until(&cni, is_ready).await;
    let dir = node.config.conf_dir.join("a");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("10.conf"), r#"{"type":"missing"}"#).unwrap();
    until(&cni, complains("\"missing\"")).await;
    fs::write(dir.join("10.conf"), r#"{"type":"two"}"#).unwrap();
    until(&cni, is_ready).await;
    cni.add(&pod("pod1")).await.unwrap();
    assert_eq!(node.calls(), ["ADD one", "ADD two"]);
}
